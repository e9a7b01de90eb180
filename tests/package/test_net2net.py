"""Growing networks: the function is kept or the growth refused, gradients and
optimisers follow the stated rule.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from minisupernet.course.records import fingerprint
from minisupernet.course.studies.growing import Growing, Settings, conv_net
from minisupernet.course.studies.net2net import (
    choose,
    cost_to_reach,
    deepened,
    measure,
    padded,
    widened,
)
from minisupernet.errors import GrowthError
from minisupernet.net2net import (
    Widening,
    carry_over,
    copy_units,
    deepen,
    insert_random,
    pad,
    widen,
)

ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.GELU)
SPLITS = ("even", "asymmetric")
drawn = settings(max_examples=25, deadline=None)


def lived(model: nn.Module, *shape: int) -> nn.Module:
    """The model with BatchNorm statistics and parameters as after some training."""
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(8, *shape) * 2 + 1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.weight.uniform_(0.5, 2)
                module.bias.normal_()
    return model


@torch.no_grad()
def change(model: nn.Module, grown: nn.Module, *shape: int) -> float:
    """How far the grown network's answers are from the model's, in eval mode, relative
    to their size.
    """
    x = torch.randn(16, *shape, generator=torch.Generator().manual_seed(1))
    before, after = (copy.deepcopy(each).eval()(x) for each in (model, grown))
    return ((after - before).norm() / before.norm()).item()


@st.composite
def mlps(draw) -> nn.Sequential:
    widths = draw(st.lists(st.integers(2, 9), min_size=1, max_size=3))
    activation = draw(st.sampled_from(ACTIVATIONS))
    layers, before = [], 6
    for width in widths:
        layers += [nn.Linear(before, width, bias=draw(st.booleans()))]
        layers += [nn.BatchNorm1d(width)] * draw(st.booleans()) + [
            activation(),
            nn.Dropout(0.3),
        ]
        before = width
    return lived(nn.Sequential(*layers, nn.Linear(before, 4)), 6)


@st.composite
def conv_stacks(draw) -> nn.Sequential:
    activation = draw(st.sampled_from(ACTIVATIONS))
    layers, before, side = [], 3, 12
    for width in draw(st.lists(st.integers(2, 6), min_size=1, max_size=3)):
        kernel, stride = draw(st.sampled_from([1, 3])), draw(st.sampled_from([1, 2]))
        layers.append(
            nn.Conv2d(
                before, width, kernel, stride, kernel // 2, bias=draw(st.booleans())
            )
        )
        side = (side - 1) // stride + 1
        layers += [nn.BatchNorm2d(width, affine=draw(st.booleans()))] * draw(
            st.booleans()
        ) + [activation()]
        if side >= 4 and draw(st.booleans()):
            layers.append(draw(st.sampled_from([nn.MaxPool2d(2), nn.AvgPool2d(2)])))
            side //= 2
        before = width
    if draw(st.booleans()):
        layers, side = [*layers, nn.AdaptiveAvgPool2d(1)], 1
    return lived_affine(
        nn.Sequential(
            *layers, nn.Flatten(), nn.Dropout(0.5), nn.Linear(before * side**2, 5)
        )
    )


def lived_affine(model: nn.Sequential) -> nn.Sequential:
    with torch.no_grad():
        for _ in range(2):
            model(
                torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(0))
                * 2
                + 1
            )
    return model


class Residual(nn.Module):
    """A small residual network, with ReLUs as functions, a mean, a view, and two
    readers of one layer.
    """

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.inner, self.norm = nn.Conv2d(channels, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.outer, self.side = (
            nn.Conv2d(5, channels, 3, padding=1),
            nn.Conv2d(5, channels, 1),
        )
        self.before, self.head = (
            nn.Conv2d(channels, 6, 3, stride=2),
            nn.Linear(6 * 4 + 6, 7),
        )
        self.last = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(x), 2)  # (B, channels, 6, 6)
        inner = F.relu(self.norm(self.inner(x)))
        x = x + (self.outer(inner) + self.side(inner)).relu()
        return self.last(
            torch.tanh(self.first_of_head(F.leaky_relu(self.before(x), 0.1)))
        )

    def first_of_head(self, x: Tensor) -> Tensor:
        return F.linear(
            torch.cat([x.reshape(x.shape[0], -1), x.mean((2, 3))], 1),
            self.head.weight,
            self.head.bias,
        )


class Plain(nn.Module):
    """Convolutions with ReLUs, pooling and reshaping written as functions; `ending`
    says how the image is flattened.
    """

    def __init__(self, ending: str) -> None:
        super().__init__()
        self.one, self.two = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Conv2d(4, 5, 3, padding=1),
        )
        self.head, self.ending = nn.Linear(5 if ending == "mean" else 5 * 9, 3), ending

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.one(x)), 2)
        x = F.avg_pool2d(self.two(x).relu() * 2 + 1, 2)
        flat = {
            "flatten": lambda: torch.flatten(x, 1),
            "view": lambda: x.view(x.size(0), -1),
            "reshape": lambda: x.reshape(x.shape[0], -1),
            "mean": lambda: x.mean((2, 3)),
        }[self.ending]()
        return self.head(F.dropout(flat, 0.5, self.training))


class TwoBranches(nn.Module):
    """A residual block between a stem and a head; `inner` has two readers, and only it
    can be widened alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Conv2d(4, 5, 3, padding=1),
        )
        self.norm = nn.BatchNorm2d(5)
        self.outer, self.side = nn.Conv2d(5, 4, 3, padding=1), nn.Conv2d(5, 4, 1)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        inner = self.norm(self.inner(x)).relu()
        x = x + self.outer(inner) + self.side(inner)
        return self.head(self.pool(x).flatten(1))


