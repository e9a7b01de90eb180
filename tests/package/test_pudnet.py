"""PudNet: sketches, the walk over the layers, the start, prototypes; episodes, the
losses, and the study's controls.
"""

import json
import math

import pytest
import torch
from support import coloured_squares
from torch.nn import functional as F

from minisupernet.course.report.pudnet import (
    accuracy_over_time,
    against,
    headline,
    on_episodes,
    on_pairs,
)
from minisupernet.course.studies import pudnet as study
from minisupernet.course.studies.pudnet_fits import DatasetFits, FitBudget
from minisupernet.data.episodes import Batch, Episodes, Shape
from minisupernet.data.needs import NEEDS
from minisupernet.data.tasks import experiment_2, hold_out
from minisupernet.errors import EpisodeError, PudNetError, ResultError
from minisupernet.pudnet import (
    FeatureNet,
    HyperRecurrentUnit,
    Learner,
    OneNetwork,
    PudNet,
    cosine_logits,
    prototypes,
)
from minisupernet.target import WeightSpec, run_tasks
from minisupernet.training import train

TARGET = FeatureNet()
SPEC = WeightSpec.of(TARGET)


def images_like(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def generator() -> PudNet:
    torch.manual_seed(0)
    return PudNet(SPEC).eval()


def test_the_target_has_as_many_weights_as_its_docstring_says():
    by_hand = (27 * 16 + 16) + (144 * 32 + 32) + (288 * 64 + 64) + (576 * 64 + 64)
    assert SPEC.size == by_hand == 60_512 and "60,512" in FeatureNet.__doc__
    assert TARGET(images_like(2)).shape == (2, 64)


def test_many_datasets_in_one_call_are_each_what_it_would_be_alone(generator):
    datasets = images_like(3, 4)
    with torch.no_grad():
        together = generator(datasets)
        alone = [generator(each[None]) for each in datasets]
    assert SPEC.check(together) == 3
    for name, weights in together.items():
        torch.testing.assert_close(
            weights, torch.cat([each[name] for each in alone]), rtol=1e-4, atol=1e-6
        )


def test_a_sketch_is_a_mean_over_the_images_in_any_order(generator):
    dataset = images_like(1, 6)
    with torch.no_grad():
        sketch = generator.sketch(dataset)
        shuffled = generator.sketch(dataset[:, torch.tensor([3, 0, 5, 1, 4, 2])])
        each = torch.cat([generator.sketch(image[None, None]) for image in dataset[0]])
    torch.testing.assert_close(sketch, shuffled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sketch[0], each.mean(0), rtol=1e-4, atol=1e-5)


def test_the_walk_is_its_equations():
    torch.manual_seed(0)
    unit, sketch = HyperRecurrentUnit(width=5, layers=3, mix=0.25), torch.randn(2, 5)
    with torch.no_grad():
        codes = unit(sketch)
        state, output = sketch, unit.start.expand(2, 5)
        for layer in range(3):
            state = unit.cell(output, state)
            output = F.relu(unit.output(state))
            expected = F.layer_norm(0.75 * output + 0.25 * sketch, (5,))
            torch.testing.assert_close(codes[:, layer], expected)
    assert isinstance(unit.start, torch.nn.Parameter) and "start" in unit.state_dict()


def test_everything_that_makes_weights_gets_a_gradient(generator):
    weights = generator(images_like(2, 3))
    sum(tensor.square().sum() for tensor in weights.values()).backward()
    without = [
        name
        for name, parameter in generator.named_parameters()
        if not parameter.grad.any()
    ]
    assert not without


@pytest.mark.parametrize(
    "settings", [{}, {"width": 16, "rank": 2}, {"code_share": 0.8}]
)
def test_generated_weights_start_at_the_targets_scale(settings):
    ratios = {tensor.name: [] for tensor in SPEC.tensors}
    for seed in range(8):
        torch.manual_seed(seed)
        with torch.no_grad():
            weights = PudNet(SPEC, **settings)(images_like(4, 3, seed=seed))
        for tensor in SPEC.tensors:
            ratios[tensor.name].append(
                weights[tensor.name].square().mean().item() / tensor.spread**2
            )
    for name, values in ratios.items():
        assert 0.7 < math.sqrt(sum(values) / 8) < 1.35, name


def test_a_layers_weights_lie_in_as_many_dimensions_as_the_rank(generator):
    with torch.no_grad():
        flat = generator.flat(torch.randn(40, 64)).double()
        first = flat[:, : 27 * 16 + 16]
    assert torch.linalg.matrix_rank(first - first.mean(0), rtol=1e-5).item() == 8


def test_a_normalisation_layer_starts_at_its_centre():
    spec = WeightSpec.of(
        torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.GroupNorm(2, 8))
    )
    assert torch.equal(
        PudNet(spec)(images_like(2, 3))["1.weight"], torch.ones(2, 8)
    )  # spread 0 there


