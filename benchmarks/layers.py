"""What bounds a step: the rate of every convolution of 98 classifiers, each way PyTorch
has to do it.

python benchmarks/layers.py --out results/05_layers.json
"""

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from contestants import IMAGES, OURS, measure
from torch import Tensor
from torch.nn import functional as F
from training import matrix_rate

from minisupernet.fast.convolution import TaskConvolution
from minisupernet.fast.memory import keep_memory

TASKS, FILTERS, SIDE, STRIDE, PADDING = (
    98,
    16,
    5,
    2,
    2,
)  # of every convolution of TaskClassifier
LAYERS = {
    "first": (3, 32),
    "second": (16, 16),
    "third": (16, 8),
    "fourth": (16, 4),
}  # channels and height of its input
PRODUCTS = FORWARD, OF_KERNELS, OF_IMAGES = (
    "forward",
    "gradient of kernels",
    "gradient of images",
)


def grouped(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """One convolution with a group for each task."""
    out = F.conv2d(
        x.flatten(1, 2),
        weight.flatten(0, 1),
        bias.flatten(),
        STRIDE,
        PADDING,
        groups=len(weight),
    )
    return out.unflatten(1, (len(weight), -1))


def task_by_task(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    layout: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """A convolution for each task; `torch.channels_last` puts the channels of a pixel
    side by side for it.
    """
    alone = zip(x.unbind(1), weight.unbind(), bias.unbind(), strict=True)
    made = [
        F.conv2d(
            images.contiguous(memory_format=layout),
            kernel.contiguous(memory_format=layout),
            b,
            STRIDE,
            PADDING,
        )
        for images, kernel, b in alone
    ]
    return torch.stack([each.contiguous() for each in made], 1)


def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What `run_tasks` does."""
    return TaskConvolution.apply(x, weight, bias, [STRIDE, STRIDE], [PADDING, PADDING])


WAYS = {
    "one grouped convolution": grouped,
    "task by task": task_by_task,
    "the same, channels last": partial(task_by_task, layout=torch.channels_last),
    OURS: ours,
}


class Product:
    """One of the three products of a layer, for all tasks, done in one way; no gradient
    is asked for but its own.
    """

    def __init__(self, way: Callable[..., Tensor], layer: str, name: str) -> None:
        torch.manual_seed(0)
        channels, height = LAYERS[layer]
        self.way, self.name = way, name
        self.x = torch.randn(
            IMAGES, TASKS, channels, height, height, requires_grad=name == OF_IMAGES
        )
        self.weight = torch.randn(
            TASKS, FILTERS, channels, SIDE, SIDE, requires_grad=name == OF_KERNELS
        )
        self.bias = torch.randn(TASKS, FILTERS, requires_grad=name == OF_KERNELS)
        self.out = self.way(self.x, self.weight, self.bias)
        self.gradient = torch.randn_like(self.out)

    def compute(self) -> tuple[Tensor, ...]:
        """The layer's output, or the gradients from the graph that is there."""
        if self.name == FORWARD:
            return (self.way(self.x, self.weight, self.bias),)
        wanted = (self.weight, self.bias) if self.name == OF_KERNELS else (self.x,)
        return torch.autograd.grad(self.out, wanted, self.gradient, retain_graph=True)

    def operations(self) -> float:
        """10^6 operations that it cannot do without: 2 a multiply-add."""
        return 2e-6 * self.weight[0, 0].numel() * self.out.numel()


def row(layer: str, name: str, threads: int, repeats: int) -> dict:
    """The median milliseconds and the rate of one product of one layer, in every way,
    taken in turn.
    """
    products = {way: Product(work, layer, name) for way, work in WAYS.items()}
    right = products["task by task"].compute()
    for way, product in products.items():
        for got, wanted in zip(product.compute(), right, strict=True):
            if not (got - wanted).abs().max() <= 1e-5 * wanted.abs().max():
                sys.exit(
                    f"{way} gives a wrong {name} of the {layer} layer: nothing was"
                    " timed."
                )
    times, matrix = {way: [] for way in products}, []
    for repeat in range(repeats):
        for way in random.Random(repeat).sample(list(products), len(products)):
            times[way].append(measure(products[way].compute)[0])
        matrix.append(matrix_rate(threads))
    medians = {way: round(statistics.median(taken), 2) for way, taken in times.items()}
    rates = {
        way: round(products[way].operations() / taken, 1)
        for way, taken in medians.items()
    }
    return {
        "threads": threads,
        "layer": layer,
        "product": name,
        "milliseconds": medians,
        "gigaflops": rates,
        "matrix_rate_gflops": round(statistics.median(matrix), 1),
    }


def main() -> None:
    """Time every layer and product that a step needs, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1, 2], help="numbers of CPU threads"
    )
    parser.add_argument(
        "--repeats", type=int, default=7, help="repeats of each product (7)"
    )
    options = parser.parse_args()
    keep_memory()
    wanted = [
        (layer, name)
        for layer in LAYERS
        for name in PRODUCTS
        if (layer, name) != ("first", OF_IMAGES)
    ]
    rows = [
        row(*pair, threads, options.repeats)
        for threads in options.threads
        for pair in wanted
    ]
    document = {
        "torch": torch.__version__,
        "tasks": TASKS,
        "images": IMAGES,
        "rows": rows,
    }
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
