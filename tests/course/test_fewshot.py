"""The public benchmarks: their splits, their protocol, and every arm on a tiny set."""

from dataclasses import replace

import pytest
import torch
from support import coloured_squares

from minisupernet.course.report.long_studies import fewshot_table
from minisupernet.course.studies import fewshot
from minisupernet.data import load
from minisupernet.data.episodes import Batch
from minisupernet.errors import StudyError
from minisupernet.files import data_folder

UNIT = {"benchmark": "cifar_fs", "arm": "protonet", "channels": 4, "steps": 4}


@pytest.fixture(scope="module")
def named():
    """A tiny set with the names of CIFAR-100, as far as the benchmarks need them."""
    squares = coloured_squares(classes=100, train=18, test=2)
    first = " ".join(fewshot.CIFAR_FS.values()).split()
    kinds = " ".join(fewshot.FC100.values()).split()
    return replace(
        squares,
        class_names=(*first, *(f"class_{n}" for n in range(len(first), 100))),
        superclass_names=(*kinds, *(f"kind_{n}" for n in range(len(kinds), 20))),
        superclass_of=torch.arange(100) % 20,
    )


@pytest.mark.parametrize(
    ("benchmark", "sizes"), [("cifar_fs", [64, 16, 20]), ("fc100", [60, 20, 20])]
)
def test_a_benchmark_s_classes_are_cut_in_three(named, benchmark, sizes):
    split = fewshot.benchmark_split(benchmark, named)
    assert [len(split[part]) for part in ("training", "validation", "test")] == sizes
    assert sorted(sum(split.values(), [])) == list(range(100))
    if benchmark == "fc100":  # no superclass is on both sides
        parents = [{number % 20 for number in part} for part in split.values()]
        assert sum(map(len, parents)) == 20


@pytest.mark.skipif(
    not (data_folder() / "cifar-100-python" / "train").exists(),
    reason="the real CIFAR-100 is not in the data folder (make data)",
)
def test_the_real_images_have_the_classes_of_the_benchmarks():
    cifar100 = load("cifar100")
    for benchmark, sizes in (("cifar_fs", [64, 16, 20]), ("fc100", [60, 20, 20])):
        split = fewshot.benchmark_split(benchmark, cifar100)
        parts = [split[part] for part in ("training", "validation", "test")]
        assert [len(part) for part in parts] == sizes
        assert sorted(sum(parts, [])) == list(range(100))
    members = torch.bincount(fewshot.pooled(cifar100).train_labels)
    assert members.tolist() == [600] * 100


def test_images_that_are_not_of_the_benchmark_are_refused(named):
    with pytest.raises(StudyError, match="cifar_fs is made of CIFAR-100; squares has"):
        fewshot.benchmark_split("cifar_fs", coloured_squares(classes=4, train=2))
    with pytest.raises(StudyError, match="no benchmark 'omniglot'; choose one of cif"):
        fewshot.benchmark_split("omniglot", named)
    with pytest.raises(
        StudyError, match="arm cannot be 'maml'; choose one of protonet"
    ):
        fewshot.check_unit(**UNIT | {"arm": "maml"})
    with pytest.raises(StudyError, match="channels must be 4 or a multiple of it"):
        fewshot.check_unit(**UNIT | {"channels": 6})


def measured(images, checkpoint=None, **which):
    return fewshot.measure(images, 0, "quick", str, checkpoint, **UNIT | which)


@pytest.mark.parametrize("arm", fewshot.ARMS)
def test_every_arm_is_judged_by_the_protocol(named, arm, tmp_path):
    run = measured(named, tmp_path / "unit.safetensors", arm=arm, benchmark="fc100")
    shown = {"own", "wrong"} if arm == "pudnet" else {"own"}
    assert set(run["test"]["1"]) == shown
    assert 0 <= run["test"]["1"]["own"]["mean"] <= 1 > run["test"]["1"]["own"]["half"]
    assert not {*run["classes"]["training"]} & {*run["classes"]["test"]}
    assert run["rate"] in [each["rate"] for each in run["tried"]]
    assert not list(tmp_path.glob("*.rate"))
    if arm == "protonet":  # four blocks: convolution and batch normalisation
        assert run["parameters"] == 4 * 27 + 3 * 4 * 36 + 4 * (4 + 8)


def test_a_prototypical_network_goes_by_squared_distances():
    network = fewshot.PrototypicalNetwork(4).eval()
    random = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 2, 6, 3, 32, 32, generator=random)
    batch = Batch(torch.zeros(2, 3), *pixels.unbind(0))
    shown, asked = (network.body(each.flatten(0, 1)) for each in pixels.unbind(0))
    means = shown.view(2, 3, 2, -1).mean(2)  # (T, way, 16)
    apart = asked.view(2, 6, 1, -1) - means[:, None]
    logits = network.logits(batch)
    assert torch.allclose(logits, -apart.square().sum(3), atol=1e-3)
    right = logits.argmax(2) == torch.tensor([0, 0, 1, 1, 2, 2])
    assert torch.equal(network.accuracy(batch), right.float().mean(1))
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.tensor([0, 0, 1, 1, 2, 2]).repeat(2)
    )
    assert torch.allclose(network.loss(batch), expected)


def test_the_table_stands_beside_the_published_one():
    test = {k: {"own": {"mean": m, "half": 0.004}} for k, m in (("1", 0.5), ("5", 0.7))}
    run = {"benchmark": "fc100", "arm": "pudnet", "channels": 8, "test": test}
    lines = fewshot_table([run]).data.splitlines()
    assert (
        lines[2]
        == "| PudNet, here | conv 8-16-32-32 | – | – | 50.0 ± 0.4 | 70.0 ± 0.4 |"
    )
    assert (
        "| prototypical network, published | conv 64-64-64-64 | 55.5 ± 0.7" in lines[4]
    )
