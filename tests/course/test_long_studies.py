"""Studies at a size that counts: every arm runs at a tiny size, a killed unit goes on,
and what the arms stand on is right.
"""

from dataclasses import replace

import pytest
import torch
from support import coloured_squares

from minisupernet.course import studies
from minisupernet.course.report.long_studies import (
    FAMILY_NAMES,
    GROWTH_NAMES,
    TEXT_NAMES,
    family_leads_table,
    family_table,
    growth_figure,
    growth_table,
    lead,
    text_table,
    units,
)
from minisupernet.course.statistics import verdict
from minisupernet.course.studies import (
    SOURCE,
    hyperlstm_long,
    measure_study,
    net2net_long,
    pudnet_family,
)
from minisupernet.course.studies import rates as rates_module
from minisupernet.course.studies.growing import conv_net
from minisupernet.data.episodes import Batch
from minisupernet.data.library import python_source
from minisupernet.data.text import CharacterModel, Text, streams
from minisupernet.errors import ResultError, StudyError, TextError


def lasting(run: dict) -> dict:
    """What must be the same in every run of one unit: all but times."""
    rows = [{**row, "seconds": 0} for row in run["history"]]
    return {**run, "history": rows, "train_seconds": 0}


def images_like(*shape: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(1)
    return torch.rand(*shape, 3, 32, 32, generator=random)


def changes_of(kind: str, count: int = 3) -> pudnet_family.Changes:
    random = torch.Generator().manual_seed(2)
    return pudnet_family.draw_changes(kind, count, random, torch.device("cpu"))


# Chapter 8: data sets with changes of their own


def test_each_data_set_has_one_change_of_all_its_images():
    images = images_like(1, 1).expand(3, 4, 3, 32, 32)  # one image, 12 times
    for kind in ("colours", "all"):
        found = changes_of(kind)(images)
        torch.testing.assert_close(found[:, :1].expand(found.shape), found)
        apart = (found[0, 0] - found[1, 0]).abs().mean(), found[0, 0].abs().mean()
        assert apart[0] > 0.2 * apart[1]
        moved = changes_of(kind).of_the_next()(images)
        torch.testing.assert_close(moved, found.roll(-1, 0).roll(2, 0))
    assert changes_of("none")(images).equal(images)


def test_colours_are_turned_and_mirrored_half_the_time():
    mixing = changes_of("colours", 200).mixing
    identity = torch.eye(3).expand(200, 3, 3)
    torch.testing.assert_close(mixing @ mixing.mT, identity, atol=1e-5, rtol=0)
    mirrored = (torch.linalg.det(mixing) < 0).float().mean().item()
    assert 0.4 < mirrored < 0.6 and mixing.mean(0).abs().max() < 0.15


def test_blocks_are_shuffled_whole_and_a_blur_keeps_the_mean_colour():
    images, change = images_like(3, 2), changes_of("all")
    sharp = replace(change, down=torch.eye(32).expand(3, 32, 32))
    sharp = replace(sharp, across=sharp.down, mixing=torch.eye(3).expand(3, 3, 3))
    found = sharp(images)
    torch.testing.assert_close(
        found.flatten(3).sort(3)[0], images.flatten(3).sort(3)[0]
    )
    place = int(sharp.order[0, 0])
    down, across = 8 * (place // 4), 8 * (place % 4)
    cut = images[0, 0, :, down : down + 8, across : across + 8]
    assert found[0, 0, :, :8, :8].equal(cut)
    torch.testing.assert_close(change.down.sum(2), torch.ones(3, 32))
    assert change.down[0].diagonal().max() < 1


def test_hand_alignment_undoes_what_turns_the_colours():
    skewed = images_like(3, 4).square() * torch.tensor([3.0, 1.0, 0.3]).view(3, 1, 1)
    batch = Batch(torch.zeros(3, 2), skewed[:, :2], skewed[:, 2:])
    there = pudnet_family.aligned(pudnet_family.changed(batch, changes_of("colours")))
    here = pudnet_family.aligned(batch)
    torch.testing.assert_close(there.support, here.support, atol=1e-4, rtol=0)
    torch.testing.assert_close(there.query, here.query, atol=1e-4, rtol=0)


def test_a_sketch_with_labels_sees_who_belongs_together_and_nothing_else():
    torch.manual_seed(0)
    encoder = pudnet_family.ClassEncoder(8, way=2).eval()
    datasets = images_like(1, 6)
    sketch = encoder(datasets)
    for order in ([1, 2, 0, 5, 4, 3], [3, 4, 5, 0, 1, 2]):
        torch.testing.assert_close(encoder(datasets[:, order]), sketch)
    mixed = encoder(datasets[:, [0, 1, 3, 2, 4, 5]])
    assert (mixed - sketch).abs().max() > 1e-4


def test_splits_keep_superclasses_whole_and_the_seed_draws_them():
    images = coloured_squares(classes=40, train=2, test=1)
    images = replace(images, superclass_of=torch.arange(40) // 2)
    parts = [pudnet_family.class_split(images, seed) for seed in range(2)]
    for training, validation, test in parts:
        assert sorted(training + validation + test) == list(range(40))
        assert [len(part) for part in (training, validation, test)] == [28, 4, 8]
        for part in (training, validation, test):
            assert {number ^ 1 for number in part} == set(part)
    assert parts[0] != parts[1]


@pytest.fixture(scope="module")
def many_squares():
    return coloured_squares(classes=50, train=6, test=4)


def family_unit(images, arm, checkpoint=None, **which):
    unit = {"changes": "colours", "channels": 4, "steps": 4, **which}
    return pudnet_family.measure(images, 0, "quick", str, checkpoint, arm=arm, **unit)


@pytest.mark.parametrize("arm", pudnet_family.ARMS)
def test_every_arm_of_the_family_is_measured(many_squares, arm):
    run = family_unit(many_squares, arm, changes="all")
    shown = {"own"}
    if arm.startswith("pudnet"):
        shown |= {"wrong", "other_classes", "other_change"}
    assert set(run["test"]["2"]) == shown
    assert all(0 <= value <= 1 for value in run["test"]["2"].values())
    assert run["weights"] == 3_896 and [r["step"] for r in run["history"]] == [2, 4]
    assert not {*run["classes"]["training"]} & {*run["classes"]["test"]}


def test_a_killed_unit_of_the_family_ends_as_if_never_killed(
    many_squares, tmp_path, monkeypatch
):
    rates = replace(pudnet_family.QUICK, rates=(1e-3, 3e-3))
    monkeypatch.setattr(pudnet_family, "QUICK", rates)
    path = tmp_path / "unit.safetensors"
    check, looks = pudnet_family.Unit.check, []

    def killed(self, learner):
        looks.append(check(self, learner))
        if path.exists():  # after the trials, and the first look of the run
            raise KeyboardInterrupt
        return looks[-1]

    with monkeypatch.context() as patch:
        patch.setattr(pudnet_family.Unit, "check", killed)
        with pytest.raises(KeyboardInterrupt):
            family_unit(many_squares, "pudnet", path)
    monkeypatch.setattr(rates_module, "best_rate", None)  # not chosen again
    again = family_unit(many_squares, "pudnet", path)
    monkeypatch.undo()
    monkeypatch.setattr(pudnet_family, "QUICK", rates)
    assert lasting(again) == lasting(family_unit(many_squares, "pudnet"))
    assert len(again["tried"]) == 3 and not list(tmp_path.glob("*.rate"))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"arm": "two_networks"}, "arm cannot be 'two_networks'; choose one of one"),
        ({"changes": "sepia"}, "changes cannot be 'sepia'; choose one of none"),
        ({"channels": 6}, "channels must be 4 or a multiple of it"),
        ({"steps": 0}, "steps from 1, not 8 and 0"),
    ],
)
def test_a_unit_of_the_family_that_does_not_exist_is_refused(wrong, said):
    unit = {"arm": "pudnet", "changes": "all", "channels": 8, "steps": 1}
    with pytest.raises(StudyError, match=said):
        pudnet_family.check_unit(**{**unit, **wrong})


