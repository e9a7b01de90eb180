"""The files images come in: the official CIFAR files, downloaded and checked, and .npz
files, as plain arrays.

Both readers give `train_images` (N, 32, 32, 3) uint8, `train_labels` (N,),
`test_images`, `test_labels`, `class_names`.
"""

from __future__ import annotations

import hashlib
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

    CIFAR-100 also has `superclass_of` (100,) and `superclass_names`. No file is
    unpickled before its md5 sum is right.

    Raises:
        DataError: where a file is missing or damaged, the download fails, or `folder`
            cannot be written.
    """
    official = _official(name)
    if not (folder / CIFAR_FOLDERS[name]).exists():
        _download(name, official, folder)
    key = "fine_labels" if name == "cifar100" else "labels"
    arrays = {}
    for part, files in (("train", official.train_list), ("test", official.test_list)):
        batches = [_unpickle(folder, name, file, md5) for file, md5 in files]
        pixels = np.concatenate(
            [batch["data"] for batch in batches]
        )  # (N, 3072), colour by colour
        arrays[f"{part}_images"] = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        arrays[f"{part}_labels"] = np.concatenate([batch[key] for batch in batches])
    meta = _unpickle(folder, name, official.meta["filename"], official.meta["md5"])
    arrays["class_names"] = np.array(meta[official.meta["key"]])
    if name == "cifar100":
        (test,) = batches
        arrays["superclass_of"] = np.zeros(100, dtype=np.int64)
        arrays["superclass_of"][test["fine_labels"]] = test["coarse_labels"]
        arrays["superclass_names"] = np.array(meta["coarse_label_names"])
    return arrays


def _official(name: str) -> Any:
    """torchvision's description of a CIFAR set: its address, its files and their md5
    sums.
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


def _verified(path: Path, md5: str, cure: str) -> bytes:
    """The bytes of a file whose md5 sum is right."""
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; {cure}.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); {cure}.") from error
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise DataError(
            f"{path} is damaged or cut short, as its md5 sum is not {md5}; {cure}."
        )
    return content


def _unpickle(folder: Path, name: str, file: str, md5: str) -> dict[str, Any]:
    place = folder / CIFAR_FOLDERS[name]
    cure = f'delete the folder {place} and call load("{name}") to download it again'
    return pickle.loads(_verified(place / file, md5, cure), encoding="latin1")


def _download(name: str, official: Any, folder: Path) -> None:
    """Download and unpack into a staging folder, check every file, then move the whole
    folder into place.
    """
    staging = folder / f".{name}-staging"
    with _alone(folder, name):
        if (folder / CIFAR_FOLDERS[name]).exists():
            return  # another process has downloaded it meanwhile
        shutil.rmtree(staging, ignore_errors=True)  # what a killed process left
        try:
            _fetch(official, staging)
            (staging / official.base_folder).replace(folder / CIFAR_FOLDERS[name])
        except (OSError, RuntimeError, HTTPException, DataError) as error:
            raise DataError(
                f"the download of {official.url} failed ({error}) and nothing of it was"
                " kept; "
                f'check the network and the free space, then call load("{name}") again.'
            ) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _fetch(official: Any, staging: Path) -> None:
    from torchvision.datasets.utils import download_and_extract_archive

    download_and_extract_archive(
        official.url, str(staging), filename=official.filename, md5=official.tgz_md5
    )
    meta = (official.meta["filename"], official.meta["md5"])
    for file, md5 in (*official.train_list, *official.test_list, meta):
        _verified(
            staging / official.base_folder / file,
            md5,
            "the archive is not the official one",
        )


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
