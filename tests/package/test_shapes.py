"""Shapes-100: the form of CIFAR-100, drawn from a seed, too hard for a linear
classifier, not for a small network.
"""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from minisupernet.data import augment, normalise, shapes

TASKS = (8, 31, 78)  # class i against the last class, spread over textures and shapes


@pytest.fixture(scope="module")
def whole() -> dict[str, np.ndarray]:
    return shapes.draw()


def test_form_is_that_of_cifar100(whole):
    assert whole["train_images"].shape == (50_000, 32, 32, 3) and whole[
        "test_images"
    ].shape == (10_000, 32, 32, 3)
    assert whole["train_images"].dtype == whole["test_images"].dtype == np.uint8
    assert (np.bincount(whole["train_labels"]) == 500).all() and (
        np.bincount(whole["test_labels"]) == 100
    ).all()
    assert tuple(whole["class_names"]) == shapes.class_names()


def test_names_and_superclasses():
    fine, coarse = shapes.class_names(), shapes.shape_names()
    assert len(set(fine)) == 100 and fine == tuple(sorted(fine))
    assert len(set(coarse)) == 20 and coarse == tuple(sorted(coarse))
    assert (np.bincount(shapes.superclass_of()) == 5).all()
    assert all(
        fine[i].endswith(f" {coarse[shape]}")
        for i, shape in enumerate(shapes.superclass_of())
    )
    for i in range(50):
        assert not set(fine[i].split()) & set(fine[i + 50].split())


def test_same_seed_same_images():
    first, again, other = (shapes.draw(seed, 3, 2) for seed in (0, 0, 1))
    assert np.array_equal(first["train_images"], again["train_images"])
    assert np.array_equal(first["test_images"], again["test_images"])
    assert (first["train_images"] != other["train_images"]).mean() > 0.9


def test_drawing_leaves_the_global_state_alone():
    torch.manual_seed(0)
    threads, expected = (
        torch.get_num_threads(),
        torch.rand(3, generator=torch.Generator().manual_seed(0)),
    )
    shapes.draw(1, 1, 1)
    assert torch.get_num_threads() == threads and torch.equal(torch.rand(3), expected)


def test_no_image_is_there_twice(whole):
    images = np.concatenate([whole["train_images"], whole["test_images"]])
    assert len({image.tobytes() for image in images}) == 60_000


def test_hue_does_not_give_the_class_away(whole):
    colours = (
        whole["train_images"].reshape(100, 500, -1, 3).mean(2)
    )  # (classes, images, colours)
    hues = colours - colours.mean(2, keepdims=True)
    assert (
        hues.mean(1).std(0) < 0.12 * hues.std((0, 1))
    ).all()  # chance alone gives 1 / sqrt(500) = 0.045 of it


def test_every_shape_and_texture_looks_different():
    pixel = torch.linspace(-1.1, 1.1, 64)
    v, u = torch.meshgrid(pixel, pixel, indexing="ij")
    r, a = torch.hypot(u, v), torch.atan2(v, u)
    inside = (
        torch.stack([shape(u, v, r, a) < 0 for shape in shapes._shapes().values()])
        .flatten(1)
        .float()
    )
    second = torch.stack(
        [
            texture(7 * u, 7 * v, 7 * r, torch.tensor(0.5)) > 0
            for texture in shapes._textures().values()
        ]
    )
    for masks in (inside, second.flatten(1).float()):
        differing = (masks.unsqueeze(0) != masks.unsqueeze(1)).float().mean(2)
        assert (differing + torch.eye(len(masks)) > 0.03).all()
    assert ((inside.mean(1) > 0.15) & (inside.mean(1) < 0.75)).all()


# how hard it is


def task(whole: dict[str, np.ndarray], part: str, label: int) -> tuple[Tensor, Tensor]:
    """Images and 0/1 labels of "class `label` or the last class"."""
    chosen = np.isin(whole[f"{part}_labels"], (label, 99))
    images = (
        torch.from_numpy(whole[f"{part}_images"][chosen])
        .permute(0, 3, 1, 2)
        .contiguous()
    )
    return images, torch.from_numpy(whole[f"{part}_labels"][chosen] == 99).float()


def accuracy_after(
    model: nn.Module, whole: dict, label: int, steps: int, rate: float, augmented: bool
) -> float:
    """Test accuracy of a binary classifier after Adam on batches of 64."""
    images, labels = task(whole, "train", label)
    test_images, test_labels = task(whole, "test", label)
    half, generator = torch.full((3,), 0.5), torch.Generator().manual_seed(label)
    optimiser = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(steps):
        chosen = torch.randint(len(images), (64,), generator=generator)
        batch = augment(images[chosen], generator) if augmented else images[chosen]
        logits = model(normalise(batch, half, half / 2)).squeeze(1)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, labels[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        guesses = model(normalise(test_images, half, half / 2)).squeeze(1) > 0
    return (guesses == test_labels.bool()).float().mean().item()


def small_network() -> nn.Module:
    layers: list[nn.Module] = []
    for channels in (3, 16, 16, 16):
        layers += [nn.Conv2d(channels, 16, 5, stride=2, padding=2), nn.LeakyReLU(0.2)]
    head = [
        nn.Linear(64, 100),
        nn.LeakyReLU(0.2),
        nn.Linear(100, 100),
        nn.LeakyReLU(0.2),
        nn.Linear(100, 1),
    ]
    return nn.Sequential(*layers, nn.Flatten(), *head)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_linear_classifier_fails(whole, one_thread):
    torch.manual_seed(0)
    linear = [nn.Sequential(nn.Flatten(), nn.Linear(3072, 1)) for _ in TASKS]
    scores = [
        accuracy_after(model, whole, label, 200, 3e-4, False)
        for model, label in zip(linear, TASKS, strict=True)
    ]
    assert np.mean(scores) < 0.65


def test_a_small_network_learns_and_has_room_to_improve(whole, one_thread):
    torch.manual_seed(0)
    scores = [
        accuracy_after(small_network(), whole, label, 400, 2e-3, True)
        for label in TASKS[:2]
    ]
    assert 0.72 < np.mean(scores) < 0.97