def layers_of(model: nn.Module, *kinds: type) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


@drawn
@given(mlps() | conv_stacks(), st.data())
def test_widening_keeps_the_function(model, data):
    shape = (6,) if isinstance(model[0], nn.Linear) else (3, 12, 12)
    layer = data.draw(st.sampled_from(layers_of(model, nn.Linear, nn.Conv2d)[:-1]))
    units = len(model.get_submodule(layer).weight)
    width = units + data.draw(st.integers(0, 7))
    grown = widen(
        model,
        layer,
        width,
        split=data.draw(st.sampled_from(SPLITS)),
        seed=data.draw(st.integers(0, 99)),
    )
    assert len(grown.get_submodule(layer).weight) == width
    assert change(model, grown, *shape) <= 1e-5


@drawn
@given(mlps() | conv_stacks(), st.booleans(), st.data())
def test_deepening_behind_a_relu_keeps_the_function(model, with_norm, data):
    shape = (6,) if isinstance(model[0], nn.Linear) else (3, 12, 12)
    relus = layers_of(model, nn.ReLU)
    if not relus:
        name = layers_of(model, *ACTIVATIONS)[0]
        with pytest.raises(GrowthError, match="name a ReLU module"):
            deepen(model, name)
        return
    inputs = (
        torch.randn(32, *shape, generator=torch.Generator().manual_seed(2))
        if with_norm
        else None
    )
    grown = deepen(
        model,
        data.draw(st.sampled_from(relus)),
        statistics=inputs,
        kernel=data.draw(st.sampled_from([1, 3, 5])),
    )
    assert (
        len(layers_of(grown, nn.Linear, nn.Conv2d))
        == len(layers_of(model, nn.Linear, nn.Conv2d)) + 1
    )
    assert change(model, grown, *shape) <= 1e-5


@pytest.mark.parametrize("split", SPLITS)
def test_every_layer_widened_twice_and_deepened_twice(split):
    model = lived(conv_net((4, 5), (2, 1), 3), 3, 12, 12)
    grown = model
    for layer in layers_of(model, nn.Conv2d) * 2:
        grown = widen(
            grown,
            layer,
            len(grown.get_submodule(layer).weight) + 3,
            split=split,
            seed=3,
        )
    for _ in range(2):
        grown = deepen(
            grown, layers_of(grown, nn.ReLU)[-1], statistics=torch.randn(8, 3, 12, 12)
        )
    assert change(model, grown, 3, 12, 12) <= 1e-5


