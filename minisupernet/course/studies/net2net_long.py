"""Chapter 2's verdict at a size that counts: a teacher trained to its end, then grown.

Two questions: twice as wide, and from 8 to 20 layers. A unit is one arm of one of them
with one seed. Every arm, the teacher among them, tries three rates in short runs on
validation images: one that goes on from the teacher 0.1, 0.3 and 1 times the teacher's,
one from scratch 0.3, 1 and 3 times an ordinary one. Each training is one cycle, whose
rate ends at 0. Units of one seed share their teacher, which lies beside their
checkpoints.
"""

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from minisupernet.classification import Pictures
from minisupernet.course.records import rounded_rows
from minisupernet.course.studies.growing import conv_net
from minisupernet.course.studies.net2net import stage_ends, widths_of
from minisupernet.course.studies.rates import best_rate_once
from minisupernet.data import ImageSet
from minisupernet.errors import StudyError
from minisupernet.files import whole_file
from minisupernet.net2net import deepen, insert_random, pad, widen
from minisupernet.training import History, one_cycle, train

__all__ = ["ARMS", "PHASES", "Lesson", "Phase", "Settings", "check_unit", "measure"]

Start = Callable[[], nn.Sequential]


@dataclass(frozen=True)
class Phase:
    """What grows: channels and convolutions of the teacher's stages, those of the large
    network, and the steps of the teacher and of what follows the growth.
    """

    widths: tuple[int, ...]
    convolutions: tuple[int, ...]
    large_widths: tuple[int, ...]
    large_convolutions: tuple[int, ...]
    first: int
    second: int


PHASES = {
    "wider": Phase((16, 32, 64), (2, 1, 1), (32, 64, 128), (2, 1, 1), 9_000, 3_000),
    "deeper": Phase((16, 32, 64), (3, 2, 2), (16, 32, 64), (7, 6, 6), 7_000, 2_500),
}
QUICK_PHASES = {
    "wider": Phase((2, 4, 4), (2, 1, 1), (4, 8, 8), (2, 1, 1), 6, 4),
    "deeper": Phase((2, 4, 4), (1, 1, 1), (2, 4, 4), (2, 2, 2), 6, 4),
}
# arms that come to be in another way, of "wider" and of "deeper"
GROWN = {
    "wider": ("copies", "unequal", "random", "zero"),
    "deeper": ("copies", "random"),
}
OTHERS = (
    "teacher_steps",
    "teacher_operations",
    "scratch_steps",
    "scratch_operations",
    "scratch_thrice",
)
ARMS = {phase: (*grown, *OTHERS) for phase, grown in GROWN.items()}


@dataclass(frozen=True)
class Settings:
    """How networks are trained: by SGD with Nesterov's momentum, on flipped and shifted
    images.

    `rate` is the ordinary one, `restarts` are shares of the teacher's and `starts` of
    the ordinary one; each is tried for the share `trial` of the steps that follow a
    growth. `noise` is on copied units, in standard deviations.
    """

    rate: float = 0.1
    restarts: tuple[float, ...] = (0.1, 0.3, 1.0)
    starts: tuple[float, ...] = (0.3, 1.0, 3.0)
    trial: float = 0.25
    noise: float = 0.05
    momentum: float = 0.9
    decay: float = 5e-4
    batch: int = 128
    crop: int = 4
    validation: int = 5_000
    most: int | None = None
    looks: int = 8

    def rates(self) -> tuple[float, ...]:
        """What a network from scratch tries."""
        return tuple(self.rate * share for share in self.starts)


QUICK = Settings(batch=16, validation=50, most=100, looks=2)


