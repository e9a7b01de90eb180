"""Time a training step of many generated networks: this package beside plain PyTorch and two libraries.

`make bench` puts the peers into a folder of their own and runs

    python benchmarks/training.py --peers _build/peers --out results/05_speed.json

Every contestant has the same generator, task vectors and images; outputs and gradients are compared before a clock
starts; repeats are taken in turn, in an order drawn anew, so that a busy moment meets them all.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from minisupernet.supernet import SuperNet
from minisupernet.target import TaskClassifier, WeightSpec, run_tasks
from minisupernet.training import keep_memory

OURS, VMAP, LOOP = "minisupernet", "torch.func.vmap", "plain loop"
IMAGES, Z_DIM, HIDDEN, SLOPE = 20, 16, 64, 0.2
PARTS = ("step", "generation", "execution", "optimiser")

Weights = dict[str, Tensor]


@dataclass
class Contestant:
    """One way to do a step: a generator, and how the networks it makes are run."""

    name: str
    generator: nn.Module
    generate: Callable[[Tensor], Weights]  # z (T, z_dim) -> {name: (T, *shape)}
    run: Callable[[Weights, Tensor], Tensor]  # weights, images (T, B, 3, 32, 32) -> logits (T, B)


def each_task(weights: Weights) -> Iterable[Weights]:
    """The weights of one network after the other."""
    return (dict(zip(weights, own, strict=True)) for own in zip(*(w.unbind() for w in weights.values()), strict=True))


def plain(ours: SuperNet, target: nn.Module) -> list[Contestant]:
    """This package, and what one writes without it; all by the same generator."""

    def mapped(weights: Weights, images: Tensor) -> Tensor:
        return vmap(lambda own, x: functional_call(target, own, (x,)))(weights, images)

    def looped(weights: Weights, images: Tensor) -> Tensor:
        pairs = zip(each_task(weights), images, strict=True)
        return torch.stack([functional_call(target, own, (x,)) for own, x in pairs])

    ways = {OURS: lambda weights, images: run_tasks(target, weights, images), VMAP: mapped, LOOP: looped}
    return [Contestant(name, ours, ours, run) for name, run in ways.items()]


def copy_weights(ours: SuperNet, trunk: tuple[Tensor, Tensor], head: tuple[Tensor, Tensor]) -> None:
    """Give a peer's linear layers, (weight, bias) each, the values of our generator."""
    with torch.no_grad():
        values = (ours.trunk[0].weight, ours.trunk[0].bias, ours.head_weight.T, ours.head_bias)
        for theirs, value in zip((*trunk, *head), values, strict=True):
            theirs.copy_(value)


def hypnettorch(ours: SuperNet, target: nn.Module) -> Contestant:
    """Its HMLP makes all networks in one call. It has no networks but its own, so the classifiers run in a loop."""
    from hypnettorch.hnets import HMLP

    names, shapes = [t.name for t in ours.spec.tensors], [list(t.shape) for t in ours.spec.tensors]
    activation = nn.LeakyReLU(SLOPE)
    hyper = HMLP(shapes, cond_in_size=Z_DIM, layers=(HIDDEN,), activation_fn=activation, num_cond_embs=0, verbose=False)
    trunk, trunk_bias, head, head_bias = hyper.unconditional_params
    copy_weights(ours, (trunk, trunk_bias), (head, head_bias))

    def generate(z: Tensor) -> Weights:
        rows = hyper(cond_input=z, ret_format="sequential")  # a list of tensors for each task
        rows = [rows] if isinstance(rows[0], Tensor) else rows
        return {name: torch.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}

    return Contestant("hypnettorch", hyper, generate, plain(ours, target)[2].run)


