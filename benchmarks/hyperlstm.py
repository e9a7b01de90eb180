"""Time a step of HyperLSTM beside nn.LSTM and labml-nn's HyperLSTM: same sizes, one
run, repeats taken in turn.

labml-nn goes into a folder of its own, so that it changes no installed package:

    pip install --no-deps --target peers labml-nn==0.5.1 labml==0.5.3
    labml-helpers==0.4.89 python benchmarks/hyperlstm.py --peers peers --out
    results/04_speed.json
"""

import argparse
import functools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from minisupernet.hyperlstm import HyperLSTM
from minisupernet.recurrent import LayerNormLSTM

BASELINE, PEER = "minisupernet HyperLSTM", "labml-nn HyperLSTM"
WORK = ("forward", "forward_backward")


@dataclass(frozen=True)
class Size:
    """What is timed: `steps` of a sequence, `batch` sequences at once."""

    name: str
    batch: int
    inputs: int
    hidden: int
    hyper: int
    n_z: int
    steps: int = 32


SIZES = (
    Size("text of chapter 4", 32, 82, 96, 32, 4),
    Size("images of chapter 4", 64, 96, 96, 32, 4),
    Size("labml-nn's own experiment", 2, 512, 512, 16, 16),
    Size("characters in the paper", 128, 50, 1000, 128, 4, steps=4),
)


def peer_class(folder: Path) -> type[nn.Module]:
    """labml-nn's HyperLSTM from the folder it was installed into."""
    sys.path.append(str(folder))
    try:
        from labml_nn.hypernetworks.hyper_lstm import HyperLSTM as Peer
    except ImportError as error:
        sys.exit(
            f"labml-nn is not in {folder} ({error}); the top of {Path(__file__).name}"
            " says how to put it there."
        )
    return Peer


def networks(size: Size, peer: type[nn.Module]) -> dict[str, nn.Module]:
    """The four networks of this size; all take (T, B, inputs) and return the outputs
    first.
    """
    return {
        "nn.LSTM": nn.LSTM(size.inputs, size.hidden),
        "minisupernet LayerNormLSTM": LayerNormLSTM(size.inputs, size.hidden),
        BASELINE: HyperLSTM(
            size.inputs, size.hidden, hyper_size=size.hyper, n_z=size.n_z
        ),
        PEER: peer(size.inputs, size.hidden, size.hyper, size.n_z, 1),
    }


def forward(network: nn.Module, x: Tensor) -> None:
    """All steps without a graph."""
    with torch.no_grad():
        network(x)


def forward_backward(network: nn.Module, x: Tensor) -> None:
    """All steps, and the gradient of every parameter."""
    network.zero_grad()
    network(x)[0].square().mean().backward()


def measure(work: Callable[[], None], steps: int) -> tuple[float, float]:
    """Microseconds a step: on the clock, and of CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return (
        1e6 * (time.perf_counter() - wall) / steps,
        1e6 * (time.process_time() - cpu) / steps,
    )


def time_size(size: Size, peer: type[nn.Module], repeats: int) -> dict:
    """Medians over the repeats; in each repeat every network has its turn, so that a
    busy moment meets them all.
    """
    torch.manual_seed(0)
    x, found = torch.randn(size.steps, size.batch, size.inputs), networks(size, peer)
    times: dict[tuple[str, str], list] = {}
    for repeat in range(repeats + 2):  # the first two warm up
        for name, network in found.items():
            for work in (forward, forward_backward):
                step = functools.partial(work, network, x)
                taken = measure(step, size.steps)
                if repeat > 1:
                    times.setdefault((name, work.__name__), []).append(taken)
    medians = {
        key: [
            round(statistics.median(row[clock] for row in rows), 1) for clock in (0, 1)
        ]
        for key, rows in times.items()
    }
    return {
        **asdict(size),
        "parameters": {
            name: sum(p.numel() for p in network.parameters())
            for name, network in found.items()
        },
        "microseconds": {
            name: {
                work: dict(zip(("wall", "cpu"), medians[name, work], strict=True))
                for work in WORK
            }
            for name in found
        },
        "times_faster_than_peer": {
            work: {
                clock: round(
                    medians[PEER, work][place] / medians[BASELINE, work][place], 2
                )
                for place, clock in enumerate(("wall", "cpu"))
            }
            for work in WORK
        },
    }


def main() -> None:
    """Time every size and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--peers", type=Path, required=True, help="folder with labml-nn"
    )
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument(
        "--repeats", type=int, default=20, help="times each network is timed (20)"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    peer, sizes = peer_class(options.peers), []
    for size in SIZES:
        sizes.append(time_size(size, peer, options.repeats))
        print(size.name, sizes[-1]["times_faster_than_peer"], flush=True)
    document = {
        "threads": options.threads,
        "repeats": options.repeats,
        "cores": os.cpu_count(),
        "machine": f"{platform.machine()} CPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peer": f"labml-nn {version('labml-nn')}",
        "sizes": sizes,
    }
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
