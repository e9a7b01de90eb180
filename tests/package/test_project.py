"""What others need to join in: workflows that do what they can do anywhere, templates,
the dev container, Binder, and what CONTRIBUTING.md says.
"""

import json
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from support import NOTEBOOKS, ROOT

from minisupernet.course.commands import make_parser

GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml"))
FORMS = [path for path in FORMS if path.stem != "config"]
MAY_WRITE = {
    ("book", "publish"): {"pages": "write", "id-token": "write"},
    ("nightly", "report"): {"contents": "read", "issues": "write"},
    ("weekly", "report"): {"contents": "read", "issues": "write"},
}
FENCE = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
PLACE = re.compile(r"[\w.]+(/[\w.]+)*/|([\w.]+/)*[\w.-]*\.(py|md|yml|yaml|toml|txt)")

each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def read(path: Path) -> dict:
    """A YAML file; the key `on` of a workflow reads as True."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def targets() -> set[str]:
    """The targets of the Makefile that `make help` lists."""
    makefile = (ROOT / "Makefile").read_text()
    return set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE))


def jobs() -> list[tuple[str, str, dict]]:
    return [
        (path.stem, name, job)
        for path in WORKFLOWS
        for name, job in read(path)["jobs"].items()
    ]


def commands() -> list[str]:
    """What the steps of all workflows run."""
    steps = [step for _, _, job in jobs() for step in job["steps"]]
    return [step["run"] for step in steps if "run" in step]


def pinned(name: str) -> str:
    """The version of a package in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text()
    return re.search(rf"^{name}==(\S+)$", lines, re.MULTILINE)[1]


# The workflows


def test_every_job_is_a_command_that_runs_here_too():
    assert commands()
    for command in commands():
        runs, what, *_ = command.split() + [""]
        if runs == "make":
            assert what in targets(), command
        else:
            assert runs == ".ci/report" and os.access(ROOT / runs, os.X_OK), command
    asked = {command.split()[1] for command in commands()}
    assert {"html", "test", "test-long", "test-newest", "links", "colab"} <= asked


@each_workflow
def test_a_workflow_may_do_what_it_needs_and_ends(path):
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert "group" in workflow["concurrency"]
    for name, job in workflow["jobs"].items():
        assert job["runs-on"] == "ubuntu-latest"
        assert 0 < job["timeout-minutes"] <= 300
        granted = job.get("permissions")
        assert granted == MAY_WRITE.get((path.stem, name)), name


@each_workflow
def test_actions_are_official_and_of_a_stated_version(path):
    steps = [step for job in read(path)["jobs"].values() for step in job["steps"]]
    used = [step["uses"] for step in steps if "uses" in step]
    assert used
    for action in used:
        assert re.fullmatch(r"actions/[a-z-]+@v\d+", action), action
    bot = read(GITHUB / "dependabot.yml")["updates"]
    assert [each["package-ecosystem"] for each in bot] == ["github-actions"]


def test_an_action_has_one_version_everywhere():
    text = "".join(path.read_text() for path in WORKFLOWS)
    used = set(re.findall(r"uses: (\S+)@(\S+)", text))
    assert len(used) == len({name for name, _ in used})


def test_the_book_that_is_published_is_the_one_that_make_html_builds():
    build, publish = read(GITHUB / "workflows" / "book.yml")["jobs"].values()
    run, upload = build["steps"][-2:]
    assert run["run"] == "make html"
    assert upload["with"]["path"] == "_build/committed/html"
    assert publish["needs"] == "build"


@pytest.mark.parametrize("name", ["nightly", "weekly"])
def test_whatever_fails_at_night_is_reported(name):
    *others, report = read(GITHUB / "workflows" / f"{name}.yml")["jobs"].items()
    needs = report[1]["needs"]
    assert [each for each, _ in others] == (
        [needs] if isinstance(needs, str) else needs
    )
    assert report[1]["if"] == "failure()"
    assert report[1]["steps"][-1]["run"] == f".ci/report {name}"


GH = """#!/bin/sh
echo "$*" >> "$SAID"
case "$1 $2" in "issue list") echo "$OPEN" ;; esac
"""


@pytest.mark.parametrize("number", ["", "7"])
def test_there_is_one_issue_and_not_one_a_night(tmp_path, number):
    (tmp_path / "gh").write_text(GH)
    (tmp_path / "gh").chmod(0o755)
    github = {
        "GITHUB_SERVER_URL": "https://github.com",
        "GITHUB_REPOSITORY": "minisupernet/minisupernet",
        "GITHUB_RUN_ID": "12",
    }
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    here = {"PATH": path, "SAID": str(tmp_path / "said"), "OPEN": number}
    command = [ROOT / ".ci" / "report", "nightly"]
    subprocess.run(command, check=True, env=os.environ | github | here)
    said = (tmp_path / "said").read_text()
    assert said.startswith("issue list --label nightly --state open")
    assert ("issue create --label nightly" in said) == (number == "")
    if not number:
        address = "https://github.com/minisupernet/minisupernet/actions/"
        assert f"({address}runs/12)" in said
        assert f"({address}workflows/nightly.yml)" in said


