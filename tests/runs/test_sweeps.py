"""Sweeps: checked before they start, and nothing lost, doubled or half written,
whatever dies, fills up or hangs.
"""

import dataclasses
import functools
import getpass
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tiny_jobs
from safetensors import safe_open
from support import LONG, ROOT, coloured_squares
from tiny_jobs import COMMAND, STEPS, alive, counting, run_tiny, tiny_task

from minisupernet.course.commands import main
from minisupernet.course.records import load_runs, record_run
from minisupernet.course.runs.inputs import code_used, package_fingerprint
from minisupernet.course.runs.jobs import make_job
from minisupernet.course.runs.parameters import override, read_word
from minisupernet.course.runs.summaries import lacking, record, summarise
from minisupernet.course.runs.sweeps import (
    Run,
    Sweep,
    do_runs,
    open_executor,
    read_sweep,
    runs_of,
)
from minisupernet.course.runs.workers import (
    Claimed,
    attempt,
    carry_out,
    finished,
    limits,
)
from minisupernet.course.statistics import interval
from minisupernet.course.studies.setups import SETUPS, better, make_setup
from minisupernet.data import ImageSet
from minisupernet.errors import DataError, FileError, ResultError, RunError

pytestmark = pytest.mark.skipif(
    os.name == "nt", reason="processes are killed by the signals of POSIX"
)
SHORT = {
    "experiment": 1,
    "setup": "better",
    "profile": "quick",
    "training.steps": 8,
    "training.tasks": 3,
    "training.images": 4,
    "training.every": 2,
    "adaptation.steps": 3,
    "adaptation.images": 4,
    "z_dim": 4,
}

KILLS = 1_000 if LONG else 10


def write_sweep(folder: Path, **entries) -> Path:
    """A sweep file; JSON is YAML."""
    path = folder / "mine.yaml"
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture(scope="module")
def squares_file(tmp_path_factory) -> Path:
    squares = coloured_squares(classes=20, train=54, test=10)
    return save(squares, tmp_path_factory.mktemp("images") / "squares.npz")


def save(images: ImageSet, path: Path) -> Path:
    arrays = {}
    for part in ("train", "test"):
        pixels = getattr(images, f"{part}_images").permute(0, 2, 3, 1)
        arrays[f"{part}_images"] = pixels.numpy()
        arrays[f"{part}_labels"] = getattr(images, f"{part}_labels").numpy()
    np.savez(path, **arrays)
    return path


def lasting(result: object) -> object:
    """What must be the same in every run of one job: all but times."""
    if isinstance(result, list):
        return [lasting(each) for each in result]
    if isinstance(result, dict):
        return {
            name: lasting(value) for name, value in result.items() if name != "seconds"
        }
    return result


def values(folder: Path) -> dict[str, int]:
    return {
        path.stem: json.loads(path.read_text())["result"]["value"]
        for path in folder.glob("*.json")
    }


def expected(count: int) -> dict[str, int]:
    return {
        f"count-number={n}": sum((n + step) ** 2 for step in range(STEPS))
        for n in range(count)
    }


def starts(folder: Path) -> list[str]:
    return (folder / "starts.txt").read_text().split()


# What a file describes


def test_a_grid_and_a_list_are_expanded_and_doubles_count_once(tmp_path):
    path = write_sweep(
        tmp_path,
        fixed={"study": "pudnet", "seed": 9},
        list=[{"data": "auto"}, {"data": "cifar100"}, {"data": "auto"}],
        grid={"seed": [0, 1], "profile": "quick"},
    )
    sweep = read_sweep(path)
    assert [
        (run["data"], run["seed"], run["profile"], run["study"]) for run in sweep.runs
    ] == [
        (data, seed, "quick", "pudnet")
        for data in ("auto", "cifar100")
        for seed in (0, 1)
    ]
    assert (sweep.values, sweep.by) == (("seconds",), "seed")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is no YAML"),
        ("- 1", "must have entries such as 'fixed' and 'grid'"),
        ("grids: {}", "unknown entry 'grids'; did you mean 'grid'?"),
        ("grid: [1]", "'grid' must be a dict, not list"),
        ("list: [1]", "each entry of 'list' must be a set of parameters"),
        ("grid: {seed: []}", "describes 0 runs"),
        (
            (
                "grid: {a: [1,2,3,4,5,6,7,8,9,10], b: [1,2,3,4,5,6,7,8,9,10], c:"
                " [1,2,3,4,5,6,7,8,9,10], d: [1,2,3,4,5,6,7,8,9,10], e: [1, 2]}"
            ),
            "describes 20000 runs",
        ),
        ("fixed: {seed: .nan}", "parameter seed must be text, a finite number"),
        ("fixed: {seed: {a: 1}}", "parameter seed must be text, a finite number"),
        ("fixed: {seed: 2024-01-01}", "parameter seed must be text, a finite number"),
        ("fixed: {seed: null}", "parameter seed must be text, a finite number"),
        ("fixed: {1: 1}", "parameter name 1 is no text"),
        ("fixed: {seed: !!python/name:os.system }", "is no YAML"),
        ("summary: {values: 3}", "'summary' must be like"),
        ("summary: {value: [seconds]}", "'value'; did you mean 'values'?"),
        (
            "{grid: {z_dim: [1, 2]}, summary: {by: zdim}}",
            "no run has the parameter 'zdim' to sum up by; did you mean 'z_dim'?",
        ),
        (
            "grid: {seed: [0], z_dim: [4], seed: [2]}",
            "'seed' stands twice in the set at line 1",
        ),
        ("fixed: {seed: 0}\nfixed: {seed: 1}", "'fixed' stands twice in the set"),
        (
            "{list: [{seed: 0}], grid: {seed: [1, 2]}}",
            "seed is in 'list' and in 'grid'",
        ),
        ("fixed: {seed: -1}", "parameter seed must be a whole number from 0 to"),
        (f"fixed: {{seed: {2**70}}}", "parameter seed must be a whole number from 0"),
        ("fixed: {seed: 99999999999}", "parameter seed must be a whole number"),
    ],
)
def test_a_file_that_describes_no_sweep_is_one_sentence(tmp_path, text, said):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RunError, match=re.escape(said)) as refusal:
        read_sweep(path)
    assert "\n" not in str(refusal.value)
    with pytest.raises(RunError, match="cannot be read .*; check the path"):
        read_sweep(tmp_path / "missing.yaml")


