"""The tasks of both experiments, their folds, and batches that never mix training with
held-out images.
"""

import dataclasses

import pytest
import torch

from minisupernet.data.images import held_back
from minisupernet.data.tasks import (
    BinaryTasks,
    TaskImages,
    all_pairs,
    each_pair,
    experiment_1,
    experiment_2,
    hold_out,
    one_against_rest,
    usable_folds,
    which_class,
)
from minisupernet.errors import TaskError


def test_experiment_1_has_99_tasks_against_class_100():
    tasks = experiment_1()
    assert len(tasks) == 99
    assert tasks.positive == tuple(range(99)) and set(tasks.negative) == {99}


def test_experiment_2_has_100_tasks_the_second_half_reversed():
    tasks = experiment_2()
    assert len(tasks) == 100
    for t in range(50):
        assert (tasks.positive[t], tasks.negative[t]) == (t, t + 50)
        assert (tasks.positive[t + 50], tasks.negative[t + 50]) == (t + 50, t)


def test_names_say_label_1_first():
    assert experiment_1(3).name(1, ("bee", "cat", "dog")) == "cat or dog"
    assert (
        experiment_2(4).select([2]).name(0, ("ant", "bee", "cat", "dog"))
        == "cat or ant"
    )


@pytest.mark.parametrize("experiment", [1, 2])
def test_folds_hold_out_every_candidate_once(experiment):
    folds = [hold_out(experiment, fold) for fold in range(5)]
    held = [number for _, numbers in folds for number in numbers]
    assert sorted(held) == list(range(99) if experiment == 1 else range(50, 100))
    total = 99 if experiment == 1 else 100
    assert all(sorted(trained + out) == list(range(total)) for trained, out in folds)


def test_reversed_tasks_keep_their_twin_in_training_unless_pairs_are_held_out():
    trained, held = hold_out(2, 0)
    assert all(number - 50 in trained for number in held)
    trained, held = hold_out(2, 0, pairs=True)
    assert len(held) == 20 and not any(
        number % 50 in trained or number % 50 + 50 in trained for number in held
    )


def test_folds_are_the_same_every_time_and_not_in_class_order():
    assert hold_out(1, 2) == hold_out(1, 2)
    assert hold_out(1, 0)[1] != list(range(20))


@pytest.mark.parametrize(
    "wrong",
    [
        {"experiment": 3, "fold": 0},
        {"experiment": 1, "fold": 5},
        {"experiment": 1, "fold": -1},
    ],
)
def test_no_such_experiment_or_fold(wrong):
    with pytest.raises(TaskError, match="there is no .*; choose"):
        hold_out(**wrong)


def test_a_fold_that_holds_out_nothing_is_refused():
    words = "fold 4 of 9 holds out nothing with 4 classes; choose 0 to 2."
    with pytest.raises(TaskError, match=words):
        hold_out(1, 4, folds=9, classes=4)
    with pytest.raises(TaskError, match="with 4 classes; choose 0 to 1"):
        hold_out(2, 2, classes=4)
    for wrong in ((1, 5, 2, False), (2, 1, 10, True)):
        experiment, folds, classes, pairs = wrong
        with pytest.raises(TaskError, match="leaves no task to train on"):
            hold_out(experiment, 0, folds, classes, pairs)


@pytest.mark.parametrize(
    ("experiment", "folds", "classes", "usable"),
    [(1, 9, 100, 9), (2, 5, 100, 5), (1, 9, 10, 4), (2, 5, 8, 2), (1, 9, 3, 1)],
)
def test_folds_are_as_few_as_let_each_hold_out_two(experiment, folds, classes, usable):
    assert usable_folds(experiment, folds, classes) == usable
    for fold in range(usable if classes > 3 else 0):
        trained, held = hold_out(experiment, fold, usable, classes)
        assert len(held) >= 2 and len(trained) >= 4


