"""The target side: which weights a network needs, and how to run many generated
networks in one call.

A *target* is an ordinary `nn.Module`. `WeightSpec` lists the tensors it needs; a
generator makes them with a leading task axis; `run_tasks` runs the T networks that
result, each on its own images.
"""

import copy
import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from minisupernet.errors import CourseError, TargetError
from minisupernet.fast.convolution import FastConvolutions

__all__ = [
    "MakesWeights",
    "TaskClassifier",
    "TensorSpec",
    "WeightSpec",
    "copy_of",
    "places_of",
    "run_tasks",
]

Weights = dict[str, Tensor]  # name -> (T, *shape)
Outputs = Tensor | tuple | dict  # whatever the target returns


class TaskClassifier(nn.Module):
    """The 37,165-weight binary classifier of the original SuperNet: images (B, 3, 32,
    32) in, logits (B,) out.

    Four 5x5 convolutions of stride 2 with `channels` filters, then fully connected
    layers 100-100-1.

    Args:
        head_activation: leaky ReLU between the fully connected layers. The original has
            none there, so its three layers are one linear map; pass False for that.
    """

    def __init__(
        self, channels: int = 16, hidden: int = 100, head_activation: bool = True
    ) -> None:
        super().__init__()
        inputs = [3, channels, channels, channels]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(c, channels, 5, stride=2, padding=2) for c in inputs
        )
        self.linears = nn.ModuleList(
            [nn.Linear(4 * channels, hidden), nn.Linear(hidden, hidden)]
        )
        self.output = nn.Linear(hidden, 1)
        self.head_slope = (
            0.2 if head_activation else 1.0
        )  # a slope of 1 is no activation

    def forward(self, images: Tensor) -> Tensor:
        x = images  # (B, 3, 32, 32)
        for convolution in self.convolutions:
            x = F.leaky_relu(convolution(x), 0.2)  # (B, 16, 16, 16), then 8x8, 4x4, 2x2
        x = x.flatten(1)  # (B, 64)
        for linear in self.linears:
            x = F.leaky_relu(linear(x), self.head_slope)  # (B, 100)
        return self.output(x).squeeze(1)  # (B,)


