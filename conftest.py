"""Under `pytest --nbval` notebooks meet what they met when their outputs were stored:
Shapes-100, no progress bars.
"""

import os

import pytest

from minisupernet.course.runs.notebooks import stand_in_folder


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("nbval", default=False):
        return
    os.environ["MINISUPERNET_DATA"] = str(stand_in_folder(config.rootpath))
    os.environ["TQDM_DISABLE"] = "1"
    processes = config.getoption("numprocesses", default=None) or 1
    os.environ.setdefault(
        "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes))
    )
    config.option.nbval_current_env = (
        True  # this Python, whatever kernel the notebook names
    )
