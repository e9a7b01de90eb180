"""The recorded studies of chapters 2, 3, 4 and 8: on real images, and still saying what
the chapters say of them.
"""

import json
import re
from statistics import fmean

import pytest
from support import ROOT

from minisupernet.course.records import load_runs, results_file
from minisupernet.course.report.long_studies import lead, units
from minisupernet.course.report.net2net import choose
from minisupernet.course.report.pudnet import against, headline, on_episodes
from minisupernet.course.statistics import Interval, interval, paired, verdict
from minisupernet.course.studies import SOURCE, STUDIES
from minisupernet.course.studies.hyperlstm import MODELS, Settings

SEEDS = {"net2net": 3, "static_hypernet": 3, "hyperlstm": 3, "pudnet": 3}
CHECKSUMS = {
    "cifar10": "e0ed969218b5",
    "cifar100": "7c4367d59714",
}  # how those of the real images begin


RECORDED = [
    name for name, study in STUDIES.items() if results_file(study.result).exists()
]  # a study that is new has no record before its first unit has ended


def full(study: str) -> list[dict]:
    return [
        run
        for run in load_runs(results_file(STUDIES[study].result))
        if run["profile"] == "full"
    ]


@pytest.mark.parametrize("study", RECORDED)
def test_runs_are_whole_and_say_where_they_come_from(study):
    runs, keys = full(study), ("seed", *STUDIES[study].unit)
    told_apart = {tuple(run[key] for key in keys) for run in runs}
    assert len(told_apart) == len(runs) >= SEEDS.get(study, 1)
    for run in runs:
        data = run["data"]
        assert data["name"] == STUDIES[study].data and len(data["sha256"]) == 64
        if data["name"] != SOURCE:  # which differs between versions of Python
            assert data["sha256"].startswith(CHECKSUMS[data["name"]])
        assert (
            len(run["commit"]) == 40
            and run["versions"]["torch"]
            and run["device"]
            and run["seconds"] > 0
        )


def test_no_recorded_path_or_user_name():
    for name in RECORDED:
        text = results_file(STUDIES[name].result).read_text(encoding="utf-8")
        assert not any(word in text for word in ("/home/", "/tmp/", "/root", "\\\\"))


# Chapter 3


def static(part: str, measure: str = "test", **which: str | int) -> list:
    """One value a seed: a measure of the row of `part` that has these values."""
    rows = [row for run in full("static_hypernet") for row in run[part]]
    return [
        row[measure]
        for row in rows
        if all(row[key] == value for key, value in which.items())
    ]


def static_difference(part: str, first: dict, second: dict) -> Interval:
    return paired(static(part, **first), static(part, **second))


@pytest.mark.parametrize(
    ("part", "first", "second", "stated"),
    [
        ("networks", {"arm": "direct"}, {"arm": "generated"}, "higher"),
        ("networks", {"arm": "smaller"}, {"arm": "generated"}, "higher"),
        (
            "starts",
            {"network": "plain", "start": "hyperfan"},
            {"network": "plain", "start": "naive"},
            "higher",
        ),
        (
            "starts",
            {"network": "plain", "start": "hyperfan"},
            {"network": "plain", "start": "bias"},
            "higher",
        ),
        (
            "starts",
            {"network": "plain", "start": "direct"},
            {"network": "plain", "start": "hyperfan"},
            "higher",
        ),
        (
            "starts",
            {"network": "WRN-10-1", "start": "naive"},
            {"network": "WRN-10-1", "start": "hyperfan"},
            "not told apart",
        ),
        (
            "starts",
            {"network": "WRN-10-1", "start": "hyperfan"},
            {"network": "WRN-10-1", "start": "bias"},
            "not told apart",
        ),
        (
            "starts",
            {"network": "WRN-10-1", "start": "naive"},
            {"network": "WRN-10-1", "start": "bias"},
            "not told apart",
        ),
        *(
            (
                "starts",
                {"network": "WRN-10-1", "start": "direct"},
                {"network": "WRN-10-1", "start": start},
                "higher",
            )
            for start in ("hyperfan", "naive", "bias")
        ),
        (
            "sweep",
            {"family": "chunk", "size": 7},
            {"family": "rank", "size": 2},
            "no verdict",  # two seeds ran the sweep
        ),
    ],
)
def test_chapter_3_says_what_its_numbers_say(part, first, second, stated):
    assert verdict(static_difference(part, first, second)) == stated


