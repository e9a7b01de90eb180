"""What leaves the course: a trained generator in one file, and the networks it makes as
ordinary ones.

`save` and `load_generator` keep a generator, its task vectors, its classes and what
describes its target. `network_of` makes the classifier that a z stands for, a plain
module that needs nothing of this package but its own class:

    network = network_of(target, generator, z)  # z (z_dim,)
    torch.save(network.state_dict(), "beaver_or_woman.pt")
    program = torch.export.export(network, (images,))  # or torch.onnx.export
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minisupernet.errors import FileError, GeneratorError, TargetError
from minisupernet.files import whole_file
from minisupernet.supernet import SuperNet
from minisupernet.target import TensorSpec, WeightSpec

__all__ = ["SavedGenerator", "load_generator", "network_of", "save", "save_networks"]

KIND, VERSION = "minisupernet generator", 1


@dataclass(frozen=True, eq=False)
class SavedGenerator:
    """What a file of a generator holds.

    `vectors` are task or class vectors, {name: (n, z_dim)}; `class_names` the classes
    in the order of the vectors; `about` whatever was noted, such as data and commit.
    """

    generator: SuperNet
    target: str
    vectors: dict[str, Tensor] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    about: dict[str, str] = field(default_factory=dict)


def save(
    path: str | Path,
    generator: SuperNet,
    target: nn.Module,
    vectors: Mapping[str, Tensor] | None = None,
    class_names: Sequence[str] = (),
    about: Mapping[str, str] | None = None,
) -> Path:
    """Write a generator and what belongs to it into one safetensors file, whole or not
    at all.

    Raises:
        TargetError: where the target is not the one the generator makes weights for.
        FileError: where the file cannot be written.
    """
    _check_target(generator.spec, target)
    notes = {
        "kind": KIND,
        "version": VERSION,
        "target": type(target).__qualname__,
        "spec": [asdict(tensor) for tensor in generator.spec.tensors],
        "settings": _settings(generator),
        "class_names": list(class_names),
        "about": dict(about or {}),
    }
    tensors = {f"generator.{n}": t for n, t in generator.state_dict().items()}
    tensors |= {f"vectors.{name}": own for name, own in (vectors or {}).items()}
    _write(Path(path), tensors, {name: json.dumps(n) for name, n in notes.items()})
    return Path(path)


def load_generator(path: str | Path, target: nn.Module | None = None) -> SavedGenerator:
    """Read what `save` wrote; nothing in the file is executed.

    Args:
        target: where given, it must be a network that the generator makes weights for.

    Raises:
        GeneratorError: for a file of another kind or version, or a damaged one.
        TargetError: for a target that does not fit.
    """
    notes, tensors = _read(Path(path))
    shapes = ({**each, "shape": tuple(each["shape"])} for each in notes["spec"])
    spec = WeightSpec(tuple(TensorSpec(**each) for each in shapes))
    settings = {**notes["settings"], "hidden": tuple(notes["settings"]["hidden"])}
    generator = SuperNet(spec, **settings)
    parts: dict[str, dict[str, Tensor]] = {"generator": {}, "vectors": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    generator.load_state_dict(parts["generator"])
    if target is not None:
        _check_target(spec, target)
    names, about = tuple(notes["class_names"]), notes["about"]
    kept = (parts["vectors"], names, about)
    return SavedGenerator(generator, notes["target"], *kept)


def network_of(target: nn.Module, generator: SuperNet, z: Tensor) -> nn.Module:
    """The ordinary network that a task vector z (z_dim,) stands for: a copy of the
    target with parameters of its own, in evaluation mode.

    Raises:
        TargetError: where the target is not the one the generator makes weights for.
        GeneratorError: for a z of another shape.
    """
    if z.ndim != 1:
        raise GeneratorError(f"z must be one vector (z_dim,), not {tuple(z.shape)}.")
    _check_target(generator.spec, target)
    with torch.no_grad():
        weights = generator(z.unsqueeze(0))
        network = copy.deepcopy(target).requires_grad_(True).eval()
        for name, parameter in network.named_parameters():
            parameter.copy_(weights[name][0])
    return network


def save_networks(
    folder: str | Path, target: nn.Module, generator: SuperNet, z: Mapping[str, Tensor]
) -> list[Path]:
    """Write the network of each named z (z_dim,) as `folder/<name>.safetensors`, the
    state dict of an ordinary network.

    Raises:
        FileError: where a file cannot be written.
    """
    paths = []
    for name, vector in z.items():
        network = network_of(target, generator, vector)
        paths.append(Path(folder) / f"{name}.safetensors")
        _write(paths[-1], network.state_dict(), {"target": type(target).__qualname__})
    return paths


def _settings(generator: SuperNet) -> dict:
    hidden = [layer.out_features for layer in generator.trunk]
    return {"z_dim": generator.z_dim, "hidden": hidden, "bound": generator.bound}


def _check_target(spec: WeightSpec, target: nn.Module) -> None:
    wanted = {tensor.name: tensor.shape for tensor in spec.tensors}
    found = {name: tuple(p.shape) for name, p in target.named_parameters()}
    for name in [*wanted, *found]:
        if wanted.get(name) != found.get(name):
            raise TargetError(
                f"the generator makes weights for another target: '{name}' is"
                f" {wanted.get(name, 'nothing')} there and"
                f" {found.get(name, 'nothing')} in this {type(target).__name__}."
            )


def _write(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
    own = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    with whole_file(path) as part:
        try:
            save_file(own, part, dict(notes))
        except SafetensorError as error:
            raise FileError(f"cannot write {path}: {error}") from error


def _read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """The notes and tensors of a file, checked to be one of `save`'s."""
    if not path.is_file():
        raise GeneratorError(f"there is no file {path}; check the path.")
    try:
        with safe_open(path, "pt") as file:
            notes = {n: json.loads(v) for n, v in (file.metadata() or {}).items()}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, ValueError) as error:
        raise GeneratorError(
            f"{path} is no whole file of a generator ({error}); save it again."
        ) from error
    if notes.get("kind") != KIND:
        raise GeneratorError(
            f"{path} holds no generator; give a file that `save` wrote."
        )
    if notes["version"] != VERSION:
        raise GeneratorError(
            f"{path} is of version {notes['version']}, this package reads {VERSION};"
            " save it again with this one."
        )
    return notes, tensors
