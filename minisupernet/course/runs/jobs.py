"""What a run may be: a notebook, an experiment or a study, with parameters that are
checked before anything starts.
"""

import functools
import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisupernet.course.runs.inputs import notebook_fingerprint, package_fingerprint
from minisupernet.course.runs.notebooks import (
    check_parameters,
    execute,
    find_notebook,
    writing,
)
from minisupernet.course.runs.parameters import override, plain, suggestion
from minisupernet.errors import RunError

__all__ = ["Job", "make_job", "short_digest"]

IMAGE_SETS = ("auto", "cifar100", "cifar10", "shapes100")


@dataclass(frozen=True)
class Job:
    """One run: `what` it runs, the `parameters` it was given, and the checkout `root`
    it belongs to.
    """

    what: str
    parameters: dict[str, Any]
    root: Path

    def check(self) -> None:
        """Raise a RunError where this run cannot start."""
        raise NotImplementedError

    def check_images(self) -> None:
        """Raise a DataError for a file of images that are too few for this run."""

    def values(self) -> set[str]:
        """What its result is known to hold, written as "arms.z_only.test"; a name that
        ends in a dot stands for all that begins so."""
        return {"seconds"}

    def check_value(self, value: str) -> None:
        """Raise a RunError where the result will have no such value."""
        known = self.values()
        begins = tuple(each for each in known if each.endswith("."))
        if value not in known and not value.startswith(begins):
            near = suggestion(value, {each.rstrip(".") for each in known})
            raise RunError(f"a run of {self.label()} has no value '{value}'{near}")

    def inputs(self) -> str:
        """A sha256 over all that decides the result: code, parameters, images,
        versions.
        """
        raise NotImplementedError

    def measure(self, folder: Path, name: str, **options: Any) -> dict:
        """Run, with files of its own in `folder` that begin with `name`, and return
        what is to be kept, for JSON.
        """
        raise NotImplementedError

    def whole(self, folder: Path, name: str) -> bool:
        """Whether all that a run leaves beside its result is there."""
        return True

    def told(self) -> dict[str, Any]:
        """What a run of this kind is told, with defaults where nothing is said."""
        return self.parameters

    def overrides(self) -> dict[str, Any]:
        """The parameters that make it another run than any of the book's."""
        return {}

    def recorded(self) -> tuple[str, tuple[str, ...]]:
        """The book's result file for such a run, and the values that tell it from
        others in a file.

        Raises:
            RunError: for a run that measures nothing.
        """
        raise RunError(
            "a run of a notebook measures nothing that can be recorded; leave out"
            " --record."
        )

    def record_file(self, place: Path) -> Path:
        """The result file at `place`: itself where it ends in .json, else the book's in
        that folder.

        Raises:
            RunError: for a run that does not belong among the book's, which chapters
                draw together: full, of one set-up's own settings, on one image set.
            ResultError: for a file that is there and holds no runs.
        """
        from minisupernet.course.records import load_runs

        name, _ = self.recorded()
        file = place if place.suffix == ".json" else place / name
        held = load_runs(file) if file.exists() else []
        images = {run["data"]["name"] for run in held if "data" in run}
        if file != place and (reason := self._stranger(images)):
            raise RunError(
                f"{reason} is not recorded in the book's {name}; give it a file of its"
                " own, as in --record mine.json."
            )
        return file

    def _stranger(self, images: Collection[str]) -> str:
        """What makes it none of the book's runs, which are on `images`; empty where
        nothing does.
        """
        told = self.told()
        if told["profile"] != "full":
            return f"a {told['profile']} run"
        if changed := self.overrides():
            return f"a run with its own {' and '.join(changed)}"
        if images and told["data"] not in images:
            return f"a run on {_shown(told['data'])}, not {' or '.join(images)},"
        return ""

    def settings(self) -> dict[str, Any]:
        """What runs and its parameters, without the folders of this machine."""
        return {
            "what": Path(self.what).stem,
            **{name: _shown(value) for name, value in self.parameters.items()},
        }

    def label(self) -> str:
        """A file name that says what runs and with which parameters."""
        what, *parameters = self.settings().items()
        words = [str(what[1]), *(f"{name}={value}" for name, value in parameters)]
        whole = re.sub(r"[^\w.=+-]+", "_", "-".join(words))
        return whole if len(whole) < 180 else f"{whole[:172]}-{short_digest(whole)}"

    def folder(self) -> str:
        """The same for a folder of its own: two files of one name, in two folders, are
        told apart.
        """
        places = [value for value in self.parameters.values() if _is_file(value)]
        if Path(self.what).suffix and Path(self.what).parent != self.root / "notebooks":
            places.append(self.what)
        return "-".join([self.label(), *map(short_digest, places)])


