"""The target side: which weights a network needs, and how to run many generated
networks in one call.

A *target* is an ordinary `nn.Module`. `WeightSpec` lists the tensors it needs; a
generator makes them with a leading task axis; `run_tasks` runs the T networks that
result, each on its own images.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from minisupernet.errors import TargetError
from minisupernet.fast.convolution import FastConvolutions

__all__ = ["MakesWeights", "TaskClassifier", "TensorSpec", "WeightSpec", "run_tasks"]

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
    U(-1/sqrt(fan_in), 1/sqrt(fan_in)), has centre 0 and spread 1/sqrt(3 fan_in);
    tensors without a fan-in, such as the scale and shift of a normalisation layer, are
    centred where the module has them, with spread 0.
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

    def signature(self) -> list[str]:
        """Name and shape of each tensor, in order, as text."""
        return [f"{tensor.name} {tensor.shape}" for tensor in self.tensors]

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
        return _count_tasks(
            weights, {tensor.name: tensor.shape for tensor in self.tensors}
        )

    def draw(
        self, tasks: int, generator: torch.Generator, rule: str = "torch"
    ) -> Tensor:
        """Ordinary initial weights of `tasks` networks, (tasks, P), on the generator's
        device.

        `rule` is "torch" (uniform around each centre with its spread) or "glorot"
        (TensorFlow's default: U(-a, a) with a = sqrt(6 / (fan_in + fan_out)), every
        tensor of one axis 0).
        """
        device = generator.device
        unit = (
            torch.rand(tasks, self.size, generator=generator, device=device) * 2 - 1
        )  # spread 1/sqrt(3)
        if rule == "glorot":
            limits = [
                (len(t.shape) > 1) * math.sqrt(6 / (t.fan_in + t.fan_out))
                for t in self.tensors
            ]
            return unit * self._fill(limits, device)
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
    """A generator whose state says which target it makes weights for.

    `load_state_dict` refuses the state of a generator for tensors of other names,
    shapes or order, where equal sizes would let it pass.
    """

    spec: WeightSpec

    def _save_to_state_dict(self, destination, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination._metadata[prefix[:-1]]["makes"] = self.spec.signature()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest) -> None:
        theirs, ours = local_metadata.get("makes"), self.spec.signature()
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
    _refuse_coupled(target)
    shapes = {name: tuple(p.shape) for name, p in target.named_parameters()}
    tasks = _count_tasks(weights, shapes)
    if images.shape[:1] != (tasks,):
        raise TargetError(
            f"these weights are {tasks} networks, so images must be ({tasks}, B, ...),"
            f" not {_shape(images)}."
        )
    weights, buffers, images = _in_autocast_dtype(target, weights, images)
    names, copies = _places(target), _copies(target, buffers)

    def run(own: Weights, x: Tensor) -> Outputs:
        state = {place: own[name] for place, name in names.items()} | buffers | copies
        return functional_call(target, state, (x,), tie_weights=False)

    if tasks == 1:  # nothing to run side by side
        alone = {name: own.squeeze(0) for name, own in weights.items()}
        outputs = tree_map(_first, _run_alone(run, target, alone, images[0]))
    else:
        outputs = _run_many(run, target, weights, images)
    for name, copy in copies.items():
        if not torch.equal(copy, target.get_buffer(name)):
            raise TargetError(f"the target changes its buffer '{name}' {CHANGES}.")
    return outputs


def _copies(target: nn.Module, but: Mapping[str, Tensor]) -> Weights:
    """Copies of the target's buffers, so that a run can change none of its own."""
    if torch.compiler.is_compiling():
        return {}
    return {name: b.clone() for name, b in target.named_buffers() if name not in but}


def _run_many(
    run: Callable, target: nn.Module, weights: Weights, images: Tensor
) -> Outputs:
    quick = images.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    quick = quick and not torch.compiler.is_compiling()
    try:
        with FastConvolutions() if quick else nullcontext():
            return vmap(run)(weights, images)
    except RuntimeError as error:
        raise _plainly(target, error) from error


def _places(target: nn.Module) -> dict[str, str]:
    """Where a weight goes: every place that holds a parameter, to the name it goes by.

    Layers may share a parameter, which then has one name and several places; a layer
    that is reached under two names is one place.
    """
    name_of = {id(p): name for name, p in target.named_parameters()}
    return {
        f"{path}.{key}".lstrip("."): name_of[id(parameter)]
        for path, layer in target.named_modules()
        for key, parameter in layer._parameters.items()
        if parameter is not None
    }


