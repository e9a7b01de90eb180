"""Growing networks: the function is kept or the growth refused, gradients and
optimisers follow the stated rule.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.mobilenetv2 import InvertedResidual

from minisupernet.course.records import fingerprint
from minisupernet.course.report.net2net import choose, cost_to_reach
from minisupernet.course.studies.growing import Growing, Settings, conv_net
from minisupernet.course.studies.net2net import (
    deepened,
    measure,
    padded,
    widened,
)
from minisupernet.errors import GrowthError
from minisupernet.net2net import (
    Widening,
    carry_over,
    check_answers,
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


class Written(nn.Module):
    """A network of two linear layers, or of given parts, with a forward of its own."""

    def __init__(self, call: Callable[..., object], **parts: object) -> None:
        super().__init__()
        self.one, self.two, self.call = nn.Linear(4, 6), nn.Linear(6, 2), call
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> object:
        return self.call(self, x)


def images(call: Callable[..., object], **parts: object) -> Written:
    """The same of two convolutions, 3 channels to 4 to 2."""
    one, two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
    return Written(call, **{"one": one, "two": two, **parts})


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


def depthwise(channels: int, times: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, channels * times, 3, padding=1, groups=channels)


FOLLOWED = {
    "mean that keeps axes": images(
        lambda net, x: net.two(net.one(x).mean((2, 3), True))
    ),
    "means one by one": images(
        lambda net, x: net.head(net.one(x).mean(3).amax(-1)), head=nn.Linear(4, 3)
    ),
    "pixels in a row": images(
        lambda net, x: net.head(net.one(x).flatten(2).mean(-1)), head=nn.Linear(4, 3)
    ),
    "a gate of its own": images(
        lambda net, x: net.two((h := net.one(x)) * F.adaptive_avg_pool2d(h, 1))
    ),
    "leaky by hand": images(
        lambda net, x: net.two(torch.where((h := net.one(x)) > 0, h, 0.1 * h))
    ),
    "in place": images(lambda net, x: net.two(F.relu(net.one(x), inplace=True).neg_())),
    "a number": images(
        lambda net, x: net.two(net.one(x) * net.scale),
        scale=nn.Parameter(torch.rand(1)),
    ),
    "sizes asked": images(
        lambda net, x: net.two(h := net.one(x)) / h.size(-1) + h.shape[0] + h.dim()
    ),
    "depthwise": images(lambda net, x: net.two(net.per(net.one(x))), per=depthwise(4)),
    "depthwise, three for one": images(
        lambda net, x: net.head(net.per(net.norm(net.deep(net.one(x)))).flatten(1)),
        deep=depthwise(4, 3),
        norm=nn.BatchNorm2d(12),
        per=depthwise(12, 2),
        head=nn.Linear(24 * 36, 3),
    ),
    "named inputs": Written(
        lambda net, x: net.two(input=F.relu(input=net.one(input=x)))
    ),
    "tokens": Written(lambda net, x: net.two(net.one(x[:, None]).relu().mean(-2))),
    "a head for training": Written(
        lambda net, x: net.two(h := net.one(x)) + (net.side(h) if net.training else 0),
        side=nn.Linear(6, 2),
    ),
    "a norm computed elsewhere": nn.Sequential(
        *(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5)),
        nn.utils.parametrizations.spectral_norm(nn.Linear(5, 2)),
    ),
}


@pytest.mark.parametrize("case", FOLLOWED)
@pytest.mark.parametrize("training", [False, True])
def test_what_treats_each_unit_by_itself_is_followed(case, training):
    model = copy.deepcopy(FOLLOWED[case]).double().train(training)
    layer = "one" if isinstance(model, Written) else "0"
    images = isinstance(model.get_submodule(layer), nn.Conv2d)
    x = torch.randn(5, *((3, 6, 6) if images else (4,))).double()
    torch.manual_seed(0)
    with torch.no_grad():
        grown = widen(model, layer, 11, split="asymmetric", inputs=x)
        after, before = grown(x.clone()), model(x.clone())
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-12)


class Optional(nn.Module):
    """What it does hangs on arguments that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, gate: Tensor | None = None, kind: str = "plain"):
        h = torch.relu(self.one(x))
        if gate is not None:
            return self.two(h) * h.sum(1, keepdim=True) * gate
        return self.two(h if kind == "plain" else h.softmax(1))


