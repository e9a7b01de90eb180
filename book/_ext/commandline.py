"""The directive `commands`: every command of `python -m minisupernet` with all it can
be told, drawn from its own parser.
"""

import argparse
import re

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList

from minisupernet.course.commands import make_parser

__all__ = ["markdown", "setup"]


def markdown(parser: argparse.ArgumentParser) -> str:
    """A section for each command, in Markdown: what it does, and a table of what it can
    be told.
    """
    (commands,) = (each for each in parser._actions if each.choices)
    says = {each.dest: each.help for each in commands._choices_actions}
    sections = []
    for name, command in commands.choices.items():
        arguments = [each for each in command._actions if each.dest != "help"]
        words = [written(each) for each in arguments if not each.option_strings]
        options = ["[options]"] if len(words) < len(arguments) else []
        line = " ".join([parser.prog, name, *words, *options])
        said = f"{says[name][0].upper()}{says[name][1:]}. {command.description}"
        sections.append(f"## `{name}`\n\n{text(said)}\n\n```bash\n{line}\n```\n")
        if arguments:
            rows = [f"| `{written(each)}` | {text(each.help)} |" for each in arguments]
            sections.append("\n".join(["| Told | Says |", "|---|---|", *rows, ""]))
    return "\n".join(sections)


def written(argument: argparse.Action) -> str:
    """How an argument is written, with the words that it takes."""
    words = argument.metavar or argument.dest.upper()
    words = [words] if isinstance(words, str) else list(words)
    return " ".join([*argument.option_strings, *(words if argument.nargs != 0 else [])])


def text(words: str) -> str:
    """Words in Markdown, in which no character has a meaning of its own."""
    return re.sub(r"[\\`*_<|\[]", r"\\\g<0>", words)


class Commands(Directive):
    """The sections of all commands, in place of the directive."""

    def run(self) -> list[nodes.Node]:
        found, lines = nodes.section(), markdown(make_parser()).splitlines()
        text = StringList(lines, source="commands")
        self.state.nested_parse(text, self.content_offset, found, match_titles=True)
        return found.children


def setup(app) -> dict[str, bool]:
    app.add_directive("commands", Commands)
    return {"parallel_read_safe": True}
