"""Chapter 2's measurement: do grown networks save computation, beside random growth and
training at full size?

One rule for the rate holds for every arm: r for the teacher's steps; then either r / 10
at once ("early", Net2Net's advice for the student) or r up to the last steps and then r
/ 10 ("late"). Every arm is trained both ways, and validation images choose. So an arm
differs from the others in its network only, step by step.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict

from torch import nn

from minisupernet.course.studies.growing import Growing, Growth, Run, Settings
from minisupernet.data import ImageSet
from minisupernet.net2net import Widening, deepen, insert_random, pad, widen

__all__ = [
    "SCHEDULES",
    "deepened",
    "measure",
    "padded",
    "stage_ends",
    "widened",
    "widths_of",
]

SCHEDULES = ("early", "late")
QUICK = Settings(
    first=20,
    second=12,
    cool=4,
    validation=200,
    curve_images=200,
    test_images=500,
    every=20,
)


def widened(noise: float) -> Growth:
    """Every convolution `factor` times as wide, by copies with noise; the optimiser's
    memory grows along.
    """

    def growth(growing: Growing, run: Run) -> Run:
        for number, (name, width) in enumerate(
            widths_of(run.model).items(), 1000 * growing.seed
        ):
            plan = Widening.of(
                run.model, name, growing.settings.factor * width, seed=number
            )
            model = widen(
                run.model,
                name,
                growing.settings.factor * width,
                noise=noise,
                seed=number,
            )
            run = growing.grow(run, model, plan)
        return run

    return growth


def padded(outgoing: float) -> Growth:
    """Every convolution `factor` times as wide, by random units; their outgoing weights
    are scaled by `outgoing`.
    """

    def growth(growing: Growing, run: Run) -> Run:
        for number, (name, width) in enumerate(
            widths_of(run.model).items(), 1000 * growing.seed
        ):
            model = pad(
                run.model,
                name,
                growing.settings.factor * width,
                outgoing=outgoing,
                seed=number,
            )
            run = growing.grow(run, model)
        return run

    return growth


def deepened(stages: Sequence[int], identity: bool = True) -> Growth:
    """One more layer, an identity or a random one, at the end of each of these
    stages.
    """

    def growth(growing: Growing, run: Run) -> Run:
        for stage in stages:
            after = stage_ends(run.model)[stage]
            if identity:
                model = deepen(run.model, after, statistics=growing.statistics)
            else:
                number = 1000 * growing.seed + len(
                    widths_of(run.model)
                )  # random weights of its own for each new layer
                model = insert_random(run.model, after, batch_norm=True, seed=number)
            run = growing.grow(run, model)
        return run

    return growth


def widths_of(model: nn.Module) -> dict[str, int]:
    """The output channels of every convolution, by its name."""
    return {
        name: module.out_channels
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    }


def stage_ends(model: nn.Module) -> list[str]:
    """The last ReLU of each stage: a stage begins with a convolution of stride 2."""
    ends, last = [], ""
    for name, module in model.named_modules():
        if isinstance(module, nn.ReLU):
            last = name
        elif isinstance(module, nn.Conv2d) and module.stride == (2, 2) and last:
            ends.append(last)
    return [*ends, last]


def measure(
    images: ImageSet,
    seed: int,
    profile: str,
    report: Callable[[str], None],
    settings: Settings | None = None,
) -> dict:
    """All arms of the three phases (twice as wide; 5 to 8 layers; 8 to 20 layers), each
    with both schedules.

    The reference of one phase is the teacher of the next. About 8 minutes on one CPU
    core under the full profile.

    Args:
        profile: "quick" or "full"; `settings` takes its place where given.
    """
    amount = settings or (QUICK if profile == "quick" else Settings())
    growing = Growing(images, seed, amount)
    shapes = _shapes(amount)
    first = {
        name: growing.train(growing.start(*shape), amount.first, "early")
        for name, shape in shapes.items()
    }
    report("teachers and references trained to the point of growth")
    wider = {
        "net2net": [widened(amount.noise)],
        "noisy": [widened(amount.much_noise)],
        "random": [padded(1.0)],
        "zero": [padded(0.0)],
    }
    plans = {
        "wider": ("thin", "small", wider),
        "deeper_8": ("small", "middle", _insertions(amount.to_8)),
        "deeper_20": ("middle", "large", _insertions(amount.to_20)),
    }
    phases = {phase: {} for phase in plans}
    for schedule in SCHEDULES:
        going_on = {
            name: growing.summary(growing.grown(run, [], schedule))
            for name, run in first.items()
        }
        for phase, (teacher, reference, arms) in plans.items():
            runs = {"teacher": going_on[teacher], "scratch": going_on[reference]}
            runs |= {
                arm: growing.summary(growing.grown(first[teacher], growths, schedule))
                for arm, growths in arms.items()
            }
            for arm, found in runs.items():
                phases[phase].setdefault(arm, {})[schedule] = found
                report(f"{phase:10} {schedule:6} {arm:8} test {found['test']:.3f}")
    return {"settings": asdict(amount), "phases": phases}


def _shapes(amount: Settings) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Widths and convolutions of the four networks that teach or are the reference."""
    small = amount.convolutions
    middle = tuple(
        count + sum(stage in each for each in amount.to_8)
        for stage, count in enumerate(small)
    )
    large = tuple(
        count + sum(stage in each for each in amount.to_20)
        for stage, count in enumerate(middle)
    )
    thin = tuple(width // amount.factor for width in amount.widths)
    return {"thin": (thin, small)} | {
        name: (amount.widths, each)
        for name, each in (("small", small), ("middle", middle), ("large", large))
    }


def _insertions(stages: Sequence[Sequence[int]]) -> dict[str, list[Growth]]:
    return {
        "net2net": [deepened(each) for each in stages],
        "random": [deepened(each, False) for each in stages],
    }
