"""Around Net2Net: the optimiser's memory for a grown network, and the random controls for `widen` and `deepen`."""

import math

import torch
from torch import Tensor, nn

from minisupernet.net2net import GrowthError, Widening, insert, insertion, norm_for

__all__ = ["carry_over", "insert_random", "pad"]

LIKE_GRADIENT = {"momentum_buffer", "exp_avg"}  # what optimisers keep that scales as the gradient does
LIKE_SQUARE = {"exp_avg_sq", "max_exp_avg_sq"}  # and as its square


def carry_over(
    optimizer: torch.optim.Optimizer, model: nn.Module, grown: nn.Module, plan: Widening | None = None
) -> torch.optim.Optimizer:
    """The same optimiser for the grown network, its memory (momentum, mean squares) mapped as gradients map.

    New layers join the first parameter group. They begin without memory, as does what changed its shape without a plan.

    Args:
        plan: the `Widening` that `grown` came from; None after `deepen` and the controls.

    Raises:
        GrowthError: for a parameter that is not the model's, or a memory this rule does not know.
    """
    old, axes = dict(model.named_parameters()), plan.axes(model) if plan else {}
    names = {id(parameter): name for name, parameter in old.items()}
    groups = [{**group, "params": [names.get(id(p)) for p in group["params"]]} for group in optimizer.param_groups]
    if any(None in group["params"] for group in groups):
        raise GrowthError("the optimiser holds parameters that are not the model's; give the network it was made for.")
    groups[0]["params"] += [name for name, _ in grown.named_parameters() if name not in old]
    new = dict(grown.named_parameters())
    larger = type(optimizer)([{**group, "params": [new[name] for name in group["params"]]} for group in groups])
    for parameter, memory in optimizer.state.items():
        name = names[id(parameter)]
        if name not in axes and new[name].shape != parameter.shape:
            continue
        larger.state[new[name]] = {key: _grown(key, value, axes.get(name), plan) for key, value in memory.items()}
    return larger


def _grown(key: str, value: Tensor | None, axis: int | None, plan: Widening | None) -> Tensor | None:
    """One entry of an optimiser's memory, mapped as the gradient or its square."""
    if not isinstance(value, Tensor):
        return value
    if axis is None or plan is None or value.ndim == 0:
        return value.clone()
    if key not in LIKE_GRADIENT | LIKE_SQUARE:
        raise GrowthError(f"it is not known how '{key}' of this optimiser grows; use SGD, Adam or AdamW.")
    return plan.gradient(value, axis) if key in LIKE_GRADIENT else plan.gradient(value.sqrt(), axis).square()


def pad(model: nn.Module, layer: str, width: int, *, outgoing: float = 1.0, seed: int = 0) -> nn.Module:
    """The control for `widen`: new units with random weights of ordinary scale, old weights left alone.

    Args:
        outgoing: factor on the weights that read the new units; 0 keeps the function.

    Raises:
        GrowthError: as `widen`.
    """
    plan, random = Widening.of(model, layer, width), torch.Generator().manual_seed(seed)

    def change(name: str, old: Tensor, axis: int) -> Tensor:
        owner, shape = name.rpartition(".")[0], plan.weight(old, axis).shape
        if owner in plan.wiring.per_unit:  # BatchNorm's weight and variance start at 1, its bias and mean at 0
            new = torch.full(shape, float(name.endswith(("weight", "running_var")))).to(old)
        else:
            fan_in = plan.weight(model.get_submodule(owner).weight, axis)[0].numel()
            new = _ordinary(shape, fan_in, random).to(old) * (outgoing if axis == 1 else 1.0)
        new.narrow(axis, 0, old.shape[axis]).copy_(old)
        return new

    return plan.grow(model, change)


def insert_random(
    model: nn.Module, after: str, *, kernel: int = 3, batch_norm: bool = False, seed: int = 0
) -> nn.Module:
    """The control for `deepen`: the same new layer with ordinary random weights (and an ordinary BatchNorm).

    Raises:
        GrowthError: as `deepen`.
    """
    layer, random = insertion(model, after, kernel), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias):
            tensor.copy_(_ordinary(tensor.shape, layer.weight[0].numel(), random))
    return insert(model, after, layer, norm_for(layer) if batch_norm else None)


def _ordinary(shape: torch.Size, fan_in: int, random: torch.Generator) -> Tensor:
    """PyTorch's ordinary start of a layer's weights or biases: uniform in +-1 / sqrt(fan_in)."""
    return (2 * torch.rand(shape, generator=random) - 1) / math.sqrt(fan_in)
