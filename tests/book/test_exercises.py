"""What the checks of the exercises print, and that every chapter's exercises prove
themselves.

An exercise is a question, a folded cell with what is checked, a cell to answer in, a
folded solution and a folded typical mistake. The last three run the check, and nbval
compares what they print.
"""

import copy
import re
import symtable

import pytest
import torch
from nbformat import NotebookNode
from support import NOTEBOOKS
from test_notebooks import (
    code_cells,
    each_notebook,
    is_compared,
    printed,
    read,
)

from minisupernet.course.exercises import Exercise, FunctionExercise

QUESTION = re.compile(
    r"^\*\*Exercise (\d+)\.(\d+) \((predict|compute|build)\)\.\*\*", re.MULTILINE
)
MISTAKE = "# @title A typical mistake"
RENAMED = "**Exercise 2.1 (predict).** How many?"
LADDER = ["predict", "compute", "build"]
CELLS = {  # how a cell begins, what it prints
    "check": (r"# @title What is checked\n(?s:.)*exercise_\d+ = ", r"\Z"),
    "stub": (r"(?!# @title)", r"No answer yet\.\n\Z"),
    "solution": (r"# @title Solution\n", r"Right( on [\w ]+)?: (?s:.){20,}\.\n"),
    "mistake": (
        r"# @title A typical mistake\n(.*\n)*?.*# \w.{15,}\n",
        r"Not yet: (?!your function stops)(?s:.){20,}\n\Z",
    ),
}
GIVEN_AWAY = re.compile(r"Exercise\(|hint|because|expected")  # not in a stub


@pytest.mark.parametrize(
    ("answer", "expected", "said"),
    [
        (None, 3, "No answer yet."),
        (3, 3, "Right: 3, because it is three."),
        (4, 3, "Not yet: count again."),
        (3.05, 3.0, "Right: 3, because it is three."),
        (float("nan"), 3.0, "Not yet: count again."),
        ("yes", "yes", "Right: yes, because it is three."),
        (True, 1, "Not yet: count again."),
        (torch.tensor(True), True, "Right: True, because it is three."),
        (torch.tensor(1), True, "Not yet: count again."),
        (torch.tensor(3.05), 3.0, "Right: 3, because it is three."),
        ("three", 3, "Not yet: count again."),
        (
            [1.0, 2.0],
            torch.tensor([1.0, 2.0]),
            "Right: [1.0, 2.0], because it is three.",
        ),
        (torch.zeros(0), torch.zeros(0), "Right: [], because it is three."),
        (torch.tensor([1.0, 2.2]), torch.tensor([1.0, 2.0]), "Not yet: count again."),
        (
            torch.zeros(3),
            torch.zeros(3, 1),
            "Not yet: count again. Your shape is (3,), the right one (3, 1).",
        ),
    ],
)
def test_an_answer_is_judged(answer, expected, said, capsys):
    Exercise(expected, "count again.", "it is three", tolerance=0.1).check(answer)
    assert " ".join(capsys.readouterr().out.split()) == said


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda x: None, "No answer yet."),
        (lambda x: x * x, "Right on all 2 trials: a square."),
        (lambda x: x, "Not yet: square it"),  # right for the first input only
        (
            lambda x: x.missing,
            (
                "Not yet: your function stops with AttributeError: 'float' object has"
                " no attribute 'missing'"
            ),
        ),
    ],
)
def test_a_function_is_judged(function, said, capsys):
    inputs = [(1.0,), (2.0,)]
    FunctionExercise(lambda x: x * x, inputs, "square it", "a square").check(function)
    assert " ".join(capsys.readouterr().out.split()) == said