def test_the_call_that_is_made_is_read():
    """With its required arguments, or with as many as there are examples."""
    model, x = Optional(), torch.randn(5, 4)
    torch.testing.assert_close(widen(model, "one", 9, inputs=x)(x), model(x))
    with pytest.raises(GrowthError, match="'sum' after layer 'one' is not known to"):
        widen(model, "one", 9, inputs=(x, torch.ones(5, 1)))
    several = Written(None)
    several.forward = lambda *given: None  # an instance's own forward is what is called
    with pytest.raises(GrowthError, match="is called 0 times"):
        widen(several, "one", 9)


def test_inverted_residuals_of_mobilenet_widen_inside_and_deepen():
    block = InvertedResidual(4, 4, 1, 3)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), block, nn.Flatten(), nn.Linear(4 * 100, 3)
    )
    model = lived(model, 3, 12, 12)
    plan = Widening.of(model, "1.conv.0.0", 17)
    assert plan.wiring.per_unit == ("1.conv.0.1", "1.conv.1.0", "1.conv.1.1")
    assert plan.wiring.readers == ("1.conv.2",)
    grown = widen(model, "1.conv.0.0", 17)
    layer = grown[1].conv[1][0]
    assert (layer.in_channels, layer.out_channels, layer.groups) == (17, 17, 17)
    assert change(model, grown, 3, 12, 12) <= 1e-5
    deeper = deepen(grown, "1.conv.1.2", statistics=torch.randn(4, 3, 12, 12))
    assert change(model, deeper, 3, 12, 12) <= 1e-5
    for name, said in {
        "1.conv.1.0": "a group for each channel, so its channels are those of",
        "1.conv.2": "meets another branch in 'add', as in a residual addition",
    }.items():
        with pytest.raises(GrowthError, match=said):
            widen(model, name, 20)


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


class Defaulting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor, gate: Tensor | None = None, **more: object) -> Tensor:
        h = self.one(x)
        if gate is None and more.get("gate") is None:
            return self.two(h) + h.sum(1, keepdim=True)
        return self.two(h)


@torch.fx.wrap
def tanh(x: Tensor) -> Tensor:
    """Has torch's name, and mixes units."""
    return x.softmax(1)


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


def with_hook(place: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.ReLU()), nn.Linear(6, 2))
    model.get_submodule(place).register_forward_hook(lambda module, given, out: 2 * out)
    return model


def with_a_mask() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    model[0].register_buffer("mask", torch.ones(6, 4))
    return model


class Transposed(nn.Module):
    """A parametrisation that ties a weight to that of a layer it hides in a list."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.hidden = [layer]

    def forward(self, weight: Tensor) -> Tensor:
        return self.hidden[0].weight.T


def secretly_tied() -> nn.Module:
    layers = [nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 6), nn.Linear(6, 4)]
    model = nn.Sequential(*layers)
    nn.utils.parametrize.register_parametrization(
        model[3], "weight", Transposed(model[0])
    )
    return model


class Counting(nn.Module):
    """A network that goes another way when forward is asked what its input is."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        return self.two(h.softmax(1) if isinstance(x, Tensor) else h)


def weight_normed() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))


