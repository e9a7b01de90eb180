"""Runs of notebooks: checked before they start, repeated exactly when an input changed,
plain about what failed.
"""

import errno
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from support import ROOT

from minisupernet.course import book
from minisupernet.course.book import refresh
from minisupernet.course.commands import main, make_parser, sweep_name
from minisupernet.course.runs import notebooks as runs
from minisupernet.course.runs.jobs import Job, make_job, short_digest
from minisupernet.course.runs.notebooks import (
    check_parameters,
    execute,
    find_notebook,
)
from minisupernet.course.runs.sweeps import run_notebooks
from minisupernet.course.runs.workers import carry_out
from minisupernet.errors import FileError, RunError

KERNEL = {
    "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}
}
PARAMETERS = 'profile = "quick"  # or "full"\ndata = "auto"\nseed = 0'


def write_notebook(path: Path, *sources: str) -> Path:
    """A notebook of a title, the parameters cell (cell 2) and these code cells."""
    cells = [
        new_markdown_cell("# Tiny"),
        new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
    ]
    notebook = new_notebook(
        cells=cells + [new_code_cell(source) for source in sources], metadata=KERNEL
    )
    path.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, path)
    return path


def printed(path: Path) -> str:
    cells = nbformat.read(path, 4).cells
    return "".join(
        output.get("text", "") for cell in cells for output in cell.get("outputs", ())
    )


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A small checkout: one notebook, a package of one file, one recorded result, a
    data folder with one CIFAR file.
    """
    write_notebook(
        tmp_path / "notebooks" / "01_tiny.ipynb", "print(profile, data, seed)"
    )
    files = (
        "minisupernet/idea.py",
        "results/one.json",
        "images/cifar-100-python/train",
        "_config.yml",
        "_toc.yml",
    )
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    monkeypatch.setenv("MINISUPERNET_DATA", str(tmp_path / "images"))
    return tmp_path


@pytest.fixture
def executions(monkeypatch) -> list[dict]:
    """Papermill gives the notebook back instead of running it; the list holds the
    parameters of each call.
    """
    calls = []

    def copy(path, output, parameters, **settings):
        calls.append(parameters)
        notebook = nbformat.read(path, 4)
        for cell in notebook.cells:
            cell.metadata.papermill = {"duration": 0.0}
        return notebook

    monkeypatch.setattr(papermill, "execute_notebook", copy)
    return calls


def run_notebook(
    path: Path, out: Path, parameters: dict, root: Path, **options: int
) -> bool:
    job = make_job({"notebook": str(path), **parameters}, root)
    return carry_out(job, out, path.stem, job.inputs(), **options)


def run_tiny(root: Path, **parameters) -> bool:
    path = root / "notebooks" / "01_tiny.ipynb"
    return run_notebook(path, root / "out", parameters, root)


def edit_notebook(root: Path) -> None:
    write_notebook(root / "notebooks" / "01_tiny.ipynb", "print(seed + 1)")


def edit_package(root: Path) -> None:
    (root / "minisupernet" / "idea.py").write_text("idea = 2")


def add_module(root: Path) -> None:
    (root / "minisupernet" / "other.py").write_text("{}")


def edit_results(root: Path) -> None:
    (root / "results" / "one.json").write_text("[]")


def edit_images(root: Path) -> None:
    (root / "images" / "cifar-100-python" / "train").write_text("other images")


def remove_output(root: Path) -> None:
    (root / "out" / "01_tiny.ipynb").unlink()


def test_a_run_passes_the_parameters_and_is_not_repeated(checkout):
    assert run_tiny(checkout, seed=7, profile="full") is True
    assert printed(checkout / "out" / "01_tiny.ipynb") == "full auto 7\n"
    assert run_tiny(checkout, seed=7, profile="full") is False
    assert not list((checkout / "out").glob("*unfinished*"))


CHANGES = [
    edit_notebook,
    edit_package,
    add_module,
    edit_results,
    edit_images,
    remove_output,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_input_runs_again_once(checkout, executions, change):
    assert [run_tiny(checkout, seed=1), run_tiny(checkout, seed=1)] == [True, False]
    change(checkout)
    assert [run_tiny(checkout, seed=1), run_tiny(checkout, seed=1)] == [True, False]
    assert executions == [{"seed": 1}, {"seed": 1}]


def test_a_changed_parameter_runs_again(checkout, executions):
    assert [
        run_tiny(checkout, seed=1),
        run_tiny(checkout, seed=2),
        run_tiny(checkout, seed=2),
    ] == [True, True, False]


def test_images_that_the_run_does_not_read_do_not_count(checkout, executions):
    assert run_tiny(checkout, data="shapes100") is True
    edit_images(checkout)
    assert run_tiny(checkout, data="shapes100") is False


def test_an_npz_counts_by_its_content_on_disk(checkout, executions):
    path = checkout / "mine.npz"
    path.write_text("one")
    assert [run_tiny(checkout, data=str(path)), run_tiny(checkout, data=str(path))] == [
        True,
        False,
    ]
    path.write_text("three")
    assert run_tiny(checkout, data=str(path)) is True


def test_stored_outputs_are_no_input(checkout, executions):
    path = checkout / "notebooks" / "01_tiny.ipynb"
    run_tiny(checkout)
    notebook = nbformat.read(path, 4)
    notebook.cells[2].outputs = [nbformat.v4.new_output("stream", text="stored\n")]
    nbformat.write(notebook, path)
    assert run_tiny(checkout) is False


def test_the_kernel_gets_its_environment_and_ours_stays(checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    monkeypatch.setenv("MINISUPERNET_DATA", "images")
    names = ["TQDM_DISABLE", "OMP_NUM_THREADS", "MINISUPERNET_DATA"]
    path = write_notebook(
        checkout / "notebooks" / "02_env.ipynb",
        f"import os\nprint(*map(os.environ.get, {names}))",
    )
    before = dict(os.environ)
    run_notebook(path, checkout / "out", {}, checkout, threads=3)
    assert printed(checkout / "out" / "02_env.ipynb") == f"1 3 {checkout / 'images'}\n"
    assert dict(os.environ) == before


def test_a_failing_cell_is_named_and_the_old_output_is_kept_apart(checkout):
    run_tiny(checkout)
    good = (checkout / "out" / "01_tiny.ipynb").read_bytes()
    write_notebook(
        checkout / "notebooks" / "01_tiny.ipynb",
        "print('so far')",
        "raise ValueError('too big\\nby far')",
    )
    with pytest.raises(RunError) as failure:
        run_tiny(checkout, seed=1)
    assert (
        str(failure.value)
        == "01_tiny, In [4] `raise ValueError('too big\\nby far')`: ValueError: too big"
    )
    assert printed(checkout / "out" / "01_tiny.unfinished.ipynb") == "so far\n"
    assert (checkout / "out" / "01_tiny.ipynb").read_bytes() == good
    with pytest.raises(RunError):  # and it is tried again, not taken for unchanged
        run_tiny(checkout, seed=1)


def test_a_cell_that_takes_too_long_is_stopped_and_named(checkout, monkeypatch):
    monkeypatch.setitem(runs.CELL_SECONDS, "quick", 1)
    path = write_notebook(
        checkout / "notebooks" / "02_slow.ipynb", "import time; time.sleep(60)", "1"
    )
    with pytest.raises(
        RunError,
        match=r"02_slow, In \[2\] `import time; time.sleep\(60\)`: CellTimeoutError: ",
    ):
        run_notebook(path, checkout / "out", {}, checkout)


def test_a_dead_kernel_is_named(checkout):
    path = write_notebook(
        checkout / "notebooks" / "02_dead.ipynb", "import os; os._exit(1)"
    )
    with pytest.raises(
        RunError,
        match=r"02_dead, In \[3\] `import os; os._exit\(1\)`: DeadKernelError: ",
    ):
        run_notebook(path, checkout / "out", {"seed": 1}, checkout)


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"sed": 1}, "01_tiny has no parameter 'sed'; did you mean 'seed'?"),
        (
            {"profil": "full"},
            "01_tiny has no parameter 'profil'; did you mean 'profile'?",
        ),
        ({"profile": "false"}, "there is no profile 'false'; use quick or full."),
        (
            {"profile": False},
            (
                "parameter profile of 01_tiny must be of type str, as 'quick' is, not"
                " False."
            ),
        ),
        (
            {"seed": "1"},
            "parameter seed of 01_tiny must be of type int, as 0 is, not '1'.",
        ),
        (
            {"seed": True},
            "parameter seed of 01_tiny must be of type int, as 0 is, not True.",
        ),
        (
            {"seed": None},
            (
                "parameter seed must be text, a finite number, true or false, or a list"
                " of these."
            ),
        ),
        *(
            (
                {"seed": seed},
                "parameter seed must be a whole number from 0 to 2147483647.",
            )
            for seed in (-1, 2**31, 2**70, -(2**70))
        ),
        (
            {"data": 2**70},
            "parameter data must be a whole number from -9223372036854775807 to"
            " 9223372036854775807.",
        ),
        (
            {"seed": float("nan")},
            (
                "parameter seed must be text, a finite number, true or false, or a list"
                " of these."
            ),
        ),
        (
            {"data": {"a": 1}},
            (
                "parameter data must be text, a finite number, true or false, or a list"
                " of these."
            ),
        ),
        (
            {"seed = 1; x": 1},
            "01_tiny has no parameter 'seed = 1; x'; did you mean 'seed'?",
        ),
    ],
)
def test_wrong_parameters_are_refused_before_anything_runs(
    checkout, executions, parameters, sentence
):
    with pytest.raises(RunError) as refusal:
        run_tiny(checkout, **parameters)
    assert str(refusal.value) == sentence
    assert executions == [] and not (checkout / "out").exists()


def test_a_notebook_without_a_kernelspec_and_with_a_hash_in_a_string_runs(tmp_path):
    cell = new_code_cell("colour = '#ff0000'\nlr = 0.1")
    cell.metadata.tags = ["parameters"]
    notebook = new_notebook(cells=[cell, new_code_cell("print(colour, lr)")])
    nbformat.write(notebook, tmp_path / "bare.ipynb")
    words = [
        "-m",
        "minisupernet",
        "run",
        "bare.ipynb",
        "-p",
        "lr",
        "0.5",
        "--out",
        "out",
    ]
    told = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, **told
    )
    assert printed(tmp_path / "out" / "bare.ipynb") == "#ff0000 0.5\n"
    assert done.stderr.startswith("0 of 3 cells") and "\r" not in done.stderr


def test_two_files_of_one_name_get_two_folders(checkout):
    labels = []
    for place in ("one", "two", "one"):
        (checkout / place).mkdir(exist_ok=True)
        (checkout / place / "mine.npz").write_text("images")
        data = str(checkout / place / "mine.npz")
        labels.append(make_job({"notebook": 1, "data": data}, checkout).folder())
    assert labels[0] == labels[2] != labels[1]
    assert labels[0].startswith("01_tiny-data=mine.npz-")
    own = write_notebook(checkout / "elsewhere" / "01_tiny.ipynb", "1")
    ours = make_job({"notebook": 1}, checkout).folder()
    assert ours == "01_tiny" != make_job({"notebook": str(own)}, checkout).folder()


def test_a_label_that_would_be_too_long_is_cut_and_told_apart(checkout):
    words = [{"notebook": 1, "data": f"{'x' * 400}{n}.npz"} for n in range(2)]
    labels = [Job("01_tiny", each, checkout).label() for each in words]
    assert len(set(labels)) == 2 and all(len(label) < 180 for label in labels)


def test_two_sweeps_of_one_name_get_two_folders(tmp_path):
    assert sweep_name(ROOT / "sweeps" / "try.yaml") == "try"
    names = {sweep_name(tmp_path / place / "try.yaml") for place in ("one", "two")}
    assert len(names) == 2 and all(name.startswith("try-") for name in names)


def test_a_missing_notebook_is_one_sentence(tmp_path):
    with pytest.raises(
        RunError, match="there is no notebook .*nothing.ipynb; check the path"
    ):
        check_parameters(tmp_path / "nothing.ipynb", {})


def test_a_file_that_is_no_notebook_is_one_sentence(tmp_path):
    (tmp_path / "broken.ipynb").write_text("{")
    with pytest.raises(RunError, match="broken.ipynb is no notebook; restore it"):
        check_parameters(tmp_path / "broken.ipynb", {})


@pytest.mark.parametrize(
    ("cells", "language", "said"),
    [
        (["seed = 0"], "R", "is a notebook in R; only Python runs here"),
        (["seed = 0", "seed = 1"], "python", "has 2 cells with the tag 'parameters'"),
        (
            ["seed = print()"],
            "python",
            "must hold lines such as `seed = 0` and nothing",
        ),
        (["import os"], "python", "must hold lines such as `seed = 0` and nothing"),
        (["seed = ("], "python", "must hold lines such as `seed = 0` and nothing"),
        ([], "python", "mine has no parameter 'seed'"),
    ],
)
def test_a_notebook_that_cannot_take_parameters_says_why(
    tmp_path, cells, language, said
):
    tagged = {"tags": ["parameters"]}
    notebook = new_notebook(cells=[new_code_cell(c, metadata=tagged) for c in cells])
    notebook.metadata = {"kernelspec": {"name": "any", "language": language}}
    nbformat.write(notebook, tmp_path / "mine.ipynb")
    with pytest.raises(RunError, match=re.escape(said)):
        check_parameters(tmp_path / "mine.ipynb", {"seed": 1})


def test_numbers_are_taken_as_python_takes_them(tmp_path):
    source = "rate: float = 0.1\nshift = -1\n"
    cell = new_code_cell(source, metadata={"tags": ["parameters"]})
    nbformat.write(new_notebook(cells=[cell]), tmp_path / "mine.ipynb")
    check_parameters(tmp_path / "mine.ipynb", {"rate": 1, "shift": 3})
    with pytest.raises(RunError, match="shift of mine must be of type int, as -1 is"):
        check_parameters(tmp_path / "mine.ipynb", {"shift": 0.5})


def test_no_parameter_becomes_code(tmp_path):
    """What would end a string, or a line, arrives as it was."""
    words = [
        '"; print(1) #',
        "'",
        '"""',
        "line\nbreak",
        "\\",
        "{profile}",
        "\u2028",
        "${HOME}",
        "%time",
        "!ls",
        "é",
    ]
    path = write_notebook(
        tmp_path / "01_words.ipynb", "import json\nprint(json.dumps([data, words]))"
    )
    notebook = nbformat.read(path, 4)
    notebook.cells[1].source += '\nwords = ["one"]'
    nbformat.write(notebook, path)
    parameters = {"data": "".join(words), "words": words}
    check_parameters(path, parameters)
    seconds = execute(path, tmp_path / "out.ipynb", parameters)
    assert json.loads(printed(tmp_path / "out.ipynb")) == ["".join(words), words]
    assert len(seconds) == 3 and all(
        each >= 0 for each in seconds
    )  # parameters, injected parameters, print