def test_a_batch_holds_the_right_classes_with_the_right_labels(squares):
    plain = TaskImages(squares, experiment_2(10), validation=4, raw=True)
    numbers, images, labels = plain.batch(step=3, seed=1, size=16, count=6)
    assert (
        numbers.shape == (6,)
        and images.shape == (6, 16, 3, 32, 32)
        and labels.shape == (6, 16)
    )
    assert len(set(numbers.tolist())) == 6
    known = {
        image.numpy().tobytes(): int(label)
        for image, label in zip(squares.train_images, squares.train_labels, strict=True)
    }
    for number, task_images, task_labels in zip(
        numbers.tolist(), images, labels, strict=True
    ):
        for image, label in zip(task_images, task_labels, strict=True):
            wanted = (
                plain.tasks.positive[number]
                if label == 1
                else plain.tasks.negative[number]
            )
            assert known[image.byte().numpy().tobytes()] == wanted


def test_a_batch_depends_on_seed_and_step_alone(squares):
    data = TaskImages(
        squares, experiment_1(10), validation=4, flip=True, crop=4, cutout=6
    )
    first, again = data.batch(5, 0, 8, 3), data.batch(5, 0, 8, 3)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (data.batch(6, 0, 8, 3), data.batch(5, 1, 8, 3)):
        assert not torch.equal(first[1], other[1])


def test_all_tasks_come_in_order_without_a_count(squares):
    data = TaskImages(squares, experiment_1(10), validation=4)
    assert data.batch(0, 0, 2)[0].tolist() == list(range(9))


def test_both_labels_are_as_likely(squares):
    data = TaskImages(squares, experiment_1(10), validation=4)
    labels = torch.stack([data.batch(step, 0, 40)[2] for step in range(20)])
    assert 0.47 < labels.mean() < 0.53


def test_no_image_is_in_two_splits(squares):
    tasks = experiment_1(10)
    data = TaskImages(squares, tasks, validation=4)
    splits = {name: set() for name in ("train", "validation", "test")}
    for step in range(60):
        splits["train"].update(
            image.numpy().tobytes()
            for image in data.batch(step, 0, 20)[1].flatten(0, 1)
        )
    for name in ("validation", "test"):
        for images, _, real in data.chunks(name, size=5):
            splits[name].update(image.numpy().tobytes() for image in images[real])
    assert (
        len(splits["train"]) == 10 * 20
        and len(splits["validation"]) == 10 * 4
        and len(splits["test"]) == 10 * 12
    )
    assert (
        not splits["train"] & splits["validation"]
        and not (splits["train"] | splits["validation"]) & splits["test"]
    )


def test_few_images_a_class(squares):
    few = TaskImages(squares, experiment_1(10), per_class=3, validation=4)
    seen = {
        image.numpy().tobytes()
        for step in range(30)
        for image in few.batch(step, 0, 20)[1].flatten(0, 1)
    }
    assert len(seen) == 30


def test_chunks_are_whole_and_mark_padding(squares):
    keep = torch.ones(len(squares.test_labels), dtype=torch.bool)
    keep[(squares.test_labels == 2).nonzero()[:5]] = False
    uneven = dataclasses.replace(
        squares,
        test_images=squares.test_images[keep],
        test_labels=squares.test_labels[keep],
    )
    data = TaskImages(uneven, BinaryTasks((2, 3), (9, 9)), validation=4)
    counts = sum(real.sum(1) for _, _, real in data.chunks("test", size=7))
    assert counts.tolist() == [7 + 12, 12 + 12]
    ones = sum(
        ((labels == 1) & real).sum(1) for _, labels, real in data.chunks("test", size=7)
    )
    assert ones.tolist() == [7, 12]


def test_a_class_out_of_range_is_named(squares):
    with pytest.raises(TaskError, match="class 10 is out of range: squares has 0 to 9"):
        TaskImages(squares, experiment_1(), validation=4)
    with pytest.raises(TaskError, match="class -1 is out of range"):
        TaskImages(squares, BinaryTasks((-1,), (2,)))