@pytest.mark.parametrize(
    ("value", "near"),
    [
        ("arms.z_onli.test", "arms.z_only.test"),
        ("arm.z_only.test", "arms.z_only.test"),
        ("few.20.z_only.test", "arms.z_only.test"),
        ("arms.unfrozen.test", "arms.z_only.test"),
        ("trained.right", "trained.right_z"),
        ("second", "seconds"),
        ("geometri.share", "geometry"),
    ],
)
def test_a_value_that_no_run_will_have_is_told_before_any_runs(value, near):
    sweep = Sweep((SHORT,), ("seconds", "geometry.share", value), "setup")
    with pytest.raises(RunError, match=f"no value '{value}'; did you mean '{near}'?"):
        runs_of(sweep, ROOT)


def test_a_notebook_has_only_seconds_to_sum_up():
    assert runs_of(Sweep(({"notebook": 5},), ("seconds", "cell_seconds"), ""), ROOT)
    with pytest.raises(RunError, match="no value 'arms.z_only.test'; did you mean"):
        runs_of(Sweep(({"notebook": 5},), ("arms.z_only.test",), ""), ROOT)


def test_what_a_study_lacks_is_told_as_its_first_run_ends(tmp_path):
    task = tiny_task("count", number=0)
    assert run_tiny([task], tmp_path) == {}
    assert lacking(Sweep((), ("value", "seconds"), ""), task, tmp_path) == ""
    said = lacking(Sweep((), ("seconds", "valeu"), ""), task, tmp_path)
    assert "no value 'valeu'; where 'valeu' should be there is" in said


def test_images_too_few_for_the_chapter_are_told_before_any_runs(tmp_path):
    few = coloured_squares(classes=4, train=54, test=10)
    runs = Sweep(
        ({"experiment": 1, "data": str(save(few, tmp_path / "few.npz"))},), (), ""
    )
    with pytest.raises(DataError, match="few.npz has 4 classes, fewer than the 8"):
        runs_of(runs, ROOT)


