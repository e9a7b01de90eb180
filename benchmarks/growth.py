"""How the time and memory of a training step grow: with tasks, images, task vectors and targets.

    python benchmarks/growth.py --out results/05_growth.json

Each point is a process of its own, so that its peak memory is its own. `speed_report.py` draws the record.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch.nn import functional as F

from minisupernet.supernet import SuperNet
from minisupernet.target import TaskClassifier, WeightSpec, run_tasks
from minisupernet.training import keep_memory


@dataclass(frozen=True)
class Point:
    """One step: T tasks, B images each, z_dim numbers a task vector, bare heads, `channels` filters a convolution."""

    tasks: int = 32
    images: int = 20
    z_dim: int = 64
    channels: int = 16


SWEEPS = {"tasks": (8, 32, 98, 196), "images": (5, 20, 80), "z_dim": (16, 64, 256), "channels": (8, 16, 32)}


def costs(point: Point) -> dict[str, float]:
    """What the formula says: operations of a step (10^6) and floats it must hold (10^6).

    6 T (d P + B M) operations: 2 a multiply-add, three products each (forward, and the two gradients), M being the
    multiply-adds of one image. 4 G + 3 T P + T B A floats: the generator with its gradient and AdamW's two moments;
    the T networks, their gradient, and its pieces before they are joined; images and what the layers keep of them.
    """
    c, size = point.channels, WeightSpec.of(TaskClassifier(point.channels)).size
    products = 25 * (3 * c * 256 + c * c * (64 + 16 + 4)) + 4 * c * 100 + 100 * 100 + 100
    kept = 3 * 32 * 32 + 2 * c * (256 + 64 + 16 + 4) + 400
    return {
        "operations": 6e-6 * point.tasks * (point.z_dim * size + point.images * products),
        "floats": 1e-6 * (4 * (point.z_dim + 1) * size + 3 * point.tasks * size + point.tasks * point.images * kept),
    }


def measure(point: Point, repeats: int = 5) -> dict[str, float]:
    """CPU milliseconds of a step with one thread (median), and the MB that steps add to the process's peak."""
    torch.set_num_threads(1)
    keep_memory()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    target = TaskClassifier(point.channels)
    generator = SuperNet(WeightSpec.of(target), point.z_dim, ())
    z, images = torch.randn(point.tasks, point.z_dim), torch.randn(point.tasks, point.images, 3, 32, 32)
    labels, times = torch.randint(2, (point.tasks, point.images)).float(), []
    optimiser = torch.optim.AdamW(generator.parameters(), fused=True)
    for _ in range(repeats + 1):
        start = time.process_time()
        optimiser.zero_grad()
        F.binary_cross_entropy_with_logits(run_tasks(target, generator(z), images), labels).backward()
        optimiser.step()
        times.append(1e3 * (time.process_time() - start))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"milliseconds": round(statistics.median(times[1:]), 1), "megabytes": round(peak / 1024, 1)}


def main() -> None:
    """Measure every point of every sweep and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="the JSON to write")
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        print(json.dumps(measure(Point(**options.point))))
        return
    sweeps = {}
    for name, values in SWEEPS.items():
        points = [replace(Point(), **{name: value}) for value in values]
        sweeps[name] = [{**asdict(point), **costs(point), **in_new_process(point)} for point in points]
        print(name, [(row["milliseconds"], row["megabytes"]) for row in sweeps[name]], flush=True)
    options.out.write_text(json.dumps({"threads": 1, "torch": torch.__version__, "sweeps": sweeps}, indent=1) + "\n")


def in_new_process(point: Point) -> dict[str, float]:
    """`measure` in a fresh Python."""
    command = [sys.executable, __file__, "--point", json.dumps(asdict(point))]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
