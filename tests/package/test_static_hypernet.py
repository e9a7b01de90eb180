"""Static HyperNetworks: the paper's counts, the equation, the tiling, the starts, and
what is refused.
"""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from minisupernet.classification import Pictures, fit, settle_norms, signals
from minisupernet.course.studies import static_hypernet as study
from minisupernet.errors import StaticError, TargetError
from minisupernet.static_hypernet import (
    STARTS,
    ChunkedHyperNet,
    Generated,
    KernelGenerator,
    LowRankHyperNet,
    StaticHyperNet,
    WideResNet,
    kernels_to_make,
    ratio,
)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def seeded(make, seed: int = 0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def small_stack() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


# The paper's counts


def test_the_mnist_generator_makes_12544_weights_from_4240_parameters_and_4():
    target = nn.Sequential(nn.Conv2d(1, 16, 7), nn.Conv2d(16, 16, 7))
    hyper = StaticHyperNet(target, z_dim=4, channels=16, size=7)
    assert count(hyper.generator) == 4_240 and hyper.embeddings.numel() == 4
    assert sum(kernel.numel() for kernel in hyper().values()) == 12_544


@pytest.mark.parametrize(
    ("width", "direct", "generated", "tiles"),
    [(1, 563_930, 97_770, 242), (2, 2_243_546, 155_626, 966)],
)
def test_wide_resnets_of_depth_40_have_the_papers_sizes(
    width, direct, generated, tiles
):
    with torch.device("meta"):
        assert count(WideResNet(40, width)) == direct
    network = WideResNet(40, width, generated=True)
    assert count(network) == generated and sum(network.hyper.counts) == tiles


def test_the_papers_numbers_of_wrn_40_2_leave_out_first_layer_norms_and_output():
    """2,236,416 and 148,496 are the kernels of the blocks, or what makes them, and the
    shortcuts.
    """

    def counted(network: WideResNet) -> int:
        blocks = [
            p.numel()
            for name, p in network.target.named_parameters()
            if p.ndim == 4 and name != "0.weight"
        ]
        return sum(blocks) + (count(network.hyper) if network.hyper else 0)

    assert counted(WideResNet(40, 2)) == 2_236_416
    assert counted(WideResNet(40, 2, generated=True)) == 148_496


@pytest.mark.parametrize(
    ("z_dim", "channels", "size"), [(4, 16, 7), (64, 16, 3), (5, 3, 2), (1, 1, 1)]
)
def test_the_generator_has_as_many_parameters_as_the_formula(z_dim, channels, size):
    d, n, f = z_dim, channels, size
    assert count(KernelGenerator(z_dim, channels, size)) == d * (
        z_dim + 1
    ) * n + f * n * f * (d + 1)


# What is computed


def test_the_generator_is_equation_2():
    generator, z = KernelGenerator(z_dim=5, channels=3, size=2), torch.randn(4, 5)
    tiles = generator(z)
    inner_weight, inner_bias = (
        generator.inner.weight.view(3, 5, 5),
        generator.inner.bias.view(3, 5),
    )
    outer_weight, outer_bias = (
        generator.outer.weight.view(3, 2, 2, 5),
        generator.outer.bias.view(3, 2, 2),
    )
    for j in range(4):
        for i in range(3):
            a = inner_weight[i] @ z[j] + inner_bias[i]  # (d,)
            torch.testing.assert_close(tiles[j, :, i], outer_weight @ a + outer_bias)


def test_tiles_are_laid_out_row_by_row():
    target = nn.Sequential(nn.Conv2d(4, 6, 3, bias=False))
    hyper = StaticHyperNet(target, z_dim=3, channels=2)
    kernel, tiles = hyper()["0.weight"], hyper.generator(hyper.embeddings)
    assert kernel.shape == (6, 4, 3, 3) and len(tiles) == 6
    for number, tile in enumerate(tiles):
        row, column = divmod(number, 2)
        assert torch.equal(
            kernel[2 * row : 2 * row + 2, 2 * column : 2 * column + 2], tile
        )


def test_kernels_lie_in_an_affine_space_of_z_dim_dimensions():
    generator = KernelGenerator(z_dim=6, channels=4).double()
    tiles = generator(torch.randn(40, 6, dtype=torch.float64)).flatten(1)
    assert torch.linalg.matrix_rank(tiles - tiles[0]) == 6


@pytest.mark.parametrize(
    "make",
    [
        lambda target: StaticHyperNet(target, 5, channels=4),
        lambda target: ChunkedHyperNet(target, 3, chunk=100),
        lambda target: LowRankHyperNet(target, 2),
    ],
)
def test_a_generated_network_is_the_target_with_those_kernels(make, monkeypatch):
    monkeypatch.setattr(
        "minisupernet.static_hypernet.kernels_to_make",
        lambda target, *tile: kernels_to_make(target, 4),
    )
    target, images = small_stack(), torch.randn(2, 3, 8, 8)
    own = copy.deepcopy(target)
    hyper = make(target)
    assert list(hyper()) == ["2.weight", "4.weight"]
    own.load_state_dict(
        own.state_dict() | {name: kernel.detach() for name, kernel in hyper().items()}
    )
    network = Generated(target, hyper)
    torch.testing.assert_close(network(images), own(images))
    assert count(network) == count(hyper) + sum(
        p.numel() for n, p in own.named_parameters() if n not in hyper()
    )
    network(images).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def twice(kind: str) -> nn.Module:
    """Two convolutions with one kernel: a Parameter in both, or one layer twice."""
    first, second = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
    if kind == "tied":
        second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second if kind == "tied" else first)