@pytest.mark.parametrize("ending", ["flatten", "view", "reshape", "mean"])
def test_functions_and_methods_are_followed(ending):
    model = Plain(ending)
    for layer in ("one", "two"):
        assert (
            change(model, widen(model, layer, 11, split="asymmetric"), 3, 12, 12)
            <= 1e-5
        )


def test_a_layer_inside_a_residual_block_with_two_readers():
    model = lived(TwoBranches(), 3, 12, 12)
    plan = Widening.of(model, "inner", 9)
    assert plan.wiring.per_unit == ("norm",) and set(plan.wiring.readers) == {
        "outer",
        "side",
    }
    assert change(model, widen(model, "inner", 9), 3, 12, 12) <= 1e-5


@pytest.mark.parametrize(
    "norm", [nn.PReLU(4), nn.PReLU(), nn.BatchNorm2d(4, track_running_stats=False)]
)
def test_layers_that_keep_numbers_for_each_unit(norm):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Conv2d(4, 2, 3))
    if getattr(norm, "num_parameters", 0) == 4:
        nn.init.uniform_(norm.weight)
    assert change(model, widen(model, "0", 10), 3, 8, 8) <= 1e-5


def test_relu6_is_idempotent_and_a_layer_that_keeps_its_width_too():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU6(), nn.Linear(5, 2))
    assert change(model, deepen(model, "1"), 6) <= 1e-5
    assert change(model, widen(model, "0", 5), 6) == 0


# What cannot be kept is refused, with the reason.

conv = nn.Conv2d(4, 4, 3)
PAIR = (nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=2))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else x


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (
            nn.Linear(4, 4),
            nn.Linear(4, 4),
            nn.Linear(4, 4),
        )
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.two(self.one(x)))


def weight_normed() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))


REFUSED = {
    "no such layer": (
        nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)),
        "5",
        "there is no layer '5'; choose one of 0, 1",
    ),
    "output": (
        nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.ReLU()),
        "1",
        "leaves the network",
    ),
    "not a layer": (
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)),
        "1",
        "only Linear and Conv2d",
    ),
    "residual": (
        TwoBranches(),
        "outer",
        "meets another branch in 'add', as in a residual addition",
    ),
    "stem of residual": (TwoBranches(), "stem", "widen a layer inside the block"),
    "concatenation": (Residual(), "before", "meets another branch in 'cat'"),
    "layer norm": (
        nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)),
        "0",
        "mixes units",
    ),
    "group norm": (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 3)),
        "0",
        "replace it by Batch",
    ),
    "lrn": (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.LocalResponseNorm(3), nn.Conv2d(4, 2, 3)),
        "0",
        "mixes units",
    ),
    "unknown module": (
        nn.Sequential(nn.Linear(3, 4), nn.Softmax(1), nn.Linear(4, 2)),
        "0",
        "'1' .Softmax. .* not known",
    ),
    "grouped": (nn.Sequential(*PAIR, nn.Conv2d(4, 2, 1)), "1", "grouped convolution"),
    "grouped reader": (nn.Sequential(*PAIR), "0", "layer '1' is a grouped convolution"),
    "shared": (nn.Sequential(nn.Conv2d(3, 4, 3), conv, conv), "1", "called 2 times"),
    "read by a shared one": (
        nn.Sequential(nn.Conv2d(3, 4, 3), conv, conv),
        "0",
        "called 2 times",
    ),
    "tied": (Tied(), "one", "shares its weights with another layer"),
    "computed": (
        nn.Sequential(nn.Linear(2, 3), weight_normed(), nn.Linear(4, 2)),
        "0",
        "not known to treat",
    ),
    "computed by a hook": (
        nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 4)), nn.Linear(4, 2)),
        "0",
        "is computed",
    ),
    "branches": (
        Branching(),
        "layer",
        "cannot be traced by torch.fx .*; take branches",
    ),
    "image read as rows": (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(6, 2)),
        "0",
        "as blocks of its inputs",
    ),
    "flattened twice": (
        nn.Sequential(nn.Linear(6, 4), nn.Flatten(), nn.Linear(8, 2)),
        "0",
        "use flatten.1.",
    ),
    "flattened with the batch": (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(0), nn.Linear(8, 2)),
        "0",
        "use flatten",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_widening_is_refused_with_the_reason(case):
    model, layer, said = REFUSED[case]
    with pytest.raises(GrowthError, match=said):
        widen(model, layer, 8)
    with pytest.raises(GrowthError, match=said):
        pad(model, layer, 8)


