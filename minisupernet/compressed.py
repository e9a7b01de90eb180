"""Two more generators smaller than what they generate: shared chunks, and one low-rank head for each kernel.

Both are one linear map from embeddings to rows of weights. They differ from the tiles of `static_hypernet` in what a
row is and in who shares the map, and a single number, the rank, dials their size from a twentieth of the kernels'
to more than the kernels themselves.
"""

import math

import torch
from torch import Tensor, nn

from minisupernet.static_hypernet import StaticError, kernels_to_make

__all__ = ["ChunkedHyperNet", "LowRankHyperNet", "ratio"]


class ChunkedHyperNet(nn.Module):
    """Every kernel, laid out flat, is cut into chunks; each has an embedding, and one linear map makes all chunks.

    `forward()` returns {parameter name: kernel}. Kernels start with He's variance 2 / fan_in, as in `StaticHyperNet`.

    Args:
        target: any network with the kernels that `kernels_to_make` finds; it is read, not changed.
        z_dim: numbers in an embedding.
        chunk: weights in a chunk; what the last chunk of a kernel has too many of is cut off.

    Raises:
        StaticError: for sizes below 1, and as `kernels_to_make` does.
    """

    def __init__(self, target: nn.Module, z_dim: int, chunk: int = 256) -> None:
        if min(z_dim, chunk) < 1:
            raise StaticError(f"z_dim and chunk must be positive, got {z_dim} and {chunk}.")
        super().__init__()
        self.shapes = kernels_to_make(target)
        self.counts = [math.ceil(math.prod(shape) / chunk) for shape in self.shapes.values()]
        pieces = [_he(count, z_dim, shape) for count, shape in zip(self.counts, self.shapes.values(), strict=True)]
        self.embeddings = nn.Parameter(torch.cat(pieces))  # (chunks, z_dim)
        self.weight = nn.Parameter(torch.randn(z_dim, chunk) / math.sqrt(z_dim))
        self.bias = nn.Parameter(torch.zeros(chunk))

    def forward(self) -> dict[str, Tensor]:
        chunks = (self.embeddings @ self.weight + self.bias).split(self.counts)  # per kernel (chunks, chunk)
        shapes = self.shapes.items()
        return {
            name: own.flatten()[: math.prod(shape)].view(shape)
            for own, (name, shape) in zip(chunks, shapes, strict=True)
        }


class LowRankHyperNet(nn.Module):
    """Each kernel has a linear head of its own, without bias, that makes one filter from one embedding.

    So a kernel with n filters of m weights is the product of embeddings (n, rank) and a head (rank, m): a matrix of
    that rank. `forward()` returns {parameter name: kernel}, which start with He's variance.

    Args:
        target: any network with the kernels that `kernels_to_make` finds; it is read, not changed.
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
        self.embeddings = nn.ParameterList(_he(shape[0], rank, shape) for shape in shapes)
        self.heads = nn.ParameterList(torch.randn(rank, math.prod(shape[1:])) / math.sqrt(rank) for shape in shapes)

    def forward(self) -> dict[str, Tensor]:
        pairs = zip(self.embeddings, self.heads, self.shapes.items(), strict=True)
        return {name: (own @ head).view(shape) for own, head, (name, shape) in pairs}


def ratio(hyper: nn.Module) -> float:
    """Learned numbers of a generator, its embeddings included, for each number that it makes."""
    made = sum(kernel.numel() for kernel in hyper().values())
    return sum(parameter.numel() for parameter in hyper.parameters()) / made


def _he(rows: int, columns: int, shape: tuple[int, ...]) -> Tensor:
    """Embeddings (rows, columns) of He's variance 2 / fan_in for a kernel of `shape`."""
    return torch.randn(rows, columns) * math.sqrt(2 / math.prod(shape[1:]))
