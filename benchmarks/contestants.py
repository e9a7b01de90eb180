"""The contestants of training.py: this package, plain PyTorch in three ways, and two
libraries; each in its process.
"""

import resource
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from minisupernet.fast.memory import keep_memory
from minisupernet.supernet import SuperNet
from minisupernet.target import TaskClassifier, WeightSpec, run_tasks

NAMES = OURS, VMAP, TUNED, PLAIN, *LIBRARIES = (
    "minisupernet",
    "torch.func.vmap",
    "tuned loop",
    "plain loop",
    "hypnettorch",
    "hyperlight",
)
# no peer: vmap with the one piece of this package that is not a kernel
KEPT = "vmap, memory kept"
IMAGES, Z_DIM, HIDDEN, SLOPE = 20, 16, 64, 0.2
PARTS = ("step", "generation", "execution", "optimiser")

Weights = dict[str, Tensor]


@dataclass
class Contestant:
    """One way to do a step: a generator, and how the networks it makes are run."""

    generator: nn.Module
    generate: Callable[[Tensor], Weights]  # z (T, z_dim) -> {name: (T, *shape)}
    run: Callable[
        [Weights, Tensor], Tensor
    ]  # weights, images (T, B, 3, 32, 32) -> logits (T, B)


def indexed(weights: Weights) -> Iterable[Weights]:
    """The weights of one network after the other, as one writes it: the backward pass
    fills a whole (T, ...) each.
    """
    return (
        {name: w[task] for name, w in weights.items()}
        for task in range(len(next(iter(weights.values()))))
    )


def unbound(weights: Weights) -> Iterable[Weights]:
    """The same by `unbind`, whose backward pass stacks all tasks' gradients once."""
    return (
        dict(zip(weights, own, strict=True))
        for own in zip(*(w.unbind() for w in weights.values()), strict=True)
    )


def looped(
    target: nn.Module, each: Callable[[Weights], Iterable[Weights]]
) -> Callable[[Weights, Tensor], Tensor]:
    """A Python loop of `functional_call` over tasks."""

    def run(weights: Weights, images: Tensor) -> Tensor:
        return torch.stack(
            [
                functional_call(target, own, (x,))
                for own, x in zip(each(weights), images, strict=True)
            ]
        )

    return run


def contestant(name: str, ours: SuperNet, target: nn.Module) -> Contestant:
    """The contestant of this name; its generator computes what `ours` computes."""
    if name in LIBRARIES:
        return {"hypnettorch": hypnettorch, "hyperlight": hyperlight}[name](
            ours, target
        )
    mapped = vmap(lambda own, x: functional_call(target, own, (x,)))
    ways = {
        OURS: lambda weights, images: run_tasks(target, weights, images),
        VMAP: mapped,
        KEPT: mapped,
        TUNED: looped(target, unbound),
        PLAIN: looped(target, indexed),
    }
    return Contestant(ours, ours, ways[name])


def copy_weights(ours: SuperNet, *theirs: Tensor) -> None:
    """Give a peer's two linear layers (weight, bias, weight, bias) the values of our
    generator.
    """
    values = (
        ours.trunk[0].weight,
        ours.trunk[0].bias,
        ours.head_weight.T,
        ours.head_bias,
    )
    with torch.no_grad():
        for their, value in zip(theirs, values, strict=True):
            their.copy_(value)


def hypnettorch(ours: SuperNet, target: nn.Module) -> Contestant:
    """Its HMLP makes all networks in one call. It has no networks but its own, so the
    classifiers run in a loop.
    """
    from hypnettorch.hnets import HMLP

    names, shapes = (
        [t.name for t in ours.spec.tensors],
        [list(t.shape) for t in ours.spec.tensors],
    )
    activation = nn.LeakyReLU(SLOPE)
    hyper = HMLP(
        shapes,
        cond_in_size=Z_DIM,
        layers=(HIDDEN,),
        activation_fn=activation,
        num_cond_embs=0,
        verbose=False,
    )
    copy_weights(ours, *hyper.unconditional_params)

    def generate(z: Tensor) -> Weights:
        rows = hyper(
            cond_input=z, ret_format="sequential"
        )  # a list of tensors for each task
        rows = [rows] if isinstance(rows[0], Tensor) else rows
        return {
            name: torch.stack(column)
            for name, column in zip(names, zip(*rows, strict=True), strict=True)
        }

    return Contestant(hyper, generate, looped(target, unbound))


