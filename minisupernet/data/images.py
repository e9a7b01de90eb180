"""Image sets as tensors on one device: CIFAR-100, CIFAR-10, your own .npz, or the drawn
stand-in Shapes-100.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from minisupernet.data import shapes
from minisupernet.data.cifar import CIFAR_FOLDERS, read_cifar
from minisupernet.errors import DataError, FileError
from minisupernet.files import data_folder, whole_file

__all__ = ["ImageSet", "augment", "load", "normalise", "read_npz"]

ARRAY_NAMES = (
    "train_images",
    "train_labels",
    "test_images",
    "test_labels",
    "class_names",
)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images (N, 3, 32, 32) uint8 and labels (N,) int64 on one device, their classes,
    and where they came from.

    `superclass_of` (classes,) int64 gives the coarse class of each class, None where
    there are none. `mean` and `std` (3,) float32 are those of the train images scaled
    to 0..1.
    """

    name: str
    source: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]
    superclass_of: Tensor | None
    superclass_names: tuple[str, ...]
    mean: Tensor
    std: Tensor

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.train_images.device

    def to(self, device: str | torch.device) -> ImageSet:
        """The same set with every tensor on `device`."""
        tensors = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **tensors)

    def checksum(self) -> str:
        """The sha256 of the shapes, images and labels, in hexadecimal; the same on
        every device.
        """
        digest = hashlib.sha256()
        for tensor in (
            self.train_images,
            self.train_labels,
            self.test_images,
            self.test_labels,
        ):
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.cpu().contiguous().numpy())
        return digest.hexdigest()


def load(name: str | Path = "auto", device: str | torch.device = "cpu") -> ImageSet:
    """Load "cifar100", "cifar10", "shapes100" or the path of an .npz file; "auto" takes
    what is there, without network.

    "auto" takes CIFAR-100, else CIFAR-10, where its files are in the data folder, else
    Shapes-100, and prints which. The CIFAR sets are downloaded where their files are
    missing, and checked against the md5 sums torchvision knows.

    Raises:
        DataError: for an unknown name and for files that are missing, damaged, not as
            described or cannot be written.
    """
    if name == "auto":
        name = _first_at_hand()
    readers = {"cifar100": _cifar100, "cifar10": _cifar10, "shapes100": _shapes100}
    if name in readers:
        return readers[name]().to(device)
    if str(name).endswith(".npz"):
        path = Path(name).expanduser()
        return _from_arrays(path.stem, f"the file {path.name}", read_npz(path)).to(
            device
        )
    raise DataError(
        f"unknown image set '{name}'; use 'auto', {', '.join(map(repr, readers))} or"
        " the path of an .npz file."
    )


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Scale images (..., 3, 32, 32) uint8 to float32 of about mean 0 and deviation 1 in
    each colour.
    """
    scale = 1 / (255 * std)
    return (images * scale.view(3, 1, 1)).sub_((mean / std).view(3, 1, 1))


def augment(
    images: Tensor,
    generator: torch.Generator,
    flip: bool = True,
    crop: int = 4,
    cutout: int = 0,
) -> Tensor:
    """Give each image (..., 3, H, W) its own random flip, shift by up to `crop` pixels
    and square hole, uint8 to uint8.

    What a shift brings in is 0 (black), and so is the hole of side `cutout`, which lies
    wholly inside the image.
    """
    batch = images.reshape(-1, *images.shape[-3:])
    count, _, height, width = batch.shape

    def choose(choices: int) -> Tensor:
        chosen = torch.randint(
            choices, (count,), generator=generator, device=generator.device
        )
        return chosen.to(batch.device)

    if flip:
        mirrored = choose(2).to(torch.uint8).view(-1, 1, 1, 1)
        batch = batch * (1 - mirrored) + batch.flip(-1) * mirrored
    if crop:
        windows = (
            functional.pad(batch, (crop,) * 4).unfold(2, height, 1).unfold(3, width, 1)
        )
        down, across = choose(2 * crop + 1), choose(2 * crop + 1)
        batch = windows[
            torch.arange(count, device=batch.device), :, down, across
        ]  # of (count, 3, down, across, H, W)
    if cutout:
        rows = _outside(choose(height - cutout + 1), cutout, height).unsqueeze(2)
        columns = _outside(choose(width - cutout + 1), cutout, width).unsqueeze(1)
        batch = batch * (rows | columns).unsqueeze(1)
    return batch.reshape(images.shape)


def _outside(start: Tensor, length: int, size: int) -> Tensor:
    """Which of the positions 0..size-1 lie outside start..start+length-1, (count, size)
    bool.
    """
    offset = torch.arange(size, device=start.device) - start.unsqueeze(1)
    return (offset < 0) | (offset >= length)


def _first_at_hand() -> str:
    folder = data_folder()
    fetch = "`make data` or `python -m minisupernet data` downloads CIFAR-100"
    if (folder / CIFAR_FOLDERS["cifar100"]).exists():
        print(
            'Images: CIFAR-100 from the data folder; load("shapes100") gives the drawn'
            " stand-in."
        )
        return "cifar100"
    if (folder / CIFAR_FOLDERS["cifar10"]).exists() or (
        folder / "cifar10.npz"
    ).exists():
        print(f"Images: CIFAR-10 from the data folder; {fetch}.")
        return "cifar10"
    print(f"Images: Shapes-100, a drawn stand-in for CIFAR-100; {fetch}.")
    return "shapes100"


def _statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (3,) of images (N, 3, H, W) uint8 scaled to 0..1, exact from
    the counts of the 256 values.
    """
    counts = torch.stack(
        [
            torch.bincount(images[:, colour].flatten(), minlength=256)
            for colour in range(3)
        ]
    ).double()
    share, values = (
        counts / counts.sum(1, keepdim=True),
        torch.arange(256).double() / 255,
    )
    mean = share @ values
    variance = share @ values**2 - mean**2
    deviation = variance.clamp(
        min=1 / 255**2
    ).sqrt()  # never 0, so that a flat colour can be normalised
    return mean.float(), deviation.float()


