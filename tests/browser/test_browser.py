"""The built book in a real browser: offline, in its own letters, readable at a desk and
on a phone, in light and dark, and open to everyone.

The fixtures `book`, `chromium` and `visit` are in conftest.py.
"""

import functools
import json
import re
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from support import LONG, ROOT

DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
PAPER = {"width": 673, "height": 985}  # A4 within its margins, at 96 px an inch
MEGABYTE = 1_000_000
SERIOUS = ("serious", "critical")
COLOURS = ("color-contrast", "link-in-text-block")  # what a colour scheme decides

FAMILIES = """() => [...document.fonts]
  .filter((each) => each.status === "loaded").map((each) => each.family)"""
CUT = """(unfold) => {
  if (unfold) document.querySelectorAll("details").forEach(
    (each) => { each.open = true; });
  return [...document.querySelectorAll(
      ".bd-article pre, .bd-article .pst-scrollable-table-container")]
    .filter((each) => each.scrollWidth > each.clientWidth)
    .map((each) => `${each.scrollWidth - each.clientWidth} px: ${each.innerText}`);
}"""
SHRUNK = """() => [...document.querySelectorAll(".cell_output > img")]
  .filter((each) => each.width < 0.55 * each.naturalWidth).map((each) => each.alt)"""
BEYOND = """(width) => [...document.querySelectorAll("body *")]
  .filter((each) => each.getBoundingClientRect().right > width + 0.5)
  .map((each) => each.outerHTML.slice(0, 100)).slice(0, 3)"""
LEADS_ELSEWHERE = """() => [...document.querySelectorAll(
      "header, .bd-sidebar, .bd-sidebar-secondary, footer, input, .headerlink")]
    .filter((each) => each.getClientRects().length)
    .map((each) => each.outerHTML.slice(0, 100))"""
BEFORE_PRINT = """() => {
  window.dispatchEvent(new Event("beforeprint"));
  const open = document.querySelectorAll("details[open]").length;
  return [open, document.documentElement.dataset.theme];
}"""
AFTER_PRINT = """() => window.dispatchEvent(new Event("afterprint"))"""
WIDE_LETTERS = "*:not(mjx-container *) { letter-spacing: 0.2em !important }"
THEME = "(scheme) => document.documentElement.dataset.theme === scheme"
AT_ONCE = "* { transition: none !important; animation: none !important }"


def pages() -> list[str]:
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text())
    chapters = sum((part["chapters"] for part in contents["parts"]), [])
    return [contents["root"], *(chapter["file"] for chapter in chapters)]


each_page = pytest.mark.parametrize("page", pages())


