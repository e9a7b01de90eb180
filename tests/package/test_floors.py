"""The house has floors: imports lead down, never up, and never round in a circle."""

import ast
import shutil
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from support import ROOT

PACKAGE = ROOT / "minisupernet"
FLOORS = [  # from the ground up; a module imports from floors below its own
    {"errors"},
    {"files", "seeds", "recurrent"},
    {"data", "fast"},
    {"target"},
    {"training", "wiring"},
    {
        "net2net",
        "static_hypernet",
        "hyperlstm",
        "supernet",
        "pudnet",
        "classification",
        "optimizers",
    },
    {"fitting"},
    {"export", "labelled"},
    {"course.statistics", "course.records", "course.exercises", "course.explorer"},
    {"course.plots"},
    {"course.status", "course.studies", "course.report"},
    {"course.runs"},
    {"course.book"},
    {"course.commands"},
]
FREE_INSIDE = {"data", "fast", "course.studies", "course.report", "course.runs"}
MAIN = "__main__"


def modules(package: Path) -> dict[str, Path]:
    """Dotted name, without the package's, to file; a folder is named by itself."""
    found = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The package's modules that a file imports, inside functions and for types too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [name.name.split(".") for name in node.names]
            names = [".".join(each[1:]) for each in names if each[0] == "minisupernet"]
            found |= {name for name in names if name in known}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name} has a relative import"
            first, _, inside = node.module.partition(".")
            if first == "minisupernet":
                names = [each.name for each in node.names if each.name != "__version__"]
                full = [f"{inside}.{name}".lstrip(".") for name in names]
                found |= {each if each in known else inside for each in full}
    return found


def room(module: str) -> str:
    """The entry of FLOORS that a module belongs to."""
    rooms = {room for floor in FLOORS for room in floor}
    parts = module.split(".")
    while parts and ".".join(parts) not in rooms:
        parts.pop()
    return ".".join(parts)


def faults(package: Path) -> list[str]:
    """Every import that leads up, across or round, in words."""
    known, found = modules(package), []
    height = {room: level for level, floor in enumerate(FLOORS) for room in floor}
    graph = {module: imports(path, known) for module, path in known.items()}
    for module, wanted in graph.items():
        own = room(module)
        if own not in height:
            if module not in ("", "course", MAIN):
                found.append(f"{module} is on no floor")
            continue
        for other in wanted:
            theirs = room(other)
            inside = own == theirs and own in FREE_INSIDE
            if not inside and height.get(theirs, 99) >= height[own]:
                found.append(f"{module} imports {other}")
    if graph.get(MAIN, set()) - {"course.commands"}:
        found.append("__main__ imports more than the commands")
    if graph.get("", set()):
        found.append("importing the package imports a part of it")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"a circle: {' -> '.join(error.args[1])}")
    return found


def test_imports_lead_down():
    assert not faults(PACKAGE)


def test_every_room_is_there():
    named = {room(module) for module in modules(PACKAGE)}
    assert {room for floor in FLOORS for room in floor} <= named


@pytest.mark.parametrize(
    ("module", "line", "fault"),
    [
        (
            "supernet",
            "from minisupernet.course import plots",
            "supernet imports course.plots",
        ),
        (
            "supernet",
            "from minisupernet.pudnet import PudNet",
            "supernet imports pudnet",
        ),
        (
            "data/tasks",
            "from minisupernet.target import run_tasks",
            "data.tasks imports target",
        ),
        (
            "files",
            "if TYPE_CHECKING:\n    from minisupernet.data import images",
            "files imports data.images",
        ),
        (
            "course/studies/arms",
            "from minisupernet.course.runs import jobs",
            "course.studies.arms imports course.runs.jobs",
        ),
        (
            "course/studies/geometry",
            "def f():\n    from minisupernet.course.studies import arms",
            "a circle",
        ),
        ("__init__", "import minisupernet.target", "importing the package imports"),
        ("attic", "import math", "attic is on no floor"),
    ],
)
def test_a_forbidden_import_is_found(module, line, fault, tmp_path):
    copy = tmp_path / "minisupernet"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    path = copy / f"{module}.py"
    path.write_text((path.read_text() if path.exists() else "") + f"\n{line}\n")
    assert any(each.startswith(fault) for each in faults(copy)), faults(copy)
