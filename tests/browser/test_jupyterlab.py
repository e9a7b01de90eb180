"""A notebook in JupyterLab, as a reader meets it: Run All, a progress bar that moves, a
slider that moves a picture. Nightly it is a whole chapter.

The test waits for what it asks, however slow the machine; it skips where JupyterLab or
Chromium is missing.
"""

import importlib.util
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from support import LONG, ROOT

from minisupernet.course.runs.notebooks import stand_in_folder

CHAPTER = "02_net2net"  # it has an explorer and progress bars, and runs quickly
MINUTE = 60_000  # in milliseconds
EXPLORER = ".jupyter-widgets.widget-vbox:has(img.widget-image)"

WATCH_BARS = """() => {
  window.shares = new Set();
  const texts = () => document.querySelectorAll(".jp-OutputArea-output pre");
  const shares = (text) => text.textContent.match(/\\d+%(?=\\|)/g) || [];
  const note = () => texts().forEach((text) => shares(text).forEach(
    (share) => window.shares.add(share)));
  const all = {subtree: true, childList: true, characterData: true};
  new MutationObserver(note).observe(document.body, all);
}"""
CODE_CELLS = """[...window.jupyterapp.shell.currentWidget.content.model.cells]
  .filter((cell) => cell.type === "code")"""
ERRORS = f"""() => {CODE_CELLS}
  .flatMap((cell) => cell.outputs.toJSON())
  .filter((output) => output.output_type === "error")
  .map((output) => `${{output.ename}}: ${{output.evalue}}`)"""
ALL_RAN = f"""() =>
  {CODE_CELLS}.every((cell) => cell.executionCount) || ({ERRORS})().length > 0"""
PICTURE = """async (image) => {
  const bytes = await (await fetch(image.src)).arrayBuffer();
  return [...new Uint8Array(bytes)].join();
}"""


def small(folder: Path) -> None:
    """A notebook of three cells: a bar that moves, an explorer, and text."""
    bar = "import time\n\nimport torch\n\nfrom minisupernet.training import train\n\n"
    bar += "model = torch.nn.Linear(1, 1)\n\n\ndef loss_at(step):\n"
    bar += (
        "    time.sleep(0.1)\n    return model(torch.ones(1, 1)).square().sum()\n\n\n"
    )
    bar += "sgd = torch.optim.SGD(model.parameters(), 0.1)\n"
    bar += "_ = train(model, sgd, loss_at, 40)"
    slider = "from minisupernet.course.explorer import explorer\n"
    slider += "from minisupernet.course.plots import new_figure\n\n"
    slider += "def draw(n):\n    figure, axes = new_figure()\n"
    slider += "    axes.plot([0, n])\n    return figure\n\n"
    slider += "explorer(draw, range(4), 'n', 'a line that grows', 'n = {}'.format)"
    cells = [new_code_cell(source) for source in (bar, slider, "print('the end')")]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(notebook, folder / f"{CHAPTER}.ipynb")


def without_outputs(chapter: str, folder: Path) -> None:
    """A copy of the chapter as nobody ran it, so that every count and output in it is
    new.
    """
    notebook = nbformat.read(ROOT / "notebooks" / f"{chapter}.ipynb", 4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, folder / f"{chapter}.ipynb")


def start(folder: Path, port: int, token: str) -> subprocess.Popen:
    """A JupyterLab of its own: its settings, its data and what it writes lie in
    `folder`.
    """
    settings = {
        f"JUPYTER_{name}_DIR": str(folder / name)
        for name in ("CONFIG", "DATA", "RUNTIME")
    }
    settings |= {
        f"JUPYTERLAB_{name}_DIR": str(folder / name)
        for name in ("SETTINGS", "WORKSPACES")
    }
    settings |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    settings |= {
        "IPYTHONDIR": str(folder / "ipython"),
        "MINISUPERNET_DATA": str(stand_in_folder(ROOT)),
    }
    tracker = (
        folder
        / "SETTINGS"
        / "@jupyterlab"
        / "notebook-extension"
        / "tracker.jupyterlab-settings"
    )
    tracker.parent.mkdir(parents=True)
    tracker.write_text('{"windowingMode": "none"}')  # cells out of sight are drawn, too
    options = {
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "ServerApp.root_dir": folder / "notebooks",
        "IdentityProvider.token": token,
        "LabApp.expose_app_in_browser": True,
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"--{name}={value}" for name, value in options.items()]
    environment = {
        name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"
    } | settings
    with (folder / "log.txt").open("w") as log:
        return subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )


@pytest.fixture
def lab(chromium, tmp_path) -> Iterator[str]:
    """The address of the chapter in a running JupyterLab, which ends with the test and
    takes its kernels along.
    """
    if importlib.util.find_spec("jupyterlab") is None:
        pytest.skip(
            "no JupyterLab here: python -m pip install -c constraints.txt -e"
            ' ".[notebooks]"'
        )
    (tmp_path / "notebooks").mkdir()
    if LONG:
        without_outputs(CHAPTER, tmp_path / "notebooks")
    else:
        small(tmp_path / "notebooks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    server = start(tmp_path, port, token)
    try:
        wait_for(
            server,
            f"http://127.0.0.1:{port}/api/status?token={token}",
            tmp_path / "log.txt",
        )
        yield f"http://127.0.0.1:{port}/lab/tree/{CHAPTER}.ipynb?token={token}"
    finally:
        end(server)


def wait_for(
    server: subprocess.Popen, address: str, log: Path, seconds: float = 180
) -> None:
    """Return when the server answers."""
    latest = time.monotonic() + seconds
    while server.poll() is None and time.monotonic() < latest:
        try:
            with urlopen(address, timeout=10):
                return
        except (URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")


def end(server: subprocess.Popen) -> None:
    """Ask the server to end its kernels and itself, and end what is left of its process
    group.
    """
    server.terminate()
    with suppress(subprocess.TimeoutExpired):
        server.wait(30)
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait(30)


def test_a_chapter_runs_in_jupyterlab(lab, chromium):
    tab = chromium.new_page(viewport={"width": 1400, "height": 1000})
    tab.set_default_timeout(5 * MINUTE)
    tab.goto(lab)
    tab.wait_for_function(
        "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status"
        " === 'idle'"
    )
    tab.evaluate(WATCH_BARS)
    tab.evaluate(
        "() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }"
    )
    # a bar came, and moved
    tab.wait_for_function("window.shares.size >= 3", timeout=5 * MINUTE)
    tab.wait_for_function(ALL_RAN, timeout=25 * MINUTE)
    assert tab.evaluate(ERRORS) == []

    explorer = tab.locator(EXPLORER).first
    image, slider, words = (
        explorer.locator(each) for each in ("img", ".noUi-handle", "div.widget-label")
    )
    seen = {image.evaluate(PICTURE): words.inner_text()}
    for count in (2, 3):
        address = image.get_attribute("src")
        slider.press("ArrowRight")
        tab.wait_for_function(
            "([image, before]) => image.src !== before",
            arg=[image.element_handle(), address],
        )
        seen[image.evaluate(PICTURE)] = words.inner_text()
        assert len(seen) == count and len(set(seen.values())) == count
    tab.close()