def test_the_control_is_one_network_for_every_dataset():
    weights = OneNetwork(SPEC)(images_like(3, 2))
    assert SPEC.check(weights) == 3
    assert all(torch.equal(tensor[0], tensor[2]) for tensor in weights.values())


def test_prototypes_are_class_means_and_a_class_is_nearest_by_angle():
    features = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [0.0, 4.0]]])
    centres = prototypes(features, way=2)
    assert torch.equal(centres, torch.tensor([[[2.0, 0.0], [0.0, 3.0]]]))
    logits = cosine_logits(torch.tensor([[[9.0, 0.0], [1.0, 1.0]]]), centres, 10.0)
    torch.testing.assert_close(
        logits, torch.tensor([[[10.0, 0.0], [50**0.5, 50**0.5]]])
    )


@pytest.mark.parametrize(
    "settings", [{"width": 0}, {"rank": 0}, {"mix": 1.5}, {"code_share": -0.1}]
)
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(
        PudNetError, match="must be at least 1, mix and code_share between 0 and 1"
    ):
        PudNet(SPEC, **settings)


@pytest.mark.parametrize(
    "shape", [(4, 3, 32, 32), (2, 4, 3, 28, 28), (2, 0, 3, 32, 32)]
)
def test_datasets_of_another_form_are_refused(generator, shape):
    for each in (generator, OneNetwork(SPEC)):
        with pytest.raises(PudNetError, match=r"datasets must be \(T, S, 3, 32, 32\)"):
            each(torch.randn(shape))


def test_in_training_one_dataset_alone_is_refused_and_codes_are_standardised(generator):
    generator.train()
    with pytest.raises(PudNetError, match="give at least 2, or call eval"):
        generator(images_like(1, 3))
    weights = generator.flat(torch.randn(6, 64)).detach()
    common = torch.cat([head.base for head in generator.heads]).detach()
    torch.testing.assert_close(
        weights.mean(0), common, rtol=0, atol=1e-6
    )  # what all datasets share is b
    assert not torch.allclose(weights[0], common, atol=1e-4)


def test_raw_pixels_are_refused(generator):
    with pytest.raises(PudNetError, match="use minisupernet.data.normalise"):
        generator(torch.zeros(1, 2, 3, 32, 32, dtype=torch.uint8))


def test_classes_of_unequal_size_are_refused():
    with pytest.raises(PudNetError, match="3 classes of equal size"):
        prototypes(torch.randn(1, 7, 4), way=3)


# episodes


def test_an_episode_keeps_its_classes_apart_and_its_query_out_of_its_support(squares):
    batch = Episodes(squares, range(2, 9)).draw(
        0, 0, Shape(way=4, support=3, query=2), count=5
    )
    assert (
        batch.classes.shape == (5, 4)
        and batch.support.shape == (5, 12, 3, 32, 32)
        and batch.way == 4
    )
    assert batch.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    for episode in range(5):
        assert len(set(batch.classes[episode].tolist())) == 4 and set(
            batch.classes[episode].tolist()
        ) <= set(range(2, 9))
        seen = {image.sum().item() for image in batch.support[episode]}
        assert not seen & {image.sum().item() for image in batch.query[episode]}


@pytest.mark.parametrize("test", [False, True])
def test_images_belong_to_the_class_they_are_filed_under(test):
    images = coloured_squares(train=6, test=6)
    for part in ("train", "test"):  # every image shows its class and where it is from
        labels = getattr(images, f"{part}_labels")
        getattr(images, f"{part}_images")[:] = (labels + 100 * (part == "test")).to(
            torch.uint8
        )[:, None, None, None]
    batch = Episodes(images, range(10), test=test).draw(3, 0, Shape(3, 2, 2), count=4)
    scale = (255 * images.std).view(3, 1, 1)
    shown = [
        (each[:, :, 0, 0, 0] * scale[0] + 255 * images.mean[0]).round()
        for each in (batch.support, batch.query)
    ]
    assert torch.equal(
        shown[0], batch.classes.repeat_interleave(2, 1).float().view_as(shown[0])
    )
    assert torch.equal(
        shown[1] - 100 * test, batch.classes.repeat_interleave(2, 1).float()
    )


