"""Every reader of what comes from outside gives a result or one clear error of the
package, whatever it is given.

`make test` runs a few hundred cases, the same each time; `make test-long` more than
10,000 new ones.
"""

import ast
import hashlib
import io
import json
import pickle
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from papermill.translators import PythonTranslator
from safetensors import safe_open
from safetensors.torch import save_file
from support import LONG, ROOT
from torch import nn
from torchvision.datasets import CIFAR100

from minisupernet.course.records import load_runs
from minisupernet.course.runs.jobs import Job, make_job
from minisupernet.course.runs.notebooks import check_parameters
from minisupernet.course.runs.parameters import plain, read_word
from minisupernet.course.runs.summaries import _mean
from minisupernet.course.runs.sweeps import Sweep, read_sweep
from minisupernet.course.runs.workers import finished
from minisupernet.data.cifar import CIFAR_FOLDERS, read_cifar
from minisupernet.data.npz import read_npz
from minisupernet.errors import (
    DataError,
    GeneratorError,
    ResultError,
    RunError,
    TrainingError,
)
from minisupernet.export import load_generator, save
from minisupernet.supernet import SuperNet
from minisupernet.target import WeightSpec
from minisupernet.training import train

QUIET = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("make-test", max_examples=30, derandomize=True, **QUIET)
settings.register_profile("nightly", max_examples=1_200, **QUIET)
PROFILE = settings.get_profile("nightly" if LONG else "make-test")

TEXT = st.text(st.characters(codec=None), max_size=20)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | TEXT
    | st.sampled_from([10**400, -(2**64), 1e308])
)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4)
    ),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@st.composite