def test_wrong_widths_and_splits_are_refused():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with pytest.raises(
        GrowthError, match="has 4 units, so it cannot be widened to 3; give 4 or more"
    ):
        widen(model, "0", 3)
    with pytest.raises(
        GrowthError, match="no split 'odd'; choose 'even' or 'asymmetric'"
    ):
        widen(model, "0", 5, split="odd")


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.GELU])
def test_deepening_behind_another_activation_is_refused_and_would_break_the_function(
    activation,
):
    model = nn.Sequential(nn.Linear(6, 5), activation(), nn.Linear(5, 2))
    with pytest.raises(GrowthError, match="keeps the function only behind"):
        deepen(model, "1")
    with pytest.raises(GrowthError, match="keeps the function only behind"):
        insert_random(model, "1")
    assert change(model, deepen(model, "1", regardless=True), 6) > 1e-3


@pytest.mark.parametrize(
    ("model", "after", "said"),
    [
        (
            nn.Sequential(nn.ReLU(), nn.Linear(3, 2)),
            "0",
            "found no Linear or Conv2d layer whose units reach '0'",
        ),
        (
            nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.ReLU()),
            "2",
            "found no Linear or Conv2d",
        ),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.PixelShuffle(2), nn.ReLU()),
            "2",
            "found no Linear or Conv2d",
        ),
        (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), "0", "name a ReLU module"),
        (
            nn.Sequential(*[nn.Linear(3, 3), relu := nn.ReLU(), nn.Linear(3, 3), relu]),
            "1",
            "called 2 times",
        ),
    ],
)
def test_deepening_in_a_wrong_place_is_refused(model, after, said):
    with pytest.raises(GrowthError, match=said):
        deepen(model, after)


@pytest.mark.parametrize("kernel", [2, 0, -1])
def test_a_kernel_without_a_centre_is_refused(kernel):
    with pytest.raises(GrowthError, match="has no centre"):
        deepen(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), "1", kernel=kernel)


@pytest.mark.parametrize(
    "norm",
    [nn.LocalResponseNorm(3, alpha=1.0), nn.LayerNorm((4, 6, 6)), nn.GroupNorm(2, 4)],
    ids=lambda n: type(n).__name__,
)
def test_norms_that_mix_units_really_break_the_function(norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 2, 3))
    assert change(model, widen(model, "0", 10, regardless=True), 3, 8, 8) > 1e-2


# What the copies are, and what random growth is.


@drawn
@given(
    st.integers(1, 9), st.integers(0, 12), st.sampled_from(SPLITS), st.integers(0, 99)
)
def test_shares_add_up_to_one_over_the_copies_of_a_unit(units, more, split, seed):
    copies = copy_units(units, units + more, split, seed)
    assert (
        copies.source[:units].tolist() == list(range(units))
        and copies.source.max() < units
    )
    assert copies.share.min() > 0
    sums = torch.zeros(units).double().index_add(0, copies.source, copies.share)
    torch.testing.assert_close(sums, torch.ones(units).double())
    if split == "even":
        counts = copies.source.bincount()[copies.source]
        torch.testing.assert_close(copies.share, 1 / counts.double())
    elif more:
        assert (
            copies.share - 1 / copies.source.bincount()[copies.source]
        ).abs().max() > 0


