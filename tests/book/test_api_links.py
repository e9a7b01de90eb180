"""A chapter says what a name of the package is where it first uses it, and links to the
name's place on the API page.
"""

import json
import re
from pydoc import locate

import pytest
from support import NOTEBOOKS, ROOT

CHAPTERS = [path.stem for path in NOTEBOOKS]
LINK = re.compile(r"\[`([^`\]]+)`\]\(\.\./book/api\.md#([\w.-]+)\)")
ENTRY = re.compile(r"^\.\. auto(?:function|class):: ([\w.]+)$", re.MULTILINE)

each_chapter = pytest.mark.parametrize("chapter", CHAPTERS)


def links(chapter: str) -> list[tuple[str, str]]:
    """The label and the anchor of each link to the API page."""
    notebook = json.loads((ROOT / "notebooks" / f"{chapter}.ipynb").read_text())
    cells = (c["source"] for c in notebook["cells"] if c["cell_type"] == "markdown")
    return [link for cell in cells for link in LINK.findall("".join(cell))]


def entries() -> set[str]:
    return set(ENTRY.findall((ROOT / "book" / "api.md").read_text()))


@each_chapter
def test_a_link_to_the_api_page_names_what_stands_there(chapter):
    found, known = links(chapter), entries()
    assert len(found) >= 3, "the chapter's names do not lead to the API page"
    for label, anchor in found:
        parent = anchor.rpartition(".")[0]
        assert anchor in known or parent in known, f"the page does not list {anchor}"
        assert locate(anchor) is not None, f"there is no {anchor}"
        assert anchor.endswith(f".{label.rpartition('.')[2]}"), f"{label}: {anchor}"


@each_chapter
def test_a_name_is_linked_once(chapter):
    anchors = [anchor for _, anchor in links(chapter)]
    assert len(anchors) == len(set(anchors)), "only at its first use"


@each_chapter
def test_the_built_page_has_the_place_that_is_linked(chapter, book):
    page = (book / "book" / "api.html").read_text(encoding="utf-8")
    places = set(re.findall(r'<dt class="sig[^"]*" id="([^"]+)"', page))
    built = (book / "notebooks" / f"{chapter}.html").read_text(encoding="utf-8")
    linked = set(re.findall(r'href="\.\./book/api\.html#([^"]+)"', built))
    assert {anchor for _, anchor in links(chapter)} <= linked <= places
