"""Where the units of one layer go inside a network: who reads them, and what forbids
changing their number.

A *unit* is an output of a linear layer or an output channel of a convolution.
`find_wiring` records a call of the network with `torch.fx` and follows the units,
operation by operation, up to the next linear layers and convolutions, past everything
that treats each unit by itself. It knows a short list of operations and refuses the
rest.

What is read is the call with the required arguments of `forward`, the others left at
their defaults, in eval mode and in training mode. Reading always misses something:
images are taken to come in batches, a BatchNorm1d behind a linear layer to work on
(B, units), and what a forward keeps for its next call is not seen. `widen` and `deepen`
take example inputs for that reason, and compare the answers.
"""

import copy
import inspect
import operator
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node, Proxy, Tracer
from torch.fx.node import map_arg
from torch.fx.proxy import TraceError
from torch.nn import functional as F
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from minisupernet.errors import GrowthError

__all__ = [
    "Wiring",
    "check_same_steps",
    "copy_of",
    "feeding_layer",
    "find_wiring",
    "reason",
    "tensors_of",
]

LAYERS = (nn.Linear, nn.Conv2d)
EACH_NUMBER = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU),
    *(nn.Mish, nn.Softplus, nn.Softsign, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh),
    *(nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Identity, nn.Dropout, nn.Dropout2d),
)
POOLING = (*(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),)
PER_UNIT = {  # keep numbers of their own for each unit, as many as this attribute says
    nn.BatchNorm1d: "num_features",
    nn.BatchNorm2d: "num_features",
    nn.InstanceNorm2d: "num_features",
    nn.PReLU: "num_parameters",
}
MIXING = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
)  # read several units at once
OPERATIONS = {  # names in torch, in torch.nn.functional, and of methods of a tensor
    "each number": "abs celu clamp clone contiguous cos detach elu exp gelu"
    " hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish neg relu relu6 selu"
    " sigmoid silu sin softplus softsign sqrt square tanh",
    "dropout": "dropout",
    "arithmetic": "add div ge gt iadd imul isub itruediv le lt maximum minimum mul pow"
    " sub truediv where",
    "joining": "cat concat concatenate stack",
    "pooling": "adaptive_avg_pool2d adaptive_max_pool2d avg_pool2d max_pool2d",
    "reduction": "amax amin mean sum",
    "reshape": "flatten reshape view",
    "question": "dim size",
}
KINDS = {name: kind for kind, names in OPERATIONS.items() for name in names.split()}
KNOWN = {
    getattr(place, spelt): name
    for place in (operator, torch, F)
    for name in KINDS
    for spelt in (name, f"{name}_")
    if hasattr(place, spelt)
}


@dataclass(frozen=True)
class Wiring:
    """What changes together with the number of units of one layer, as module names.

    `per_unit` holds numbers for each unit (BatchNorm, a depthwise convolution);
    `readers` are the linear layers and convolutions that come next.
    """

    layer: str
    units: int
    per_unit: tuple[str, ...]
    readers: tuple[str, ...]


def find_wiring(
    model: nn.Module, layer: str, regardless: bool = False, given: int | None = None
) -> Wiring:
    """Follow the units of a Linear or Conv2d layer to the layers that read them.

    Args:
        layer: its name in `model.named_modules()`.
        regardless: go on past a layer that mixes units, such as LayerNorm; copying
            units then changes the function.
        given: how many inputs a call has; None for as many as `forward` requires.

    Raises:
        GrowthError: naming what stands in the way: a residual addition, the network's
            output, a layer used twice, a grouped convolution, a layer that mixes units,
            weights that are read elsewhere, or an operation that is not known.
    """
    layer = _first_name(model, layer)
    _check_layer(model.get_submodule(layer), layer)
    readings = [Reading.of(model, mode, given) for mode in (False, True)]
    walks = [_Walk(reading, layer, regardless) for reading in readings]
    per_unit, readers = (
        tuple(dict.fromkeys(name for walk in walks for name in getattr(walk, role)))
        for role in ("per_unit", "readers")
    )
    if not readers:
        raise GrowthError(
            f"nothing reads layer '{layer}', so there is nothing to widen it for."
        )
    changed = (layer, *per_unit, *readers)
    _check_own_weights(model, changed)
    for walk in walks:
        walk.check_elsewhere(changed)
    return Wiring(layer, walks[0].units, per_unit, readers)