@pytest.mark.parametrize("name", ["1", "01", 1, "tiny", "01_tiny"])
def test_a_notebook_is_found_by_number_and_name(checkout, name):
    path = checkout / "notebooks" / "01_tiny.ipynb"
    assert (
        find_notebook(name, checkout)
        == find_notebook(str(path), Path("elsewhere"))
        == path
    )
    with pytest.raises(
        RunError, match="there is no notebook 'big'; give a path or one of 01_tiny"
    ):
        find_notebook("big", checkout)


def test_the_run_command_leaves_a_notebook_and_a_result(checkout, monkeypatch, capsys):
    monkeypatch.setattr("minisupernet.course.commands.CHECKOUT", checkout)
    command = ["run", "1", "-p", "profile", "full", "-p", "seed", "3"]
    assert main(command) == 0
    folder = checkout / "_build" / "runs" / "01_tiny-profile=full-seed=3"
    assert printed(folder / "01_tiny.ipynb") == "full auto 3\n"
    found = json.loads((folder / "01_tiny.json").read_text())
    assert found["status"] == "done" and found["run"] == {
        "what": "01_tiny",
        "profile": "full",
        "seed": 3,
    }
    assert len(found["result"]["cell_seconds"]) == 3 and found["seconds"] >= sum(
        found["result"]["cell_seconds"]
    )
    assert found["versions"]["torch"] and len(found["inputs"]) == 64
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        f"01_tiny runs in {folder}",
        f"{folder}/01_tiny.ipynb: done",
    ]
    lines = said.err.splitlines()  # off a terminal there is no bar
    assert lines[0].startswith("0 of 4 cells") and lines[-1].startswith("4 of 4 cells")
    assert "\r" not in said.err
    assert (
        main(command) == 0
        and "already done with the same inputs" in capsys.readouterr().out
    )