def test_every_number_of_every_set_up_has_a_range_and_lies_in_it():
    for name, experiment in itertools.product(SETUPS, (1, 2)):
        for profile in ("quick", "full"):
            if (name, experiment) != ("unseen_pairs", 1):
                make_setup(name, experiment, profile).check()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"seed": 0}, "exactly one of notebook, experiment, study, not none"),
        ({"experiment": 1, "study": "pudnet"}, "not experiment and study"),
        ({"experiment": 3}, "there is no experiment '3'; use 1 or 2"),
        (
            {"experiment": 1, "setup": "run_experiment"},
            "no set-up 'run_experiment'; use one of original, better",
        ),
        ({"experiment": 1, "sed": 1}, "there is no setting 'sed'"),
        ({"experiment": 1, "z_dim": 0}, "z_dim must be from 1 to 10,000, not 0"),
        ({"experiment": 1, "folds": 1}, "folds must be from 2 to 10,000, not 1"),
        (
            {"experiment": 1, "channels": -3},
            "channels must be from 1 to 10,000, not -3",
        ),
        (
            {"experiment": 1, "hidden": [4, 0]},
            "hidden must be from 1 to 100,000, not 0",
        ),
        ({"experiment": 1, "training.steps": 0}, "training.steps must be from 1"),
        ({"experiment": 1, "adaptation.images": 0}, "adaptation.images must be from"),
        ({"experiment": 1, "training.rate": -1.0}, "training.rate must be above 0"),
        ({"experiment": 1, "rates.z_only": [0.0]}, "rates.z_only must be above 0"),
        ({"experiment": 1, "rates.z_only": []}, "rates.z_only needs at least one"),
        ({"experiment": 1, "z_share": 1.5}, "z_share must be from 0 to 1, not 1.5"),
        ({"experiment": 1, "own_share": 1.0}, "own_share must be from 0 to 0.99, not"),
        ({"experiment": 1, "bound": 0.0}, "bound must be above 0, not 0.0"),
        ({"experiment": 1, "unfrozen": -1}, "unfrozen must be from 0"),
        ({"experiment": 1, "augmentation.crop": 99}, "augmentation.crop must be from"),
        ({"experiment": 1, "sizes": [5, 0]}, "sizes must be from 1"),
        ({"experiment": 1, "training.decay": -1}, "training.decay must be from 0"),
        ({"experiment": 1, "training.z_rate": 0}, "training.z_rate must be above 0"),
        ({"experiment": 1, "training.optimizer": "adma"}, "no optimiser 'adma'; use"),
        ({"experiment": 1, "device": "gpu"}, "no device 'gpu'; use auto, cuda, mps"),
        ({"experiment": 1, "fold": -1}, "experiment 1 has no fold -1"),
        ({"study": "opponents", "group": "head"}, "no group 'head'; choose of heads"),
        ({"study": "opponents", "fold": 5}, "there is no fold 5; choose 0 to 4"),
        ({"study": "opponents", "of_experiment": 3}, "no experiment 3; choose 1 or 2"),
        ({"study": "static_long", "epochs": 0.0}, "rate and epochs must be above 0"),
        ({"study": "static_long", "arm": "none"}, "there is no arm 'none'; choose one"),
        ({"study": "static_long", "device": "cuda:x"}, "there is no device 'cuda:x'"),
        (
            {"experiment": 1, "z_dims": 1},
            "there is no setting 'z_dims'; did you mean 'z_dim'?",
        ),
        (
            {"experiment": 1, "training.step": 1},
            "no setting 'training.step'; did you mean 'training.steps'?",
        ),
        (
            {"experiment": 1, "training.steps": "9"},
            "setting training.steps must be like 700, not '9'",
        ),
        (
            {"experiment": 1, "training.steps": True},
            "setting training.steps must be like 700, not True",
        ),
        (
            {"experiment": 1, "training.rate": "1e-3"},
            "not '1e-3'; in YAML write 0.001.",
        ),
        (
            {"experiment": 1, "training.rate": "1e30"},
            "not '1e30'; in YAML write 1.0e+30.",
        ),
        ({"experiment": 1, "training": 3}, "setting training must be like Fit("),
        ({"experiment": 1, "training.seed": 3}, "there is no setting 'training.seed'"),
        (
            {"experiment": 1, "rates.z_only": ["a"]},
            "setting rates.z_only must be like (0.03, 0.1, 0.3), not 'a'.",
        ),
        ({"experiment": 1, "rates.z_onl": [0.1]}, "did you mean 'rates.z_only'?"),
        ({"experiment": 1, "seed": "0"}, "parameter seed must be like 0, not '0'"),
        ({"experiment": 1, "fold": 9}, "experiment 1 has no fold 9; use 0 to 8"),
        ({"experiment": 1, "profile": "fast"}, "there is no profile 'fast'"),
        (
            {"experiment": 1, "data": "cifar1000"},
            "there are no images 'cifar1000'; use auto, cifar100",
        ),
        ({"experiment": 1, "data": "missing.npz"}, "there are no images 'missing.npz'"),
        ({"study": "net3net"}, "there is no study 'net3net'; did you mean 'net2net'?"),
        ({"study": "pudnet", "z_dim": 3}, "there is no parameter 'z_dim'"),
        (
            {"study": "pudnet", "profile": "fast"},
            "there is no profile 'fast'; use quick or full",
        ),
        (
            {"notebook": "55"},
            "there is no notebook '55'; give a path or one of 01_cifar_data",
        ),
        (
            {"notebook": 5, "sed": 3},
            "05_supernet has no parameter 'sed'; did you mean 'seed'?",
        ),
        (
            {"notebook": 5, "seed": "3"},
            "parameter seed of 05_supernet must be of type int",
        ),
    ],
)
def test_a_run_that_cannot_be_right_is_refused_before_it_starts(settings, said):
    better_setup = {"setup": "better"} if "experiment" in settings else {}
    with pytest.raises(ValueError, match=re.escape(said)) as refusal:
        make_job(better_setup | settings, ROOT)
    assert type(refusal.value).__module__.startswith(
        "minisupernet."
    ) and "\n" not in str(refusal.value)


