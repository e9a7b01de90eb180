"""What every notebook of the course keeps to, and proof that its stored outputs are
really compared.
"""

import ast
import copy
import getpass
import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook, new_output
from support import NOTEBOOKS, ROOT

from minisupernet.course.runs.notebooks import stand_in_folder
from minisupernet.course.runs.outputs import keep_outputs

PARAMETERS = {"profile": "quick", "data": "auto", "seed": 0}
NOT_COMPARED = {"nbval-ignore-output", "nbval-skip"}
KERNEL = {
    "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}
}
MYST = re.compile(
    r"^\s*(`{3,}|:{3,})\{|(?<!`)\{[a-zA-Z][\w:.+-]*\}`[^`\s]", re.MULTILINE
)  # a directive, a role
EQUATION = re.compile(r"\\tag\{([\d.]+)\}\n\$\$")  # the number of a displayed equation
REFERENCE = re.compile(r"(?<!\w)\((\d\.\d)\)")  # and a sentence that names it
MACHINE = re.compile(
    r"(?<![\w.])/(home|root|Users|tmp|usr|var|opt|work)/\w|\b[A-Z]:\\\\\w|site-packages"
)  # in JSON

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> NotebookNode:
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    return notebook


def tags(cell: NotebookNode) -> set[str]:
    return set(cell.metadata.get("tags", ()))


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def is_compared(cell: NotebookNode) -> bool:
    return not tags(cell) & NOT_COMPARED


def printed(cell: NotebookNode) -> str:
    """The text that nbval compares."""
    texts = [
        output.get("text") or output.get("data", {}).get("text/plain", "")
        for output in cell.outputs
    ]
    return "".join(texts)


