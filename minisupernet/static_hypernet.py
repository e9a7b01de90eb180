"""Static HyperNetworks (Ha, Dai and Le, 2016): one small generator makes the kernels of
a deep convolutional network.

Each 16 x 16 block of channels of each kernel, a *tile*, has an embedding z of its own;
the generator, shared by all tiles, turns z into the tile. Everything is trained
together by ordinary gradient descent.
"""

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from minisupernet.errors import StaticError
from minisupernet.target import MakesWeights, copy_of, places_of

__all__ = [
    "ChunkedHyperNet",
    "Generated",
    "KernelGenerator",
    "LowRankHyperNet",
    "STARTS",
    "StaticHyperNet",
    "WideResNet",
    "join_tiles",
    "kernels_to_make",
    "ratio",
    "without_kernels",
]

STARTS = ("hyperfan", "naive", "bias")


class KernelGenerator(nn.Module):
    """The two-layer linear generator of equation 2: embeddings (n, z_dim) in, tiles (n,
    channels, channels, f, f) out.

    For each input channel i of a tile, a_i = W_i z + B_i has z_dim numbers; W_out and
    B_out, the same for every i, make the filters f x f of that channel from a_i. With d
    = z_dim and N channels in and out the generator has d (z_dim + 1) N + f N f (d + 1)
    parameters.

    Args:
        z_dim: numbers in an embedding.
        channels: input and output channels of a tile.
        size: side f of the kernels.
    """

    def __init__(self, z_dim: int = 64, channels: int = 16, size: int = 3) -> None:
        if min(z_dim, channels, size) < 1:
            raise StaticError(
                f"z_dim, channels and size must be positive, got {z_dim}, {channels}"
                f" and {size}."
            )
        super().__init__()
        self.z_dim, self.channels, self.size = z_dim, channels, size
        self.inner = nn.Linear(z_dim, channels * z_dim)  # W_i and B_i of all i
        self.outer = nn.Linear(z_dim, channels * size * size)  # W_out and B_out

    def forward(self, z: Tensor) -> Tensor:
        a = self.inner(z).unflatten(1, (self.channels, self.z_dim))  # (n, in, d)
        tiles = self.outer(a).unflatten(
            2, (self.channels, self.size, self.size)
        )  # (n, in, out, f, f)
        return tiles.transpose(1, 2)  # (n, out, in, f, f), PyTorch's order


def kernels_to_make(
    target: nn.Module, channels: int = 16, size: int = 3
) -> dict[str, tuple[int, ...]]:
    """The kernels that tiles of `channels` x `channels` x `size` x `size` can make:
    {parameter name: shape}.

    These are the kernels of the ungrouped Conv2d layers of this size whose numbers of
    input and output channels are multiples of `channels`; all else (a first layer on 3
    colours, 1 x 1 shortcuts, biases, a kernel that a parametrisation computes) stays as
    it is. A kernel that several layers share is made once.

    Raises:
        StaticError: where there is none, or a layer does not know its shape yet.
    """
    shapes = {}
    for place, name in places_of(target).items():
        path, _, last = place.rpartition(".")
        layer = target.get_submodule(path)
        if nn.parameter.is_lazy(getattr(layer, last)):
            raise StaticError(
                f"layer '{path}' ({type(layer).__name__}) does not know its shape yet;"
                " run the network once on a batch of images first."
            )
        if isinstance(layer, nn.Conv2d) and layer.groups == 1 and last == "weight":
            shapes[name] = tuple(layer.weight.shape)
    fitting = {
        name: shape
        for name, shape in shapes.items()
        if shape[0] % channels == 0
        and shape[1] % channels == 0
        and shape[2:] == (size, size)
    }
    if not fitting:
        raise StaticError(
            f"{type(target).__name__} has no {size} x {size} kernel with multiples of"
            f" {channels} channels in and out; choose `channels` and `size` for one of"
            f" its kernels: {sorted(set(shapes.values())) or 'it has none'}."
        )
    return fitting