def test_the_sizes_and_costs_that_chapter_3_speaks_of():
    cost = {
        arm: static("networks", "multiply_adds", arm=arm)[0]
        for arm in ("generated", "smaller")
    }
    assert 0.4 < cost["smaller"] / cost["generated"] < 0.55
    size = {
        arm: static("networks", "parameters", arm=arm)[0]
        for arm in ("generated", "direct", "smaller")
    }
    assert size["smaller"] < size["generated"] < 0.55 * size["direct"]
    seconds = (
        static("networks", "seconds", arm=arm) for arm in ("generated", "direct")
    )
    assert all(generated >= direct for generated, direct in zip(*seconds, strict=True))
    for found in static("networks", "embeddings", arm="generated"):
        assert (
            found["own"] > 0.6
            and max(found["inside"], found["mean"]) < 0.3
            and found["anywhere"] < 0.15
        )
    for start in ("naive", "bias"):
        assert max(static("starts", network="plain", start=start)) < 0.15
    for family, small, large in (("tile", 8, 96), ("chunk", 7, 256), ("rank", 2, 80)):
        direct = static("sweep", family="direct")  # a value a seed, of two: no verdict
        few, many = (static("sweep", family=family, size=n) for n in (small, large))
        assert all(a < b for a, b in zip(few, direct, strict=True))
        assert fmean(many) - fmean(direct) < 0.005


# Chapter 2


def net2net(run: dict, phase: str, arm: str) -> dict:
    """An arm under the schedule that validation images chose for it."""
    found = run["phases"][phase][arm]
    return found[choose(found)]


@pytest.mark.parametrize(
    ("phase", "first", "second", "stated"),
    [
        ("deeper_8", "net2net", "random", "higher"),
        ("deeper_20", "net2net", "random", "higher"),
        ("deeper_8", "net2net", "teacher", "higher"),
        ("deeper_8", "scratch", "net2net", "not told apart"),
        ("deeper_20", "net2net", "scratch", "higher"),
        ("deeper_20", "teacher", "net2net", "higher"),
        ("wider", "random", "net2net", "higher"),
        ("wider", "zero", "net2net", "higher"),
        ("wider", "noisy", "net2net", "higher"),
        ("wider", "scratch", "random", "not told apart"),
        ("wider", "scratch", "zero", "higher"),
    ],
)
def test_chapter_2_says_what_its_numbers_say(phase, first, second, stated):
    runs = full("net2net")
    found = paired(
        *([net2net(run, phase, arm)["test"] for run in runs] for arm in (first, second))
    )
    assert verdict(found) == stated, found


def test_the_sizes_and_costs_that_chapter_2_speaks_of():
    for run in full("net2net"):
        for arms in run["phases"].values():
            assert arms["net2net"]["early"]["test"] < arms["net2net"]["late"]["test"]
        cost = {
            phase: arms["scratch"]["late"]["flops"] / arms["net2net"]["late"]["flops"]
            for phase, arms in run["phases"].items()
        }
        assert (
            cost["wider"] < 2
            and cost["deeper_8"] > 1.5
            and 1 / 0.6 < cost["deeper_20"] < 1 / 0.4
        )
        assert (
            abs(
                net2net(run, "wider", "net2net")["test"]
                - net2net(run, "wider", "teacher")["test"]
            )
            < 0.02
        )
        growth = run["settings"]["first"]
        fallen = [
            r["test"]
            for r in run["phases"]["deeper_20"]["random"]["late"]["curve"]
            if r["step"] == growth
        ]
        assert fallen[-1] < 0.15  # a random insertion throws the network back to chance