# Chapter 4: half a million numbers


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A little library: modules of 40 paragraphs, some of them twice."""
    folder = tmp_path_factory.mktemp("library")
    for number in range(60):
        own = [f"def f{number}_{n}(x):\n    return x + {n}" for n in range(40)]
        shared = [f"# line {n}\nimport os" for n in range(40)]
        path = folder / "part" / f"module_{number}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n\n".join(own + shared), encoding="utf-8")
    for name in ("site-packages/x.py", "test/x.py", "_sysconfigdata_here.py"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("left = 'out'", encoding="utf-8")
    return folder


@pytest.fixture
def text(library, monkeypatch) -> Text:
    monkeypatch.setattr("minisupernet.data.library.LEAST", 100)
    return python_source(library, rare=10)


def test_source_is_cut_by_file_and_no_paragraph_comes_twice(text, library):
    parts = [text.decode(part) for part in (text.train, text.validation, text.test)]
    paragraphs = [paragraph for part in parts for paragraph in part.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs)) == 60 * 40 + 40
    modules = [
        {line.split("_")[0] for line in part.split("def ")[1:]} for part in parts
    ]
    assert sum(map(len, modules)) == 60 and len(modules[0]) > 40 > 20 > len(modules[2])
    assert "# line 3" in parts[0] and not any("left" in part for part in parts)
    assert python_source(library, rare=10).sha256 == text.sha256 == text.checksum()
    assert text.encode(parts[1]).equal(text.validation)


def test_a_library_without_its_source_is_refused(tmp_path):
    (tmp_path / "abc.pyc").write_bytes(b"")
    with pytest.raises(
        TextError, match="does not hold the source of Python's standard"
    ):
        python_source(tmp_path)


def long_text_unit(text, arm, checkpoint=None, characters=480):
    unit = {"arm": arm, "characters": characters}
    return hyperlstm_long.measure(text, 0, "quick", str, checkpoint, **unit)


@pytest.mark.parametrize("arm", hyperlstm_long.ARMS)
def test_arms_have_equally_many_numbers_and_learn(text, arm):
    run = long_text_unit(text, arm, characters=8_000)
    like = long_text_unit(text, "hyperlstm", characters=80)
    assert abs(run["parameters"] / like["parameters"] - 1) < 0.03
    assert run["steps"] == 100 and like["steps"] == 1
    assert run["test"] < like["test"] - 0.5 and run["train_bits"] < like["train_bits"]
    assert run["text"]["train"] == len(text.train)
    (tried,) = run["tried"]
    assert tried["rate"] == run["rate"] == 0.01 and tried["validation"] > run["test"]


@pytest.mark.parametrize("arm", ["hyperlstm_plain", "hyperlstm"])
def test_a_killed_reading_goes_on_in_its_state(text, arm, tmp_path, monkeypatch):
    whole, looks = long_text_unit(text, arm), []
    loss, path = hyperlstm_long.Reader.loss, tmp_path / "unit.safetensors"

    def killed(self, step):
        if step == 4:  # one step behind the first look
            raise KeyboardInterrupt
        looks.append(step)
        return loss(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(hyperlstm_long.Reader, "loss", killed)
        with pytest.raises(KeyboardInterrupt):
            long_text_unit(text, arm, path)
    assert looks == [0, 0, 1, 2, 3] and whole["steps"] == 6  # a trial is one step
    assert lasting(long_text_unit(text, arm, path)) == lasting(whole)


def test_a_reader_starts_anew_where_the_text_does(text):
    model = hyperlstm_long.ARMS["lstm"](len(text.alphabet), 6, hyperlstm_long.QUICK)
    model = CharacterModel(model, len(text.alphabet), 6).eval()
    reader = hyperlstm_long.Reader(model, streams(text.train[:90], 2), 20)
    first, second, again, then = (reader.loss(step).item() for step in range(4))
    assert (first, second) == (again, then)  # two windows of 20 in streams of 45
    assert model.recurrent.cells[0].bias[6:12].tolist() == [1.0] * 6
    both = reader.model(reader.read[:40])[0].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(both, reader.read[1:41].flatten())
    assert loss.item() == pytest.approx((first + second) / 2, abs=1e-5)


def test_the_study_of_text_records_which_text(text, monkeypatch):
    monkeypatch.setattr(studies, "python_source", lambda: text)
    run = measure_study("hyperlstm_long", 0, "quick", report=str, characters=80)
    assert run["data"] == {"name": SOURCE, "sha256": text.sha256}
    with pytest.raises(StudyError, match="reads the text python_source, not cifar10"):
        measure_study("hyperlstm_long", 0, "quick", "cifar10")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"arm": "gru"}, "there is no arm 'gru'; choose one of lstm"),
        ({"characters": 0}, "characters must be from 1, not 0"),
    ],
)
def test_a_unit_of_text_that_does_not_exist_is_refused(wrong, said):
    unit = {"arm": "lstm", "characters": 9}
    with pytest.raises(StudyError, match=said):
        hyperlstm_long.check_unit(**{**unit, **wrong})


# Chapter 2: a teacher trained to its end


def growth_unit(images, phase, arm, checkpoint=None):
    unit = {"phase": phase, "arm": arm}
    return net2net_long.measure(images, 0, "quick", str, checkpoint, **unit)


@pytest.fixture(scope="module")
def lesson(squares):
    settings = net2net_long.QUICK
    pictures = net2net_long.Pictures(squares, settings.validation, settings.batch)
    return net2net_long.Lesson(pictures, replace(settings, noise=0.0), 0)


@pytest.mark.parametrize("phase", net2net_long.PHASES)
def test_growth_reaches_the_large_shape_and_keeps_what_it_should(lesson, phase):
    sizes = net2net_long.QUICK_PHASES[phase]
    torch.manual_seed(0)
    teacher = conv_net(sizes.widths, sizes.convolutions, 10)
    lesson.train(teacher, 0.1, 10)
    large = conv_net(sizes.large_widths, sizes.large_convolutions, 10)
    pixels = lesson.pictures.batch(0, 0)[0]
    for arm in net2net_long.GROWN[phase]:
        grown = net2net_long.grow(arm, teacher, sizes, lesson).eval()
        assert [p.shape for p in grown.parameters()] == [
            p.shape for p in large.parameters()
        ]
        apart = (grown(pixels) - teacher.eval()(pixels)).abs().max().item()
        assert apart > 0.01 if arm == "random" else apart < 1e-4


def test_equal_operations_are_equal():
    for name, sizes in net2net_long.PHASES.items():
        small, large = 1.0, 3.5
        steps = {
            arm: net2net_long._steps(arm, sizes, small, large)
            for arm in net2net_long.ARMS[name]
        }
        whole = sizes.first * small + sizes.second * large
        assert steps["scratch_operations"] * large == pytest.approx(whole, rel=1e-3)
        assert steps["scratch_thrice"] * large == pytest.approx(3 * whole, rel=1e-3)
        teacher = (sizes.first + steps["teacher_operations"]) * small
        assert teacher == pytest.approx(whole, rel=1e-3)
        assert steps["scratch_steps"] == sizes.first + steps["copies"]
        assert steps["copies"] == steps["random"] == steps["teacher_steps"]


@pytest.mark.parametrize(
    ("phase", "arm"),
    [(phase, arm) for phase, arms in net2net_long.ARMS.items() for arm in arms],
)
def test_every_arm_of_growth_is_measured(squares, phase, arm, growth_folder):
    run = growth_unit(squares, phase, arm, growth_folder / f"{phase}-{arm}.safetensors")
    small, large = run["teacher"]["parameters"], run["parameters"]
    assert (small == large) == arm.startswith("teacher")
    tried = [each["rate"] for each in run["tried"]]
    base = 0.1 if arm.startswith("scratch") else 10 / 3 * run["teacher"]["rate"] * 0.3
    shares = (0.3, 1, 3) if arm.startswith("scratch") else (0.1, 0.3, 1)
    assert tried == pytest.approx([base * share for share in shares])
    assert run["rate"] in tried and run["history"][-1]["step"] == run["steps"]
    if not arm.startswith("scratch"):
        assert run["operations"] > run["teacher"]["operations"]
    if arm.startswith("teacher"):
        assert run["at_start"] == run["teacher"]["validation"]


@pytest.fixture(scope="module")
def growth_folder(tmp_path_factory):
    """One folder for all units, as in a sweep, where they share their teachers."""
    return tmp_path_factory.mktemp("growth")


def test_units_of_one_seed_share_one_teacher(squares, tmp_path):
    first, second = (
        growth_unit(squares, "wider", arm, tmp_path / f"{arm}.safetensors")
        for arm in ("copies", "random")
    )
    assert first["teacher"] == second["teacher"]
    teachers = sorted(path.suffix for path in tmp_path.glob("teacher-*"))
    assert teachers == [".lock", ".safetensors"]


def test_a_killed_growth_ends_as_if_never_killed(squares, tmp_path, monkeypatch):
    whole, path = growth_unit(squares, "wider", "copies"), tmp_path / "unit.safetensors"
    accuracy, looks = net2net_long.Lesson.accuracy, []

    def killed(self, network, part="validation"):
        looks.append(part)
        if len(looks) in kills:
            raise KeyboardInterrupt
        return accuracy(self, network, part)

    kills = {5, 10, 16}  # in the teacher, in the choice, and in the student
    with monkeypatch.context() as patch:
        patch.setattr(net2net_long.Lesson, "accuracy", killed)
        for _ in kills:
            with pytest.raises(KeyboardInterrupt):
                growth_unit(squares, "wider", "copies", path)
        again = growth_unit(squares, "wider", "copies", path)
    again["teacher"], whole["teacher"] = (
        lasting(run["teacher"]) for run in (again, whole)
    )
    assert lasting(again) == lasting(whole)


def test_a_unit_of_growth_that_does_not_exist_is_refused():
    with pytest.raises(StudyError, match="no phase 'longer'; choose one of wider"):
        net2net_long.check_unit("longer", "copies")
    with pytest.raises(StudyError, match="no arm 'zero' of deeper; choose one of copi"):
        net2net_long.check_unit("deeper", "zero")


# Tables of what is recorded so far


def family_record(arm: str, seed: int, own: float, changes: str = "colours") -> dict:
    shown = {"own": own} | ({"wrong": own - 0.04} if arm == "pudnet" else {})
    which = {"arm": arm, "changes": changes, "channels": 8, "steps": 6_000}
    return {**which, "seed": seed, "test": {"5": shown}}


def test_the_family_is_drawn_from_the_units_there_are():
    runs = [family_record("pudnet", seed, 0.53 + seed / 100) for seed in range(3)]
    apart = enumerate((0.50, 0.52, 0.51))
    runs += [family_record("one_network", seed, own) for seed, own in apart]
    runs += [family_record("one_network", 0, 0.61, "none")]
    cells = {
        line.split("|")[1].strip(): line for line in family_table(runs).data.split("\n")
    }
    assert "54.0 (51.5 to 56.5), n = 3" in cells["PudNet"] and "–" in cells["PudNet"]
    assert "61.0 (n = 1: no interval)" in cells["one network"]
    assert "50.0 (47.5 to 52.5)" in cells["PudNet shown another data set"]
    assert "PudNet, sketch with labels" not in cells
    leads = family_leads_table(runs).data
    assert "3.0 (0.5 to 5.5): higher" in leads and "4.0 (4.0 to 4.0): higher" in leads
    both = ({"arm": arm, "changes": "colours"} for arm in ("pudnet", "one_network"))
    assert verdict(lead(runs, *both, "test.5.own")) == "higher"


def test_units_are_one_a_seed():
    runs = [family_record("pudnet", 0, 0.5), family_record("pudnet", 0, 0.5, "all")]
    assert units(runs, "test.5.own", changes="all") == {0: 0.5}
    with pytest.raises(ResultError, match="several units of one seed have arm pudnet"):
        units(runs, "test.5.own", arm="pudnet")
    with pytest.raises(ResultError, match="no recorded unit has arm aligned"):
        units(runs, "test.5.own", arm="aligned")
    with pytest.raises(ResultError, match="the arm 'pudnet' has no test.1.own"):
        units(runs, "test.1.own", changes="all")


def test_growth_is_judged_beside_what_it_cost():
    runs = [
        {
            "phase": "wider",
            "arm": arm,
            "seed": seed,
            "steps": 3_000,
            "operations": operations,
            "train_loss": 0.5,
            "test": test + seed / 1000,
        }
        for arm, operations, test in (
            ("copies", 2e13, 0.80),
            ("scratch_operations", 2e13, 0.79),
            ("scratch_thrice", 6e13, 0.83),
        )
        for seed in range(3)
    ]
    lines = growth_table(runs, "wider").data.split("\n")
    assert len(lines) == 5 and "| 3.00 |" in lines[4] and "lower" in lines[4]
    assert "| 1.00 |" in lines[3] and "1.0 (1.0 to 1.0): higher" in lines[3]
    drawn = growth_figure(runs, "wider").axes[0]
    assert [line.get_label() for line in drawn.lines] == [
        GROWTH_NAMES[arm] for arm in ("copies", "scratch_operations", "scratch_thrice")
    ]
    assert set(GROWTH_NAMES) == {*net2net_long.ARMS["wider"]}


def test_text_is_compared_at_equally_many_characters():
    runs = [
        {
            "arm": arm,
            "characters": characters,
            "seed": seed,
            "parameters": 500_000,
            "train_bits": 1.5,
            "train_seconds": 600.0,
            "test": bits + seed / 100,
        }
        for arm, characters, bits in (
            ("layer_norm_lstm", 7_000_000, 1.5),
            ("hyperlstm", 7_000_000, 1.45),
            ("layer_norm_lstm", 8_000_000, 1.48),
        )
        for seed in range(3)
    ]
    lines = text_table(runs).data.split("\n")[2:]
    assert [line.split("|")[1].strip() for line in lines] == [
        TEXT_NAMES[arm] for arm in ("hyperlstm", "layer_norm_lstm", "layer_norm_lstm")
    ]
    assert "-0.050 (-0.050 to -0.050): lower" in lines[0] and "1.460" in lines[0]
    assert set(TEXT_NAMES) == {*hyperlstm_long.ARMS}
    assert set(FAMILY_NAMES) == {*pudnet_family.ARMS}