def test_draws_are_a_function_of_seed_and_step(squares):
    episodes = Episodes(squares, range(10), flip=True)
    draws = [
        episodes.draw(step, seed, Shape(3, 2, 2), 2)
        for step, seed in ((4, 1), (4, 1), (5, 1), (4, 2))
    ]
    assert torch.equal(draws[0].query, draws[1].query)
    assert not torch.equal(draws[0].query, draws[2].query) and not torch.equal(
        draws[0].query, draws[3].query
    )


def test_a_whole_dataset_has_the_first_train_images_and_all_test_images(squares):
    batch = Episodes(squares, [1, 4, 6, 7]).whole([[4, 1], [7, 6]], support=5)
    assert batch.classes.tolist() == [[4, 1], [7, 6]]
    assert batch.support.shape[:2] == (2, 10) and batch.query.shape[:2] == (2, 24)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (Shape(way=5), "needs 2 to 4 of these classes, not 5"),
        (Shape(way=1), "not 1"),
        (Shape(2, support=0), "at least 1 support image"),
        (Shape(2, query=0), "at least 1 query image"),
        (Shape(2, 20, 5), "24 train and 12 test images, too few"),
    ],
)
def test_episodes_that_cannot_be_drawn_are_refused(squares, shape, words):
    episodes = Episodes(squares, range(4))
    for refused in (
        lambda: episodes.draw(0, 0, shape, 1),
        lambda: episodes.check(shape),
    ):
        with pytest.raises(EpisodeError, match=words):
            refused()
    with pytest.raises(EpisodeError, match="at least 1 episode can be drawn, not 0"):
        episodes.draw(0, 0, Shape(2), 0)


def test_classes_that_are_not_there_are_refused(squares):
    for classes in ([3, 10], [], [2, 2]):
        with pytest.raises(EpisodeError, match="different numbers from 0 to 9"):
            Episodes(squares, classes)
    for datasets in ([], [[1, 2], [1]], [[1, 1]]):
        with pytest.raises(EpisodeError, match="equally many classes, no class twice"):
            Episodes(squares, [1, 2]).whole(datasets, 2)
    with pytest.raises(EpisodeError, match=r"classes \[5\] are not among"):
        Episodes(squares, [1, 2]).whole([[1, 5]], 2)


def two_class_batch() -> Batch:
    return Batch(torch.tensor([[1, 3]]), images_like(1, 2), images_like(1, 4, seed=1))


def test_the_loss_is_its_three_terms():
    torch.manual_seed(0)
    learner, batch = Learner(OneNetwork(SPEC), TARGET, classes=5), two_class_batch()
    with torch.no_grad():
        loss = learner.loss(batch)
        weights = learner.generator(batch.support)
        support, query = (
            run_tasks(TARGET, weights, each)[0] for each in (batch.support, batch.query)
        )
        p = (10 * F.cosine_similarity(query[:, None], support[None], dim=2)).softmax(
            1
        )  # one image a class
        full = learner.full(query)
        q = full[:, [1, 3]].softmax(1)
        labels = torch.tensor([0, 0, 1, 1])
        prototype = -p[torch.arange(4), labels].log().mean()
        auxiliary = (
            F.cross_entropy(full, torch.tensor([1, 1, 3, 3]))
            + (q * (q / p).log()).sum(1).mean()
        )
    torch.testing.assert_close(loss, prototype + auxiliary)
    learner.auxiliary = False
    torch.testing.assert_close(learner.loss(batch).detach(), prototype)


def test_a_wrong_dataset_changes_the_weights_and_not_the_prototypes_source(generator):
    learner, batch = Learner(generator, TARGET), two_class_batch()
    shown = []
    learner.logits = lambda weights, given: (
        shown.append((weights, given)) or (torch.zeros(1, 4, 2), None)
    )
    learner.accuracy(batch)
    learner.accuracy(batch, images_like(1, 2, seed=9))
    assert shown[0][1] is shown[1][1] is batch
    assert not torch.equal(*(weights["convolutions.0.weight"] for weights, _ in shown))