def test_a_class_left_without_images_is_named(squares):
    def first(count: int):
        chosen = torch.cat(
            [(squares.train_labels == c).nonzero()[:count, 0] for c in range(10)]
        )
        labels = squares.train_labels[chosen]
        pixels = squares.train_images[chosen]
        return dataclasses.replace(squares, train_images=pixels, train_labels=labels)

    with pytest.raises(TaskError, match="class 0 has no validation images; give it"):
        TaskImages(first(4), experiment_1(10))
    for images, kept in ((first(4), 0), (first(5), 50)):
        data = TaskImages(images, experiment_1(10), validation=kept)
        assert data.batch(0, 0, 2)[1].shape == (9, 2, 3, 32, 32)
    with pytest.raises(TaskError, match="class 0 has no train images"):
        TaskImages(first(0), experiment_1(10))
    for wrong in ({"validation": -1}, {"per_class": 0}):
        with pytest.raises(TaskError, match="per_class must be 1 or more"):
            TaskImages(squares, experiment_1(10), **wrong)


@pytest.mark.parametrize(
    ("count", "kept"),
    [(5, 1), (24, 4), (40, 8), (51, 10), (60, 12), (250, 50), (500, 50)],
)
def test_validation_takes_at_most_50_images_of_a_class_and_a_fifth(count, kept):
    assert held_back(count, 50) == kept and held_back(count, 0) == 0


def test_the_split_is_said_in_one_sentence(squares):
    whole = TaskImages(squares, experiment_1(10))
    assert whole.describe() == (
        "Images of each class: 20 to train on, 4 for validation, 12 for tests."
    )
    keep = torch.ones(len(squares.train_labels), dtype=torch.bool)
    keep[(squares.train_labels == 2).nonzero()[:9]] = False
    uneven = dataclasses.replace(
        squares,
        train_images=squares.train_images[keep],
        train_labels=squares.train_labels[keep],
    )
    said = TaskImages(uneven, experiment_1(10)).describe()
    assert said.startswith("Images of each class: 12 to 20 to train on, 3 to 4 for")
    few = TaskImages(squares, experiment_1(10), per_class=5).describe()
    assert few.startswith("Images of each class: 5 to train on, 4 for validation")


def test_too_few_classes():
    for make in (experiment_1, experiment_2):
        with pytest.raises(TaskError, match="at least 2 classes, this image set has 1"):
            make(1)


def test_all_pairs_are_every_other_question_about_the_same_classes():
    trained, held_out = BinaryTasks((0, 5, 1), (5, 0, 6)), BinaryTasks((6,), (1,))
    others = all_pairs(trained, but=held_out)
    asked = list(zip(others.positive, others.negative, strict=True))
    assert len(set(asked)) == len(asked) == 4 * 3 - 3 - 1
    assert {number for pair in asked for number in pair} == {0, 1, 5, 6}
    assert not set(asked) & {(0, 5), (5, 0), (1, 6), (6, 1)}
    assert len(trained + others) == 3 + 8


@pytest.mark.parametrize(
    ("experiment", "pairs", "classes"), [(1, False, 80), (2, False, 100), (2, True, 80)]
)
def test_more_tasks_bring_no_held_out_question_and_no_unseen_class(
    experiment, pairs, classes
):
    tasks = (experiment_1, experiment_2)[experiment - 1]()
    trained, held = (
        tasks.select(side) for side in hold_out(experiment, 0, 5, pairs=pairs)
    )
    more = trained + all_pairs(trained, but=held)
    asked = set(zip(more.positive, more.negative, strict=True))
    assert (
        len({*more.positive, *more.negative})
        == classes
        == len({*trained.positive, *trained.negative})
    )
    assert not asked & set(zip(held.positive, held.negative, strict=True))


# several classes on one side, and one class of many


@pytest.mark.parametrize(
    ("positive", "negative", "words"),
    [
        (
            (3,),
            (3,),
            r"task 0 asks \(3,\) or \(3,\); no class can stand against itself",
        ),
        ((1, (0, 2)), (2, (4, 0)), r"task 1 asks \(0, 2\) or \(4, 0\); no class"),
        (((1, 1),), (0,), "no class can stand against itself"),
        ((1, 2), (0,), "every task needs a positive and a negative side, not 2 and 1"),
        (((),), (0,), "the sides of task 0 must be class numbers or tuples of them"),
        (([1, 2],), (0,), "the sides of task 0 must be class numbers or tuples of"),
        ((0.5,), (0,), "the sides of task 0 must be class numbers or tuples of them"),
        ((1,), ((0, -2),), "class -2 is out of range"),
    ],
)
def test_questions_that_make_no_sense_are_refused(positive, negative, words):
    with pytest.raises(TaskError, match=words):
        BinaryTasks(positive, negative)