@dataclass(frozen=True)
class TensorSpec:
    """One tensor the target needs.

    `centre` and `spread` (a standard deviation) say where an ordinary initialisation
    puts its values: PyTorch's rule for linear and convolutional layers,
    U(-1/sqrt(fan_in), 1/sqrt(fan_in)), has centre 0 and spread 1/sqrt(3 fan_in), and
    its bilinear, embedding, attention and recurrent-cell layers have their own. All
    other tensors are where the module has them: the scale and shift of a normalisation
    layer with spread 0, those of layers of one's own with their mean and spread.
    """

    name: str
    shape: tuple[int, ...]
    fan_in: int = 1
    fan_out: int = 1
    centre: float = 0.0
    spread: float = 0.0

    @property
    def size(self) -> int:
        """Number of weights in this tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class WeightSpec:
    """The weights of one target network: names, shapes, fan-ins and starting scales, in
    a fixed order.
    """

    tensors: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, module: nn.Module) -> "WeightSpec":
        """List the weights of any module made of the usual layers.

        Raises:
            TargetError: naming the layer, where T networks cannot run side by side
                (BatchNorm or Dropout in training mode, recurrent layers, lazy layers
                not yet given their shape) or where there is no weight.
        """
        _refuse_coupled(module)
        tensors = [
            _describe(name, parameter, module)
            for name, parameter in module.named_parameters()
        ]
        if not tensors:
            raise TargetError(
                f"{type(module).__name__} has no weights to generate; give a module"
                " with parameters."
            )
        return cls(tuple(tensors))

    @property
    def size(self) -> int:
        """Number of weights P in one target network."""
        return sum(tensor.size for tensor in self.tensors)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape of each tensor, in order."""
        return {tensor.name: tensor.shape for tensor in self.tensors}

    def split(self, flat: Tensor) -> Weights:
        """Cut rows of P weights (T, P) into named tensors {name: (T, *shape)}; views,
        no copy.
        """
        if flat.ndim != 2 or flat.shape[1] != self.size:
            raise TargetError(
                f"expected weights of shape (T, {self.size}), got {tuple(flat.shape)}."
            )
        pieces = flat.split([tensor.size for tensor in self.tensors], dim=1)
        return {
            t.name: piece.unflatten(1, t.shape) if t.shape else piece.squeeze(1)
            for t, piece in zip(self.tensors, pieces, strict=True)
        }

    def join(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `split`: named tensors {name: (T, *shape)} to rows (T, P)."""
        self.check(weights)
        rows = [weights[t.name].reshape(-1, t.size) for t in self.tensors]
        return torch.cat(rows, dim=1)

    def check(self, weights: Mapping[str, Tensor]) -> int:
        """Return T, the number of networks in `weights`; raise TargetError where a name
        or shape is wrong.
        """
        return _count_tasks(weights, self.shapes)

    def draw(
        self, tasks: int, generator: torch.Generator, rule: str = "torch"
    ) -> Tensor:
        """Ordinary initial weights of `tasks` networks, (tasks, P), on the generator's
        device.

        `rule` is "torch" (uniform around each centre with its spread) or "glorot"
        (TensorFlow's default: U(-a, a) with a = sqrt(6 / (fan_in + fan_out)), every
        bias 0); tensors of spread 0 are at their centre.

        Raises:
            TargetError: for another rule.
        """
        if rule not in ("torch", "glorot"):
            raise TargetError(f"there is no rule '{rule}'; choose 'torch' or 'glorot'.")
        device = generator.device
        unit = (
            torch.rand(tasks, self.size, generator=generator, device=device) * 2 - 1
        )  # spread 1/sqrt(3)
        if rule == "glorot":
            limits = [
                (len(t.shape) > 1) * math.sqrt(6 / (t.fan_in + t.fan_out))
                for t in self.tensors
            ]
            drawn = unit * self._fill(limits, device)
            fixed = self.spreads(device) == 0
            return torch.where(fixed, self.centres(device), drawn)
        return self.centres(device) + unit * math.sqrt(3) * self.spreads(device)

    def centres(self, device: torch.device | str = "cpu") -> Tensor:
        """Where an ordinary initialisation centres each weight, (P,)."""
        return self._fill([tensor.centre for tensor in self.tensors], device)

    def spreads(self, device: torch.device | str = "cpu") -> Tensor:
        """The standard deviation of an ordinary initialisation for each weight,
        (P,).
        """
        return self._fill([tensor.spread for tensor in self.tensors], device)

    def _fill(self, values: list[float], device: torch.device | str) -> Tensor:
        """One value a tensor, repeated for each of its weights, (P,)."""
        sizes = torch.tensor([tensor.size for tensor in self.tensors], device=device)
        return torch.tensor(values, device=device).repeat_interleave(sizes)


class MakesWeights(nn.Module):
    """A generator whose state says which target it makes weights for: names and shapes
    of all tensors, in order, from its `spec` or its `shapes`.

    `load_state_dict` refuses the state of a generator for another target, where equal
    sizes would let it pass.
    """

    def _made(self) -> list[str]:
        shapes = self.shapes if hasattr(self, "shapes") else self.spec.shapes
        return [f"{name} {shape}" for name, shape in shapes.items()]

    def _save_to_state_dict(self, destination, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination._metadata[prefix[:-1]]["makes"] = self._made()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest) -> None:
        theirs, ours = local_metadata.get("makes"), self._made()
        if theirs is not None and theirs != ours:
            pairs = zip(theirs, ours, strict=False)
            there, here = next(
                (pair for pair in pairs if pair[0] != pair[1]),
                (f"{len(theirs)} tensors", f"{len(ours)}"),
            )
            raise TargetError(
                "this state belongs to a generator for another target: it makes"
                f" {there} where this one makes {here}; load it into a generator for"
                " that target."
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def copy_of(target: nn.Module) -> nn.Module:
    """A copy of the target with parameters and buffers of its own.

    Raises:
        TargetError: where something in it cannot be copied.
    """
    try:
        return copy.deepcopy(target)
    except Exception as error:
        raise TargetError(
            f"{type(target).__name__} cannot be copied ({error}); keep no outputs of"
            " its layers in it, nor the old weight_norm and spectral_norm."
        ) from error


def run_tasks(
    target: nn.Module, weights: Mapping[str, Tensor], images: Tensor
) -> Outputs:
    """Run T different networks at once: task t's weights on task t's images.

    Equal, to float rounding, to a Python loop of `functional_call(target, weights of t,
    images[t])`. Inside an autocast block the networks run wholly in its dtype.

    Args:
        target: the architecture; its own parameter values are not used, and nothing in
            it is changed.
        weights: {name: (T, *shape)}, as a generator or `WeightSpec.split` gives them.
        images: (T, B, ...), B images for each of the T networks.

    Returns:
        The target's outputs with a leading task axis; (T, B) for `TaskClassifier`.

    Raises:
        TargetError: where names, shapes or the number of tasks do not fit, or a layer
            cannot run per task.
    """
    if not torch.compiler.is_compiling():
        _refuse_coupled(target)
    shapes = {name: tuple(p.shape) for name, p in target.named_parameters()}
    tasks = _count_tasks(weights, shapes)
    if images.shape[:1] != (tasks,):
        raise TargetError(
            f"these weights are {tasks} networks, so images must be ({tasks}, B, ...),"
            f" not {_shape(images)}."
        )
    weights, buffers, images = _in_one_dtype(target, weights, images)
    places = places_of(target)

    def run(own: Weights, x: Tensor) -> Outputs:
        state = {place: own[name] for place, name in places.items()} | buffers
        return functional_call(target, state, (x,), tie_weights=False)

    with _unchanged(target, weights, buffers, images):
        return _side_by_side(run, target, weights, images)


def _side_by_side(
    run: Callable, target: nn.Module, weights: Weights, images: Tensor
) -> Outputs:
    """The outputs of `run(weights of t, images[t])`, stacked."""

    def first() -> Outputs:
        return run({name: own[0] for name, own in weights.items()}, images[0])

    if len(images) == 1:  # nothing to run side by side
        return _stacked(target, first())
    if torch.compiler.is_compiling():
        return vmap(run)(weights, images)
    quick = images.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    try:
        with FastConvolutions() if quick else nullcontext():
            return vmap(run)(weights, images)
    except (CourseError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        with torch.no_grad():
            _stacked(target, first())  # which says what is wrong where one alone fails
        raise _cannot(target, error) from error


def _stacked(target: nn.Module, outputs: Outputs) -> Outputs:
    """The outputs of one network with a leading task axis of 1."""

    def stack(output: object) -> Tensor:
        if isinstance(output, Tensor):
            return output[None]
        raise TargetError(
            f"{type(target).__name__} returns {type(output).__name__} among its"
            " outputs; let it return tensors, or tuples, lists or dicts of them."
        )

    return tree_map(stack, outputs)


def _cannot(target: nn.Module, error: Exception) -> TargetError:
    """The sentence for what one network can do and T side by side cannot."""
    said, name = str(error) or repr(error), type(target).__name__
    if "randomness" in said:
        return TargetError(f"{name} {RANDOM}.")
    if any(word in said for word in ("in-place", "inplace", "match the broadcast")):
        return TargetError(
            f"{name} writes into a tensor that all networks share; call .eval() on it,"
            " or make that tensor from the images (images.new_zeros)."
        )
    return TargetError(
        f"{name} cannot run per task ({said.splitlines()[0][:120]}); write that"
        " operation in others."
    )


def _in_one_dtype(
    target: nn.Module, weights: Mapping[str, Tensor], images: Tensor
) -> tuple[Weights, Weights, Tensor]:
    """Weights, copies of the target's own buffers and images, in autocast's dtype where
    it is on.

    Under `vmap` autocast reaches some operations and not others, and a network needs
    one dtype. The buffers are copies, so that a run can change none of the target's.
    """
    device = images.device.type
    is_on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(
        device
    )
    dtype = torch.get_autocast_dtype(device) if is_on else None

    def cast(tensor: Tensor, copied: bool = False) -> Tensor:
        own = dtype if tensor.is_floating_point() else None
        return tensor.to(own or tensor.dtype, copy=copied)

    copies = {name: cast(own, copied=True) for name, own in target.named_buffers()}
    places = places_of(target, "_buffers")
    buffers = {place: copies[name] for place, name in places.items()}
    return {name: cast(own) for name, own in weights.items()}, buffers, cast(images)


def places_of(target: nn.Module, kind: str = "_parameters") -> dict[str, str]:
    """Where a tensor goes: every place that holds one ("_parameters" or "_buffers"), to
    the name it goes by in `named_parameters()`.

    Layers may share a tensor, which then has one name and several places; a layer that
    is reached under two names is one place.
    """
    places, name_of = {}, {}
    for path, layer in target.named_modules():
        for key, own in getattr(layer, kind).items():
            if own is not None:
                place = f"{path}.{key}".lstrip(".")
                places[place] = name_of.setdefault(id(own), place)
    return places


@contextmanager
def _unchanged(
    target: nn.Module, weights: Weights, buffers: Weights, images: Tensor
) -> Iterator[None]:
    """Inside the block the target runs; afterwards it is as it was, and so are all
    random states. A run that drew or wrote what would not be as in a loop is refused.
    """
    if torch.compiler.is_compiling():  # what is traced is no run
        yield
        return
    given = [(own, _version(own)) for own in (images, *weights.values())]
    states = [(read(), read, write) for read, write in _dice(target, images.device)]
    own, lent = _lend_copies(target)
    try:
        yield
    finally:
        for attributes, before in own:
            attributes.clear()
            attributes.update(before)
        drawn = [(write, s) for s, read, write in states if not _same(s, read())]
        for write, state in drawn:
            write(state)
    name = type(target).__name__
    if drawn:
        raise TargetError(f"{name} {RANDOM}.")
    for kept, copied in (*buffers.items(), *lent):
        if _version(copied):
            raise TargetError(f"{name} changes its '{kept}' {CHANGES}.")
    if any(_version(tensor) != before for tensor, before in given):
        raise TargetError(
            f"{name} writes over the images or weights that it is given; let it make"
            " new ones (inplace=False)."
        )


RANDOM = "draws random numbers as it runs; call .eval() on it or take that out"
CHANGES = "as it runs; call .eval() on it or take that out"


def _lend_copies(
    target: nn.Module,
) -> tuple[list[tuple[dict, dict]], list[tuple[str, Tensor]]]:
    """Put copies in place of the tensors, lists, dicts and sets that layers hold.

    Returns:
        Each layer's attributes and what they were; and the copies of tensors, each with
        the name of its attribute.
    """
    own = [(vars(layer), dict(vars(layer))) for layer in target.modules()]
    torchs = vars(nn.Module()).keys() - {"_parameters", "_buffers", "_modules"}
    lent: dict[int, object] = {}
    tensors = []
    for attributes, before in own:
        for name, value in before.items():
            if name in torchs or not isinstance(value, Tensor | list | dict | set):
                continue
            if id(value) not in lent:
                is_tensor = isinstance(value, Tensor)
                lent[id(value)] = value.clone() if is_tensor else value.copy()
            attributes[name] = lent[id(value)]
            if isinstance(value, Tensor):
                tensors.append((name, attributes[name]))
    return own, tensors


def _dice(target: nn.Module, device: torch.device) -> Iterator[tuple]:
    """How the state of each source of random numbers is read and written."""
    yield torch.get_rng_state, torch.set_rng_state
    yield random.getstate, random.setstate
    yield np.random.get_state, np.random.set_state
    if device.type == "cuda":
        places = torch.cuda.get_rng_state, torch.cuda.set_rng_state
        yield tuple(partial(each, device=device) for each in places)
    for layer in target.modules():
        for own in vars(layer).values():
            if isinstance(own, torch.Generator):
                yield own.get_state, own.set_state


def _same(first: Tensor | tuple, second: Tensor | tuple) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    pairs = zip(first, second, strict=True)
    return all(np.all(one == other) for one, other in pairs)


def _version(tensor: Tensor) -> int:
    """How often it was written over; tensors of inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version


def _count_tasks(
    weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> int:
    """T, where every weight is (T, *shape); TargetError names the first that is not."""
    missing = sorted(shapes.keys() - weights.keys())
    extra = sorted(weights.keys() - shapes.keys())
    if missing or extra:
        raise TargetError(
            f"these weights do not fit the target: missing {missing}, not wanted"
            f" {extra}."
        )
    if not weights:
        raise TargetError("this target has no weights to generate; give another.")
    first = next(iter(weights.values()))
    tasks = first.shape[0] if first.ndim else 0
    if not tasks:
        raise TargetError(
            "generated weights need a leading task axis of at least one network, not"
            f" shape {_shape(first)}."
        )
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != (tasks, *shape):
            raise TargetError(
                f"weights '{name}' must be {(tasks, *shape)}, not"
                f" {_shape(weights[name])}."
            )
    return tasks


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _refuse_coupled(module: nn.Module) -> None:
    """Raise TargetError, naming the layer, when T copies of `module` cannot run side by
    side.
    """
    for name, layer in module.named_modules():
        reason = _reason_to_refuse(layer)
        if reason:
            raise TargetError(
                f"layer '{name or 'itself'}' ({type(layer).__name__}) {reason}."
            )


def _reason_to_refuse(layer: nn.Module) -> str | None:
    if (
        isinstance(layer, nn.modules.batchnorm._NormBase)
        and layer.training
        and _couples(layer)
    ):
        return (
            "mixes the images of a batch in training mode; call .eval() on it or use"
            " GroupNorm"
        )
    if (
        isinstance(layer, nn.modules.dropout._DropoutNd | nn.RReLU)
        and layer.training
        and getattr(layer, "p", 1) > 0
    ):
        return (
            "draws random numbers in training mode; call .eval() on it or take it out"
        )
    if isinstance(layer, torch.jit.ScriptModule):
        return "is TorchScript, whose weights stay its own; give the module itself"
    if isinstance(layer, nn.RNNBase | nn.LSTMCell):
        return "cannot run per task in PyTorch; loop over nn.GRUCell, or write it out"
    if layer.training and type(layer).__name__ == "_SpectralNorm":
        return "changes itself in training mode; call .eval() on it"
    own = (*layer.parameters(recurse=False), *layer.buffers(recurse=False))
    if any(nn.parameter.is_lazy(tensor) for tensor in own):
        return (
            "does not know its shape yet; run the module once on a batch of images"
            " first"
        )
    return None


def _couples(layer: nn.modules.batchnorm._NormBase) -> bool:
    """BatchNorm always mixes images while training; InstanceNorm only in the statistics
    it tracks.
    """
    return (
        isinstance(layer, nn.modules.batchnorm._BatchNorm) or layer.track_running_stats
    )


NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def _describe(name: str, parameter: Tensor, module: nn.Module) -> TensorSpec:
    """Shape, fans and ordinary starting scale of one parameter."""
    path, _, last = name.rpartition(".")
    if not parameter.numel() or not parameter.is_floating_point():
        raise TargetError(
            f"weights '{name}' are {_shape(parameter)} of {parameter.dtype}; only real"
            " numbers, at least one, can be generated."
        )
    layer, centre = module.get_submodule(path), 0.0
    spread = _ordinary_spread(layer, last, parameter)
    if spread is None:
        centre, spread = _own_start(layer, name, parameter)
    matrix = parameter if parameter.ndim > 1 else getattr(layer, "weight", parameter)
    fans = (1, 1)
    if spread and matrix.ndim > 1:
        fans = nn.init._calculate_fan_in_and_fan_out(matrix)
    return TensorSpec(name, _shape(parameter), *fans, centre=centre, spread=spread)


def _own_start(layer: nn.Module, name: str, parameter: Tensor) -> tuple[float, float]:
    """Centre and spread of the values that the module itself has."""
    values = parameter.detach()
    if values.is_meta or not values.isfinite().all():
        raise TargetError(
            f"weights '{name}' have no values to start from; give the module ordinary"
            " initial values, on another device than meta."
        )
    values = values.double()
    is_fixed = isinstance(layer, NORMS) or bool(values.min() == values.max())
    spread = 0.0 if is_fixed else float(values.std(correction=0))
    return float(values.mean()), spread


def _ordinary_spread(layer: nn.Module, last: str, parameter: Tensor) -> float | None:
    """The standard deviation with which PyTorch draws a parameter of a layer that it
    knows, around 0; None for any other.
    """
    if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd | nn.Bilinear):
        if last not in ("weight", "bias"):
            return None
        fan_in, _ = nn.init._calculate_fan_in_and_fan_out(layer.weight)
        if isinstance(layer, nn.Bilinear):
            fan_in = layer.in1_features
        return 1 / math.sqrt(3 * fan_in)
    if isinstance(layer, nn.RNNCellBase):
        return 1 / math.sqrt(3 * layer.hidden_size)
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
        return 1.0
    if isinstance(layer, nn.MultiheadAttention) and parameter.ndim > 1:
        return math.sqrt(2 / sum(nn.init._calculate_fan_in_and_fan_out(parameter)))
    return None