class StaticHyperNet(MakesWeights):
    """An embedding for each tile of the target's kernels, and the generator that all
    tiles share.

    `forward()` takes nothing and returns {parameter name: kernel}, ready for
    `functional_call` on the target.

    Args:
        target: any network with Conv2d layers; it is read, not changed.
        z_dim: numbers in an embedding.
        channels, size: the tile, as in `KernelGenerator`.
        start: how everything is initialised. "hyperfan": each kernel gets He's variance
            2 / fan_in, carried by its embeddings. "naive": PyTorch's rule for linear
            layers, embeddings of variance 1. "bias" (Bias-HyperInit): W_out is 0, so
            that every tile starts as B_out, which has He's variance on average over the
            tiles.

    Raises:
        StaticError: for a start that does not exist, and as `kernels_to_make` and
            `KernelGenerator` do.
    """

    def __init__(
        self,
        target: nn.Module,
        z_dim: int = 64,
        channels: int = 16,
        size: int = 3,
        start: str = "hyperfan",
    ) -> None:
        if start not in STARTS:
            raise StaticError(
                f"there is no start '{start}'; choose one of {', '.join(STARTS)}."
            )
        super().__init__()
        self.generator = KernelGenerator(z_dim, channels, size)
        self.shapes = kernels_to_make(target, channels, size)
        self.counts = [
            shape[0] * shape[1] // channels**2 for shape in self.shapes.values()
        ]  # tiles of each kernel
        self.embeddings = nn.Parameter(torch.randn(sum(self.counts), z_dim))
        if start != "naive":
            self._start(start)

    def forward(self) -> dict[str, Tensor]:
        tiles = self.generator(self.embeddings).split(
            self.counts
        )  # per kernel (tiles, channels, channels, f, f)
        return {
            name: join_tiles(own, shape)
            for own, (name, shape) in zip(tiles, self.shapes.items(), strict=True)
        }

    @torch.no_grad()
    def _start(self, start: str) -> None:
        """Hyperfan: unit gain in both layers and no bias, so that a kernel has the
        variance of its embeddings.
        """
        inner, outer = self.generator.inner, self.generator.outer
        for layer in (inner, outer):
            layer.weight.normal_(std=1 / math.sqrt(layer.in_features))
            layer.bias.zero_()
        fan_ins = [math.prod(shape[1:]) for shape in self.shapes.values()]
        variances = torch.tensor([2 / fan_in for fan_in in fan_ins]).repeat_interleave(
            torch.tensor(self.counts)
        )
        if start == "hyperfan":
            self.embeddings.mul_(variances.sqrt().unsqueeze(1))
        else:
            outer.weight.zero_()
            outer.bias.normal_(std=variances.mean().sqrt().item())


def join_tiles(tiles: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Lay tiles (n, c, c, f, f) side by side, row after row, as one kernel of `shape`
    (out, in, f, f).
    """
    side = tiles.shape[1]
    grid = tiles.unflatten(
        0, (shape[0] // side, shape[1] // side)
    )  # (rows, columns, c, c, f, f)
    return grid.transpose(1, 2).reshape(shape)


class Generated(nn.Module):
    """A target network whose kernels come from a hypernetwork: inputs as the target's,
    outputs as the target's.

    It holds a copy of the target without its own kernels, so that `parameters()` are
    exactly what is learned. With `hyper` None it is the target itself.

    Args:
        target: the network; it is not changed.
        hyper: `hyper()` returns {parameter name: tensor}.

    Raises:
        StaticError: where a name or shape that `hyper` makes is not one of the target.
    """

    def __init__(self, target: nn.Module, hyper: nn.Module | None) -> None:
        super().__init__()
        self.target, self.hyper, self.places = target, hyper, {}
        if hyper is not None:
            self.target, self.places = without_kernels(target, hyper())

    def forward(self, images: Tensor) -> Tensor:
        if self.hyper is None:
            return self.target(images)
        kernels = self.hyper()
        state = {place: kernels[name] for place, name in self.places.items()}
        return functional_call(self.target, state, (images,))


def without_kernels(
    target: nn.Module, kernels: dict[str, Tensor]
) -> tuple[nn.Module, dict[str, str]]:
    """A copy of the target whose own tensors of these names are taken out, and where
    each kernel goes: {place: name}, several places for a kernel that layers share.

    Raises:
        StaticError: where a name or shape is not one of the target.
    """
    own = {name: tuple(p.shape) for name, p in target.named_parameters()}
    for name, kernel in kernels.items():
        if own.get(name) != tuple(kernel.shape):
            raise StaticError(
                f"the generator makes '{name}' of shape {tuple(kernel.shape)}, which is"
                f" {own.get(name, 'no parameter')} in this {type(target).__name__};"
                " make the generator for this network."
            )
    copied = copy_of(target)
    places = {
        place: name for place, name in places_of(copied).items() if name in kernels
    }
    for place in places:
        path, _, last = place.rpartition(".")
        copied.get_submodule(path).register_parameter(last, None)
    return copied, places


class WideResNet(Generated):
    """A wide residual network in the pre-activation form: images (B, 3, H, W) in,
    logits (B, classes) out.

    Three groups of (depth - 4) / 6 blocks with 16, 32 and 64 times `width` channels,
    the second and third at half the resolution of the one before. Every kernel of the
    blocks is 3 x 3; a 1 x 1 shortcut stands where channels change.

    Args:
        generated: make the blocks' 3 x 3 kernels with a `StaticHyperNet`, to which
            `options` go.

    Raises:
        StaticError: for a depth that is not 6 n + 4, a width that gives no whole number
            of channels, or options without `generated`.
    """

    def __init__(
        self,
        depth: int,
        width: float = 1,
        generated: bool = False,
        classes: int = 10,
        **options: int | str,
    ) -> None:
        if options and not generated:
            raise StaticError(
                f"{', '.join(options)} would do nothing; pass generated=True, or leave"
                " it out."
            )
        if depth < 10 or (depth - 4) % 6 or width <= 0 or (16 * width) % 1:
            raise StaticError(
                "depth must be 10, 16, 22, ... and 16 * width a whole number from 1,"
                f" got {depth} and width {width}."
            )
        layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False)]
        inputs = 16
        for group in range(3):
            for block in range((depth - 4) // 6):
                outputs = int(16 * width) * 2**group
                layers.append(
                    _Block(inputs, outputs, stride=2 if group and not block else 1)
                )
                inputs = outputs
        layers += [
            nn.BatchNorm2d(inputs),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(inputs, classes),
        ]
        for layer in layers[:-1]:
            for kernel in (p for p in layer.parameters() if p.ndim == 4):
                nn.init.kaiming_normal_(kernel)
        target = nn.Sequential(*layers)
        super().__init__(
            target, StaticHyperNet(target, **options) if generated else None
        )


class _Block(nn.Module):
    """BatchNorm, ReLU, convolution, twice; added to the input, or to its 1 x 1 shortcut
    where channels change.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv_1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv_2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        changes = inputs != outputs
        self.shortcut = (
            nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else None
        )

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm_1(images))  # (B, inputs, H, W)
        kept = images if self.shortcut is None else self.shortcut(x)
        x = self.conv_2(
            F.relu(self.norm_2(self.conv_1(x)))
        )  # (B, outputs, H / stride, W / stride)
        return kept + x


