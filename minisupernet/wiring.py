"""Where the units of one layer go inside a network: who reads them, and what forbids
changing their number.

A *unit* is an output of a linear layer or an output channel of a convolution.
`find_wiring` follows the units through the traced network up to the next linear layers
and convolutions, past everything that treats each unit by itself.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import Graph, Node

from minisupernet.errors import GrowthError

__all__ = ["Wiring", "feeding_layer", "find_wiring"]

POINTWISE = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Softplus,
    nn.Hardswish,
    nn.Hardtanh,
    nn.Tanh,
    nn.Sigmoid,
    nn.Identity,
    nn.Dropout,
    nn.Dropout2d,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
)
PER_UNIT = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.PReLU,
)  # keep numbers of their own for each unit
MIXING = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
)  # compute each output from several units
FUNCTIONS = {
    "relu",
    "relu_",
    "leaky_relu",
    "elu",
    "gelu",
    "silu",
    "tanh",
    "sigmoid",
    "dropout",
    "max_pool2d",
    "avg_pool2d",
    "adaptive_avg_pool2d",
    "adaptive_max_pool2d",
    "contiguous",
    "boolean_dispatch",
}
ARITHMETIC = {"add", "iadd", "add_", "sub", "isub", "mul", "imul", "truediv"}


@dataclass(frozen=True)
class Wiring:
    """What changes together with the number of units of one layer, as module names.

    `per_unit` holds numbers for each unit (BatchNorm); `readers` are the linear layers
    and convolutions that come next.
    """

    layer: str
    units: int
    per_unit: tuple[str, ...]
    readers: tuple[str, ...]


def find_wiring(model: nn.Module, layer: str, regardless: bool = False) -> Wiring:
    """Follow the units of a Linear or Conv2d layer to the layers that read them.

    Args:
        layer: its name in `model.named_modules()`.
        regardless: go on past a layer that mixes units, such as LayerNorm; copying
            units then changes the function.

    Raises:
        GrowthError: naming what stands in the way: a residual addition, the network's
            output, a layer used twice, a grouped convolution, a layer that mixes units,
            or an operation that is not known.
    """
    start = _only_call(model, layer)
    module = _plain(model, layer)
    units, found = len(module.weight), {"per_unit": [], "readers": []}
    todo = [
        (user, isinstance(module, nn.Linear)) for user in start.users
    ]  # (node, units lie on the last axis)
    while todo:
        node, flat = todo.pop(0)
        kind, flat = _step(model, node, layer, flat, regardless)
        if kind in found and node.target not in found[kind]:
            _check_reads(model, node.target, units, flat)
            found[kind].append(node.target)
        if kind in ("per_unit", "onward"):
            todo += [(user, flat) for user in node.users]
    if not found["readers"]:
        raise GrowthError(
            f"nothing reads layer '{layer}', so there is nothing to widen it for."
        )
    return Wiring(layer, units, tuple(found["per_unit"]), tuple(found["readers"]))


def feeding_layer(model: nn.Module, name: str) -> nn.Module:
    """The Linear or Conv2d layer whose units arrive at module `name`, found by going
    back through the network.

    Raises:
        GrowthError: where none is found, or they are flattened on the way.
    """
    node = _only_call(model, name)
    while node.op != "placeholder":
        module = model.get_submodule(node.target) if node.op == "call_module" else None
        if type(module) in (nn.Linear, nn.Conv2d):
            return module
        known = (
            type(module) in POINTWISE + PER_UNIT + MIXING
            or _name(node) in FUNCTIONS | ARITHMETIC
        )
        if not known or not node.all_input_nodes:
            break
        node = node.all_input_nodes[0]
    raise GrowthError(
        f"found no Linear or Conv2d layer whose units reach '{name}' unchanged; insert"
        " elsewhere."
    )


def _step(
    model: nn.Module, node: Node, layer: str, flat: bool, regardless: bool
) -> tuple[str, bool]:
    """What one operation does with the units: (kind, whether they now lie on the last
    axis).
    """
    module = model.get_submodule(node.target) if node.op == "call_module" else None
    name = type(module).__name__ if module else _name(node)
    after = f"'{node.target}' ({name})" if module else f"'{name}'"
    if node.op == "output":
        raise GrowthError(
            f"the output of layer '{layer}' leaves the network; widen a layer that"
            " others read."
        )
    if name == "Flatten" or name in ("flatten", "view", "reshape"):
        _check_flatten(node, module, layer, flat)
        return "onward", True
    if _other_operands(node) or name == "cat":
        raise GrowthError(
            f"the output of layer '{layer}' meets another branch in {after}, as in a"
            " residual addition, so both would have to be widened alike; widen a layer"
            " inside the block."
        )
    if type(module) in MIXING:
        if not regardless:
            raise GrowthError(
                f"layer {after} after '{layer}' mixes units, so copied units would"
                " change the function; replace it by BatchNorm."
            )
        return "per_unit", flat
    if type(module) in (nn.Linear, nn.Conv2d):
        return "readers", flat
    if type(module) in PER_UNIT:
        return (
            "onward" if getattr(module, "num_parameters", 2) == 1 else "per_unit"
        ), flat
    if type(module) in POINTWISE or name in FUNCTIONS | ARITHMETIC:
        return "onward", flat
    if name == "mean" and not flat and {*_axes(node)} in ({2, 3}, {-2, -1}):
        return "onward", not node.kwargs.get("keepdim", False)
    if _asks_for_batch_size(node):
        return "nothing", flat
    raise GrowthError(
        f"{after} after layer '{layer}' is not known to treat each unit by itself; use"
        " a known layer."
    )


def _only_call(model: nn.Module, name: str) -> Node:
    """The one place where the traced network calls module `name`."""
    named = dict(model.named_modules())
    if name not in named or not name:
        raise GrowthError(
            f"there is no layer '{name}'; choose one of"
            f" {', '.join(filter(None, named))}."
        )
    calls = [
        node
        for node in _trace(model).nodes
        if node.op == "call_module" and node.target == name
    ]
    if len(calls) != 1:
        raise GrowthError(
            f"layer '{name}' is called {len(calls)} times in a forward pass; it must be"
            " called once."
        )
    return calls[0]


def _trace(model: nn.Module) -> Graph:
    try:
        return torch.fx.Tracer().trace(model)
    except Exception as error:  # a forward may fail under tracing in any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise GrowthError(
            f"{type(model).__name__} cannot be traced by torch.fx ({reason}); take"
            " branches and loops that depend on values out of its forward."
        ) from error


def _plain(model: nn.Module, name: str) -> nn.Module:
    """Module `name`, if it is an ungrouped Linear or Conv2d with weights of its own."""
    module = model.get_submodule(name)
    if type(module) not in (nn.Linear, nn.Conv2d):
        raise GrowthError(
            f"layer '{name}' is {type(module).__name__}; only Linear and Conv2d layers"
            " have units to copy."
        )
    if getattr(module, "groups", 1) != 1:
        raise GrowthError(
            f"layer '{name}' is a grouped convolution, whose channels are tied to"
            " groups; use groups=1."
        )
    _check_own_weights(model, name)
    return module


def _check_own_weights(model: nn.Module, name: str) -> None:
    module, uses = model.get_submodule(name), Counter(_parameter_ids(model.modules()))
    if (
        getattr(module, "weight", None) is not None
        and "weight" not in module._parameters
    ):
        raise GrowthError(
            f"the weight of layer '{name}' is computed from others; remove its"
            " parametrisation first."
        )
    if any(uses[id(parameter)] > 1 for parameter in module.parameters(recurse=False)):
        raise GrowthError(
            f"layer '{name}' shares its weights with another layer; give each its own"
            " first."
        )


def _parameter_ids(modules: Iterable[nn.Module]) -> Iterator[int]:
    return (
        id(parameter)
        for module in modules
        for parameter in module.parameters(recurse=False)
    )


def _check_reads(model: nn.Module, name: str, units: int, flat: bool) -> None:
    """Refuse a reader that does not read these units as whole blocks, or is used
    elsewhere too.
    """
    _only_call(model, name)
    module = model.get_submodule(name)
    if type(module) not in (nn.Linear, nn.Conv2d):
        return _check_own_weights(model, name)
    _plain(model, name)
    misplaced = isinstance(module, nn.Linear) != flat
    if misplaced or module.weight.shape[1] % units:
        raise GrowthError(
            f"layer '{name}' does not read the units as blocks of its inputs; flatten"
            " once, from axis 1."
        )


def _check_flatten(
    node: Node, module: nn.Module | None, layer: str, flat: bool
) -> None:
    """Flattening an image must keep the batch axis and nothing else: flatten(x, 1), or
    a view to (batch, -1).
    """
    if module is not None:
        right = (module.start_dim, module.end_dim) == (1, -1)
    else:
        rest = [*node.args[1:], *node.kwargs.values()]
        rest = (
            [*rest[0]] if len(rest) == 1 and isinstance(rest[0], tuple | list) else rest
        )
        right = (
            rest in ([1], [1, -1])
            if _name(node) == "flatten"
            else len(rest) == 2 and rest[1] == -1
        )
    if flat or not right:
        raise GrowthError(
            f"the reshape after layer '{layer}' does not keep units together; use"
            " flatten(1)."
        )


def _name(node: Node) -> str:
    return (
        node.target
        if isinstance(node.target, str)
        else getattr(node.target, "__name__", str(node.target))
    )


def _other_operands(node: Node) -> bool:
    return (
        node.op in ("call_function", "call_method")
        and _name(node) in ARITHMETIC
        and len(node.all_input_nodes) > 1
    )


def _axes(node: Node) -> tuple[int, ...]:
    axes = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else ())
    return tuple(axes) if isinstance(axes, tuple | list) else (axes,)


def _asks_for_batch_size(node: Node) -> bool:
    """x.size(0), or x.shape of which only element 0 is used."""
    if node.op == "call_method" and node.target == "size":
        return node.args[1:] == (0,)
    asks = _name(node) == "getattr" and node.args[1] == "shape"
    return asks and all(
        _name(user) == "getitem" and user.args[1] == 0 for user in node.users
    )