def test_noise_moves_new_units_only_and_by_the_stated_amount():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 40), nn.ReLU(), nn.Linear(40, 2))
    plain, noisy = (
        widen(model, "0", 80, noise=noise, seed=4)[0].weight for noise in (0.0, 0.1)
    )
    assert torch.equal(plain[:40], noisy[:40])
    assert (noisy - plain)[40:].std().item() == pytest.approx(
        0.1 * model[0].weight.std().item(), rel=0.1
    )


def test_the_model_given_is_untouched_and_seeds_repeat():
    model = lived(conv_net((4, 5), (1, 1), 3), 3, 12, 12)
    before = fingerprint(model)
    x = torch.randn(4, 3, 12, 12)
    makers = [
        lambda seed: widen(model, "0", 9, noise=0.1, seed=seed),
        lambda seed: pad(model, "0", 9, seed=seed),
        lambda seed: insert_random(model, "2", seed=seed, batch_norm=True),
    ]
    for make in makers:
        assert fingerprint(make(1)) == fingerprint(make(1)) != fingerprint(make(2))
    grown = deepen(model, "2", statistics=x)
    with torch.no_grad():
        for parameter in grown.parameters():
            parameter.add_(1)
    assert fingerprint(model) == before and model.training and grown.training
    assert not any(
        module.training for module in deepen(model.eval(), "2", statistics=x).modules()
    )


def test_padding_leaves_old_weights_alone_and_starts_new_ones_at_ordinary_scale():
    torch.manual_seed(0)
    model = lived(
        nn.Sequential(
            nn.Conv2d(3, 20, 3),
            nn.BatchNorm2d(20),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(720, 30),
        ),
        3,
        8,
        8,
    )
    grown = pad(model, "0", 60)
    assert torch.equal(grown[0].weight[:20], model[0].weight) and torch.equal(
        grown[0].bias[:20], model[0].bias
    )
    assert torch.equal(grown[4].weight[:, :720], model[4].weight) and torch.equal(
        grown[4].bias, model[4].bias
    )
    assert torch.equal(grown[1].running_var[:20], model[1].running_var) and bool(
        (grown[1].running_var[20:] == 1).all()
    )
    for new, fan_in in (
        (grown[0].weight[20:], 27),
        (grown[4].weight[:, 720:], 60 * 36),
    ):
        assert new.std().item() == pytest.approx((1 / (3 * fan_in)) ** 0.5, rel=0.1)
    assert change(model, grown, 3, 8, 8) > 0.05
    assert change(model, pad(model, "0", 60, outgoing=0.0), 3, 8, 8) <= 1e-5


def test_a_random_layer_changes_the_function_and_has_ordinary_scale():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 2))
    grown = insert_random(model, "1", batch_norm=True)
    assert [type(part) for part in grown[1]] == [
        nn.ReLU,
        nn.Linear,
        nn.BatchNorm1d,
        nn.ReLU,
    ]
    assert grown[1][1].weight.std().item() == pytest.approx((1 / 120) ** 0.5, rel=0.1)
    assert change(model, grown, 6) > 0.1


# Gradients and optimisers.


def gradients(model: nn.Module) -> dict[str, Tensor]:
    x = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(5)).to(
        next(model.parameters())
    )
    model.zero_grad()
    F.cross_entropy(model(x), torch.arange(16) % 3).backward()
    return {
        name: parameter.grad.clone() for name, parameter in model.named_parameters()
    }


