"""Random small networks, grown: the function is kept, or the growth refused by a
GrowthError; never anything else, and the network given stays as it was.

The networks are lists of steps, each a layer, a function of torch or a trick that users
play: weights read elsewhere, tied or computed, branches, hooks, reshapes, reductions.
`make test` grows a few hundred, the same each time; MINISUPERNET_LONG=1 grows 10,000
new ones.
"""

import copy
import os
import random
from collections import Counter
from collections.abc import Callable

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from minisupernet.errors import GrowthError
from minisupernet.net2net import deepen, widen

LONG = bool(os.environ.get("MINISUPERNET_LONG"))
many = settings(
    max_examples=5_000 if LONG else 150,
    derandomize=not LONG,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
INPUTS = {"images": (3, 2, 6, 6), "vectors": (3, 4), "tokens": (3, 7, 4)}


class Net(nn.Module):
    """A network made of steps, each of which gets all values so far; its answer is made
    of the last two.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.ending, self.last = [], lambda last, before: last, None
        self.recipe = []

    def forward(self, x: Tensor, gate: Tensor | None = None) -> object:
        values = [x]
        for step in self.steps:
            values.append(step(self, values))
        if gate is not None:
            return values[-1] * gate
        return self.ending(*values[:-3:-1])

    def __repr__(self) -> str:
        return f"{self.recipe} {self._modules}"

    def part(self, module: nn.Module) -> str:
        """Keep a module under the next free name."""
        name = f"part{len(self._modules)}"
        self.add_module(name, module)
        return name


# What steps do: modules made for a value of some size, functions of a value, of two, of
# a value and a layer, of a value and the network.

LINEAR = {
    "linear": lambda pick, size: nn.Linear(size[-1], pick(1, 6), bias=pick(0, 1) > 0),
}
CONVOLUTIONS = {
    "conv": lambda pick, size: nn.Conv2d(
        size[1], pick(1, 6), 3, padding=1, bias=pick(0, 1) > 0
    ),
    "point": lambda pick, size: nn.Conv2d(size[1], pick(1, 6), 1),
    "depthwise": lambda pick, size: nn.Conv2d(
        size[1], size[1] * pick(1, 2), 3, padding=1, groups=size[1]
    ),
}
PLAIN = {
    "relu": lambda pick, size: nn.ReLU(),
    "relu in place": lambda pick, size: nn.ReLU(inplace=True),
    "relu6": lambda pick, size: nn.ReLU6(),
    "tanh": lambda pick, size: nn.Tanh(),
    "dropout": lambda pick, size: nn.Dropout(0.4),
    "norm": lambda pick, size: (
        nn.BatchNorm2d(size[1]) if len(size) == 4 else nn.BatchNorm1d(size[1])
    ),
    "instances": lambda pick, size: nn.InstanceNorm2d(size[1], affine=True),
    "prelu": lambda pick, size: nn.PReLU(size[1] if pick(0, 1) else 1),
    "pool": lambda pick, size: nn.AdaptiveAvgPool2d(pick(1, 2)),
    "max pool": lambda pick, size: nn.MaxPool2d(2, 1),
    "flatten": lambda pick, size: nn.Flatten(),
}
ODD_MODULES = {
    "grouped": lambda pick, size: nn.Conv2d(size[1], 4, 1, groups=2),
    "smooth": lambda pick, size: nn.AvgPool2d((1, 3), 1, (0, 1)),
    "layer norm": lambda pick, size: nn.LayerNorm(size[-1 - pick(0, 2) :]),
    "group norm": lambda pick, size: nn.GroupNorm(pick(1, 2), size[1]),
    "neighbours": lambda pick, size: nn.LocalResponseNorm(3),
    "softmax": lambda pick, size: nn.Softmax(-1),
    "pool in one": lambda pick, size: nn.MaxPool1d(2, 1),
    "flatten some": lambda pick, size: nn.Flatten(pick(0, 2), pick(1, 3)),
    "unflatten": lambda pick, size: nn.Unflatten(1, (size[1] // 2, 2)),
    "shuffle": lambda pick, size: nn.PixelShuffle(2),
    "transposed": lambda pick, size: nn.ConvTranspose2d(size[1], 3, 1),
    "attention": lambda pick, size: nn.TransformerEncoderLayer(
        size[-1], 1, 4, dropout=0.0, batch_first=True
    ),
    "weight norm": lambda pick, size: parametrizations.weight_norm(
        nn.Linear(size[-1], 3)
    ),
    "lazy": lambda pick, size: nn.LazyLinear(3),
    "bare": lambda pick, size: nn.Sequential(nn.Linear(size[-1], 3), nn.ReLU()),
}
USUAL = {
    "F.relu": lambda v: F.relu(v),
    "F.relu in place": lambda v: F.relu(v, inplace=True),
    "tanh_": lambda v: v.tanh_(),
    "times a number": lambda v: 0.5 * v + 1,
    "from a number": lambda v: 1 - v,
    "plus equal": lambda v: v.add_(0.5),
    "swish": lambda v: v * torch.sigmoid(v),
    "square": lambda v: v**2,
    "leaky": lambda v: torch.where(v > 0, v, 0.1 * v),
    "flatten(1)": lambda v: v.flatten(1),
    "view": lambda v: v.view(v.size(0), -1),
    "reshape": lambda v: v.reshape(v.shape[0], -1),
    "mean": lambda v: v.mean((2, 3)),
    "mean, kept": lambda v: v.mean((2, 3), True),
    "sum": lambda v: torch.sum(v, dim=[-1, -2], keepdim=True),
    "amax": lambda v: v.amax(-2),
    "F.max_pool2d": lambda v: F.max_pool2d(v, 2, 1),
    "F.adaptive": lambda v: F.adaptive_avg_pool2d(v, 2),
    "gate of itself": lambda v: v * F.adaptive_avg_pool2d(v, 1),
    "divided by pixels": lambda v: v.sum((2, 3)) / 36,
}
ODD = {
    "softmax": lambda v: v.softmax(1),
    "normalised": lambda v: F.normalize(v, dim=-1),
    "layer norm": lambda v: F.layer_norm(v, v.shape[1:]),
    "cumsum": lambda v: v.cumsum(-1),
    "sorted": lambda v: v.sort(-1).values,
    "sum of units": lambda v: v.sum(1, keepdim=True),
    "mean of all": lambda v: v - v.mean(),
    "mean of last": lambda v: v.mean(-1, keepdim=True),
    "norm": lambda v: v / (1 + v.norm(dim=1, keepdim=True)),
    "view(-1, n)": lambda v: v.view(-1, 6),
    "view(2, -1)": lambda v: v.view(3, -1),
    "view of all": lambda v: v.view(v.size(0), -1, 2),
    "permute": lambda v: v.permute(0, 2, 3, 1),
    "transpose": lambda v: v.transpose(1, 2),
    "transpose_": lambda v: v.clone().transpose_(1, 2),
    "chunk": lambda v: v.chunk(2, 1)[0],
    "split": lambda v: v.split(1, 1)[0],
    "first": lambda v: v[:, :1],
    "index": lambda v: v[:, 0],
    "flip": lambda v: v.flip(1) + v,
    "roll": lambda v: v.roll(1, -1),
    "unsqueeze": lambda v: v.unsqueeze(1),
    "squeeze": lambda v: v.squeeze(),
    "outer": lambda v: v.unsqueeze(-1) * v.unsqueeze(-2),
    "gram": lambda v: v @ v.transpose(-1, -2),
    "max": lambda v: v.max(1, keepdim=True).values,
    "times its width": lambda v: v * v.shape[1],
    "over its width": lambda v: v / v.size(-1),
    "max_pool1d": lambda v: F.max_pool1d(v, 2, 1),
    "pad": lambda v: F.pad(v, (1, 1)),
    "prelu of all": lambda v: F.prelu(v, torch.full((1,), 0.1).to(v.dtype)),
    "type asked": lambda v: v.cumsum(1) if isinstance(v, Tensor) else v,
    "twice": lambda v: torch.cat([v, v], 1),
    "stacked": lambda v: torch.stack([v, v]).sum(0),
    "pre-batch": lambda v: v - v.mean(0, keepdim=True),
    "flatten(2)": lambda v: v.flatten(2),
    "flatten(0, 1)": lambda v: v.flatten(0, 1),
    "pixels": lambda v: v.flatten(2).mean(2),
    "mean, named": lambda v: torch.mean(input=v, dim=-2),
    "axis": lambda v: v.mean(axis=1, keepdim=True),
    "pool, first": lambda v: F.max_pool2d(v, 2, return_indices=True)[0],
    "view of three": lambda v: v.view(v.size(0), v.size(1), -1),
    "over pixels": lambda v: v.sum((2, 3)) / v[0, 0].numel(),
    "sizes": lambda v: v.reshape(*v.shape[:1], -1),
    "transposed": lambda v: v.mT,
    "data": lambda v: v.data + 1,
    "unbind": lambda v: v.unbind(1)[-1],
    "narrow": lambda v: v.narrow(1, 0, 1),
    "expand": lambda v: v[:, :1].expand_as(v),
    "like": lambda v: v + torch.ones_like(v).cumsum(1),
    "zeros": lambda v: v + torch.zeros(v.size(1)).sum(),
    "clamp": lambda v: v.clamp(min=v.mean()),
    "einsum": lambda v: torch.einsum("b...->b", v).unsqueeze(1),
}
BOTH = {
    "add": lambda v, w: v + w,
    "add_": lambda v, w: v.add_(w),
    "product": lambda v, w: v * torch.sigmoid(w),
    "cat": lambda v, w: torch.cat([v, w], 1),
    "maximum": lambda v, w: torch.maximum(v, w),
    "where": lambda v, w: torch.where(w > 0, v, 0.0),
    "matmul": lambda v, w: v @ w.transpose(-1, -2),
    "view as": lambda v, w: v.view(w.size(0), -1),
}
WEIGHTS = {  # of a layer made before, used by forward itself
    "F.linear": lambda v, layer: F.linear(v, layer.weight),
    "back": lambda v, layer: v @ layer.weight,
    "scale": lambda v, layer: v * layer.weight.std(),
    "bias": lambda v, layer: v + layer.bias,
    "width": lambda v, layer: v / layer.out_features,
    "wide": lambda v, layer: v.cumsum(1) if layer.out_features > 4 else v,
    "again": lambda v, layer: layer(v),
    "rows": lambda v, layer: v / len(layer.weight),
    "data": lambda v, layer: v + layer.weight.data.mean(),
    "state": lambda v, layer: v + sum(each.sum() for each in layer.buffers()),
    "length": lambda v, layer: v + [*layer.parameters()][0].norm().item(),
    "mean of norm": lambda v, layer: v * layer.running_mean.mean(),
    "features": lambda v, layer: v / layer.num_features,
    "its type": lambda v, layer: v if isinstance(layer, nn.ReLU) else v.cumsum(1),
    "its children": lambda v, layer: v * (1 + len([*layer.children()])),
    "checkpoint": lambda v, layer: checkpoint(layer, v, use_reentrant=False),
}
NETWORK = {
    "scaled": lambda v, net: v * net.scale,
    "scaled by units": lambda v, net: v * net.scales,
    "keeps": lambda v, net: setattr(net, "last", v) or v,
    "listed": lambda v, net: F.linear(v, net.hidden[0]),
    "cached": lambda v, net: v if net.last is None else v + 0 * net.last.sum(),
    "in training": lambda v, net: v.cumsum(1) if net.training else v,
    "in eval": lambda v, net: v if net.training else v.cumsum(1),
    "dropout": lambda v, net: F.dropout(v, 0.3, net.training),
    "always drops": lambda v, net: F.dropout(v, 0.3),
}


TABLES = {
    **{"L": LINEAR, "C": CONVOLUTIONS, "P": PLAIN, "M": ODD_MODULES},
    "R": {name: PLAIN[name] for name in ("relu", "relu in place", "relu6")},
    **{"U": USUAL, "O": ODD, "B": BOTH, "W": WEIGHTS, "N": NETWORK},
}
ANY = "LLCCPPPPUUUOMBWN"


@st.composite
def networks(draw, relu: bool = False) -> Net:
    """A network that runs, in float64, and keeps the batch that it runs on; with a ReLU
    near its beginning if that is wanted.
    """
    torch.manual_seed(draw(st.integers(0, 9)))
    net, kind = Net(), draw(st.sampled_from([*INPUTS]))
    net.examples = torch.randn(INPUTS[kind]).double()
    net.scale = nn.Parameter(torch.tensor(draw(st.sampled_from([0.7, [1.3]]))))
    net.scales = nn.Parameter(torch.rand(draw(st.integers(1, 6))))
    net.hidden = []
    values, first = [net.examples], "LC" if kind == "images" else "L"
    for kinds in [
        first,
        *["R"] * relu,
        *[ANY] * draw(st.integers(1, 8)),
        "PU",
        "LC",
        "LC",
    ]:
        place = max(0, len(values) - 1 - draw(st.sampled_from([0] * 8 + [1, 2])))
        kind = draw(st.sampled_from(kinds))
        name, seed = draw(st.sampled_from([*TABLES[kind]])), draw(st.integers(0, 99))
        try_step(net, values, place, kind, name, random.Random(seed))
    net.ending = ENDINGS[draw(st.sampled_from([0, 0, 0, 0, 1, 2, 3]))]
    for trick in draw(st.lists(st.sampled_from(TRICKS), max_size=1)):
        seed = draw(st.integers(0, 99))
        trick(net, seed)
        net.recipe.append((trick.__name__, seed))
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    assume(runs(net))
    return net


def try_step(
    net: Net,
    values: list[Tensor],
    place: int,
    kind: str,
    name: str,
    pick: random.Random,
) -> None:
    """Add a step that works on value number `place`, if it can."""
    made, other = TABLES[kind][name], pick.randrange(len(values))
    try:
        if kind in "LCPMR":
            part = net.part(made(pick.randint, [*values[place].shape]).double())
            net.hidden += [getattr(net.get_submodule(part), "weight", None)]
        else:
            part = pick.choice([*net._modules])
        step = {
            **dict.fromkeys("LCPMR", lambda net, all: getattr(net, part)(all[place])),
            **dict.fromkeys("UO", lambda net, all: made(all[place])),
            "B": lambda net, all: made(all[place], all[other]),
            "W": lambda net, all: made(all[place], net._modules[part]),
            "N": lambda net, all: made(all[place], net),
        }[kind]
        value = step(net.double(), [each.clone() for each in values])
        assert isinstance(value, Tensor) and 0 < value.numel() < 5_000
    except Exception:  # not for these values
        return
    net.steps.append(step)
    net.recipe.append((name, place, other if kind == "B" else part))
    values.append(value.detach())


ENDINGS = [
    lambda last, before: last,
    lambda last, before: {"answer": last, "inner": before},
    lambda last, before: (last, before.sum()),
    lambda last, before: last.sum(-1),
]


def layers_of(net: Net) -> list[str]:
    return [
        name
        for name, module in net.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]


def tie(net: Net, seed: int) -> None:
    """Two layers of one shape share a weight."""
    layers = [net.get_submodule(name) for name in layers_of(net)]
    shapes = [each.weight.shape for each in layers]
    for place, shape in enumerate(shapes):
        if shape in shapes[:place]:
            try:
                layers[place].weight = layers[shapes.index(shape)].weight
            except Exception:  # a computed one
                return


def second_name(net: Net, seed: int) -> None:
    names = layers_of(net)
    if names:
        net.add_module("again", net.get_submodule(names[seed % len(names)]))


def hook(net: Net, seed: int) -> None:
    modules = [*net.modules()]
    modules[seed % len(modules)].register_forward_hook(
        lambda module, given, out: out * 2 if isinstance(out, Tensor) else None
    )


def freeze(net: Net, seed: int) -> None:
    for parameter in [*net.parameters()][: seed % 5]:
        parameter.requires_grad_(False)


def own_forward(net: Net, seed: int) -> None:
    modules = [*net.children()]
    if modules:
        module = modules[seed % len(modules)]
        forward = type(module).forward
        module.forward = lambda *given: forward(module, *given)


def pre_hook(net: Net, seed: int) -> None:
    modules = [*net.modules()]
    modules[seed % len(modules)].register_forward_pre_hook(
        lambda module, given: (given[0].flip(1),)
    )


def old_norm(net: Net, seed: int) -> None:
    names = layers_of(net)
    if names:
        nn.utils.spectral_norm(net.get_submodule(names[seed % len(names)]))


def flatter(net: Net, seed: int) -> None:
    """All parameters become views of one tensor."""
    parameters = [*net.parameters()]
    flat = torch.cat([each.detach().flatten() for each in parameters])
    pieces = flat.split([each.numel() for each in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.data = piece.view_as(parameter)


def frozen_in_eval(net: Net, seed: int) -> None:
    net.eval()


TRICKS = [
    *(tie, second_name, hook, pre_hook, freeze, own_forward, old_norm, flatter),
    frozen_in_eval,
]


@torch.no_grad()
def answers(net: nn.Module, training: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    out = copy.deepcopy(net).train(training)(net.examples.clone())
    return (
        [out] if isinstance(out, Tensor) else [*getattr(out, "values", lambda: out)()]
    )


def runs(net: Net) -> bool:
    try:
        both = [*answers(net), *answers(net, training=True)]
        return all(each.isfinite().all() for each in both)
    except Exception:
        return False


def state(net: Net) -> tuple:
    """What must stay as it was: tensors, attributes, modes and hooks."""
    tensors = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    attributes = {
        name: (module.training, {key: id(value) for key, value in vars(module).items()})
        for name, module in net.named_modules()
    }
    return tensors, attributes, [id(each) for each in net.parameters()]


def check(net: Net, grow: Callable[[], nn.Module], counts: Counter) -> None:
    """Grow, and hold the promise."""
    before, generator = state(net), torch.get_rng_state()
    try:
        grown = grow()
    except GrowthError as error:
        assert str(error) and "\n" not in str(error)
        counts[str(error).split("'")[-1][:40]] += 1
        counts["refused"] += 1
        grown = None
    after = state(net)
    assert before[1:] == after[1:] and torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(before[0][key], after[0][key]) for key in before[0])
    if grown is None:
        return
    counts["kept"] += 1
    for training in (False, True):
        pairs = zip(answers(net, training), answers(grown, training), strict=True)
        for old, new in pairs:
            assert old.shape == new.shape
            assert training or (old - new).norm() <= 1e-9 * (1 + old.norm())


def test_widening_random_networks():
    counts = Counter()

    @many
    @given(networks(), st.data())
    def grow(net, data):
        names = [name for name, _ in net.named_modules() if name]
        assume(names)
        layer = data.draw(
            st.sampled_from(layers_of(net) * 5 or names) | st.sampled_from(names)
        )
        units = len(net.get_submodule(layer).weight) if layer in layers_of(net) else 1
        width = units + data.draw(st.integers(0, 4))
        x = net.examples
        inputs = {"no": None, "x": x, "(x,)": (x,)}[
            data.draw(st.sampled_from(["no", "x", "(x,)"]))
        ]
        split = data.draw(st.sampled_from(["even", "asymmetric"]))
        check(
            net,
            lambda: widen(net, layer, width, split=split, inputs=inputs),
            counts,
        )

    grow()
    print(counts.most_common(40))
    assert counts["kept"] > 0.1 * counts["refused"] > 0


def test_deepening_random_networks():
    counts = Counter()

    @many
    @given(networks(relu=True), st.data())
    def grow(net, data):
        relus = [
            name
            for name, module in net.named_modules()
            if isinstance(module, nn.ReLU | nn.ReLU6)
        ]
        names = [name for name, _ in net.named_modules() if name]
        assume(names)
        after = data.draw(st.sampled_from(relus * 5 or names) | st.sampled_from(names))
        inputs, statistics = (
            net.examples if data.draw(st.booleans()) else None for _ in range(2)
        )
        check(
            net,
            lambda: deepen(net, after, statistics=statistics, inputs=inputs),
            counts,
        )

    grow()
    print(counts.most_common(40))
    assert counts["kept"] > 0.1 * counts["refused"] > 0
