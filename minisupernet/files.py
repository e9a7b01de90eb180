"""Files that are either whole or not there, and the folder of the image files."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from platformdirs import user_cache_path

from minisupernet.errors import FileError

__all__ = ["data_folder", "whole_file"]


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary path to write; move it to `path` when the block ends well,
    remove it when it does not.

    Readers see the old file or the new one, never half of one, also when the process is
    killed or the disk is full.

    Raises:
        FileError: where the folder cannot be written or there is no space left.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        part.replace(path)
    except OSError as error:
        raise FileError(
            f"cannot write {path}: {error.strerror or error}; free space or choose"
            " another place."
        ) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def data_folder() -> Path:
    """The folder of the image files: `$MINISUPERNET_DATA`, else "minisupernet" in the
    user's cache folder.
    """
    if chosen := os.environ.get("MINISUPERNET_DATA"):
        return Path(chosen).expanduser()
    return user_cache_path("minisupernet", appauthor=False, opinion=False)
