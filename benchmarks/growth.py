"""How the time and memory of a training step grow: with tasks, images, task vectors and
targets; and one large target.

    python benchmarks/growth.py --out results/05_growth.json

Each point is a process of its own, so that its peak memory is its own.
`speed_report.py` draws the record.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from contestants import measure, operations, peak
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from minisupernet.fast.memory import keep_memory
from minisupernet.static_hypernet import ChunkedHyperNet, WideResNet
from minisupernet.supernet import SuperNet
from minisupernet.target import TaskClassifier, WeightSpec, run_tasks


@dataclass(frozen=True)
class Point:
    """One step: T tasks, B images each, z_dim numbers a task vector, bare heads,
    `channels` filters a convolution.
    """

    tasks: int = 32
    images: int = 20
    z_dim: int = 64
    channels: int = 16


SHARED = Point()  # the point that all sweeps share
SWEEPS = {
    "tasks": (8, 32, 128, 512),
    "images": (5, 20, 80),
    "z_dim": (64, 256),
    "channels": (8, 16, 32),
}


@dataclass(frozen=True)
class Large:
    """One step of wide residual networks whose 3 x 3 kernels come from shared chunks,
    `group` tasks at a time.
    """

    tasks: int = 100
    images: int = 2
    group: int = 20
    z_dim: int = 8
    depth: int = 40
    width: int = 2


def costs(point: Point) -> dict[str, float]:
    """What the formula says: operations of a step (10^6) and floats it must hold
    (10^6).

    6 T (d P + B M) operations: 2 a multiply-add, three products each (forward, and the
    two gradients), M being the multiply-adds of one image. 4 (d + 1) P + 3 T P + T B A
    floats: the generator with its gradient and AdamW's two moments; the T networks,
    their gradient, and its pieces before they are joined; images and what the layers
    keep.
    """
    c, target = point.channels, TaskClassifier(point.channels)
    size, products = WeightSpec.of(target).size, operations(target)["all"] / 2
    kept = 3 * 32 * 32 + 2 * c * (256 + 64 + 16 + 4) + 400
    return {
        "operations": (
            6e-6 * point.tasks * (point.z_dim * size + point.images * products)
        ),
        "floats": (
            1e-6
            * (
                4 * (point.z_dim + 1) * size
                + 3 * point.tasks * size
                + point.tasks * point.images * kept
            )
        ),
    }


def measure_point(point: Point, repeats: int = 3) -> dict[str, float]:
    """Milliseconds of a step with one thread (median), and the MB that steps add to the
    process's peak.
    """
    torch.set_num_threads(1)
    keep_memory()
    before = peak()
    target = TaskClassifier(point.channels)
    generator = SuperNet(WeightSpec.of(target), point.z_dim, ())
    z, images = (
        torch.randn(point.tasks, point.z_dim),
        torch.randn(point.tasks, point.images, 3, 32, 32),
    )
    labels = torch.randint(2, (point.tasks, point.images)).float()
    optimiser = torch.optim.AdamW(generator.parameters(), fused=True)

    def step() -> None:
        optimiser.zero_grad()
        F.binary_cross_entropy_with_logits(
            run_tasks(target, generator(z), images), labels
        ).backward()
        optimiser.step()

    times = [measure(step)[0] for _ in range(repeats + 1)]  # the first warms up
    return {
        "milliseconds": round(statistics.median(times[1:]), 1),
        "megabytes": round(peak() - before, 1),
    }


def group_norms(network: nn.Module) -> nn.Module:
    """Put GroupNorm in place of BatchNorm, which would mix the images of a batch."""
    for parent in list(network.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.BatchNorm2d):
                setattr(parent, name, nn.GroupNorm(8, layer.num_features))
    return network


def large_step(large: Large) -> dict[str, float]:
    """One training step of `large`: seconds with one thread, and the process's peak in
    MB.

    Each task has its own embedding of every chunk; the map from embeddings to chunks,
    the first layer, the shortcuts, the norms and the last layer are shared. Gradients
    add up over the groups, and the optimiser steps once.
    """
    torch.set_num_threads(1)
    keep_memory()
    target = group_norms(WideResNet(large.depth, large.width))
    hyper = ChunkedHyperNet(target, large.z_dim)
    own = nn.Parameter(
        hyper.embeddings.detach().expand(large.tasks, -1, -1).clone()
    )  # (T, chunks, z_dim)
    rest = {
        name: parameter
        for name, parameter in target.named_parameters()
        if name not in hyper.shapes
    }
    learned = [own, hyper.weight, hyper.bias, *rest.values()]
    optimiser = torch.optim.AdamW(learned, fused=True)
    images, labels = (
        torch.randn(large.tasks, large.images, 3, 32, 32),
        torch.randint(10, (large.tasks, large.images)),
    )

    def weights(embeddings: Tensor) -> dict[str, Tensor]:
        made = vmap(lambda e: functional_call(hyper, {"embeddings": e}, ()))(embeddings)
        return made | {
            name: p.expand(len(embeddings), *p.shape) for name, p in rest.items()
        }

    def step() -> None:
        for group in torch.arange(large.tasks).split(large.group):
            logits = run_tasks(
                target, weights(own[group]), images[group]
            )  # (group, B, 10)
            loss = F.cross_entropy(
                logits.flatten(0, 1), labels[group].flatten(), reduction="sum"
            )
            (loss / labels.numel()).backward()
        optimiser.step()

    seconds = measure(step)[0] / 1e3
    network, numbers = (
        sum(p.numel() for p in target.parameters()),
        sum(p.numel() for p in learned),
    )
    return {
        "weights": network,
        "learned": numbers,
        "seconds": round(seconds, 1),
        "megabytes": peak(),
    }


def in_new_process(
    work: Callable[[object], dict[str, float]], what: object
) -> dict[str, float]:
    """`work(what)` in a fresh Python; ends the program with one line where that process
    dies.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(work, what).result()
        except BrokenProcessPool:
            sys.exit(f"the process of {what} died: is there enough memory?")


def main() -> None:
    """Measure every point of every sweep, then the large target, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write")
    options = parser.parse_args()
    points = {
        name: [replace(SHARED, **{name: value}) for value in values]
        for name, values in SWEEPS.items()
    }
    rows = {}
    for point in dict.fromkeys(point for sweep in points.values() for point in sweep):
        rows[point] = {
            **asdict(point),
            **costs(point),
            **in_new_process(measure_point, point),
        }
        print(rows[point], flush=True)
    document = {
        "threads": 1,
        "torch": torch.__version__,
        "sweeps": {
            name: [rows[point] for point in sweep] for name, sweep in points.items()
        },
        "large": {**asdict(Large()), **in_new_process(large_step, Large())},
    }
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
