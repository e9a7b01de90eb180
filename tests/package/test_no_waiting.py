"""What a GPU is asked to do in a training step, on the meta device: it knows shapes and
no values.

A GPU runs ahead of Python until somebody asks it for a number. On the meta device such
a question is an error, so that a step that gets through asks none; what reaches the
device is counted. How fast it is there, no test can say.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from support import coloured_squares
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from minisupernet import classification, fitting
from minisupernet.classification import Pictures
from minisupernet.course.studies import hyperlstm, pudnet_fits
from minisupernet.course.studies.pudnet_fits import DatasetFits
from minisupernet.data import tasks
from minisupernet.data.episodes import Episodes, Shape
from minisupernet.data.tasks import TaskImages, experiment_1
from minisupernet.data.text import Text
from minisupernet.fitting import Fit, fit_shared, fit_weights, fit_z, train_generator
from minisupernet.optimizers import TensorFlowRMSprop
from minisupernet.pudnet import FeatureNet, Learner, PudNet
from minisupernet.static_hypernet import WideResNet
from minisupernet.supernet import ClassVectors, SuperNet
from minisupernet.target import TaskClassifier, WeightSpec
from minisupernet.training import History, constant, train

META, STEPS = torch.device("meta"), 3
TARGET, FEATURES = TaskClassifier(), FeatureNet()
SPEC = WeightSpec.of(TARGET)
IMAGES = coloured_squares(classes=21, train=12, test=4)


class MetaGenerator(torch.Generator):
    """Random numbers for tensors on the meta device, which has no generator of its
    own.
    """

    device = META


class Watch(TorchDispatchMode):
    """Counts what reaches the device: operations, and numbers copied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.copied = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.device == META:
            self.operations += 1
            self.copied += sum(
                each.numel()
                for each in args
                if isinstance(each, Tensor) and each.device != META
            )
        return made


def to_meta(value):
    """The same value with every tensor in it on the meta device."""
    if isinstance(value, Tensor | nn.Module):
        return copy.deepcopy(value).to(META)
    if isinstance(value, dict):
        return {key: to_meta(own) for key, own in value.items()}
    if hasattr(value, "__dict__") and not isinstance(value, type):
        moved = copy.copy(value)
        vars(moved).update({key: to_meta(own) for key, own in vars(value).items()})
        return moved
    return value


def train_on_meta(
    watches: list,
    state: nn.Module,
    optimizer: object,
    loss_at: Callable[[int], Tensor],
    *_,
    **options,
) -> History:
    """The course's training loop with plain SGD, as this device has no fused optimiser,
    under a Watch.

    It must come to its look at the losses, after the last step, before anybody asks for
    a number.
    """
    done, plain = [], torch.optim.SGD(state.parameters(), lr=1e-3)

    def counted(step: int) -> Tensor:
        done.append(step)
        return loss_at(step)

    with (
        Watch() as watch,
        pytest.raises(RuntimeError, match="no data|on meta") as question,
    ):
        train(state, plain, counted, STEPS, schedule=options.get("schedule", constant))
    asked = [entry.name for entry in question.traceback]
    assert done == list(range(STEPS)) and "_look" in asked, (
        f"asked for a number in step {done[-1]}, in {asked[-1]}"
    )
    watches.append(watch)
    return History()


@pytest.fixture
def watches(monkeypatch) -> list[Watch]:
    """Training loops, random numbers and autocast as this device can have them; a Watch
    for each loop that ran.
    """
    found: list[Watch] = []
    for module in (fitting, classification, pudnet_fits, hyperlstm):
        monkeypatch.setattr(module, "train", partial(train_on_meta, found))
    for module in (tasks, pudnet_fits):
        monkeypatch.setattr(
            module, "step_generator", lambda seed, step, device: MetaGenerator()
        )
    monkeypatch.setattr(torch, "autocast", lambda *_, **options: nullcontext())
    return found


def images_of(count: int) -> TaskImages:
    """The first tasks of experiment 1, with every augmentation."""
    questions = experiment_1(IMAGES.classes).select(list(range(count)))
    return to_meta(
        TaskImages(IMAGES, questions, validation=2, flip=True, crop=4, cutout=10)
    )


def generator(z_dim: int = 16) -> SuperNet:
    return SuperNet(SPEC, z_dim).to(META)