@dataclass(frozen=True)
class Place:
    """Where the units lie in a tensor: on which axis, counted from the last (-1), out
    of how many (None where that is not known).

    Of that axis each unit owns a block of `block` numbers; after a flattening, which
    decides how many, `block` is its node.
    """

    axis: int
    axes: int | None
    block: int | Node = 1

    def from_last(self, axis: int) -> int | None:
        """An operation's axis, counted from the last; None where that is not known."""
        if axis >= 0:
            return None if self.axes is None else axis - self.axes
        return axis

    def second(self, of: int | None = None) -> bool:
        """Whether the units lie on axis 1, of `of` axes if that is given; (B, units) is
        what is expected where nothing is known.
        """
        axes = self.axes or 2
        return self.axis == 1 - axes and of in (None, axes)

    def fits(self, size: int, units: int) -> bool:
        """Whether an axis of this size holds the units' blocks."""
        if isinstance(self.block, Node):
            return size % units == 0
        return size == units * self.block


class _Walk:
    """Follows the units of one layer through one reading of the network."""

    def __init__(self, reading: "Reading", layer: str, regardless: bool) -> None:
        self.reading, self.layer, self.regardless = reading, layer, regardless
        start = reading.call_of(layer)
        module = reading.module(start)
        self.units, self.found = len(module.weight), []
        self.places = {
            start: Place(-1, None) if type(module) is nn.Linear else Place(-3, 4)
        }
        self.steps = {start: 0}
        reading.check_plain(start)
        for node in reading.graph.nodes:
            self._visit(node)
        self.found.sort(key=lambda each: each[0])  # the nearest first
        self.per_unit = [name for _, role, name in self.found if role == "per_unit"]
        self.readers = [name for _, role, name in self.found if role == "readers"]

    def _visit(self, node: Node) -> None:
        """Find where the units lie after one step, if they come in."""
        carrying = [each for each in node.all_input_nodes if each in self.places]
        if not carrying:
            return
        self.steps[node] = 1 + min(self.steps[each] for each in carrying)
        place = self.places[carrying[0]]
        if node.op == "output":
            raise GrowthError(
                f"the output of layer '{self.layer}' leaves the network; widen a layer"
                " that others read."
            )
        if node.op == "call_module":
            place = self._module(node, place)
        else:
            place = self._operation(node, place)
        if place:
            self.places[node] = place

    def check_elsewhere(self, changed: tuple[str, ...]) -> None:
        """Refuse what else the network does with modules whose tensors change."""
        expected = {self.layer, *self.per_unit, *self.readers}
        modules = {self.reading.network.get_submodule(name) for name in changed}
        for node in self.reading.graph.nodes:
            name, wrong = self.reading.name(node), False
            if node.op == "call_module" and name in changed:
                self.reading.call_of(name)
                wrong = name not in expected
            elif node.op == "call_module":
                inside = {*self.reading.module(node).modules()}
                _check_read(inside, name)
                wrong = bool(modules & inside)
            elif node.op == "get_attr":
                tensor = f"{name}."
                wrong = any(tensor.startswith(f"{each}.") for each in changed)
                wrong = wrong or any(each.startswith(tensor) for each in changed)
            if wrong:
                raise GrowthError(
                    f"'{name}', which changes with layer '{self.layer}', is also read"
                    " elsewhere in forward, as in a tied decoder, so that it shares its"
                    " weights with another use; give each its own first."
                )

    def _module(self, node: Node, place: Place) -> Place | None:
        """Where the units lie behind a module; None behind those that read them."""
        module, name = self.reading.module(node), self.reading.name(node)
        kind = type(module)
        self.reading.check_plain(node)
        if kind in EACH_NUMBER:
            return place
        if kind in POOLING:
            return self._pooled(node, place)
        if kind is nn.Flatten:
            return self._flattened(node, place, module.start_dim, module.end_dim)
        if kind in PER_UNIT:
            return self._per_unit(node, place, getattr(module, PER_UNIT[kind]))
        if kind in MIXING:
            return self._mixed(node, place)
        if kind is nn.Conv2d and 1 < module.groups == module.in_channels:
            self._meets(node, "per_unit", module.in_channels, place, place.axis == -3)
            times = module.out_channels // module.in_channels
            return replace(place, block=place.block * times)
        if kind not in LAYERS:
            raise self._unknown(node)
        _check_layer(module, name)
        size = module.weight.shape[1]
        here = place.axis == (-1 if kind is nn.Linear else -3)
        return self._meets(node, "readers", size, place, here)

    def _per_unit(self, node: Node, place: Place, size: int) -> Place:
        module = self.reading.module(node)
        if type(module) is nn.PReLU and size == 1:
            return place
        images = type(module) in (nn.BatchNorm2d, nn.InstanceNorm2d)
        self._meets(node, "per_unit", size, place, place.second(4 if images else None))
        return place

    def _mixed(self, node: Node, place: Place) -> Place:
        module = self.reading.module(node)
        if not self.regardless:
            raise GrowthError(
                f"layer {self._called(node)} after '{self.layer}' mixes units, so"
                " copied units would change the function; replace it by BatchNorm."
            )
        if isinstance(module, nn.LayerNorm):
            size, here = module.normalized_shape[0], len(module.normalized_shape)
            self._meets(node, "per_unit", size, place, here == -place.axis)
        elif isinstance(module, nn.GroupNorm):
            size = module.num_channels
            self._meets(node, "per_unit", size, place, place.second())
        return place

    def _meets(
        self, node: Node, role: str, size: int, place: Place, here: bool
    ) -> None:
        """Note a module whose tensors change, if its numbers are the units' blocks."""
        name = self.reading.name(node)
        if not here or not place.fits(size, self.units):
            raise GrowthError(
                f"layer '{name}' does not read the units as blocks of its inputs;"
                " flatten once, from axis 1."
            )
        self.found.append((self.steps[node], role, name))

    def _operation(self, node: Node, place: Place) -> Place | None:
        """Where the units lie behind a function or method; None if they end there."""
        kind = KINDS.get(_operation_name(node))
        if kind == "question" or node.target is getattr:
            return self._asked(node, place)
        if kind in ("arithmetic", "joining"):
            return self._together(node, place, kind)
        if kind == "reshape":
            return self._reshaped(node, place)
        if kind is None or len(node.all_input_nodes) > 1:
            raise self._unknown(node)
        if kind == "pooling":
            return self._pooled(node, place)
        if kind == "reduction":
            return self._reduced(node, place)
        if kind == "dropout" and not self.reading.training and _always_drops(node):
            raise GrowthError(
                f"{self._called(node)} after layer '{self.layer}' is random in eval"
                " mode too; give it training=self.training."
            )
        return place

    def _together(self, node: Node, place: Place, kind: str) -> Place:
        """Numbers of the same units may meet each other, and a number alone."""
        for operand in node.all_input_nodes:
            same = self.places.get(operand) == place
            if kind == "joining" or not (same or self.reading.is_number(operand)):
                raise GrowthError(
                    f"the output of layer '{self.layer}' meets another branch in"
                    f" {self._called(node)}, as in a residual addition, so both would"
                    " have to be widened alike; widen a layer inside the block."
                )
        if _operation_name(node) == "where" and len(node.args) != 3:
            raise self._unknown(node)
        return place

    def _pooled(self, node: Node, place: Place) -> Place:
        """Pooling works on the last two axes: only an image's channels stay apart."""
        if place.axis > -3:
            raise GrowthError(
                f"{self._called(node)} pools over the units of layer '{self.layer}',"
                " which lie on the last axes; pool an image's sides, or before it."
            )
        return place

    def _reduced(self, node: Node, place: Place) -> Place:
        """A mean over other axes than the units' and the batch's."""
        axes = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else ())
        keep = node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False)
        axes = axes if isinstance(axes, tuple | list) else (axes,)
        if not all(type(each) is int for each in axes):
            raise self._unknown(node)
        axes = {place.from_last(each) for each in axes}
        batch = None if place.axes is None else -place.axes
        over = not axes or axes & {None, place.axis, batch}
        if over or not {*node.kwargs} <= {"dim", "keepdim"} or len(node.args) > 3:
            raise GrowthError(
                f"{self._called(node)} after layer '{self.layer}' is not known to leave"
                " out the units and the batch; name the axes, as in mean((2, 3))."
            )
        if keep:
            return place
        after = sum(each > place.axis for each in axes)
        axes = None if place.axes is None else place.axes - len(axes)
        return replace(place, axis=place.axis + after, axes=axes)

    def _reshaped(self, node: Node, place: Place) -> Place:
        """flatten(x, 1), or a view to (batch, -1), which is the same."""
        rest = [*node.args[1:]]
        if _operation_name(node) == "flatten":
            start = node.kwargs.get("start_dim", rest[0] if rest else 0)
            end = node.kwargs.get("end_dim", rest[1] if len(rest) > 1 else -1)
            return self._flattened(node, place, start, end)
        sizes = [*rest[0]] if rest and isinstance(rest[0], tuple | list) else rest
        if len(sizes) == 2 and sizes[1] == -1 and self._is_batch_size(sizes[0]):
            return self._flattened(node, place, 1, -1)
        raise self._torn()

    def _flattened(self, node: Node, place: Place, start: object, end: object) -> Place:
        """Flattening keeps units together if theirs is the first axis it joins."""
        if place.axes is None or type(start) is not int or type(end) is not int:
            raise self._torn()
        first, last = (each % place.axes for each in (start, end))
        here = place.axis + place.axes
        if first >= last:
            return place
        if first < here <= last or first == 0:
            raise self._torn()
        axes = place.axes - (last - first)
        if here == first:
            return Place(first - axes, axes, node)
        return replace(place, axis=here - axes, axes=axes)

    def _torn(self) -> GrowthError:
        return GrowthError(
            f"the reshape after layer '{self.layer}' does not keep units together; use"
            " flatten(1)."
        )

    def _asked(self, node: Node, place: Place) -> None:
        """A tensor may be asked for its type, and for its sizes but the units'."""
        asked = node.args[1] if node.target is getattr else node.target
        if asked in ("dim", "dtype", "device", "ndim"):
            return
        if asked not in ("size", "shape"):
            raise self._unknown(node)
        one = asked == "size" and len(node.args) == 2
        if not all(
            self._is_other_size(each, place) for each in [node] * one or node.users
        ):
            raise GrowthError(
                f"forward asks for the number of units of layer '{self.layer}', which"
                f" changes ({self._called(node)}); take the number from elsewhere."
            )

    def _is_other_size(self, node: Node, place: Place) -> bool:
        """Whether size(0), or shape[0], is the size of another axis than the units'."""
        if node.target not in (operator.getitem, "size"):
            return False
        axis = node.args[1] if len(node.args) > 1 else None
        if not node.users or (axis == 0 and place.axes is None):
            return True
        return type(axis) is int and place.from_last(axis) not in (None, place.axis)

    def _is_batch_size(self, node: object) -> bool:
        """Whether a size is that of axis 0 of a tensor that carries the units."""
        if not isinstance(node, Node) or node.args[1:] != (0,):
            return False
        asked = node.args[0]
        if node.target is operator.getitem:
            asked = asked.args[0] if isinstance(asked, Node) and asked.args else None
        place = self.places.get(asked)
        return place is not None and place.axes is not None

    def _called(self, node: Node) -> str:
        module = self.reading.module(node)
        if module is None:
            return f"'{_operation_name(node)}'"
        return f"'{self.reading.name(node)}' ({type(module).__name__})"

    def _unknown(self, node: Node) -> GrowthError:
        return GrowthError(
            f"{self._called(node)} after layer '{self.layer}' is not known to treat"
            " each unit by itself; use a known layer."
        )


