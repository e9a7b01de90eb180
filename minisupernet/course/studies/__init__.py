"""What is measured for chapters 2, 3, 4 and 8: one module a system, each with a
function `measure`.
"""

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from minisupernet.course.records import provenance, record_run, results_file
from minisupernet.data import load
from minisupernet.errors import StudyError
from minisupernet.training import pick_device

__all__ = ["STUDIES", "Study", "measure_study", "record_study"]


@dataclass(frozen=True)
class Study:
    """Where one study's runs are recorded, and the images it takes unless told
    otherwise.
    """

    result: str
    data: str = "cifar10"


STUDIES = {
    "net2net": Study("02_net2net.json"),
    "static_hypernet": Study("03_static_hypernetworks.json"),
    "hyperlstm": Study("04_dynamic_hypernetworks.json"),
    "pudnet": Study("08_pudnet.json", "cifar100"),
}


def measure_study(
    name: str,
    seed: int = 0,
    profile: str = "full",
    data: str | None = None,
    device: str = "auto",
    report: Callable[[str], None] = print,
) -> dict:
    """Measure one study with one seed and return all of it, with where it comes from,
    ready for JSON.

    Args:
        name: a key of `STUDIES`.
        profile: "quick", to try it, or "full", as in the book.
        data: an image set, as `minisupernet.data.load` takes it; by default the study's
            own.
        report: told each stage as it ends, in one line.

    Raises:
        StudyError: for a study or a profile that does not exist.
    """
    if name not in STUDIES:
        raise StudyError(
            f"there is no study '{name}'; choose one of {', '.join(STUDIES)}."
        )
    if profile not in ("quick", "full"):
        raise StudyError(f"there is no profile '{profile}'; use 'quick' or 'full'.")
    began = time.perf_counter()
    images = load(data or STUDIES[name].data, pick_device(device))
    found = importlib.import_module(f"minisupernet.course.studies.{name}").measure(
        images, seed, profile, report
    )
    seconds = round(time.perf_counter() - began, 1)
    return {
        "profile": profile,
        "seed": seed,
        **found,
        "seconds": seconds,
        **provenance(images, images.device),
    }


def record_study(
    name: str,
    seed: int = 0,
    profile: str = "full",
    data: str | None = None,
    device: str = "auto",
    out: Path | None = None,
    report: Callable[[str], None] = print,
) -> Path:
    """Measure one study, as `measure_study` does, and record it in place of an older
    run of that seed and profile.

    Args:
        out: the result file; by default the one in `results`.

    Returns:
        The result file.
    """
    run = measure_study(name, seed, profile, data, device, report)
    path = out or results_file(STUDIES[name].result)
    record_run(path, run, ("profile", "seed"))
    return path
