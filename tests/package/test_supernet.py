"""The generator: sizes, start, bounds, one-hot shortcut; and the freeze, byte for
byte.
"""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from minisupernet import fitting
from minisupernet.course.records import fingerprint
from minisupernet.data.tasks import (
    BinaryTasks,
    TaskImages,
    all_pairs,
    each_pair,
    experiment_2,
    one_against_rest,
)
from minisupernet.errors import FitError, GeneratorError, TaskError, TrainingError
from minisupernet.fitting import (
    Fit,
    accuracy,
    answers,
    class_accuracy,
    fit_shared,
    fit_weights,
    fit_z,
    train_generator,
)
from minisupernet.supernet import ClassVectors, SuperNet, TaskVectors
from minisupernet.target import TaskClassifier, WeightSpec, run_tasks
from minisupernet.training import train

TARGET = TaskClassifier()
SPEC = WeightSpec.of(TARGET)


class Small(nn.Module):
    """A target that learns coloured squares in a moment."""

    def __init__(self):
        super().__init__()
        self.convolution, self.output = nn.Conv2d(3, 6, 5, stride=4), nn.Linear(6, 1)

    def forward(self, images):
        x = nn.functional.leaky_relu(self.convolution(images), 0.2)
        return self.output(x.mean((2, 3))).squeeze(1)


def test_the_original_generator_has_3753665_parameters():
    generator = SuperNet.original(SPEC)
    assert sum(p.numel() for p in generator.parameters()) == 3_753_665 == 101 * 37_165


def test_the_original_start_is_glorot_a_head_with_zero_biases():
    torch.manual_seed(0)
    generator = SuperNet.original(SPEC)
    assert not generator.head_bias.any()
    heads = SPEC.split(generator.head_weight.detach())
    for tensor in SPEC.tensors:
        limit = (6 / (100 + tensor.size)) ** 0.5
        assert heads[tensor.name].abs().max() <= limit
        assert heads[tensor.name].std().item() == pytest.approx(limit / 3**0.5, rel=0.1)


@pytest.mark.parametrize("shape", [(16, (64,)), (4, (32, 32)), (32, ()), (16, (256,))])
def test_generated_weights_start_at_the_targets_scale(shape):
    torch.manual_seed(0)
    generator = SuperNet(SPEC, *shape)
    z = torch.randn(64, shape[0]) / shape[0] ** 0.5
    with torch.no_grad():
        weights = generator(z)
    for tensor in SPEC.tensors:
        ratio = weights[tensor.name].std().item() / tensor.spread
        assert 0.8 < ratio < 1.25 or tensor.size < 20, f"{tensor.name}: {ratio:.2f}"


def test_normalisation_weights_start_around_one():
    spec = WeightSpec.of(nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)))
    weights = SuperNet(spec, 4)(torch.randn(3, 4))
    assert torch.equal(weights["1.weight"], torch.ones(3, 8))


@pytest.mark.parametrize("bound", [1.0, 0.05])
def test_the_bound_holds_and_is_tanh(bound):
    torch.manual_seed(0)
    generator = SuperNet(SPEC, 4, hidden=(), bound=bound)
    z = torch.randn(5, 4) * 1_000
    flat = generator.flat(z)
    assert flat.abs().max() <= bound
    torch.testing.assert_close(
        flat,
        bound * torch.tanh((z @ generator.head_weight + generator.head_bias) / bound),
    )


@pytest.mark.parametrize("hidden", [(), (8,)])
def test_whole_numbers_stand_for_one_hot_vectors(hidden):
    generator = SuperNet(SPEC, 7, hidden=hidden)
    numbers = torch.tensor([3, 0, 6])
    torch.testing.assert_close(
        generator.flat(numbers), generator.flat(torch.eye(7)[numbers])
    )


def test_one_hot_training_moves_only_the_rows_used_and_the_bias():
    generator = SuperNet.original(SPEC, 5)
    before = generator.head_weight.detach().clone()
    optimizer = Fit(1, optimizer="tensorflow-rmsprop").make_optimizer(
        list(generator.parameters()), []
    )
    generator.flat(torch.tensor([2])).square().sum().backward()
    optimizer.step()
    moved = (generator.head_weight != before).any(1)
    assert moved.tolist() == [False, False, True, False, False]