@pytest.mark.parametrize("kind", ["tied", "shared"])
@pytest.mark.parametrize(
    "make",
    [
        lambda target: StaticHyperNet(target, 3),
        lambda target: ChunkedHyperNet(target, 3),
        lambda target: LowRankHyperNet(target, 2),
    ],
)
def test_a_kernel_that_layers_share_is_made_once(kind, make):
    target, images = twice(kind), torch.randn(2, 16, 8, 8)
    own = target[0].weight
    hyper = make(target)
    assert list(hyper()) == ["0.weight"]
    network = Generated(target, hyper)
    assert count(network) == count(hyper) + sum(b.numel() for b in biases(target))
    alone = copy.deepcopy(target)
    with torch.no_grad():
        alone[0].weight.copy_(hyper()["0.weight"])
    torch.testing.assert_close(network(images), alone(images))
    assert target[0].weight is own and target[2].weight is own


def biases(network: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in network.named_parameters() if name.endswith("bias")]


def test_the_target_given_is_not_changed():
    target, images = small_stack(), torch.randn(2, 3, 8, 8)
    before = {name: own.clone() for name, own in target.state_dict().items()}
    parameters, expected = [*target.parameters()], target(images)
    network = Generated(target, StaticHyperNet(target, 5, channels=4))
    network(images).sum().backward()
    assert all(a is b for a, b in zip(target.parameters(), parameters, strict=True))
    assert all(torch.equal(own, before[n]) for n, own in target.state_dict().items())
    assert torch.equal(target(images), expected)
    assert all(parameter.grad is None for parameter in parameters)


def test_a_kernel_that_is_computed_stays_so():
    """The other kernel of the network is generated."""
    computed = nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 16, 3))
    target = nn.Sequential(computed, nn.Conv2d(16, 16, 3))
    assert list(kernels_to_make(target)) == ["1.weight"]
    with pytest.raises(StaticError, match="it has none"):
        kernels_to_make(nn.Sequential(computed))


class Reversed(nn.Module):
    """The same layers, known in another order."""

    def __init__(self, names: str) -> None:
        super().__init__()
        for name in names:
            setattr(self, name, nn.Conv2d(16, 16, 3))


@pytest.mark.parametrize(
    "make",
    [
        lambda target: StaticHyperNet(target, 3),
        lambda target: ChunkedHyperNet(target, 3),
        lambda target: LowRankHyperNet(target, 2),
    ],
)
def test_a_state_knows_the_kernels_that_it_makes(make):
    one, other = make(Reversed("ab")), make(Reversed("ba"))
    with pytest.raises(TargetError, match=r"it makes a.weight .* makes b.weight"):
        other.load_state_dict(one.state_dict())
    make(Reversed("ab")).load_state_dict(one.state_dict())