def feeding_layer(model: nn.Module, name: str, given: int | None = None) -> nn.Module:
    """A Linear or Conv2d layer with as many units as arrive at module `name`, on the
    same axis.

    Raises:
        GrowthError: where none is found, or they are flattened on the way.
    """
    name = _first_name(model, name)
    found = set()
    for mode in (False, True):
        reading = Reading.of(model, mode, given)
        node = reading.call_of(name)
        reading.check_plain(node)
        reading.check_in_place(node)
        found.add(_feeding(reading)[node])
    if len(found) > 1 or None in found:
        raise GrowthError(
            f"found no Linear or Conv2d layer whose units reach '{name}' unchanged;"
            " insert elsewhere."
        )
    return model.get_submodule(found.pop())


def _feeding(reading: "Reading") -> dict[Node, str | None]:
    """For each step, the name of the layer whose units its output has; None where that
    is not known.

    Where outputs of several layers meet, the widest is named: the others are as wide,
    or one unit that is spread over all.
    """
    found = {}
    for node in reading.graph.nodes:
        found[node], module = None, reading.module(node)
        if type(module) in LAYERS and not reading.is_changed_by_hand(module):
            found[node] = reading.name(node)
            continue
        inputs = [each for each in node.all_input_nodes if not reading.is_number(each)]
        names = [found[each] for each in inputs]
        if not names or None in names or not _keeps_shape(reading, node):
            continue
        layers = {each: reading.network.get_submodule(each) for each in names}
        alike = {(type(each), each.weight.dtype) for each in layers.values()}
        flat = any(isinstance(each, nn.Linear) for each in layers.values())
        if len(alike) == 1 and not (flat and _pools(reading, node)):
            found[node] = max(names, key=lambda each: len(layers[each].weight))
    return found


