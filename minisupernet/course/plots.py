"""The course's figures: one style, colours that colour-blind readers tell apart, and
intervals drawn.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from minisupernet.course.statistics import interval

if TYPE_CHECKING:  # matplotlib is imported when a figure is drawn, not with the package
    from IPython.display import Markdown
    from matplotlib.figure import Figure

    from minisupernet.training import History

__all__ = [
    "COLOURS",
    "curves",
    "image_grid",
    "kernel_grid",
    "ladder",
    "new_figure",
    "table",
]

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#555555",
)  # Okabe and Ito


def new_figure(
    rows: int = 1, columns: int = 1, width: float = 6.0, height: float = 3.0
) -> tuple["Figure", object]:
    """An empty figure in the course's style and its axes; `width` and `height` in
    inches, for the whole figure.
    """
    import matplotlib.pyplot as plt

    style = {
        "figure.dpi": 100,
        "savefig.dpi": 100,
        "figure.facecolor": "white",
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": plt.cycler(color=COLOURS),
        "axes.grid": True,
        "grid.alpha": 0.3,
        "legend.edgecolor": "none",  # a pale ground keeps it legible over points
    }
    plt.rcParams.update(style)
    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained")


def image_grid(
    images: Tensor, row_names: Sequence[str] = (), column_names: Sequence[str] = ()
) -> "Figure":
    """A table of pictures: images (rows, columns, 3, H, W) uint8, with names at the
    left and on top.
    """
    framed = nn.functional.pad(
        images.cpu(), (0, 1, 0, 1), value=255
    )  # a white line between pictures
    rows, columns, _, height, width = framed.shape
    pixels = framed.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, 3)
    left = 0.11 * max((len(name) for name in row_names), default=0)
    cell = min(0.75, (7.5 - left) / columns)
    figure, axes = new_figure(
        width=left + columns * cell,
        height=rows * cell + (0.3 if column_names else 0.05),
    )
    axes.imshow(pixels.numpy(), interpolation="nearest")
    axes.set_xticks([width * (i + 0.5) for i in range(len(column_names))], column_names)
    axes.set_yticks([height * (i + 0.5) for i in range(len(row_names))], row_names)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return figure


def kernel_grid(kernels: Tensor, row_names: Sequence[str] = ()) -> "Figure":
    """First-layer kernels (rows, filters, 3, h, w) as small colour pictures on one
    common scale; grey is zero.
    """
    limit = kernels.abs().max()
    return image_grid(((kernels.detach() / limit + 1) * 127.5).byte(), row_names)


def curves(histories: Mapping[str, "History"], measure: str, label: str) -> "Figure":
    """One line a run: a History measurement against the training step."""
    figure, axes = new_figure()
    for name, history in histories.items():
        axes.plot(*history.series(measure), marker="o", markersize=3, label=name)
    axes.set(xlabel="training step", ylabel=label)
    axes.legend()
    return figure


def ladder(
    arms: Mapping[str, Sequence[float]],
    label: str = "test accuracy (%)",
    chance: float | None = 0.5,
) -> "Figure":
    """One row an arm: a faint dot a unit, the mean, and its 95 % interval where there
    are three units or more; the dashed line is chance.

    Args:
        arms: name to the values of independent units, such as generators or, where only
            one was trained, its tasks, as shares (0 to 1), drawn in percent.
    """
    figure, axes = new_figure(height=0.7 + 0.42 * len(arms))
    for row, values in enumerate(arms.values()):
        colour, found = COLOURS[row % len(COLOURS)], interval(values)
        axes.plot(
            [100 * v for v in values],
            [row] * len(values),
            "o",
            color=colour,
            alpha=0.25,
            markersize=4,
        )
        if math.isfinite(found.low):
            axes.plot(
                [100 * found.low, 100 * found.high],
                [row, row],
                "|-",
                color="black",
                linewidth=1.5,
                markersize=9,
            )
        axes.plot(
            100 * found.mean,
            row,
            "D",
            color=colour,
            markeredgecolor="black",
            markersize=6,
        )
        axes.annotate(
            f"{100 * found.mean:.1f}",
            (1.01, row),
            xycoords=("axes fraction", "data"),
            va="center",
        )
    if chance is not None:
        axes.axvline(100 * chance, color=COLOURS[-1], linestyle="--", linewidth=1)
    axes.set_yticks(range(len(arms)), arms)
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_xlabel(label)
    return figure


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> "Markdown":
    """A table that JupyterLab, Colab and the book all draw."""
    from IPython.display import Markdown

    lines = [header, ["---"] * len(header), *rows]
    return Markdown(
        "\n".join(
            "| " + " | ".join(str(cell) for cell in line) + " |" for line in lines
        )
    )