def test_without_a_hypernetwork_the_network_is_the_target():
    target, images = small_stack(), torch.randn(2, 3, 8, 8)
    assert torch.equal(Generated(target, None)(images), target(images))


def test_a_generated_network_is_saved_and_loaded_whole(tmp_path):
    first, second = (
        seeded(lambda: WideResNet(10, generated=True, z_dim=4), seed) for seed in (0, 1)
    )
    torch.save(first.state_dict(), tmp_path / "a.pt")
    second.load_state_dict(torch.load(tmp_path / "a.pt"))
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(first.eval()(images), second.eval()(images))


def test_the_blocks_are_pre_activation_with_the_identity_where_channels_stay():
    network = seeded(lambda: WideResNet(10)).eval()
    block, x = network.target[1], torch.randn(2, 16, 8, 8)
    by_hand = x + block.conv_2(
        F.relu(block.norm_2(block.conv_1(F.relu(block.norm_1(x)))))
    )
    torch.testing.assert_close(block(x), by_hand)
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert network.target[3](network.target[2](x)).shape == (2, 64, 2, 2)


# How it starts


@pytest.mark.parametrize("z_dim", [8, 64])
def test_hyperfan_gives_each_kernel_hes_variance(z_dim):
    target = seeded(lambda: WideResNet(16)).target
    drawn = [
        seeded(lambda: StaticHyperNet(target, z_dim), seed)() for seed in range(20)
    ]
    for name, shape in kernels_to_make(target).items():
        variance = (
            torch.stack([kernels[name].square().mean() for kernels in drawn])
            .mean()
            .item()
        )
        assert variance == pytest.approx(2 / (9 * shape[1]), rel=0.25), name


@pytest.mark.parametrize(
    "make", [lambda t: ChunkedHyperNet(t, 16), lambda t: LowRankHyperNet(t, 8)]
)
def test_chunks_and_low_rank_heads_start_with_hes_variance_too(make):
    target = seeded(lambda: WideResNet(10)).target
    drawn = [seeded(lambda: make(target), seed)() for seed in range(20)]
    for name, shape in kernels_to_make(target).items():
        variance = (
            torch.stack([kernels[name].square().mean() for kernels in drawn])
            .mean()
            .item()
        )
        assert variance == pytest.approx(2 / (9 * shape[1]), rel=0.25), name


def test_the_naive_start_blows_a_plain_network_up_and_hyperfan_does_not():
    images, behind_last = torch.randn(16, 3, 16, 16), {}
    for start in ("direct", *STARTS):
        target = seeded(lambda: study.plain_stack(10))
        hyper = (
            None
            if start == "direct"
            else seeded(lambda target=target, s=start: StaticHyperNet(target, start=s))
        )
        behind_last[start] = signals(Generated(target, hyper), images)[-1]
    assert 0.2 < behind_last["hyperfan"] / behind_last["direct"] < 5
    assert behind_last["naive"] > 1000 * behind_last["hyperfan"]


def test_the_bias_start_makes_every_tile_the_same_for_every_input_channel():
    tiles = StaticHyperNet(small_stack(), 4, channels=4, start="bias").generator(
        torch.randn(3, 4)
    )
    assert tiles.abs().max() > 0 and torch.equal(
        tiles, tiles[:1, :, :1].expand_as(tiles)
    )


# Two more generators


def test_chunks_are_a_linear_map_of_their_embeddings_and_the_rest_is_cut_off():
    target = nn.Sequential(nn.Conv2d(16, 16, 3, bias=False))
    hyper = ChunkedHyperNet(target, z_dim=3, chunk=1000)
    assert hyper.embeddings.shape == (3, 3)  # 2,304 weights in three chunks of 1,000
    flat = torch.cat([z @ hyper.weight + hyper.bias for z in hyper.embeddings])
    torch.testing.assert_close(hyper()["0.weight"].flatten(), flat[:2304])


def test_low_rank_heads_make_kernels_of_their_rank():
    kernels = LowRankHyperNet(WideResNet(10).target, 5).double()()
    assert all(
        torch.linalg.matrix_rank(kernel.flatten(1)) == 5 for kernel in kernels.values()
    )