class NotebookJob(Job):
    """A run of the notebook at the path `what`, by papermill."""

    def check(self) -> None:
        """Raise a RunError for a notebook that does not exist or does not take these
        parameters.
        """
        check_parameters(Path(self.what), self.parameters)

    def values(self) -> set[str]:
        """Seconds, in all and of each cell."""
        return {"seconds", "cell_seconds"}

    def inputs(self) -> str:
        """A sha256 over the notebook, the package, the recorded results, the
        parameters, images and versions.
        """
        return notebook_fingerprint(Path(self.what), self.parameters, self.root)

    def whole(self, folder: Path, name: str) -> bool:
        """Whether the notebook that ran is there."""
        return (folder / f"{name}.ipynb").exists()

    def measure(self, folder: Path, name: str, **options: Any) -> dict:
        """Run it to `<name>.ipynb`, options as `execute` takes them, and return the
        seconds of each code cell.
        """
        unfinished = folder / f"{name}.unfinished.ipynb"
        with writing(folder):
            seconds = execute(Path(self.what), unfinished, self.parameters, **options)
            unfinished.replace(folder / f"{name}.ipynb")
        return {"cell_seconds": seconds}


class ExperimentJob(Job):
    """Experiment 1 or 2 of `minisupernet.course.studies.arms`; a parameter may name any
    field of its Setup.
    """

    def label(self) -> str:
        """A file name that says what runs and with which parameters."""
        return f"experiment_{super().label()}"

    def told(self) -> dict[str, Any]:
        """The parameters that are not the Setup's, with their defaults; fold None is
        that of the seed.
        """
        types = {
            "setup": "many_tasks",
            "profile": "full",
            "data": "cifar100",
            "seed": 0,
            "fold": 0,
            "device": "auto",
        }
        given = {
            name: value for name, value in self.parameters.items() if name in types
        }
        _check_types(given, types)
        return {**types, "fold": None, **given}

    def overrides(self) -> dict[str, Any]:
        """The settings that are not the set-up's own."""
        own = self.told()
        return {
            name: value for name, value in self.parameters.items() if name not in own
        }

    def _setup(self) -> Any:
        from minisupernet.course.studies.setups import make_setup

        own = self.told()
        if self.what not in ("1", "2"):
            raise RunError(f"there is no experiment '{self.what}'; use 1 or 2.")
        setup = make_setup(own["setup"], int(self.what), own["profile"])
        for name, value in self.overrides().items():
            setup = override(setup, name, value)
        return setup

    def check(self) -> None:
        """Raise a RunError for an unknown name, a value of another type, or a fold that
        does not exist.
        """
        setup, fold = self._setup(), self.told()["fold"]
        setup.check()
        _check_device(self.told()["device"])
        if fold is not None and not 0 <= fold < setup.folds:
            raise RunError(
                f"experiment {self.what} has no fold {fold}; use 0 to"
                f" {setup.folds - 1}."
            )

    def check_images(self) -> None:
        """Raise a DataError for a file of images that are too few for the chapter."""
        if _is_file(data := self.told()["data"]):
            _check_file(data, int(self.what) + 5)

    def values(self) -> set[str]:
        """Every arm of the set-up, on all images and on few; the trained tasks; the
        geometry and the generator."""
        setup, measures = (
            self._setup(),
            ("rate", "test", "validation", "validation_each"),
        )
        arms = {f"arms.{arm}.{each}" for arm in setup.rates for each in measures}
        arms |= {"arms.no_adaptation.test", "arms.other_z.test"}
        few = {
            f"few.{size}.{arm}.{each}"
            for size in setup.sizes
            for arm in setup.few_rates
            for each in measures
        }
        unfrozen = {"arms.unfrozen.test"} if setup.unfrozen else set()
        trained = {"trained.right_z", "trained.wrong_z"}
        others = {"seconds", "geometry.", "generator.", "parameters.", "tasks."}
        return arms | few | unfrozen | trained | others

    def inputs(self) -> str:
        """A sha256 over the code of the experiments, the parameters, the images and
        versions.
        """
        return package_fingerprint(
            ["course.studies.arms"],
            {"experiment": self.what, **self.told(), **self.parameters},
        )

    def measure(self, folder: Path, name: str, **options: Any) -> dict:
        """Run it, going on from the checkpoint that a killed run left,
        `<name>.safetensors`.
        """
        from minisupernet.course.studies.arms import run_experiment
        from minisupernet.data import load
        from minisupernet.training import pick_device

        own, changed = self.told(), self.overrides()
        device, chapter = pick_device(own["device"]), int(self.what) + 5
        images = load(own["data"], device, chapter)
        checkpoint = folder / f"{name}.safetensors"
        run = run_experiment(
            self._setup(), images, own["seed"], fold=own["fold"], checkpoint=checkpoint
        )
        return run | {"profile": own["profile"], "overrides": changed or None}

    def recorded(self) -> tuple[str, tuple[str, ...]]:
        """The file of chapter 6 or 7, and the values that tell its runs apart."""
        keys = ("experiment", "setup", "profile", "seed", "fold", "overrides", "data")
        return f"{int(self.what) + 5:02d}_experiment_{self.what}.json", keys


