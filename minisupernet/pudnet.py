"""PudNet: a generator that looks at a dataset and makes, in one forward pass, a feature
network for it.

A sketch of the dataset (the mean of what a small encoder says of each image) starts a
recurrent cell that walks the target's layers; at each layer a low-rank head turns the
cell's output into that layer's weights. The classifier on the features has no weights
of its own: a class is the mean feature of its images, its prototype.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minisupernet.data.episodes import Batch
from minisupernet.errors import PudNetError
from minisupernet.target import MakesWeights, WeightSpec, run_tasks

__all__ = [
    "DatasetEncoder",
    "FeatureNet",
    "HyperRecurrentUnit",
    "Learner",
    "LowRankHead",
    "OneNetwork",
    "PudNet",
    "cosine_logits",
    "prototypes",
]

Weights = dict[str, Tensor]  # name -> (T, *shape)


class FeatureNet(nn.Module):
    """The target: images (B, 3, 32, 32) to features (B, features), with 60,512 weights
    as it stands.

    Four 3x3 convolutions, the first three of stride 2, each normalised within every
    image by itself, so that T networks run side by side.
    """

    def __init__(self, channels: int = 16, features: int = 64) -> None:
        super().__init__()
        widths = [3, channels, 2 * channels, features, features]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(
                widths[layer],
                widths[layer + 1],
                3,
                stride=2 if layer < 3 else 1,
                padding=1,
            )
            for layer in range(4)
        )

    def forward(self, images: Tensor) -> Tensor:
        x = images  # (B, 3, 32, 32)
        for convolution in self.convolutions:
            x = F.leaky_relu(
                F.group_norm(convolution(x), 4), 0.2
            )  # (B, 16, 16, 16), then 32x8x8, 64x4x4, 64x4x4
        return x.mean((2, 3))  # (B, features)


class DatasetEncoder(nn.Module):
    """Datasets (T, S, 3, 32, 32) to sketches (T, width): s = mean over the images of
    e(x), whatever their order.

    The encoder e is three 3x3 convolutions of stride 2 and a linear layer; labels play
    no part.
    """

    def __init__(self, width: int, channels: int = 16) -> None:
        super().__init__()
        widths = [3, channels, 2 * channels, 2 * channels]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(*pair, 3, stride=2, padding=1)
            for pair in zip(widths, widths[1:], strict=False)
        )
        self.output = nn.Linear(widths[-1] * 16, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, datasets: Tensor) -> Tensor:
        x = datasets.flatten(0, 1)  # (T * S, 3, 32, 32)
        for convolution in self.convolutions:
            x = F.gelu(convolution(x))  # (T * S, 16, 16, 16), then 32x8x8, 32x4x4
        embeddings = self.norm(self.output(x.flatten(1)))  # (T * S, width)
        return embeddings.unflatten(0, datasets.shape[:2]).mean(1)  # (T, width)


class HyperRecurrentUnit(nn.Module):
    """Sketches (T, width) to one code for each of the target's layers, (T, layers,
    width).

    A GRU cell starts from the sketch s and a learned token o_0 and is fed its own
    output, layer after layer:

        h_0 = s,    h_l = GRU(o_{l-1}, h_{l-1}),    o_l = relu(A h_l),    c_l =
        norm_l((1 - mix) o_l + mix s).
    """

    def __init__(self, width: int, layers: int, mix: float = 0.1) -> None:
        super().__init__()
        self.mix = mix
        self.start = nn.Parameter(torch.randn(width))
        self.cell = nn.GRUCell(width, width)
        self.output = nn.Linear(width, width)
        self.norms = nn.ModuleList(
            nn.LayerNorm(width, elementwise_affine=False) for _ in range(layers)
        )

    def forward(self, sketch: Tensor) -> Tensor:
        state, output, codes = sketch, self.start.expand_as(sketch), []
        for norm in self.norms:
            state = self.cell(output, state)  # (T, width)
            output = F.relu(self.output(state))
            codes.append(norm((1 - self.mix) * output + self.mix * sketch))
        return torch.stack(codes, dim=1)


class LowRankHead(nn.Module):
    """The code of one layer (T, width) to its weights in a row (T, P_l): theta_l = b_l
    + sigma_l (c_l U_l) V_l.

    c_l is first standardised over datasets, so that what all have in common belongs to
    b_l, and U_l has `rank` columns: a layer's networks lie in a sheet of that many
    dimensions around b_l. sigma_l is the target's own spread; in its units a step of
    the optimiser is as large for every layer. A tensor of spread 0 is the same for all
    datasets.

    The start: b_l is an ordinary initialisation with a share `code_share` of its
    variance moved to V_l, so that every generated tensor starts with the target's own
    spread, and the networks of all datasets nearly equal.
    """

    def __init__(
        self, centre: Tensor, spread: Tensor, width: int, rank: int, code_share: float
    ) -> None:
        super().__init__()
        self.standard = nn.BatchNorm1d(
            width, affine=False
        )  # over the datasets of a step, then of all training
        self.down = nn.Parameter(torch.randn(width, rank) / math.sqrt(width))  # U_l
        self.up = nn.Parameter(
            torch.randn(rank, len(spread)) * math.sqrt(code_share / rank)
        )  # V_l
        self.base = nn.Parameter(
            centre + torch.randn(len(spread)) * spread * math.sqrt(1 - code_share)
        )  # b_l
        self.register_buffer("spread", spread)  # sigma_l

    def forward(self, code: Tensor) -> Tensor:
        return self.base + self.spread * (self.standard(code) @ self.down @ self.up)


class PudNet(MakesWeights):
    """Datasets (T, S, 3, 32, 32) in, the weights of T networks {name: (T, *shape)} out,
    in one forward pass.

    Args:
        spec: the target's weights; tensors of one layer (weight and bias) are made
            together.
        width: numbers in a sketch and in a layer's code.
        rank: dimensions in which one layer's weights can differ from dataset to
            dataset.
        mix: share of the sketch in each layer's code.
        code_share: share of the starting variance that comes through the code, between
            0 and 1.

    Raises:
        PudNetError: for a width or rank below 1, or a share outside 0 to 1.
    """

    def __init__(
        self,
        spec: WeightSpec,
        width: int = 64,
        rank: int = 8,
        mix: float = 0.1,
        code_share: float = 0.01,
    ) -> None:
        super().__init__()
        if width < 1 or rank < 1 or not 0 <= mix <= 1 or not 0 <= code_share <= 1:
            raise PudNetError(
                "width and rank must be at least 1, mix and code_share between 0 and 1."
            )
        self.spec = spec
        sizes = _layer_sizes(spec)
        self.encoder = DatasetEncoder(width)
        self.walk = HyperRecurrentUnit(width, len(sizes), mix)
        parts = zip(
            spec.centres().split(sizes), spec.spreads().split(sizes), strict=True
        )
        self.heads = nn.ModuleList(
            LowRankHead(centre, spread, width, rank, code_share)
            for centre, spread in parts
        )

    def forward(self, datasets: Tensor) -> Weights:
        """Make the weights of T networks, one for each dataset.

        Raises:
            PudNetError: where `datasets` is not (T, S, 3, 32, 32) floats with S at
                least 1, or T is 1 in training.
        """
        return self.spec.split(self.flat(self.sketch(datasets)))

    def sketch(self, datasets: Tensor) -> Tensor:
        """What the generator keeps of each dataset, (T, width)."""
        _check(datasets)
        return self.encoder(datasets)

    def flat(self, sketch: Tensor) -> Tensor:
        """The weights that sketches (T, width) lead to, as rows (T, P).

        In training codes are standardised over these T, after `eval()` over the
        datasets met in training.
        """
        if self.training and len(sketch) < 2:
            raise PudNetError(
                "in training a dataset is compared with others; give at least 2, or"
                " call eval() first."
            )
        codes = self.walk(sketch).unbind(1)  # one (T, width) a layer
        return torch.cat(
            [head(code) for head, code in zip(self.heads, codes, strict=True)], dim=1
        )


class OneNetwork(MakesWeights):
    """The control: the same interface as PudNet, the same weights for every dataset,
    learned the ordinary way.
    """

    def __init__(self, spec: WeightSpec) -> None:
        super().__init__()
        self.spec = spec
        self.weights = nn.Parameter(
            spec.centres() + torch.randn(spec.size) * spec.spreads()
        )  # (P,)

    def forward(self, datasets: Tensor) -> Weights:
        """One network, T times over."""
        _check(datasets)
        return self.spec.split(self.weights.expand(len(datasets), -1))


def prototypes(features: Tensor, way: int) -> Tensor:
    """The mean feature of each class, (T, way, F), from features (T, way * k, F) that
    lie class by class.

    Raises:
        PudNetError: where the images cannot be cut into `way` classes of equal size.
    """
    if features.ndim != 3 or features.shape[1] % way:
        raise PudNetError(
            f"{way} classes of equal size need features (T, {way} * k, F), not"
            f" {tuple(features.shape)}."
        )
    return features.unflatten(1, (way, -1)).mean(2)


def cosine_logits(
    features: Tensor, centres: Tensor, temperature: Tensor | float
) -> Tensor:
    """Features (T, B, F) and class centres (T, way, F) to logits (T, B, way):
    temperature times their cosine.
    """
    return (
        temperature
        * F.normalize(features, dim=2)
        @ F.normalize(centres, dim=2).transpose(1, 2)
    )


def _layer_sizes(spec: WeightSpec) -> list[int]:
    """The number of weights of each layer, tensors of one module being one layer, in
    the order of the spec.
    """
    sizes: dict[str, int] = {}
    for tensor in spec.tensors:
        layer = tensor.name.rpartition(".")[0]
        sizes[layer] = sizes.get(layer, 0) + tensor.size
    return list(sizes.values())


def _check(datasets: Tensor) -> None:
    if datasets.ndim != 5 or datasets.shape[1] < 1 or datasets.shape[2:] != (3, 32, 32):
        raise PudNetError(
            "datasets must be (T, S, 3, 32, 32) with S at least 1, not"
            f" {tuple(datasets.shape)}."
        )
    if not datasets.is_floating_point():
        raise PudNetError(
            "datasets must be normalised floats; use minisupernet.data.normalise on"
            " uint8 images."
        )


class Learner(nn.Module):
    """A generator, the target it makes weights for, and what both are trained with on
    episodes.

    With p the prototype classifier's answer on a query image and q the full
    classifier's, an ordinary linear layer over all training classes on the same
    generated features, the loss of one image of class c is

        -log p(c) - log q(c) + KL(q restricted to the episode's classes || p).

    Args:
        generator: datasets in, weights out, such as PudNet or OneNetwork.
        target: the feature network.
        features: numbers in a feature.
        classes: how many training classes the full classifier knows, numbered as in the
            image set (so all of them).
        auxiliary: False leaves out the second and third term.
    """

    def __init__(
        self,
        generator: nn.Module,
        target: nn.Module,
        features: int = 64,
        classes: int = 100,
        auxiliary: bool = True,
    ) -> None:
        super().__init__()
        self.generator, self.target, self.auxiliary = generator, target, auxiliary
        self.full = nn.Linear(features, classes)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(10.0)))

    def logits(self, weights: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """The prototype classifier's logits (T, way * query, way), and the query
        features (T, way * query, F).
        """
        known = batch.support.shape[1]
        features = run_tasks(
            self.target, weights, torch.cat([batch.support, batch.query], dim=1)
        )
        centres = prototypes(features[:, :known], batch.way)  # (T, way, F)
        return (
            cosine_logits(features[:, known:], centres, self.log_temperature.exp()),
            features[:, known:],
        )

    def loss(self, batch: Batch) -> Tensor:
        """The mean loss over all query images."""
        logits, features = self.logits(
            self.generator(batch.support), batch
        )  # (T, B, way), (T, B, F)
        tasks, each = len(batch.classes), features.shape[1] // batch.way
        loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.repeat(tasks))
        if not self.auxiliary:
            return loss
        full = self.full(features)  # (T, B, classes)
        own = batch.classes.repeat_interleave(each, dim=1)  # (T, B)
        among = full.gather(
            2, batch.classes.unsqueeze(1).expand(-1, full.shape[1], -1)
        )  # (T, B, way)
        consistency = F.kl_div(
            logits.log_softmax(2),
            among.log_softmax(2),
            reduction="none",
            log_target=True,
        ).sum(2)
        return (
            loss
            + F.cross_entropy(full.flatten(0, 1), own.flatten())
            + consistency.mean()
        )

    @torch.no_grad()
    def accuracy(self, batch: Batch, datasets: Tensor | None = None) -> Tensor:
        """The share of each episode's query images that its network gets right, (T,).

        Args:
            datasets: show the generator these (T, S, 3, 32, 32) in place of the
                episodes' own support images; the prototypes still come from the
                support.
        """
        training = self.training
        self.eval()
        weights = self.generator(batch.support if datasets is None else datasets)
        guesses = self.logits(weights, batch)[0].argmax(2)  # (T, way * query)
        self.train(training)
        return (guesses == batch.labels).float().mean(1)