def test_any_setting_can_be_overridden():
    setup = better(1)
    for name, value in {
        "training.steps": 5,
        "training.rate": 1,
        "hidden": [8, 8],
        "rates.z_only": [0.5, 1],
    }.items():
        setup = override(setup, name, value)
    plain = better(1)
    assert setup == dataclasses.replace(
        plain,
        training=dataclasses.replace(plain.training, steps=5, rate=1.0),
        hidden=(8, 8),
        rates=plain.rates | {"z_only": (0.5, 1.0)},
    )
    assert type(setup.training.rate) is float
    assert override(setup, "training.tasks", 3).training.tasks == 3


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("3", 3),
        ("1e-3", 1e-3),
        ("True", True),
        ("false", "false"),
        ("full", "full"),
        ("", ""),
    ],
)
def test_words_are_read_as_papermill_reads_them(word, value):
    assert read_word(word) == value and type(read_word(word)) is type(value)


def test_the_code_that_matters_is_what_is_imported():
    package = ROOT / "minisupernet"
    used = {
        path.relative_to(package).as_posix()
        for path in code_used(["course.studies.arms"], package)
    }
    assert {
        "course/studies/arms.py",
        "supernet.py",
        "target.py",
        "data/shapes.py",
        "data/__init__.py",
        "training.py",
    } <= used
    assert not used & {
        "course/runs/sweeps.py",
        "course/runs/workers.py",
        "__main__.py",
        "course/plots.py",
        "hyperlstm.py",
    }
    study = {
        path.relative_to(package).as_posix()
        for path in code_used(["course.studies", "course.studies.hyperlstm"], package)
    }
    assert {f"course/studies/{name}.py" for name in ("__init__", "hyperlstm")} | {
        "hyperlstm.py"
    } <= study


def test_inputs_follow_parameters_and_the_content_of_images_but_not_their_place(
    tmp_path,
):
    paths = [tmp_path / "one" / "mine.npz", tmp_path / "two" / "mine.npz"]
    for path in paths:
        path.parent.mkdir()
        path.write_text("images")
    first, second = (package_fingerprint([], {"data": str(path)}) for path in paths)
    assert (
        first == second != package_fingerprint([], {"data": str(paths[0]), "seed": 1})
    )
    paths[0].write_text("other images")
    assert package_fingerprint([], {"data": str(paths[0])}) != first


@pytest.mark.parametrize(
    "path", sorted((ROOT / "sweeps").glob("*.yaml")), ids=lambda path: path.stem
)
def test_the_sweeps_of_the_course_can_start(path):
    tasks = runs_of(read_sweep(path), ROOT)
    assert len({task.name for task in tasks}) == len(tasks) > 1
    assert re.match(r"# .*(minutes|hours?)", path.read_text()), (
        "its first line says how long it takes"
    )


# What happens when all is well


def test_what_is_finished_is_not_run_again_and_what_changed_is(tmp_path):
    assert run_tiny(counting(4), tmp_path) == {}
    assert values(tmp_path) == expected(4) and sorted(starts(tmp_path)) == sorted(
        expected(4)
    )
    assert run_tiny(counting(4), tmp_path) == {} and len(starts(tmp_path)) == 4
    (tmp_path / "count-number=1.json").write_text('{"status": "done"')  # damaged
    for leftover in tmp_path.glob("*number=1.[cr]*"):
        leftover.unlink()
    changed = tiny_task("count", number=2, code="other")
    assert run_tiny([*counting(2), changed], tmp_path) == {}
    assert sorted(starts(tmp_path)[4:]) == [
        "count-number=1",
        "count-number=2-code=other",
    ]


