"""Draws Shapes-100, a stand-in for CIFAR-100 that needs no download: 20 shapes in 5
textures, 32x32 pixels.

The shape is the coarse class, the texture and the shape together are the fine class.
Hue, position, size, rotation, contrast, background, a distractor and noise are random
and tell nothing about the class.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, cos, hypot, maximum, minimum, sin
from torch.nn import functional

__all__ = ["class_names", "draw", "shape_names", "superclass_of", "version"]

SIZE = 32


def _box(u: Tensor, v: Tensor, width: float, height: float) -> Tensor:
    return maximum(u.abs() - width, v.abs() - height)


def _polygon(sides: int, r: Tensor, a: Tensor) -> Tensor:
    step = 2 * math.pi / sides
    return r * cos(a % step - step / 2) - math.cos(step / 2)


def _star(r: Tensor, a: Tensor) -> Tensor:
    return r - 0.35 - 0.65 * (a % (0.4 * math.pi) / (0.2 * math.pi) - 1) ** 2


def _shapes() -> dict[str, Callable[..., Tensor]]:
    """Each shape as f(u, v, r, a), negative inside; u points right, v down, r and a are
    the polar coordinates.
    """
    return {
        "arrow": lambda u, v, r, a: minimum(
            maximum(u.abs() - 0.8 * (v + 1), v + 0.1), _box(u, v - 0.4, 0.25, 0.5)
        ),
        "bar": lambda u, v, r, a: _box(u, v, 0.35, 1),
        "bowtie": lambda u, v, r, a: maximum(
            v.abs() - 0.9 * u.abs() - 0.05, u.abs() - 0.9
        ),
        "crescent": lambda u, v, r, a: maximum(r - 1, 0.75 - hypot(u - 0.45, v)),
        "cross": lambda u, v, r, a: minimum(
            _box(u, v, 0.3, 0.95), _box(u, v, 0.95, 0.3)
        ),
        "disc": lambda u, v, r, a: r - 0.85,
        "drop": lambda u, v, r, a: minimum(
            hypot(u, v - 0.35) - 0.6, maximum(u.abs() - 0.45 * (v + 1), v - 0.2)
        ),
        "flower": lambda u, v, r, a: r - 0.7 - 0.3 * cos(6 * a),
        "frame": lambda u, v, r, a: _box(u, v, 0.65, 0.65).abs() - 0.2,
        "gear": lambda u, v, r, a: r - 0.8 - 0.15 * cos(9 * a).sign(),
        "heart": lambda u, v, r, a: (
            hypot(1.1 * u, v + 0.7 * u.abs().sqrt() - 0.25) - 0.8
        ),
        "kite": lambda u, v, r, a: 1.5 * u.abs() + maximum(-1.7 * v, 0.9 * v) - 0.9,
        "oval": lambda u, v, r, a: hypot(1.8 * u, v) - 1,
        "pentagon": lambda u, v, r, a: _polygon(5, r, a),
        "ring": lambda u, v, r, a: (r - 0.7).abs() - 0.23,
        "square": lambda u, v, r, a: _box(u, v, 0.75, 0.75),
        "star": lambda u, v, r, a: _star(r, a),
        "tee": lambda u, v, r, a: minimum(
            _box(u, v + 0.6, 0.85, 0.25), _box(u, v, 0.25, 0.85)
        ),
        "triangle": lambda u, v, r, a: _polygon(3, r, a),
        "wedge": lambda u, v, r, a: maximum(r - 0.95, u - 1.2 * v.abs()),
    }


def _textures() -> dict[str, Callable[..., Tensor]]:
    """Each texture as g(u, v, r, p): the second colour where positive; u, v, r in
    radians, p a random phase.
    """
    return {
        "checked": lambda u, v, r, p: sin(u + p) * sin(v + p),
        "dotted": lambda u, v, r, p: sin(u + p) + sin(v + p) - 0.4,
        "plain": lambda u, v, r, p: 0 * u - 0.05,
        "ringed": lambda u, v, r, p: sin(r + p),
        "striped": lambda u, v, r, p: sin(u + p),
    }


def class_names() -> tuple[str, ...]:
    """The 100 fine classes, "checked arrow" to "striped wedge", in alphabetical
    order.
    """
    return tuple(f"{texture} {shape}" for texture in _textures() for shape in _shapes())


def shape_names() -> tuple[str, ...]:
    """The 20 coarse classes, in alphabetical order."""
    return tuple(_shapes())


def superclass_of() -> np.ndarray:
    """The index of each fine class's shape, (100,) int64."""
    return np.arange(len(class_names()), dtype=np.int64) % len(_shapes())


