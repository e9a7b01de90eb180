"""A generated network leaves the course: saved, loaded, exported, and run elsewhere."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import coloured_squares
from torch import nn

from minisupernet import __version__
from minisupernet.data import normalise
from minisupernet.data.tasks import BinaryTasks, TaskImages
from minisupernet.errors import FitError, GeneratorError, TargetError
from minisupernet.export import (
    fit_network,
    from_pixels,
    load_generator,
    network_of,
    save,
    save_networks,
)
from minisupernet.fitting import Fit, accuracy, train_generator
from minisupernet.static_hypernet import StaticHyperNet
from minisupernet.supernet import SuperNet
from minisupernet.target import TaskClassifier, WeightSpec, run_tasks

ELSEWHERE = """
import sys, torch
sys.modules["minisupernet"] = None  # importing it fails
program = torch.export.load(sys.argv[1]).module()
torch.save(program(torch.load(sys.argv[2])), sys.argv[3])
"""


TINY = nn.Sequential(nn.Conv2d(16, 16, 3))


@pytest.fixture
def made():
    torch.manual_seed(0)
    target = TaskClassifier(4, hidden=8)
    return target, SuperNet(WeightSpec.of(target), 5, hidden=(6,), bound=2.0)


def test_what_is_saved_comes_back_to_the_bit(made, tmp_path):
    target, generator = made
    z = torch.randn(3, 5)
    path, images = tmp_path / "made" / "g.safetensors", coloured_squares()
    before = torch.get_rng_state()
    save(path, generator, target, {"tasks": z}, images, {"data": "squares"})
    found = load_generator(path, target)
    assert torch.equal(before, torch.get_rng_state())
    versions = {"minisupernet": __version__, "torch": torch.__version__}
    assert found.about == versions | {"data": "squares"}
    assert found.target == "TaskClassifier"
    assert found.class_names == images.class_names
    assert torch.equal(found.mean, images.mean) and torch.equal(found.std, images.std)
    assert torch.equal(found.vectors["tasks"], z)
    for name, own in generator(z).items():
        assert torch.equal(own, found.generator(z)[name])
    assert found.generator.spec == generator.spec


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_original_generator_and_other_dtypes_come_back(tmp_path, dtype):
    target = TaskClassifier(4, hidden=8)
    generator = SuperNet.original(WeightSpec.of(target), 5).to(dtype)
    found = load_generator(save(tmp_path / "g", generator, target))
    assert found.generator.sparse and found.generator.bound == 1.0
    assert found.mean is None and found.vectors == {}
    for name, own in generator.state_dict().items():
        assert own.dtype == dtype
        assert torch.equal(own, found.generator.state_dict()[name])


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


def whole_network(made) -> nn.Module:
    """A network that takes pixels, as `fit_network` gives."""
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.1])
    return from_pixels(network_of(*made, torch.randn(5)), mean, std)


def test_an_exported_network_runs_where_the_package_is_not(made, tmp_path):
    network, images = whole_network(made), torch.rand(4, 3, 32, 32)
    files = [str(tmp_path / name) for name in ("net.pt2", "images.pt", "logits.pt")]
    any_number = ({0: torch.export.Dim.AUTO},)
    program = torch.export.export(network, (images[:2],), dynamic_shapes=any_number)
    torch.export.save(program, files[0])
    torch.save(images, files[1])
    command = [sys.executable, "-c", ELSEWHERE, *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(files[2]), network(images))


def test_onnx_where_its_exporter_is_installed(made, tmp_path):
    pytest.importorskip("onnxscript", reason="the ONNX exporter is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="nor what runs its files")
    network, images = whole_network(made), torch.rand(4, 3, 32, 32)
    path, any_number = tmp_path / "net.onnx", ({0: torch.export.Dim.AUTO},)
    given = {"dynamo": True, "dynamic_shapes": any_number, "external_data": False}
    torch.onnx.export(network, (images[:2],), path, **given)
    session = runtime.InferenceSession(path)
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    expected = network(images).detach()
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-5)


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
    for z, found in (
        (torch.randn(1, 5), r"\(1, 5\)"),
        (torch.randn(4), r"\(4,\)"),
        ([0.5] * 5, "list"),
    ):
        with pytest.raises(GeneratorError, match=f"vector of 5 numbers, not {found}"):
            network_of(target, generator, z)
    for what in (target, StaticHyperNet(TINY, 3)):
        with pytest.raises(GeneratorError, match="must be a SuperNet, not"):
            network_of(target, what, torch.randn(5))
        with pytest.raises(GeneratorError, match="must be a SuperNet, not"):
            save(tmp_path / "g.safetensors", what, target)


def renoted(path, name: str, note: str | None) -> None:
    """Write the file again with another note, or without it."""
    with safe_open(path, "pt") as file:
        notes = {**file.metadata(), name: note}
    kept = {key: value for key, value in notes.items() if value is not None}
    save_file(load_file(path), path, kept)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "there is no file .*; check the path"),
        (lambda path: path.write_bytes(path.read_bytes()[:90]), "no whole file"),
        (lambda path: path.write_bytes(b""), "no whole file"),
        (lambda path: save_file({"a": torch.ones(1)}, path), "holds no generator"),
        (lambda path: save_file({}, path, {"format": "pt"}), "holds no generator"),
        (lambda path: renoted(path, "spec", "[]"), "damaged"),
        (lambda path: renoted(path, "spec", "3"), "damaged"),
        (lambda path: renoted(path, "settings", '{"z_dim": 5}'), "damaged"),
        (lambda path: renoted(path, "settings", "[" * 100_000), "no whole file"),
        (lambda path: renoted(path, "class_names", "1" * 5_000), "no whole file"),
        (lambda path: renoted(path, "about", "[1]"), "damaged"),
        (lambda path: renoted(path, "target", None), "damaged"),
        (lambda path: renoted(path, "version", None), "is of version None, this"),
        (lambda path: (path.unlink(), path.mkdir()), "there is no file"),
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


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A generator trained on questions about seven classes, saved; three are new."""
    images = coloured_squares(train=40, test=20)
    torch.manual_seed(0)
    target = TaskClassifier(8, hidden=16)
    generator = SuperNet(WeightSpec.of(target), 8, hidden=(16,))
    pairs = [(a, b) for a in range(7) for b in range(7) if a != b]
    tasks = BinaryTasks(*(tuple(side) for side in zip(*pairs, strict=True)))
    fit = Fit(120, rate=3e-3, images=8, tasks=8)
    z, _ = train_generator(generator, target, TaskImages(images, tasks), fit)
    path = tmp_path_factory.mktemp("trained") / "g.safetensors"
    save(path, generator, target, {"tasks": z}, images)
    return path, target, images