def definitions(source: str) -> dict[str, str]:
    """Name to syntax, without docstrings, of the top-level functions and classes."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            for inner in ast.walk(node):
                if (
                    isinstance(inner, ast.FunctionDef | ast.ClassDef)
                    and ast.get_docstring(inner) is not None
                ):
                    inner.body = inner.body[1:]
            found[node.name] = ast.dump(node)
    return found


def is_titled(cell: NotebookNode) -> bool:
    """Whether the cell is a solution or a mistake, which fold wherever they are
    read."""
    return "hide-cell" in tags(cell) or cell.source.startswith("# @title")


def only_imports(cell: NotebookNode) -> bool:
    lines = ast.parse(cell.source).body
    return all(isinstance(line, ast.Import | ast.ImportFrom) for line in lines)


def test_the_book_has_exactly_these_notebooks():
    listed = re.findall(r"file: notebooks/(\w+)", (ROOT / "_toc.yml").read_text())
    assert NOTEBOOKS and sorted(listed) == [path.stem for path in NOTEBOOKS]


@each_notebook
def test_one_cell_of_parameters(path):
    notebook = read(path)
    assert notebook.metadata.kernelspec.name == "python3"
    (cell,) = (cell for cell in notebook.cells if "parameters" in tags(cell))
    values = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(cell.source).body
    }
    assert values == PARAMETERS


@each_notebook
def test_a_chapter_opens_with_its_story(path):
    install, parameters, *others = code_cells(read(path))
    assert "pip" in install.source and "parameters" in tags(parameters)
    assert "remove-cell" in tags(install) & tags(parameters)
    assert not [cell for cell in others if "remove-cell" in tags(cell)]
    imports = [cell for cell in others if only_imports(cell)]
    assert imports[0] is others[0]
    for cell in imports:
        assert "hide-input" in tags(cell)
        assert cell.metadata.mystnb.code_prompt_show == "Show the imports"


@each_notebook
def test_what_is_printed_in_a_row_is_one_output(path):
    for cell in code_cells(read(path)):
        names = [output.get("name") for output in cell.outputs]
        pieces = [
            first for first, second in pairwise(names) if first and first == second
        ]
        assert not pieces, f"stored in pieces: {cell.source[:60]}"


def test_what_is_kept_of_a_run_is_whole_lines_and_no_parameters():
    injected = new_code_cell("seed = 3", metadata={"tags": ["injected-parameters"]})
    names = ("stdout", "stdout", "stderr", "stdout")
    outputs = [new_output("stream", name=name, text=f"{name}\n") for name in names]
    notebook = new_notebook(cells=[injected, new_code_cell("work()", outputs=outputs)])
    keep_outputs(notebook)
    assert tags(notebook.cells[0]) == {"injected-parameters", "remove-cell"}
    assert [output.text for output in notebook.cells[1].outputs] == [
        "stdout\nstdout\n",
        "stderr\n",
        "stdout\n",
    ]


@each_notebook
def test_outputs_are_stored_and_there_is_something_to_compare(path):
    cells = [cell for cell in code_cells(read(path)) if cell.source.strip()]
    counts = [cell.execution_count for cell in cells if "nbval-skip" not in tags(cell)]
    assert None not in counts and counts == sorted(counts), (
        "run `make notebooks`: not all cells ran, or not in order"
    )
    assert not [
        output.evalue
        for cell in cells
        for output in cell.outputs
        if output.output_type == "error"
    ]
    compared = [cell for cell in cells if is_compared(cell)]
    silent = [
        cell
        for cell in compared
        if re.search(r"^print\(", cell.source, re.MULTILINE) and not printed(cell)
    ]
    assert not silent, "run `make notebooks`: these cells print and nothing is stored"
    assert sum(bool(printed(cell).strip()) for cell in compared) >= 5, (
        "too little for nbval to compare"
    )


@each_notebook
def test_outputs_are_small_and_tell_nothing_of_the_machine(path):
    assert path.stat().st_size < 400_000
    for cell in code_cells(read(path)):
        stored = json.dumps(list(cell.outputs), ensure_ascii=False)
        assert "image/svg+xml" not in stored
        text = re.sub(
            r'"image/png": "[^"]*"|data:image/webp;base64,[^"\\]*', "", stored
        )
        assert not MACHINE.search(text), (
            f"{MACHINE.search(text)} in an output of: {cell.source[:60]}"
        )
        if (user := getpass.getuser()) != "root":
            assert not re.search(rf"\b{re.escape(user)}\b", text)


@each_notebook
def test_every_figure_is_described(path):
    for cell in code_cells(read(path)):
        if any("image/png" in output.get("data", {}) for output in cell.outputs):
            description = (
                cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
            )
            assert len(description) >= 30, f"no mystnb.image.alt on: {cell.source[:60]}"
        for output in cell.outputs:
            for alt in re.findall(
                r'<img [^>]*?alt="([^"]*)"', output.get("data", {}).get("text/html", "")
            ):
                assert len(alt) >= 30, (
                    f"no description of what is to be seen in: {cell.source[:60]}"
                )


@each_notebook
def test_markdown_is_plain(path):
    for cell in read(path).cells:
        if cell.cell_type == "markdown":
            found = MYST.search(cell.source)
            assert not found, f"{found.group()} shows as raw text in JupyterLab"


def test_equations_have_numbers_of_their_own_and_every_number_is_referred_to():
    texts = {
        int(path.stem[:2]): "\n\n".join(
            cell.source for cell in read(path).cells if cell.cell_type == "markdown"
        )
        for path in NOTEBOOKS
    }
    numbers = [number for text in texts.values() for number in EQUATION.findall(text)]
    for chapter, text in texts.items():
        assert EQUATION.findall(text) == [
            f"{chapter}.{k}" for k in range(1, len(EQUATION.findall(text)) + 1)
        ]
    assert numbers and set(REFERENCE.findall("\n\n".join(texts.values()))) == set(
        numbers
    )


@each_notebook
def test_the_code_shown_is_the_code_of_the_package(path):
    cells = [cell for cell in code_cells(read(path)) if "package-code" in tags(cell)]
    assert cells or path.stem[:2] in (
        "01",
        "11",
    ), "a chapter shows the code of its idea in a cell tagged package-code"
    for cell in cells:
        module = re.match(r"# from minisupernet/([\w/]+)\.py\n", cell.source)
        assert module, (
            "the first line must be '# from minisupernet/<module>.py':"
            f" {cell.source[:60]}"
        )
        package = definitions(
            (ROOT / "minisupernet" / f"{module[1]}.py").read_text(encoding="utf-8")
        )
        shown = definitions(cell.source)
        assert shown, f"nothing is defined in {cell.source[:60]}"
        different = [
            name for name, syntax in shown.items() if package.get(name) != syntax
        ]
        assert not different, f"not as in minisupernet/{module[1]}.py: {different}"


@each_notebook
def test_solutions_and_mistakes_fold_everywhere(path):
    shown_as = {
        "# @title Solution": "Show the solution",
        "# @title A typical mistake": "Show a typical mistake",
        "# @title What is checked": "Show what is checked",
    }
    for cell in filter(is_titled, code_cells(read(path))):
        assert "hide-cell" in tags(cell)  # the book, which says what it hides
        assert (
            cell.metadata.mystnb.code_prompt_show
            == shown_as[cell.source.splitlines()[0]]
        )
        assert cell.metadata.jupyter.source_hidden is True  # JupyterLab
        assert cell.metadata.cellView == "form"  # Colab


def tiny_notebook() -> NotebookNode:
    parameters = new_code_cell(
        'profile = "quick"', metadata={"tags": ["parameters"]}, execution_count=1
    )
    outputs = [new_output("stream", text="5 weights, quick\n")]
    work = new_code_cell(
        'print(f"{2 + 3} weights, {profile}")', execution_count=2, outputs=outputs
    )
    return new_notebook(cells=[parameters, work], metadata=KERNEL)


def compare(folder: Path) -> str:
    """The report of `pytest --nbval` over the notebooks in this folder."""
    settings = {"MINISUPERNET_DATA": str(stand_in_folder(ROOT)), "TQDM_DISABLE": "1"}
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env"]
    command += ["-p", "no:cacheprovider"]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | settings, capture_output=True, text=True
    )
    return done.stdout


def change_a_number(cell: NotebookNode) -> bool:
    """Change the first digit in the cell's stored text, where there is one."""
    for output in cell.outputs:
        place = output if output.output_type == "stream" else output.get("data", {})
        name = "text" if output.output_type == "stream" else "text/plain"
        changed = re.sub(
            r"\d",
            lambda digit: str((int(digit[0]) + 1) % 10),
            place.get(name, ""),
            count=1,
        )
        if changed != place.get(name, ""):
            place[name] = changed
            return True
    return False


