"""The speed records: complete, honest, shown as they are; and the benchmark refuses
wrong and dead contestants.
"""

import importlib
import json
import multiprocessing
import os
import statistics
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from support import ROOT, coloured_squares

from minisupernet.static_hypernet import WideResNet
from minisupernet.target import TaskClassifier


@pytest.fixture(scope="module")
def bench():
    """The benchmark's scripts, as modules."""
    names = ("budget", "contestants", "growth", "layers", "speed_report", "training")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        modules: dict[str, ModuleType] = {
            name: importlib.import_module(name) for name in names
        }
        yield SimpleNamespace(**modules)


@pytest.mark.parametrize("page", ["README.md", "book/speed.md"])
def test_pages_say_what_the_records_say(bench, page):
    text, report = (ROOT / page).read_text(encoding="utf-8"), bench.speed_report
    for mark, (record, write) in report.BLOCKS[page].items():
        assert report.filled(text, mark, write(report.read(record))) == text, mark


def test_a_block_is_filled_and_nothing_else(bench):
    page = (
        "a\n<!-- speed: x -->\nold\n<!-- /speed: x -->\nb\n<!-- speed: y -->\n<!--"
        " /speed: y -->\n"
    )
    assert bench.speed_report.filled(page, "x", "new") == page.replace("old", "new")


def test_every_contestant_was_checked_and_timed(bench):
    record = bench.speed_report.read("05_speed.json")
    assert record["largest_difference_in_float64"] <= 1e-10
    assert {row["threads"] for row in record["rows"]} == {1, 2}
    assert len(bench.speed_report.HEADS) == len(bench.contestants.NAMES)
    for row in record["rows"]:
        assert row["largest_relative_difference"] <= 1e-5
        missing = {*bench.contestants.NAMES, bench.contestants.KEPT} - set(
            row["milliseconds"]["wall"]
        )
        assert not missing or (
            missing == {"plain loop"} and row["tasks"] > bench.training.MANY
        )


def test_ratios_follow_from_the_times(bench):
    for row in bench.speed_report.read("05_speed.json")["rows"]:
        steps = {
            name: parts["step"] for name, parts in row["milliseconds"]["wall"].items()
        }
        mine = steps.pop("minisupernet")
        steps.pop(bench.contestants.KEPT)
        assert row["times_faster_than_best_peer"] == pytest.approx(
            min(steps.values()) / mine, abs=0.006
        )
        if "plain loop" in steps:
            assert row["times_faster_than_loop"] == pytest.approx(
                steps["plain loop"] / mine, abs=0.006
            )


def test_the_layers_that_are_timed_are_the_targets(bench):
    layers, height = bench.layers, 32
    for layer, (channels, its_height) in zip(
        TaskClassifier().convolutions, layers.LAYERS.values(), strict=True
    ):
        assert (layer.in_channels, height) == (channels, its_height)
        assert (layer.out_channels, *layer.kernel_size) == (
            layers.FILTERS,
            layers.SIDE,
            layers.SIDE,
        )
        assert (
            layer.stride + layer.padding == (layers.STRIDE,) * 2 + (layers.PADDING,) * 2
        )
        height //= layers.STRIDE


def test_no_choice_among_kernels_would_change_much(bench):
    """What the page says bounds a step: timed each way, the quickest for every product
    gains little.
    """
    layers, record = bench.layers, bench.speed_report.read("05_layers.json")
    assert len(record["rows"]) == 2 * (len(layers.LAYERS) * len(layers.PRODUCTS) - 1)
    rows = bench.speed_report.most_threads(record)
    mine = sum(row["milliseconds"]["minisupernet"] for row in rows)
    best = sum(min(row["milliseconds"].values()) for row in rows)
    assert set(rows[0]["milliseconds"]) == set(layers.WAYS) and best > 0.8 * mine
    best_rates = {
        (row["layer"], row["product"]): max(row["gigaflops"].values()) for row in rows
    }
    matrix_rate = statistics.median(row["matrix_rate_gflops"] for row in rows)
    assert max(best_rates, key=best_rates.get)[0] == "second"
    low = [
        ("first", "forward"),
        ("second", "gradient of images"),
        ("fourth", "gradient of kernels"),
    ]
    assert all(best_rates[pair] < 0.5 * matrix_rate for pair in low)


@pytest.mark.parametrize(
    "name", ["forward", "gradient of kernels", "gradient of images"]
)
def test_all_ways_of_a_product_agree_and_a_wrong_one_is_caught(
    bench, name, monkeypatch
):
    monkeypatch.setattr(bench.layers, "TASKS", 3)
    found = bench.layers.row("third", name, 1, repeats=1)
    assert all(rate > 0 for rate in found["gigaflops"].values())
    right = bench.layers.grouped
    monkeypatch.setitem(
        bench.layers.WAYS,
        "one grouped convolution",
        lambda *given: 1.001 * right(*given),
    )
    with pytest.raises(
        SystemExit,
        match=f"one grouped convolution gives a wrong {name} of the third layer",
    ):
        bench.layers.row("third", name, 1, repeats=1)


def test_a_hundred_large_networks_fit_in_4_gib(bench):
    large = bench.speed_report.read("05_growth.json")["large"]
    assert (
        large["tasks"] == 100 and large["weights"] > 2.2e6 and large["megabytes"] < 4096
    )