def test_a_table_and_a_figure_over_runs(tmp_path):
    tasks = [
        tiny_task("count", number=number, z_dim=number // 3) for number in range(4)
    ]
    for task, shift in zip(tasks, (0.0, 0.1, 0.3, 0.7), strict=True):
        arms = {"z_only": {"test": [shift, shift + 0.2]}}
        document = {"status": "done", "inputs": task.inputs, "seconds": 2}
        document["result"] = {"loss": 0.5, "arms": arms}
        (tmp_path / f"{task.name}.json").write_text(json.dumps(document))
    text = summarise(Sweep((), ("arms.z_only.test", "loss"), "z_dim"), tasks, tmp_path)
    found = interval([0.1, 0.2, 0.4])
    arm = f"{found.mean:.4g} ({found.low:.4g} to {found.high:.4g}, n=3)"
    assert f"| 0 | 3 | {arm} | 0.5 (0.5 to 0.5, n=3) |" in text
    assert "| 1 | 1 | 0.8 (n=1) | 0.5 (n=1) |" in text
    assert (tmp_path / "summary.md").read_text() == text and (
        tmp_path / "summary.png"
    ).stat().st_size > 5_000
    with pytest.raises(
        ResultError, match="no value 'arms.z.test'; where 'z' should be there is z_only"
    ):
        summarise(Sweep((), ("arms.z.test",), "z_dim"), tasks, tmp_path)
    with pytest.raises(
        ResultError, match="'arms' is neither a finite number nor a list"
    ):
        summarise(Sweep((), ("arms",), "z_dim"), tasks, tmp_path)


def test_from_a_file_to_a_table_and_a_record_and_one_failure_stops_nothing(
    tmp_path, squares_file, capsys
):
    """One run of two has a learning rate that makes the loss NaN."""
    path = write_sweep(
        tmp_path,
        fixed={**SHORT, "data": str(squares_file)},
        grid={"training.rate": [1e-3, 1.5e30]},
        summary={"values": ["arms.z_only.test"], "by": "training.rate"},
    )
    record, folder = tmp_path / "record.json", tmp_path / "out"
    command = [
        "sweep",
        str(path),
        "--workers",
        "1",
        "--out",
        str(folder),
        "--record",
        str(record),
    ]
    assert main(command) == 1
    said = capsys.readouterr()
    assert (
        said.err
        == "1 of 2 runs failed, as said above; the same command repeats them.\n"
    )
    assert said.out.startswith(f"2 runs, 0 done before, results in {folder}\n1 at once")
    (line,) = [line for line in said.out.splitlines() if "] failed: " in line]
    assert "the loss became nan" in line and "(1.5e+30)" in line
    assert "| 0.001 | 1 |" in said.out and "1.5e+30 |" not in said.out
    (run,) = load_runs(record)
    assert (
        run["settings"]["training"]["rate"] == 1e-3
        and run["overrides"]["training.steps"] == 8
        and run["profile"] == "quick"
    )
    documents = [json.loads(each.read_text()) for each in folder.glob("*.json")]
    assert sorted(each["status"] for each in documents) == ["done", "failed"]
    for name in (
        str(Path.home()),
        os.getcwd(),
        str(tmp_path),
        socket.gethostname(),
        getpass.getuser(),
    ):
        assert not any(
            re.search(rf"(?<!\w){re.escape(name)}(?!\w)", json.dumps(each))
            for each in documents
        ), name
    assert not list(folder.glob("*.safetensors")) or "failed" in [
        each["status"] for each in documents
    ]


def test_a_record_goes_into_the_files_of_the_book_and_replaces_its_older_self(tmp_path):
    tasks = [tiny_task("count", number=number) for number in range(2)]
    kept = []
    for number, (task, what) in enumerate(
        zip(tasks, [{"experiment": 2}, {"study": "pudnet"}], strict=True)
    ):
        job = make_job({**what, "data": "shapes100"}, ROOT)
        kept.append(dataclasses.replace(task, job=job))
        run = {
            "experiment": 2,
            "setup": "better",
            "profile": "full",
            "seed": 0,
            "fold": 0,
            "overrides": None,
            "data": {"name": "shapes100", "sha256": "0"},
        }
        document = {
            "status": "done",
            "inputs": task.inputs,
            "result": {**run, "value": number},
        }
        (tmp_path / f"{task.name}.json").write_text(json.dumps(document))
    (tmp_path / "results").mkdir()
    for _ in range(2):
        for run in kept:
            record(run, tmp_path, tmp_path / "results")
    names = {
        path.name: [run["value"] for run in load_runs(path)]
        for path in (tmp_path / "results").glob("*.json")
    }
    assert names == {"07_experiment_2.json": [0], "08_pudnet.json": [1]}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"notebook": 5}, "measures nothing that can be recorded; leave out --record"),
        ({"experiment": 1, "profile": "quick"}, "a quick run is not recorded in the"),
        ({"study": "pudnet", "profile": "quick"}, "a quick run is not recorded in the"),
        ({"experiment": 1, "z_dim": 4}, "a run with its own z_dim is not recorded"),
        ({"experiment": 1, "data": "auto"}, "a run on auto, not cifar100, is not"),
        ({"study": "net2net", "data": "shapes100"}, "a run on shapes100, not cifar10,"),
    ],
)
def test_no_file_of_the_book_mixes_other_runs_with_its_own(tmp_path, settings, said):
    sweep = Sweep((settings,), (), "")
    with pytest.raises(RunError, match=said):
        runs_of(sweep, ROOT, ROOT / "results")
    if "notebook" not in settings:
        assert len(runs_of(sweep, ROOT, tmp_path / "mine.json")) == 1


def test_quick_and_full_runs_on_two_image_sets_stand_side_by_side(tmp_path):
    _, keys = make_job({"experiment": 1}, ROOT).recorded()
    run = {"experiment": 1, "setup": "better", "seed": 0, "fold": 0, "overrides": None}
    before = {**run, "data": {"name": "mine"}}  # of when no profile was recorded: full
    (tmp_path / "mine.json").write_text(json.dumps({"runs": [before]}))
    for number, profile in enumerate(("quick", "full", "full")):
        for name in ("cifar100", "mine"):
            about = {"profile": profile, "data": {"name": name}, "number": number}
            record_run(tmp_path / "mine.json", run | about, keys)
    found = [
        (each["profile"], each["data"]["name"], each["number"])
        for each in load_runs(tmp_path / "mine.json")
    ]
    assert found == [
        ("full", "cifar100", 2),
        ("full", "mine", 2),
        ("quick", "cifar100", 0),
        ("quick", "mine", 0),
    ]


