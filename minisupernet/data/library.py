"""A larger text that every Python carries: the source of its own standard library.

Beside `text.python_help` it is ten megabytes instead of half of one, so that a network
of half a million numbers can read for an hour and see nothing twice.
"""

import hashlib
import platform
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from minisupernet.data.text import UNKNOWN, Text
from minisupernet.errors import TextError

__all__ = ["python_source"]

# installed by others, tests of one thing many times over, tables of characters
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
PARTS = ("train", "validation", "test")
LEAST = 100_000  # characters of each part, below which this is no whole library


def python_source(folder: str | Path | None = None, rare: int = 50) -> Text:
    """The source of the standard library, each paragraph once, cut by file: about 80 %
    train, 10 % validation, 10 % test.

    Which part a file belongs to, its path alone decides. A paragraph is kept where it
    comes first, training files before the others, so that no held-out paragraph was
    trained on. The text differs between Python versions; `source` says which this is,
    and `sha256` is that of what was read.

    Args:
        folder: where the library lies; None for that of the Python that runs.
        rare: characters seen fewer times than this in the training part share one sign.

    Raises:
        TextError: where the library's source is not there, or not all of it.
    """
    place = Path(folder or sysconfig.get_path("stdlib"))
    files: dict[str, list[str]] = {part: [] for part in PARTS}
    for name, text in _files(place):
        files[_part(name)].append(text)
    seen: set[str] = set()
    texts = [_once(files[part], seen) for part in PARTS]
    if min(map(len, texts)) < LEAST:
        raise TextError(
            f"{place} does not hold the source of Python's standard library; use a"
            " Python that was installed with its .py files."
        )
    counts = Counter(texts[0])
    common = sorted(sign for sign, count in counts.items() if count >= rare)
    alphabet = "".join(common) + UNKNOWN
    return Text(
        alphabet,
        *(_encode(text, alphabet) for text in texts),
        hashlib.sha256("\0".join(texts).encode()).hexdigest(),
        f"the standard library of Python {platform.python_version()}",
        "python_source",
    )


def _files(place: Path) -> Iterator[tuple[str, str]]:
    """Path within the library and text of each file that is the same on every machine,
    in the order of the paths.
    """
    paths = {path.relative_to(place).as_posix(): path for path in place.rglob("*.py")}
    for name in sorted(paths):
        folders, own = set(name.split("/")[:-1]), name.rpartition("/")[2]
        made_here = own.startswith(("_sysconfigdata", "sitecustomize"))
        if not (folders & LEFT_OUT or made_here):
            yield name, paths[name].read_text(encoding="utf-8", errors="replace")


def _part(name: str) -> str:
    """Two files in ten are held out."""
    tenth = hashlib.sha256(name.encode()).digest()[0] % 10
    return {0: "validation", 1: "test"}.get(tenth, "train")


def _once(texts: list[str], seen: set[str]) -> str:
    """The paragraphs of some files that are not in `seen`, which gets them."""
    kept = []
    for paragraph in (part for text in texts for part in text.split("\n\n")):
        signs = "".join(paragraph.split())
        if signs and signs not in seen:
            seen.add(signs)
            kept.append(paragraph.strip("\n"))
    return "\n\n".join(kept)


def _encode(text: str, alphabet: str) -> torch.Tensor:
    """Characters to their positions in the alphabet (N,) int64, the last for those that
    are not in it."""
    place = np.full(0x110000, len(alphabet) - 1)
    place[[ord(sign) for sign in alphabet]] = range(len(alphabet))
    codes = np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32)
    return torch.from_numpy(place[codes])
