"""Let docstrings be plain text with `code`, *emphasis* and tables, as they read in an
editor, not reStructuredText.
"""

import re
from itertools import groupby

__all__ = ["setup", "to_restructuredtext"]

CODE_OR_EMPHASIS = re.compile(r"(`+[^`]+`+|\*\w[\w ]*\*)")
MARKUP = re.compile(r"[*|]|(?<=\w)_(?!\w)")


def to_restructuredtext(lines: list[str]) -> list[str]:
    """Rewrite the lines of a docstring."""
    rewritten = []
    for is_table, group in groupby(
        lines, key=lambda line: line.lstrip().startswith("|")
    ):
        block = list(group)
        rewritten += table(block) if is_table else [text(line) for line in block]
    return rewritten


def text(line: str) -> str:
    """Make `code` literal, keep *emphasis*, and leave no other character with a meaning
    of its own.
    """
    pieces = CODE_OR_EMPHASIS.split(line)  # text, match, text, ...
    pieces[::2] = [MARKUP.sub(r"\\\g<0>", piece) for piece in pieces[::2]]
    pieces[1::2] = [
        f"``{match.strip('`')}``" if match.startswith("`") else match
        for match in pieces[1::2]
    ]
    return "".join(pieces)


def table(lines: list[str]) -> list[str]:
    """A table written with | as a list table; its second line is the rule under the
    header.
    """
    indent = lines[0][: len(lines[0]) - len(lines[0].lstrip())]
    directive = [".. list-table::", "   :header-rows: 1", ""]
    for line in [lines[0], *lines[2:]]:
        cells = [text(cell.strip()) for cell in line.strip().strip("|").split("|")]
        directive += [
            f"   {'*' if number == 0 else ' '} - {cell}"
            for number, cell in enumerate(cells)
        ]
    return [indent + line for line in [*directive, ""]]


def rewrite(app, what, name, member, options, lines: list[str]) -> None:
    lines[:] = to_restructuredtext(lines)


def setup(app) -> dict[str, bool]:
    app.connect(
        "autodoc-process-docstring", rewrite, priority=400
    )  # before napoleon, which reads "Args:"
    return {"parallel_read_safe": True}