def test_each_run_is_kept_as_it_ends_and_one_that_cannot_be_kept_has_failed(tmp_path):
    """The second run ends when the first was kept: at the end would be too late."""

    def keep(run: Run) -> None:
        (tmp_path / "kept").write_text(run.name)
        if run.name == "wait":
            raise ResultError("the result file is damaged.")

    runs = [tiny_task("count", number=0), tiny_task("wait")]
    said = {"wait": "wait: the result file is damaged."}
    assert run_tiny(runs, tmp_path, workers=1, keep=keep, timeout=100) == said
    (tmp_path / "kept").unlink()
    assert run_tiny(runs, tmp_path, workers=1, keep=keep) == said
    assert (tmp_path / "kept").exists() and len(starts(tmp_path)) == 2


# What happens when something dies


def test_many_kills_in_a_row_lose_and_double_nothing(tmp_path):
    """SIGKILL, at random moments, of the sweep or of the process of one run; a new
    folder when all is done.
    """
    chance, kills, folders, whole = random.Random(0), 0, [], True
    while kills < KILLS or not whole:
        folders += [tmp_path / f"folder{len(folders)}"] if whole else []
        command = [sys.executable, tiny_jobs.__file__, "sweep", str(folders[-1]), "40"]
        sweep = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while sweep.poll() is None and kills < KILLS:
            early = chance.random() < 0.2  # also while nothing runs yet
            wait_for(
                lambda early=early, sweep=sweep, folder=folders[-1]: (
                    early or sweep.poll() is not None or busy(folder)
                )
            )
            time.sleep(chance.uniform(0, 0.2))
            running = busy(folders[-1])
            victim = (
                chance.choice(running)
                if running and chance.random() < 0.5
                else sweep.pid
            )
            with suppress(ProcessLookupError):  # it has just ended by itself
                os.kill(victim, signal.SIGKILL)
                kills += 1
        whole = sweep.wait() == 0
    for folder in folders:
        assert values(folder) == expected(40)
        assert not list(folder.glob("*.complaint")) and not list(folder.glob(".*.part"))


def busy(folder: Path) -> list[int]:
    """The processes that do a counting job."""
    return [int(path.read_text()) for path in folder.glob("*.running") if alive(path)]


def test_the_processes_of_a_killed_sweep_end_with_it(tmp_path):
    script = "import sys, tiny_jobs; from pathlib import Path\n"
    script += "tiny_jobs.run_tiny([tiny_jobs.tiny_task('hang')], Path(sys.argv[1]))"
    sweep = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], cwd=Path(__file__).parent
    )
    wait_for(lambda: alive(tmp_path / "hang.running"))
    sweep.kill()
    sweep.wait()
    wait_for(lambda: not alive(tmp_path / "hang.running"))


def test_an_interrupted_sweep_starts_no_more_runs(tmp_path):
    """As by Ctrl-C, which goes to the sweep and to its processes."""
    command = [sys.executable, tiny_jobs.__file__, "sweep", str(tmp_path), "200"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}

    def heed() -> (
        None
    ):  # a process started in the background may have been told to ignore Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    sweep = subprocess.Popen(command, start_new_session=True, preexec_fn=heed, **quiet)
    wait_for(lambda: busy(tmp_path))
    os.killpg(sweep.pid, signal.SIGINT)
    assert sweep.wait(60) != 0 and not busy(tmp_path) and len(starts(tmp_path)) < 100