def test_training_on_some_classes_serves_classes_never_seen():
    images = coloured_squares(classes=30, train=12, test=6)
    torch.manual_seed(0)
    learner = Learner(PudNet(SPEC, width=16, rank=2), TARGET, classes=30)
    unseen = Episodes(images, range(20, 30), test=True).draw(0, 9, Shape(5, 3, 5), 10)
    before = learner.accuracy(unseen).mean()
    episodes = Episodes(images, range(20))
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-3)
    train(
        learner,
        optimizer,
        lambda step: learner.loss(episodes.draw(step, 0, Shape(5, 3, 3), 3)),
        25,
    )
    after = learner.accuracy(unseen).mean()
    assert after > before + 0.03 and after > 0.5, f"{before:.2f} to {after:.2f}"


# the study


@pytest.mark.parametrize("seed", range(6))
def test_the_unseen_classes_are_experiment_2s_held_out_pairs_and_nobody_trained_on_them(
    seed,
):
    images = coloured_squares(classes=100, train=1, test=1)
    training, validation, unseen, pairs = study.class_split(images, seed)
    assert (len(training), len(validation), len(unseen), len(pairs)) == (70, 10, 20, 10)
    assert sorted(training + validation + unseen) == list(range(100))
    assert [number + 50 for number, _ in pairs] == hold_out(2, seed % 5, 5)[1]
    tasks = experiment_2(100)
    assert all(
        pair == [tasks.negative[n], tasks.positive[n]] and set(pair) <= set(unseen)
        for n, pair in pairs
    )


@pytest.mark.parametrize("classes", [NEEDS[8].classes, 13, 20, 40])
@pytest.mark.parametrize("seed", range(5))
def test_few_classes_are_cut_in_three_parts_that_serve(seed, classes):
    images = coloured_squares(classes=classes, train=1, test=1)
    training, validation, unseen, pairs = study.class_split(images, seed)
    assert sorted(training + validation + unseen) == list(range(classes))
    assert len(training) >= 6 and len(validation) >= 2 and len(unseen) >= 4
    assert sorted(number for _, pair in pairs for number in pair) == unseen


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"shape": Shape(40, 2, 2)}, "an episode needs 2 to .* not 40"),
        ({"supports": (1, 50)}, "20 train and 10 test images, too few for 50 support"),
        ({"query": 11}, "too few for 1 support and 11 query images"),
    ],
)
def test_the_study_refuses_what_cannot_be_drawn_before_it_trains(
    monkeypatch, settings, words
):
    images = coloured_squares(classes=30, train=20, test=10)
    monkeypatch.setattr(study, "load", lambda name, device: images)
    monkeypatch.setattr(study, "train_learner", lambda *_: pytest.fail("trained"))
    with pytest.raises(EpisodeError, match=words):
        small = {"shape": Shape(4, 2, 2), "supports": (1, 5)} | settings
        study.measure_with(images, 0, study.Budget(**small), report=print)


def test_fits_begin_at_the_prediction_and_learn():
    images = coloured_squares(classes=6, train=20, test=8)
    bench = DatasetFits(TARGET, images, [[0, 1, 2], [5, 4, 3]], batch=12, seed=0)
    weights, centres, seconds = bench.predict(OneNetwork(SPEC))
    predicted = bench.accuracy(weights, centres, bench.test)
    assert (
        bench.support == 18 and bench.validation.query.shape[1] == 3 * 2 and seconds > 0
    )
    few_weights, few_centres, _ = bench.predict(OneNetwork(SPEC), few=2)
    assert few_centres.shape == centres.shape and not torch.equal(few_centres, centres)
    still, still_centres, _ = bench.fit(weights, rate=0.0, epochs=0.5, temperature=10.0)
    torch.testing.assert_close(
        bench.accuracy(still, still_centres, bench.test), predicted
    )
    start = SPEC.split(SPEC.draw(2, torch.Generator().manual_seed(0)))
    fitted, fitted_centres, _ = bench.fit(start, rate=3e-3, epochs=8, temperature=10.0)
    assert bench.accuracy(fitted, fitted_centres, bench.test).mean() > 0.7


def test_validation_images_are_no_training_images():
    images = coloured_squares(classes=4, train=20, test=8)
    bench = DatasetFits(TARGET, images, [[0, 1], [2, 3]], batch=8, seed=0)
    trained = {
        image.sum().item() for image in bench.pixels[bench.members.flatten()].float()
    }
    pixels = bench.validation.query * (255 * images.std).view(
        3, 1, 1
    ) + 255 * images.mean.view(3, 1, 1)
    validated = {round(image.sum().item()) for image in pixels.flatten(0, 1)}
    assert (
        len(trained) == 4 * 18 and len(validated) == 4 * 2 and not trained & validated
    )


