"""The built book in a real browser: offline, readable on a phone, in light and dark,
and open to everyone.

The fixtures `book`, `chromium` and `visit` are in conftest.py.
"""

import functools
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

PHONE = {"width": 390, "height": 844}
MEGABYTE = 1_000_000
LOCAL = ("file", "data", "blob")
STYLES = (  # together they hold every style of the book
    "notebooks/02_net2net",
    "notebooks/07_experiment_2",
    "book/quiz_1",
    "book/setup",
    "book/api",
    "book/glossary",
    "book/intro",
)
COLOURED = {  # classes of text with a colour of its own
    *("admonition", "cell_input", "cell_output", "dropdown", "glossary", "highlight"),
    *("note", "output", "pre", "quiz-right", "quiz-wrong", "reference", "sig"),
    *("sig-name", "stderr", "stream", "tag_hide-cell", "tag_hide-input", "tip"),
    *("toggle-details", "warning", "bp", "c1", "k", "mi", "n", "nn", "o", "p", "s1"),
}
SCROLLING = """() => [...document.querySelectorAll("article pre")]
  .filter((block) => block.offsetParent && block.scrollWidth > block.clientWidth + 1)
  .map((block) => block.textContent.slice(0, 200))"""


def pages() -> list[str]:
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text())
    return [
        contents["root"],
        *(
            chapter["file"]
            for part in contents["parts"]
            for chapter in part["chapters"]
        ),
    ]


each_page = pytest.mark.parametrize("page", pages())


@pytest.fixture(scope="session")
def server(book) -> Iterator[str]:
    """The address at which the book is served over http."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(book))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()


@each_page
def test_a_page_is_whole_offline_fits_and_is_open_to_everyone(page, visit, book):
    """One visit with all checks: nothing from elsewhere, no complaint, formulas drawn,
    no code that scrolls at 1280 pixels, axe, and nothing wider than a phone."""
    tab = visit(page)
    elsewhere = [url for url in tab.requested if urlsplit(url).scheme not in LOCAL]
    assert not elsewhere and not tab.complaints
    assert (book / f"{page}.html").stat().st_size < 2 * MEGABYTE
    formulas, drawn = tab.locator(".math").count(), tab.locator("mjx-container").count()
    assert drawn >= formulas and not tab.locator("mjx-merror").count()
    assert not tab.evaluate(SCROLLING), "code is cut off at the right"
    assert not violations(tab, {"rules": {"color-contrast": {"enabled": False}}})
    tab.set_viewport_size(PHONE)
    assert tab.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("page", pages() if LONG else STYLES)
def test_colours_can_be_told_apart(page, scheme, visit):
    tab = visit(page, scheme=scheme)
    assert tab.evaluate("document.documentElement.dataset.theme") == scheme
    only = {"type": "rule", "values": ["color-contrast"]}
    assert not violations(tab, {"runOnly": only})


def test_the_pages_of_every_style_hold_every_style(book):
    """What contrast is looked at on has all classes of text that the book has."""
    styles = {page: classes(book / f"{page}.html") for page in pages()}
    shown = set().union(*(styles[page] for page in STYLES))
    missing = set().union(*styles.values()) - shown
    assert not missing, f"no page of STYLES has {missing}"


def violations(tab, options: dict) -> list[tuple[str, str]]:
    """What axe finds serious or critical on a page: the rule and the first place."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(tab, options=options).response["violations"]
    return [
        (each["id"], each["nodes"][0]["html"][:120])
        for each in found
        if each["impact"] in ("serious", "critical")
    ]


def classes(path: Path) -> set[str]:
    """The classes of the article that give text a colour of its own."""
    article = path.read_text(encoding="utf-8").split("<article", 1)[1]
    found = re.findall(r'class="([^"]+)"', article.split("</article>", 1)[0])
    return {name for each in found for name in each.split()} & COLOURED


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


class Links(HTMLParser):
    """The addresses, the ids and the undescribed images of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses, self.ids, self.bare_images = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        found = dict(attributes)
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
def links(book) -> dict[Path, Links]:
    found = (path for path in book.rglob("*.html") if "_static" not in path.parts)
    return {path: Links(path.read_text(encoding="utf-8")) for path in found}


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