def changed_chapter() -> NotebookNode:
    """A notebook of the course up to the first number that is compared, changed."""
    notebook = copy.deepcopy(read(NOTEBOOKS[0]))
    last = next(
        n
        for n, cell in enumerate(notebook.cells)
        if cell.cell_type == "code" and is_compared(cell) and change_a_number(cell)
    )
    notebook.cells = notebook.cells[: last + 1]
    return notebook


def test_nbval_passes_what_is_right_and_fails_a_changed_number(tmp_path):
    changed, chapter = tiny_notebook(), changed_chapter()
    assert change_a_number(changed.cells[1])
    nbformat.write(tiny_notebook(), tmp_path / "right.ipynb")
    nbformat.write(changed, tmp_path / "changed.ipynb")
    nbformat.write(chapter, tmp_path / "chapter.ipynb")
    report = compare(tmp_path)
    failed = re.findall(r"^FAILED (\S+::Cell \d+)", report, re.MULTILINE)
    last = len(code_cells(chapter)) - 1
    assert sorted(failed) == ["changed.ipynb::Cell 1", f"chapter.ipynb::Cell {last}"]
    assert f"2 failed, {3 + last} passed" in report


def test_papermill_alone_runs_a_notebook(tmp_path):
    nbformat.write(tiny_notebook(), tmp_path / "tiny.ipynb")
    command = [
        sys.executable,
        "-m",
        "papermill",
        "tiny.ipynb",
        "out.ipynb",
        "-p",
        "profile",
        "full",
    ]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert printed(read(tmp_path / "out.ipynb").cells[-1]) == "5 weights, full\n"