def _keeps_shape(reading: "Reading", node: Node) -> bool:
    """Whether a step leaves the units where they are, as many as before."""
    module = reading.module(node)
    if module is not None:
        known = type(module) in (*EACH_NUMBER, *POOLING, *PER_UNIT, *MIXING)
        return known and not reading.is_changed_by_hand(module)
    kind, inputs = KINDS.get(_operation_name(node)), len(node.all_input_nodes)
    return kind == "arithmetic" or (
        inputs == 1 and kind in ("each number", "dropout", "pooling")
    )


def _pools(reading: "Reading", node: Node) -> bool:
    kind = KINDS.get(_operation_name(node))
    return type(reading.module(node)) in POOLING or kind == "pooling"


@dataclass(frozen=True)
class Reading:
    """The steps of one call of a network, recorded from a copy of it."""

    graph: Graph
    network: nn.Module
    root: nn.Module
    training: bool

    @classmethod
    def of(cls, model: nn.Module, training: bool, given: int | None) -> "Reading":
        """Record a call with `given` inputs in one of the two modes.

        Raises:
            GrowthError: where the call cannot be recorded.
        """
        if any(is_lazy(each) for each in (*model.parameters(), *model.buffers())):
            raise GrowthError(
                "the network has layers whose sizes are not known yet; run it on one"
                " batch first."
            )
        network = copy_of(model)
        root, tracer = _Call(network), _Tracer(given)
        for name, module in network.named_modules():
            if not tracer.is_leaf_module(module, name):
                _check_no_hooks(module, name)
        try:
            network.train(training)
            with torch.random.fork_rng(devices=[]):
                return cls(tracer.trace(root), network, root, training)
        except Exception as error:  # a forward may fail under tracing in any way
            raise GrowthError(
                f"{type(model).__name__} cannot be traced by torch.fx"
                f" ({reason(error)}); take branches and loops that depend on values"
                " out of its forward."
            ) from error

    def name(self, node: Node) -> str:
        """The name of the module or tensor that a step is about."""
        return str(node.target).removeprefix("network").removeprefix(".")

    def module(self, node: Node) -> nn.Module | None:
        """The module that a step calls, if it calls one."""
        if node.op != "call_module":
            return None
        return self.network.get_submodule(self.name(node))

    def call_of(self, name: str) -> Node:
        """The one step that calls module `name`."""
        calls = [
            node
            for node in self.graph.nodes
            if node.op == "call_module" and self.name(node) == name
        ]
        if len(calls) != 1:
            raise GrowthError(
                f"layer '{name}' is called {len(calls)} times in a forward pass in"
                f" {'training' if self.training else 'eval'} mode; it must be called"
                " once."
            )
        return calls[0]

    def is_number(self, node: Node) -> bool:
        """Whether a step only fetches a tensor that is one number, such as a scale."""
        if node.op != "get_attr":
            return False
        value = operator.attrgetter(node.target)(self.root)
        return isinstance(value, Tensor) and value.numel() == 1 and value.ndim <= 1

    def is_changed_by_hand(self, module: nn.Module) -> bool:
        """Whether a module has hooks, or a forward that is not its class's."""
        hooks = (module._forward_hooks, module._forward_pre_hooks)
        return any(hooks) or "forward" in vars(module)

    def check_plain(self, node: Node) -> None:
        """Refuse a module whose hooks may change what it computes."""
        module, name = self.module(node), self.name(node)
        _check_no_computed(module, name)
        _check_no_hooks(module, name)
        if "forward" in vars(module):
            raise GrowthError(
                f"'{name}' has been given another forward; make it a class of its own."
            )

    def check_in_place(self, node: Node) -> None:
        """Refuse an activation that overwrites what is read after it."""
        nodes = [*self.graph.nodes]
        here, same = nodes.index(node), {*node.all_input_nodes}
        for before in reversed(nodes[:here]):
            if before in same and _keeps_shape(self, before):
                same |= {*before.all_input_nodes}  # perhaps the same tensor
        later = {user for before in same for user in before.users} - {
            *nodes[: here + 1]
        }
        if later and getattr(self.module(node), "inplace", False):
            raise GrowthError(
                f"'{self.name(node)}' works in place on a tensor that is read after it;"
                " make it with inplace=False."
            )

    def steps(self, inserted: str | None = None) -> list[tuple]:
        """What the steps do, without names; those of an insertion behind the activation
        `inserted` are left out.
        """
        number, found = {}, []
        for node in self.graph.nodes:
            name, target = self.name(node), node.target
            if node.op == "call_module" and inserted:
                if name.startswith(f"{inserted}.") and name != f"{inserted}.0":
                    number[node] = number[node.all_input_nodes[0]]
                    continue
                target = f"network.{inserted}" if name == f"{inserted}.0" else target
            number[node] = len(found)
            given = map_arg((node.args, node.kwargs), lambda each: f"%{number[each]}")
            found.append((node.op, target, repr(given)))
        return found

    def constants(self) -> list[Tensor]:
        """Tensors that forward makes out of numbers alone."""
        return [each for each in vars(self.root).values() if isinstance(each, Tensor)]


