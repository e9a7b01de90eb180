"""The pages around the chapters: quizzes, times, troubleshooting, citing, glossary, and
the status of the runs.
"""

import ast
import json
import os.path
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from support import NOTEBOOKS, ROOT

from minisupernet.course.status import NOTES, note_run, status_page
from minisupernet.errors import ResultError

BOOK = ROOT / "book"
QUIZZES = sorted(path.stem for path in BOOK.glob("quiz_*.md"))
OPTION = re.compile(
    r":::\{dropdown\} ([^\n]+)\n:class-container: quiz-(\w+)\n\n(.+?)\n:::", re.DOTALL
)
each_quiz = pytest.mark.parametrize("quiz", QUIZZES)


class Option(NamedTuple):
    says: str
    mark: str  # "right" or "wrong"
    why: str


def text(name: str) -> str:
    return (BOOK / name).read_text(encoding="utf-8")


def questions(quiz: str) -> dict[str, list[Option]]:
    """The options of each question of one page, by its heading."""
    headings = re.split(r"^## \d+\. ", text(f"{quiz}.md"), flags=re.MULTILINE)[1:]
    return {
        each.splitlines()[0]: [Option(*found) for found in OPTION.findall(each)]
        for each in headings
    }


def contents() -> list[list[str]]:
    """The pages of each part of the book."""
    parts = yaml.safe_load((ROOT / "_toc.yml").read_text())["parts"]
    return [[chapter["file"] for chapter in part["chapters"]] for part in parts]


def prose() -> str:
    """What a reader reads outside of the glossary: the Markdown of all chapters, and
    the other pages.
    """
    cells = (
        cell for path in NOTEBOOKS for cell in json.loads(path.read_text())["cells"]
    )
    chapters = [
        "".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"
    ]
    return "\n".join(
        [
            *chapters,
            *(
                path.read_text()
                for path in BOOK.glob("*.md")
                if path.stem != "glossary"
            ),
        ]
    )


@each_quiz
def test_each_question_has_one_right_answer_and_explains_all(quiz):
    asked = questions(quiz)
    assert 5 <= len(asked) <= 7
    assert sum(map(len, asked.values())) == text(f"{quiz}.md").count("{dropdown}"), (
        "an option is not read here"
    )
    for heading, options in asked.items():
        marks = [option.mark for option in options]
        assert (
            marks.count("right") == 1
            and marks.count("wrong") >= 2
            and len(set(marks)) == 2
        ), heading
        for option in options:
            assert len(option.why) >= 30 and option.why.startswith(
                "Right. " if option.mark == "right" else "No: "
            )


@each_quiz
def test_neither_place_nor_length_gives_the_answer_away(quiz):
    places, longest = [], 0
    for options in questions(quiz).values():
        right = next(
            place for place, option in enumerate(options) if option.mark == "right"
        )
        places.append(right)
        longest += len(options[right].says) == max(
            len(option.says) for option in options
        )
    assert (
        set(places) == {0, 1, 2}
        and max(map(places.count, places)) <= (len(places) + 1) // 2
    )
    assert longest <= (len(places) + 1) // 2


@each_quiz
def test_opening_an_answer_shows_its_explanation(quiz, visit):
    tab = visit(f"book/{quiz}")
    options = [option for each in questions(quiz).values() for option in each]
    answers = tab.locator("details.quiz-right, details.quiz-wrong")
    assert answers.count() == len(options)
    for place, option in ((0, options[0]), (len(options) - 1, options[-1])):
        answer = answers.nth(place)
        why = answer.get_by_text(option.why.split("\n")[0][:30])
        assert (
            f"quiz-{option.mark}" in answer.get_attribute("class")
            and not why.is_visible()
        )
        answer.locator("summary").focus()
        tab.keyboard.press("Enter")
        assert why.is_visible()
        answer.locator("summary").click()
        assert not why.is_visible()


def test_each_part_has_its_page_first_and_its_quiz_last():
    parts = [
        pages
        for pages in contents()
        if any(page.startswith("notebooks/") for page in pages)
    ]
    for number, pages in enumerate(parts, 1):
        assert (pages[0], pages[-1]) == (f"book/part_{number}", f"book/quiz_{number}")
        listed = re.findall(
            r"\| \[\]\(\.\./(notebooks/\w+)\.ipynb\)", text(f"part_{number}.md")
        )
        assert listed == pages[1:-1], f"the table of part {number}"
    assert len(parts) == len(QUIZZES) == 4


