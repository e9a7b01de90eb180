"""What every module keeps to: documented, typed, short, and quick to import without
touching a GPU.
"""

import ast
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, nightly

import minisupernet

FOLDER = Path(minisupernet.__file__).parent
PATHS = {  # dotted name, without the package's, to file; a folder is named by itself
    ".".join(path.relative_to(FOLDER).with_suffix("").parts): path
    for path in FOLDER.rglob("*.py")
}
PATHS = {name.removesuffix(".__init__"): path for name, path in PATHS.items()}
MODULES = sorted(PATHS.keys() - {"__init__", "__main__"})
LIBRARY = [
    name for name in MODULES if name != "course.plots"
]  # plots may import matplotlib
HEAVY = {
    "torchvision",
    "matplotlib",
    "papermill",
    "nbformat",
    "jupyter_client",
    "IPython",
    "ipywidgets",
}

IMPORT = """
import json, sys, time
import minisupernet
front_door = sorted(set(sys.modules) & {"torch", "numpy"})
start = time.perf_counter()
import torch
torch_seconds = time.perf_counter() - start

def touched(*arguments, **settings):
    raise AssertionError("CUDA was touched at import")

for name in ("is_available", "device_count", "current_device", "_lazy_init"):
    setattr(torch.cuda, name, touched)
before = set(sys.modules)
start = time.perf_counter()
for name in sys.argv[1:]:
    __import__("minisupernet." + name)
own_seconds = time.perf_counter() - start
new = sorted(set(sys.modules) - before)
print(json.dumps([front_door, new, own_seconds / torch_seconds]))
"""


def import_in_new_process() -> tuple[list[str], list[str], float]:
    """What `import minisupernet` brings of torch and numpy, what its modules bring
    beside torch, and the seconds for that in units of torch's.
    """
    done = subprocess.run(
        [sys.executable, "-c", IMPORT, *LIBRARY], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_importing_costs_little_and_touches_no_cuda():
    """The front door nothing until a name is used; the modules nothing that is slow."""
    front_door, brought, _ = import_in_new_process()
    assert not front_door and not HEAVY & set(brought)
    assert {f"minisupernet.{name}" for name in LIBRARY} <= set(brought)


@nightly
def test_importing_is_quick():
    assert min(import_in_new_process()[2] for _ in range(5)) < 0.1


def public_names(module: str) -> list[tuple[str, object]]:
    """(dotted name, object) of what is in `__all__`, and of what its classes define in
    public.
    """
    loaded = importlib.import_module(f"minisupernet.{module}")
    found = []
    for name in getattr(loaded, "__all__", []):
        member = getattr(loaded, name)
        found.append((f"{module}.{name}", member))
        if inspect.isclass(member):
            own = (
                (inner, value)
                for inner, value in vars(member).items()
                if not inner.startswith("_")
            )
            found += [(f"{module}.{name}.{inner}", value) for inner, value in own]
    return found


def is_typed(function: object) -> bool:
    signature = inspect.signature(function)
    taken = [
        each.annotation
        for name, each in signature.parameters.items()
        if name not in ("self", "cls")
    ]
    return inspect.Signature.empty not in [*taken, signature.return_annotation]


@pytest.mark.parametrize("module", MODULES)
def test_public_names_are_documented_and_typed(module):
    assert importlib.import_module(f"minisupernet.{module}").__doc__
    wrong = []
    for name, member in public_names(module):
        function = getattr(member, "fget", None) or getattr(
            member, "__func__", member
        )  # a property, a class method
        if inspect.isfunction(function) and not is_typed(function):
            wrong.append(f"{name} is not typed")
        if inspect.isfunction(function) or inspect.isclass(function):
            described = inspect.getdoc(function) or name.endswith(
                ".forward"
            )  # its class says what forward does
            wrong += [] if described else [f"{name} has no docstring"]
    assert not wrong


def imported_names() -> dict[str, set[str]]:
    """For each module of the package, the names that others import from it."""
    found: dict[str, set[str]] = {module: set() for module in MODULES}
    folders = ("minisupernet", "benchmarks", "book/_ext")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    sources = [path.read_text(encoding="utf-8") for path in paths]
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources += ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.module:
                first, _, module = node.module.partition(".")
                if first == "minisupernet" and module in found:
                    found[module] |= {name.name for name in node.names}
    return found


def test_all_names_what_others_import():
    wrong = []
    for module, wanted in imported_names().items():
        loaded = importlib.import_module(f"minisupernet.{module}")
        listed = getattr(loaded, "__all__", [])
        assert len(listed) == len({*listed}), f"{module} lists a name twice"
        parts = {name for name in wanted if f"{module}.{name}" in PATHS}
        wrong += [
            f"{module} does not list {name}" for name in wanted - parts - {*listed}
        ]
        wrong += [
            f"{module} has no {name}" for name in listed if not hasattr(loaded, name)
        ]
        wrong += [f"{module} lists {name}" for name in listed if name.startswith("_")]
    assert not wrong


@pytest.mark.parametrize("module", MODULES)
def test_functions_are_short(module):
    for node in ast.walk(ast.parse(PATHS[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= 40, f"{module}.{node.name} has {lines} lines"


def test_every_name_of_the_front_door_is_there_and_no_other():
    for name in minisupernet.__all__:
        assert getattr(minisupernet, name).__doc__, name
        assert name in dir(minisupernet)
    with pytest.raises(AttributeError, match="no attribute 'Supernet'"):
        minisupernet.Supernet  # noqa: B018


def test_the_example_at_the_front_door_runs():
    lines = minisupernet.__doc__.splitlines()
    example = [line[4:] for line in lines if line.startswith("    ")]
    names: dict[str, object] = {}
    exec("\n".join(example), names)
    assert len([line for line in example if line]) <= 6
    assert names["logits"].shape == (5, 20)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "\n".join(example).strip() in readme