RESHAPES = [
    lambda net, x: net.head(net.one(x).view(-1, 4)),
    lambda net, x: net.head(net.one(x).view(2, -1)),
    lambda net, x: net.head(net.one(x).view(x.size(0), -1)),
    lambda net, x: net.head(net.one(x).view(net.two.weight.size(0), -1)),
    lambda net, x: net.head(net.one(x).flatten()),
    lambda net, x: net.head(net.one(x).flatten(0, 1)),
    lambda net, x: net.head(net.one(x).mean(3).flatten(1).flatten(0)),
]
UNKNOWN = [
    lambda net, x: net.two(net.one(x).softmax(1)),
    lambda net, x: net.two(F.normalize(net.one(x))),
    lambda net, x: net.two(net.one(x).mean()),
    lambda net, x: net.two(net.one(x).sum(-1, True)),
    lambda net, x: net.two(net.one(x).mean(axis=0)),
    lambda net, x: net.two(torch.mean(net.one(x), dim=1)),
    lambda net, x: net.two(net.one(x)[:, :6]),
    lambda net, x: net.two(net.one(x).chunk(2, 1)[0]),
    lambda net, x: net.two(net.one(x).T),
    lambda net, x: net.two(net.one(x).permute(1, 0)),
    lambda net, x: net.two(net.one(x) @ net.two.weight.T),
    lambda net, x: net.two(F.layer_norm(net.one(x), (6,))),
    lambda net, x: net.two(F.relu(net.one(x).cumsum(1))),
    lambda net, x: net.two((h := net.one(x)) + torch.randn_like(h)),
    lambda net, x: net.two(tanh(net.one(x))),
]
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
        "a weight of layer '1' is computed from others",
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
    "read by the output": (
        Written(lambda net, x: {"answer": net.two(h := net.one(x)), "inner": [h]}),
        "one",
        "leaves the network",
    ),
    "default": (
        Defaulting(),
        "one",
        "'sum' after layer 'one' is not known to leave out the units",
    ),
    "tied decoder": (
        Written(lambda net, x: torch.tanh(net.two(net.one(x)) @ net.two.weight)),
        "one",
        "'two.weight', .* is also read elsewhere .* shares its weights",
    ),
    "weight elsewhere": (
        Written(lambda net, x: net.two(net.one(x)) + F.linear(x, net.one.weight).sum()),
        "one",
        "'one.weight', .* is also read elsewhere",
    ),
    "buffer elsewhere": (
        Written(
            lambda net, x: net.two(net.norm(net.one(x))) * net.norm.running_var.mean(),
            norm=nn.BatchNorm1d(6),
        ),
        "one",
        "'norm.running_var', .* is also read elsewhere",
    ),
    "size elsewhere": (
        Written(lambda net, x: net.two(net.one(x)) / net.one.out_features),
        "one",
        "would take other steps .* a look at out_features",
    ),
    "numbers made of weights": (
        Written(
            lambda net, x: net.two(net.one(x)) + sum(p.sum() for p in net.parameters())
        ),
        "one",
        "would take other steps",
    ),
    "secretly tied": (secretly_tied(), "0", "what Transposed does inside '3'"),
    "hook on a layer": (with_hook("0"), "0", "'0' has forward hooks, .* remove them"),
    "hook on a block": (with_hook("1"), "0", "'1' has forward hooks"),
    "hook on all": (with_hook(""), "0", "the network has forward hooks"),
    "what else a layer holds": (with_a_mask(), "0", "holds more than a Linear does"),
    "type asked": (Counting(), "one", "forward asks what type a value is"),
    "lazy": (
        nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(2)),
        "0",
        "sizes are not known yet; run it on one batch",
    ),
    "of another kind": (
        nn.Sequential(nn.Conv1d(3, 4, 1), nn.Conv1d(4, 2, 1)),
        "0",
        "is Conv1d; only",
    ),
    "read by another kind": (
        nn.Sequential(nn.Linear(5, 4), nn.Conv1d(4, 2, 1)),
        "0",
        "'1' .Conv1d. .* is not known",
    ),
    "pooled units": (
        nn.Sequential(nn.Linear(4, 6), nn.AvgPool2d((1, 3)), nn.Linear(2, 2)),
        "0",
        "'1' .AvgPool2d. pools over the units",
    ),
    "pooled tokens": (
        Written(lambda net, x: net.two(F.max_pool1d(net.one(x), 1))),
        "one",
        "is not known to treat each unit",
    ),
    "norm on the wrong axis": (
        nn.Sequential(nn.Linear(4, 6), nn.BatchNorm2d(6), nn.Linear(6, 2)),
        "0",
        "as blocks of its inputs",
    ),
    "norm of tokens": (
        nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(7), nn.Linear(6, 2)),
        "0",
        "as blocks of its inputs",
    ),
    "another branch's gate": (
        images(
            lambda net, x: net.two(net.one(x) * net.gate(x)), gate=nn.Conv2d(3, 1, 1)
        ),
        "one",
        "meets another branch in 'mul'",
    ),
    "a scale for each unit": (
        Written(
            lambda net, x: net.two(net.one(x) * net.scale),
            scale=nn.Parameter(torch.ones(6)),
        ),
        "one",
        "meets another branch in 'mul'",
    ),
    "in another shape": (
        images(lambda net, x: net.two((h := net.one(x)) + h.mean((2, 3)))),
        "one",
        "meets another branch in 'add'",
    ),
    "number of units asked": (
        Written(lambda net, x: net.two((h := net.one(x)) / h.shape[-1])),
        "one",
        "asks for the number of units",
    ),
    "random in eval mode": (
        Written(lambda net, x: net.two(F.dropout(net.one(x), 0.5))),
        "one",
        "is random in eval mode too; give it training=self.training",
    ),
    "in eval mode only": (
        Written(
            lambda net, x: net.two(net.one(x) if net.training else x.new_ones(1, 6))
        ),
        "one",
        "is called 0 times in a forward pass in eval mode",
    ),
    "another reader in training": (
        Written(
            lambda net, x: (
                net.two(net.one(x))
                if net.training
                else net.three(net.one(x)) + net.two(x @ x.new_ones(4, 6))
            ),
            three=nn.Linear(6, 2),
        ),
        "one",
        "'two', which changes with layer 'one', is also read elsewhere",
    ),
    **{
        f"reshape {place}": (
            images(call, head=nn.Linear(4, 3)),
            "one",
            "use flatten.1.",
        )
        for place, call in enumerate(RESHAPES)
    },
    **{
        f"unknown {place}": (Written(call), "one", "is not known to")
        for place, call in enumerate(UNKNOWN)
    },
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


