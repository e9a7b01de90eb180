"""SuperNet: a generator that makes every weight of a classifier from a small task
vector z.

theta_t = g(z_t; phi), and y = f(x; theta_t). The generator's weights phi are shared by
all tasks; z_t is task t's own. A new task gets a new network by fitting z alone
(`fit_z`), with phi frozen.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minisupernet.data.tasks import BinaryTasks
from minisupernet.errors import GeneratorError
from minisupernet.seeds import step_generator
from minisupernet.target import MakesWeights, WeightSpec

__all__ = ["ClassVectors", "SuperNet", "TaskVectors"]

Weights = dict[str, Tensor]


class SuperNet(MakesWeights):
    """Task vectors (T, z_dim) in, the weights of T networks {name: (T, *shape)} out.

    A trunk of fully connected layers, then one linear head for each weight tensor. The
    heads are kept side by side in one matrix, so that a single product makes all
    weights:

        theta = bound * tanh((a(z) W + b) / bound),    without tanh when bound is None.

    At the start b alone is an ordinary initialisation of the target, with a share
    `z_share` of the variance moved from b to the part that depends on z: for z of
    length about 1, as one-hot vectors have and learned ones start with, every generated
    tensor has the target's own spread.

    Args:
        spec: the target's weights.
        z_dim: numbers in a task vector.
        hidden: widths of the trunk's layers, with leaky ReLU; () for the original's
            bare heads.
        bound: largest absolute weight, or None.
        z_share: the share of the starting variance that comes from z, between 0 and 1.
    """

    def __init__(
        self,
        spec: WeightSpec,
        z_dim: int,
        hidden: tuple[int, ...] = (64,),
        bound: float | None = None,
        z_share: float = 0.2,
    ) -> None:
        super().__init__()
        if (
            z_dim < 1
            or min(hidden, default=1) < 1
            or not 0 <= z_share <= 1
            or (bound is not None and bound <= 0)
        ):
            raise GeneratorError(
                "z_dim, hidden widths and bound must be positive, and z_share between 0"
                " and 1."
            )
        self.spec, self.z_dim, self.bound = spec, z_dim, bound
        widths = [z_dim, *hidden]
        self.trunk = nn.ModuleList(
            nn.Linear(*pair) for pair in zip(widths, widths[1:], strict=False)
        )
        self.head_weight = nn.Parameter(
            torch.empty(widths[-1], spec.size)
        )  # (width, P)
        self.head_bias = nn.Parameter(torch.empty(spec.size))  # (P,)
        # whether one-hot z give sparse gradients on the CPU, which TensorFlowRMSprop
        # uses
        self.sparse = False
        self._start_at_target_scale(z_share)

    @classmethod
    def original(cls, spec: WeightSpec, z_dim: int = 100) -> "SuperNet":
        """The original's generator: bare heads with tanh, Glorot-uniform weights a
        head, zero biases.

        With 100 tasks and the original classifier it has 101 x 37,165 = 3,753,665
        parameters.
        """
        generator = cls(spec, z_dim, hidden=(), bound=1.0)
        limits = [math.sqrt(6 / (z_dim + tensor.size)) for tensor in spec.tensors]
        with torch.no_grad():
            for head, limit in zip(
                generator.head_weight.split([t.size for t in spec.tensors], 1),
                limits,
                strict=True,
            ):
                head.uniform_(-limit, limit)
            generator.head_bias.zero_()
        generator.sparse = True
        return generator

    @torch.no_grad()
    def _start_at_target_scale(self, z_share: float) -> None:
        for layer in self.trunk:
            nn.init.kaiming_normal_(
                layer.weight, a=0.2, mode="fan_out"
            )  # keeps the length of z through leaky ReLU
            layer.bias.zero_()
        spread = self.spec.spreads()  # (P,)
        self.head_weight.normal_().mul_(spread * math.sqrt(z_share))
        self.head_bias.normal_().mul_(spread * math.sqrt(1 - z_share)).add_(
            self.spec.centres()
        )

    def forward(self, z: Tensor) -> Weights:
        """Make the weights of T networks.

        Args:
            z: task vectors (T, z_dim), or whole numbers (T,) that stand for one-hot
                vectors.

        Raises:
            GeneratorError: for a z of another shape or a number not below z_dim.
        """
        return self.spec.split(self.flat(z))

    def flat(self, z: Tensor) -> Tensor:
        """The same weights as rows (T, P)."""
        self._check(z)
        raw = self._heads(z)
        return raw if self.bound is None else self.bound * torch.tanh(raw / self.bound)

    def _heads(self, z: Tensor) -> Tensor:
        if (
            not z.is_floating_point() and not self.trunk
        ):  # a one-hot z picks one row: no product needed
            return (
                F.embedding(
                    z, self.head_weight, sparse=self.sparse and z.device.type == "cpu"
                )
                + self.head_bias
            )
        a = (
            z
            if z.is_floating_point()
            else F.one_hot(z, self.z_dim).to(self.head_weight.dtype)
        )  # (T, z_dim)
        for layer in self.trunk:
            a = F.leaky_relu(layer(a), 0.2)  # (T, width)
        return torch.addmm(self.head_bias, a, self.head_weight)  # (T, P)

    def _check(self, z: Tensor) -> None:
        if z.is_floating_point():
            if z.ndim != 2 or z.shape[1] != self.z_dim:
                raise GeneratorError(
                    f"z must have shape (T, {self.z_dim}), not {tuple(z.shape)}."
                )
        elif z.ndim != 1 or (
            z.device.type == "cpu"
            and z.numel()
            and not 0 <= z.min() <= z.max() < self.z_dim
        ):
            raise GeneratorError(
                f"one-hot z must be whole numbers (T,) from 0 to {self.z_dim - 1}."
            )


class TaskVectors(nn.Module):
    """One learned vector for each of T tasks, (T, z_dim), random at the start, of
    length about 1.
    """

    def __init__(self, tasks: int, z_dim: int, seed: int = 0) -> None:
        super().__init__()
        self.z = nn.Parameter(
            torch.randn(tasks, z_dim, generator=step_generator(seed, -1))
            / math.sqrt(z_dim)
        )

    def forward(self, numbers: Tensor) -> Tensor:
        """The vectors of the tasks with these numbers, (M,) -> (M, z_dim)."""
        return self.z[numbers]


class ClassVectors(nn.Module):
    """One learned vector u for each class; the task "a or b" has z = u_a - u_b, of
    length about 1 at the start.

    Any number of tasks share these vectors, and the reversed task "b or a" has -z.
    """

    def __init__(self, tasks: BinaryTasks, z_dim: int, seed: int = 0) -> None:
        super().__init__()
        random = step_generator(seed, -1)
        u = torch.randn(tasks.classes[-1] + 1, z_dim, generator=random)
        self.u = nn.Parameter(u / math.sqrt(2 * z_dim))
        self.register_buffer("pairs", tasks.pairs(), persistent=False)  # (2, T)

    def forward(self, numbers: Tensor) -> Tensor:
        """The vectors of the tasks with these numbers, (M,) -> (M, z_dim)."""
        positive, negative = self.pairs[:, numbers]
        return self.u[positive] - self.u[negative]
