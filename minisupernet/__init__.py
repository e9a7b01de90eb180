"""Networks that make networks: the companion package of the course.

    import torch
    from minisupernet import SuperNet, TaskClassifier, WeightSpec, run_tasks
    target = TaskClassifier()  # any nn.Module without random or batch-coupled layers
    generator = SuperNet(WeightSpec.of(target), z_dim=16)
    weights = generator(torch.randn(5, 16))  # five task vectors -> {name: (5, *shape)}
    logits = run_tasks(target, weights, torch.randn(5, 20, 3, 32, 32))  # -> (5, 20)

Names are imported when they are first used, so that `import minisupernet` costs
nothing.
"""

from importlib import import_module

__version__ = "0.1.0"

FRONT_DOOR = {  # name -> the module that defines it
    "load": "data",
    "TaskImages": "data.tasks",
    "TaskClassifier": "target",
    "WeightSpec": "target",
    "run_tasks": "target",
    "widen": "net2net",
    "deepen": "net2net",
    "StaticHyperNet": "static_hypernet",
    "HyperLSTM": "hyperlstm",
    "SuperNet": "supernet",
    "PudNet": "pudnet",
    "LabelledNet": "labelled",
    "Fit": "fitting",
    "train_generator": "fitting",
    "fit_z": "fitting",
    "train_labelled": "labelled",
    "train": "training",
    "save": "export",
    "load_generator": "export",
    "network_of": "export",
    "fit_network": "export",
    "CourseError": "errors",
}
__all__ = [*FRONT_DOOR]


def __getattr__(name: str) -> object:
    """Import a name of the front door from its module."""
    if name not in FRONT_DOOR:
        raise AttributeError(f"module 'minisupernet' has no attribute {name!r}")
    return getattr(import_module(f"minisupernet.{FRONT_DOOR[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *FRONT_DOOR})