def test_wrong_settings_are_refused():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with pytest.raises(GrowthError, match="a whole number of units, not 6.0"):
        widen(model, "0", 6.0)
    for noise in (-1.0, float("nan"), float("inf")):
        with pytest.raises(GrowthError, match="noise of .* cannot be drawn"):
            widen(model, "0", 6, noise=noise)
    one = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    with pytest.raises(GrowthError, match="and two weights or more"):
        widen(one, "0", 2, noise=0.1)


def test_a_group_norm_gets_only_widths_that_its_groups_divide():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 3))
    with pytest.raises(GrowthError, match="9 channels cannot be divided into the 2"):
        widen(model, "0", 9, regardless=True)
    assert widen(model, "0", 10, regardless=True)[1].num_channels == 10


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


class Acting(nn.Module):
    """Two convolutions of an image, 1 channel and 5, and one activation."""

    def __init__(self, call: Callable[..., Tensor], act: nn.Module) -> None:
        super().__init__()
        self.gate, self.conv = nn.Conv2d(3, 1, 3), nn.Conv2d(3, 5, 3)
        self.act, self.call = act, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


@pytest.mark.parametrize(
    "call",
    [
        lambda net, x: net.act(torch.sigmoid(net.gate(x)) * net.conv(x)),
        lambda net, x: net.act(net.conv(x) + net.gate(x)),
        lambda net, x: net.act(F.max_pool2d(net.conv(x), 2) * 0.5),
    ],
)
def test_where_branches_meet_the_new_layer_has_the_units_of_both(call):
    model = Acting(call, nn.ReLU())
    x = torch.randn(4, 3, 8, 8)
    grown = deepen(model, "act", statistics=x, inputs=x)
    assert grown.act[1].in_channels == 5 and change(model, grown, 3, 8, 8) <= 1e-5


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda net, x: net.act(net.conv(x) * x.mean()), "found no Linear or Conv2d"),
        (lambda net, x: net.act(net.conv(x).flatten(1)), "found no Linear or Conv2d"),
        (lambda net, x: net.act(net.conv(x).softmax(1)), "found no Linear or Conv2d"),
        (lambda net, x: net.act(h := net.conv(x)).add_(1) + h, "read after it; make"),
        (
            lambda net, x: (
                F.relu(net.conv(x)) if net.training else net.act(net.conv(x))
            ),
            "is called 0 times in a forward pass in training mode",
        ),
        (
            lambda net, x: (
                net.act(net.conv(x)) * (1 if isinstance(net.act, nn.ReLU) else 2)
            ),
            "would take other steps .* at a module's type",
        ),
        (lambda net, x: net.act(net.conv(x)) * net.act.inplace, "cannot be traced"),
    ],
)
def test_a_layer_that_would_not_do_nothing_is_refused(call, said):
    with pytest.raises(GrowthError, match=said):
        deepen(Acting(call, nn.ReLU(inplace=True)), "act")