class _Call(nn.Module):
    """A call of a network as its users make it, its other arguments at their
    defaults.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> object:
        return self.network(*inputs)


class _Value(Proxy):
    """A value in a recorded call, which does not say what it is: a forward that asks
    would go another way with a tensor.
    """

    @property
    def __class__(self) -> type:
        asks = sys._getframe(1)
        while asks.f_globals.get("__name__") == "abc":
            asks = asks.f_back
        own = asks.f_globals.get("__name__", "").split(".")[0] == "torch"
        if not own or asks.f_code.co_name == "is_tensor":
            raise TraceError("forward asks what type a value is")
        return _Value


class _Tracer(Tracer):
    """Records a `_Call` with `given` inputs, None for those that are required."""

    proxy_buffer_attributes = True

    def __init__(self, given: int | None) -> None:
        super().__init__()
        self.given = given

    def create_args_for_root(
        self, root_fn: object, is_module: bool, concrete_args: object = None
    ) -> tuple[object, list]:
        given = _required(self.root.network) if self.given is None else self.given
        inputs = [
            self.create_proxy("placeholder", f"input_{place}", (), {})
            for place in range(given)
        ]
        return root_fn, [self.root, *inputs]

    def proxy(self, node: Node) -> Proxy:
        return _Value(node, self)


def check_same_steps(
    model: nn.Module,
    grown: nn.Module,
    inserted: str | None = None,
    given: int | None = None,
) -> None:
    """Make sure that a grown network does what the old one did, step by step, but for
    what was inserted.

    Raises:
        GrowthError: where `forward` goes another way, as after a look at out_features.
    """
    for mode in (False, True):
        old, new = (Reading.of(each, mode, given) for each in (model, grown))
        pairs = zip(old.constants(), new.constants(), strict=False)
        same = old.steps() == new.steps(inserted) and all(
            torch.equal(*each) for each in pairs
        )
        if not same:
            raise GrowthError(
                "the grown network would take other steps than the old one, as after a"
                " look at out_features or at a module's type; take it out of forward."
            )


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy; results that the model keeps from an earlier call are copied without
    their history.

    Raises:
        GrowthError: where it cannot be copied.
    """
    kept = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in tree_leaves(vars(module))
        if isinstance(value, Tensor) and not value.is_leaf
    }
    try:
        return copy.deepcopy(model, kept)
    except Exception as error:  # what a module holds may refuse in any way
        raise GrowthError(
            f"{type(model).__name__} cannot be copied ({reason(error)}); take out of"
            " it what copy.deepcopy does not copy."
        ) from error


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and buffers, without those of modules in it."""
    return {
        **dict(module.named_parameters(recurse=False)),
        **dict(module.named_buffers(recurse=False)),
    }


def _first_name(model: nn.Module, name: str) -> str:
    """The first of a module's names, which is the one that its parameters go by."""
    named = dict(model.named_modules(remove_duplicate=False))
    if name not in named or not name:
        raise GrowthError(
            f"there is no layer '{name}'; choose one of"
            f" {', '.join(filter(None, named))}."
        )
    return next(each for each in named if named[each] is named[name])