@dataclass(frozen=True, eq=False)
class Lesson:
    """What every network of one seed is trained on, and how."""

    pictures: Pictures
    settings: Settings
    seed: int

    def train(
        self,
        network: nn.Module,
        rate: float,
        steps: int,
        first: int = 0,
        checkpoint: Path | None = None,
    ) -> History:
        """Train in place for one cycle, on the batches from number `first` on."""
        settings = self.settings

        def loss_at(step: int) -> Tensor:
            pixels, labels = self.pictures.batch(first + step, self.seed)
            return F.cross_entropy(network(pixels), labels)

        optimizer = torch.optim.SGD(
            network.parameters(),
            lr=rate,
            momentum=settings.momentum,
            weight_decay=settings.decay,
            nesterov=True,
        )
        return train(
            network.train(),
            optimizer,
            loss_at,
            steps,
            schedule=one_cycle,
            evaluate=lambda: {"validation_accuracy": self.accuracy(network)},
            every=-(-steps // settings.looks),
            checkpoint=checkpoint,
            run={"seed": str(self.seed), "first": str(first)},
        )

    def accuracy(self, network: nn.Module, part: str = "validation") -> float:
        """Share of images that the network gets right."""
        return round(self.pictures.accuracy(network, part), 4)

    def choose(
        self, start: Start, rates: tuple[float, ...], phase: Phase, kept: Path | None
    ) -> dict:
        """The rate whose short run from a network of `start` ends best on validation
        images, and all that were tried."""
        steps = max(1, round(self.settings.trial * phase.second))

        def trial(rate: float) -> float:
            return self.train(start(), rate, steps).last("validation_accuracy")

        return best_rate_once(kept, rates, trial)

    def operations(self, network: nn.Module) -> float:
        """Floating-point operations of the convolutions and products in one training
        step.
        """
        from torch.utils.flop_counter import FlopCounterMode

        pixels = self.pictures.batch(0, self.seed)[0]
        with FlopCounterMode(display=False) as counter:
            copy.deepcopy(network)(pixels).sum().backward()
        return float(counter.get_total_flops())


def grow(
    arm: str, teacher: nn.Sequential, phase: Phase, lesson: Lesson
) -> nn.Sequential:
    """The teacher's network grown as this arm does it, to the large shape."""
    if phase.large_widths == phase.widths:
        return _deeper(arm, teacher, phase, lesson)
    ways = {
        "copies": {"noise": lesson.settings.noise},
        "unequal": {"split": "asymmetric"},
        "random": {"outgoing": 1.0},
        "zero": {"outgoing": 0.0},
    }
    make, model = (pad if "outgoing" in ways[arm] else widen), teacher
    pairs = zip(*_by_convolution(phase), strict=True)
    for number, (name, width) in enumerate(pairs, 1000 * lesson.seed):
        model = make(model, name, width, seed=number, **ways[arm])
    return model


def _by_convolution(phase: Phase) -> tuple[list[str], list[int]]:
    """Name of every convolution of the teacher, and its channels in the large
    network."""
    model = conv_net(phase.widths, phase.convolutions, 2)
    pairs = zip(phase.large_widths, phase.convolutions, strict=True)
    return list(widths_of(model)), [w for w, count in pairs for _ in range(count)]


def _deeper(
    arm: str, teacher: nn.Sequential, phase: Phase, lesson: Lesson
) -> nn.Sequential:
    """New layers at the end of each stage, one stage after the other."""
    statistics, model = lesson.pictures.batch(0, lesson.seed)[0], teacher
    pairs = zip(phase.convolutions, phase.large_convolutions, strict=True)
    for stage, (before, after) in enumerate(pairs):
        for number in range(before, after):
            place = stage_ends(model)[stage]
            if arm == "copies":
                model = deepen(model, place, statistics=statistics)
            else:
                own = 1000 * lesson.seed + 100 * stage + number
                model = insert_random(model, place, batch_norm=True, seed=own)
    return model


def check_unit(phase: str, arm: str) -> None:
    """Raise a StudyError where there is no such unit."""
    if phase not in PHASES:
        raise StudyError(f"there is no phase '{phase}'; choose one of wider, deeper.")
    if arm not in ARMS[phase]:
        known = ", ".join(ARMS[phase])
        raise StudyError(f"there is no arm '{arm}' of {phase}; choose one of {known}.")


def measure(
    images: ImageSet,
    seed: int,
    profile: str,
    report: Callable[[str], None],
    checkpoint: Path | None,
    phase: str,
    arm: str,
) -> dict:
    """Train one network and measure it once on test images; a dict ready for JSON.

    Operations count forward and backward passes of the network and of the teacher that
    it comes from, not those of the short runs that choose a rate.

    Args:
        profile: "full", or "quick" to try it.
        checkpoint: a safetensors file from which a killed run goes on; the teacher is
            kept in the same folder.
        phase: a key of `PHASES`; `arm` one of its `ARMS`.

    Raises:
        StudyError: for a unit that does not exist.
    """
    check_unit(phase, arm)
    full = profile == "full"
    settings = Settings() if full else QUICK
    sizes = (PHASES if full else QUICK_PHASES)[phase]
    crop, most = settings.crop, settings.most
    pictures = Pictures(images, settings.validation, settings.batch, crop, most=most)
    lesson = Lesson(pictures, settings, seed)
    teacher, about = _teacher(lesson, sizes, images, checkpoint)
    report(f"teacher: {about['test']} after {about['steps']} steps")
    start, large = _start(arm, teacher, sizes, lesson), _large(sizes, lesson)
    costs = lesson.operations(teacher), lesson.operations(large())
    steps = _steps(arm, sizes, *costs)
    kept, rates = checkpoint and checkpoint.with_suffix(".rate"), settings.rates()
    if not (scratch := arm.startswith("scratch")):
        rates = tuple(about["rate"] * share for share in settings.restarts)
    chosen = lesson.choose(start, rates, sizes, kept)
    network, first = start(), 0 if scratch else sizes.first
    before = lesson.accuracy(network)
    history = lesson.train(network, chosen["rate"], steps, first, checkpoint)
    report(f"{phase}, {arm}, seed {seed}: {history.rows[-1]}")
    if kept:
        kept.unlink(missing_ok=True)
    spent = costs[0] if arm.startswith("teacher") else costs[1]
    return {
        "phase": phase,
        "arm": arm,
        "settings": asdict(settings),
        "sizes": asdict(sizes),
        "images": len(pictures.train),
        "teacher": about,
        "parameters": sum(each.numel() for each in network.parameters()),
        **chosen,
        "steps": steps,
        "operations": steps * spent + (0 if scratch else sizes.first * costs[0]),
        "at_start": before,
        "validation": lesson.accuracy(network),
        "test": lesson.accuracy(network, "test"),
        **_course(history),
    }


def _course(history: History) -> dict:
    return {
        "train_loss": round(history.last("loss"), 4),
        "train_seconds": round(history.last("seconds"), 1),
        "history": rounded_rows(history.rows),
    }


def _large(phase: Phase, lesson: Lesson) -> Start:
    images = lesson.pictures.images

    def start() -> nn.Sequential:
        shape = phase.large_widths, phase.large_convolutions
        return conv_net(*shape, images.classes, lesson.seed).to(images.device)

    return start


def _start(arm: str, teacher: nn.Sequential, phase: Phase, lesson: Lesson) -> Start:
    """What makes an arm's network as it is before its training."""
    if arm.startswith("scratch"):
        return _large(phase, lesson)
    grown = teacher
    if not arm.startswith("teacher"):
        grown = grow(arm, teacher, phase, lesson)
    return lambda: copy.deepcopy(grown)


def _steps(arm: str, phase: Phase, small: float, large: float) -> int:
    """How long an arm trains; `small` and `large` are the operations of a step of the
    teacher and of the large network."""
    whole = phase.first * small + phase.second * large
    return {
        "teacher_operations": round(phase.second * large / small),
        "scratch_steps": phase.first + phase.second,
        "scratch_operations": round(whole / large),
        "scratch_thrice": round(3 * whole / large),
    }.get(arm, phase.second)


def _teacher(
    lesson: Lesson, phase: Phase, images: ImageSet, checkpoint: Path | None
) -> tuple[nn.Sequential, dict]:
    """The trained teacher of a phase and a seed, and what its training took; from the
    file beside the checkpoint where another unit has trained it.
    """
    network = conv_net(phase.widths, phase.convolutions, images.classes, lesson.seed)
    network = network.to(images.device)
    if checkpoint is None:
        return network, _train_teacher(network, lesson, phase, None)
    decides = [asdict(phase), asdict(lesson.settings), lesson.seed, images.checksum()]
    text = json.dumps(decides) + Path(__file__).read_text(encoding="utf-8")
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    file = checkpoint.with_name(f"teacher-{digest}.safetensors")
    with FileLock(file.with_suffix(".lock")):
        if not file.exists():
            about = _train_teacher(network, lesson, phase, file)
            with whole_file(file) as part:
                save_file(network.state_dict(), part, {"about": json.dumps(about)})
            for kept in (".unfinished", ".rate"):
                file.with_suffix(kept).unlink(missing_ok=True)
        with safe_open(file, "pt") as found:
            about = json.loads(found.metadata()["about"])
            network.load_state_dict({n: found.get_tensor(n) for n in found.keys()})
    return network, about


def _train_teacher(
    network: nn.Sequential, lesson: Lesson, phase: Phase, file: Path | None
) -> dict:
    """Train a teacher in place, at the best of its rates; what is recorded of it."""
    settings, untrained = lesson.settings, copy.deepcopy(network)
    kept, start = file and file.with_suffix(".rate"), lambda: copy.deepcopy(untrained)
    chosen = lesson.choose(start, settings.rates(), phase, kept)
    unfinished = file and file.with_suffix(".unfinished")
    history = lesson.train(network, chosen["rate"], phase.first, checkpoint=unfinished)
    return {
        **chosen,
        "steps": phase.first,
        "parameters": sum(each.numel() for each in network.parameters()),
        "operations": phase.first * lesson.operations(network),
        "validation": lesson.accuracy(network),
        "test": lesson.accuracy(network, "test"),
        **_course(history),
    }