# Chapter 4, whose verdicts a cell puts into words; here is that every model had the
# same chance


def test_the_models_of_chapter_4_were_compared_fairly():
    for run in full("hyperlstm"):
        for task, sign in (("text", -1), ("images", 1)):
            arms = {
                name: run[task][name]
                for name in ("lstm", "layer_norm_lstm", "hyperlstm")
            }
            sizes = [arm["parameters"] for arm in arms.values()]
            assert max(sizes) < 1.01 * min(sizes) and 90_000 < min(sizes) < 130_000
            assert (
                len(
                    {
                        tuple(tried["rate"] for tried in arm["tried"])
                        for arm in arms.values()
                    }
                )
                == 1
            )
            for arm in arms.values():
                assert (
                    arm["rate"]
                    == max(arm["tried"], key=lambda each: sign * each["validation"])[
                        "rate"
                    ]
                )


@pytest.mark.parametrize(
    ("task", "first", "second", "stated"),
    [
        ("text", "lstm", "hyperlstm", "higher"),  # bits: more is worse
        ("text", "lstm", "layer_norm_lstm", "higher"),
        ("text", "layer_norm_lstm", "hyperlstm", "not told apart"),
        ("images", "layer_norm_lstm", "hyperlstm", "higher"),
        ("images", "hyperlstm", "lstm", "higher"),
    ],
)
def test_what_chapter_9_says_of_the_hyperlstm(task, first, second, stated):
    runs = full("hyperlstm")
    assert (
        verdict(
            paired(
                *([run[task][arm]["test"] for run in runs] for arm in (first, second))
            )
        )
        == stated
    )


def test_the_budget_that_chapter_4_speaks_of():
    """ "A minute and a half at most"; on the text every model chose the highest rate;
    800 steps of text and 600 of images, which the full profile trains too."""
    for run in full("hyperlstm"):
        arms = [run[task][arm] for task in ("text", "images") for arm in run[task]]
        assert max(arm["train_seconds"] for arm in arms) < 90
        for model in MODELS:
            arm = run["text"][model]
            assert arm["rate"] == max(tried["rate"] for tried in arm["tried"])
        steps = run["settings"]["text_steps"], run["settings"]["image_steps"]
        assert steps == (800, 600)
    assert (Settings().text_steps, Settings().image_steps) == (800, 600)


def test_the_speed_that_chapter_4_speaks_of():
    speed = json.loads(results_file("04_speed.json").read_text(encoding="utf-8"))
    for size in speed["sizes"]:
        times = {
            name: each["forward_backward"]["cpu"]
            for name, each in size["microseconds"].items()
        }
        assert min(times, key=times.get) == "nn.LSTM"
        assert times["minisupernet HyperLSTM"] < times["labml-nn HyperLSTM"]


# Chapter 8

UNSEEN = "unseen, 5-way, 5 a class"


def test_chapter_8_says_what_its_numbers_say():
    runs = full("pudnet")
    for place in (place for place in runs[0]["episodes"] if place.startswith("unseen")):
        assert verdict(against(runs, place, "pudnet", "untrained")) == "higher"
    mean = {
        place: interval(on_episodes(runs, place, "pudnet")).mean
        for place in runs[0]["episodes"]
    }
    assert mean[UNSEEN] > 0.30
    assert (
        max(abs(against(runs, place, "pudnet", "wrong_sketch").mean) for place in mean)
        < 0.02
    )
    without = against(runs, UNSEEN, "no_auxiliary", "pudnet")
    assert verdict(without) == "higher" and 0.01 < without.mean < 0.06
    assert abs(against(runs, UNSEEN, "pudnet", "one_network").mean) < 0.05
    assert (
        mean["cifar10, 5-way, 5 a class"] < mean[UNSEEN]
        and mean["shapes100, 5-way, 5 a class"] < 0.35
    )
    for run in runs:
        assert 9 < run["parameters"]["pudnet"] / run["parameters"]["one_network"] < 12
        assert (
            min(run["sketches"]["nearest"][arm] for arm in ("pudnet", "untrained"))
            > 0.2
        )


