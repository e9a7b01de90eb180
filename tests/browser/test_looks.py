"""How the pages look: in the book's own letters, code and tables whole in a window of
1280 px, and nothing wider than a phone whatever the letters.

The fixture `visit` is in conftest.py.
"""

import pytest
import yaml
from support import ROOT

PHONE = {"width": 390, "height": 844}
WIDE_LETTERS = "*:not(mjx-container *) { letter-spacing: 0.2em !important; }"

FAMILIES = """() => document.fonts.ready.then((letters) =>
  [...letters].filter((each) => each.status === "loaded").map((each) => each.family))"""
CUT = """(selector) => {
  document.querySelectorAll("details").forEach((each) => { each.open = true; });
  return [...document.querySelectorAll(selector)]
    .filter((each) => each.scrollWidth > each.clientWidth)
    .map((each) => `${each.scrollWidth - each.clientWidth} px: ${each.innerText}`);
}"""
SHRUNK = """() => [...document.querySelectorAll(".cell_output > img")]
  .filter((each) => each.width < 0.55 * each.naturalWidth).map((each) => each.alt)"""
BEYOND = """(width) => [...document.querySelectorAll("body *")]
  .filter((each) => each.getBoundingClientRect().right > width + 0.5)
  .map((each) => each.outerHTML.slice(0, 100)).slice(0, 3)"""


def pages() -> list[str]:
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text())
    chapters = sum((part["chapters"] for part in contents["parts"]), [])
    return [contents["root"], *(chapter["file"] for chapter in chapters)]


@pytest.mark.parametrize("page", pages())
def test_a_page_fits_its_window(page, visit):
    tab = visit(page)
    loaded = {family.strip('"') for family in tab.evaluate(FAMILIES)}
    assert "IBM Plex Sans" in loaded
    assert not tab.evaluate(CUT, ".bd-article pre")
    assert not tab.evaluate(CUT, ".bd-article .pst-scrollable-table-container")
    tab.set_viewport_size(PHONE)
    tab.add_style_tag(content=WIDE_LETTERS)
    assert not tab.evaluate(SHRUNK)  # figures scroll rather than shrink beyond reading
    width = tab.evaluate("document.documentElement.scrollWidth")
    assert width <= PHONE["width"], tab.evaluate(BEYOND, PHONE["width"])