class ChunkedHyperNet(MakesWeights):
    """Every kernel, laid out flat, is cut into chunks; each has an embedding, and one
    linear map makes all chunks.

    `forward()` returns {parameter name: kernel}. Kernels start with He's variance 2 /
    fan_in, as in `StaticHyperNet`.

    Args:
        target: any network with the kernels that `kernels_to_make` finds; it is read,
            not changed.
        z_dim: numbers in an embedding.
        chunk: weights in a chunk; what the last chunk of a kernel has too many of is
            cut off.

    Raises:
        StaticError: for sizes below 1, and as `kernels_to_make` does.
    """

    def __init__(self, target: nn.Module, z_dim: int, chunk: int = 256) -> None:
        if min(z_dim, chunk) < 1:
            raise StaticError(
                f"z_dim and chunk must be positive, got {z_dim} and {chunk}."
            )
        super().__init__()
        self.shapes = kernels_to_make(target)
        self.counts = [
            math.ceil(math.prod(shape) / chunk) for shape in self.shapes.values()
        ]
        pieces = [
            _he(count, z_dim, shape)
            for count, shape in zip(self.counts, self.shapes.values(), strict=True)
        ]
        self.embeddings = nn.Parameter(torch.cat(pieces))  # (chunks, z_dim)
        self.weight = nn.Parameter(torch.randn(z_dim, chunk) / math.sqrt(z_dim))
        self.bias = nn.Parameter(torch.zeros(chunk))

    def forward(self) -> dict[str, Tensor]:
        chunks = (self.embeddings @ self.weight + self.bias).split(
            self.counts
        )  # per kernel (chunks, chunk)
        shapes = self.shapes.items()
        return {
            name: own.flatten()[: math.prod(shape)].view(shape)
            for own, (name, shape) in zip(chunks, shapes, strict=True)
        }


class LowRankHyperNet(MakesWeights):
    """Each kernel has a linear head of its own, without bias, that makes one filter
    from one embedding.

    So a kernel with n filters of m weights is the product of embeddings (n, rank) and a
    head (rank, m): a matrix of that rank. `forward()` returns {parameter name: kernel},
    which start with He's variance.

    Args:
        target: any network with the kernels that `kernels_to_make` finds; it is read,
            not changed.
        rank: numbers in an embedding.

    Raises:
        StaticError: for a rank below 1, and as `kernels_to_make` does.
    """

    def __init__(self, target: nn.Module, rank: int) -> None:
        if rank < 1:
            raise StaticError(f"rank must be positive, got {rank}.")
        super().__init__()
        self.shapes = kernels_to_make(target)
        shapes = self.shapes.values()
        self.embeddings = nn.ParameterList(
            _he(shape[0], rank, shape) for shape in shapes
        )
        self.heads = nn.ParameterList(
            torch.randn(rank, math.prod(shape[1:])) / math.sqrt(rank)
            for shape in shapes
        )

    def forward(self) -> dict[str, Tensor]:
        pairs = zip(self.embeddings, self.heads, self.shapes.items(), strict=True)
        return {name: (own @ head).view(shape) for own, head, (name, shape) in pairs}


def ratio(hyper: nn.Module) -> float:
    """Learned numbers of a generator, its embeddings included, for each number that it
    makes.
    """
    made = sum(kernel.numel() for kernel in hyper().values())
    return sum(parameter.numel() for parameter in hyper.parameters()) / made


def _he(rows: int, columns: int, shape: tuple[int, ...]) -> Tensor:
    """Embeddings (rows, columns) of He's variance 2 / fan_in for a kernel of
    `shape`.
    """
    return torch.randn(rows, columns) * math.sqrt(2 / math.prod(shape[1:]))