OPTIMIZERS = {
    "momentum": lambda parameters: torch.optim.SGD(
        parameters, lr=0.01, momentum=0.9, nesterov=True
    ),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.001, amsgrad=True),
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_the_grown_network_are_the_mapped_gradients(split, training):
    model = lived(conv_net((4, 5), (2, 1), 3), 3, 12, 12).double().train(training)
    plan = Widening.of(model, "3", 9, split=split, seed=1)
    before, after = (
        gradients(model),
        gradients(widen(model, "3", 9, split=split, seed=1)),
    )
    axes = plan.axes(model)
    assert set(axes) > {"3.weight", "3.bias", "4.weight", "4.bias", "6.weight"}
    for name, gradient in before.items():
        mapped = plan.gradient(gradient, axes[name]) if name in axes else gradient
        torch.testing.assert_close(after[name], mapped, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_memory_that_is_carried_over_is_what_the_grown_network_would_have_had(name):
    """With a rate of 0 the networks stay in place: the memory of both is then made of
    the same batch's gradients.
    """
    model = lived(conv_net((4, 5), (2, 1), 3), 3, 12, 12).double()
    plan, grown = (
        Widening.of(model, "0", 9, seed=1, split="asymmetric"),
        widen(model, "0", 9, seed=1, split="asymmetric"),
    )
    first, own = (
        OPTIMIZERS[name](model.parameters()),
        OPTIMIZERS[name](grown.parameters()),
    )
    for group in (*first.param_groups, *own.param_groups):
        group["lr"] = 0.0
    for _ in range(3):
        gradients(model), first.step()
        gradients(grown), own.step()
    carried = carry_over(first, model, grown, plan)
    assert carried.param_groups[0]["lr"] == 0.0 and len(own.state) == len(carried.state)
    for parameter, memory in own.state.items():
        for key, value in memory.items():
            torch.testing.assert_close(
                carried.state[parameter][key], value, rtol=1e-6, atol=1e-12
            )


def test_new_layers_join_the_first_group_without_memory():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    groups = [
        {"params": model[0].parameters(), "lr": 0.1},
        {"params": model[2].parameters(), "lr": 0.2},
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    F.cross_entropy(model(torch.randn(4, 6)), torch.arange(4) % 3).backward()
    optimizer.step()
    grown = deepen(model, "1")
    carried = carry_over(optimizer, model, grown)
    assert [len(group["params"]) for group in carried.param_groups] == [4, 2]
    assert [group["lr"] for group in carried.param_groups] == [0.1, 0.2]
    assert grown[1][1].weight not in carried.state and len(carried.state) == 4
    padded_model = pad(model, "0", 8)
    assert (
        len(carry_over(optimizer, model, padded_model).state) == 1
    )  # only the last bias kept its shape
    with pytest.raises(GrowthError, match="parameters that are not the model's"):
        carry_over(optimizer, grown, model)


def test_a_memory_that_is_not_known_is_refused():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    optimizer = torch.optim.Rprop(model.parameters())
    F.cross_entropy(model(torch.randn(4, 6)), torch.arange(4) % 3).backward()
    optimizer.step()
    with pytest.raises(
        GrowthError, match="it is not known how 'prev' of this optimiser grows"
    ):
        carry_over(optimizer, model, widen(model, "0", 7), Widening.of(model, "0", 7))


@pytest.mark.parametrize(
    ("split", "noise", "apart"),
    [("even", 0.0, False), ("even", 0.05, True), ("asymmetric", 0.0, True)],
)
def test_exact_even_copies_stay_copies_under_training(split, noise, apart):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    grown, source = (
        widen(model, "0", 8, split=split, noise=noise),
        copy_units(5, 8, split).source,
    )
    optimizer = torch.optim.SGD(grown.parameters(), lr=0.5)
    start = grown[0].weight.detach().clone()
    for step in range(20):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step)).double()
        loss = F.cross_entropy(grown(x), (x[:, :3]).argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (grown[0].weight - start).abs().max() > 0.1
    distance = (grown[0].weight - grown[0].weight[source]).abs().max().item()
    assert (distance > 1e-3) == apart and (apart or distance < 1e-12)


# The study.

TINY = Settings(
    first=6,
    second=6,
    cool=2,
    every=3,
    batch=8,
    validation=20,
    curve_images=30,
    test_images=60,
    rate=0.02,
    widths=(4, 6, 6),
    to_20=((0, 1, 2),),
    to_8=((0,), (1,)),
)


def test_the_study_measures_every_arm_at_its_cost(squares):
    found = measure(squares, 0, "quick", lambda line: None, TINY)
    phases = found["phases"]
    assert {phase: set(arms) for phase, arms in phases.items()} == {
        "wider": {"teacher", "scratch", "net2net", "noisy", "random", "zero"},
        "deeper_8": {"teacher", "scratch", "net2net", "random"},
        "deeper_20": {"teacher", "scratch", "net2net", "random"},
    }
    for arms in phases.values():
        for schedule in ("early", "late"):
            runs = {name: arm[schedule] for name, arm in arms.items()}
            grown = {runs[name]["parameters"] for name in arms if name != "teacher"}
            assert max(grown) - min(grown) <= 0.01 * max(grown) and runs["teacher"][
                "parameters"
            ] < min(grown)
            assert (
                runs["teacher"]["flops"]
                < runs["net2net"]["flops"]
                < runs["scratch"]["flops"]
            )
            for run in runs.values():
                costs = [row["flops"] for row in run["curve"]]
                assert (
                    costs == sorted(costs)
                    and costs[0] == 0
                    and costs[-1] == run["flops"]
                )
                assert run["curve"][-1]["step"] == 12 and 0 <= run["test"] <= 1
    at_growth = [
        row["test"]
        for row in phases["deeper_8"]["net2net"]["late"]["curve"]
        if row["step"] == 6
    ]
    assert (
        len(at_growth) == 2 and at_growth[0] == at_growth[1]
    )  # deepening keeps every answer
    same = [
        phases["deeper_8"]["scratch"]["late"],
        phases["deeper_20"]["teacher"]["late"],
    ]
    assert (
        same[0] == same[1]
    )  # the 8-layer network is the reference of one phase and the teacher of the next


def test_every_way_to_grow_ends_in_the_size_of_the_reference(squares):
    growing = Growing(squares, 0, TINY)
    thin, wide = (2, 3, 3), growing.start(TINY.widths, TINY.convolutions).model
    for growth in (widened(0.1), padded(1.0)):
        model = growth(growing, growing.start(thin, TINY.convolutions)).model
        assert [p.shape for p in model.parameters()] == [
            p.shape for p in wide.parameters()
        ]
    run = deepened((0, 2))(growing, growing.start(TINY.widths, TINY.convolutions))
    deep = growing.start(TINY.widths, (3, 1, 2)).model
    kernels = [
        [
            module.weight.shape
            for module in each.modules()
            if isinstance(module, nn.Conv2d)
        ]
        for each in (run.model, deep)
    ]
    assert kernels[0] == kernels[1]


def test_flops_are_those_counted_by_hand(squares):
    growing = Growing(squares, 0, TINY)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 5))
    assert (
        growing._step_flops(model) == 2 * 2 * 8 * 3072 * 5
    )  # a forward pass, and the gradient in the weights


def test_the_rate_falls_as_stated(squares):
    growing = Growing(squares, 0, TINY)
    assert [growing.factor(step, "early") for step in (0, 5, 6, 11)] == [
        1.0,
        1.0,
        0.1,
        0.1,
    ]
    assert [growing.factor(step, "late") for step in (0, 6, 9, 10, 11)] == [
        1.0,
        1.0,
        1.0,
        0.1,
        0.1,
    ]


def test_choosing_and_reaching():
    arm = {
        "early": {"validation": 0.4, "test": 0.9},
        "late": {"validation": 0.5, "test": 0.1},
    }
    assert choose(arm) == "late"
    curve = [
        {"flops": 0.0, "test": 0.1},
        {"flops": 5.0, "test": 0.6},
        {"flops": 9.0, "test": 0.5},
    ]
    assert cost_to_reach(curve, 0.5) == 5.0 and cost_to_reach(curve, 0.7) is None
