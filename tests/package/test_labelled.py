"""A network from labelled examples: the vector of a class is a mean, labels turn z
round, lessons ask about images that were not shown, and training is one loop."""

import pytest
import torch
from support import coloured_squares
from torch.nn import functional as F

from minisupernet.data.tasks import BinaryTasks, TaskImages, each_pair
from minisupernet.errors import LabelledError
from minisupernet.fitting import Fit, accuracy
from minisupernet.labelled import (
    ExampleEncoder,
    LabelledNet,
    Lessons,
    examples,
    train_encoder,
    train_labelled,
)
from minisupernet.target import TaskClassifier, WeightSpec, run_tasks

TARGET = TaskClassifier(channels=4, hidden=8)
SPEC = WeightSpec.of(TARGET)
FIT = Fit(steps=3, images=6, tasks=5, every=3)


def pictures(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def new_generator(seed: int = 0) -> LabelledNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LabelledNet(SPEC, z_dim=6, hidden=(10,), channels=8, z_share=0.2)


@pytest.fixture
def generator() -> LabelledNet:
    return new_generator()


@pytest.fixture(scope="module")
def squares():
    return coloured_squares()


@pytest.fixture(scope="module")
def data(squares) -> TaskImages:
    return TaskImages(squares, each_pair(range(6)), flip=True)


LABELS = torch.tensor([[1, 0, 0, 1, 0], [0, 1, 1, 1, 1]])


def test_z_is_the_difference_of_two_means_and_makes_the_weights(generator):
    images = pictures(2, 5)
    with torch.no_grad():
        z = generator.task_vectors(images, LABELS)
        for task in range(2):
            e = generator.encoder(images[task])
            u_a, u_b = (e[LABELS[task] == side].mean(0) for side in (1, 0))
            torch.testing.assert_close(z[task], u_a - u_b)
        weights = generator(images, LABELS)
        made = generator.supernet(z)
    assert SPEC.check(weights) == 2
    assert all(torch.equal(weights[name], made[name]) for name in made)
    assert run_tasks(TARGET, weights, pictures(2, 3)).shape == (2, 3)


@pytest.mark.parametrize("count", [1, 2, 50])
def test_any_number_of_examples_in_any_order_and_labels_turned_round(generator, count):
    images = pictures(2, 2 * count, seed=count)
    labels = torch.arange(2).repeat_interleave(count).expand(2, -1)
    order = torch.randperm(2 * count, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        z = generator.task_vectors(images, labels)
        mixed = generator.task_vectors(images[:, order], labels[:, order])
        turned = generator.task_vectors(images, 1 - labels)
    assert z.norm(dim=1).min() > 1e-3
    torch.testing.assert_close(mixed, z, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(turned, -z, rtol=1e-4, atol=1e-6)


def test_many_tasks_in_one_call_are_each_what_it_would_be_alone(generator):
    images = pictures(2, 5)
    with torch.no_grad():
        together = generator(images, LABELS)
        each = [
            generator(i[None], label[None])
            for i, label in zip(images, LABELS, strict=True)
        ]
    for name, weights in together.items():
        alone = torch.cat([one[name] for one in each])
        torch.testing.assert_close(weights, alone, rtol=1e-4, atol=1e-6)


def test_class_vectors_are_the_means_that_z_is_made_of(generator):
    shown = pictures(2, 3)
    labels = torch.tensor([[1, 1, 1, 0, 0, 0]])
    with torch.no_grad():
        u = generator.class_vectors(shown)
        z = generator.task_vectors(shown.flatten(0, 1)[None], labels)
    torch.testing.assert_close(z[0], u[0] - u[1])


@pytest.mark.parametrize(
    ("images", "labels", "said"),
    [
        (pictures(5), LABELS[0], "must be .T, S, 3, 32, 32., not .5, 3, 32, 32."),
        (pictures(1, 5).byte(), LABELS[:1], "must be normalised floats"),
        (pictures(1, 5), LABELS[:1, :4], r"\(1, 5\) of them, not \(1, 4\)"),
        (pictures(1, 5), LABELS[:1] + 1, "must be 0 or 1"),
        (pictures(2, 2), torch.tensor([[0, 1], [1, 1]]), "example of label 1 and one"),
        (pictures(1, 0), LABELS[:1, :0], "example of label 1 and one"),
    ],
)
def test_examples_that_do_not_fit_are_refused(generator, images, labels, said):
    with pytest.raises(LabelledError, match=said):
        generator(images, labels)


def test_settings_that_cannot_be_are_refused(data):
    with pytest.raises(
        LabelledError, match="multiple of 4 from 4, and z_dim 2 or more, not 6"
    ):
        LabelledNet(SPEC, channels=6)
    with pytest.raises(LabelledError, match="most 0"):
        Lessons(data, most=0)
    with pytest.raises(LabelledError, match="classes is 1 of 6"):
        Lessons(data, classes=1)
    with pytest.raises(LabelledError, match="1 to 20 examples of each class, not 21"):
        examples(data, 21)


def test_a_lesson_asks_about_images_that_it_did_not_show(squares):
    """Without augmentation each picture can be found again in its class."""
    data = TaskImages(squares, each_pair(range(6)))
    lessons, seen = Lessons(data, classes=4, most=50), set()
    for step in range(20):
        lesson = lessons.draw(step, FIT)
        assert len(lesson.examples) == 4 and lesson.images.shape[:2] == (5, 6)
        assert len({frozenset(pair) for pair in lesson.pairs.T.tolist()}) == 5
        seen.add(lesson.examples.shape[1])
        flat = lesson.examples.flatten(2)  # (C, n, D)
        for question, pair in enumerate(lesson.pairs.T.tolist()):
            asked = lesson.images[question].flatten(1)
            for side in (0, 1):
                mine = asked[lesson.labels[question] == 1 - side]
                assert torch.cdist(mine, flat[pair[side]]).min() > 1 if len(mine) else 1
    assert 1 in seen and max(seen) <= 19 and len(seen) > 5


def test_label_1_is_the_first_class_of_a_question(squares):
    """The squares' colours tell: a picture is nearest to those shown of its class."""
    data = TaskImages(squares, each_pair(range(6)))
    lesson = Lessons(data, classes=6).draw(3, FIT)
    colour = lesson.examples[..., 8:24, 8:24].mean((1, 3, 4))  # (C, 3)
    asked = lesson.images[..., 8:24, 8:24].mean((3, 4))  # (M, B, 3)
    sides = colour[lesson.pairs.T]  # (M, 2, 3)
    first = torch.cdist(asked, sides).argmin(2) == 0
    assert (first == lesson.labels.bool()).all()


def test_what_an_image_shows_is_the_side_that_its_label_names(data):
    lesson = Lessons(data, classes=4).draw(1, FIT)
    first, second = lesson.pairs[:, :, None].expand(-1, -1, FIT.images)  # (M, B) each
    assert torch.equal(lesson.shows, torch.where(lesson.labels > 0, first, second))


def test_the_encoder_alone_learns_to_put_an_image_near_its_class(data, squares):
    """From near the loss of a guess among all classes of a lesson to far below it."""
    encoder = new_generator().encoder
    fit = Fit(60, 3e-3, images=6, tasks=6, every=20)
    history = train_encoder(encoder, data, fit, most=6)
    losses = history.series("loss")[1]
    assert losses[0] > 1.2 * losses[-1] and losses[-1] < 1.3 < torch.tensor(6.0).log()
    with torch.no_grad():
        assert encoder(pictures(3)).norm(dim=1).allclose(torch.ones(3), atol=1e-3)


def test_a_lesson_depends_on_seed_and_step_alone(data):
    first, again = (Lessons(data).draw(2, FIT) for _ in range(2))
    assert all(torch.equal(getattr(first, n), getattr(again, n)) for n in vars(first))
    other = Lessons(data).draw(3, FIT)
    assert other.labels.shape != first.labels.shape or not torch.equal(
        other.images, first.images
    )


def test_examples_are_the_first_training_images_of_each_side(squares):
    tasks = BinaryTasks((2, 0), (4, 1))
    images, labels = examples(TaskImages(squares, tasks), 3)
    assert images.shape == (2, 6, 3, 32, 32)
    assert labels.tolist() == [[0, 0, 0, 1, 1, 1]] * 2
    own = squares.train_images[squares.train_labels == 2][:3].float()
    shown = images[0, 3:] * squares.std.view(3, 1, 1) + squares.mean.view(3, 1, 1)
    torch.testing.assert_close(255 * shown, own, rtol=1e-3, atol=0.05)


def test_training_lets_one_look_tell_new_classes_apart():
    """Classes 20 to 29 are never trained; with shuffled labels the look is worth
    nothing."""
    squares = coloured_squares(classes=30)
    data = TaskImages(squares, each_pair(range(20)))
    new = TaskImages(squares, each_pair(range(20, 30)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        generator = LabelledNet(SPEC, z_dim=8, channels=8)
    fit = Fit(60, 3e-3, z_rate=3e-3, images=8, tasks=20, every=60)
    history = train_labelled(generator, TARGET, data, fit, classes=10, most=8)
    images, labels = examples(new, 5)
    random = torch.Generator().manual_seed(0)
    order = torch.rand(labels.shape, generator=random).argsort(1)
    with torch.no_grad():
        right = accuracy(TARGET, generator(images, labels), new).mean()
        weights = generator(images, labels.gather(1, order))
        shuffled = accuracy(TARGET, weights, new).mean()
    assert history.last("validation_accuracy") > 0.75 and right > 0.75
    assert 0.35 < shuffled < 0.65


def test_at_the_start_all_tasks_get_one_ordinary_network():
    generator = LabelledNet(SPEC, z_dim=8, channels=8)
    with torch.no_grad():
        weights = SPEC.join(generator(pictures(2, 5), LABELS))  # (2, P)
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-7)
    spread = weights[0, : 4 * 75].std() / SPEC.tensors[0].spread
    assert 0.8 < spread < 1.2


def test_a_killed_training_goes_on_and_another_one_is_refused(data, tmp_path):
    whole, broken = new_generator(), new_generator()
    fit = Fit(4, images=4, tasks=4, every=2)
    train_labelled(whole, TARGET, data, fit)
    path = tmp_path / "run.safetensors"

    class Killed(Exception):
        pass

    draw, lessons = Lessons.draw, []

    def until_three(self, step, fit):
        lessons.append(step)
        if step == 3 and len(lessons) == 4:
            raise Killed
        return draw(self, step, fit)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lessons, "draw", until_three)
        with pytest.raises(Killed):
            train_labelled(broken, TARGET, data, fit, checkpoint=path)
        train_labelled(again := new_generator(), TARGET, data, fit, checkpoint=path)
    assert lessons == [0, 1, 2, 3, 2, 3]
    for mine, theirs in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(Exception, match="another run"):
        train_labelled(new_generator(), TARGET, data, fit, most=3, checkpoint=path)


def test_the_encoder_reads_each_image_alone():
    encoder, images = ExampleEncoder(5, channels=4), pictures(3)
    with torch.no_grad():
        alone = torch.cat([encoder(image[None]) for image in images])
        assert encoder(images).shape == (3, 5)
        assert F.mse_loss(encoder(images), alone) < 1e-10