def test_an_activation_with_two_names_is_replaced_under_both():
    model = Acting(lambda net, x: net.other(net.conv(x)), nn.ReLU())
    model.other = model.act
    for name in ("act", "other"):
        grown = deepen(model, name)
        assert grown.act is grown.other and len(grown.act) == 3
        assert change(model, grown, 3, 8, 8) <= 1e-5


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (
            torch.randn(8, 6, 4),
            r"puts out \(8, 6, 5\), and BatchNorm would not normalise",
        ),
        (torch.randn(8, 3), "does not run on the batch given as statistics"),
        (torch.full((8, 4), torch.nan), "numbers that are not finite"),
    ],
)
def test_statistics_that_batch_norm_cannot_undo_are_refused(batch, said):
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    with pytest.raises(GrowthError, match=said):
        deepen(model, "1", statistics=batch)
    tokens = torch.randn(8, 6, 4)
    torch.testing.assert_close(deepen(model, "1", inputs=tokens)(tokens), model(tokens))


# Examples are the check: what reading misses, the answers show.


def tensor(x: object) -> bool:
    return type(x) is Tensor


MISSED = {
    "norm of as many tokens as units": (
        nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)),
        torch.randn(8, 6, 4),
        "the grown network does not run on the example inputs",
    ),
    "an image without a batch": (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 2)),
        torch.randn(3, 8, 8),
        "the grown network does not run on the example inputs",
    ),
    "a look at the type": (
        Written(
            lambda net, x: net.two(net.one(x).softmax(1) if tensor(x) else net.one(x))
        ),
        torch.randn(8, 4),
        r"answers to these inputs differ by \d\.\de[+-]\d\d of their size",
    ),
}


@pytest.mark.parametrize("case", MISSED)
def test_what_reading_misses_examples_show(case):
    model, x, said = MISSED[case]
    with pytest.raises(GrowthError, match=said):
        widen(model, "0" if isinstance(model, nn.Sequential) else "one", 12, inputs=x)


@pytest.mark.parametrize(
    "inputs", [3, (), [torch.ones(2, 3), 1], torch.ones(0, 3), torch.ones(2, 3).numpy()]
)
def test_examples_that_are_none_are_refused(inputs):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    for grow in (lambda: widen(model, "0", 5, inputs=inputs),) * 2:
        with pytest.raises(GrowthError, match="must be a tensor or a tuple of tensors"):
            grow()
    with pytest.raises(GrowthError, match="network does not run on the example"):
        deepen(model, "1", inputs=torch.ones(2, 7))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.half, torch.complex64]
)
def test_answers_agree_within_the_rounding_of_the_dtype(dtype):
    torch.manual_seed(0)
    layers = [
        nn.Linear(6, 50),
        nn.Tanh(),
        nn.Linear(50, 40),
        nn.Tanh(),
        nn.Linear(40, 3),
    ]
    model, x = nn.Sequential(*layers).to(dtype), torch.randn(9, 6).to(dtype)
    for split in SPLITS:
        assert len(widen(model, "2", 97, split=split, inputs=x)[2].weight) == 97
    with torch.no_grad():
        model[4].weight.zero_(), model[4].bias.zero_()
    widen(model, "2", 97, inputs=x)  # answers of 0 stay 0
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong[4].bias[0] = 1e-3
    with pytest.raises(GrowthError, match="differ by inf of their size"):
        check_answers(model, wrong, x)


