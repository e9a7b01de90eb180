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

import minisupernet

FOLDER = Path(minisupernet.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(FOLDER).with_suffix("").parts)
    for path in FOLDER.rglob("*.py")
    if path.stem != "__init__"
)
LIBRARY = [
    name for name in MODULES if name not in ("__main__", "plots")
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
print(json.dumps([torch_seconds, own_seconds, sorted(set(sys.modules) - before)]))
"""


def import_in_new_process(*modules: str) -> list:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT, *modules], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_importing_is_quick_and_touches_no_cuda():
    runs = [import_in_new_process(*LIBRARY) for _ in range(2)]
    assert not HEAVY & set(runs[0][2])
    assert f"minisupernet.{LIBRARY[0]}" in runs[0][2]
    torch_seconds, own_seconds = (
        min(run[0] for run in runs),
        min(run[1] for run in runs),
    )
    assert own_seconds < 0.1 * torch_seconds, (
        f"{own_seconds:.2f} s beside torch's {torch_seconds:.2f} s"
    )


def public_names(module: str) -> list[tuple[str, object]]:
    """(dotted name, object) of what is in `__all__`, and of what its classes define in
    public.
    """
    loaded = importlib.import_module(f"minisupernet.{module}")
    found = []
    for name in loaded.__all__:
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


@pytest.mark.parametrize("module", MODULES)
def test_public_names_are_those_a_reader_sees(module):
    tree = ast.parse(
        (FOLDER / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    )
    names = importlib.import_module(f"minisupernet.{module}").__all__
    assert list(names) == sorted(set(names), key=names.index), (
        f"__all__ of {module} names something twice"
    )
    top = {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    if module != "__main__":
        assert {name for name in top if not name.startswith("_")} <= set(names), (
            f"__all__ of {module} misses a name"
        )


@pytest.mark.parametrize("module", MODULES)
def test_modules_and_functions_are_short(module):
    text = (FOLDER / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 270, f"{module}.py is long; is it two ideas?"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= 40, f"{module}.{node.name} has {lines} lines"