def wait_for(condition, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_two_sweeps_on_one_folder_share_the_work(tmp_path):
    command = [sys.executable, tiny_jobs.__file__, "sweep", str(tmp_path), "30"]
    sweeps = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [sweep.wait() for sweep in sweeps] == [0, 0]
    assert values(tmp_path) == expected(30) and sorted(starts(tmp_path)) == sorted(
        expected(30)
    )


def test_a_claim_holds_while_its_process_lives_and_no_longer(tmp_path):
    order = {
        "settings": {"what": "hang"},
        "root": "",
        "folder": str(tmp_path),
        "name": "hang",
        "inputs": "first hang",
    }
    holder = subprocess.Popen(COMMAND, stdin=subprocess.PIPE, text=True)
    holder.stdin.write(json.dumps(order) + "\n")
    holder.stdin.flush()
    wait_for(lambda: alive(tmp_path / "hang.running"))
    job = tiny_task("nan").job
    with pytest.raises(
        Claimed, match="hang is being run by another process; wait for it"
    ):
        carry_out(job, tmp_path, "hang", "first nan")
    assert attempt(order, COMMAND, None, 1).status == "claimed"
    holder.kill()
    holder.wait()
    task = tiny_task("count", number=0)
    assert carry_out(task.job, tmp_path, "hang", task.inputs) is True


@pytest.mark.parametrize(("deaths", "tries", "failed"), [(2, 3, False), (9, 3, True)])
def test_a_run_whose_process_dies_is_repeated_twice_and_then_given_up(
    tmp_path, deaths, tries, failed
):
    tasks = [tiny_task("die", deaths=deaths), *counting(2)]
    failures = run_tiny(tasks, tmp_path, retries=2)
    reason = (
        f"die-deaths={deaths}: its process died with exit status -9, often for want of"
        " memory."
    )
    assert failures == ({tasks[0].name: reason} if failed else {})
    assert starts(tmp_path).count(tasks[0].name) == tries
    assert set(expected(2)) <= set(values(tmp_path))


def test_a_run_that_hangs_is_stopped_and_the_others_go_on(tmp_path):
    failures = run_tiny(
        [tiny_task("hang"), *counting(3)], tmp_path, workers=1, timeout=4
    )
    assert failures == {"hang": "hang: stopped, as it took more than 4 s."}
    assert values(tmp_path) == expected(3) and not alive(tmp_path / "hang.running")


def test_a_killed_training_goes_on_to_the_result_of_an_unbroken_one(
    tmp_path, squares_file
):
    settings = {
        **SHORT,
        "data": str(squares_file),
        "device": "cpu",
        "training.steps": 12,
        "training.every": 4,
    }
    (task,) = runs_of(Sweep((settings,), (), ""), ROOT)
    with open_executor(1) as (executor, _):
        assert do_runs([task], tmp_path / "whole", ROOT, executor) == {}
    folder = tmp_path / "broken"
    order = {"settings": settings, "root": str(ROOT), "folder": str(folder)}
    order |= {"name": task.name, "inputs": task.inputs}
    process = subprocess.Popen(
        [sys.executable, "-m", "minisupernet.course.runs.workers"],
        stdin=subprocess.PIPE,
        env=os.environ | limits(1),
        text=True,
    )
    process.stdin.write(json.dumps(order) + "\n")
    process.stdin.flush()
    wait_for((folder / f"{task.name}.safetensors").exists)
    process.kill()
    process.wait()
    assert not finished(folder, task.name, task.inputs)
    with safe_open(folder / f"{task.name}.safetensors", "pt") as file:
        before = json.loads(file.metadata()["history"])
    with open_executor(1) as (executor, _):
        assert do_runs([task], folder, ROOT, executor) == {}
    whole, broken = (
        finished(each, task.name, task.inputs)["result"]
        for each in (tmp_path / "whole", folder)
    )
    assert lasting(whole) == lasting(broken)
    assert (
        broken["history"][: len(before)] == before
    )  # seconds and all: it went on, and did not start anew
    assert not list(folder.glob("*.safetensors"))


# What happens when something else goes wrong


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("nan", "holds a value that is not a finite number; lower the rate"),
        ("stray", "OSError: no such file: "),
    ],
)
def test_a_run_that_fails_is_one_line_and_the_others_go_on(tmp_path, what, said):
    failures = run_tiny([tiny_task(what), *counting(2)], tmp_path)
    assert (
        list(failures) == [what]
        and said in failures[what]
        and "\n" not in failures[what]
    )
    kept = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert [
        name for name, each in kept.items() if each["status"] == "done"
    ].sort() == list(expected(2)).sort()
    if what == "stray":
        assert kept["stray"]["error"] == "OSError: no such file: lost.txt in place.txt"
    assert list(run_tiny([tiny_task(what)], tmp_path)) == [
        what
    ]  # a failure is tried again


def test_a_full_disk_is_one_line_and_the_others_go_on(tmp_path):
    """No file may grow beyond 20,000 bytes, as on a disk with no more space."""
    import resource

    script = "import sys, tiny_jobs; from pathlib import Path\n"
    script += "tasks = [tiny_jobs.tiny_task('large'), *tiny_jobs.counting(2)]\n"
    script += "print(tiny_jobs.run_tiny(tasks, Path(sys.argv[1])))"
    limit = functools.partial(
        resource.setrlimit, resource.RLIMIT_FSIZE, (20_000, 20_000)
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        preexec_fn=limit,
    )
    assert (
        f"{{'large': 'large: cannot write {tmp_path}/large.json: File too large; free"
        " space" in done.stdout
    )
    assert done.stdout.count("failed: large: cannot write") == 1
    assert values(tmp_path) == expected(2) and not list(tmp_path.glob(".*.part"))


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, squares_file, capsys):
    (tmp_path / "file").write_text("")
    task = tiny_task("count", number=0)
    with pytest.raises(
        FileError, match="cannot write .*file/out: Not a directory; free space or make"
    ):
        carry_out(task.job, tmp_path / "file" / "out", "one", task.inputs)
    path = write_sweep(tmp_path, fixed={**SHORT, "data": str(squares_file)})
    assert (
        main(
            [
                "sweep",
                str(path),
                "--workers",
                "1",
                "--out",
                str(tmp_path / "file" / "out"),
            ]
        )
        == 1
    )
    said = capsys.readouterr()
    assert "cannot write" in said.out and "Traceback" not in said.err