def _check_layer(module: nn.Module, name: str) -> None:
    """Refuse all but an ungrouped Linear or Conv2d layer."""
    _check_no_computed(module, name)
    if type(module) not in LAYERS:
        raise GrowthError(
            f"layer '{name}' is {type(module).__name__}; only Linear and Conv2d layers"
            " have units to copy."
        )
    if getattr(module, "groups", 1) == 1:
        return
    if module.groups == module.in_channels:
        raise GrowthError(
            f"layer '{name}' is a grouped convolution with a group for each channel, so"
            " its channels are those of the layer before it; widen that."
        )
    raise GrowthError(
        f"layer '{name}' is a grouped convolution, whose channels are tied to groups;"
        " use groups=1."
    )


def _check_no_computed(module: nn.Module, name: str) -> None:
    own = {key for key in ("weight", "bias") if getattr(module, key, None) is not None}
    if nn.utils.parametrize.is_parametrized(module) or own - {*module._parameters}:
        raise GrowthError(
            f"a weight of layer '{name}' is computed from others; remove its"
            " parametrisation first."
        )


def _check_read(inside: set[nn.Module], name: str) -> None:
    """Refuse other code than PyTorch's within one of its modules, such as a
    parametrisation: it is not recorded, and may read anything.
    """
    for module in inside:
        if type(module).__module__.split(".")[0] != "torch":
            raise GrowthError(
                f"what {type(module).__name__} does inside '{name}' is not seen;"
                " compute it in forward."
            )


