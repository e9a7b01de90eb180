"""What several tests share: the built book and a browser.

One thread a test process: small tensors gain nothing from more, and tests run side by
side.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from support import ROOT, coloured_squares

from minisupernet.course.book import make_book
from minisupernet.data import ImageSet

CHROMIUM = (
    shutil.which("chromium")
    or shutil.which("chromium-browser")
    or shutil.which("google-chrome")
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
]

SETTLED = """async () => {
  await window.MathJax?.startup?.promise;
  await document.fonts.ready;
}"""

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with a browser come first: they are the longest."""
    items.sort(key=lambda item: "chromium" not in item.fixturenames)


@pytest.fixture(scope="session")
def squares() -> ImageSet:
    return coloured_squares()


@pytest.fixture(scope="session")
def chromium() -> Iterator:
    """A browser; tests that ask for it skip where there is none."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def book(tmp_path_factory) -> Path:
    """The folder of the book built from the stored outputs, or the one that
    MINISUPERNET_BOOK names.

    The processes of one test run build it once.
    """
    if "MINISUPERNET_BOOK" in os.environ:
        return Path(os.environ["MINISUPERNET_BOOK"])
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    with FileLock(shared / "book.lock"):
        if not (shared / "book.built").exists():
            make_book(ROOT, committed=True)
            (shared / "book.built").touch()
    return ROOT / "_build" / "committed" / "html"


@pytest.fixture
def visit(chromium, book) -> Iterator:
    """A function that opens one page of the book and returns it, with what it asked for
    and complained of.
    """
    contexts = []

    def open_page(page: str, size: dict | None = None, scheme: str = "light"):
        contexts.append(
            chromium.new_context(
                viewport=size or {"width": 1280, "height": 900}, color_scheme=scheme
            )
        )
        contexts[-1].set_default_timeout(300_000)  # of however busy a machine
        tab = contexts[-1].new_page()
        tab.requested, tab.complaints = [], []
        tab.on("request", lambda request: tab.requested.append(request.url))
        tab.on(
            "console",
            lambda said: (
                tab.complaints.append(said.text) if said.type == "error" else None
            ),
        )
        tab.on("pageerror", lambda error: tab.complaints.append(str(error)))
        tab.goto((book / f"{page}.html").as_uri(), wait_until="load")
        tab.evaluate(SETTLED)
        return tab

    yield open_page
    for context in contexts:
        context.close()