def test_answers_of_any_form_are_compared():
    both = lambda net, x: {"a": (net.two(net.one(x)), 3), "b": [x.argmax(1)]}  # noqa: E731
    model, x = Written(both), torch.randn(4, 4)
    check_answers(model, widen(model, "one", 9), x)
    other = widen(model, "one", 9)
    other.call = lambda net, x: {"a": (net.two(net.one(x)), 3), "b": [x.argmin(1)]}
    with pytest.raises(GrowthError, match="differ by"):
        check_answers(model, other, x)
    other.call = lambda net, x: net.two(net.one(x))
    with pytest.raises(GrowthError, match="other shapes, or none"):
        check_answers(model, other, x)


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


def test_nothing_that_is_given_is_touched():
    """Neither what a model keeps from its last call, nor its hooks, mode and count, nor
    the random numbers of the process.
    """
    model = Written(keep, last=None, calls=0, inner=nn.Sequential(nn.ReLU()))
    model(torch.randn(3, 4))
    model.inner.eval()
    kept, x, random = model.last, torch.randn(3, 4), torch.get_rng_state()
    grown = widen(model, "one", 9, inputs=x)
    deepen(model, "inner.0", statistics=x, inputs=x)
    insert_random(model, "inner.0", batch_norm=True), pad(model, "one", 7)
    assert model.last is kept and type(kept) is Tensor and model.calls == 1
    assert model.training and not model.inner.training and grown.training
    assert torch.equal(random, torch.get_rng_state())
    assert vars(model.one).keys() == vars(nn.Linear(1, 1)).keys()


def keep(net: Written, x: Tensor) -> Tensor:
    net.calls += 1
    net.last = net.inner(net.one(x))
    return net.two(net.last)


def test_a_layer_may_be_named_by_any_of_its_names():
    model = Written(lambda net, x: net.two(net.alias(x)), alias=None)
    model.alias = model.one
    optimizer = torch.optim.Adam(model.parameters())
    F.cross_entropy(model(torch.randn(4, 4)), torch.arange(4) % 2).backward()
    optimizer.step()
    plan, grown = Widening.of(model, "alias", 9), widen(model, "alias", 9)
    assert plan.wiring.layer == "one" and grown.alias is grown.one
    assert len(carry_over(optimizer, model, grown, plan).state) == 4


def test_a_model_that_cannot_be_copied_is_refused():
    class Fixed(nn.Identity):
        def __deepcopy__(self, memo: dict) -> None:
            raise TypeError("there is one of me")

    model = nn.Sequential(nn.Linear(3, 4), Fixed(), nn.Linear(4, 2))
    with pytest.raises(GrowthError, match="cannot be copied .there is one of me."):
        widen(model, "0", 5)


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


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_memory_of_depthwise_layers_is_carried_over_too(name):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 1), depthwise(4, 2), nn.BatchNorm2d(8), nn.ReLU6()),
        *(nn.Conv2d(8, 3, 3), nn.Flatten(), nn.Linear(300, 3)),
    ).double()
    options = {"split": "asymmetric", "seed": 1}
    plan, grown = Widening.of(model, "0", 7, **options), widen(model, "0", 7, **options)
    first, own = (OPTIMIZERS[name](each.parameters()) for each in (model, grown))
    for group in (*first.param_groups, *own.param_groups):
        group["lr"] = 0.0
    for _ in range(3):
        gradients(model), first.step()
        gradients(grown), own.step()
    carried = carry_over(first, model, grown, plan)
    assert len(own.state) == len(carried.state) == 10
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


def test_a_memory_that_belongs_to_all_parameters_is_refused():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    optimizer = torch.optim.LBFGS(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(torch.ones(4, 6)), torch.arange(4) % 3)
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.raises(GrowthError, match="it is not known how .* grows"):
        carry_over(optimizer, model, deepen(model, "1"))


def test_named_parameters_stay_named_and_lost_ones_are_refused():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    carried = carry_over(optimizer, model, deepen(model, "1"))
    names = ["0.weight", "0.bias", "2.weight", "2.bias", "1.1.weight", "1.1.bias"]
    assert carried.param_groups[0]["param_names"] == names
    model[1] = nn.PReLU()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(GrowthError, match="that the grown network does not have"):
        carry_over(optimizer, model, deepen(model, "1", regardless=True))


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
