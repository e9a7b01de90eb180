"""Nightly: every chapter runs on the least images that it asks for, and on a data
folder that holds ten classes alone.
"""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from support import ROOT, nightly

from minisupernet.course.runs.notebooks import environment, execute, find_notebook
from minisupernet.data.needs import NEEDS


def write_images(path: Path, classes: int, train: int, test: int) -> Path:
    """An .npz of noisy pictures, so many of each class, without names or groups."""
    random = np.random.default_rng(0)
    pictures, arrays = random.integers(0, 256, (classes, 32, 32, 3)), {}
    for part, count in (("train", train), ("test", test)):
        labels = np.arange(classes).repeat(count)
        noise = random.integers(0, 100, (len(labels), 32, 32, 3))
        images = (0.6 * pictures[labels] + noise).clip(0, 255).astype(np.uint8)
        arrays |= {f"{part}_images": images, f"{part}_labels": labels}
    np.savez(path, **arrays)
    return path


@nightly
@pytest.mark.parametrize("chapter", sorted(NEEDS))
def test_a_chapter_runs_on_the_least_that_it_asks_for(tmp_path, chapter):
    own = write_images(tmp_path / "own.npz", **asdict(NEEDS[chapter]))
    notebook, output = find_notebook(chapter, ROOT), tmp_path / "done.ipynb"
    execute(notebook, output, {"data": str(own)}, threads=1)


@nightly
@pytest.mark.parametrize("chapter", sorted(NEEDS))
def test_auto_runs_where_ten_classes_are_at_hand(tmp_path, chapter):
    write_images(tmp_path / "cifar10.npz", classes=10, train=200, test=40)
    notebook, output = find_notebook(chapter, ROOT), tmp_path / "done.ipynb"
    with environment(MINISUPERNET_DATA=str(tmp_path)):
        execute(notebook, output, {"data": "auto"}, threads=1)
