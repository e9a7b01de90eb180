"""What is kept of a notebook's run: pictures with 256 colours, what was printed in one
piece, and no widget, whose state ends with the kernel.
"""

import base64
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbformat import NotebookNode

__all__ = ["keep_outputs", "shrink"]

WIDGET = "application/vnd.jupyter.widget-view+json"


def keep_outputs(notebook: "NotebookNode") -> None:
    """Change a notebook that has run: what was printed in a row made one output,
    pictures made smaller, of what shows as a widget its other forms alone; and the cell
    of parameters that papermill added not shown in the book.
    """
    from nbconvert.preprocessors.coalescestreams import CoalesceStreamsPreprocessor

    CoalesceStreamsPreprocessor().preprocess(notebook, {})
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if "injected-parameters" in (tags := cell.metadata.get("tags", [])):
            tags.append("remove-cell")
    for output in (each for cell in notebook.cells for each in cell.get("outputs", ())):
        shown = output.get("data", {})
        shown.pop(WIDGET, None)
        if "image/png" in shown:
            shown["image/png"] = base64.b64encode(
                shrink(base64.b64decode(shown["image/png"]))
            ).decode()


def shrink(picture: bytes) -> bytes:
    """The PNG with a palette of 256 colours, of the same size in pixels, where that is
    smaller and nobody sees it.

    Nobody does where a colour is off by less than 1 of 255 in the mean; drawings are,
    grids of photographs are not.
    """
    from PIL import Image, ImageChops, ImageStat

    with Image.open(io.BytesIO(picture)) as image:
        whole = image.convert("RGB")
    few = whole.quantize(256, dither=Image.Dither.NONE)
    if max(ImageStat.Stat(ImageChops.difference(whole, few.convert("RGB"))).mean) >= 1:
        return picture
    file = io.BytesIO()
    few.save(file, "PNG", optimize=True)
    return min(file.getvalue(), picture, key=len)
