"""What leaves the course: a trained generator in one file, and the networks it makes as
ordinary ones.

`save` and `load_generator` keep a generator, its task vectors, its classes, how their
pixels were scaled and what describes its target. `network_of` makes the classifier that
a z stands for, a plain module; `fit_network` finds that z for a new question:

    save("made.safetensors", generator, target, {"tasks": z}, images=images)
    saved = load_generator("made.safetensors", target)  # elsewhere
    network, z, history = fit_network(saved, target, new_images, labels)
    program = torch.export.export(network, (torch.zeros(2, 3, 32, 32),))

What `torch.export` writes runs without this package; so does a state dict, in the
target's own class.
"""

import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minisupernet import __version__
from minisupernet.data import ImageSet
from minisupernet.data.tasks import BinaryTasks, TaskImages
from minisupernet.errors import FileError, GeneratorError, TargetError, TaskError
from minisupernet.files import whole_file
from minisupernet.fitting import Fit, fit_z
from minisupernet.supernet import SuperNet
from minisupernet.target import TensorSpec, WeightSpec, copy_of
from minisupernet.training import History

__all__ = [
    "SavedGenerator",
    "fit_network",
    "from_pixels",
    "load_generator",
    "network_of",
    "save",
    "save_networks",
]

KIND, VERSION = "minisupernet generator", 1
ODD = ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError


@dataclass(frozen=True, eq=False)
class SavedGenerator:
    """What a file of a generator holds.

    `target` is the class of its target; `vectors` are task or class vectors, {name: (n,
    z_dim)}; `class_names` the classes in the order of their numbers; `mean` and `std`
    (3,) scale pixels from 0 to 1 (None where `save` was not told); `about` the versions
    it was made with, and whatever was noted.
    """

    generator: SuperNet
    target: str
    vectors: dict[str, Tensor] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    mean: Tensor | None = None
    std: Tensor | None = None
    about: dict[str, str] = field(default_factory=dict)


def save(
    path: str | Path,
    generator: SuperNet,
    target: nn.Module,
    vectors: Mapping[str, Tensor] | None = None,
    images: ImageSet | None = None,
    about: Mapping[str, str] | None = None,
) -> Path:
    """Write a generator and what belongs to it into one safetensors file, whole or not
    at all.

    Args:
        vectors: {name: (n, z_dim)}; `fit_network` starts at the mean of "tasks".
        images: those that it was trained on; the names of their classes are kept, and
            the mean and spread that normalise pixels.
        about: whatever else is to be noted.

    Raises:
        GeneratorError: for a generator that is no SuperNet.
        TargetError: where the target is not the one the generator makes weights for.
        FileError: where the file cannot be written.
    """
    _check_generator(generator)
    _check_target(generator.spec, target)
    made_with = {"minisupernet": __version__, "torch": torch.__version__}
    notes = {
        "kind": KIND,
        "version": VERSION,
        "target": type(target).__qualname__,
        "spec": [asdict(tensor) for tensor in generator.spec.tensors],
        "settings": _settings(generator),
        "class_names": list(images.class_names if images else ()),
        "about": made_with | dict(about or {}),
    }
    tensors = {f"generator.{n}": t for n, t in generator.state_dict().items()}
    tensors |= {f"vectors.{name}": own for name, own in (vectors or {}).items()}
    if images:
        tensors |= {"pixels.mean": images.mean, "pixels.std": images.std}
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
    try:
        saved = _saved(notes, tensors)
    except ODD as error:
        raise GeneratorError(
            f"{path} is a damaged file of a generator; save it again."
        ) from error
    if target is not None:
        _check_target(saved.generator.spec, target)
    return saved