WEIGHTS, FIT = torch.empty(SPEC.size, device=META), Fit(STEPS, images=4)
FITS = {
    "generator and task vectors": lambda data: train_generator(
        generator(), TARGET, data, FIT
    ),
    "generator, some tasks a step": lambda data: train_generator(
        generator(), TARGET, data, replace(FIT, tasks=3)
    ),
    "generator and class vectors": lambda data: train_generator(
        generator(), TARGET, data, FIT, ClassVectors(data.tasks, 16).to(META)
    ),
    "the original's generator": lambda data: train_generator(
        SuperNet.original(SPEC, 20).to(META), TARGET, data, FIT, one_hot=True
    ),
    "z alone": lambda data: fit_z(
        generator(), TARGET, data, FIT, torch.empty(16, device=META)
    ),
    "all weights": lambda data: fit_weights(SPEC, TARGET, data, FIT, WEIGHTS),
    "the last layer": lambda data: fit_weights(
        SPEC, TARGET, data, FIT, WEIGHTS, ["output.weight", "output.bias"]
    ),
    "one network for all": lambda data: fit_shared(SPEC, TARGET, data, FIT, WEIGHTS),
}


@pytest.mark.parametrize("name", FITS)
def test_a_step_waits_for_nothing_and_does_nothing_task_by_task(name, watches):
    """Images lie on the device, nothing is copied to it, and twenty tasks are as many
    operations as four.
    """
    for count in (4, 20):
        FITS[name](images_of(count))
    few, many = watches
    assert few.copied == many.copied == 0
    assert few.operations == many.operations > 100 * STEPS


def test_a_question_in_a_step_is_noticed(watches):
    """What the test above stands on."""
    z = nn.Parameter(torch.zeros(3, device=META))
    with pytest.raises(AssertionError, match="asked for a number in step 0"):
        train_on_meta(
            watches,
            nn.ParameterDict({"z": z}),
            None,
            lambda step: z.sum() * z.mean().item(),
        )
    with Watch() as watch:
        z + torch.zeros(3).to(META)
    assert (watch.operations, watch.copied) == (2, 3)


def test_the_originals_optimiser_asks_nothing():
    parameter = nn.Parameter(torch.zeros(3, 2, device=META))
    optimiser = TensorFlowRMSprop([parameter])
    parameter.grad = torch.ones_like(parameter)
    optimiser.step()


def test_a_step_on_episodes_copies_only_the_numbers_of_its_images(watches):
    torch.manual_seed(0)
    shape, classes = Shape(way=3, support=2, query=4), 9
    episodes = Episodes(IMAGES, range(classes), flip=True)
    episodes.images = to_meta(IMAGES)
    learner = Learner(
        PudNet(WeightSpec.of(FEATURES)), FEATURES, classes=IMAGES.classes
    ).to(META)
    for count in (2, 6):
        train_on_meta(
            watches,
            learner,
            None,
            lambda step, count=count: learner.loss(
                episodes.draw(step, 0, shape, count)
            ),
        )
    few, many = watches
    assert few.operations == many.operations
    each = 3 * (
        2 + 4
    )  # images of an episode; beside its number each is told whether to be mirrored
    assert [watch.copied for watch in watches] == [
        STEPS * count * (2 * each + 3) for count in (2, 6)
    ]


def test_fitting_datasets_waits_for_nothing(watches):
    fits = DatasetFits(FEATURES, IMAGES, [[0, 1, 2], [3, 4, 5]], batch=6, seed=0)
    weights = to_meta(WeightSpec.of(FEATURES).split(torch.zeros(2, 60_512)))
    to_meta(fits).fit(weights, 1e-3, 1, 1.0)
    assert watches[0].copied == 0


@pytest.mark.parametrize("generated", [False, True])
def test_a_step_of_a_large_network_copies_only_the_numbers_of_its_images(
    generated, watches
):
    shown = to_meta(Pictures(IMAGES, validation=20, batch=8, crop=2))
    classification.fit(
        WideResNet(10, generated=generated).to(META), shown, 1e-3, STEPS, 0
    )
    assert (
        watches[0].copied == STEPS * 8 * 4
    )  # its number, mirrored or not, and two shifts


@pytest.mark.parametrize("model", hyperlstm.MODELS)
def test_a_step_of_a_recurrent_network_waits_for_nothing(model, watches):
    settings = replace(hyperlstm.QUICK, streams=4, window=5, images=8, held_back=20)
    text = Text("abc", *[torch.arange(80) % 3] * 3, "", "")
    for task in (
        hyperlstm.text_task(text, settings, META),
        hyperlstm.image_task(to_meta(IMAGES), settings),
    ):
        hyperlstm.fit(task, model, 16, 1e-3, STEPS, 0, settings, META)
    letters, rows = watches
    assert letters.copied == 0 and rows.copied == STEPS * 8 * 2
