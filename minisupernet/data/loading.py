"""Where images come from: CIFAR-100, CIFAR-10, your own .npz, or the drawn stand-in
Shapes-100.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minisupernet.data import shapes
from minisupernet.data.cifar import CIFAR_FOLDERS, read_cifar
from minisupernet.data.images import ImageSet
from minisupernet.data.needs import lacking, need
from minisupernet.data.npz import read_npz
from minisupernet.errors import DataError, FileError
from minisupernet.files import data_folder, whole_file

__all__ = ["is_at_hand", "load"]


def load(
    name: str | Path = "auto",
    device: str | torch.device = "cpu",
    chapter: int | None = None,
) -> ImageSet:
    """Load "cifar100", "cifar10", "shapes100" or the path of an .npz file; "auto" takes
    what is there, without network.

    "auto" takes CIFAR-100, else CIFAR-10, where its files are in the data folder (and
    serve the chapter), else Shapes-100, and prints which. The CIFAR sets are downloaded
    where their files are missing, and checked against the md5 sums torchvision knows.

    Args:
        chapter: whose needs the images have to meet (`minisupernet.data.needs`).

    Raises:
        DataError: for an unknown name, for files that are missing, damaged, not as
            described or cannot be written, and for fewer classes or images than the
            chapter needs.
    """
    images = _at_hand(chapter) if name == "auto" else _named(name)
    if chapter is not None:
        need(images, chapter)
    return images.to(device)


def _at_hand(chapter: int | None) -> ImageSet:
    """What "auto" stands for, said in one line."""
    fetch = "`make data` or `python -m minisupernet data` downloads CIFAR-100"
    if is_at_hand("cifar100"):
        stand_in = 'load("shapes100") gives the drawn stand-in'
        print(f"Images: CIFAR-100 from the data folder; {stand_in}.")
        return _cifar100()
    why = ""
    if is_at_hand("cifar10"):
        images = _cifar10()
        lack = lacking(images, chapter) if chapter is not None else None
        if lack is None:
            print(f"Images: CIFAR-10 from the data folder; {fetch}.")
            return images
        why = f" (the CIFAR-10 at hand has {lack} that chapter {chapter} needs)"
    print(f"Images: Shapes-100, a drawn stand-in for CIFAR-100{why}; {fetch}.")
    return _shapes100()


def is_at_hand(name: str) -> bool:
    """Whether the data folder has "cifar100" or "cifar10", this one also as an .npz
    file."""
    folder = data_folder()
    official = (folder / CIFAR_FOLDERS[name]).exists()
    return official or (name == "cifar10" and (folder / "cifar10.npz").exists())


def _named(name: str | Path) -> ImageSet:
    readers = {"cifar100": _cifar100, "cifar10": _cifar10, "shapes100": _shapes100}
    if name in readers:
        return readers[name]()
    if str(name).endswith(".npz"):
        path = Path(name).expanduser()
        return _from_arrays(path.stem, f"the file {path.name}", read_npz(path))
    raise DataError(
        f"unknown image set '{name}'; use 'auto', {', '.join(map(repr, readers))} or"
        " the path of an .npz file."
    )


def _cifar100() -> ImageSet:
    source = "CIFAR-100 (Krizhevsky, 2009), the official files, md5 checked"
    return _from_arrays("cifar100", source, read_cifar("cifar100", data_folder()))


def _cifar10() -> ImageSet:
    folder = data_folder()
    own = folder / "cifar10.npz"
    if own.exists() and not (folder / CIFAR_FOLDERS["cifar10"]).exists():
        return _from_arrays("cifar10", f"CIFAR-10, the file {own.name}", read_npz(own))
    source = "CIFAR-10 (Krizhevsky, 2009), the official files, md5 checked"
    return _from_arrays("cifar10", source, read_cifar("cifar10", folder))


def _shapes100() -> ImageSet:
    """Shapes-100 from its cache in the data folder, drawn anew where that is missing,
    damaged or of another drawing.
    """
    path = data_folder() / f"shapes100-{shapes.version()}.npz"
    try:
        arrays = read_npz(path)
    except DataError:
        arrays = shapes.draw()
        _keep(arrays, path)
    arrays["superclass_of"] = shapes.superclass_of()
    arrays["superclass_names"] = np.array(shapes.shape_names())
    source = "Shapes-100, a stand-in drawn by minisupernet"
    return _from_arrays("shapes100", source, arrays)


def _keep(arrays: dict[str, np.ndarray], path: Path) -> None:
    """Write the cache and remove those of other drawings; without a place to write, say
    so and go on.
    """
    try:
        with whole_file(path) as part, part.open("wb") as file:
            np.savez(file, **arrays)
    except FileError as error:
        print(f"Shapes-100 will be drawn anew each time: {error}")
        return
    for old in set(path.parent.glob("shapes100-*.npz")) - {path}:
        with suppress(OSError):
            old.unlink()


def _from_arrays(name: str, source: str, arrays: dict[str, np.ndarray]) -> ImageSet:
    """An ImageSet on the cpu from arrays in the .npz form, where superclass_of and
    superclass_names may be added.
    """
    tensors: dict[str, Tensor] = {}
    for part in ("train", "test"):
        pixels = torch.from_numpy(arrays[f"{part}_images"])  # (N, 32, 32, 3)
        labels = arrays[f"{part}_labels"].astype(np.int64)
        tensors[f"{part}_images"] = pixels.permute(0, 3, 1, 2).contiguous()
        tensors[f"{part}_labels"] = torch.from_numpy(labels)
    coarse = arrays.get("superclass_of")
    mean, std = _statistics(tensors["train_images"])
    return ImageSet(
        name=name,
        source=source,
        class_names=tuple(map(str, arrays["class_names"])),
        superclass_of=None if coarse is None else torch.from_numpy(coarse),
        superclass_names=tuple(map(str, arrays.get("superclass_names", ()))),
        mean=mean,
        std=std,
        **tensors,
    )


def _statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (3,) of images (N, 3, H, W) uint8 scaled to 0..1, exact from
    the counts of the 256 values.
    """
    colours = [images[:, colour].flatten() for colour in range(3)]
    counts = torch.stack([torch.bincount(each, minlength=256) for each in colours])
    share = counts.double() / counts.double().sum(1, keepdim=True)  # (3, 256)
    values = torch.arange(256).double() / 255
    mean = share @ values
    variance = share @ values**2 - mean**2
    # never 0, so that a flat colour can be normalised
    deviation = variance.clamp(min=1 / 255**2).sqrt()
    return mean.float(), deviation.float()