def _saved(notes: dict, tensors: dict[str, Tensor]) -> SavedGenerator:
    """What the notes and tensors of a file stand for."""
    parts: dict[str, dict] = {"generator": {}, "vectors": {}, "pixels": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    spec = WeightSpec(tuple(_tensor_spec(**each) for each in notes["spec"]))
    settings, bias = dict(notes["settings"]), parts["generator"]["head_bias"]
    sparse, hidden = settings.pop("sparse"), tuple(settings.pop("hidden"))
    widths = [settings["z_dim"], *hidden, spec.size]
    numbers = sum((a + 1) * b for a, b in zip(widths, widths[1:], strict=False))
    if numbers != sum(own.numel() for own in parts["generator"].values()):
        raise ValueError("the weights are not those that are noted")
    with torch.random.fork_rng(devices=[]):
        generator = SuperNet(spec, hidden=hidden, **settings).to(bias.dtype)
    generator.load_state_dict(parts["generator"])
    generator.sparse = sparse
    about = {"class_names": tuple(notes["class_names"]), "about": dict(notes["about"])}
    kept = {"vectors": parts["vectors"], **about, **parts["pixels"]}
    return SavedGenerator(generator, notes["target"], **kept)


def _tensor_spec(
    name: str, shape: list[int], fan_in: int, fan_out: int, centre: float, spread: float
) -> TensorSpec:
    numbers = fan_in, fan_out, centre, spread
    plain = all(isinstance(number, int | float) for number in numbers)
    sides = all(isinstance(side, int) and side > 0 for side in shape)
    if not isinstance(name, str) or not plain or not sides:
        raise ValueError("what is noted of a tensor is of another form")
    return TensorSpec(name, tuple(shape), *numbers)


def network_of(target: nn.Module, generator: SuperNet, z: Tensor) -> nn.Module:
    """The ordinary network that a task vector z (z_dim,) stands for: a copy of the
    target with parameters of its own, in evaluation mode.

    Raises:
        TargetError: where the target is not the one the generator makes weights for.
        GeneratorError: for a z of another shape.
    """
    _check_generator(generator)
    if not isinstance(z, Tensor) or z.shape != (generator.z_dim,):
        found = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
        raise GeneratorError(
            f"z must be one vector of {generator.z_dim} numbers, not {found}."
        )
    _check_target(generator.spec, target)
    with torch.no_grad():
        weights = generator(z.to(generator.head_bias).unsqueeze(0))
        network = copy_of(target).requires_grad_(True).eval()
        for name, parameter in network.named_parameters():
            parameter.copy_(weights[name][0])
    return network


def from_pixels(network: nn.Module, mean: Tensor, std: Tensor) -> nn.Sequential:
    """The network behind a layer that normalises: it takes pixels from 0 to 1, (B, 3,
    H, W), and is made of PyTorch's own layers and yours.
    """
    scale = nn.BatchNorm2d(3, eps=0, affine=False)  # (x - mean) / sqrt(variance)
    scale.running_mean, scale.running_var = mean.clone(), std.square()
    return nn.Sequential(OrderedDict(pixels=scale, network=network)).eval()


def fit_network(
    saved: SavedGenerator,
    target: nn.Module,
    images: Tensor,
    labels: Tensor,
    fit: Fit | None = None,
    start: Tensor | None = None,
) -> tuple[nn.Sequential, Tensor, History]:
    """Find the z of a new question in a few of its images, and give the ordinary
    network that it stands for.

    A fifth of the images of each label are not fitted; the History tells the accuracy
    on them. The generator does not move.

    Args:
        images: (N, 3, 32, 32) uint8, five or more of each label.
        labels: (N,), 1 for yes and 0 for no.
        fit: by default 300 steps at a rate of 0.03.
        start: where z begins, (z_dim,); by default the mean of the file's "tasks".

    Returns:
        The network, which takes pixels from 0 to 1 (`from_pixels`); its z (z_dim,),
        all that has to be kept; and the History.

    Raises:
        GeneratorError: for images or labels of another form, too few of them, or a file
            without a start or the scale of pixels.
        TargetError: for a target that does not fit.
        FitError: for a start of another shape.
    """
    if saved.mean is None or saved.std is None:
        raise GeneratorError(
            "this generator's file does not say how pixels are scaled; save it with"
            " images=..., those that it was trained on."
        )
    if start is None:
        start = _mean_task(saved)
    data = _new_question(saved, images, labels)
    fit = fit or Fit(300, z_rate=0.03)
    place = saved.generator.head_bias.device
    start = start.to(place, saved.generator.head_bias.dtype)
    _check_target(saved.generator.spec, target)
    fitted, history = fit_z(saved.generator, target, data, fit, start)
    network = network_of(target, saved.generator, z := fitted[0])
    whole = from_pixels(network, data.images.mean, data.images.std)
    return whole, z, history


def _mean_task(saved: SavedGenerator) -> Tensor:
    if "tasks" not in saved.vectors:
        raise GeneratorError(
            "this generator's file has no vectors 'tasks' to start from; give start, a"
            f" vector of {saved.generator.z_dim} numbers."
        )
    return saved.vectors["tasks"].mean(0)


def _new_question(saved: SavedGenerator, images: Tensor, labels: Tensor) -> TaskImages:
    """The images of one question, "label 1 or label 0?", on the generator's device."""
    form = tuple(getattr(images, "shape", ()))
    pixels = isinstance(images, Tensor) and images.dtype == torch.uint8
    if not pixels or len(form) != 4 or form[1:] != (3, 32, 32):
        kind = getattr(images, "dtype", type(images).__name__)
        raise GeneratorError(
            f"images must be (N, 3, 32, 32) of torch.uint8, not {form} of {kind}."
        )
    labels = torch.as_tensor(labels)
    if labels.shape != form[:1] or not ((labels == 0) | (labels == 1)).all():
        raise GeneratorError(
            f"labels must be {form[0]} numbers, 1 for yes and 0 for no, one an image."
        )
    given = images, labels.long()
    names, scale = ("no", "yes"), (saved.mean, saved.std)
    # nothing is tested here: the second pair only has to be there
    whole = ImageSet("new", "given", *given, *given, names, None, (), *scale)
    try:
        device = saved.generator.head_bias.device
        return TaskImages(whole.to(device), BinaryTasks((1,), (0,)), validation=50)
    except TaskError as error:
        count = int(labels.sum())
        raise GeneratorError(
            "give five images or more of each label, not"
            f" {count} of yes and {len(labels) - count} of no."
        ) from error


def save_networks(
    folder: str | Path, target: nn.Module, generator: SuperNet, z: Mapping[str, Tensor]
) -> list[Path]:
    """Write the network of each named z (z_dim,) as `folder/<name>.safetensors`, the
    state dict of an ordinary network.

    Raises:
        GeneratorError: for a name that is no file's, or a z of another shape.
        FileError: where a file cannot be written.
    """
    if wrong := [name for name in z if not name or Path(name).name != name]:
        raise GeneratorError(
            f"'{wrong[0]}' is no name of a file; give one without folders."
        )
    paths = []
    for name, vector in z.items():
        network = network_of(target, generator, vector)
        paths.append(Path(folder) / f"{name}.safetensors")
        _write(paths[-1], network.state_dict(), {"target": type(target).__qualname__})
    return paths


def _settings(generator: SuperNet) -> dict:
    hidden = [layer.out_features for layer in generator.trunk]
    return {
        "z_dim": generator.z_dim,
        "hidden": hidden,
        "bound": generator.bound,
        "sparse": generator.sparse,
    }


def _check_generator(generator: object) -> None:
    if not isinstance(generator, SuperNet):
        raise GeneratorError(
            f"the generator must be a SuperNet, not {type(generator).__name__}; keep"
            " others by their state_dict()."
        )


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
            written = file.metadata() or {}
            if written.get("kind") != json.dumps(KIND):
                raise GeneratorError(
                    f"{path} holds no generator; give a file that `save` wrote."
                )
            notes = {name: json.loads(note) for name, note in written.items()}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except GeneratorError:
        raise
    except (SafetensorError, ValueError, RecursionError, OSError) as error:
        raise GeneratorError(
            f"{path} is no whole file of a generator; save it again."
        ) from error
    if (version := notes.get("version")) != VERSION:
        raise GeneratorError(
            f"{path} is of version {version}, this package reads {VERSION}; save it"
            " again with this one."
        )
    return notes, tensors
