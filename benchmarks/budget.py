"""How long the original's whole budget takes: 50,000 task-steps of 20 images, for
experiment 1's generator.

    python benchmarks/budget.py --device cuda --data cifar100 --out
    results/05_budget.json

The training is done with 98 tasks a step. Single steps are timed too, of one task, as
the original has it, to 2,000, beside a plain loop over tasks. The record has one run of
each device, the newest.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from contestants import IMAGES, OURS, PLAIN, Z_DIM, Contest, measure, peak
from training import difference

from minisupernet.course.records import provenance
from minisupernet.data import ImageSet, load
from minisupernet.data.tasks import TaskImages, experiment_1, hold_out
from minisupernet.fast.memory import keep_memory
from minisupernet.files import whole_file
from minisupernet.fitting import Fit, accuracy, train_generator
from minisupernet.supernet import SuperNet
from minisupernet.target import TaskClassifier, WeightSpec
from minisupernet.training import pick_device, wait_for

TASK_STEPS, TASKS = 50_000, 98
SIZES = (
    1,
    8,
    32,
    TASKS,
    512,
    2_000,
)  # tasks of a single step; the plain loop, ever slower, does not go on after TASKS


def memory(device: torch.device) -> float:
    """The most MB held: on a GPU since it was last asked, on a CPU by this process."""
    if device.type != "cuda":
        return peak()
    most = torch.cuda.max_memory_allocated(device) / 2**20
    torch.cuda.reset_peak_memory_stats(device)
    return round(most, 1)


def milliseconds_of(contest: Contest, repeats: int) -> float:
    """The median of a step, the first, which warms up, left out."""

    def step() -> None:
        contest.step()
        wait_for(contest.device)

    return statistics.median([measure(step)[0] for _ in range(repeats + 1)][1:])


def single_steps(
    device: torch.device, sizes: Sequence[int], repeats: int
) -> list[dict]:
    """Milliseconds of a step of each number of tasks, its memory, and the plain loop's
    milliseconds beside it.

    The sizes ascend, so that the memory of a process is that of its largest step.
    """
    exact = {
        name: Contest(name, 8, torch.float64, device).answer() for name in (OURS, PLAIN)
    }
    difference(exact, 1e-10)
    rows = []
    for tasks in sorted(sizes):
        memory(device)
        row = {
            "tasks": tasks,
            "milliseconds": milliseconds_of(
                Contest(OURS, tasks, device=device), repeats
            ),
        }
        row["megabytes"] = memory(device)
        if tasks <= TASKS:
            row["plain_loop_milliseconds"] = milliseconds_of(
                Contest(PLAIN, tasks, device=device), repeats
            )
        rows.append({key: round(value, 2) for key, value in row.items()})
        print(rows[-1], flush=True)
    return rows


def train_whole(images: ImageSet, task_steps: int) -> dict:
    """Train on 98 tasks, all of them in every step: seconds of the steps, and the mean
    accuracy on test images.
    """
    device = images.device
    trained = hold_out(1, 0, folds=99, classes=images.classes)[0]
    data = TaskImages(
        images, experiment_1(images.classes).select(trained), flip=True, crop=4
    )
    torch.manual_seed(0)
    target = TaskClassifier().to(device)
    generator = SuperNet(WeightSpec.of(target), Z_DIM).to(device)
    steps = max(task_steps // len(trained), 1)
    z, history = train_generator(
        generator, target, data, Fit(steps, 2e-3, images=IMAGES, every=steps)
    )
    with torch.no_grad():
        right = accuracy(target, generator(z), data, "test").mean().item()
    seconds = round(history.last("seconds"), 2)
    return {
        "tasks": len(trained),
        "steps": steps,
        "seconds": seconds,
        "test_accuracy": round(right, 4),
    }


def record(run: dict, path: Path) -> None:
    """Put a run into the record, in place of an earlier one on the same device."""
    runs = (
        json.loads(path.read_text(encoding="utf-8"))["devices"] if path.exists() else []
    )
    others = [other for other in runs if other["device"] != run["device"]]
    with whole_file(path) as part:
        part.write_text(
            json.dumps({"devices": [*others, run]}, indent=1) + "\n", encoding="utf-8"
        )


def main() -> None:
    """Measure single steps and the whole budget on one device, and record them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", help="auto, cuda or cpu (auto)")
    parser.add_argument(
        "--data", default="auto", help="auto, cifar100 or shapes100 (auto)"
    )
    parser.add_argument(
        "--task-steps", type=int, default=TASK_STEPS, help=f"how many ({TASK_STEPS:,})"
    )
    parser.add_argument(
        "--tasks", type=int, nargs="+", default=SIZES, help="tasks of single steps"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="repeats of a single step (5)"
    )
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write")
    options = parser.parse_args()
    keep_memory()
    device = pick_device(options.device)
    steps = single_steps(
        device, options.tasks, options.repeats
    )  # before the images take memory
    images = load(options.data, device)
    whole = train_whole(images, options.task_steps)
    print(whole)
    about = {"images": IMAGES, "task_steps": options.task_steps}
    record(
        provenance(images, device) | about | {"steps": steps, "whole": whole},
        options.out,
    )


if __name__ == "__main__":
    main()
