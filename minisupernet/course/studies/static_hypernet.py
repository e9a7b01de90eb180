"""What chapter 3 records: generated against direct training, the starts, and accuracy
against a generator's size.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minisupernet.classification import Pictures, fit, settle_norms, signals
from minisupernet.course.studies.rates import best_rate
from minisupernet.data import ImageSet
from minisupernet.errors import TrainingError
from minisupernet.static_hypernet import (
    STARTS,
    ChunkedHyperNet,
    Generated,
    LowRankHyperNet,
    StaticHyperNet,
    WideResNet,
    ratio,
)
from minisupernet.training import History

__all__ = [
    "PROFILES",
    "Settings",
    "measure",
    "measure_with",
    "multiply_adds",
    "plain_stack",
    "shuffled",
]

Maker = Callable[[], Generated]


@dataclass(frozen=True)
class Settings:
    """What a study runs; `PROFILES` holds the two that are named.

    Attributes:
        depth, width: the WideResNet that is generated and trained directly; the smaller
            direct one has depth 10.
        pool: side of the squares of pixels that are averaged before the networks see
            them (1: none).
        steps, batch: of each of the three networks. `crop`: random shifts in pixels,
            beside flips.
        rates: learning rates tried; `short`: steps of a trial. The best on validation
            images is taken.
        start_steps, sweep_steps, sweep_short: the same for the starts and for the sweep
            over sizes.
        tile, chunk, rank: embedding sizes in the sweep for tiles, chunks and low-rank
            heads.
        validation: training images held back; `test`: test images at most, None for
            all.
    """

    depth: int = 16
    width: int = 1
    z_dim: int = 64
    pool: int = 2
    steps: int = 3000
    short: int = 150
    batch: int = 64
    crop: int = 0
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    start_steps: int = 150
    sweep_steps: int = 600
    sweep_short: int = 60
    tile: tuple[int, ...] = (8, 16, 32, 64, 96)
    chunk: tuple[int, ...] = (7, 16, 40, 128, 256)
    rank: tuple[int, ...] = (2, 4, 12, 40, 80)
    validation: int = 3000
    test: int | None = None


PROFILES = {
    "full": Settings(),
    "quick": Settings(
        depth=10,
        z_dim=16,
        steps=40,
        short=8,
        rates=(3e-3, 1e-2),
        start_steps=10,
        sweep_steps=12,
        sweep_short=4,
        tile=(8, 64),
        chunk=(7, 128),
        rank=(2, 40),
        validation=200,
        test=500,
    ),
}


def plain_stack(classes: int) -> nn.Sequential:
    """A plain network without normalisation: nine 3 x 3 convolutions with ReLU, He's
    start, images to logits.
    """
    widths, layers = (3, 16, 16, 16, 32, 32, 32, 64, 64, 64), []
    for before, after in zip(widths, widths[1:], strict=False):
        stride = 2 if before != after and before > 3 else 1
        convolution = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        nn.init.kaiming_normal_(convolution.weight)
        layers += [convolution, nn.ReLU()]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)
    )


@torch.no_grad()
def multiply_adds(network: Generated, pixels: Tensor) -> int:
    """Multiplications of the target's convolutions and linear layers for one image of a
    batch (B, 3, H, W).
    """
    found: list[int] = []

    def note(layer: nn.Module, given: tuple, output: Tensor) -> None:
        found.append(output.numel() // len(output) * layer.weight[0].numel())

    layers = [
        layer
        for layer in network.target.modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    network(pixels)
    for hook in hooks:
        hook.remove()
    return sum(found)


@torch.no_grad()
def shuffled(network: Generated, how: str, seed: int) -> Tensor:
    """Other embeddings for a trained network, (tiles, z_dim): "anywhere" and "inside"
    each kernel permute the tiles, "mean" gives every tile of a kernel that kernel's
    mean embedding."""
    old, random = network.hyper.embeddings, torch.Generator().manual_seed(seed)
    counts = [len(old)] if how == "anywhere" else network.hyper.counts
    if how == "mean":
        return torch.cat(
            [part.mean(0, keepdim=True).expand_as(part) for part in old.split(counts)]
        )
    return torch.cat(
        [
            part[torch.randperm(len(part), generator=random)]
            for part in old.split(counts)
        ]
    )


def measure(
    images: ImageSet, seed: int, profile: str, report: Callable[[str], None]
) -> dict:
    """All runs of chapter 3 with one seed, as a JSON-ready dict; see `Settings` for
    what is run.
    """
    return measure_with(images, seed, PROFILES[profile], report)


def measure_with(
    images: ImageSet, seed: int, settings: Settings, report: Callable[[str], None]
) -> dict:
    """The same with any settings.

    On a GPU, `replace(PROFILES["full"], depth=40, width=1, pool=1, steps=70_000,
    short=2_000, batch=128, crop=4)` trains the paper's WRN-40-1, generated and
    directly, for 200 epochs of CIFAR-10; `width=2` its WRN-40-2.
    """
    pictures = Pictures(
        images,
        settings.validation,
        settings.batch,
        crop=settings.crop,
        pool=settings.pool,
        most=settings.test,
    )
    return {
        "settings": asdict(settings),
        "images": {
            "train": len(pictures.train),
            "validation": len(pictures.validation),
            "test": len(pictures.test),
        },
        "networks": _networks(pictures, settings, seed, report),
        "starts": _starts(
            pictures, replace(settings, short=settings.start_steps), seed, report
        ),
        "sweep": _sweep(pictures, settings, seed, report),
    }


def _networks(
    pictures: Pictures, settings: Settings, seed: int, report: Callable[[str], None]
) -> list[dict]:
    """The generated network, the same trained directly, and a direct one with about as
    many parameters.
    """
    classes, shape = pictures.images.classes, (settings.depth, settings.width)
    makers: dict[str, Maker] = {
        "generated": lambda: WideResNet(
            *shape, generated=True, classes=classes, z_dim=settings.z_dim
        ),
        "direct": lambda: WideResNet(*shape, classes=classes),
        "smaller": lambda: WideResNet(10, classes=classes),
    }
    rows = []
    for name, make in makers.items():
        network, row = _arm(
            make,
            pictures,
            settings,
            settings.steps,
            settings.short,
            seed,
            every=settings.steps // 8,
        )
        if name == "generated":
            row |= _embeddings(network, pictures, seed)
        cost = multiply_adds(network, pictures.batch(0, seed)[0])
        rows.append(
            {
                "arm": name,
                "depth": 10 if name == "smaller" else settings.depth,
                "multiply_adds": cost,
                **row,
            }
        )
        report(f"{name}: test accuracy {row['test']:.3f}, {row['seconds']:.0f} s")
    return rows


def _arm(
    make: Maker,
    pictures: Pictures,
    settings: Settings,
    steps: int,
    short: int,
    seed: int,
    every: int | None = None,
) -> tuple[Generated, dict]:
    """Choose the rate by short runs on validation images, train, and measure once on
    test images.
    """
    chosen = best_rate(
        settings.rates,
        lambda rate: (_trial(make, pictures, rate, short, seed), None),
    )
    network, began = _new(make, pictures, seed), time.perf_counter()
    try:
        history, test = (
            fit(network, pictures, chosen.rate, steps, seed, every),
            pictures.accuracy(network, "test"),
        )
    except TrainingError:  # the loss was no longer a number
        history, test = History(), 0.0
    rows = [
        {key: round(value, 4) for key, value in row.items()} for row in history.rows
    ]
    parameters = sum(parameter.numel() for parameter in network.parameters())
    seconds = round(time.perf_counter() - began, 1)
    found = {
        "test": round(test, 4),
        "rate": chosen.rate,
        "tried": chosen.tried,
        "parameters": parameters,
    }
    return network, {**found, "seconds": seconds, "history": rows}


def _new(make: Maker, pictures: Pictures, seed: int) -> Generated:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().to(pictures.images.device)


def _trial(
    make: Maker, pictures: Pictures, rate: float, steps: int, seed: int
) -> float:
    """Validation accuracy after a short run; 0 where the loss was no longer a
    number.
    """
    network = _new(make, pictures, seed)
    try:
        fit(network, pictures, rate, steps, seed)
    except TrainingError:
        return 0.0
    return round(pictures.accuracy(network, "validation"), 4)


@torch.no_grad()
def _embeddings(network: Generated, pictures: Pictures, seed: int) -> dict:
    """What the trained embeddings hold: accuracy with others in their place, and their
    two main directions.
    """
    old, found = network.hyper.embeddings.clone(), {}
    for how in ("own", "inside", "mean", "anywhere"):
        network.hyper.embeddings.copy_(
            old if how == "own" else shuffled(network, how, seed)
        )
        settle_norms(network, pictures, seed)
        found[how] = round(pictures.accuracy(network, "test"), 4)
        network.hyper.embeddings.copy_(old)
    centred = (old - old.mean(0)).cpu()
    left, sizes, _ = torch.linalg.svd(centred, full_matrices=False)
    share = (sizes.square() / sizes.square().sum())[:10]
    places = (left[:, :2] * sizes[:2]).tolist()
    return {
        "embeddings": found,
        "tiles": network.hyper.counts,
        "principal": [[round(value, 4) for value in place] for place in places],
        "principal_share": [round(value, 4) for value in share.tolist()],
    }


def _starts(
    pictures: Pictures, settings: Settings, seed: int, report: Callable[[str], None]
) -> list[dict]:
    """Every start, with and without BatchNorm: loss and signal before training, and
    where a short training leads.
    """
    classes, rows = pictures.images.classes, []
    bodies = {
        "WRN-10-1": lambda: WideResNet(10, classes=classes).target,
        "plain": lambda: plain_stack(classes),
    }
    for body, make_body in bodies.items():
        for start in ("direct", *STARTS):

            def make(make_body=make_body, start=start) -> Generated:
                target = make_body()
                return Generated(
                    target,
                    None if start == "direct" else StaticHyperNet(target, start=start),
                )

            network = _new(make, pictures, seed)
            pixels, labels = pictures.batch(0, seed + 1000)
            with torch.no_grad():
                loss = F.cross_entropy(network(pixels), labels).item()
            scale = [float(f"{value:.4g}") for value in signals(network, pixels)]
            _, row = _arm(
                make, pictures, settings, settings.start_steps, settings.short, seed
            )
            rows.append(
                {
                    "network": body,
                    "start": start,
                    "loss_at_start": float(f"{loss:.4g}"),
                    "signals": scale,
                    **row,
                }
            )
            report(
                f"{body}, {start}: loss at start {loss:.3g}, test accuracy"
                f" {row['test']:.3f}"
            )
    return rows


def _sweep(
    pictures: Pictures, settings: Settings, seed: int, report: Callable[[str], None]
) -> list[dict]:
    """Test accuracy of a WRN-10-1 whose kernels come from generators of many sizes, and
    of the direct one.
    """
    classes, rows = pictures.images.classes, []
    points: list[tuple[str, int, Callable | None]] = [("direct", 0, None)]
    points += [
        ("tile", z, lambda target, z=z: StaticHyperNet(target, z))
        for z in settings.tile
    ]
    points += [
        ("chunk", z, lambda target, z=z: ChunkedHyperNet(target, z))
        for z in settings.chunk
    ]
    points += [
        ("rank", rank, lambda target, rank=rank: LowRankHyperNet(target, rank))
        for rank in settings.rank
    ]
    for family, size, make_hyper in points:

        def make(make_hyper=make_hyper) -> Generated:
            target = WideResNet(10, classes=classes).target
            return Generated(target, make_hyper(target) if make_hyper else None)

        network, row = _arm(
            make, pictures, settings, settings.sweep_steps, settings.sweep_short, seed
        )
        share = ratio(network.hyper) if network.hyper is not None else 1.0
        rows.append({"family": family, "size": size, "ratio": round(share, 4), **row})
        report(f"{family} {size}: ratio {share:.3f}, test accuracy {row['test']:.3f}")
    return rows