def damaged(draw, whole: bytes) -> bytes:
    """A file with bytes changed, put in, or cut off."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, max(len(content) - 1, 0)))
        new = draw(st.binary(max_size=8))
        content[place : place + draw(st.sampled_from([0, 1, len(new), 200]))] = new
    return bytes(content[: draw(st.integers(0, len(content)) | st.just(len(content)))])


def npz(**arrays) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def images(count: int) -> np.ndarray:
    return np.zeros((count, 32, 32, 3), np.uint8)


GOOD_ARRAYS = {
    "train_images": images(2),
    "train_labels": np.array([0, 1]),
    "test_images": images(2),
    "test_labels": np.array([1, 0]),
    "class_names": np.array(["a", "b"]),
}
ARRAYS = st.fixed_dictionaries(
    {},
    optional={
        name: (
            st.just(good)
            | st.just(np.array([{}], dtype=object))  # which savez pickles
            | arrays_of.arrays(
                st.sampled_from(
                    ["u1", "i1", "u8", "i8", "f4", "f8", "c8", "?", "U3", "S2", "M8[s]"]
                ),
                st.sampled_from([(), (0,), (1,), (2,), (2, 2), (0, 32, 32, 3)]),
                fill=st.nothing(),
            )
        )
        for name, good in GOOD_ARRAYS.items()
    },
)


@PROFILE
@given(
    st.binary(max_size=200)
    | damaged(npz(**GOOD_ARRAYS))
    | ARRAYS.map(lambda arrays: npz(**arrays))
)
def test_npz(folder, content):
    path = folder / "images.npz"
    path.write_bytes(content)
    try:
        found = read_npz(path)
    except DataError:
        return
    assert found["train_images"].dtype == np.uint8 and found["train_images"].shape[
        1:
    ] == (32, 32, 3)
    every = set(range(len(found["class_names"])))
    for part in ("train", "test"):
        assert set(found[f"{part}_labels"].astype(np.int64).tolist()) == every


@pytest.fixture(scope="module")
def cifar_folder(folder) -> Path:
    place = folder / CIFAR_FOLDERS["cifar100"]
    place.mkdir()
    batch = {
        "data": images(4).reshape(4, 3072),
        "fine_labels": [0, 1, 2, 3],
        "coarse_labels": [0, 0, 1, 1],
    }
    for name in ("train", "test"):
        (place / name).write_bytes(pickle.dumps(batch))
    names = {"fine_label_names": list("abcd"), "coarse_label_names": ["x", "y"]}
    (place / "meta").write_bytes(pickle.dumps(names))
    return place


@PROFILE
@given(st.sampled_from(["train", "test", "meta"]), st.data())
def test_cifar_files(folder, cifar_folder, name, data):
    """A changed file is refused before anything in it is unpickled."""
    whole = {
        each: (cifar_folder / each).read_bytes() for each in ("train", "test", "meta")
    }
    sums = {
        each: hashlib.md5(content, usedforsecurity=False).hexdigest()
        for each, content in whole.items()
    }
    content = data.draw(damaged(whole[name]) | st.binary(max_size=100))
    assume(content != whole[name])

    def unpickle(read: bytes, **options) -> object:
        assert read != content, "unpickled what was not checked"
        return pickle_loads(read, **options)

    pickle_loads = pickle.loads
    official = {
        "train_list": [["train", sums["train"]]],
        "test_list": [["test", sums["test"]]],
        "meta": {"filename": "meta", "key": "fine_label_names", "md5": sums["meta"]},
    }
    with pytest.MonkeyPatch.context() as patch:
        for key, value in official.items():
            patch.setattr(CIFAR100, key, value)
        patch.setattr(pickle, "loads", unpickle)
        patch.setattr(pickle, "load", lambda file, **kw: unpickle(file.read(), **kw))
        (cifar_folder / name).write_bytes(content)
        try:
            with pytest.raises(DataError, match="its md5 sum is not"):
                read_cifar("cifar100", folder)
        finally:
            (cifar_folder / name).write_bytes(whole[name])
        assert len(read_cifar("cifar100", folder)["train_images"]) == 4


RESULTS = json.dumps(
    {"runs": [{"seed": 0, "arms": {"z_only": {"test": [0.5, 0.75]}}}]}
).encode()


@PROFILE
@given(
    st.binary(max_size=100)
    | damaged(RESULTS)
    | JSON.map(lambda value: json.dumps(value).encode())
)
@example(b"[" * 100_000)
@example(b"9" * 5_000)
@example(b'{"runs": [{}]}')
def test_result_files(folder, content):
    path = folder / "result.json"
    path.write_bytes(content)
    try:
        assert all(isinstance(run, dict) for run in load_runs(path))
    except ResultError as error:
        assert "result.json" in str(error)


DOCUMENT = json.dumps(
    {"status": "done", "inputs": "x", "result": {"held_out": [3], "loss": 0.5}}
).encode()


@PROFILE
@given(
    st.binary(max_size=100)
    | damaged(DOCUMENT)
    | JSON.map(lambda value: json.dumps(value).encode())
)
@example(b"[" * 100_000)
@example(b"9" * 5_000)
def test_results_of_a_sweep(folder, content):
    """Damaged ones do not count as finished."""
    (folder / "one.json").write_bytes(content)
    found = finished(folder, "one", "x")
    assert found is None or (found["status"], found["inputs"]) == ("done", "x")


@PROFILE
@given(
    st.lists(JSON, min_size=1, max_size=3),
    JSON,
    st.sampled_from(["loss", "arms.test", "held_out", ".", "loss.a"]),
)
def test_values_of_a_summary(losses, held_out, value):
    documents = [
        {"result": {"loss": loss, "arms": {"test": loss}, "held_out": held_out}}
        for loss in losses
    ]
    try:
        mean = _mean(documents, value)
    except ResultError:
        return
    assert isinstance(mean, float | int) or mean.low <= mean.mean <= mean.high


SWEEP = (
    b"fixed: {experiment: 1, profile: quick}\ngrid: {seed: [0, 1], z_dim:"
    b" [2]}\nsummary: {values: [a.b], by: seed}\n"
)
YAML_WORDS = st.lists(
    st.sampled_from(
        [
            "fixed",
            "grid",
            "list",
            "summary",
            ": ",
            "- ",
            "{",
            "}",
            "[",
            "]",
            ",",
            "\n",
            "  ",
            "seed",
            "&a ",
            "*a",
            "!!int ",
            "!!python/object:os.system ",
            "!!timestamp ",
            "!!binary ",
            "!!set ",
            "<<: ",
            ".nan",
            "1e-3",
            "0x",
            "2024-99-99",
            "'",
            '"',
            "|",
            "? ",
            "%",
            "@",
            "~",
            "=",
            "---",
            "...",
        ]
    ),
    max_size=30,
).map(lambda words: "".join(words).encode())
ENTRIES = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(["fixed", "grid", "list", "summary"], JSON)
)


@PROFILE
@given(
    st.binary(max_size=100)
    | damaged(SWEEP)
    | YAML_WORDS
    | ENTRIES.map(lambda entries: yaml.safe_dump(entries).encode())
)
@example(b"[" * 5_000)
@example(b"fixed: {seed: " + b"9" * 5_000 + b"}")
@example(b"grid: {a: &a [1, *a]}")
def test_sweep_files(folder, content):
    path = folder / "sweep.yaml"
    path.write_bytes(content)
    try:
        sweep = read_sweep(path)
    except RunError as error:
        assert "\n" not in str(error)
        return
    assert (
        isinstance(sweep, Sweep)
        and sweep.runs
        and sweep.values
        and isinstance(sweep.by, str)
    )


NAMES = (
    st.sampled_from(
        [
            "notebook",
            "experiment",
            "study",
            "seed",
            "profile",
            "data",
            "setup",
            "fold",
            "device",
            "z_dim",
            "hidden",
            "name",
            "training",
            "training.steps",
            "training.tasks.x",
            "rates.z_only",
            "rates",
            "faithful",
            ".",
            "training.",
        ]
    )
    | TEXT
)
VALUES = (
    SCALARS
    | st.lists(SCALARS, max_size=3)
    | st.sampled_from(["1", "5", "pudnet", "05_supernet", "quick", "auto"])
)


@PROFILE
@given(
    st.dictionaries(NAMES, VALUES, max_size=4),
    st.sampled_from([{}, {"experiment": 1}, {"study": "pudnet"}]),
)
def test_settings_of_a_run(chosen, kind):
    try:
        job = make_job(chosen | kind, ROOT)
    except ValueError as error:
        assert type(error).__module__.startswith("minisupernet.")
        return
    assert isinstance(job, Job) and "/" not in job.label() and len(job.label()) < 200


@PROFILE
@given(
    JSON | st.binary() | st.sampled_from([print, object(), (1, 2), {1}, np.float64(1)])
)
@example('"""\nimport os\n')
@example("'; print(1) #")
@example("\\")
def test_parameters_reach_a_notebook_as_data(value):
    """What is let through is, in the cell that papermill writes, one literal equal to
    it.
    """
    try:
        value = plain("text", value)
    except RunError:
        return
    (line,) = ast.parse(PythonTranslator.codify({"text": value})).body
    assert isinstance(line, ast.Assign) and ast.literal_eval(line.value) == value
    assert all(type(plain("word", read_word(word))) for word in ("1", "true"))