def test_reading_times_are_those_of_the_chapters():
    for number in range(1, 5):
        for name, minutes in re.findall(
            r"notebooks/(\w+)\.ipynb\) \| (\d+) minutes", text(f"part_{number}.md")
        ):
            chapter = (ROOT / "notebooks" / f"{name}.ipynb").read_text()
            assert re.search(r"Reading takes (\d+) minutes", chapter)[1] == minutes, (
                name
            )


def reading_minutes(chapter: Path) -> float:
    """By the rule of the first page: 150 words or 15 lines of open code a minute, up to
    the exercises."""
    words = lines = 0
    for cell in json.loads(chapter.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            folded = {"hide-cell", "hide-input", "remove-cell"}
            if not folded & set(cell["metadata"].get("tags", ())):
                lines += sum(bool(line.strip()) for line in source.splitlines())
            continue
        open_text = re.sub(r"<details>.*?</details>", "", source, flags=re.DOTALL)
        before, found, _ = open_text.partition("## Exercises")
        plain = re.sub(r"\$\$.*?\$\$|\]\(.*?\)|[|*#-]", " ", before, flags=re.DOTALL)
        words += len(plain.split())
        if found:
            break
    return words / 150 + lines / 15


@pytest.mark.parametrize("chapter", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_time_of_a_chapter_follows_the_rule(chapter):
    assert "150 words or 15 lines of open code a minute" in text("intro.md")
    first = "".join(json.loads(chapter.read_text())["cells"][0]["source"])
    said = re.search(
        r"\*\*Time\.\*\* Reading takes (\d+) minutes, exercises apart\. A quick run"
        r" takes .+? on two CPU cores[,.]",
        re.sub(r"\s+", " ", first),
    )
    minutes = reading_minutes(chapter)
    assert said and abs(int(said[1]) - minutes) <= 5, f"reading: {minutes:.0f} minutes"


def messages() -> list[str]:
    """Every string of the package, with a mark where a value is put in, and what `make`
    says.
    """
    found = [(ROOT / "Makefile").read_text()]
    for path in (ROOT / "minisupernet").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(
                        (
                            getattr(piece, "value", "")
                            if isinstance(piece, ast.Constant)
                            else "\0"
                        )
                        for piece in node.values
                    )
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_troubleshooting_quotes_what_the_package_says():
    first_columns = re.findall(
        r"^\| (.+?) \| .+ \| .+ \|$", text("troubleshooting.md"), re.MULTILINE
    )
    quoted = [
        quote
        for column in first_columns
        for quote in re.findall(r"`([^`]+)`", column)
        if " " in quote
    ]
    said = messages()
    assert len(quoted) > 25
    for quote in quoted:
        pattern = ".*".join(re.escape(piece.strip()) for piece in quote.split("…"))
        assert any(re.search(pattern, message, re.DOTALL) for message in said), (
            f"nothing says '{quote}'"
        )


def test_how_to_cite_agrees_with_the_citation_file():
    entry = dict(
        re.findall(r"^  (\w+) += \{+(.+?)\}+,?$", text("cite.md"), re.MULTILINE)
    )
    stated = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert entry["title"] == stated["title"] and entry["version"] == stated["version"]
    assert (
        entry["license"] == stated["license"]
        and entry["url"] == stated["repository-code"]
    )
    assert [entry["author"]] == [author["name"] for author in stated["authors"]]
    assert (
        f'__version__ = "{stated["version"]}"'
        in (ROOT / "minisupernet" / "__init__.py").read_text()
    )


def test_every_reference_is_cited():
    keys = re.findall(r"^@\w+\{(\w+),", text("references.bib"), re.MULTILINE)
    pages = "".join(path.read_text() for path in BOOK.glob("*.md"))
    assert keys and not [key for key in keys if f"`{key}`" not in pages]


def terms() -> list[str]:
    listed = text("glossary.md").split("```{glossary}\n:sorted:\n")[1]
    return [
        line.lower()
        for line in listed.splitlines()
        if line and not line.startswith((" ", "`"))
    ]


def test_every_term_of_the_glossary_is_used():
    words = re.sub(r"\s+", " ", prose().lower())
    assert not [
        term for term in terms() if not re.search(rf"\b{re.escape(term)}", words)
    ]


def test_a_word_that_a_chapter_links_leads_to_its_entry():
    linked = set(re.findall(r"\[([^\]]+)\]\(\.\./book/glossary\.md([^)]*)\)", prose()))
    entries = {"#term-" + term.replace(" ", "-"): term for term in terms()}

    def fits(word: str, place: str) -> bool:
        word, term = (
            re.sub(r"\s+", " ", word.lower()),
            entries.get(place.lower(), "nothing"),
        )
        return (
            term in word or word in term or len(os.path.commonprefix([term, word])) >= 5
        )

    assert len(linked) > 50 and not [each for each in linked if not fits(*each)]


@pytest.fixture
def tiny(tmp_path) -> Path:
    """A notebook of two code cells whose data were chosen by "auto"."""
    chose = {
        "output_type": "stream",
        "name": "stdout",
        "text": ["Images: Shapes-100, a drawn stand-in\n"],
    }
    cells = [
        {"cell_type": "code", "source": "", "metadata": {}, "outputs": [each]}
        for each in (chose, {"data": {}})
    ]
    document = {
        "cells": [*cells, {"cell_type": "markdown", "source": "", "metadata": {}}],
        "metadata": {},
    }
    (tmp_path / "01_tiny.ipynb").write_text(
        json.dumps(document | {"nbformat": 4, "nbformat_minor": 5})
    )
    return tmp_path / "01_tiny.ipynb"


def line_of(page: str, name: str) -> list[str]:
    return (
        next(line for line in page.splitlines() if name in line)
        .strip("| ")
        .split(" | ")
    )


def test_status_says_when_and_on_what_a_notebook_ran(tiny):
    assert line_of(status_page([tiny], []), "01_tiny")[1:][:5] == [
        "not recorded",
        "",
        "",
        "",
        "2",
    ]
    notebook = json.loads(tiny.read_text())
    note_run(notebook, {"profile": "quick", "data": "auto", "seed": 0}, 12.4, threads=2)
    tiny.write_text(json.dumps(notebook))
    page = status_page([tiny], [])
    chapter, ran, seconds, profile, images, cells, setup = line_of(page, "01_tiny")
    assert ran == datetime.now(UTC).date().isoformat() and (
        seconds,
        profile,
        cells,
    ) == ("12", "quick", "2")
    (named,) = (line for line in page.splitlines() if line.startswith(f"{setup}. "))
    assert images == "Shapes-100" and "torch 2" in named and "python 3" in named
    assert "cores: 2; " in named or "NVIDIA" in named


def test_a_note_names_no_folder_and_changes_nothing_else(tiny):
    before, after = json.loads(tiny.read_text()), json.loads(tiny.read_text())
    note_run(after, {"profile": "full", "data": "/home/me/mine.npz"}, 1.0)
    note = after["metadata"].pop(NOTES)
    assert after == before
    assert note["data"] == "mine.npz" and "/" not in json.dumps(note)


def test_status_sums_the_recorded_runs(tmp_path):
    machine = {
        "device": "cpu: x86_64 CPU, threads: 1",
        "versions": {"torch": "2"},
        "data": {"name": "cifar100"},
    }
    runs = [
        {"seconds": 1800 * hours, "commit": f"{hours}bcdef0123", **machine}
        for hours in (1, 3)
    ]
    runs[1]["versions"] = {"torch": "3"}
    (tmp_path / "06_runs.json").write_text(json.dumps({"runs": runs}))
    (tmp_path / "07_other.json").write_text(json.dumps({"sizes": []}))
    page = status_page([], sorted(tmp_path.glob("*.json")))
    assert (
        line_of(page, "06 runs")[1:5] == ["2", "2.0", "cifar100", "1; 2"]
        and "1bcdef0; 3bcdef0" in page
    )
    assert "07 other" not in page
    (tmp_path / "08_cut.json").write_text('{"runs": [')
    with pytest.raises(ResultError, match="08_cut.json cannot be read as JSON"):
        status_page([], [tmp_path / "08_cut.json"])