def hyperlight(ours: SuperNet) -> Contestant:
    """Its HyperNet makes all networks in one call; its networks take one set of weights at a time, so a loop again."""
    import hyperlight as library

    shapes = {tensor.name: tensor.shape for tensor in ours.spec.tensors}
    hyper = library.HyperNet(
        {"z": (Z_DIM,)}, shapes, [HIDDEN], encoding=None, init_independent_weights=False, output_split_init=False
    )
    hyper.backbone.block0_act.negative_slope = SLOPE
    copy_weights(ours, tuple(hyper.backbone.block0_lin.parameters()), tuple(hyper.backbone.output.parameters()))
    target = TaskClassifier()
    target = library.hypernetize(target, parameters=list(target.parameters()))

    def run(weights: Weights, images: Tensor) -> Tensor:
        logits = []
        for own, x in zip(each_task(weights), images, strict=True):
            with target.using_externals(own):
                logits.append(target(x))
        return torch.stack(logits)

    def generate(z: Tensor) -> Weights:
        return {name: made.view(len(z), *shapes[name]) for name, made in hyper(z=z).items()}  # of one task it drops T

    return Contestant("hyperlight", hyper, generate, run)


class Race:
    """All contestants on `tasks` tasks, from one seed."""

    def __init__(self, tasks: int, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        target = TaskClassifier()
        ours = SuperNet(WeightSpec.of(target), Z_DIM, (HIDDEN,))
        self.z = nn.Parameter(torch.randn(tasks, Z_DIM) / Z_DIM**0.5)
        self.images = torch.randn(tasks, IMAGES, 3, 32, 32)
        self.labels = torch.randint(2, (tasks, IMAGES)).float()
        self.contestants = [*plain(ours, target), hypnettorch(ours, target), hyperlight(ours)]
        self.z.data, self.images, self.labels = (t.to(dtype) for t in (self.z.data, self.images, self.labels))
        for each in self.contestants:
            each.generator.to(dtype)

    def loss(self, logits: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, self.labels)

    def check(self) -> float:
        """The largest relative difference from the plain loop: of logits, and in float64 of the gradient of z too.

        In float32 a leaky ReLU whose input is 0 but for rounding has one slope here and another there, so that two
        right gradients may differ; in float64 no input comes so close.
        """
        found = {}
        for each in self.contestants:
            logits = each.run(each.generate(self.z), self.images)
            found[each.name] = logits.detach(), torch.autograd.grad(self.loss(logits), self.z)[0]
        pairs = [pair for tensors in found.values() for pair in zip(tensors, found[LOOP], strict=True)]
        logits, gradients = ([((a - b).abs().max() / b.abs().max()).item() for a, b in pairs[k::2]] for k in (0, 1))
        return max(logits) if self.z.dtype == torch.float32 else max(logits + gradients)

    def works(self, each: Contestant) -> dict[str, Callable[[], None]]:
        """What is timed for one contestant, by name."""
        parameters = [*each.generator.parameters(), self.z]
        optimiser = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
        leaves = {name: w.detach().clone().requires_grad_() for name, w in each.generate(self.z).items()}

        def step() -> None:
            optimiser.zero_grad()
            self.loss(each.run(each.generate(self.z), self.images)).backward()
            optimiser.step()

        def execution() -> None:
            torch.autograd.grad(self.loss(each.run(leaves, self.images)), list(leaves.values()))

        return {"step": step, "generation": lambda: each.generate(self.z), "execution": execution,
                "optimiser": optimiser.step}  # fmt: skip

    def time(self, repeats: int) -> dict[str, dict[str, list[tuple[float, float]]]]:
        """{contestant: {part: (wall, CPU) milliseconds a repeat}}; the first repeat, not kept, warms up."""
        works = {each.name: self.works(each) for each in self.contestants}
        times = {name: {part: [] for part in parts} for name, parts in works.items()}
        for repeat in range(repeats + 1):
            for name in random.Random(repeat).sample(list(works), len(works)):  # nobody always follows the same one
                for part, work in works[name].items():
                    taken = measure(work)
                    if repeat:
                        times[name][part].append(taken)
        return times


def measure(work: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds of one call: on the clock, and of CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)


def matrix_rate(repeats: int) -> dict[str, float]:
    """What the machine can do: 10^9 operations a second in a product of two 1024 x 1024 matrices."""
    left, right, out = torch.randn(3, 1024, 1024)
    times = [measure(lambda: torch.mm(left, right, out=out)) for _ in range(repeats)]
    return {
        clock: round(2.147e3 / statistics.median(t[k] for t in times), 1) for k, clock in enumerate(("wall", "cpu"))
    }


def operations(tasks: int) -> float:
    """10^6 operations that a step cannot do without: 2 a multiply-add, three products a layer, two in the first."""
    per_image = [25 * 3 * 16 * 256, 25 * 16 * 16 * 64, 25 * 16 * 16 * 16, 25 * 16 * 16 * 4, 64 * 100, 100 * 100, 100]
    execution = IMAGES * (3 * sum(per_image) - per_image[0])
    generation = 3 * (Z_DIM * HIDDEN + HIDDEN * WeightSpec.of(TaskClassifier()).size)
    return 2e-6 * tasks * (execution + generation)


def summary(tasks: int, repeats: int) -> dict:
    """One row of the record: medians of all contestants at one number of tasks, and what follows from them."""
    race = Race(tasks)
    difference = race.check()
    if difference > 1e-5:
        sys.exit(f"the contestants differ by {difference:.1e} at {tasks} tasks.")
    times = race.time(repeats)
    medians = {
        clock: {
            name: {part: round(statistics.median(t[k] for t in rows), 2) for part, rows in parts.items()}
            for name, parts in times.items()
        }
        for k, clock in enumerate(("wall", "cpu"))
    }
    steps = {clock: {name: parts["step"] for name, parts in found.items()} for clock, found in medians.items()}
    best = {clock: min((n for n in found if n != OURS), key=found.get) for clock, found in steps.items()}
    rate = matrix_rate(repeats)
    return {
        "threads": torch.get_num_threads(), "tasks": tasks, "repeats": repeats,
        "largest_relative_difference": float(f"{difference:.1e}"), "milliseconds": medians,
        "best_peer": best,
        "times_faster_than_loop": {c: round(found[LOOP] / found[OURS], 2) for c, found in steps.items()},
        "times_faster_than_best_peer": {c: round(found[best[c]] / found[OURS], 2) for c, found in steps.items()},
        "matrix_rate_gflops": rate, "operations_millions": round(operations(tasks), 1),
        "share_of_matrix_rate": {c: round(operations(tasks) / found[OURS] / rate[c], 3) for c, found in steps.items()},
    }  # fmt: skip


def record(path: Path, about: dict, row: dict) -> None:
    """Put one row into the JSON, in place of an older one with as many threads and tasks."""

    def place(other: dict) -> tuple[int, int]:
        return other["threads"], other["tasks"]

    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    rows = sorted([*(other for other in rows if place(other) != place(row)), row], key=place)
    path.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Time every number of tasks; the JSON is written after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=Path, required=True, help="folder with hypnettorch and hyperlight")
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (all)")
    parser.add_argument(
        "--repeats", type=int, default=7, help="times each contestant is timed (7; fewer above 100 tasks)"
    )
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 8, 32, 98, 512], help="numbers of tasks")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sys.path.append(str(options.peers))
    kept = keep_memory()  # for all contestants alike
    exact = Race(8, torch.float64).check()
    if exact > 1e-10:
        sys.exit(f"the contestants differ by {exact:.1e} in float64.")
    about = {
        "cores": os.cpu_count(), "memory_kept": kept, "largest_difference_in_float64": float(f"{exact:.1e}"),
        "machine": f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}",
        "python": platform.python_version(), "torch": torch.__version__, "images": IMAGES,
        "peers": {name: version(name) for name in ("hypnettorch", "hyperlight")},
    }  # fmt: skip
    for tasks in options.tasks:
        row = summary(tasks, max(3, options.repeats * 100 // max(tasks, 100)))
        print(tasks, row["milliseconds"]["wall"][OURS], row["times_faster_than_loop"], flush=True)
        record(options.out, about, row)


if __name__ == "__main__":
    main()
