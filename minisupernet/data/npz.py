"""Your own images: an .npz file in the course's form, read and checked whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from minisupernet.errors import DataError

__all__ = ["read_npz"]

PARTS = ("train", "test")
ARRAYS = (*(f"{part}_{kind}" for part in PARTS for kind in ("images", "labels")),)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file: `train_images` (N, 32, 32, 3) uint8, `train_labels`
    (N,), `test_images`, `test_labels`, and `class_names`, made up where it has none.

    Classes are numbered from 0 without gaps, and each has train and test images.

    Raises:
        DataError: where the file is missing or damaged or holds something else; nothing
            in it is ever unpickled.
    """
    arrays = _plain_arrays(path)
    for part in PARTS:
        _check_part(path, part, arrays)
    names = arrays.get("class_names")
    if names is not None and (names.dtype.kind != "U" or names.ndim != 1):
        raise DataError(
            f"class_names in {path} must be a list of strings, not {names.dtype}"
            f" {names.shape}."
        )
    classes = _check_labels(path, arrays, names)
    if names is None:
        arrays["class_names"] = np.array([f"class {label}" for label in range(classes)])
    return arrays


def _plain_arrays(path: Path) -> dict[str, np.ndarray]:
    """Those arrays of the file that the course asks for, whatever they hold."""
    if not path.is_file():
        raise DataError(f"there is no file {path}; check the path.")
    try:
        with np.load(path, allow_pickle=False) as archive:
            wanted = {*ARRAYS, "class_names"} & set(archive.files)
            return {name: archive[name] for name in wanted}
    except Exception as error:  # a damaged archive fails in many ways
        raise DataError(
            f"{path} is not a whole .npz of plain arrays; save it again with"
            " numpy.savez."
        ) from error


def _check_part(path: Path, part: str, arrays: dict[str, np.ndarray]) -> None:
    images, labels = arrays.get(f"{part}_images"), arrays.get(f"{part}_labels")
    if images is None or labels is None:
        raise DataError(
            f"{path} needs the arrays {part}_images and {part}_labels; save it again"
            " with both."
        )
    if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3) or len(images) == 0:
        found = f"{images.dtype} {images.shape}"
        raise DataError(
            f"{part}_images in {path} must be uint8 (N, 32, 32, 3) with N at least 1,"
            f" not {found}."
        )
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        found = f"{labels.dtype} {labels.shape}"
        raise DataError(
            f"{part}_labels in {path} must be integers ({len(images)},), one for each"
            f" image, not {found}."
        )


def _check_labels(
    path: Path, arrays: dict[str, np.ndarray], names: np.ndarray | None
) -> int:
    """The number of classes: one for each name, or each label from 0 to the largest."""
    labels = {part: arrays[f"{part}_labels"] for part in PARTS}
    lowest = min(int(part.min()) for part in labels.values())
    highest = max(int(part.max()) for part in labels.values())
    limit, why = (len(labels["train"]), "train images")
    if names is not None:
        limit, why = (len(names), "class names")
    if lowest < 0 or highest >= limit:
        raise DataError(
            f"labels in {path} must lie in 0..{limit - 1}, as there are {limit} {why},"
            f" not {lowest}..{highest}."
        )
    classes = highest + 1 if names is None else limit
    if classes < 2:
        raise DataError(f"{path} holds a single class; give at least two.")
    for part in PARTS:
        counts = np.bincount(labels[part].astype(np.int64), minlength=classes)
        if empty := np.flatnonzero(counts == 0).tolist():
            raise DataError(
                f"class {empty[0]} in {path} has no {part} images; number the classes"
                " from 0 without gaps, and give each of them train and test images."
            )
    return classes
