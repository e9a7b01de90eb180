"""Net2Net: make a larger network that computes the same function as a trained one (Chen
and colleagues, 2016).

`widen` copies units and lets the copies share what the original passed on; `deepen`
inserts a layer that does nothing yet.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minisupernet.errors import GrowthError
from minisupernet.wiring import Wiring, feeding_layer, find_wiring

__all__ = [
    "Copies",
    "Widening",
    "carry_over",
    "copy_units",
    "deepen",
    "insert_random",
    "pad",
    "widen",
]

IDEMPOTENT = (
    nn.ReLU,
    nn.ReLU6,
)  # f(f(v)) = f(v): a second one behind the first changes nothing
MADE_SIZES = (
    "out_features",
    "out_channels",
    "num_features",
    "num_channels",
    "num_parameters",
)
READ_SIZES = ("in_features", "in_channels")


@dataclass(frozen=True)
class Copies:
    """The mapping of Net2Wider: new unit j copies old unit `source[j]` and passes on
    `share[j]` of what that passed on.

    `source` (width,) int64 is g of the paper; `share` (width,) float64 sums to 1 over
    the copies of one unit.
    """

    source: Tensor
    share: Tensor


def copy_units(units: int, width: int, split: str = "even", seed: int = 0) -> Copies:
    """Choose which units to copy: the first `units` are the old ones, each further one
    copies a random old one.

    Args:
        split: "even", 1 / (number of copies) as in the paper, or "asymmetric", random
            shares that sum to 1.

    Raises:
        GrowthError: for a width below `units`, or another split.
    """
    if width < units:
        raise GrowthError(
            f"the layer has {units} units, so it cannot be widened to {width}; give"
            f" {units} or more."
        )
    if split not in ("even", "asymmetric"):
        raise GrowthError(
            f"there is no split '{split}'; choose 'even' or 'asymmetric'."
        )
    random = torch.Generator().manual_seed(seed)
    source = torch.cat(
        [torch.arange(units), torch.randint(units, (width - units,), generator=random)]
    )
    raw = torch.ones(width).double()
    if split == "asymmetric":
        raw = 0.25 + torch.rand(width, generator=random, dtype=torch.float64)
    total = torch.zeros(units).double().index_add(0, source, raw)
    return Copies(source, raw / total[source])


def copied(tensor: Tensor, axis: int, copies: Copies, shared: bool) -> Tensor:
    """Copy a tensor's entries along `axis` from the old units to the new ones, scaled
    by their shares if `shared`.

    After flattening a unit owns a block of entries; the length along `axis` must be
    units times the block's length.
    """
    units = int(copies.source.max()) + 1
    block = tensor.shape[axis] // units
    index = (
        (copies.source[:, None] * block + torch.arange(block))
        .flatten()
        .to(tensor.device)
    )
    taken = tensor.index_select(axis, index)
    if not shared:
        return taken
    share = copies.share.repeat_interleave(block).to(tensor)
    return taken * share.view(
        [-1 if place == axis else 1 for place in range(tensor.ndim)]
    )


@dataclass(frozen=True)
class Widening:
    """What `widen` does to one network: which units are copied, and which tensors
    change along which axis.
    """

    wiring: Wiring
    copies: Copies

    @classmethod
    def of(
        cls,
        model: nn.Module,
        layer: str,
        width: int,
        *,
        split: str = "even",
        seed: int = 0,
        regardless: bool = False,
    ) -> "Widening":
        """Plan the widening of one layer; `widen` follows the same plan for the same
        arguments.

        Raises:
            GrowthError: where the layer cannot be widened.
        """
        wiring = find_wiring(model, layer, regardless)
        return cls(wiring, copy_units(wiring.units, width, split, seed))

    def axes(self, model: nn.Module) -> dict[str, int]:
        """Names of the tensors that change, to their axis: 0 where a unit is made, 1
        where it is read.
        """
        made = dict.fromkeys((self.wiring.layer, *self.wiring.per_unit), 0)
        modules = made | dict.fromkeys(self.wiring.readers, 1)
        return {
            f"{name}.{key}": axis
            for name, axis in modules.items()
            for key, tensor in model.get_submodule(name).state_dict().items()
            if tensor.ndim > axis
        }

    def weight(self, tensor: Tensor, axis: int) -> Tensor:
        """A weight of the wider network from that of the old one: makers are copied,
        readers share.
        """
        return copied(tensor, axis, self.copies, shared=axis == 1)

    def gradient(self, tensor: Tensor, axis: int) -> Tensor:
        """The gradient in that weight, from the old one's: the other way round, makers
        share and readers are copied.
        """
        return copied(tensor, axis, self.copies, shared=axis == 0)

    def grow(
        self, model: nn.Module, change: Callable[[str, Tensor, int], Tensor]
    ) -> nn.Module:
        """A copy of `model` with each planned tensor replaced by `change(name, old
        tensor, axis)`.
        """
        grown, units, width = (
            copy.deepcopy(model),
            self.wiring.units,
            len(self.copies.source),
        )
        for name, axis in self.axes(model).items():
            owner, _, key = name.rpartition(".")
            module = grown.get_submodule(owner)
            old = getattr(module, key)
            new = change(name, old.detach(), axis)
            setattr(
                module,
                key,
                (
                    nn.Parameter(new, old.requires_grad)
                    if isinstance(old, nn.Parameter)
                    else new
                ),
            )
        for name in (self.wiring.layer, *self.wiring.per_unit):
            _resize(grown.get_submodule(name), MADE_SIZES, units, width)
        for name in self.wiring.readers:
            _resize(grown.get_submodule(name), READ_SIZES, units, width)
        return grown


def widen(
    model: nn.Module,
    layer: str,
    width: int,
    *,
    noise: float = 0.0,
    split: str = "even",
    seed: int = 0,
    regardless: bool = False,
) -> nn.Module:
    """A new network whose `layer` has `width` units and which computes the same
    function (Net2Wider).

    Args:
        layer: name of a Linear or Conv2d layer; `width` is its new number of outputs or
            output channels.
        noise: adds normal noise to the incoming weights of new units, in standard
            deviations of the layer's weights.
        split: see `copy_units`.
        regardless: go on past layers that mix units; the function is then not kept.

    Raises:
        GrowthError: where the layer cannot be widened; the message says why.
    """
    plan = Widening.of(
        model, layer, width, split=split, seed=seed, regardless=regardless
    )
    grown = plan.grow(model, lambda name, old, axis: plan.weight(old, axis))
    if noise:
        weight, old = grown.get_submodule(layer).weight, plan.wiring.units
        drawn = torch.randn(
            weight[old:].shape, generator=torch.Generator().manual_seed(seed + 1)
        )
        with torch.no_grad():
            weight[old:] += noise * weight[:old].std() * drawn.to(weight)
    return grown


def deepen(
    model: nn.Module,
    after: str,
    *,
    kernel: int = 3,
    statistics: Tensor | None = None,
    regardless: bool = False,
) -> nn.Module:
    """A new network with one more layer, an identity, behind the ReLU module `after`
    (Net2Deeper).

    The new layer has a ReLU of its own, and relu(relu(v)) = relu(v) keeps the function.

    Args:
        kernel: side of the new convolution's kernels, an odd number.
        statistics: a batch of the network's inputs; the new layer then gets BatchNorm,
            whose scale and shift undo the normalisation by this batch's mean and
            variance: exact in eval mode, nearly so in training.
        regardless: go on behind an activation that is not idempotent; the function is
            then not kept.

    Raises:
        GrowthError: where no identity layer can be inserted; the message says why.
    """
    layer = identity_(insertion(model, after, kernel, regardless))
    norm = (
        None
        if statistics is None
        else undo_(norm_for(layer), _arriving(model, after, statistics))
    )
    return insert(model, after, layer, norm)


@torch.no_grad()
def identity_(layer: nn.Module) -> nn.Module:
    """Make a Linear or Conv2d layer, in place, put out what it reads: ones on the
    diagonal, at a kernel's centre.
    """
    layer.weight.zero_()
    layer.bias.zero_()
    centre = [side // 2 for side in layer.weight.shape[2:]]  # () for a linear layer
    for unit in range(len(layer.weight)):
        layer.weight[(unit, unit, *centre)] = 1
    return layer


@torch.no_grad()
def undo_(norm: nn.Module, values: Tensor) -> nn.Module:
    """Make a BatchNorm, in place, take out the mean and variance of `values` (B, units,
    ...) and put them back.

    Its scale and shift undo what its running statistics do: the identity in eval mode.
    """
    axes = [axis for axis in range(values.ndim) if axis != 1]
    norm.running_mean.copy_(values.mean(axes))
    norm.running_var.copy_(values.var(axes, correction=0))
    norm.weight.copy_((norm.running_var + norm.eps).sqrt())
    norm.bias.copy_(norm.running_mean)
    return norm


def insertion(
    model: nn.Module, after: str, kernel: int = 3, regardless: bool = False
) -> nn.Module:
    """A Linear or Conv2d layer with as many inputs and outputs as units arrive at
    module `after`, not yet initialised.

    Raises:
        GrowthError: where `after` is not a ReLU, or is used twice, or the kernel has no
            centre.
    """
    if kernel < 1 or kernel % 2 == 0:
        raise GrowthError(
            f"a kernel of side {kernel} has no centre to pass the image on; give an odd"
            " number."
        )
    feeding = feeding_layer(model, after)
    activation = model.get_submodule(after)
    if not isinstance(activation, IDEMPOTENT) and not regardless:
        raise GrowthError(
            f"'{after}' is {type(activation).__name__}, and an identity layer keeps the"
            " function only behind an activation f with f(f(v)) = f(v); name a ReLU"
            " module."
        )
    units, like = (
        len(feeding.weight),
        {"device": feeding.weight.device, "dtype": feeding.weight.dtype},
    )
    if isinstance(feeding, nn.Linear):
        return nn.Linear(units, units, **like)
    return nn.Conv2d(units, units, kernel, padding=kernel // 2, **like)


def insert(
    model: nn.Module, after: str, layer: nn.Module, norm: nn.Module | None = None
) -> nn.Module:
    """A copy of `model` with `layer`, `norm` if given, and a second activation behind
    the activation `after`.
    """
    grown = copy.deepcopy(model)
    parent, _, key = after.rpartition(".")
    activation = grown.get_submodule(after)
    parts = [activation, layer, *([norm] if norm else []), copy.deepcopy(activation)]
    setattr(
        grown.get_submodule(parent), key, nn.Sequential(*parts).train(model.training)
    )
    return grown


def norm_for(layer: nn.Module) -> nn.Module:
    """A new BatchNorm for the outputs of a Linear or Conv2d layer, on its device."""
    kind = nn.BatchNorm2d if isinstance(layer, nn.Conv2d) else nn.BatchNorm1d
    return kind(len(layer.weight), device=layer.weight.device, dtype=layer.weight.dtype)


@torch.no_grad()
def _arriving(model: nn.Module, after: str, inputs: Tensor) -> Tensor:
    """What module `after` puts out, in eval mode, for a batch of the network's
    inputs.
    """
    probe, seen = copy.deepcopy(model).eval(), []
    probe.get_submodule(after).register_forward_hook(
        lambda module, given, out: seen.append(out)
    )
    probe(inputs)
    return seen[0]


def _resize(
    module: nn.Module, attributes: tuple[str, ...], units: int, width: int
) -> None:
    """Make a module's record of its sizes fit its new tensors."""
    for name in attributes:
        if hasattr(module, name):
            setattr(module, name, getattr(module, name) // units * width)
    if hasattr(module, "normalized_shape"):
        module.normalized_shape = (
            module.normalized_shape[0] // units * width,
            *module.normalized_shape[1:],
        )


LIKE_GRADIENT = {
    "momentum_buffer",
    "exp_avg",
}  # what optimisers keep that scales as the gradient does
LIKE_SQUARE = {"exp_avg_sq", "max_exp_avg_sq"}  # and as its square


def carry_over(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    grown: nn.Module,
    plan: Widening | None = None,
) -> torch.optim.Optimizer:
    """The same optimiser for the grown network, its memory (momentum, mean squares)
    mapped as gradients map.

    New layers join the first parameter group. They begin without memory, as does what
    changed its shape without a plan.

    Args:
        plan: the `Widening` that `grown` came from; None after `deepen` and the
            controls.

    Raises:
        GrowthError: for a parameter that is not the model's, or a memory this rule does
            not know.
    """
    old, axes = dict(model.named_parameters()), plan.axes(model) if plan else {}
    names = {id(parameter): name for name, parameter in old.items()}
    groups = [
        {**group, "params": [names.get(id(p)) for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    if any(None in group["params"] for group in groups):
        raise GrowthError(
            "the optimiser holds parameters that are not the model's; give the network"
            " it was made for."
        )
    groups[0]["params"] += [
        name for name, _ in grown.named_parameters() if name not in old
    ]
    new = dict(grown.named_parameters())
    larger = type(optimizer)(
        [
            {**group, "params": [new[name] for name in group["params"]]}
            for group in groups
        ]
    )
    for parameter, memory in optimizer.state.items():
        name = names[id(parameter)]
        if name not in axes and new[name].shape != parameter.shape:
            continue
        larger.state[new[name]] = {
            key: _grown(key, value, axes.get(name), plan)
            for key, value in memory.items()
        }
    return larger


def _grown(
    key: str, value: Tensor | None, axis: int | None, plan: Widening | None
) -> Tensor | None:
    """One entry of an optimiser's memory, mapped as the gradient or its square."""
    if not isinstance(value, Tensor):
        return value
    if axis is None or plan is None or value.ndim == 0:
        return value.clone()
    if key not in LIKE_GRADIENT | LIKE_SQUARE:
        raise GrowthError(
            f"it is not known how '{key}' of this optimiser grows; use SGD, Adam or"
            " AdamW."
        )
    return (
        plan.gradient(value, axis)
        if key in LIKE_GRADIENT
        else plan.gradient(value.sqrt(), axis).square()
    )


def pad(
    model: nn.Module, layer: str, width: int, *, outgoing: float = 1.0, seed: int = 0
) -> nn.Module:
    """The control for `widen`: new units with random weights of ordinary scale, old
    weights left alone.

    Args:
        outgoing: factor on the weights that read the new units; 0 keeps the function.

    Raises:
        GrowthError: as `widen`.
    """
    plan, random = Widening.of(model, layer, width), torch.Generator().manual_seed(seed)

    def change(name: str, old: Tensor, axis: int) -> Tensor:
        owner, shape = name.rpartition(".")[0], plan.weight(old, axis).shape
        if (
            owner in plan.wiring.per_unit
        ):  # BatchNorm's weight and variance start at 1, its bias and mean at 0
            new = torch.full(shape, float(name.endswith(("weight", "running_var")))).to(
                old
            )
        else:
            fan_in = plan.weight(model.get_submodule(owner).weight, axis)[0].numel()
            new = _ordinary(shape, fan_in, random).to(old) * (
                outgoing if axis == 1 else 1.0
            )
        new.narrow(axis, 0, old.shape[axis]).copy_(old)
        return new

    return plan.grow(model, change)


def insert_random(
    model: nn.Module,
    after: str,
    *,
    kernel: int = 3,
    batch_norm: bool = False,
    seed: int = 0,
) -> nn.Module:
    """The control for `deepen`: the same new layer with ordinary random weights (and an
    ordinary BatchNorm).

    Raises:
        GrowthError: as `deepen`.
    """
    layer, random = insertion(model, after, kernel), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias):
            tensor.copy_(_ordinary(tensor.shape, layer.weight[0].numel(), random))
    return insert(model, after, layer, norm_for(layer) if batch_norm else None)


def _ordinary(shape: torch.Size, fan_in: int, random: torch.Generator) -> Tensor:
    """PyTorch's ordinary start of a layer's weights or biases: uniform in +-1 /
    sqrt(fan_in).
    """
    return (2 * torch.rand(shape, generator=random) - 1) / math.sqrt(fan_in)