def test_a_long_hint_is_broken_into_lines(capsys):
    Exercise(2, "count again, " * 20, "it is two").check(1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and max(map(len, lines)) <= 76


def exercise_faults(notebook: NotebookNode, chapter: int) -> list[str]:
    """What breaks the rule for exercises, in words; nothing where all is well."""
    faults, kinds = [], []
    for place, cell in enumerate(notebook.cells):
        question = (
            QUESTION.search(cell.source) if cell.cell_type == "markdown" else None
        )
        if question:
            kinds.append(question[3])
            if (int(question[1]), int(question[2])) != (chapter, len(kinds)):
                faults.append(f"{question[0]} is exercise {chapter}.{len(kinds)}")
            parts = zip(
                CELLS.items(), notebook.cells[place + 1 : place + 5], strict=False
            )
            faults += [
                f"{question[0]} {part}"
                for (part, form), each in parts
                if not has_form(each, *form)
            ]
            if GIVEN_AWAY.search(notebook.cells[place + 2].source):
                faults.append(f"{question[0]} gives its answer away")
    if set(kinds) != set(LADDER) or kinds != sorted(kinds, key=LADDER.index):
        faults.append(f"not from predict through compute to build: {kinds}")
    return faults + [f"a mistake changes {name}" for name in left_behind(notebook)]


def has_form(cell: NotebookNode, begins: str, prints: str) -> bool:
    return (
        cell.cell_type == "code"
        and is_compared(cell)
        and bool(re.match(begins, cell.source))
        and bool(re.match(prints, printed(cell)))
    )


def left_behind(notebook: NotebookNode) -> set[str]:
    """Names that a mistake gives a value and that another cell uses."""
    cells = [
        (cell.source.startswith(MISTAKE), symtable.symtable(cell.source, "", "exec"))
        for cell in code_cells(notebook)
    ]
    mistaken = {
        name for is_mistake, table in cells if is_mistake for name in assigned(table)
    }
    return mistaken & {
        name
        for is_mistake, table in cells
        if not is_mistake
        for name in table.get_identifiers()
    }


def assigned(cell: symtable.SymbolTable) -> set[str]:
    return {symbol.get_name() for symbol in cell.get_symbols() if symbol.is_assigned()}


@each_notebook
def test_the_exercises_of_a_chapter_prove_themselves(path):
    assert not exercise_faults(read(path), int(path.stem[:2]))


def say(text: str):
    return lambda cells, place: cells[place].outputs[0].update(text=text)


def prepend(text: str):
    return lambda cells, place: cells[place].update(source=text + cells[place].source)


def append(text: str):
    return lambda cells, place: cells[place].update(source=cells[place].source + text)


BROKEN = {  # the cell, counted from the solution, and what is done to it
    "the mistake is gone": (1, lambda cells, place: cells.pop(place)),
    "the mistake is right": (
        1,
        say("Right: 3, because it is so, and not otherwise.\n"),
    ),
    "the hint says nothing": (1, say("Not yet: no.\n")),
    "the mistake crashes": (
        1,
        say("Not yet: your function stops with ValueError: 3\n"),
    ),
    "the mistake is not compared": (
        1,
        lambda cells, place: cells[place].metadata.tags.append("nbval-skip"),
    ),
    "the mistake is not named": (
        1,
        lambda cells, place: cells[place].update(source=f"{MISTAKE}\nmistake_1 = 1"),
    ),
    "the mistake stays": (1, append("\nanswer_1 = 1")),
    "the solution is wrong": (0, say("Not yet: count again, and start from one\n")),
    "the solution has no title": (0, prepend("# ")),
    "the answer is given": (
        -1,
        say("Right: 3, because it is so, and not otherwise.\n"),
    ),
    "the stub gives the answer away": (-1, append("  # hint: count again")),
    "what is checked is shown": (-2, prepend("import math\n")),
    "the question has no kind": (
        -3,
        lambda cells, place: cells[place].update(source="**Exercise 1.1.** How many?"),
    ),
    "the question is of another chapter": (
        -3,
        lambda cells, place: cells[place].update(source=RENAMED),
    ),
}


@pytest.mark.parametrize(("offset", "damage"), BROKEN.values(), ids=BROKEN)
def test_a_broken_exercise_is_found(offset, damage):
    notebook = copy.deepcopy(read(NOTEBOOKS[0]))
    solution = next(
        n
        for n, cell in enumerate(notebook.cells)
        if cell.source.startswith("# @title Solution")
    )
    assert not exercise_faults(notebook, 1)
    damage(notebook.cells, solution + offset)
    assert exercise_faults(notebook, 1)