NOTEBOOK = nbformat.writes(
    nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell(
                'profile = "quick"\nseed = 0', metadata={"tags": ["parameters"]}
            )
        ],
        metadata={
            "kernelspec": {
                "name": "python3",
                "display_name": "Python 3",
                "language": "python",
            }
        },
    )
).encode()


@PROFILE
@given(
    st.binary(max_size=50) | damaged(NOTEBOOK),
    st.dictionaries(NAMES, VALUES, max_size=2),
)
def test_notebooks_and_their_parameters(folder, content, parameters):
    path = folder / "mine.ipynb"
    path.write_bytes(content)
    try:
        check_parameters(path, parameters)
    except RunError as error:
        assert "\n" not in str(error).replace(repr(content), "")
        return
    assert set(parameters) <= {"profile", "seed"}


def train_from(path: Path) -> list[dict]:
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    return train(
        model,
        optimizer,
        lambda step: model(torch.ones(1, 2)).sum() ** 2,
        4,
        every=2,
        checkpoint=path,
    ).rows


@pytest.fixture(scope="module")
def checkpoint(folder) -> Path:
    train_from(folder / "good.safetensors")
    return folder / "good.safetensors"


TENSORS = st.fixed_dictionaries(
    {},
    optional={
        "state.weight": st.sampled_from(
            [torch.ones(1, 2), torch.ones(3), torch.ones(1, 2, dtype=torch.int8)]
        ),
        "state.bias": st.just(torch.ones(1)),
        "optimizer.0.step": st.sampled_from([torch.tensor(1.0), torch.ones(2)]),
        "optimizer.x.step": st.just(torch.ones(1)),
        "optimizer.9.y": st.just(torch.ones(1)),
        "optimizer.": st.just(torch.ones(1)),
        "random": st.sampled_from(
            [torch.get_rng_state(), torch.ones(3), torch.ones(5, dtype=torch.uint8)]
        ),
    },
)
ROWS = st.lists(
    st.fixed_dictionaries({}, optional={"step": SCALARS, "seconds": SCALARS}),
    max_size=3,
)
NOTES = st.fixed_dictionaries(
    {},
    optional={
        "run": JSON.map(json.dumps) | TEXT.filter(str.isascii),
        "history": (ROWS | JSON).map(json.dumps) | TEXT.filter(str.isascii),
    },
)