def test_tasks_that_do_not_exist_are_refused(squares):
    for number in (9, -1):
        with pytest.raises(
            TaskError, match=f"there is no task {number}; choose 0 to 8"
        ):
            experiment_1(10).select([0, number])
    with pytest.raises(TaskError, match="ask at least one question"):
        TaskImages(squares, BinaryTasks((), ()))
    with pytest.raises(TaskError, match="class 12 is out of range: squares has 0 to 9"):
        TaskImages(squares, BinaryTasks((0,), ((1, 12),)))


def test_a_side_of_several_classes_shows_any_of_them(squares):
    tasks = BinaryTasks(((0, 1, 2), 5), (7, (8, 9)))
    assert tasks.classes == [0, 1, 2, 5, 7, 8, 9]
    assert (
        tasks.name(0, squares.class_names) == "colour 0/colour 1/colour 2 or colour 7"
    )
    data = TaskImages(squares, tasks, raw=True)
    known = {
        image.numpy().tobytes(): int(label)
        for part in ("train", "test")
        for image, label in zip(
            getattr(squares, f"{part}_images"),
            getattr(squares, f"{part}_labels"),
            strict=True,
        )
    }

    def seen(task: int, images: torch.Tensor, labels: torch.Tensor) -> list[set[int]]:
        shown = [known[image.byte().numpy().tobytes()] for image in images[task]]
        pairs = list(zip(shown, labels[task].tolist(), strict=True))
        return [{number for number, own in pairs if own == label} for label in (1, 0)]

    _, images, labels = data.batch(0, 0, 80)
    assert seen(0, images, labels) == [{0, 1, 2}, {7}]
    assert seen(1, images, labels) == [{5}, {8, 9}]
    counts = sum(real.sum(1) for _, _, real in data.chunks("test"))
    assert counts.tolist() == [(3 + 1) * 12, (1 + 2) * 12]
    with pytest.raises(TaskError, match="ask about several classes at once"):
        all_pairs(tasks, but=experiment_1(10))


@pytest.mark.parametrize("make", [one_against_rest, each_pair])
def test_many_answers_name_one_class(make):
    tasks = make([2, 3, 5, 7])
    assert tasks.classes == [2, 3, 5, 7]
    truth = torch.tensor([7, 2, 5, 5, 3])

    def is_of(side: int | tuple[int, ...]) -> torch.Tensor:
        return torch.isin(truth, torch.tensor(side))

    yes, no = (
        torch.stack([is_of(side) for side in sides])
        for sides in (tasks.positive, tasks.negative)
    )
    logits = 4.0 * (
        yes.float() - no.float()
    )  # 0 where a question is not about the image
    assert which_class(tasks, logits).tolist() == truth.tolist()
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    assert which_class(tasks, logits + 0.5 * noise).tolist() == truth.tolist()
    assert which_class(tasks, -logits).tolist() != truth.tolist()


def test_one_against_rest_goes_by_the_largest_logit():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    found = which_class(one_against_rest([4, 5, 6, 9]), logits)
    assert torch.equal(found, torch.tensor([4, 5, 6, 9])[logits.argmax(0)])


def test_shared_images_are_those_of_all_classes_asked_about(squares):
    data = TaskImages(squares, each_pair([1, 4, 6]), raw=True)
    shown = list(data.shared("test", size=10))
    classes = torch.cat([labels for _, labels in shown])
    assert classes.bincount().tolist() == [0, 12, 0, 0, 12, 0, 12]
    pixels = torch.cat([each[0] for each, _ in shown]).byte()
    for number in (1, 4, 6):
        own = squares.test_images[squares.test_labels == number]
        assert torch.equal(pixels[classes == number], own)
    assert all(torch.equal(each[0], each[2]) and len(each) == 3 for each, _ in shown)
    kept = torch.cat([labels for _, labels in data.shared("validation")])
    assert kept.bincount().tolist() == [0, 4, 0, 0, 4, 0, 4]
