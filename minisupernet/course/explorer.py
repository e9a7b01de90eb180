"""A slider that moves a picture: drawn for every value beforehand, so that it moves at
once, with no kernel too.
"""

import base64
import html
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from minisupernet.errors import ExplorerError

if TYPE_CHECKING:  # all three are imported when an explorer is made or shown
    from ipywidgets import VBox
    from matplotlib.figure import Figure
    from PIL.Image import Image

__all__ = ["Explorer", "explorer"]

HIGHEST = 16_383  # pixels, in a WebP file

PAGE = """<figure class="explorer" style="margin: 0; max-width: {width}px">
<div style="overflow: hidden; max-height: {height}px; aspect-ratio: {width} / {height}">
<img src="data:image/webp;base64,{sheet}" alt="{alt}" width="{width}" height="{total}"
 style="display: block; width: 100%; height: auto" onload="{wake}"></div>
<label style="display: flex; gap: 0.8em; align-items: center"><span>{label}</span>
<input type="range" min="0" max="{last}" value="0" style="flex: 1" disabled
 aria-valuetext="{text}" data-texts="{texts}">
</label>
<output aria-live="off" style="display: block">{text}</output>
</figure>"""

# Without script the slider stays disabled and the first picture shows. All pictures are
# one tall image: it is shifted.
WAKE = """
const figure = this.closest('figure'), slider = figure.querySelector('input');
const texts = JSON.parse(slider.dataset.texts);
slider.oninput = () => {
  this.style.transform = `translateY(${-100 * slider.value / texts.length}%)`;
  figure.querySelector('output').value = slider.ariaValueText = texts[slider.value];
};
slider.disabled = false;
slider.oninput();
"""


@dataclass(frozen=True, eq=False)
class Explorer:
    """A slider and its pictures: an ipywidget where a kernel runs, plain HTML with a
    little script everywhere else.

    `sheet` has the pictures one under the other, all of one size, and `texts` says in
    words what each shows.
    """

    sheet: "Image"
    texts: tuple[str, ...]
    label: str
    description: str

    def frame(self, place: int) -> bytes:
        """The picture at one place of the slider, as PNG."""
        height = self.sheet.height // len(self.texts)
        return _encoded(
            self.sheet.crop(
                (0, place * height, self.sheet.width, (place + 1) * height)
            ),
            "PNG",
        )

    def page(self) -> str:
        """The slider as HTML that needs no kernel, no other file and no network."""
        texts = {
            "alt": self.description,
            "label": self.label,
            "text": self.texts[0],
            "texts": json.dumps(self.texts),
        }
        (width, total), count = self.sheet.size, len(self.texts)
        return PAGE.format(
            width=width,
            height=total // count,
            total=total,
            last=count - 1,
            sheet=base64.b64encode(_encoded(self.sheet, "WebP")).decode(),
            wake=html.escape(" ".join(WAKE.split())),
            **{name: html.escape(text) for name, text in texts.items()},
        )

    def widget(self) -> "VBox":
        """The slider as an ipywidget, whose picture the kernel changes."""
        import ipywidgets

        image = ipywidgets.Image(
            value=self.frame(0),
            layout={"align_self": "flex-start", "max_width": "100%"},
        )
        text = ipywidgets.Label(self.texts[0])
        slider = ipywidgets.IntSlider(
            max=len(self.texts) - 1,
            description=self.label,
            tooltip=self.description,
            readout=False,
            style={"description_width": "initial"},
            layout={"width": "auto", "max_width": f"{self.sheet.width}px"},
        )

        def move(change: dict) -> None:
            image.value, text.value = (
                self.frame(change["new"]),
                self.texts[change["new"]],
            )

        slider.observe(move, "value")
        return ipywidgets.VBox([image, slider, text])

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict:
        """Both forms: a front end that knows widgets takes the widget, any other the
        HTML. The HTML alone where nobody watches: a widget ends with its kernel.
        """
        live = {}
        if _watched() and find_spec("ipywidgets"):
            live = self.widget()._repr_mimebundle_()
        return {
            **live,
            "text/html": self.page(),
            "text/plain": f"explorer of {len(self.texts)} pictures: {self.label}",
        }


def explorer(
    draw: Callable[[Any], "Figure"],
    values: Sequence[Any],
    label: str,
    description: str,
    text: Callable[[Any], str] = str,
) -> Explorer:
    """Draw a picture for each value, to be looked through with a slider; the first
    shows where nothing can move.

    Args:
        draw: makes a matplotlib Figure of a value, always of the same size; it is
            closed here.
        label: what the slider moves, a few words. `description`: what there is to see,
            for who cannot see it.
        text: what is said under the picture of a value; the slider tells it to screen
            readers, too.

    Raises:
        ExplorerError: without values or with too many, or where `draw` returns no
            Figure or Figures of several sizes.
    """
    from PIL import Image

    pictures = [_drawn(draw, value) for value in values]
    if not pictures:
        raise ExplorerError(
            "an explorer without values has nothing to show; give at least one."
        )
    if len({picture.size for picture in pictures}) > 1:
        raise ExplorerError(
            "draw made figures of different sizes; give all of them the same figsize."
        )
    width, height = pictures[0].size
    if height * len(pictures) > HIGHEST:
        raise ExplorerError(
            f"{len(pictures)} pictures {height} pixels high are too many; draw fewer or"
            " flatter ones."
        )
    sheet = Image.new("RGB", (width, height * len(pictures)))
    for place, picture in enumerate(pictures):
        sheet.paste(picture, (0, place * height))
    colours = sheet.quantize(256, dither=Image.Dither.NONE)
    return Explorer(colours, tuple(text(value) for value in values), label, description)


def _watched() -> bool:
    """Whether a person's front end shows this: papermill, nbconvert and nbval, which
    only store it, tell the kernel that nobody answers an `input()`.
    """
    from IPython import get_ipython

    kernel = getattr(get_ipython(), "kernel", None)
    return getattr(kernel, "_allow_stdin", True)


def _drawn(draw: Callable[[Any], "Figure"], value: Any) -> "Image":
    """One picture at the course's 100 dots an inch; closed, the figure is not shown
    below the cell as well.
    """
    from matplotlib import pyplot
    from matplotlib.figure import Figure
    from PIL import Image

    figure = draw(value)
    if not isinstance(figure, Figure):
        raise ExplorerError(
            f"draw returned {type(figure).__name__}, no Figure; end it with `return"
            " figure`."
        )
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    pyplot.close(figure)
    return Image.open(file).convert("RGB")


def _encoded(picture: "Image", kind: str) -> bytes:
    """The file of a picture, lossless. WebP's slowest method takes thirty times as long
    to save nothing more.
    """
    file = io.BytesIO()
    picture.save(
        file,
        kind,
        **({"lossless": True, "quality": 100, "method": 4} if kind == "WebP" else {}),
    )
    return file.getvalue()