def hyperlight(ours: SuperNet, target: nn.Module) -> Contestant:
    """Its HyperNet makes all networks in one call; its networks take one set of weights
    at a time, so a loop again.
    """
    import hyperlight as library

    shapes = {tensor.name: tensor.shape for tensor in ours.spec.tensors}
    hyper = library.HyperNet(
        {"z": (Z_DIM,)},
        shapes,
        [HIDDEN],
        encoding=None,
        init_independent_weights=False,
        output_split_init=False,
    )
    hyper.backbone.block0_act.negative_slope = SLOPE
    copy_weights(
        ours,
        *hyper.backbone.block0_lin.parameters(),
        *hyper.backbone.output.parameters(),
    )
    target = library.hypernetize(target, parameters=list(target.parameters()))

    def run(weights: Weights, images: Tensor) -> Tensor:
        logits = []
        for own, x in zip(unbound(weights), images, strict=True):
            with target.using_externals(own):
                logits.append(target(x))
        return torch.stack(logits)

    def generate(z: Tensor) -> Weights:
        return {
            name: made.view(len(z), *shapes[name]) for name, made in hyper(z=z).items()
        }  # of one task it drops T

    return Contestant(hyper, generate, run)


class Contest:
    """One contestant on `tasks` tasks, from one seed, so that all have the same weights
    and images.

    On CUDA a step of float32 is done as training does it there, in bfloat16.
    """

    def __init__(
        self,
        name: str,
        tasks: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        torch.manual_seed(0)
        target = TaskClassifier()
        ours = SuperNet(WeightSpec.of(target), Z_DIM, (HIDDEN,))
        self.device = torch.device(device)
        self.z = nn.Parameter(
            (torch.randn(tasks, Z_DIM) / Z_DIM**0.5).to(device, dtype)
        )
        self.images = torch.randn(tasks, IMAGES, 3, 32, 32).to(device, dtype)
        self.labels = torch.randint(2, (tasks, IMAGES)).to(device, dtype)
        self.contestant = contestant(name, ours, target)
        parameters = [*self.contestant.generator.to(device, dtype).parameters(), self.z]
        self.mixed = self.device.type == "cuda" and dtype == torch.float32
        self.optimiser = torch.optim.AdamW(
            parameters, lr=0.0, fused=True
        )  # a whole step, and answers stay comparable
        made = self.contestant.generate(self.z)
        self.leaves = {
            name: w.detach().clone().requires_grad_() for name, w in made.items()
        }

    def loss(self, weights: Weights) -> Tensor:
        return F.binary_cross_entropy_with_logits(
            self.contestant.run(weights, self.images), self.labels
        )

    def answer(self) -> list[np.ndarray]:
        """What all must agree on: logits (T, B), and in float64 the gradient of z (T,
        z_dim) too.

        In float32 a leaky ReLU whose input is 0 but for rounding has one slope here and
        another there, so that two right gradients may differ; in float64 no input comes
        so close.
        """
        exact = self.z.dtype == torch.float64
        with torch.set_grad_enabled(exact):
            weights = self.contestant.generate(self.z)
            found = [self.contestant.run(weights, self.images)]
        if exact:
            found += torch.autograd.grad(self.loss(weights), self.z)
        return [tensor.detach().cpu().numpy() for tensor in found]

    def step(self) -> None:
        """A whole training step."""
        self.optimiser.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed):
            loss = self.loss(self.contestant.generate(self.z))
        loss.backward()
        self.optimiser.step()

    def repeat(
        self, threads: int, parts: tuple[str, ...]
    ) -> dict[str, tuple[float, float]]:
        """Do each part once; (wall, CPU) milliseconds of each."""
        torch.set_num_threads(threads)
        works = {
            "step": self.step,
            "generation": lambda: self.contestant.generate(self.z),
            "execution": lambda: torch.autograd.grad(
                self.loss(self.leaves), list(self.leaves.values())
            ),
            "optimiser": self.optimiser.step,
        }
        return {part: measure(works[part]) for part in parts}


def operations(target: nn.Module) -> dict[str, int]:
    """Operations of each layer of a target on one image, two a multiply-add, and of
    "all" of them.
    """
    with FlopCounterMode(display=False) as counter:
        target(torch.zeros(1, 3, 32, 32))
    counts = {
        name.partition(".")[2]: sum(found.values())
        for name, found in counter.get_flop_counts().items()
    }
    return counts | {"all": counter.get_total_flops()}


def measure(work: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds of one call: on the clock, and of CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)


def peak() -> float:
    """The most MB that this process has held."""
    return round(
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        / (2**20 if sys.platform == "darwin" else 2**10),
        1,
    )


def serve(pipe: Connection, name: str, peers: str) -> None:
    """Be the process of one contestant: do each order (name, arguments) that comes,
    send back what it gives.
    """
    sys.path.append(peers)
    if name in (
        OURS,
        KEPT,
    ):  # it is part of this package; the others have the memory they would have
        keep_memory()
    contest = None
    with suppress(EOFError):  # the driver has ended
        for order, *arguments in iter(pipe.recv, None):
            try:
                if order == "prepare":
                    contest, reply = Contest(name, *arguments), None
                else:
                    reply = (
                        peak()
                        if order == "peak"
                        else getattr(contest, order)(*arguments)
                    )
            except Exception as error:  # the driver says it
                reply = error
            pipe.send(reply)
