"""The training loop: History, resuming, a bad loss; and TensorFlow's RMSProp."""

import io
import platform
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from minisupernet import training
from minisupernet.errors import TrainingError
from minisupernet.optimizers import TensorFlowRMSprop
from minisupernet.seeds import step_generator
from minisupernet.training import constant, frozen, one_cycle, pick_device, train

X = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
Y = X @ torch.tensor([[1.0], [-2.0], [0.5]])


class Killed(BaseException):
    """Stands in for a kill: nothing catches it."""


def regression(seed=0, optimizer=torch.optim.AdamW, rate=1e-2):
    torch.manual_seed(seed)
    model = nn.Linear(3, 1)

    def loss_at(step):
        rows = torch.randint(64, (16,), generator=step_generator(seed, step))
        return F.mse_loss(model(X[rows]), Y[rows])

    return model, optimizer(model.parameters(), lr=rate), loss_at


def test_it_trains_and_keeps_a_history():
    model, optimizer, loss_at = regression(rate=0.1)

    def evaluate():
        return {"error": F.mse_loss(model(X), Y).item()}

    history = train(model, optimizer, loss_at, 105, evaluate=evaluate, every=50)
    assert history.series("step")[1] == [50, 100, 105]
    assert history.last("error") < 0.01 < history.rows[0]["loss"]
    assert history.series("error")[0] == [50, 100, 105]


def test_the_row_loss_is_the_mean_since_the_last_row():
    model, optimizer, loss_at = regression()
    seen = []

    def recording(step):
        loss = loss_at(step)
        seen.append(loss.item())
        return loss

    history = train(model, optimizer, recording, 130, every=65)
    assert history.rows[1]["loss"] == pytest.approx(sum(seen[65:]) / 65, rel=1e-5)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, TensorFlowRMSprop])
@pytest.mark.parametrize("killed_at", [3, 20, 39])
def test_a_killed_run_goes_on_as_if_unbroken(tmp_path, optimizer, killed_at):
    def run(path, stop=None):
        model, opt, loss_at = regression(optimizer=optimizer)

        def until(step):
            if step == stop:
                raise Killed
            return loss_at(step)

        try:
            history = train(
                model, opt, until, 40, schedule=one_cycle, every=10, checkpoint=path
            )
        except Killed:
            return None
        return model.weight.detach().clone(), [
            {k: v for k, v in row.items() if k != "seconds"} for row in history.rows
        ]

    whole = run(tmp_path / "whole.safetensors")
    assert run(tmp_path / "broken.safetensors", stop=killed_at) is None
    resumed = run(tmp_path / "broken.safetensors")
    assert torch.equal(resumed[0], whole[0]) and resumed[1] == whole[1]


def test_random_numbers_of_the_default_stream_also_resume(tmp_path):
    def run(path, stop=None):
        model, optimizer, _ = regression()

        def loss_at(step):
            if step == stop:
                raise Killed
            return F.mse_loss(F.dropout(model(X), 0.5), Y)

        try:
            train(model, optimizer, loss_at, 20, every=5, checkpoint=path)
        except Killed:
            return None
        return model.weight.detach().clone()

    whole = run(tmp_path / "a.safetensors")
    run(tmp_path / "b.safetensors", stop=12)
    assert torch.equal(run(tmp_path / "b.safetensors"), whole)


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


OTHER_RUNS = {  # what is different in the run that finds the file, and what is said
    "steps": ({"steps": 20}, "steps: 10 there, 20 here"),
    "every": ({"every": 5}, "every: 100 there, 5 here"),
    "schedule": ({"schedule": one_cycle}, "schedule: constant there, one_cycle here"),
    "precision": ({"mixed": True}, "mixed: False there, True here"),
    "seed": ({"run": {"seed": "1"}}, "seed: 0 there, 1 here"),
    "not said": ({"run": {}}, "seed: 0 there, not given here"),
    "more said": (
        {"run": {"seed": "0", "fold": "2"}},
        "fold: not given there, 2 here",
    ),
}


@pytest.mark.parametrize("name", OTHER_RUNS)
def test_a_checkpoint_of_another_run_is_refused_and_nothing_changes(name, tmp_path):
    path, (changed, said) = tmp_path / "run.safetensors", OTHER_RUNS[name]
    settings = {"steps": 10, "run": {"seed": "0"}, "checkpoint": path}
    train(*regression(), **settings)
    model, optimizer, loss_at = regression(seed=3)
    before, whole = weights_of(model), path.read_bytes()
    with pytest.raises(
        TrainingError, match=rf"of another run \({said}\); delete it to start anew"
    ):
        train(model, optimizer, loss_at, **settings | changed)
    assert all(torch.equal(before[n], own) for n, own in model.state_dict().items())
    assert path.read_bytes() == whole
    assert train(*regression(), **settings).last("step") == 10


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (regression(rate=0.3), r"lr of group 0: 0.01 there, 0.3 here"),
        (regression(optimizer=TensorFlowRMSprop), "optimizer: AdamW there, Tensor"),
        (regression(optimizer=torch.optim.Adam), "weight_decay of group 0: 0.01 there"),
    ],
)
def test_a_checkpoint_of_another_optimizer_is_refused(other, said, tmp_path):
    train(*regression(), 10, checkpoint=tmp_path / "run.safetensors")
    with pytest.raises(TrainingError, match=said):
        train(*other, 10, checkpoint=tmp_path / "run.safetensors")


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    train(*regression(), 10, checkpoint=path)
    wide = nn.Linear(5, 1)
    with pytest.raises(
        TrainingError, match="its weights have other names, shapes or types"
    ):
        train(
            wide,
            torch.optim.AdamW(wide.parameters(), lr=1e-2),
            sum,
            10,
            checkpoint=path,
        )


