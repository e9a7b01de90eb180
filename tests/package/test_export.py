"""A generated network leaves the course: saved, loaded, exported, and run elsewhere."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minisupernet.errors import GeneratorError, TargetError
from minisupernet.export import load_generator, network_of, save, save_networks
from minisupernet.supernet import SuperNet
from minisupernet.target import TaskClassifier, WeightSpec, run_tasks

ELSEWHERE = """
import sys, torch
sys.modules["minisupernet"] = None  # importing it fails
program = torch.export.load(sys.argv[1]).module()
torch.save(program(torch.load(sys.argv[2])), sys.argv[3])
"""


@pytest.fixture
def made():
    torch.manual_seed(0)
    target = TaskClassifier(4, hidden=8)
    return target, SuperNet(WeightSpec.of(target), 5, hidden=(6,), bound=2.0)


def test_what_is_saved_comes_back_to_the_bit(made, tmp_path):
    target, generator = made
    z = torch.randn(3, 5)
    path, about = tmp_path / "made" / "g.safetensors", {"data": "squares"}
    save(path, generator, target, {"tasks": z}, ("cat", "dog", "fox"), about)
    found = load_generator(path, target)
    assert found.target == "TaskClassifier" and found.about == about
    assert found.class_names == ("cat", "dog", "fox")
    assert torch.equal(found.vectors["tasks"], z)
    for name, own in generator(z).items():
        assert torch.equal(own, found.generator(z)[name])
    assert found.generator.spec == generator.spec


def test_a_z_becomes_an_ordinary_network(made):
    target, generator = made
    before = {name: p.clone() for name, p in target.named_parameters()}
    z, images = torch.randn(5), torch.randn(1, 4, 3, 32, 32)
    network = network_of(target, generator, z)
    assert type(network) is TaskClassifier and not network.training
    assert all(p.is_leaf and p.requires_grad for p in network.parameters())
    with torch.no_grad():
        logits = run_tasks(target, generator(z[None]), images)[0]
    assert torch.equal(network(images[0]), logits)
    assert all(torch.equal(p, before[n]) for n, p in target.named_parameters())


def test_an_exported_network_runs_where_the_package_is_not(made, tmp_path):
    network, images = network_of(*made, torch.randn(5)), torch.randn(4, 3, 32, 32)
    files = [str(tmp_path / name) for name in ("net.pt2", "images.pt", "logits.pt")]
    torch.export.save(torch.export.export(network, (images,)), files[0])
    torch.save(images, files[1])
    command = [sys.executable, "-c", ELSEWHERE, *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(files[2]), network(images))


def test_onnx_where_its_exporter_is_installed(made, tmp_path):
    pytest.importorskip("onnxscript", reason="the ONNX exporter is not installed")
    network, images = network_of(*made, torch.randn(5)), torch.randn(4, 3, 32, 32)
    torch.onnx.export(network, (images,), tmp_path / "net.onnx", dynamo=True)
    assert (tmp_path / "net.onnx").stat().st_size > 1000


def test_many_networks_become_a_folder_of_files(made, tmp_path):
    target, generator = made
    named = {"one": torch.randn(5), "two": torch.randn(5)}
    paths = save_networks(tmp_path / "nets", target, generator, named)
    assert [path.stem for path in paths] == ["one", "two"]
    plain = TaskClassifier(4, hidden=8)
    plain.load_state_dict(load_file(paths[1]))
    images = torch.randn(2, 3, 32, 32)
    expected = network_of(target, generator, named["two"])(images)
    assert torch.equal(plain(images), expected)


def test_another_target_is_refused(made, tmp_path):
    target, generator = made
    path = save(tmp_path / "g.safetensors", generator, target)
    with pytest.raises(TargetError, match=r"'convolutions.0.weight' is \(4, 3, 5, 5\)"):
        load_generator(path, TaskClassifier(8, hidden=8))
    with pytest.raises(TargetError, match="weights for another target"):
        network_of(nn.Linear(3, 4), generator, torch.randn(5))
    with pytest.raises(GeneratorError, match=r"one vector \(z_dim,\), not \(1, 5\)"):
        network_of(target, generator, torch.randn(1, 5))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "there is no file .*; check the path"),
        (lambda path: path.write_bytes(path.read_bytes()[:90]), "no whole file"),
        (lambda path: save_file({"a": torch.ones(1)}, path), "holds no generator"),
        (
            lambda path: save_file(
                {"a": torch.ones(1)},
                path,
                {"kind": json.dumps("minisupernet generator"), "version": "9"},
            ),
            "is of version 9, this package reads 1",
        ),
    ],
)
def test_another_file_is_one_sentence(made, tmp_path, damage, said):
    path = save(tmp_path / "g.safetensors", made[1], made[0])
    damage(path)
    with pytest.raises(GeneratorError, match=said):
        load_generator(path)


def test_a_state_knows_its_target():
    class Other(TaskClassifier):
        def __init__(self) -> None:
            super().__init__(4, hidden=8)
            self.linears = nn.ModuleList(reversed(self.linears))

    class Turned(nn.Module):
        """The same sizes in another order."""

        def __init__(self, flip: bool) -> None:
            super().__init__()
            for name in ("b", "a") if flip else ("a", "b"):
                setattr(self, name, nn.Linear(4, 4))

    one, other = (SuperNet(WeightSpec.of(Turned(flip)), 3) for flip in (False, True))
    with pytest.raises(TargetError, match="belongs to a generator for another target"):
        other.load_state_dict(one.state_dict())
    SuperNet(one.spec, 3).load_state_dict(one.state_dict())
    other.load_state_dict(dict(one.state_dict()))  # a bare dict says nothing
