"""CIFAR-100 and CIFAR-10 as plain arrays, from the official files, by torchvision's own
reader, and their download.

No file is unpickled before its md5 sum is right, and a download is either whole or not
there.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from minisupernet.errors import DataError

__all__ = ["CIFAR_FOLDERS", "read_cifar"]

CIFAR_FOLDERS = {"cifar100": "cifar-100-python", "cifar10": "cifar-10-batches-py"}


def read_cifar(name: str, folder: Path) -> dict[str, np.ndarray]:
    """The arrays of "cifar100" or "cifar10" from the official files in `folder`,
    downloaded where they are not there.

    `train_images` (N, 32, 32, 3) uint8, `train_labels` (N,), `test_images`,
    `test_labels` and `class_names`; CIFAR-100 also has `superclass_of` (100,) and
    `superclass_names`.

    Raises:
        DataError: where a file is missing or damaged, the download fails, or `folder`
            cannot be written.
    """
    reader, place = _reader(name), folder / CIFAR_FOLDERS[name]
    if not place.exists():
        _download(name, reader, folder)
    try:
        train, test = reader(folder, train=True), reader(folder, train=False)
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"{_fault(reader, folder) or error}; delete the folder {place} and call"
            f' load("{name}") to download it again.'
        ) from error
    arrays = {
        "train_images": train.data,
        "train_labels": np.array(train.targets),
        "test_images": test.data,
        "test_labels": np.array(test.targets),
        "class_names": np.array(train.classes),
    }
    return arrays | (_superclasses(place) if name == "cifar100" else {})


def _reader(name: str) -> Any:
    """torchvision's class for a CIFAR set, which knows its address, its files and their
    md5 sums.
    """
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        raise DataError(
            f"reading CIFAR needs the torchvision made for torch {torch.__version__},"
            " which does not load here; run `python -m pip install --force-reinstall"
            " torch torchvision` for a matched pair."
        ) from error
    return datasets.CIFAR100 if name == "cifar100" else datasets.CIFAR10


def _superclasses(place: Path) -> dict[str, np.ndarray]:
    """The coarse class of each fine one, which torchvision leaves in files that it has
    checked."""
    test, meta = (
        pickle.loads((place / file).read_bytes(), encoding="latin1")
        for file in ("test", "meta")
    )
    superclass_of = np.zeros(len(meta["fine_label_names"]), dtype=np.int64)
    superclass_of[test["fine_labels"]] = test["coarse_labels"]
    names = np.array(meta["coarse_label_names"])
    return {"superclass_of": superclass_of, "superclass_names": names}


def _fault(reader: Any, folder: Path) -> str | None:
    """Which official file in `folder` is missing or damaged, in words; None where all
    are right.
    """
    from torchvision.datasets.utils import check_integrity

    meta = (reader.meta["filename"], reader.meta["md5"])
    for file, md5 in (*reader.train_list, *reader.test_list, meta):
        path = folder / reader.base_folder / file
        if not path.exists():
            return f"{path} is missing"
        try:
            if not check_integrity(path, md5):
                return f"{path} is damaged or cut short, as its md5 sum is not {md5}"
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"
    return None


def _download(name: str, reader: Any, folder: Path) -> None:
    """Download and unpack into a staging folder, check every file, then move the whole
    folder into place.
    """
    from torchvision.datasets.utils import download_and_extract_archive

    staging = folder / f".{name}-staging"
    with _alone(folder, name):
        if (folder / CIFAR_FOLDERS[name]).exists():
            return  # another process has downloaded it meanwhile
        shutil.rmtree(staging, ignore_errors=True)  # what a killed process left
        try:
            download_and_extract_archive(
                reader.url, staging, filename=reader.filename, md5=reader.tgz_md5
            )
            if fault := _fault(reader, staging):
                raise DataError(f"{fault}: the archive is not the official one")
            (staging / reader.base_folder).replace(folder / CIFAR_FOLDERS[name])
        except (OSError, RuntimeError, HTTPException, DataError) as error:
            raise DataError(
                f"the download of {reader.url} failed ({error}) and nothing of it was"
                " kept; check the network and the free space, then call"
                f' load("{name}") again.'
            ) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _alone(folder: Path, name: str) -> Iterator[None]:
    """Hold the lock of one download, so that a second process waits for the first."""
    lock = FileLock(folder / f".{name}.lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise DataError(
            f"cannot write in the data folder {folder} ({error.strerror}); "
            "set MINISUPERNET_DATA to a folder that you can write in."
        ) from error
    try:
        yield
    finally:
        lock.release()