@pytest.mark.parametrize("package", ["minisupernet", "torch"])
def test_a_checkpoint_of_another_version_is_refused(package, tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    with monkeypatch.context() as before:
        where = training if package == "minisupernet" else torch
        before.setattr(where, "__version__", "0.0.9")
        train(*regression(), 10, checkpoint=path)
    with pytest.raises(TrainingError, match=f"{package}: 0.0.9 there, .* here"):
        train(*regression(), 10, checkpoint=path)


def test_a_checkpoint_that_does_not_say_of_which_run_it_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    train(*regression(), 10, checkpoint=path)
    with safe_open(path, "pt") as file:
        notes = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    save_file(tensors, path, {"steps": "10", "history": notes["history"]})
    with pytest.raises(TrainingError, match="it does not say which run it is of"):
        train(*regression(), 10, checkpoint=path)


def test_long_facts_about_a_run_are_compared_and_not_printed(tmp_path):
    path = tmp_path / "run.safetensors"
    tasks = str(list(range(50)))
    train(*regression(), 10, checkpoint=path, run={"tasks": tasks})
    with pytest.raises(TrainingError, match=r"another run \(other tasks\)"):
        train(*regression(), 10, checkpoint=path, run={"tasks": tasks + " "})


def test_the_optimizer_gets_its_rates_back():
    model, optimizer, loss_at = regression(rate=0.1)
    train(model, optimizer, loss_at, 10, schedule=one_cycle)
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"steps": 2.5}, {"every": 0}])
def test_steps_are_whole_numbers_from_one(wrong):
    with pytest.raises(TrainingError, match="must be a whole number from 1, not"):
        train(*regression(), **{"steps": 10} | wrong)


class Terminal(io.StringIO):
    """What a terminal would show."""

    def isatty(self):
        return True


