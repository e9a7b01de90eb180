"""Write the tables and the figure of the speed records: README.md, book/speed.md, book/images/growth.png.

python benchmarks/speed_report.py
"""

import json
from pathlib import Path

from minisupernet.plots import new_figure

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- speed: written by benchmarks/speed_report.py -->", "<!-- /speed -->"
NAMES = ("minisupernet", "torch.func.vmap", "plain loop", "hypnettorch", "hyperlight")
LABELS = {"tasks": "tasks T", "images": "images a task B", "z_dim": "numbers in z", "channels": "filters of the target"}


def read(name: str) -> dict:
    """A record of the folder results."""
    return json.loads((ROOT / "results" / name).read_text(encoding="utf-8"))


def table(record: dict) -> str:
    """The whole step as Markdown: milliseconds of each contestant, and how many times faster this package is.

    With one thread it is CPU time, which other work on the machine hardly moves; with more it is time on the clock.
    """
    lines = [("threads", "tasks", *NAMES, "times faster than the loop", "than the best peer", "share of matrix rate")]
    lines.append(["---:"] * len(lines[0]))
    for row in record["rows"]:
        clock = "cpu" if row["threads"] == 1 else "wall"
        steps = [f"{row['milliseconds'][clock][name]['step']:.0f}" for name in NAMES]
        ratios = row["times_faster_than_loop"][clock], row["times_faster_than_best_peer"][clock]
        share = f"{100 * row['share_of_matrix_rate'][clock]:.0f} %"
        numbers = [str(row["threads"]), str(row["tasks"])]
        lines.append([*numbers, *steps, *(f"{ratio:.1f}" for ratio in ratios), share])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def with_table(text: str, drawn: str) -> str:
    """`text` with the table between its two marks replaced."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{drawn}\n{END}{rest.split(END)[1]}"


def draw(record: dict, path: Path) -> None:
    """Measured points and the formula's lines, scaled to the point that all sweeps share."""
    figure, axes = new_figure(2, len(LABELS), width=9.0, height=4.6)
    for column, (name, label) in enumerate(LABELS.items()):
        rows = record["sweeps"][name]
        x = [row[name] for row in rows]
        for axis, measured, formula in ((axes[0], "milliseconds", "operations"), (axes[1], "megabytes", "floats")):
            axis[column].plot(x, [row[measured] for row in rows], "o", label="measured")
            scale = rate(record, measured, formula)
            axis[column].plot(x, [row[formula] * scale for row in rows], "--", label="formula")
            axis[column].set(xscale="log", yscale="log", xticks=x, xticklabels=x)
            axis[column].minorticks_off()
        axes[1][column].set_xlabel(label)
    axes[0][0].set_ylabel("CPU ms a step")
    axes[1][0].set_ylabel("memory, MB")
    axes[0][0].legend()
    figure.savefig(path)


def rate(record: dict, measured: str, formula: str) -> float:
    """The one constant of the formula: measured by formula at the point that all sweeps share."""
    shared = next(row for row in record["sweeps"]["tasks"] if row["tasks"] == 32)
    return shared[measured] / shared[formula]


def main() -> None:
    """Write the tables, and the figure where growth was recorded."""
    drawn = table(read("05_speed.json"))
    for path in (ROOT / "README.md", ROOT / "book" / "speed.md"):
        path.write_text(with_table(path.read_text(encoding="utf-8"), drawn), encoding="utf-8")
    if (ROOT / "results" / "05_growth.json").exists():
        draw(read("05_growth.json"), ROOT / "book" / "images" / "growth.png")


if __name__ == "__main__":
    main()