def test_the_run_command_keeps_a_failure_and_tells_nothing_of_the_machine(
    checkout, monkeypatch, capsys
):
    monkeypatch.setattr("minisupernet.course.commands.CHECKOUT", checkout)
    write_notebook(
        checkout / "notebooks" / "02_lost.ipynb",
        "from pathlib import Path; open(Path.home() / 'a' / 'b')",
    )
    monkeypatch.chdir(checkout)
    assert main(["run", "2", "--out", "mine"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(
        "02_lost, In [2] `from pathlib import Path; open(Path.home() / 'a' / 'b')`"
    )
    text = (checkout / "mine" / "02_lost.json").read_text()
    found = json.loads(text)
    assert found["status"] == "failed" and found["error"].startswith(
        "02_lost, In [2] `from pathlib import Path; open(Path.home() / 'a' / 'b')`"
    )
    assert str(Path.home()) not in text and str(checkout) not in text


def test_the_run_command_stops_a_cell_that_takes_too_long(
    checkout, monkeypatch, capsys
):
    monkeypatch.setattr("minisupernet.course.commands.CHECKOUT", checkout)
    write_notebook(
        checkout / "notebooks" / "02_slow.ipynb", "import time; time.sleep(60)", "1"
    )
    assert main(["run", "slow", "--timeout", "1"]) == 1
    assert (
        capsys.readouterr()
        .err.strip()
        .splitlines()[-1]
        .startswith("02_slow, In [2] `import time; time.sleep(60)`: CellTimeoutError: ")
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("run 1 --timeout 0", "argument --timeout: 0 is no time in seconds"),
        ("run 1 --timeout nan", "argument --timeout: nan is no time in seconds"),
        ("sweep try.yaml --threads 0", "argument --threads: 0 is less than 1"),
        ("sweep try.yaml --retries -1", "argument --retries: -1 is less than 0"),
    ],
)
def test_a_number_out_of_its_range_is_refused_by_its_option(words, said, capsys):
    with pytest.raises(SystemExit):
        main(words.split())
    assert capsys.readouterr().err.endswith(f"{said}\n")


def test_the_run_command_refuses_before_anything_runs(
    checkout, monkeypatch, executions, capsys
):
    monkeypatch.setattr("minisupernet.course.commands.CHECKOUT", checkout)
    assert main(["run", "1", "-p", "seed", "1", "-p", "seed", "2"]) == 1
    twice = "parameter seed is given twice; leave one out.\n"
    assert capsys.readouterr().err == twice
    assert main(["run", "1", "-p", "quick", "false"]) == 1
    assert (
        capsys.readouterr().err
        == "01_tiny has no parameter 'quick'; did you mean 'profile'?\n"
    )
    notebook = nbformat.read(checkout / "notebooks" / "01_tiny.ipynb", 4)
    notebook.cells[1].source += "\nquick = True"
    nbformat.write(notebook, checkout / "notebooks" / "01_tiny.ipynb")
    assert main(["run", "1", "-p", "quick", "false"]) == 1
    said = (
        "parameter quick of 01_tiny must be of type bool, as True is, not 'false'; did"
        " you mean False?\n"
    )
    assert capsys.readouterr().err == said
    assert executions == [] and not (checkout / "_build").exists()


def test_a_full_disk_is_one_sentence_and_leaves_no_output(checkout, monkeypatch):
    def full(*arguments, **settings):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(papermill, "execute_notebook", full)
    with pytest.raises(
        FileError, match="cannot write .*out: No space left on device; free space or"
    ):
        run_tiny(checkout)
    assert not list((checkout / "out").glob("*.ipynb"))
    assert not list((checkout / "out").glob(".*.part"))


def test_a_folder_that_cannot_be_made_is_one_sentence(checkout, executions):
    (checkout / "out").write_text("a file where the folder should be")
    with pytest.raises(
        FileError, match="cannot write .*out: .*make the folder writable"
    ):
        run_tiny(checkout)


def test_the_others_run_and_names_every_failure(checkout, capfd):
    for name in ("02_bad", "03_bad"):
        write_notebook(checkout / "notebooks" / f"{name}.ipynb", "1 / 0")
    paths = sorted((checkout / "notebooks").glob("*.ipynb"))
    with pytest.raises(RunError) as failure:
        run_notebooks(paths, checkout / "out", {"seed": 5}, checkout)
    assert str(failure.value).splitlines() == [
        f"0{n}_bad, In [3] `1 / 0`: ZeroDivisionError: division by zero" for n in (2, 3)
    ]
    assert printed(checkout / "out" / "01_tiny.ipynb") == "quick auto 5\n"
    assert "] 01_tiny: done" in capfd.readouterr().out


def test_refresh_stores_outputs_and_notes_and_changes_nothing_else(checkout):
    path = checkout / "notebooks" / "01_tiny.ipynb"
    before = nbformat.read(path, 4)
    left = nbformat.read(path, 4)  # as after a run of papermill in place
    for holder in (left, *left.cells):
        holder.metadata |= {
            "papermill": {"input_path": "/home/me/01_tiny.ipynb"},
            "execution": {},
        }
    nbformat.write(left, path)
    refresh(checkout)
    after = json.loads(path.read_text())
    assert printed(path) == "quick auto 0\n"
    assert [cell.get("execution_count") for cell in after["cells"]] == [None, 1, 2]
    for cell, old in zip(after["cells"], before.cells, strict=True):
        assert ("".join(cell["source"]), cell["metadata"]) == (old.source, old.metadata)
    notes = after["metadata"].pop("minisupernet")
    assert after["metadata"] == before.metadata
    assert (
        notes["seconds"] > 0 and notes["profile"] == "quick" and notes["data"] == "auto"
    )
    assert (
        notes["versions"]["torch"]
        and "cores: " in notes["device"]
        and str(Path.home()) not in str(notes)
    )


def test_refresh_runs_only_the_notebooks_that_are_named(checkout):
    other = checkout / "notebooks" / "02_other.ipynb"
    write_notebook(other, "1 / 0")
    before = other.read_bytes()
    refresh(checkout, ["1"])
    assert printed(checkout / "notebooks" / "01_tiny.ipynb") == "quick auto 0\n"
    assert other.read_bytes() == before


def test_what_a_run_notes_is_no_input(checkout):
    refresh(checkout)
    assert run_tiny(checkout) is True
    first = json.loads((checkout / "notebooks" / "01_tiny.ipynb").read_text())
    first["metadata"]["minisupernet"]["seconds"] += 1
    (checkout / "notebooks" / "01_tiny.ipynb").write_text(json.dumps(first))
    assert run_tiny(checkout) is False
    first["metadata"]["kernelspec"]["display_name"] = "another"
    (checkout / "notebooks" / "01_tiny.ipynb").write_text(json.dumps(first))
    assert run_tiny(checkout) is True


def test_the_book_is_assembled_from_the_runs_and_nothing_old_stays(
    checkout, executions, monkeypatch
):
    (checkout / "book").mkdir()
    (checkout / "book" / "intro.md").write_text("# Intro")
    monkeypatch.chdir(checkout)
    place = f"quick-mine-{short_digest(str(checkout / 'mine.npz'))}"
    old = checkout / "_build" / place / "source" / "old.md"
    old.parent.mkdir(parents=True)
    old.write_text("old")
    monkeypatch.setattr(
        book,
        "run_notebooks",
        lambda paths, *rest: [run_notebook(path, *rest) for path in paths],
    )
    monkeypatch.setattr(book, "build_html", lambda source, target: source)
    (checkout / "mine.npz").write_text("images")
    source = book.make_book(checkout, data="mine.npz", seed=4)
    files = sorted(
        path.relative_to(source).as_posix()
        for path in source.rglob("*")
        if path.is_file()
    )
    assert files == [
        "_config.yml",
        "_toc.yml",
        "book/intro.md",
        "book/status.md",
        "notebooks/01_tiny.ipynb",
    ]
    assert (
        "| [](../notebooks/01_tiny.ipynb) |"
        in (source / "book" / "status.md").read_text()
    )
    assert source == old.parent
    assert executions == [
        {"profile": "quick", "data": str(checkout / "mine.npz"), "seed": 4}
    ]


def test_a_book_with_a_warning_is_refused_and_the_last_good_one_stays(tmp_path, capfd):
    source, html = tmp_path / "source", tmp_path / "html"
    for folder in (source, html):
        folder.mkdir()
    (html / "index.html").write_text("the last good one")
    (source / "_toc.yml").write_text("format: jb-book\nroot: intro\n")
    (source / "_config.yml").write_text(
        'title: Tiny\nexecute: {execute_notebooks: "off"}\n'
    )
    (source / "intro.md").write_text("# Intro\n\n[nowhere](missing.md)\n")
    with pytest.raises(RunError, match="the book was not built"):
        book.build_html(source, html)
    assert (html / "index.html").read_text() == "the last good one"
    assert "missing.md" in capfd.readouterr().err


def test_the_command_line_prints_one_line_and_no_traceback(
    checkout, monkeypatch, capfd
):
    write_notebook(checkout / "notebooks" / "02_other.ipynb", "1 / 0")
    monkeypatch.setattr("minisupernet.course.commands.CHECKOUT", checkout)
    assert main(["book", "--profile", "ful"]) == 1
    assert capfd.readouterr().err == "there is no profile 'ful'; use quick or full.\n"


def test_the_command_line_outside_a_checkout(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("minisupernet.course.commands.CHECKOUT", tmp_path)
    assert main(["notebooks"]) == 1
    assert capsys.readouterr().err.endswith("run this in a clone of the repository.\n")


def test_the_page_of_commands_says_all_that_a_command_can_be_told():
    place = ROOT / "book" / "_ext" / "commandline.py"
    spec = importlib.util.spec_from_file_location("commandline", place)
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    page = extension.markdown(make_parser())
    (commands,) = (each for each in make_parser()._actions if each.choices)
    sections = dict(re.findall(r"## `(\w+)`\n(.*?)(?=\n## |\Z)", page, re.DOTALL))
    assert list(sections) == list(commands.choices)
    for name, command in commands.choices.items():
        told = {
            option.split()[0]
            for option in re.findall("^\\| `(.*?)`", sections[name], re.M)
        }
        known = [each for each in command._actions if each.dest != "help"]
        assert told == {
            each.option_strings[0] if each.option_strings else each.dest.upper()
            for each in known
        }
        assert all(each.help for each in known) and len(command.description) > 40
    assert "\\<notebook and parameters>" in page  # no tag of HTML
    assert "file: book/commands" in (ROOT / "_toc.yml").read_text()


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    def fault(options):
        raise KeyError("a bug")

    monkeypatch.setattr("minisupernet.course.commands.run_data", fault)
    with pytest.raises(KeyError):
        main(["data"])


def test_make_refuses_an_old_python(tmp_path):
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python3.10"
    python.write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -c "import sys; sys.version_info = (3, 10,'
        ' 0)\n$2"\n'
    )
    python.chmod(0o755)
    done = subprocess.run(
        ["make", "html", f"PYTHON={python}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert (
        done.returncode
        and "This course needs Python 3.11 or later, not 3.10" in done.stderr
    )
    assert not (tmp_path / ".venv").exists()