def test_a_run_whose_inputs_changed_meanwhile_is_refused(tmp_path):
    task = tiny_task("count", number=0)
    with pytest.raises(
        RunError, match="its code or images changed, or are others on this machine"
    ):
        carry_out(task.job, tmp_path, "one", "other inputs")
    assert not list(tmp_path.glob("*.json"))


def test_what_is_missing_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(RunError, match="at least one worker, not 0"), open_executor(0):
        pass
    for package in ("distributed", "yaml"):
        monkeypatch.setitem(sys.modules, package, None)  # as where it is not installed
    refusal = pytest.raises(
        RunError,
        match=r'a cluster needs Dask; run `python -m pip install -e ".\[cluster\]"`',
    )
    with refusal, open_executor(0, "tcp://127.0.0.1:1"):
        pass
    with pytest.raises(
        RunError, match="a sweep needs PyYAML; run `python -m pip install pyyaml`"
    ):
        read_sweep(write_sweep(tmp_path))


# The same on a Dask cluster


def test_a_cluster_that_is_not_there_is_one_sentence(monkeypatch):
    distributed = cluster_tools()
    monkeypatch.setattr(distributed, "Client", impatient(distributed))
    refusal = pytest.raises(
        RunError, match="no Dask scheduler answers at tcp://127.0.0.1:1; start one with"
    )
    with refusal, open_executor(0, "tcp://127.0.0.1:1"):
        pass


def test_one_cluster_from_its_first_worker_to_its_end(tmp_path, monkeypatch):
    """It starts slowly, so that all that is claimed of clusters is tried on one."""
    distributed = cluster_tools()
    options = {"n_workers": 0, "threads_per_worker": 1, "processes": True}
    options |= {"dashboard_address": ":0", "silence_logs": 50}
    with distributed.LocalCluster(**options) as cluster:
        without_workers(cluster)
        cluster.scale(2)
        cluster.wait_for_workers(2)
        same_results(cluster, tmp_path / "same")
        a_process_dies(cluster, tmp_path / "dies")
        a_worker_is_killed(cluster, tmp_path / "killed")
        monkeypatch.setattr(distributed, "Client", impatient(distributed))
        it_goes_away(cluster, tmp_path / "gone")


def cluster_tools() -> ModuleType:
    return pytest.importorskip(
        "distributed", reason="distributed is not installed: the extra `cluster`"
    )


def impatient(distributed: ModuleType) -> Callable:
    """A client that waits one second for a scheduler that does not answer."""
    client = distributed.Client
    return lambda at, timeout: client(at, timeout=1)


def without_workers(cluster) -> None:
    refusal = pytest.raises(
        RunError, match="has no workers; start one with `dask worker tcp"
    )
    with refusal, open_executor(0, cluster.scheduler_address):
        pass


def same_results(cluster, folder: Path) -> None:
    with open_executor(0, cluster.scheduler_address) as (executor, slots):
        assert slots == 2
        failed = run_tiny([*counting(6), tiny_task("nan")], folder, executor)
        assert failed.keys() == {"nan"}
    found = values(folder)
    assert {name: found[name] for name in found if name != "nan"} == expected(6)
    kept = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    assert len({each["result"]["pid"] for each in kept}) == 6


def a_process_dies(cluster, folder: Path) -> None:
    """That of a run: it is repeated."""
    with open_executor(0, cluster.scheduler_address) as (executor, _):
        task = tiny_task("die", deaths=2)
        assert run_tiny([task], folder, executor, retries=2) == {}
    assert len(starts(folder)) == 3


def a_worker_is_killed(cluster, folder: Path) -> None:
    """While a run hangs on it; Dask gives the run to another, where it is claimed
    anew.
    """
    from distributed import Client

    tasks = counting(12)
    with (
        Client(cluster.scheduler_address) as client,
        open_executor(0, cluster.scheduler_address) as (executor, _),
    ):
        (pid, *_) = client.run(os.getpid).values()
        script = f"import os, time; time.sleep(1); os.kill({pid}, 9)"
        killer = subprocess.Popen([sys.executable, "-c", script])
        assert run_tiny(tasks, folder, executor) == {}
        assert killer.wait() == 0
    assert values(folder) == expected(12) and not list(folder.glob("*.complaint"))


def it_goes_away(cluster, folder: Path) -> None:
    """In the middle of a sweep."""
    refusal = pytest.raises(
        RunError, match="the cluster at tcp.* went away; start it and this sweep again"
    )
    with refusal, open_executor(0, cluster.scheduler_address) as (executor, _):
        threading.Timer(1, cluster.close).start()
        run_tiny(counting(200), folder, executor)
    # what it has left does not stand in the way
    assert run_tiny(counting(3), folder) == {}