def test_chapter_8_says_that_one_network_is_told_apart_nowhere():
    runs = full("pudnet")
    for place in runs[0]["episodes"]:
        found = against(runs, place, "pudnet", "one_network")
        assert verdict(found) == "not told apart" and found.n == 3


PUDNET, ONE, BY_HAND = ({"arm": a} for a in ("pudnet", "one_network", "aligned"))


@pytest.mark.parametrize(
    ("first", "second", "theirs", "said"),
    [
        (PUDNET, PUDNET, "other_change", "worse by 4.0 points (2.7 to 5.3)"),
        (PUDNET, PUDNET, "other_change", "colours loses 4.0 points (2.7 to 5.3)"),
        (BY_HAND, ONE, "own", "by 3.0 points (0.8 to 5.1)"),
        (BY_HAND, ONE, "own", "ahead of one network by 3.0 (0.8 to 5.1)"),
        (PUDNET, ONE, "own", "is 1.0 points (-3.2 to 5.2) from the one network"),
        (PUDNET, ONE, "own", "one network: 1.0 points (-3.2 to 5.2) after 6,000"),
        (BY_HAND, PUDNET, "own", "2.0 (-1.9 to 5.8) behind the look by hand"),
    ],
)
def test_what_chapter_8_says_of_data_sets_with_colours_of_their_own(
    first, second, theirs, said
):
    runs = load_runs(results_file("08_pudnet_family.json"))
    which = {"changes": "colours", "channels": 8, "steps": 6_000}
    measures = "test.5.own", f"test.5.{theirs}"
    found = lead(runs, which | first, which | second, *measures)
    assert found.n == 3
    numbers = [100 * each for each in (found.mean, found.low, found.high)]
    assert [f"{each:z.1f}" for each in numbers] == re.findall(r"-?\d+\.\d", said)[:3]
    place = "README.md" if "loses" in said else "notebooks/08_pudnet.ipynb"
    assert said in (ROOT / place).read_text(encoding="utf-8")


def test_other_classes_in_the_right_colours_cost_pudnet_nothing():
    runs = load_runs(results_file("08_pudnet_family.json"))
    which = {"changes": "colours", "channels": 8, "steps": 6_000, "arm": "pudnet"}
    own, other = (units(runs, f"test.5.{n}", **which) for n in ("own", "other_classes"))
    assert max(abs(own[seed] - other[seed]) for seed in own) < 0.001
    one = units(runs, "test.5.own", **which | {"arm": "one_network"})
    assert [own[seed] > one[seed] for seed in sorted(own)].count(True) == 2
    (run,) = [r for r in runs if r["arm"] == "pudnet" and r["seed"] == 0]
    assert (run["parameters"], run["weights"]) == (340_336, 15_280)


def test_the_headline_of_chapter_8():
    chapter = (ROOT / "notebooks/08_pudnet.ipynb").read_text(encoding="utf-8")
    few, whole = (
        headline(full("pudnet"), "pudnet", shown).times_faster
        for shown in ("few", "predicted")
    )
    said = f"is {few:.0f} times faster than training a network as good; one that reads"
    assert f"{said} all images, {whole:.0f} times; and" in chapter
    assert "30000 train" in full("pudnet")[0]["notes"][0]
    pudnet, one = (
        headline(full("pudnet"), arm, "few") for arm in ("pudnet", "one_network")
    )
    assert pudnet.times_faster > 5 and one.times_faster > pudnet.times_faster / 2
    assert pudnet.proper > pudnet.accuracy + 0.03