def test_a_bar_moves_at_a_terminal_and_nowhere_else(monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    shown = {}
    for name, stream in (("terminal", Terminal()), ("log", io.StringIO())):
        monkeypatch.setattr(sys, "stderr", stream)
        train(*regression(), 3, label="watched")
        shown[name] = stream.getvalue()
    assert "watched: " in shown["terminal"] and "0%" in shown["terminal"]
    assert not shown["terminal"].rpartition("\r")[2].strip()  # gone at the end
    assert shown["log"] == ""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setattr(sys, "stderr", Terminal())
    train(*regression(), 3)
    assert sys.stderr.getvalue() == ""


IN_A_NOTEBOOK = """
import torch
from minisupernet.training import train
layer = torch.nn.Linear(1, 1)
optimizer = torch.optim.SGD(layer.parameters())
history = train(layer, optimizer, lambda step: layer(torch.ones(1, 1)).sum(), 3)
"""


@pytest.fixture
def kernel(monkeypatch):
    """A client of a running notebook kernel."""
    manager = pytest.importorskip("jupyter_client.manager")
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    running, client = manager.start_new_kernel(kernel_name="python3")
    yield client
    client.stop_channels()
    running.shutdown_kernel(now=True)


def test_a_notebook_shows_a_bar_to_a_person_and_leaves_none_in_a_run(kernel):
    """A front end with a person in it takes answers; papermill and nbconvert do not."""
    found = {}
    for person in (False, True):
        outputs = found[person] = []

        def keep(message, outputs=outputs):
            if message["msg_type"] not in ("status", "execute_input"):
                outputs.append(message)

        reply = kernel.execute_interactive(
            IN_A_NOTEBOOK, allow_stdin=person, output_hook=keep, timeout=120
        )
        assert reply["content"]["status"] == "ok", reply
    assert found[False] == []
    assert {message["msg_type"] for message in found[True]} == {"stream"}
    text = "".join(message["content"]["text"] for message in found[True])
    assert "training: " in text and not text.rpartition("\r")[2].strip()


def test_a_truncated_checkpoint_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    model, optimizer, loss_at = regression()
    train(model, optimizer, loss_at, 10, checkpoint=path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(TrainingError, match="delete it to start anew"):
        train(model, optimizer, loss_at, 10, checkpoint=path)


def test_a_checkpoint_leaves_nothing_but_itself(tmp_path):
    model, optimizer, loss_at = regression()
    train(
        model, optimizer, loss_at, 10, every=2, checkpoint=tmp_path / "run.safetensors"
    )
    assert [file.name for file in tmp_path.iterdir()] == ["run.safetensors"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("step", [0, 17, 60])
def test_a_bad_loss_stops_with_its_step_and_the_likely_cause(bad, step, tmp_path):
    model, optimizer, loss_at = regression(rate=0.5)

    def spoiled(at):
        return loss_at(at) * (bad if at == step else 1)

    with pytest.raises(
        TrainingError,
        match=(
            rf"became {bad} at step {step}: most likely a learning rate too high"
            r" \(0.5\)"
        ),
    ):
        train(
            model,
            optimizer,
            spoiled,
            100,
            every=10,
            checkpoint=tmp_path / "run.safetensors",
        )
    if (
        tmp_path / "run.safetensors"
    ).exists():  # what was saved is from before the bad step
        torch.manual_seed(0)
        assert (
            train(
                *regression(rate=0.5),
                100,
                every=10,
                checkpoint=tmp_path / "run.safetensors",
            ).last("loss")
            < 1
        )


def test_mixed_precision_runs_the_forward_pass_in_bfloat16():
    model, optimizer, _ = regression()
    kinds = []

    def loss_at(step):
        outputs = model(X)
        kinds.append(outputs.dtype)
        return F.mse_loss(outputs.float(), Y)

    train(model, optimizer, loss_at, 1, mixed=True)
    train(model, optimizer, loss_at, 1)
    assert (
        kinds == [torch.bfloat16, torch.float32] and model.weight.dtype == torch.float32
    )


def test_schedules():
    assert constant(0.7) == 1.0
    values = [one_cycle(done / 100) for done in range(101)]
    assert (
        max(values) == 1.0
        and values[0] > 0
        and values[-1] == pytest.approx(0, abs=1e-9)
    )
    assert values[5] < values[20] and values[30] > values[80]


def test_frozen_gives_back_what_it_took():
    model = nn.Linear(3, 1)
    model.bias.requires_grad_(False)
    with frozen(model):
        assert not model.weight.requires_grad
    assert model.weight.requires_grad and not model.bias.requires_grad


def test_devices():
    assert pick_device("cpu").type == "cpu" and pick_device().type in (
        "cpu",
        "cuda",
        "mps",
    )
    with pytest.raises(
        TrainingError, match="device 'gpu' is not available here; use 'auto' or 'cpu'"
    ):
        pick_device("gpu")


def test_step_generators_differ_by_step_and_seed():
    draws = {
        (s, n): torch.rand(2, generator=step_generator(s, n)).tolist()
        for s in range(3)
        for n in range(-1, 4)
    }
    assert len({tuple(values) for values in draws.values()}) == 15
    assert torch.rand(2, generator=step_generator(1, 3)).tolist() == draws[1, 3]


def test_rmsprop_is_tensorflows_rule():
    """Three steps by hand: ms starts at 1 and epsilon is inside the root."""
    weight, rate, mean_square = torch.tensor([2.0, -1.0]), 0.1, torch.ones(2)
    parameter = nn.Parameter(weight.clone())
    optimizer = TensorFlowRMSprop([parameter], lr=rate)
    for gradient in (
        torch.tensor([1.0, 0.0]),
        torch.tensor([-3.0, 2.0]),
        torch.tensor([0.5, 1e-6]),
    ):
        parameter.grad = gradient.clone()
        optimizer.step()
        mean_square = 0.9 * mean_square + 0.1 * gradient**2
        weight = weight - rate * gradient / (mean_square + 1e-10).sqrt()
    torch.testing.assert_close(parameter.detach(), weight)
    other = nn.Parameter(torch.tensor([2.0, -1.0]))
    other.grad = torch.tensor([1.0, 0.0])
    torch.optim.RMSprop([other], lr=rate, alpha=0.9).step()
    assert not torch.allclose(
        other, torch.tensor([2.0 - rate / 1.0**0.5, -1.0]), atol=0.05
    )


def test_rmsprop_on_sparse_rows_equals_the_dense_rule():
    start = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    tables = [nn.Parameter(start.clone()), nn.Parameter(start.clone())]
    optimizers = [TensorFlowRMSprop([table], lr=0.01) for table in tables]
    for step, row in enumerate([0, 3, 3, 1, 0, 4, 3, 0]):
        for table, optimizer, sparse in zip(
            tables, optimizers, (False, True), strict=True
        ):
            optimizer.zero_grad()
            picked = F.embedding(torch.tensor([row]), table, sparse=sparse)
            (picked * torch.arange(1.0, 5) * (step + 1)).sum().backward()
            assert table.grad.is_sparse == sparse
            optimizer.step()
    torch.testing.assert_close(tables[1], tables[0], rtol=0, atol=1e-6)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_the_c_library_takes_the_wish_to_keep_memory():
    """In a process of its own, since the setting stays; how many pages it saves depends
    on the machine's memory.
    """
    script = "from minisupernet.training import keep_memory; print(keep_memory())"
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "True"