def version() -> str:
    """Eight letters that change with this file, so that no cache outlives an edit of
    the drawing.
    """
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(
        count, 1, 1, generator=generator
    )  # (count, 1, 1)


def _place(
    count: int, low: float, high: float, shift: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Coordinates of every pixel in the frame of a turned shape of radius low..high
    pixels, moved by up to shift.
    """
    pixel = torch.arange(SIZE) - (SIZE - 1) / 2
    across = pixel.view(1, 1, SIZE) - _uniform(count, -shift, shift, generator)
    down = pixel.view(1, SIZE, 1) - _uniform(count, -shift, shift, generator)
    turn, radius = (
        _uniform(count, 0, 2 * math.pi, generator),
        _uniform(count, low, high, generator),
    )
    cosine, sine = cos(turn) / radius, sin(turn) / radius
    return (
        cosine * across + sine * down,
        cosine * down - sine * across,
    )  # u, v: (count, SIZE, SIZE)


def _paint(canvas: Tensor, colour: Tensor, mask: Tensor) -> None:
    canvas.lerp_(colour.expand_as(canvas), mask.unsqueeze(1).expand_as(canvas))


def _draw_class(
    shape: Callable, texture: Callable, count: int, generator: torch.Generator
) -> Tensor:
    """Images of one fine class, (count, 3, SIZE, SIZE) uint8."""
    ground, colour, distractor = torch.rand(3, count, 3, 1, 1, generator=generator)
    ground, colour = (
        0.2 + 0.45 * ground,
        0.5 + 0.5 * colour,
    )  # any hue; the shape's colour is the lighter one
    canvas = 0.7 * ground + 0.3 * (
        0.2 + 0.45 * torch.rand(count, 3, 3, 3, generator=generator)
    )
    canvas = functional.interpolate(
        canvas, size=(SIZE, SIZE), mode="bilinear", align_corners=True
    )
    u, v = _place(count, 2, 4, 13, generator)
    _paint(canvas, distractor, (3.5 - 3 * hypot(u, 1.5 * v)).clamp_(0, 1))
    u, v = _place(count, 8, 13, 4, generator)
    r, a, opacity = hypot(u, v), torch.atan2(v, u), _uniform(count, 0.6, 1, generator)
    inside = (0.5 - 8 * shape(u, v, r, a)).clamp_(
        0, 1
    ) * opacity  # an edge is about one pixel wide
    waves, phase = (
        _uniform(count, 6, 9, generator),
        _uniform(count, 0, 2 * math.pi, generator),
    )
    second = (0.5 + 2 * texture(waves * u, waves * v, waves * r, phase)).clamp_(0, 1)
    _paint(canvas, colour, inside)
    _paint(canvas, 0.25 * colour, inside * second)
    noise = torch.rand(canvas.shape, generator=generator).sub_(0.5)
    canvas += noise * _uniform(count, 0.05, 0.2, generator).unsqueeze(1)
    return (canvas.clamp_(0, 1) * 255).round_().to(torch.uint8)


def draw(
    seed: int = 0, train_per_class: int = 500, test_per_class: int = 100
) -> dict[str, np.ndarray]:
    """Draw the stand-in: arrays in the form of the course's .npz files, images (N, 32,
    32, 3) uint8, labels (N,) int64.

    Train and test images are different draws; the same seed and counts give the same
    images.
    """
    generator = torch.Generator().manual_seed(seed)
    count = train_per_class + test_per_class
    with _one_thread():
        images = torch.stack(
            [
                _draw_class(f, g, count, generator)
                for g in _textures().values()
                for f in _shapes().values()
            ]
        ).permute(0, 1, 3, 4, 2)  # (100, count, SIZE, SIZE, 3)
    labels = np.arange(len(class_names()), dtype=np.int64)
    return {
        "train_images": images[:, :train_per_class].flatten(0, 1).numpy(),
        "train_labels": labels.repeat(train_per_class),
        "test_images": images[:, train_per_class:].flatten(0, 1).numpy(),
        "test_labels": labels.repeat(test_per_class),
        "class_names": np.array(class_names()),
    }


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: on arrays this small, threads that wait for each other on
    a busy machine cost far more.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
