"""Write what the speed records say into README.md and book/speed.md, and draw
book/images/growth.png.

python benchmarks/speed_report.py
"""

import json
import statistics
from pathlib import Path

from contestants import KEPT, NAMES, OURS, PARTS, PLAIN, VMAP

from minisupernet.course.plots import new_figure

ROOT = Path(__file__).resolve().parent.parent
LABELS = {
    "tasks": "tasks T",
    "images": "images a task B",
    "z_dim": "numbers in z",
    "channels": "filters of the target",
}
ALT = (
    "Milliseconds and memory of a step against tasks, images a task, numbers in z and"
    " filters of the target: measured points beside dashed lines of the two formulas."
)
HEADS = (
    "ours",
    "vmap",
    "tuned loop",
    "plain loop",
    "hypnet&shy;torch",
    "hyper&shy;light",
)  # NAMES, short
AIMS = 4, 2  # times faster than the plain loop, and than the best peer, at 98 tasks
AT = 98


def read(name: str) -> dict:
    """A record of the folder results."""
    return json.loads((ROOT / "results" / name).read_text(encoding="utf-8"))


def markdown(lines: list[list[str]]) -> str:
    """A table: the first line is its head, and all is set to the right."""
    head, *body = lines
    return "\n".join(
        "| " + " | ".join(line) + " |" for line in [head, ["---:"] * len(head), *body]
    )


def number(value: float | None, digits: int = 0) -> str:
    """A number as it stands in a table; a dash for what was left out."""
    return "–" if value is None else f"{value:.{digits}f}"


def most_threads(record: dict) -> list[dict]:
    """The rows with the most threads."""
    most = max(row["threads"] for row in record["rows"])
    return [row for row in record["rows"] if row["threads"] == most]


def step_times(row: dict) -> dict[str, float]:
    """Milliseconds on the clock of each contestant's whole step."""
    return {name: parts["step"] for name, parts in row["milliseconds"]["wall"].items()}


def steps_table(speed: dict) -> str:
    """The whole step: milliseconds on the clock of each contestant, and how many times
    faster this package is.
    """
    lines = [
        [
            "threads",
            "tasks",
            *HEADS,
            "plain loop ÷ ours",
            "best peer ÷ ours",
            "of matrix rate",
        ]
    ]
    for row in speed["rows"]:
        steps = step_times(row)
        times = [
            number(steps.get(name), 1 if row["tasks"] == 1 else 0) for name in NAMES
        ]
        ratios = [
            number(row[f"times_faster_than_{of}"], 1) for of in ("loop", "best_peer")
        ]
        share = f"{100 * row['share_of_matrix_rate']:.0f} %"
        lines.append([str(row["threads"]), str(row["tasks"]), *times, *ratios, share])
    return markdown(lines)


def at_98(speed: dict) -> dict:
    """The row of 98 tasks with the most threads."""
    return next(row for row in most_threads(speed) if row["tasks"] == AT)


def verdict(speed: dict) -> str:
    """Whether the step is as fast as it was meant to be."""
    row = at_98(speed)
    loop, peer = row["times_faster_than_loop"], row["times_faster_than_best_peer"]
    outcome = (
        "The aims were"
        if loop >= AIMS[0] and peer >= AIMS[1]
        else "The aims were not reached: they were"
    )
    return (
        f"At {AT} tasks and {row['threads']} threads the step is {loop:.1f} times as"
        f" fast as the {PLAIN} and {peer:.1f} times as fast as the best peer,"
        f" {row['best_peer']}. {outcome} {AIMS[0]} and {AIMS[1]} times."
    )


def pieces(speed: dict) -> str:
    """What the two pieces of this package bring at 98 tasks: memory kept from step to
    step, and its convolutions.
    """
    lines = []
    for row in speed["rows"]:
        if row["tasks"] == AT:
            steps = step_times(row)
            lines.append(
                f"With {row['threads']} thread{'s' * (row['threads'] > 1)} `vmap` takes"
                f" {steps[VMAP]:.0f} ms, {steps[KEPT]:.0f} ms with memory kept, and"
                f" {steps[OURS]:.0f} ms with these convolutions too."
            )
    return " ".join(lines)


def parts_table(speed: dict) -> str:
    """98 tasks with the most threads: milliseconds on the clock of each part, and the
    process's peak memory.
    """
    row = at_98(speed)
    lines = [["", *PARTS, "peak memory, MB"]]
    for name, parts in row["milliseconds"]["wall"].items():
        lines.append(
            [
                name,
                *(number(parts[part], 1) for part in PARTS),
                number(row["peak_megabytes"][name]),
            ]
        )
    return markdown(lines)


def layers_table(layers: dict) -> str:
    """Every product of every convolution with the most threads: its rate, each way, and
    the quickest in bold.
    """
    ways = list(layers["rows"][0]["gigaflops"])
    lines = [["layer", "product", *ways]]
    for row in most_threads(layers):
        best = max(row["gigaflops"].values())
        rates = [
            f"**{rate:.0f}**" if rate == best else f"{rate:.0f}"
            for rate in row["gigaflops"].values()
        ]
        lines.append([row["layer"], row["product"], *rates])
    return markdown(lines)