def test_a_large_step_at_small_scale(bench):
    small = bench.growth.Large(tasks=3, images=1, group=2, z_dim=2, depth=10, width=1)
    found = bench.growth.large_step(small)
    network = WideResNet(10)
    kernels = [
        p.numel()
        for p in network.parameters()
        if p.shape[2:] == (3, 3) and p.shape[1] > 3
    ]
    assert found["weights"] == sum(p.numel() for p in network.parameters())
    chunks = sum(-(-kernel // 256) for kernel in kernels)
    assert (
        found["learned"]
        == found["weights"] - sum(kernels) + 3 * chunks * 2 + 2 * 256 + 256
    )


def test_contestants_agree_and_a_wrong_one_is_caught(bench):
    contests = {
        name: bench.contestants.Contest(name, 2) for name in bench.contestants.NAMES[:4]
    }
    assert (
        bench.training.difference(
            {name: each.answer() for name, each in contests.items()}, 1e-5
        )
        < 1e-5
    )
    right = contests["tuned loop"].contestant.run
    contests["tuned loop"].contestant.run = lambda weights, images: (
        1.001 * right(weights, images)
    )
    with pytest.raises(SystemExit, match="tuned loop differs"):
        bench.training.difference(
            {name: each.answer() for name, each in contests.items()}, 1e-5
        )


def test_a_contestant_that_did_more_steps_still_agrees(bench):
    """The plain loop is left out where it is slow, and is then the one that the others
    are compared with again.
    """
    contests = {
        name: bench.contestants.Contest(name, 2)
        for name in ("plain loop", "minisupernet")
    }
    for _ in range(3):
        contests["minisupernet"].step()
    assert (
        bench.training.difference(
            {name: each.answer() for name, each in contests.items()}, 1e-5
        )
        < 1e-5
    )


def test_a_contestant_that_gives_nan_is_caught(bench):
    answers = {"plain loop": [np.ones(2)], "hyperlight": [np.array([1.0, np.nan])]}
    with pytest.raises(SystemExit, match="hyperlight differs"):
        bench.training.difference(answers, 1e-5)


def test_a_budget_at_small_scale(bench, tmp_path):
    """Recorded once a device; the columns that are reckoned follow from the single
    steps.
    """
    budget, path = bench.budget, tmp_path / "budget.json"
    cpu = torch.device("cpu")
    images = coloured_squares(train=60)
    steps, whole = (
        budget.single_steps(cpu, (8, 1), repeats=1),
        budget.train_whole(images, task_steps=20),
    )
    assert [row["tasks"] for row in steps] == [1, 8] and (
        whole["tasks"],
        whole["steps"],
    ) == (8, 2)
    assert 0 < whole["seconds"] < 60 and 0 <= whole["test_accuracy"] <= 1
    run = {
        "device": "cpu: a CPU",
        "images": 20,
        "task_steps": 20,
        "steps": steps,
        "whole": whole | {"seconds": 12.0},
    }
    for found in (run | {"task_steps": 7}, run | {"device": "cuda: a GPU"}, run):
        budget.record(found, path)
    document = json.loads(path.read_text(encoding="utf-8"))
    assert [found["device"] for found in document["devices"]] == [
        "cuda: a GPU",
        "cpu: a CPU",
    ]
    gpu, cpu = bench.speed_report.budget_table(document).splitlines()[2:]
    by_loop = 2e-3 * steps[1]["plain_loop_milliseconds"]
    assert gpu.startswith("| a GPU | 12 |") and cpu.split(" | ")[2] == f"{by_loop:.0f}"


def test_the_recorded_budget_is_the_originals(bench):
    runs = bench.speed_report.read("05_budget.json")["devices"]
    on_gpu = any(run["device"].startswith("cuda") for run in runs)
    page = (ROOT / "book" / "speed.md").read_text(encoding="utf-8")
    assert on_gpu != ("**On a GPU nothing here has been timed yet.**" in page), (
        "the page says otherwise"
    )
    for run in runs:
        assert (
            run["data"]["name"] == "cifar100"
            and run["task_steps"] == bench.budget.TASK_STEPS
        )
        assert run["whole"]["tasks"] * run["whole"]["steps"] == pytest.approx(
            run["task_steps"], rel=1e-3
        )
        assert [row["tasks"] for row in run["steps"]] == [*bench.budget.SIZES]


def test_a_process_that_dies_gives_one_line(bench):
    worker = bench.training.Worker("minisupernet", "nowhere")
    worker.process.kill()
    with pytest.raises(
        SystemExit, match="the process of minisupernet died, exit status -9"
    ):
        worker.ask("prepare", 2)
    with pytest.raises(SystemExit, match="the process of 3 died"):
        bench.growth.in_new_process(os._exit, 3)


def test_a_contestant_that_fails_says_why(bench):
    ours, theirs = multiprocessing.Pipe()
    ours.send(("prepare", 2, "no dtype"))
    ours.send(None)
    bench.contestants.serve(theirs, "plain loop", "nowhere")
    worker = bench.training.Worker.__new__(bench.training.Worker)
    worker.name, worker.pipe = (
        "plain loop",
        SimpleNamespace(send=lambda order: None, recv=ours.recv),
    )
    with pytest.raises(SystemExit, match="plain loop could not do its step"):
        worker.ask("prepare", 2)