def _check_no_hooks(module: nn.Module, name: str) -> None:
    if module._forward_hooks or module._forward_pre_hooks:
        called = f"'{name}'" if name else "the network"
        raise GrowthError(
            f"{called} has forward hooks, which may change what it computes; remove"
            " them, and put them on the grown network."
        )


def _check_own_weights(model: nn.Module, names: tuple[str, ...]) -> None:
    """Refuse modules that share a tensor with another, or hold tensors that their class
    does not.
    """
    uses = Counter(map(_memory, _all_tensors(model)))
    for name in names:
        module = model.get_submodule(name)
        tensors = tensors_of(module)
        if any(uses[_memory(each)] > 1 for each in tensors.values()):
            raise GrowthError(
                f"layer '{name}' shares its weights with another layer; give each its"
                " own first."
            )
        own = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
        if {*tensors} - own or [*module.children()]:
            raise GrowthError(
                f"layer '{name}' holds more than a {type(module).__name__} does; take"
                " out what was added to it."
            )


def _all_tensors(model: nn.Module) -> Iterator[Tensor]:
    return (each for module in model.modules() for each in tensors_of(module).values())


def _memory(tensor: Tensor) -> int:
    """Where a tensor lies, the same for all that are tied to it."""
    return tensor.data_ptr() or id(tensor)


def _required(network: nn.Module) -> int:
    """How many inputs a call of the network needs, one at the least."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    arguments = inspect.signature(network.forward).parameters.values()
    return max(
        1, sum(each.kind in kinds and each.default is each.empty for each in arguments)
    )


def _operation_name(node: Node) -> str:
    """The name of a function or method, the same for torch.relu, relu_, F.relu and
    x.relu(); what is not torch's gets no name of torch's.
    """
    if node.op == "call_method":
        return node.target.rstrip("_")
    name = getattr(node.target, "__name__", str(node.target))
    known = KNOWN.get(node.target) if node.op == "call_function" else None
    return known or (f"{name}()" if name in KINDS else name)


def _always_drops(node: Node) -> bool:
    training = node.args[2] if len(node.args) > 2 else True
    return node.kwargs.get("training", node.kwargs.get("train", training)) is not False


def reason(error: Exception) -> str:
    """The first line of what an error says."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
