"""What is measured for chapters 2, 3, 4, 8 and 9: a module a system, each with a
function `measure`.

A long study is cut into units of one arm and one seed, which are recorded as they end.
"""

import importlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from minisupernet.course.records import provenance
from minisupernet.data import ImageSet, load
from minisupernet.data.library import python_source
from minisupernet.data.text import Text
from minisupernet.errors import StudyError
from minisupernet.training import pick_device

__all__ = ["SOURCE", "STUDIES", "Study", "check_unit", "measure_study"]

Value = str | int | float
SOURCE = "python_source"  # the one text among the image sets


@dataclass(frozen=True)
class Study:
    """Where one study's runs are recorded, and the images it takes unless told
    otherwise; or the text, which it always takes.

    `unit` are the parameters, beside the seed, that tell its units apart, each with a
    value to show what it is like; a study without any is one run a seed.
    """

    result: str
    data: str = "cifar10"
    unit: Mapping[str, Value] = field(default_factory=dict)


STUDIES = {
    "net2net": Study("02_net2net.json"),
    "net2net_long": Study(
        "02_net2net_long.json", unit={"phase": "wider", "arm": "copies"}
    ),
    "static_hypernet": Study("03_static_hypernetworks.json"),
    "static_long": Study(
        "03_static_long.json", unit={"arm": "generated", "rate": 3e-3, "epochs": 40.0}
    ),
    "hyperlstm": Study("04_dynamic_hypernetworks.json"),
    "hyperlstm_long": Study(
        "04_dynamic_long.json",
        SOURCE,
        {"arm": "hyperlstm", "characters": 7_000_000},
    ),
    "opponents": Study(
        "07_opponents.json",
        "cifar100",
        {
            "of_experiment": 2,
            "fold": 0,
            "group": "heads",
            "channels": 16,
            "steps": 0,
        },
    ),
    "pudnet": Study("08_pudnet.json", "cifar100"),
    "labelled": Study(
        "09_labelled.json",
        "cifar100",
        {"of_experiment": 2, "fold": 0, "group": "look", "channels": 16, "steps": 0},
    ),
    "pudnet_family": Study(
        "08_pudnet_family.json",
        "cifar100",
        {"arm": "pudnet", "changes": "colours", "channels": 8, "steps": 6_000},
    ),
    "fewshot": Study(
        "08_fewshot.json",
        "cifar100",
        {"benchmark": "cifar_fs", "arm": "protonet", "channels": 64, "steps": 2_000},
    ),
}


def check_unit(name: str, unit: Mapping[str, Value]) -> None:
    """Raise a StudyError where the study of this name has no such unit."""
    if unit:
        importlib.import_module(f"{__name__}.{name}").check_unit(**unit)


def measure_study(
    name: str,
    seed: int = 0,
    profile: str = "full",
    data: str | None = None,
    device: str = "auto",
    report: Callable[[str], None] = print,
    checkpoint: Path | None = None,
    **unit: Value,
) -> dict:
    """Measure one study, or one unit of it, with one seed and return all of it, with
    where it comes from, ready for JSON.

    Args:
        name: a key of `STUDIES`.
        profile: "quick", to try it, or "full", as in the book.
        data: an image set, as `minisupernet.data.load` takes it; by default the study's
            own.
        report: told each stage as it ends, in one line.
        checkpoint: a safetensors file from which a killed unit goes on.
        unit: the unit's parameters, where the study has units.

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
    study, place = STUDIES[name], pick_device(device)
    images = _read(study, data or study.data, place)
    measure = importlib.import_module(f"{__name__}.{name}").measure
    if study.unit:
        found = measure(images, seed, profile, report, checkpoint, **study.unit | unit)
    else:
        found = measure(images, seed, profile, report)
    return {
        "profile": profile,
        "seed": seed,
        **found,
        "seconds": round(time.perf_counter() - began, 1),
        **provenance(images, place),
    }


def _read(study: Study, data: str, device: torch.device) -> ImageSet | Text:
    """What a study takes: an image set, or the text."""
    if study.data != SOURCE:
        return load(data, device)
    if data != SOURCE:
        raise StudyError(f"this study reads the text {SOURCE}, not {data}.")
    return python_source().to(device)
