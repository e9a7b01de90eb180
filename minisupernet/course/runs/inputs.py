"""What decides what a run shows, as one checksum: the code it uses, its parameters, its
images, and versions.
"""

import ast
import functools
import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from minisupernet.course.status import NOTES
from minisupernet.files import data_folder

__all__ = ["code_used", "notebook_fingerprint", "package_fingerprint"]


def notebook_fingerprint(path: Path, parameters: Mapping[str, Any], root: Path) -> str:
    """A sha256 over all that decides what a notebook shows: itself without its outputs,
    the package, the recorded results, the parameters, the image files, and the versions
    of Python and torch."""
    notebook = json.loads(path.read_bytes())
    cells = [
        [cell["cell_type"], cell["source"], cell["metadata"]]
        for cell in notebook["cells"]
    ]
    about = {
        name: value for name, value in notebook["metadata"].items() if name != NOTES
    }
    files = [
        *(root / "minisupernet").rglob("*.py"),
        *(root / "results").rglob("*.json"),
    ]
    return _checksum([cells, about], files, root, parameters, path.parent)


def package_fingerprint(modules: Iterable[str], parameters: Mapping[str, Any]) -> str:
    """The same for a run of the package alone, which these modules of it carry out:
    they and all that they import.
    """
    package = Path(__file__).parents[2]
    return _checksum(
        [], code_used(modules, package), package.parent, parameters, Path()
    )


def code_used(modules: Iterable[str], package: Path) -> set[Path]:
    """The files of these modules ("supernet", "course.studies.pudnet") and of all that
    they import.
    """
    found, waiting = set(), [package.joinpath(*module.split(".")) for module in modules]
    while waiting:
        place = waiting.pop()
        file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        if file in found or not file.is_file():
            continue
        found.add(file)
        for node in ast.walk(ast.parse(file.read_bytes())):
            if (
                isinstance(node, ast.ImportFrom)
                and (node.module or "").split(".")[0] == package.name
            ):
                source = package.joinpath(*node.module.split(".")[1:])
                waiting += [source, *(source / each.name for each in node.names)]
    return found


def image_files(folder: Path, data: str) -> list[list[str]]:
    """Name and sha256 of every image file that a run in `folder` with this `data`
    parameter may read.
    """
    place = data_folder()
    cifar = {
        "cifar100": ["cifar-100-python/*"],
        "cifar10": ["cifar-10-batches-py/*", "cifar10.npz"],
    }
    patterns = cifar.get(data, sum(cifar.values(), []) if data == "auto" else [])
    files = (
        [folder / data]
        if data.endswith(".npz")
        else [file for each in patterns for file in place.glob(each)]
    )
    states = [(file, file.stat()) for file in sorted(files) if file.is_file()]
    return [
        [file.name, _sha256(file, state.st_size, state.st_mtime_ns)]
        for file, state in states
    ]


def _checksum(
    cells: list,
    files: Iterable[Path],
    root: Path,
    parameters: Mapping[str, Any],
    folder: Path,
) -> str:
    code = [
        [
            file.relative_to(root).as_posix(),
            hashlib.sha256(file.read_bytes()).hexdigest(),
        ]
        for file in files
    ]
    data = str(parameters.get("data", "auto"))
    told = {**parameters, "data": Path(data).name}  # where an .npz lies does not count
    versions = [platform.python_version(), metadata.version("torch")]
    inputs = [cells, told, sorted(code), image_files(folder, data), versions]
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


@functools.cache
def _sha256(file: Path, size: int, changed: int) -> str:
    """The digest of a file; taken once while its size and time stay."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