@pytest.mark.parametrize("script", ["run", "report", "colab"])
def test_a_script_can_be_started_and_read(script):
    path = ROOT / ".ci" / script
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", path], check=True)


def test_colab_brings_what_the_package_needs_so_that_nothing_of_it_is_replaced():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {re.match(r"[\w-]+", each)[0] for each in project["dependencies"]}
    listed = (ROOT / ".ci" / "colab-runtime" / "pip-freeze.txt").read_text()
    assert needed <= set(re.findall(r"^([\w-]+)==", listed, re.MULTILINE))


def test_every_chapter_is_timed_at_night():
    sweep = read(ROOT / "sweeps" / "quick.yaml")
    assert sweep["grid"]["notebook"] == [int(path.name[:2]) for path in NOTEBOOKS]
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"sweeps/quick\.yaml .*--timeout 45\b", makefile)
    assert re.search(r"^test-long:.*\n(\t.*\n)*\t\$\(MAKE\) quick$", makefile, re.M)


# Templates


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_an_issue_form_asks_for_something(path):
    form = read(path)
    assert {"name", "description", "body"} <= set(form)
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    kinds = {field["type"] for field in fields}
    assert kinds <= {"input", "textarea", "dropdown", "checkboxes"}
    names = [field["id"] for field in fields]
    assert len(set(names)) == len(names)
    assert all(field["attributes"]["label"] for field in fields)
    assert any(field.get("validations", {}).get("required") for field in fields)


def test_there_are_forms_for_a_sentence_a_fault_and_an_idea():
    assert [path.stem for path in FORMS] == ["fault", "idea", "wrong_sentence"]


# Hooks


def test_hooks_check_with_the_ruff_of_the_tests():
    (local,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    asked = [
        package
        for hook in local["hooks"]
        for package in hook.get("additional_dependencies", ())
        if package.startswith("ruff")
    ]
    assert asked == [f"ruff=={pinned('ruff')}"] * 2


def test_hooks_strip_no_outputs_and_check_what_there_is():
    (local,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    entries = {hook["id"]: hook["entry"] for hook in local["hooks"]}
    assert not any("strip" in entry for entry in entries.values())
    assert "tests/book/test_notebooks.py" in entries["notebooks"]


# Machines of others


def test_the_dev_container_sets_up_by_make():
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    made = [value for name, value in container.items() if name.endswith("Command")]
    assert made == ["make setup"]
    settings = container["customizations"]["vscode"]["settings"]
    assert settings["python.defaultInterpreterPath"].endswith("/.venv/bin/python")
    recipe = ROOT / ".devcontainer" / container["build"]["dockerfile"]
    for needed in ("python3-venv", "make", "chromium"):
        assert re.search(rf"\b{needed}\b", recipe.read_text())


def test_binder_has_the_tested_versions_and_a_python_that_the_package_allows():
    lines = (ROOT / "binder" / "requirements.txt").read_text().splitlines()
    assert "-c ../constraints.txt" in lines and "-e ." in lines
    assert any("pytorch.org/whl/cpu" in line for line in lines)
    names = [line for line in lines if re.fullmatch(r"[\w-]+", line)]
    assert len(names) == 2 and all(pinned(name) for name in names)
    (python,) = (ROOT / "binder" / "runtime.txt").read_text().split()
    assert python == "python-3.11"  # that of constraints.txt


# What CONTRIBUTING.md says


def contributing() -> str:
    return (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def said_commands() -> list[str]:
    """The commands it shows, in blocks and within sentences."""
    blocks = "\n".join(FENCE.findall(contributing())).splitlines()
    return [*blocks, *INLINE.findall(contributing())]


def test_contributing_names_commands_that_are_there():
    made = [each.split() for each in said_commands() if each.startswith("make ")]
    assert len(made) > 5 and {each[1] for each in made} <= targets()
    module = "python -m minisupernet "
    ours = [each for each in said_commands() if each.startswith(module)]
    assert len(ours) > 3
    for command in ours:
        make_parser().parse_args(command.removeprefix(module).split())


def test_contributing_names_places_that_are_there():
    words = {word for each in said_commands() for word in each.split()}
    places = {word for word in words if PLACE.fullmatch(word)}
    places = {place for place in places if "NN_" not in place}
    assert len(places) > 20
    assert not [place for place in places if not (ROOT / place).exists()]


def test_contributing_is_found():
    assert "](CONTRIBUTING.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
    local = re.findall(r"\]\((?!https?:)([^)#]+)\)", contributing())
    assert local and all((ROOT / each).exists() for each in local)