@pytest.mark.parametrize(
    "z",
    [
        torch.zeros(3, 5),
        torch.zeros(4),
        torch.tensor([4]),
        torch.tensor([-1]),
        torch.tensor([[0]]),
    ],
)
def test_a_z_of_the_wrong_size_is_refused(z):
    with pytest.raises(
        GeneratorError,
        match=r"z must (have shape \(T, 4\)|be whole numbers \(T,\) from 0 to 3)",
    ):
        SuperNet(SPEC, 4)(z)


@pytest.mark.parametrize(
    "wrong",
    [
        {"z_dim": 0},
        {"z_dim": 4, "hidden": (0,)},
        {"z_dim": 4, "bound": 0.0},
        {"z_dim": 4, "z_share": 2.0},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(GeneratorError, match="must be positive"):
        SuperNet(SPEC, **wrong)


def test_an_unknown_optimiser_is_refused():
    with pytest.raises(
        FitError,
        match="there is no optimiser 'adam'; choose 'adamw' or 'tensorflow-rmsprop'",
    ):
        Fit(1, optimizer="adam").make_optimizer([torch.zeros(1)], [])


@pytest.fixture(scope="module", params=[False, True], ids=["float32", "bfloat16"])
def trained(squares, request):
    """A generator for reversed pairs, where one network cannot serve, trained without
    the last two tasks.

    In bfloat16 as on a GPU, where that is the default.
    """
    torch.manual_seed(0)
    target = Small()
    generator = SuperNet(WeightSpec.of(target), 4, hidden=(16,))
    tasks = experiment_2(10)
    seen = TaskImages(squares, tasks.select(list(range(8))), validation=4)
    new = TaskImages(squares, tasks.select([8, 9]), validation=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "train", partial(train, mixed=request.param))
        z, history = train_generator(
            generator, target, seen, Fit(400, rate=3e-3, every=200)
        )
        yield generator, target, seen, new, z, history


def test_training_learns_tasks_that_contradict_each_other(trained):
    generator, target, seen, _, z, history = trained
    with torch.no_grad():
        right = accuracy(target, generator(z), seen).mean()
        twin = accuracy(
            target, generator(z[[5, 6, 7, 3, 4, 0, 1, 2]]), seen
        )  # each reversed task's z for its twin
    assert right > 0.9 and twin[:3].mean() < 0.3
    assert history.last("validation_accuracy") > 0.9


def test_fitting_z_leaves_the_generator_as_it_was_byte_for_byte(trained):
    generator, target, _, new, z, _ = trained
    before, required = (
        fingerprint(generator),
        [p.requires_grad for p in generator.parameters()],
    )
    fitted, _ = fit_z(generator, target, new, Fit(60, z_rate=3e-2), z.mean(0))
    assert fingerprint(generator) == before
    assert [p.requires_grad for p in generator.parameters()] == required
    assert (
        all(p.grad is None for p in generator.parameters())
        or fingerprint(generator) == before
    )
    with torch.no_grad():
        shared = accuracy(target, generator(z.mean(0).expand(2, -1)), new).mean()
        assert accuracy(target, generator(fitted), new).mean() > max(0.75, shared + 0.2)


def test_the_flawed_way_does_move_the_generator(trained):
    generator, target, _, new, z, _ = trained
    copied = copy.deepcopy(generator)
    fit_z(copied, target, new, Fit(3), z.mean(0), freeze=False)
    assert fingerprint(copied) != fingerprint(generator)


def test_fits_side_by_side_are_fits_alone(trained, squares):
    """The loss is summed over tasks: two tasks with the same images give the same z,
    and as if alone.
    """
    generator, target, _, _, z, _ = trained
    fit = Fit(5, z_rate=3e-2, decay=0.0)
    task = BinaryTasks((8,), (3,))
    together = TaskImages(squares, BinaryTasks((8, 8), (3, 3)), validation=4)
    alone = TaskImages(squares, task, validation=4)

    class SameBatch(TaskImages):
        def batch(self, step, seed, size, count=None):
            numbers, images, labels = alone.batch(step, seed, size, count)
            return (
                torch.arange(2),
                images.expand(2, *images.shape[1:]),
                labels.expand(2, -1),
            )

    together.__class__ = SameBatch
    pair, _ = fit_z(generator, target, together, fit, z.mean(0))
    single, _ = fit_z(generator, target, alone, fit, z.mean(0))
    rounding = 1e-5 if fitting.train is train else 1e-3  # in bfloat16
    torch.testing.assert_close(pair, single.expand(2, -1), rtol=0, atol=rounding)


def test_fine_tuning_starts_where_it_is_told_and_learns(trained):
    generator, target, _, new, z, _ = trained
    start = generator.flat(z.mean(0, keepdim=True)).detach()
    kept = start.clone()
    unmoved, _ = fit_weights(
        generator.spec, target, new, Fit(1, rate=0.0, cycle=False), start
    )
    torch.testing.assert_close(unmoved, start.expand(2, -1))
    tuned, _ = fit_weights(generator.spec, target, new, Fit(150, rate=1e-2), start)
    assert torch.equal(start, kept)
    assert (
        accuracy(target, generator.spec.split(tuned), new)[0] > 0.9
    )  # the other pair is two shades of one colour


@pytest.mark.parametrize("make", [one_against_rest, each_pair])
def test_many_networks_find_one_class_of_many(squares, make):
    """Five classes of ten; and networks that belong to other tasks do not."""
    target, tasks = Small(), make([0, 2, 3, 4, 5])
    spec, data = WeightSpec.of(target), TaskImages(squares, tasks)
    start = spec.draw(len(tasks), torch.Generator().manual_seed(0), "torch")
    flat, _ = fit_weights(spec, target, data, Fit(150, rate=1e-2), start)
    right = class_accuracy(target, spec.split(flat), data)
    assert right > 0.8 and right == class_accuracy(target, spec.split(flat), data)
    assert class_accuracy(target, spec.split(flat.roll(1, 0)), data) < right - 0.4
    assert class_accuracy(target, spec.split(flat), data, "validation") > 0.8


def test_class_vectors_stand_for_single_classes():
    with pytest.raises(TaskError, match="give each task a vector of its own"):
        ClassVectors(BinaryTasks(((0, 1),), (2,)), 4)


class NotSqueezed(Small):
    """One number an image, with an axis too many: labels would be broadcast."""

    def forward(self, images):
        return super().forward(images).unsqueeze(1)


class Several(Small):
    def forward(self, images):
        return super().forward(images), images


@pytest.mark.parametrize(
    ("kind", "found"), [(NotSqueezed, r"\(2, 20, 1\)"), (Several, "tuple")]
)
def test_answers_that_do_not_meet_the_labels_are_refused(squares, kind, found):
    target, tasks = kind(), BinaryTasks((0, 1), (2, 3))
    spec, data = WeightSpec.of(target), TaskImages(squares, tasks)
    generator, start = SuperNet(spec, 4), torch.zeros(spec.size)
    images, weights = (
        torch.zeros(2, 20, 3, 32, 32),
        spec.split(torch.zeros(2, spec.size)),
    )
    said = rf"{kind.__name__} must give one number an image, \(2, 20\) .* not {found}"
    with pytest.raises(FitError, match=said):
        answers(target, weights, images)
    for act in (
        lambda: accuracy(target, weights, data),
        lambda: class_accuracy(target, weights, data),
        lambda: train_generator(generator, target, data, Fit(1)),
        lambda: fit_z(generator, target, data, Fit(1), torch.zeros(4)),
        lambda: fit_weights(spec, target, data, Fit(1), start),
        lambda: fit_shared(spec, target, data, Fit(1), start),
    ):
        with pytest.raises(FitError, match="must give one number an image"):
            act()


def test_a_start_of_another_shape_is_refused(squares):
    target, data = Small(), TaskImages(squares, BinaryTasks((0, 1, 2), (3, 4, 5)))
    spec = WeightSpec.of(target)
    generator = SuperNet(spec, 4)
    for start in (torch.zeros(5), torch.zeros(2, 4), torch.zeros(3, 1), torch.ones(())):
        with pytest.raises(FitError, match=r"must be \(4,\) for all tasks or \(3, 4\)"):
            fit_z(generator, target, data, Fit(1), start)
        for fit_ordinary in (fit_weights, fit_shared):
            with pytest.raises(FitError, match=rf"must be \({spec.size},\) for all"):
                fit_ordinary(spec, target, data, Fit(1), start)
    with pytest.raises(FitError, match="of torch.int64"):
        fit_z(generator, target, data, Fit(1), torch.zeros(4, dtype=torch.int64))


def test_vectors_and_watched_tasks_of_others_are_refused(squares):
    target, tasks = Small(), experiment_2(10)
    data, half = (TaskImages(squares, t) for t in (tasks, tasks.select([5, 6])))
    others = ClassVectors(BinaryTasks(tasks.negative, tasks.positive), 4)
    for given, said in (
        ({"vectors": TaskVectors(9, 4)}, "9 task vectors do not fit 10 tasks"),
        ({"vectors": others}, "class vectors belong to other tasks"),
        ({"one_hot": True}, "10 tasks need one-hot vectors .* with z_dim=10"),
        ({"watch": half}, "to watch must be the first of those trained"),
    ):
        generator = SuperNet(WeightSpec.of(target), 4)
        with pytest.raises(FitError, match=said):
            train_generator(generator, target, data, Fit(1), **given)


def test_only_the_named_tensors_are_fitted(trained):
    generator, target, _, new, z, _ = trained
    start = generator.flat(z.mean(0, keepdim=True)).detach()
    tuned, _ = fit_weights(
        generator.spec,
        target,
        new,
        Fit(5, rate=1e-2),
        start,
        only=["output.weight", "output.bias"],
    )
    moved = {
        name: bool((part != old).any())
        for (name, part), old in zip(
            generator.spec.split(tuned).items(),
            generator.spec.split(start).values(),
            strict=True,
        )
    }
    assert moved == {
        "convolution.weight": False,
        "convolution.bias": False,
        "output.weight": True,
        "output.bias": True,
    }
    with pytest.raises(
        FitError, match=r"no weights \['head'\]; it has \['convolution.weight'"
    ):
        fit_weights(generator.spec, target, new, Fit(1), start, only=["head"])


def test_one_network_cannot_serve_reversed_tasks_and_can_serve_others(squares):
    target = Small()
    spec = WeightSpec.of(target)
    start = spec.draw(1, torch.Generator().manual_seed(0))[0]
    for tasks, serves in (
        (experiment_2(10), False),
        (BinaryTasks((0, 1, 2), (9, 9, 9)), True),
    ):
        data = TaskImages(squares, tasks, validation=4)
        flat, _ = fit_shared(spec, target, data, Fit(150, rate=1e-2), start)
        reached = (
            accuracy(target, spec.split(flat.expand(len(tasks), -1)), data)
            .mean()
            .item()
        )
        assert reached > 0.9 if serves else reached == pytest.approx(0.5, abs=1e-6)


def test_class_vectors_make_any_task_and_its_reverse():
    vectors = ClassVectors(BinaryTasks((0, 2, 1), (1, 1, 0)), z_dim=8, seed=3)
    z = vectors(torch.arange(3))
    assert z.shape == (3, 8) and torch.equal(z[0], -z[2])
    torch.testing.assert_close(z[1], vectors.u[2] - vectors.u[1])
    lengths = ClassVectors(experiment_2(100), 16)(torch.arange(100)).norm(dim=1)
    assert 0.9 < lengths.mean() < 1.1


def test_class_vectors_serve_a_task_that_was_never_trained(squares):
    """All pairs of six classes are trained but one, whose vectors follow from those of
    its classes.
    """
    torch.manual_seed(0)
    target, held_out = Small(), BinaryTasks((0, 1), (1, 0))
    pairs = all_pairs(BinaryTasks(tuple(range(6)), (5, 4, 3, 2, 1, 0)), but=held_out)
    generator, data = (
        SuperNet(WeightSpec.of(target), 4, hidden=(16,)),
        TaskImages(squares, pairs, validation=4),
    )
    vectors = ClassVectors(pairs, 4)
    train_generator(generator, target, data, Fit(400, rate=3e-3, z_rate=3e-2), vectors)
    with torch.no_grad():
        z = torch.stack([vectors.u[0] - vectors.u[1], vectors.u[1] - vectors.u[0]])
        reached = accuracy(
            target, generator(z), TaskImages(squares, held_out, validation=4)
        )
    assert reached.min() > 0.9


def test_accuracy_counts_each_real_image_once(squares):
    target, data = Small(), TaskImages(squares, experiment_2(10), validation=4)
    spec = WeightSpec.of(target)
    weights = spec.split(spec.draw(10, torch.Generator().manual_seed(0)))
    got = accuracy(target, weights, data)
    for t in range(10):
        mask = (squares.test_labels == data.tasks.positive[t]) | (
            squares.test_labels == data.tasks.negative[t]
        )
        pixels = (
            squares.test_images[mask].float() / 255 - squares.mean[:, None, None]
        ) / squares.std[:, None, None]
        logits = run_tasks(
            target, {name: w[t : t + 1] for name, w in weights.items()}, pixels[None]
        )[0]
        truth = squares.test_labels[mask] == data.tasks.positive[t]
        assert got[t].item() == pytest.approx(
            ((logits > 0) == truth).float().mean().item(), abs=1e-6
        )


def test_a_killed_generator_training_goes_on(tmp_path, squares):
    target, data = Small(), TaskImages(squares, experiment_2(10), validation=4)

    def run(path, stop=None):
        torch.manual_seed(0)
        generator = SuperNet(WeightSpec.of(target), 4, hidden=(8,))
        draw = data.batch

        def batch(step, *rest):
            if step == stop:
                raise KeyboardInterrupt
            return draw(step, *rest)

        data.batch = batch
        try:
            z, _ = train_generator(
                generator, target, data, Fit(12, tasks=4, every=5), checkpoint=path
            )
        except KeyboardInterrupt:
            return None
        finally:
            data.batch = draw
        return fingerprint(generator), z

    whole = run(tmp_path / "a.safetensors")
    run(tmp_path / "b.safetensors", stop=8)
    resumed = run(tmp_path / "b.safetensors")
    assert resumed[0] == whole[0] and torch.equal(resumed[1], whole[1])


def test_a_checkpoint_goes_on_with_the_same_images_tasks_and_fit_only(
    tmp_path, squares
):
    path = tmp_path / "run.safetensors"
    fit = Fit(4, tasks=4, every=2)

    def run(images=squares, tasks=None, **changed):
        target, tasks = Small(), tasks or experiment_2(10)
        torch.manual_seed(0)
        generator = SuperNet(WeightSpec.of(target), 4, hidden=(8,))
        data = TaskImages(images, tasks, validation=changed.pop("validation", 4))
        own = replace(fit, **changed)
        return train_generator(generator, target, data, own, checkpoint=path)

    run()
    pixels = squares.train_images.clone()
    pixels[0, 0, 0, 0] ^= 1
    asked = experiment_2(10)
    swapped = BinaryTasks(asked.negative, asked.positive)
    for changed, said in (
        ({"images": replace(squares, train_images=pixels)}, "other images"),
        ({"validation": 3}, "other images of each class"),
        ({"tasks": swapped}, "other tasks, other watched tasks"),
        ({"seed": 1}, "fit.seed: 0 there, 1 here"),
        ({"cycle": False}, "fit.cycle: True there, False here, schedule: .*"),
    ):
        with pytest.raises(TrainingError, match=rf"of another run \({said}\)"):
            run(**changed)