def _from_arrays(name: str, source: str, arrays: dict[str, np.ndarray]) -> ImageSet:
    """An ImageSet on the cpu from arrays in the .npz form, where superclass_of and
    superclass_names may be added.
    """
    tensors: dict[str, Tensor] = {}
    for part in ("train", "test"):
        tensors[f"{part}_images"] = (
            torch.from_numpy(arrays[f"{part}_images"]).permute(0, 3, 1, 2).contiguous()
        )
        tensors[f"{part}_labels"] = torch.from_numpy(
            arrays[f"{part}_labels"].astype(np.int64)
        )
    mean, std = _statistics(tensors["train_images"])
    return ImageSet(
        name=name,
        source=source,
        class_names=tuple(map(str, arrays["class_names"])),
        superclass_of=(
            torch.from_numpy(arrays["superclass_of"])
            if "superclass_of" in arrays
            else None
        ),
        superclass_names=tuple(map(str, arrays.get("superclass_names", ()))),
        mean=mean,
        std=std,
        **tensors,
    )


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
    arrays |= {
        "superclass_of": shapes.superclass_of(),
        "superclass_names": np.array(shapes.shape_names()),
    }
    return _from_arrays(
        "shapes100", "Shapes-100, a stand-in drawn by minisupernet", arrays
    )


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


def _cifar100() -> ImageSet:
    source = "CIFAR-100 (Krizhevsky, 2009), the official files, md5 checked"
    return _from_arrays("cifar100", source, read_cifar("cifar100", data_folder()))


def _cifar10() -> ImageSet:
    folder = data_folder()
    if (
        not (folder / CIFAR_FOLDERS["cifar10"]).exists()
        and (folder / "cifar10.npz").exists()
    ):
        return _from_arrays(
            "cifar10",
            "CIFAR-10, the file cifar10.npz",
            read_npz(folder / "cifar10.npz"),
        )
    source = "CIFAR-10 (Krizhevsky, 2009), the official files, md5 checked"
    return _from_arrays("cifar10", source, read_cifar("cifar10", folder))


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file in the course's form, checked; class names are made up
    where the file has none.

    Raises:
        DataError: where the file is missing or damaged or holds something else; nothing
            in it is ever unpickled.
    """
    if not path.is_file():
        raise DataError(f"there is no file {path}; check the path.")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files if key in ARRAY_NAMES}
    except Exception as error:  # a damaged archive fails in many ways
        raise DataError(
            f"{path} is not a whole .npz of plain arrays; save it again with"
            " numpy.savez."
        ) from error
    for part in ("train", "test"):
        _check_part(path, part, arrays)
    _check_labels(path, arrays)
    if "class_names" not in arrays:
        arrays["class_names"] = np.array(
            [f"class {label}" for label in range(_label_range(arrays)[1] + 1)]
        )
    return arrays


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


def _label_range(arrays: dict[str, np.ndarray]) -> tuple[int, int]:
    labels = arrays["train_labels"], arrays["test_labels"]
    return min(int(part.min()) for part in labels), max(
        int(part.max()) for part in labels
    )


def _check_labels(path: Path, arrays: dict[str, np.ndarray]) -> None:
    names = arrays.get("class_names")
    if names is not None and (names.dtype.kind != "U" or names.ndim != 1):
        raise DataError(
            f"class_names in {path} must be a list of strings, not {names.dtype}"
            f" {names.shape}."
        )
    limit, why = (
        (len(arrays["train_labels"]), "train images")
        if names is None
        else (len(names), "class names")
    )
    lowest, highest = _label_range(arrays)
    if lowest < 0 or highest >= limit:
        raise DataError(
            f"labels in {path} must lie in 0..{limit - 1}, as there are {limit} {why},"
            f" not {lowest}..{highest}."
        )