@PROFILE
@given(st.data())
def test_checkpoints(folder, checkpoint, data):
    path = folder / "run.safetensors"
    if data.draw(st.booleans()):
        with safe_open(checkpoint, "pt") as file:  # most often of this very run
            notes = {"run": file.metadata()["run"]} | data.draw(NOTES)
        save_file(data.draw(TENSORS), path, notes)
    else:
        path.write_bytes(
            data.draw(damaged(checkpoint.read_bytes()) | st.binary(max_size=50))
        )
    try:
        rows = train_from(path)
    except TrainingError:
        return
    assert rows[-1]["step"] == 4


@pytest.fixture(scope="module")
def generator_file(folder) -> Path:
    target = nn.Linear(3, 2)
    generator = SuperNet(WeightSpec.of(target), 2, hidden=(3,))
    vectors = {"tasks": torch.ones(4, 2)}
    return save(folder / "generator.safetensors", generator, target, vectors)


FIELDS = ("spec", "settings", "class_names", "about", "target", "version")


@PROFILE
@given(st.data())
def test_generators(folder, generator_file, data):
    """Bytes changed, or a note that says something else."""
    path = folder / "changed.safetensors"
    if data.draw(st.booleans()):
        path.write_bytes(data.draw(damaged(generator_file.read_bytes())))
    else:
        with safe_open(generator_file, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            notes = file.metadata()
        name = data.draw(st.sampled_from(FIELDS))
        note = json.loads(notes[name])
        if isinstance(note, dict):
            note |= data.draw(st.dictionaries(st.sampled_from([*note]), JSON))
        elif isinstance(note, list) and note:
            note[0] |= data.draw(st.dictionaries(st.sampled_from([*note[0]]), JSON))
        new = note if data.draw(st.booleans()) else data.draw(JSON)
        notes[name] = json.dumps(new).encode("ascii", "replace").decode()
        save_file(tensors, path, notes)
    try:
        found = load_generator(path)
    except GeneratorError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    assert found.generator.spec.size == 8
    assert sum(w.numel() for w in found.generator(torch.zeros(1, 2)).values()) == 8
