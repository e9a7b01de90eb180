"""Sliders that move a picture: both of their forms, what is stored of them, and those
of the book in a browser.
"""

import base64
import html
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import matplotlib
import nbformat
import numpy as np
import papermill
import pytest
import torch
from matplotlib import pyplot
from nbconvert import HTMLExporter
from nbformat.v4 import new_code_cell, new_notebook, new_output
from PIL import Image
from support import NOTEBOOKS

from minisupernet.course import plots
from minisupernet.course.explorer import Explorer, explorer
from minisupernet.course.runs.outputs import keep_outputs, shrink
from minisupernet.errors import ExplorerError

matplotlib.use("Agg")
WIDGET = "application/vnd.jupyter.widget-view+json"
DESCRIPTION = "A line whose slope is the slider's value, between two fixed axes."


def line(slope: float):
    figure, axes = plots.new_figure(width=3, height=2)
    axes.plot([0, 1], [0, slope])
    axes.set(ylim=(-1, 5), title="a line")
    return figure


def lines(values=(0.0, 1.5, 4.0)) -> Explorer:
    return explorer(
        line, values, "slope <m>", DESCRIPTION, lambda value: f'a slope of "{value}"'
    )


def pixels(picture: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(int)


def drawn(figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    pyplot.close(figure)
    return file.getvalue()


class Found(HTMLParser):
    """The tags of a page, each with its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))

    def only(self, tag: str) -> dict:
        (found,) = (attributes for name, attributes in self.tags if name == tag)
        return found


def test_each_value_is_drawn_once_and_its_figure_closed():
    asked, before = [], pyplot.get_fignums()
    made = explorer(
        lambda value: asked.append(value) or line(value),
        (3.0, 1.0),
        "slope",
        DESCRIPTION,
    )
    assert (
        asked == [3.0, 1.0]
        and made.texts == ("3.0", "1.0")
        and pyplot.get_fignums() == before
    )
    for place, value in enumerate(asked):
        seen = pixels(made.frame(place))
        own, other = (
            np.abs(seen - pixels(drawn(line(slope)))).mean() for slope in (value, 2.0)
        )
        assert own < 0.2 < other


def test_the_page_has_every_picture_and_says_what_each_shows():
    made = lines()
    page = Found(made.page())
    image, slider = page.only("img"), page.only("input")
    kind, _, code = image["src"].partition(",")
    sheet = pixels(base64.b64decode(code))
    assert kind == "data:image/webp;base64" and image["alt"] == DESCRIPTION
    assert (
        sheet == np.concatenate([pixels(made.frame(place)) for place in range(3)])
    ).all()
    assert json.loads(slider["data-texts"]) == [
        f'a slope of "{value}"' for value in (0.0, 1.5, 4.0)
    ]
    assert (
        slider["aria-valuetext"] == 'a slope of "0.0"'
        and slider["max"] == "2"
        and "disabled" in slider
    )
    assert "slope &lt;m&gt;" in made.page() and not re.search(
        r"https?:|<script|<link", made.page()
    )


def test_a_front_end_may_take_the_widget_or_the_page():
    bundle = lines()._repr_mimebundle_()
    assert bundle["text/html"] == lines().page() and bundle[WIDGET]["model_id"]


def test_a_run_by_papermill_alone_leaves_a_slider_that_moves_and_no_dead_widget(
    tmp_path,
):
    source = """
from matplotlib.figure import Figure
from minisupernet.course.explorer import explorer
explorer(lambda size: Figure(figsize=(2, 1)), [1, 2], "size", "Nothing.")
"""
    nbformat.write(new_notebook(cells=[new_code_cell(source)]), tmp_path / "in.ipynb")
    options = {"kernel_name": "python3", "language": "python", "progress_bar": False}
    ran = papermill.execute_notebook(tmp_path / "in.ipynb", None, **options)
    (output,) = ran.cells[0].outputs
    assert output.data.keys() == {"text/html", "text/plain"}
    page, _ = HTMLExporter().from_notebook_node(ran)
    assert page.count('<figure class="explorer"') == 1 and "1</output>" in page


def test_the_widget_changes_the_picture_and_the_words():
    made = lines()
    image, slider, text = made.widget().children
    assert (
        slider.description == "slope <m>"
        and slider.continuous_update
        and slider.tooltip == DESCRIPTION
    )
    seen = []
    for place in (2, 1, 0):
        slider.value = place
        seen.append((image.value, text.value))
    assert seen == [(made.frame(place), made.texts[place]) for place in (2, 1, 0)]
    assert len({picture for picture, _ in seen}) == 3


def test_wrong_input_is_said_in_one_sentence():
    with pytest.raises(ExplorerError, match="give at least one"):
        lines(())
    with pytest.raises(
        ExplorerError, match="returned NoneType, no Figure; end it with `return figure`"
    ):
        explorer(lambda value: None, [1], "x", DESCRIPTION)
    with pytest.raises(
        ExplorerError, match="3 pictures 6000 pixels high are too many; draw fewer"
    ):
        explorer(
            lambda value: plots.new_figure(width=2, height=60)[0],
            range(3),
            "x",
            DESCRIPTION,
        )
    with pytest.raises(ExplorerError, match="the same figsize"):
        explorer(
            lambda value: plots.new_figure(width=value)[0], [2, 3], "x", DESCRIPTION
        )


def test_a_stored_picture_is_smaller_and_looks_the_same():
    steps = torch.linspace(0, 12, 400)
    figure, axes = plots.new_figure(width=5)
    for number, colour in enumerate(plots.COLOURS):
        axes.fill_between(
            steps, (steps + number).sin(), number, color=colour, alpha=0.2
        )
        axes.plot(steps, (steps + number).sin(), label=f"curve {number}")
    axes.legend()
    before = drawn(figure)
    after = shrink(before)
    assert (
        len(after) < 0.6 * len(before) and pixels(after).shape == pixels(before).shape
    )
    assert np.abs(pixels(after) - pixels(before)).mean() < 1
    assert shrink(after) in (after, shrink(after)) and len(shrink(after)) <= len(after)


def test_what_is_stored_moves_without_a_kernel():
    bundle, bar = (
        lines()._repr_mimebundle_(),
        {WIDGET: {"model_id": "1"}, "text/plain": "a bar"},
    )
    picture = base64.b64encode(drawn(line(1.0))).decode()
    outputs = [
        new_output("display_data", data)
        for data in (bundle, bar, {"image/png": picture})
    ]
    notebook = new_notebook(
        cells=[
            new_code_cell(
                "lines()", outputs=[*outputs, new_output("stream", text="words")]
            )
        ]
    )
    notebook.metadata["widgets"] = {
        "application/vnd.jupyter.widget-state+json": {"state": {}}
    }
    keep_outputs(notebook)
    first, second, third, words = notebook.cells[0].outputs
    assert (
        first.data == {kind: bundle[kind] for kind in ("text/html", "text/plain")}
        and words.text == "words"
    )
    assert second.data == {"text/plain": "a bar"} and "widgets" not in notebook.metadata
    assert base64.b64decode(third.data["image/png"]) == shrink(
        base64.b64decode(picture)
    )


def stored(path: Path) -> list[str]:
    """The explorers' HTML in a committed notebook."""
    cells = (cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code")
    found = (
        output.get("data", {}).get("text/html", "")
        for cell in cells
        for output in cell.outputs
    )
    return [each for each in found if 'class="explorer"' in each]


WITH_EXPLORERS = [path for path in NOTEBOOKS if stored(path)]
each_chapter = pytest.mark.parametrize(
    "path", WITH_EXPLORERS, ids=lambda path: path.stem
)


def test_there_are_explorers():
    assert [path.stem[:2] for path in WITH_EXPLORERS] == ["02", "03", "04", "05", "07"]


@each_chapter
def test_explorers_stay_small(path):
    for page in stored(path):
        assert (
            len(json.dumps(page)) <= 75_000
            and 9 <= int(Found(page).only("input")["max"]) + 1 <= 15
        )


@each_chapter
@pytest.mark.parametrize(
    "size",
    [{"width": 1280, "height": 900}, {"width": 390, "height": 844}],
    ids=["desk", "phone"],
)
def test_in_the_book_the_slider_moves_the_picture(path, size, visit):
    tab = visit(f"notebooks/{path.stem}", size)
    explorers = tab.locator("figure.explorer")
    assert explorers.count() == len(stored(path))
    for place, page in enumerate(stored(path)):
        figure = explorers.nth(place)
        move_one(figure, json.loads(Found(page).only("input")["data-texts"]), size)
    assert {urlsplit(url).scheme for url in tab.requested} <= {
        "file",
        "data",
    } and not tab.complaints


def move_one(figure, texts: list[str], size: dict) -> None:
    """By keyboard and by mouse the picture, the words and what a screen reader is told
    change; nothing else moves.
    """
    figure.scroll_into_view_if_needed()
    slider, window = figure.get_by_role("slider"), figure.locator("div").first
    slider.focus()
    box, seen = figure.bounding_box(), {window.screenshot()}
    assert (
        box["x"] >= 0
        and box["x"] + box["width"] <= size["width"]
        and slider.is_enabled()
    )
    middle = len(texts) // 2
    for key, value in (
        ("End", len(texts) - 1),
        ("Home", 0),
        ("ArrowRight", 1),
        (None, middle),
    ):
        if key:
            slider.press(key)
        else:
            line = slider.bounding_box()
            slider.click(position={"x": line["width"] / 2, "y": line["height"] / 2})
        words = (
            figure.locator("output").inner_text(),
            slider.get_attribute("aria-valuetext"),
        )
        assert abs(int(slider.input_value()) - value) <= (key is None), (
            f"{key} moved to {slider.input_value()}"
        )
        assert words == (texts[int(slider.input_value())],) * 2
        assert figure.bounding_box() == box
        seen.add(window.screenshot())
    assert len(seen) == 4  # first, last, second, middle


@each_chapter
def test_without_script_the_first_picture_shows(path, book, chromium):
    context = chromium.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto((book / f"notebooks/{path.stem}.html").as_uri())
    figure = tab.locator("figure.explorer").first
    image, window = (
        figure.locator("img").bounding_box(),
        figure.locator("div").first.bounding_box(),
    )
    words = json.loads(
        html.unescape(figure.locator("input").get_attribute("data-texts"))
    )
    assert abs(image["y"] - window["y"]) < 1 and image["height"] > 5 * window["height"]
    assert (
        figure.locator("input").is_disabled()
        and figure.locator("output").inner_text() == words[0]
    )
    context.close()