def bound(layers: dict) -> str:
    """All convolutions of a step: as this package does them, each product its quickest
    way, and at the matrix rate.
    """
    rows = most_threads(layers)
    threads, rate = (
        rows[0]["threads"],
        statistics.median(row["matrix_rate_gflops"] for row in rows),
    )
    mine = sum(row["milliseconds"][OURS] for row in rows)
    best = sum(min(row["milliseconds"].values()) for row in rows)
    needed = (
        sum(row["milliseconds"][OURS] * row["gigaflops"][OURS] for row in rows) / rate
    )
    return (
        f"With {threads} thread{'s' * (threads > 1)} all of them together take"
        f" {mine:.0f} ms. With the quickest way for each it would be {best:.0f} ms, and"
        f" {needed:.0f} ms at the {rate:.0f} × 10⁹ operations a second of a large"
        " matrix product."
    )


def budget_table(budget: dict) -> str:
    """The original's whole budget on each device: trained, and what a plain loop and
    one task a step would take.
    """
    lines = [
        [
            "device",
            "seconds",
            "plain loop",
            "one task a step",
            "accuracy, %",
            "memory, MB",
        ]
    ]
    for run in budget["devices"]:
        steps, whole = {row["tasks"]: row for row in run["steps"]}, run["whole"]
        by_loop = (
            1e-3 * steps[whole["tasks"]]["plain_loop_milliseconds"] * whole["steps"]
        )
        one_by_one = 1e-3 * steps[1]["milliseconds"] * run["task_steps"]
        times = [
            number(value, int(whole["seconds"] < 10))
            for value in (whole["seconds"], by_loop, one_by_one)
        ]
        right, most = (
            number(100 * whole["test_accuracy"], 1),
            number(steps[whole["tasks"]]["megabytes"]),
        )
        lines.append([run["device"].partition(": ")[2], *times, right, most])
    return markdown(lines)


def many_at_once(budget: dict) -> str:
    """A step of the most tasks that each device was given."""
    lines = []
    for run in budget["devices"]:
        row = max(run["steps"], key=lambda row: row["tasks"])
        rate = 1e3 * row["tasks"] * run["images"] / row["milliseconds"]
        lines.append(
            f"A single step of {row['tasks']:,} tasks takes"
            f" {1e-3 * row['milliseconds']:.2g} s ({rate:,.0f} images a second) and"
            f" holds {row['megabytes'] / 1024:.1f} GiB"
            f" ({run['device'].partition(': ')[2]})."
        )
    return " ".join(lines)


def large(growth: dict) -> str:
    """What one step of a hundred wide residual networks took."""
    row = growth["large"]
    return (
        f"One step for {row['tasks']} tasks of {row['images']} images, {row['group']}"
        f" tasks at a time, took {row['seconds']:.0f} s with one thread, and the"
        f" process held {row['megabytes'] / 1024:.1f} GiB at most. Each network has"
        f" {row['weights']:,} weights; {row['learned']:,} numbers are learned for all"
        " of them together."
    )


BLOCKS = {
    "README.md": {
        "steps": (
            "05_speed.json",
            lambda speed: steps_table({"rows": most_threads(speed)}),
        )
    },
    "book/speed.md": {
        "steps": ("05_speed.json", steps_table),
        "verdict": ("05_speed.json", verdict),
        "parts": ("05_speed.json", parts_table),
        "pieces": ("05_speed.json", pieces),
        "layers": ("05_layers.json", layers_table),
        "bound": ("05_layers.json", bound),
        "growth": ("05_growth.json", lambda growth: f"![{ALT}](images/growth.png)"),
        "large": ("05_growth.json", large),
        "budget": ("05_budget.json", budget_table),
        "most": ("05_budget.json", many_at_once),
    },
}  # page -> {mark: (record, what it writes)}


def filled(text: str, mark: str, drawn: str) -> str:
    """`text` with what stands between the two comments of this mark replaced."""
    begin, end = f"<!-- speed: {mark} -->\n", f"<!-- /speed: {mark} -->"
    before, rest = text.split(begin)
    return f"{before}{begin}{drawn}\n{end}{rest.split(end)[1]}"


def draw(growth: dict, path: Path) -> None:
    """Measured points and the formula's lines, scaled to the point that all sweeps
    share.
    """
    figure, axes = new_figure(2, len(LABELS), width=9.0, height=4.6)
    shared = next(
        row for row in growth["sweeps"]["tasks"] if row in growth["sweeps"]["images"]
    )
    for column, (name, label) in enumerate(LABELS.items()):
        rows = growth["sweeps"][name]
        x = [row[name] for row in rows]
        for axis, measured, formula in (
            (axes[0], "milliseconds", "operations"),
            (axes[1], "megabytes", "floats"),
        ):
            axis[column].plot(x, [row[measured] for row in rows], "o", label="measured")
            scale = shared[measured] / shared[formula]
            axis[column].plot(
                x, [row[formula] * scale for row in rows], "--", label="formula"
            )
            axis[column].set(xscale="log", yscale="log", xticks=x, xticklabels=x)
            axis[column].minorticks_off()
            if column:
                axis[column].sharey(axis[0])
                axis[column].tick_params(labelleft=False)
        axes[1][column].set_xlabel(label)
    axes[0][0].set_ylabel("ms a step")
    axes[1][0].set_ylabel("memory, MB")
    axes[0][0].legend()
    figure.savefig(path)


def main() -> None:
    """Fill every block of both pages, and draw the figure."""
    for page, blocks in BLOCKS.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        for mark, (record, write) in blocks.items():
            text = filled(text, mark, write(read(record)))
        (ROOT / page).write_text(text, encoding="utf-8")
    draw(read("05_growth.json"), ROOT / "book" / "images" / "growth.png")


if __name__ == "__main__":
    main()
