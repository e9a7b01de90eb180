"""Net2Net: make a larger network that computes the same function as a trained one (Chen
and colleagues, 2016).

`widen` copies units and lets the copies share what the original passed on; `deepen`
inserts a layer that does nothing yet. Both look into the network first and refuse what
they cannot follow; given example inputs, they compare the answers before and after.
`carry_over` lets the optimiser's memory grow along. `pad` and `insert_random` grow by
random weights instead: the controls.

In this order: which units are copied; what a widening changes; `widen`; `deepen`; the
insertion of a layer; the check of the answers; the optimiser's memory; the controls.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from minisupernet.errors import GrowthError
from minisupernet.wiring import (
    Wiring,
    check_same_steps,
    copy_of,
    feeding_layer,
    find_wiring,
    reason,
    tensors_of,
)

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

Examples = Tensor | Sequence[Tensor] | None  # a batch of the network's inputs

# f(f(v)) = f(v): a second one behind the first changes nothing
IDEMPOTENT = (nn.ReLU, nn.ReLU6)
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
        inputs: Examples = None,
    ) -> "Widening":
        """Plan the widening of one layer; `widen` follows the same plan for the same
        arguments.

        Raises:
            GrowthError: where the layer cannot be widened.
        """
        if not isinstance(width, Integral):
            raise GrowthError(f"a width is a whole number of units, not {width!r}.")
        wiring = find_wiring(model, layer, regardless, _count(inputs))
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
            for key, tensor in tensors_of(model.get_submodule(name)).items()
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
        self,
        model: nn.Module,
        change: Callable[[str, Tensor, int], Tensor],
        inputs: Examples = None,
    ) -> nn.Module:
        """A copy of `model` with each planned tensor replaced by `change(name, old
        tensor, axis)`.

        Raises:
            GrowthError: where the copy would take other steps than the model.
        """
        grown = copy_of(model)
        for name, axis in self.axes(model).items():
            owner, _, key = name.rpartition(".")
            module = grown.get_submodule(owner)
            old = getattr(module, key)
            new = change(name, old.detach(), axis)
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new, old.requires_grad)
            setattr(module, key, new)
        for name in (self.wiring.layer, *self.wiring.per_unit):
            self._resize(grown.get_submodule(name), MADE_SIZES)
        for name in self.wiring.readers:
            self._resize(grown.get_submodule(name), READ_SIZES)
        check_same_steps(model, grown, given=_count(inputs))
        return grown

    def _resize(self, module: nn.Module, attributes: tuple[str, ...]) -> None:
        """Make a module's record of its sizes fit its new tensors."""
        units, width = self.wiring.units, len(self.copies.source)
        if getattr(module, "groups", 1) > 1:  # depthwise: a group for each unit
            attributes = (*attributes, "in_channels", "groups")
        for name in attributes:
            if hasattr(module, name):
                setattr(module, name, getattr(module, name) // units * width)
        if isinstance(module, nn.LayerNorm):
            first, *rest = module.normalized_shape
            module.normalized_shape = (first // units * width, *rest)
        if isinstance(module, nn.GroupNorm) and module.num_channels % module.num_groups:
            raise GrowthError(
                f"{module.num_channels} channels cannot be divided into the"
                f" {module.num_groups} groups of GroupNorm; choose a width that can."
            )


def widen(
    model: nn.Module,
    layer: str,
    width: int,
    *,
    noise: float = 0.0,
    split: str = "even",
    seed: int = 0,
    regardless: bool = False,
    inputs: Examples = None,
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
        inputs: example inputs, a tensor or a tuple of them, as `forward` takes them.
            The answers to them, in eval mode and before noise, are then compared.
            Reading a network always misses something; this is the check.

    Raises:
        GrowthError: where the layer cannot be widened, or an answer would change; the
            message says why.
    """
    plan = Widening.of(
        model,
        layer,
        width,
        split=split,
        seed=seed,
        regardless=regardless,
        inputs=inputs,
    )
    grown = plan.grow(model, lambda name, old, axis: plan.weight(old, axis), inputs)
    if inputs is not None and not regardless:
        check_answers(model, grown, inputs)
    if noise:
        _add_noise(
            grown.get_submodule(layer).weight, plan.wiring.units, noise, seed + 1
        )
    return grown


@torch.no_grad()
def _add_noise(weight: Tensor, units: int, noise: float, seed: int) -> None:
    """Move the weights behind the first `units`, in place, by normal noise in standard
    deviations of those.
    """
    if weight[:units].numel() < 2 or not 0 < noise < math.inf:
        raise GrowthError(
            f"noise of {noise} standard deviations of {weight[:units].numel()} weights"
            " cannot be drawn; give a number from 0 on, and two weights or more."
        )
    random = torch.Generator().manual_seed(seed)
    drawn = torch.randn(weight[units:].shape, generator=random)
    weight[units:] += noise * weight[:units].std() * drawn.to(weight)


def deepen(
    model: nn.Module,
    after: str,
    *,
    kernel: int = 3,
    statistics: Tensor | None = None,
    regardless: bool = False,
    inputs: Examples = None,
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
        inputs: example inputs to which the answers are compared, as in `widen`.

    Raises:
        GrowthError: where no identity layer can be inserted, or an answer would change;
            the message says why.
    """
    layer = identity_(insertion(model, after, kernel, regardless, inputs))
    norm = None
    if statistics is not None:
        norm = undo_(norm_for(layer), _arriving(model, after, layer, statistics))
    grown = insert(model, after, layer, norm, inputs)
    if inputs is not None and not regardless:
        check_answers(model, grown, inputs)
    return grown


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
    model: nn.Module,
    after: str,
    kernel: int = 3,
    regardless: bool = False,
    inputs: Examples = None,
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
    feeding = feeding_layer(model, after, _count(inputs))
    activation = model.get_submodule(after)
    if type(activation) not in IDEMPOTENT and not regardless:
        raise GrowthError(
            f"'{after}' is {type(activation).__name__}, and an identity layer keeps the"
            " function only behind an activation f with f(f(v)) = f(v); name a ReLU"
            " module."
        )
    weight = feeding.weight
    units, like = len(weight), {"device": weight.device, "dtype": weight.dtype}
    if isinstance(feeding, nn.Linear):
        return nn.utils.skip_init(nn.Linear, units, units, **like)
    sizes, padding = (units, units, kernel), kernel // 2
    return nn.utils.skip_init(nn.Conv2d, *sizes, padding=padding, **like)


def insert(
    model: nn.Module,
    after: str,
    layer: nn.Module,
    norm: nn.Module | None = None,
    inputs: Examples = None,
) -> nn.Module:
    """A copy of `model` with `layer`, `norm` if given, and a second activation behind
    the activation `after`.

    Raises:
        GrowthError: where the copy would take other steps than the model but for these.
    """
    grown = copy_of(model)
    activation = grown.get_submodule(after)
    parts = [activation, layer, *([norm] if norm else []), copy_of(activation)]
    longer = nn.Sequential(*parts).train(model.training)
    named = grown.named_modules(remove_duplicate=False)
    names = [name for name, module in named if module is activation]
    for name in names:
        parent, _, key = name.rpartition(".")
        setattr(grown.get_submodule(parent), key, longer)
    check_same_steps(model, grown, names[0], _count(inputs))
    return grown


def norm_for(layer: nn.Module) -> nn.Module:
    """A new BatchNorm for the outputs of a Linear or Conv2d layer, on its device."""
    kind = nn.BatchNorm2d if isinstance(layer, nn.Conv2d) else nn.BatchNorm1d
    return kind(len(layer.weight), device=layer.weight.device, dtype=layer.weight.dtype)


@torch.no_grad()
def _arriving(
    model: nn.Module, after: str, layer: nn.Module, statistics: Tensor
) -> Tensor:
    """What module `after` puts out, in eval mode, for a batch of the network's inputs:
    (B, units) or (B, units, H, W).
    """
    probe, seen = copy_of(model).eval(), []
    probe.get_submodule(after).register_forward_hook(
        lambda module, given, out: seen.append(out)
    )
    try:
        with torch.random.fork_rng(devices=[]):
            probe(statistics)
    except Exception as error:  # a network may fail on a wrong batch in any way
        raise GrowthError(
            "the network does not run on the batch given as statistics"
            f" ({reason(error)}); give a batch of its inputs."
        ) from error
    values, axes = seen[0], 4 if isinstance(layer, nn.Conv2d) else 2
    if values.ndim != axes:
        raise GrowthError(
            f"'{after}' puts out {tuple(values.shape)}, and BatchNorm would not"
            f" normalise its units there, but in {axes} axes, the second the units;"
            " leave out statistics."
        )
    if not values.isfinite().all():
        raise GrowthError(
            f"'{after}' puts out numbers that are not finite for the batch given as"
            " statistics; give another."
        )
    return values


def _count(inputs: Examples) -> int | None:
    """How many inputs a call of the network gets; None where there are no examples."""
    return None if inputs is None else len(_as_tuple(inputs))


def _as_tuple(inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    several = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    tensors = [isinstance(each, Tensor) and each.numel() for each in several]
    if not several or not all(tensors):
        raise GrowthError(
            "the example inputs must be a tensor or a tuple of tensors, as forward"
            " takes them, and not empty."
        )
    return several


def check_answers(
    model: nn.Module, grown: nn.Module, inputs: Tensor | Sequence[Tensor]
) -> None:
    """Make sure that two networks give the same answers in eval mode: to within 100
    roundings of the weights' dtype, relative to the answers' size.

    Both compute in float64 if the model can, so that little but the weights' own
    rounding is left to tell them apart.

    Raises:
        GrowthError: where they do not, with the relative change, or do not run.
    """
    doubled = True
    try:
        before = _answers(model, inputs, doubled)
    except Exception:  # made for one dtype, or on a device without float64
        doubled = False
        before = _tried("network", model, inputs, doubled)
    after = _tried("grown network", grown, inputs, doubled)
    if [each.shape for each in before] != [each.shape for each in after] or not before:
        raise GrowthError(
            "the grown network's answers to these inputs have other shapes, or none;"
            " it does not keep the function."
        )
    floats = [
        each
        for each in model.parameters()
        if each.dtype.is_floating_point or each.is_complex()
    ]
    rounding = max((torch.finfo(each.dtype).eps for each in floats), default=2.0**-52)
    change = max(map(_change, before, after))
    if not change <= min(100 * rounding + 1e-12, 0.05):
        raise GrowthError(
            f"the grown network's answers to these inputs differ by {change:.1e} of"
            " their size, more than rounding does; something in forward does not treat"
            " the units one by one."
        )


@torch.no_grad()
def _answers(
    model: nn.Module, inputs: Tensor | Sequence[Tensor], doubled: bool
) -> list[Tensor]:
    """All tensors of the network's answer, in eval mode, whatever holds them."""
    network, inputs = (
        copy_of(model).eval(),
        [each.clone() for each in _as_tuple(inputs)],
    )
    if doubled:
        network = network.double()
        inputs = [
            each.double() if each.is_floating_point() else each for each in inputs
        ]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        answers = network(*inputs)
    return [each for each in tree_leaves(answers) if isinstance(each, Tensor)]


def _tried(
    name: str, model: nn.Module, inputs: Tensor | Sequence[Tensor], doubled: bool
) -> list[Tensor]:
    try:
        return _answers(model, inputs, doubled)
    except Exception as error:  # a network may fail in any way
        raise GrowthError(
            f"the {name} does not run on the example inputs ({reason(error)})."
        ) from error


def _change(before: Tensor, after: Tensor) -> float:
    """How far two answers are apart, relative to the first's size; 0 if both are 0."""
    if before.dtype != after.dtype:
        return math.inf
    before, after = (
        each if each.is_floating_point() or each.is_complex() else each.double()
        for each in (before, after)
    )
    apart = torch.where(before == after, 0, after - before).norm().item()
    size = before[before.isfinite()].norm().item()
    return apart / size if size else (math.inf if apart else 0.0)


# what optimisers keep that scales as the gradient does, and as its square
LIKE_GRADIENT = {"momentum_buffer", "exp_avg"}
LIKE_SQUARE = {"exp_avg_sq", "max_exp_avg_sq"}


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
        GrowthError: for a parameter that is not the model's or not in the grown
            network, or a memory this rule does not know.
    """
    old, new = dict(model.named_parameters()), dict(grown.named_parameters())
    names = {id(parameter): name for name, parameter in old.items()}
    groups = [
        [names.get(id(parameter)) for parameter in group["params"]]
        for group in optimizer.param_groups
    ]
    if not {name for group in groups for name in group} <= new.keys():
        raise GrowthError(
            "the optimiser holds parameters that are not the model's, or that the grown"
            " network does not have; give the network it was made for, and its child."
        )
    groups[0] += [name for name in new if name not in old]
    larger = type(optimizer)(
        [
            _group(settings, {name: new[name] for name in group})
            for settings, group in zip(optimizer.param_groups, groups, strict=True)
        ]
    )
    axes = plan.axes(model) if plan else {}
    for parameter, memory in optimizer.state.items():
        name = names[id(parameter)]
        if name in axes or new[name].shape == parameter.shape:
            larger.state[new[name]] = {
                key: _grown(key, value, parameter, axes.get(name), plan)
                for key, value in memory.items()
            }
    return larger


def _group(settings: dict, parameters: dict[str, nn.Parameter]) -> dict:
    """A parameter group with an old one's settings, with names if that had them."""
    kept = {key: value for key, value in settings.items() if key != "param_names"}
    named = "param_names" in settings
    return {**kept, "params": [*(parameters.items() if named else parameters.values())]}


def _grown(
    key: str,
    value: object,
    parameter: Tensor,
    axis: int | None,
    plan: Widening | None,
) -> object:
    """One entry of an optimiser's memory, mapped as the gradient or its square."""
    if value is None or isinstance(value, int | float):
        return value
    whole = isinstance(value, Tensor) and value.shape == parameter.shape
    if isinstance(value, Tensor) and (value.ndim == 0 or (whole and axis is None)):
        return value.clone()
    if not whole or key not in LIKE_GRADIENT | LIKE_SQUARE:
        raise GrowthError(
            f"it is not known how '{key}' of this optimiser grows; use SGD, Adam or"
            " AdamW."
        )
    if key in LIKE_GRADIENT:
        return plan.gradient(value, axis)
    return plan.gradient(value.sqrt(), axis).square()


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
        owner, _, key = name.rpartition(".")
        shape, module = plan.weight(old, axis).shape, model.get_submodule(owner)
        if isinstance(module, nn.Linear | nn.Conv2d):
            fan_in = plan.weight(module.weight, axis)[0].numel()
            new = _ordinary(shape, fan_in, random).to(old)
            new *= outgoing if axis == 1 else 1.0
        else:
            new = old.new_full(shape, _start(module, key))
        new.narrow(axis, 0, old.shape[axis]).copy_(old)
        return new

    return plan.grow(model, change)


def _start(module: nn.Module, key: str) -> float:
    """What a norm's or PReLU's tensor is full of at first."""
    if isinstance(module, nn.PReLU):
        return module.init
    return float(key in ("weight", "running_var"))


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