@pytest.fixture(scope="session")
def server(book) -> Iterator[str]:
    """The address at which the book is served over http."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(book))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()


def incomplete(tab) -> list[str]:
    """What a page asked of another host, complained of, or left unset."""
    own = ("file", "data", "blob")
    found = [url for url in tab.requested if urlsplit(url).scheme not in own]
    formulas, drawn = tab.locator(".math").count(), tab.locator("mjx-container").count()
    if drawn < formulas or tab.locator("mjx-merror").count():
        found.append(f"{drawn} of {formulas} formulas are set")
    return found + tab.complaints


def too_wide(tab) -> list[str]:
    """Code and tables that are cut off at a desk; on a phone, figures that shrink
    beyond reading, and what is wider than the page, whatever the letters.
    """
    families = {family.strip('"') for family in tab.evaluate(FAMILIES)}
    found = ["not in the book's own letters"] * ("IBM Plex Sans" not in families)
    found += [f"cut off, {each[:80]}" for each in tab.evaluate(CUT, True)]
    tab.set_viewport_size(PHONE)
    tab.add_style_tag(content=WIDE_LETTERS)
    found += [f"shrunk: {each}" for each in tab.evaluate(SHRUNK)]
    if tab.evaluate("document.documentElement.scrollWidth") > PHONE["width"]:
        found.append(f"too wide: {tab.evaluate(BEYOND, PHONE['width'])}")
    return found


def spoilt_on_paper(tab) -> list[str]:
    """What is cut off on paper, answers that unfold, and what leads elsewhere."""
    tab.set_viewport_size(PAPER)
    tab.emulate_media(media="print")
    opened, theme = tab.evaluate(BEFORE_PRINT)
    found = [f"{opened} unfold on paper"] * bool(opened)
    found += [f"{theme} on paper"] * (theme != "light")
    if tab.evaluate("document.documentElement.scrollWidth") > PAPER["width"]:
        found.append(f"cut on paper: {tab.evaluate(BEYOND, PAPER['width'])}")
    found += [f"cut on paper, {each[:80]}" for each in tab.evaluate(CUT, False)]
    found += [f"on paper: {each}" for each in tab.evaluate(LEADS_ELSEWHERE)]
    tab.evaluate(AFTER_PRINT)
    tab.emulate_media(media="screen")
    tab.set_viewport_size(DESK)
    return found


def barriers(tab, **options) -> list[str]:
    """What axe finds on a page that keeps somebody from reading it."""
    from axe_playwright_python.sync_playwright import Axe

    options["resultTypes"] = ["violations"]
    found = Axe().run(tab, options=options).response["violations"]
    serious = [each for each in found if each["impact"] in SERIOUS]
    return [f"{each['id']}: {each['nodes'][0]['html'][:120]}" for each in serious]


@each_page
def test_a_page_is_whole_and_everyone_can_read_it(page, visit, colourful, book):
    """Offline, in light and dark, at a desk, on paper and, last, on a phone."""
    tab = visit(page, DESK, scheme="light")
    size = (book / f"{page}.html").stat().st_size
    faults = [f"{size} bytes"] * (size > 2 * MEGABYTE) + incomplete(tab)
    faults += barriers(tab, rules={name: {"enabled": False} for name in COLOURS})
    tab.add_style_tag(content=AT_ONCE)
    for scheme in ("light", "dark") if page in colourful else ():
        tab.emulate_media(color_scheme=scheme)
        tab.wait_for_function(THEME, arg=scheme)
        faults += [f"{scheme}, {each}" for each in barriers(tab, runOnly=[*COLOURS])]
    faults += spoilt_on_paper(tab) + too_wide(tab)
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("where", ["disk", "server"])
def test_search_finds_a_word_of_a_chapter(where, visit, book, server):
    tab = visit("search")
    tab.complaints.clear()
    tab.goto(
        f"{server if where == 'server' else book.as_uri()}/search.html?q=hypernetwork"
    )
    tab.wait_for_selector("#search-results li a")
    assert tab.locator("#search-results li").count() >= 3
    if (
        where == "server"
    ):  # from the disk a browser shows the titles and may not read the excerpts
        tab.wait_for_load_state("networkidle")
        assert not tab.complaints and all(
            url.startswith(server) for url in tab.requested[-3:]
        )


@pytest.mark.parametrize("word", ["save", "export", "deploi"])  # stemmed
def test_search_finds_how_a_network_leaves_the_course(word, book):
    """In a heading of the API page, which the search lists first."""
    text = (book / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(text.removeprefix("Search.setIndex(").rstrip(");\n"))
    found = index["titleterms"][word]
    numbers = [found] if isinstance(found, int) else found
    assert "book/api" in [index["docnames"][number] for number in numbers]


class Page(HTMLParser):
    """The addresses, the ids, the undescribed images and the styles of one page: its
    tags, and its tags with each of their classes.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses, self.ids, self.bare_images = [], set(), []
        self.styles, self.tags = set(), 0
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        found = dict(attributes)
        classes = (found.get("class") or "").split()
        self.styles |= {tag, *(f"{tag}.{each}" for each in classes)}
        self.tags += 1
        self.ids |= {found["id"]} if found.get("id") else set()
        if tag == "a" and found.get("href"):
            self.addresses.append(found["href"])
        if (
            tag == "img"
            and not (found.get("alt") or "").strip()
            and "aria-hidden" not in found
        ):
            self.bare_images.append(found.get("src", ""))


@pytest.fixture(scope="session")
def links(book) -> dict[Path, Page]:
    found = (path for path in book.rglob("*.html") if "_static" not in path.parts)
    return {path: Page(path.read_text(encoding="utf-8")) for path in found}


@pytest.fixture(scope="session")
def colourful(links, book) -> set[str]:
    """Pages that hold every style of the book between them; nightly all pages."""
    read = {page: links[book / f"{page}.html"] for page in pages()}
    if LONG:
        return set(read)
    chosen, left = set(), set().union(*(each.styles for each in read.values()))
    while left:
        best = max(
            read, key=lambda page: len(read[page].styles & left) / read[page].tags
        )
        chosen.add(best)
        left -= read[best].styles
    return chosen


def test_every_link_inside_the_book_leads_somewhere(links, book):
    broken = []
    for path, found in links.items():
        for address in found.addresses:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc or address == "#":
                continue
            target = (
                (path.parent / unquote(parts.path)).resolve() if parts.path else path
            )
            known = links.get(target)
            if not target.exists() or (
                parts.fragment and known and unquote(parts.fragment) not in known.ids
            ):
                broken.append(f"{path.relative_to(book)}: {address}")
    assert not broken


def test_every_image_is_described(links):
    bare = {
        str(path.name): found.bare_images
        for path, found in links.items()
        if found.bare_images
    }
    assert not bare


@each_page
def test_the_launch_button_opens_this_notebook_in_colab(page, links, book):
    if not page.startswith("notebooks/"):
        return
    addresses = links[book / f"{page}.html"].addresses
    colab = [address for address in addresses if "colab.research.google.com" in address]
    assert colab and re.search(rf"/blob/main/{page}\.ipynb$", colab[0])
    assert any(
        address.endswith(".ipynb") and "://" not in address for address in addresses
    ), "no download"


def test_the_download_button_saves_the_notebook(chromium, server, book):
    tab = chromium.new_page()
    tab.goto(f"{server}/notebooks/05_supernet.html")
    tab.locator(".dropdown-download-buttons button").first.click()
    with tab.expect_download() as started:
        tab.locator(".dropdown-download-buttons a").first.click()
    assert started.value.suggested_filename == "05_supernet.ipynb"
    source = book / "_sources" / "notebooks" / "05_supernet.ipynb"
    assert Path(started.value.path()).read_bytes() == source.read_bytes()
    tab.close()