def test_the_ratio_counts_embeddings_and_goes_through_one():
    target = WideResNet(10).target
    hyper = LowRankHyperNet(target, 4)
    assert ratio(hyper) == count(hyper) / 73_728
    full = study.PROFILES["full"]
    for make, sizes in (
        (StaticHyperNet, full.tile),
        (ChunkedHyperNet, full.chunk),
        (LowRankHyperNet, full.rank),
    ):
        ratios = [ratio(make(target, size)) for size in sizes]
        assert ratios == sorted(ratios) and ratios[0] < 0.06 and ratios[-1] > 1.5


# What is refused


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: KernelGenerator(0), "must be positive, got 0, 16 and 3"),
        (
            lambda: StaticHyperNet(WideResNet(10).target, start="zero"),
            "choose one of hyperfan, naive, bias",
        ),
        (
            lambda: StaticHyperNet(small_stack()),
            r"no 3 x 3 kernel with multiples of 16 channels.*\(4, 3, 3, 3\)",
        ),
        (lambda: StaticHyperNet(WideResNet(10).target, size=5), "no 5 x 5 kernel"),
        (lambda: kernels_to_make(nn.Linear(16, 16)), "it has none"),
        (lambda: kernels_to_make(nn.Conv2d(32, 32, 3, groups=2)), "it has none"),
        (
            lambda: WideResNet(12),
            r"depth must be 10, 16, 22, ... and 16 \* width a whole number",
        ),
        (lambda: WideResNet(16, 0.55), "got 16 and width 0.55"),
        (
            lambda: WideResNet(16, z_dim=8),
            "z_dim would do nothing; pass generated=True",
        ),
        (
            lambda: StaticHyperNet(WideResNet(10, generated=True).target, size=3),
            "no 3 x 3 kernel",
        ),
        (
            lambda: kernels_to_make(nn.Sequential(nn.LazyConv2d(16, 3))),
            r"layer '0' \(LazyConv2d\) does not know its shape yet; run the network",
        ),
        (
            lambda: Generated(twice("tied"), StaticHyperNet(WideResNet(10).target)),
            r"makes '1.conv_1.weight' of shape \(16, 16, 3, 3\), which is no parameter",
        ),
        (
            lambda: ChunkedHyperNet(WideResNet(10).target, 0),
            "z_dim and chunk must be positive, got 0 and 256",
        ),
        (
            lambda: LowRankHyperNet(WideResNet(10).target, 0),
            "rank must be positive, got 0",
        ),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(make, said):
    with pytest.raises(StaticError, match=said):
        make()


# Training and what is measured


def test_pictures_are_cut_into_parts_that_do_not_meet(squares):
    pictures = Pictures(squares, validation=7, batch=5, pool=2)
    together = torch.cat([pictures.validation, pictures.train])
    assert pictures.describe() == (
        "Images: 233 to train on, 7 for validation, 120 for tests."
    )
    assert len(Pictures(squares, validation=3000).validation) == 240 // 5
    assert len(pictures.validation) == 7 and together.sort().values.tolist() == list(
        range(len(squares.train_labels))
    )
    pixels, labels = pictures.batch(3, seed=1)
    again = pictures.batch(3, seed=1)
    assert (
        pixels.shape == (5, 3, 16, 16)
        and torch.equal(pixels, again[0])
        and torch.equal(labels, again[1])
    )
    assert not torch.equal(pixels, pictures.batch(4, seed=1)[0])


class AlwaysThree(nn.Module):
    """Answers 3, and only in evaluation mode."""

    def forward(self, pixels):
        assert not self.training
        return F.one_hot(torch.full((len(pixels),), 3), 10).float()


@pytest.mark.parametrize("most", [None, 50])
def test_accuracy_is_the_share_of_right_answers_on_that_part(squares, most):
    pictures, network = Pictures(squares, validation=20, most=most), AlwaysThree()
    chosen = squares.test_labels[pictures.test]
    assert len(chosen) == (most or len(squares.test_labels))
    assert pictures.accuracy(network, "test") == pytest.approx(
        (chosen == 3).float().mean().item()
    )
    held_back = squares.train_labels[pictures.validation]
    assert (
        0
        < pictures.accuracy(network, "validation")
        == pytest.approx((held_back == 3).float().mean().item())
    )
    assert network.training