class StudyJob(Job):
    """The study with the name `what` of `minisupernet.course.studies`."""

    def told(self) -> dict[str, Any]:
        """The parameters, with defaults; those of its unit among them."""
        from minisupernet.course.studies import STUDIES

        if self.what not in STUDIES:
            raise RunError(
                f"there is no study '{self.what}'{suggestion(self.what, STUDIES)}"
            )
        defaults = {
            "seed": 0,
            "profile": "full",
            "data": STUDIES[self.what].data,
            "device": "auto",
            **STUDIES[self.what].unit,
        }
        _check_types(self.parameters, defaults)
        return {**defaults, **self.parameters}

    def check(self) -> None:
        """Raise a RunError for an unknown study, an unknown name, a value of another
        type, or an unknown profile.
        """
        from minisupernet.course.studies import STUDIES, check_unit

        told = self.told()
        if told["profile"] not in ("quick", "full"):
            raise RunError(
                f"there is no profile '{told['profile']}'; use quick or full."
            )
        _check_device(told["device"])
        check_unit(self.what, {name: told[name] for name in STUDIES[self.what].unit})

    def check_value(self, value: str) -> None:
        """What a study measures is known when the first run of it has ended."""

    def inputs(self) -> str:
        """A sha256 over the code of the study, the parameters, the images and
        versions.
        """
        return package_fingerprint(
            ["course.studies", f"course.studies.{self.what}"],
            {"study": self.what, **self.told()},
        )

    def measure(self, folder: Path, name: str, **options: Any) -> dict:
        """Measure the study, going on from the checkpoint that a killed unit left."""
        from minisupernet.course.studies import measure_study

        checkpoint = folder / f"{name}.safetensors"
        return measure_study(self.what, checkpoint=checkpoint, **self.told())

    def recorded(self) -> tuple[str, tuple[str, ...]]:
        """The study's own file, and the values that tell its runs apart."""
        from minisupernet.course.studies import STUDIES

        study = STUDIES[self.what]
        return study.result, ("profile", "seed", *study.unit, "data")


def short_digest(text: str) -> str:
    """Six letters that tell a text from others."""
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def make_job(settings: Mapping[str, Any], root: Path) -> Job:
    """The checked job that a flat set of settings describes: one of notebook,
    experiment and study, and parameters.

    Raises:
        RunError: for settings that name no run or more than one, and for every
            parameter that cannot be right.
    """
    kinds = {"notebook": NotebookJob, "experiment": ExperimentJob, "study": StudyJob}
    named = [kind for kind in kinds if kind in settings]
    if len(named) != 1:
        raise RunError(
            f"a run needs exactly one of {', '.join(kinds)}, not"
            f" {' and '.join(named) or 'none'}."
        )
    parameters = {
        name: plain(name, value) for name, value in settings.items() if name != named[0]
    }
    if isinstance(parameters.get("data"), str):
        parameters["data"] = _image_set(parameters["data"])
    what = str(plain(named[0], settings[named[0]]))
    if named == ["notebook"]:
        what = str(find_notebook(what, root))
    job = kinds[named[0]](what, parameters, root)
    job.check()
    return job


def _image_set(data: str) -> str:
    """The name of an image set, or the whole path of an .npz file that is there."""
    if data in IMAGE_SETS:
        return data
    path = Path(data).expanduser().resolve()
    if path.suffix != ".npz" or not path.is_file():
        raise RunError(
            f"there are no images '{data}'; use {', '.join(IMAGE_SETS)} or the path of"
            " an .npz file."
        )
    return str(path)


def _check_types(given: Mapping[str, Any], examples: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if name not in examples:
            raise RunError(
                f"there is no parameter '{name}'{suggestion(name, examples)}"
            )
        if type(value) is not type(examples[name]):
            raise RunError(
                f"parameter {name} must be like {examples[name]!r}, not {value!r}."
            )


def _check_device(device: str) -> None:
    """Refuse what names no device anywhere; a cluster's may be others than ours."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
        raise RunError(f"there is no device '{device}'; use auto, cuda, mps or cpu.")


@functools.cache
def _check_file(data: str, chapter: int) -> None:
    from minisupernet.data import load

    load(data, "cpu", chapter)


def _shown(value: Any) -> Any:
    return Path(value).name if _is_file(value) else value


def _is_file(value: Any) -> bool:
    return isinstance(value, str) and value.endswith(".npz")
