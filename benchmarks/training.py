"""Time a training step of many generated networks: this package beside plain PyTorch
and two libraries.

`make bench` puts the peers into a folder of their own and runs

    python benchmarks/training.py --peers _build/peers --out results/05_speed.json

Every contestant has a process of its own, and in it the same generator, task vectors
and images. What they compute is compared before a clock starts; repeats are taken in
turn, in an order drawn anew, so that a busy moment meets them all.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import statistics
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from contestants import (
    HIDDEN,
    IMAGES,
    KEPT,
    NAMES,
    OURS,
    PARTS,
    PLAIN,
    Z_DIM,
    measure,
    operations,
    serve,
)

from minisupernet.target import TaskClassifier, WeightSpec

MANY = 100  # with more tasks than this only the whole step is timed
LONGEST = (
    8e3  # milliseconds: where its first step takes longer, the plain loop is left out
)


class Worker:
    """A contestant in a fresh Python: it does what it is asked, then waits."""

    def __init__(self, name: str, peers: str) -> None:
        fresh = multiprocessing.get_context("spawn")
        self.name = name
        self.pipe, theirs = fresh.Pipe()
        self.process = fresh.Process(
            target=serve, args=(theirs, name, peers), daemon=True
        )
        self.process.start()
        theirs.close()

    def ask(self, order: str, *arguments: object) -> object:
        """What the order gives; ends the program with one line where it fails or the
        process dies.
        """
        try:
            self.pipe.send((order, *arguments))
            reply = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            sys.exit(
                f"the process of {self.name} died, exit status {self.process.exitcode}:"
                " is there enough memory?"
            )
        if isinstance(reply, Exception):
            sys.exit(f"{self.name} could not do its step: {reply}")
        return reply


def difference(answers: dict[str, list[np.ndarray]], most: float) -> float:
    """The largest relative difference of an answer from the plain loop's; ends the
    program above `most`.
    """
    found = {
        name: np.max(
            [
                np.abs(a - b).max() / np.abs(b).max()
                for a, b in zip(own, answers[PLAIN], strict=True)
            ]
        )
        for name, own in answers.items()
    }
    worst = max(found, key=lambda name: np.nan_to_num(found[name], nan=np.inf))
    if not found[worst] <= most:
        sys.exit(
            f"{worst} differs from the {PLAIN} by {found[worst]:.1e}, more than"
            f" {most:.0e}: nothing was timed."
        )
    return float(f"{found[worst]:.1e}")


def race(
    workers: dict[str, Worker], threads: int, parts: tuple[str, ...], repeats: int
) -> tuple[dict[str, dict[str, list]], float]:
    """{contestant: {part: (wall, CPU) milliseconds a repeat}}, the first repeat, which
    warms up, not kept; and the matrix rate, taken after each repeat."""
    times, rates = {name: {part: [] for part in parts} for name in workers}, []
    for repeat in range(repeats + 1):
        for name in random.Random(repeat).sample(
            list(times), len(times)
        ):  # nobody always follows the same one
            taken = workers[name].ask("repeat", threads, parts)
            if not repeat and name == PLAIN and taken["step"][0] > LONGEST:
                del times[name]
            elif repeat:
                for part in parts:
                    times[name][part].append(taken[part])
        rates.append(matrix_rate(threads))
    return times, round(statistics.median(rates), 1)


def matrix_rate(threads: int, repeats: int = 3) -> float:
    """What the machine can do: 10^9 operations a second in a product of two 1024 x 1024
    matrices.
    """
    torch.set_num_threads(threads)
    left, right, out = torch.randn(3, 1024, 1024)
    times = [measure(lambda: torch.mm(left, right, out=out))[0] for _ in range(repeats)]
    return round(2.147e3 / statistics.median(times), 1)


def needed(tasks: int) -> float:
    """10^6 operations that a step cannot do without: three products a layer, two in the
    first.
    """
    per_image = operations(TaskClassifier())
    execution = IMAGES * (3 * per_image["all"] - per_image["convolutions.0"])
    generation = (
        3 * 2 * (Z_DIM * HIDDEN + HIDDEN * WeightSpec.of(TaskClassifier()).size)
    )
    return round(1e-6 * tasks * (execution + generation), 1)


def summary(times: dict[str, dict[str, list]], tasks: int, rate: float) -> dict:
    """Medians of all contestants, and what follows from the time on the clock (None: no
    plain loop).
    """
    medians = {
        clock: {
            name: {
                part: round(statistics.median(t[k] for t in taken), 2)
                for part, taken in parts.items()
            }
            for name, parts in times.items()
        }
        for k, clock in enumerate(("wall", "cpu"))
    }
    steps = {name: parts["step"] for name, parts in medians["wall"].items()}
    mine, best = (
        steps[OURS],
        min((name for name in steps if name not in (OURS, KEPT)), key=steps.get),
    )
    operations_millions = needed(tasks)
    return {
        "milliseconds": medians,
        "best_peer": best,
        "times_faster_than_loop": (
            round(steps[PLAIN] / mine, 2) if PLAIN in steps else None
        ),
        "times_faster_than_best_peer": round(steps[best] / mine, 2),
        "matrix_rate_gflops": rate,
        "operations_millions": operations_millions,
        "share_of_matrix_rate": round(operations_millions / mine / rate, 3),
    }


def rows(
    workers: dict[str, Worker], sizes: list[int], threads: list[int], repeats: int
) -> list[dict]:
    """A row for each number of tasks and threads; sizes ascend, so that a process's
    peak is that of its row.
    """
    found = []
    for tasks in sorted(sizes):
        for worker in workers.values():
            worker.ask("prepare", tasks)
        many = tasks > MANY
        for count in threads:
            apart = difference(
                {name: worker.ask("answer") for name, worker in workers.items()}, 1e-5
            )
            turns = min(repeats, 3) if many else repeats
            times, rate = race(workers, count, PARTS[:1] if many else PARTS, turns)
            about = {
                "threads": count,
                "tasks": tasks,
                "repeats": turns,
                "largest_relative_difference": apart,
            }
            row = about | summary(times, tasks, rate)
            row["peak_megabytes"] = {
                name: worker.ask("peak") for name, worker in workers.items()
            }
            print(
                {key: value for key, value in row.items() if key != "milliseconds"},
                flush=True,
            )
            found.append(row)
    return sorted(found, key=lambda row: (row["threads"], row["tasks"]))


def main() -> None:
    """Time every number of tasks and threads, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--peers", required=True, help="folder with hypnettorch and hyperlight"
    )
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1, 2], help="numbers of CPU threads"
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=9,
        help="repeats (9), at most 3 of more than 100 tasks",
    )
    parser.add_argument(
        "--tasks",
        type=int,
        nargs="+",
        default=[1, 8, 32, 98, 512],
        help="numbers of tasks",
    )
    options = parser.parse_args()
    sys.path.append(options.peers)
    workers = {name: Worker(name, options.peers) for name in (*NAMES, KEPT)}
    for worker in workers.values():
        worker.ask("prepare", 8, torch.float64)
    exact = difference(
        {name: worker.ask("answer") for name, worker in workers.items()}, 1e-10
    )
    document = {
        "cores": os.cpu_count(),
        "machine": (
            f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}"
        ),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "images": IMAGES,
        "peers": {name: version(name) for name in ("hypnettorch", "hyperlight")},
        "largest_difference_in_float64": exact,
        "rows": rows(workers, options.tasks, options.threads, options.repeats),
    }
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