def test_the_study_measures_every_arm(monkeypatch):
    images = coloured_squares(classes=30, train=20, test=10)
    monkeypatch.setattr(
        study,
        "load",
        lambda name, device: coloured_squares(classes=6, train=20, test=10),
    )
    monkeypatch.setattr(study, "is_at_hand", lambda name: False)
    fits = FitBudget((0.5, 1), (0.5,), (1e-3, 3e-3), 0.2, 10, 3)
    budget = study.Budget(3, 2, Shape(4, 2, 2), (1e-3, 3e-3), 2, 4, 2, (1, 5), fits)
    found = json.loads(
        json.dumps(study.measure_with(images, 1, budget, report=lambda line: None))
    )
    arms = {"pudnet", "no_auxiliary", "one_network", "untrained"}
    for name, place in found["episodes"].items():
        assert set(place) == arms | {"wrong_sketch"} and {
            len(values) for values in place.values()
        } == {4}, name
    assert (
        "cifar10: not at hand, left out" in found["notes"]
        and "shapes100, 5-way, 5 a class" in found["episodes"]
    )
    assert (
        found["training"]["pudnet"]["rate"] == found["training"]["no_auxiliary"]["rate"]
    )
    assert all(
        len(found["pairs"][arm]) == len(found["pairs"]["numbers"]) for arm in arms
    )
    assert (
        set(found["datasets"]["few"])
        == set(found["datasets"]["predicted"])
        == {"pudnet", "one_network", "untrained"}
    )
    assert set(found["datasets"]["fits"]) == {"scratch", "pudnet", "one_network"}
    assert all(each["seconds"] > 0 for each in found["datasets"]["predicted"].values())
    assert found["parameters"]["one_network"] == found["parameters"]["target"] == 60_512


def recorded_run(seed: int) -> dict:
    """A run as the study records it, with numbers that are easy to work out by hand."""
    lengths = [
        {"seconds": s, "accuracy": [a - 0.1, a + 0.1]}
        for s, a in ((1.0, 0.4), (4.0, 0.6), (100.0, 0.9))
    ]
    made = {
        "pudnet": {"seconds": 0.5, "accuracy": [0.4, 0.6]},
        "one_network": {"seconds": 2.0, "accuracy": [0.3, 0.4]},
    }
    return {
        "episodes": {
            "unseen": {"pudnet": [0.5, 0.6 + 0.1 * seed], "one_network": [0.4, 0.6]}
        },
        "seed": seed,
        "pairs": {"numbers": [seed, seed + 10], "pudnet": [0.7, 0.8 + 0.1 * seed]},
        "training": {"pudnet": {"seconds": 300.0}, "one_network": {"seconds": 200.0}},
        "datasets": {
            "predicted": made,
            "few": {"pudnet": made["one_network"]},
            "fits": {"scratch": {"curve": lengths}},
        },
    }


def test_recorded_runs_are_read_as_they_were_written():
    runs = [recorded_run(0), recorded_run(1)]
    assert on_episodes(runs, "unseen", "pudnet") == pytest.approx([0.55, 0.6])
    assert against(runs, "unseen", "pudnet", "one_network").mean == pytest.approx(0.075)
    assert on_pairs(runs, "pudnet") == pytest.approx({(0, 0): 0.75, (1, 1): 0.8})
    seconds, accuracy = accuracy_over_time(runs, "scratch")
    assert seconds == [1.0, 4.0, 100.0] and accuracy == pytest.approx([0.4, 0.6, 0.9])
    with pytest.raises(
        ResultError, match="no recorded run has the arm 'z_only' at 'unseen'"
    ):
        on_episodes(runs, "unseen", "z_only")


def test_the_headline_is_a_time_at_equal_accuracy_and_says_what_it_leaves_out():
    found = headline([recorded_run(0), recorded_run(1)], "pudnet")
    assert found.accuracy == pytest.approx(0.5) and found.match == pytest.approx(
        2.0
    )  # half way from 1 to 4 s, in logs
    assert found.times_faster == pytest.approx(
        4.0
    ) and found.datasets_to_pay == pytest.approx(300 / 1.5)
    assert found.proper == pytest.approx(0.9) and found.proper_seconds == 100.0
    assert headline([recorded_run(0)], "pudnet", "few").seconds == 2.0
    slower = headline([recorded_run(0)], "one_network")
    assert (
        slower.match == 1.0
        and slower.times_faster == 0.5
        and slower.datasets_to_pay == math.inf
    )