def shown(images, part: str, yes: int, no: int, most: int):
    """At most so many images of two classes, and which are of the first."""
    labels = getattr(images, f"{part}_labels")
    rows = [(labels == number).nonzero()[:most, 0] for number in (no, yes)]
    truth = torch.arange(2).repeat_interleave(torch.tensor([len(row) for row in rows]))
    return getattr(images, f"{part}_images")[torch.cat(rows)], truth


def test_forty_images_of_a_new_question_become_a_classifier(trained, tmp_path):
    path, target, images = trained
    saved = load_generator(path, target)
    before = {name: own.clone() for name, own in saved.generator.state_dict().items()}
    few, labels = shown(images, "train", 8, 9, 20)
    network, z, history = fit_network(saved, target, few, labels)
    assert z.shape == (8,) and not z.requires_grad
    assert history.rows[-1]["validation_accuracy"] >= 0.75
    for name, own in saved.generator.state_dict().items():
        assert torch.equal(own, before[name])
    unseen, truth = shown(images, "test", 8, 9, 20)
    right = ((network(unseen / 255) > 0) == truth).float().mean()
    assert right > 0.85
    data = TaskImages(images, BinaryTasks((8,), (9,)))
    weights = saved.generator(z[None])
    assert abs(accuracy(target, weights, data).item() - right) < 0.03
    short = Fit(2, z_rate=0.1)
    given = [
        fit_network(saved, target, few, own, short)[1]
        for own in (labels, labels.float())
    ]
    assert torch.equal(*given) and not torch.equal(given[0], z)


def test_pixels_from_0_to_1_are_normalised_as_in_training(made):
    network = network_of(*made, torch.randn(5))
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.1])
    expected = network(normalise(images, mean, std))
    whole = from_pixels(network, mean, std)
    assert not whole.training
    torch.testing.assert_close(whole(images / 255), expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_fitted_is_one_sentence(trained, made, tmp_path):
    path, target, images = trained
    saved = load_generator(path, target)
    few, labels = shown(images, "train", 8, 9, 20)
    with pytest.raises(GeneratorError, match="of torch.uint8, not .* of torch.float32"):
        fit_network(saved, target, few / 255, labels)
    with pytest.raises(GeneratorError, match=r"\(N, 3, 32, 32\) .*not \(40, 32, 32, 3"):
        fit_network(saved, target, few.permute(0, 2, 3, 1), labels)
    with pytest.raises(GeneratorError, match="not .* of list"):
        fit_network(saved, target, few.tolist(), labels)
    for wrong in (labels[:7], labels * 2, labels[:, None], labels - 0.5):
        with pytest.raises(GeneratorError, match="labels must be 40 numbers, 1 for"):
            fit_network(saved, target, few, wrong)
    with pytest.raises(GeneratorError, match="each label, not 4 of yes and 20 of no"):
        fit_network(saved, target, few[:24], labels[:24])
    with pytest.raises(FitError, match="start must be"):
        fit_network(saved, target, few, labels, start=torch.zeros(3))
    with pytest.raises(TargetError, match="another target"):
        fit_network(saved, TaskClassifier(4, hidden=8), few, labels)
    bare = load_generator(save(tmp_path / "g", made[1], made[0]))
    with pytest.raises(GeneratorError, match="does not say how pixels are scaled"):
        fit_network(bare, made[0], few, labels)
    bare = load_generator(save(tmp_path / "g", made[1], made[0], images=images))
    with pytest.raises(GeneratorError, match="give start, a vector of 5 numbers"):
        fit_network(bare, made[0], few, labels)


@pytest.mark.parametrize("name", ["", "a/b", "../a", "/tmp/a"])
def test_names_that_are_no_files_are_refused(made, tmp_path, name):
    with pytest.raises(GeneratorError, match="is no name of a file"):
        save_networks(tmp_path, *made, {name: torch.randn(5)})
    assert not [*tmp_path.iterdir()]
