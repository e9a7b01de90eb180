"""How `make` sets up: by uv, by pip where pip has settings that uv does not read, and
by pip where uv fails.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
from support import ROOT

PYTHON = """#!/bin/sh
echo "$*" >> said.txt
case "$*" in
    "-m venv .venv") mkdir -p .venv/bin && cp python .venv/bin ;;
    "-m pip config list") echo "{config}" ;;
    *"{fails}"*) exit 1 ;;
esac
"""
UV, PIP = "-m uv pip install --compile-bytecode", "-m pip install -c constraints.txt -e"


def set_up(folder: Path, config: str, fails: str) -> tuple[int, list[str]]:
    """The exit status of `make setup` in `folder`, and the ways to install that it
    tried, with a Python whose pip says `config` and to which `fails` fails.
    """
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    (folder / "python").write_text(PYTHON.format(config=config, fails=fails))
    (folder / "python").chmod(0o755)
    command = ["make", "setup", "PYTHON=./python"]
    status = subprocess.run(command, cwd=folder, capture_output=True).returncode
    said = (folder / "said.txt").read_text().splitlines()
    return status, [way for line in said for way in (UV, PIP) if line.startswith(way)]


@pytest.mark.parametrize(
    ("config", "fails", "ways"),
    [
        ("global.extra-index-url='file:///wheels'", "nothing", [UV]),
        ("global.index-url='https://mirror/simple'", "nothing", [PIP]),
        (":env:.index-url='https://mirror/simple'", "nothing", [PIP]),
        ("", "constraints.txt uv", [PIP]),
        ("", UV, [UV, PIP]),
    ],
)
def test_uv_sets_up_where_it_can_and_pip_where_it_cannot(tmp_path, config, fails, ways):
    assert set_up(tmp_path, config, fails) == (0, ways)


def test_what_cannot_be_set_up_is_not_taken_for_ready(tmp_path):
    status, ways = set_up(tmp_path, "", "pip install")
    assert status and ways == [PIP]
    assert not (tmp_path / ".venv" / ".ready").exists()