def _first(output: object) -> object:
    return output[None] if isinstance(output, Tensor) else output


def _run_alone(run: Callable, target: nn.Module, own: Weights, x: Tensor) -> Outputs:
    """One network, refused where several would be: for what it draws."""
    if torch.compiler.is_compiling():
        return run(own, x)
    before = _random_state(x.device)
    outputs = run(own, x)
    if not torch.equal(before, _random_state(x.device)):
        raise TargetError(f"{type(target).__name__} {RANDOM}.")
    return outputs


def _random_state(device: torch.device) -> Tensor:
    is_cuda = device.type == "cuda"
    return torch.cuda.get_rng_state(device) if is_cuda else torch.get_rng_state()


def _plainly(target: nn.Module, error: RuntimeError) -> Exception:
    """The TargetError that an error of `vmap` stands for; others as they are."""
    said, name = str(error), type(target).__name__
    if "randomness" in said:
        return TargetError(f"{name} {RANDOM}.")
    if "in-place arithmetic operator" in said or "inplace" in said.replace("-", ""):
        return TargetError(f"{name} changes a tensor of its own {CHANGES}.")
    if "vmap" in said or "batching rule" in said:
        return TargetError(
            f"{name} cannot run per task ({said.splitlines()[0][:120]}); write that"
            " operation in others."
        )
    return error


RANDOM = "draws random numbers as it runs; call .eval() on it or take that out"
CHANGES = "as it runs; call .eval() on it or take that out"


def _in_autocast_dtype(
    target: nn.Module, weights: Mapping[str, Tensor], images: Tensor
) -> tuple[Weights, Weights, Tensor]:
    """Weights, the target's own buffers and images, in autocast's dtype where it is on.

    Under `vmap` autocast reaches some operations and not others, and a network needs
    one dtype.
    """
    device = images.device.type
    if not (
        torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    ):
        return dict(weights), {}, images
    dtype = torch.get_autocast_dtype(device)
    buffers = {
        name: own.to(dtype)
        for name, own in target.named_buffers()
        if own.is_floating_point()
    }
    images = images.to(dtype) if images.is_floating_point() else images
    return {name: own.to(dtype) for name, own in weights.items()}, buffers, images


def _count_tasks(
    weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> int:
    """T, where every weight is (T, *shape); TargetError names the first that is not."""
    missing, extra = (
        sorted(shapes.keys() - weights.keys()),
        sorted(weights.keys() - shapes.keys()),
    )
    if missing or extra:
        raise TargetError(
            f"these weights do not fit the target: missing {missing}, not wanted"
            f" {extra}."
        )
    tasks = next(iter(weights.values())).shape[0]
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
    if isinstance(layer, nn.RNNBase | nn.LSTMCell):
        return "cannot run per task in PyTorch; loop over nn.GRUCell, or write it out"
    if layer.training and type(layer).__name__ == "_SpectralNorm":
        return "changes itself in training mode; call .eval() on it"
    if any(
        nn.parameter.is_lazy(parameter) for parameter in layer.parameters(recurse=False)
    ):
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
KNOWN = (  # layers whose weight and bias have a fan-in, whatever their values
    nn.Linear,
    nn.Bilinear,
    nn.Embedding,
    nn.modules.conv._ConvNd,
)


def _describe(name: str, parameter: Tensor, module: nn.Module) -> TensorSpec:
    """Shape, fans and ordinary starting scale of one parameter."""
    layer = module.get_submodule(name.rpartition(".")[0])
    weight = getattr(layer, "weight", parameter)
    if weight.ndim < 2 or isinstance(layer, NORMS) or _starts_equal(layer, parameter):
        # no fan-in, as in a normalisation layer: start where the module itself starts
        centre = float(parameter.detach().float().mean())
        return TensorSpec(name, _shape(parameter), centre=centre)
    fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(weight)
    spread = 1 / math.sqrt(3 * fan_in)
    return TensorSpec(name, _shape(parameter), fan_in, fan_out, spread=spread)


def _starts_equal(layer: nn.Module, parameter: Tensor) -> bool:
    """Whether a tensor of no known layer is one number throughout, as a scale is."""
    if isinstance(layer, KNOWN) or parameter.is_meta:
        return False
    return bool((parameter == parameter.flatten()[0]).all())