def test_a_generated_network_learns(squares):
    network = seeded(lambda: WideResNet(10, generated=True, z_dim=8))
    before = copy.deepcopy(network.hyper.state_dict())
    pictures = Pictures(squares, validation=10, batch=16, pool=4)
    history = fit(network, pictures, 1e-2, 60, seed=0, every=30)
    assert history.last("loss") < 1.0 and history.last("validation_accuracy") > 0.5
    assert all(
        not torch.equal(before[name], now)
        for name, now in network.hyper.state_dict().items()
    )


def test_settled_norms_have_the_mean_of_the_batches(squares):
    network = nn.Sequential(nn.BatchNorm2d(3))
    pictures = Pictures(squares, validation=10, batch=8)
    settle_norms(network, pictures, seed=2, batches=3)
    means = torch.stack(
        [pictures.batch(step, 502)[0].mean((0, 2, 3)) for step in range(3)]
    ).mean(0)
    torch.testing.assert_close(network[0].running_mean, means)
    assert network[0].momentum == 0.1


def test_shuffled_embeddings_stay_in_their_kernel_or_not():
    network = seeded(lambda: WideResNet(10, generated=True, z_dim=4))
    old, counts = network.hyper.embeddings.detach(), network.hyper.counts
    inside, anywhere = (
        study.shuffled(network, how, 0) for how in ("inside", "anywhere")
    )
    assert not torch.equal(inside, old) and not torch.equal(anywhere, old)
    assert torch.equal(anywhere.sort(0).values, old.sort(0).values)
    for was, now, mean in zip(
        old.split(counts),
        inside.split(counts),
        study.shuffled(network, "mean", 0).split(counts),
        strict=True,
    ):
        assert torch.equal(was.sort(0).values, now.sort(0).values)
        torch.testing.assert_close(mean, was.mean(0).expand_as(was))
    assert not torch.equal(anywhere[:1], old[:1]) or not torch.equal(
        anywhere[1:2], old[1:2]
    )


def test_multiplications_are_those_of_the_target():
    target = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Conv2d(16, 16, 3),
        nn.Flatten(),
        nn.Linear(16 * 36, 10),
    )
    by_hand = 64 * 16 * 27 + 36 * 16 * 144 + 5760
    assert (
        study.multiply_adds(
            Generated(target, StaticHyperNet(target, 4)), torch.randn(2, 3, 8, 8)
        )
        == by_hand
    )


def test_the_study_measures_every_arm_with_the_same_rule(squares):
    tiny = replace(
        study.PROFILES["quick"],
        pool=4,
        steps=8,
        short=2,
        batch=4,
        rates=(1e-3, 1e-2),
        start_steps=2,
        sweep_steps=2,
        sweep_short=1,
        tile=(2,),
        chunk=(2,),
        rank=(1,),
        validation=10,
        z_dim=4,
    )
    said = []
    found = study.measure_with(squares, 0, tiny, said.append)
    assert [row["arm"] for row in found["networks"]] == [
        "generated",
        "direct",
        "smaller",
    ]
    assert {(row["network"], row["start"]) for row in found["starts"]} == {
        (network, start)
        for network in ("WRN-10-1", "plain")
        for start in ("direct", *STARTS)
    }
    assert [row["family"] for row in found["sweep"]] == [
        "direct",
        "tile",
        "chunk",
        "rank",
    ]
    rows = found["networks"] + found["starts"] + found["sweep"]
    assert len(said) == len(rows) == 15
    for row in rows:
        assert [each["rate"] for each in row["tried"]] == [1e-3, 1e-2]
        assert (
            row["rate"]
            == max(row["tried"], key=lambda each: each["validation"])["rate"]
        )
        assert 0 <= row["test"] <= 1 and row["parameters"] > 0
    assert found["networks"][0]["embeddings"].keys() == {
        "own",
        "inside",
        "mean",
        "anywhere",
    }
    assert (
        len(found["networks"][0]["principal"])
        == sum(found["networks"][0]["tiles"])
        == 32
    )
