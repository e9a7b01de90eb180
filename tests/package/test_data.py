"""The image sets: what they hold, and one clear sentence for everything that can be
wrong with them.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from support import ROOT

from minisupernet.data import augment, load, normalise, shapes
from minisupernet.data.images import held_back, near_copies
from minisupernet.data.needs import NEEDS, Need, chapters_served
from minisupernet.errors import DataError
from minisupernet.files import data_folder

FOLDER = "cifar-100-python"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty data folder."""
    monkeypatch.setenv("MINISUPERNET_DATA", str(tmp_path / "images"))
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "images"


@pytest.fixture
def few_shapes(monkeypatch) -> None:
    """Shapes-100 with 2 + 1 images per class, so that a test need not wait for all of
    them.
    """
    draw = shapes.draw
    monkeypatch.setattr(
        shapes, "draw", lambda: draw(train_per_class=2, test_per_class=1)
    )


def one_sentence(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message and message.endswith(".")
    return message


# a small CIFAR-100 and a server that has it


def small_cifar100() -> dict[str, bytes]:
    """The three files of a CIFAR-100 with 2 train images and 1 test image per class."""
    rng = np.random.default_rng(0)
    files = {"meta": {"fine_label_names": [f"fine {i}" for i in range(100)]}}
    files["meta"]["coarse_label_names"] = [f"coarse {i}" for i in range(20)]
    for name, copies in (("train", 2), ("test", 1)):
        labels = list(range(100)) * copies
        images = rng.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
        files[name] = {
            "data": images,
            "fine_labels": labels,
            "coarse_labels": [label % 20 for label in labels],
        }
    return {name: pickle.dumps(content) for name, content in files.items()}


def packed(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{FOLDER}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def description(files: dict[str, bytes], archive: bytes, url: str) -> dict:
    """What torchvision would have to know of these files."""
    return {
        "url": url,
        "tgz_md5": md5(archive),
        "train_list": [["train", md5(files["train"])]],
        "test_list": [["test", md5(files["test"])]],
        "meta": {
            "filename": "meta",
            "key": "fine_label_names",
            "md5": md5(files["meta"]),
        },
    }


class Server:
    """Serves one archive, slowly or only in part, and counts the downloads."""

    def __init__(self, archive: bytes, sent: float = 1.0, seconds: float = 0.0):
        self.downloads = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.send_response(200)
                self.send_header("Content-Length", str(len(archive)))
                self.end_headers()

            def do_GET(self):
                self.do_HEAD()
                if (
                    self.headers["Method"] == "HEAD"
                ):  # torchvision first asks where the address leads
                    return
                server.downloads += 1
                time.sleep(seconds)
                self.wfile.write(archive[: int(sent * len(archive))])

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/cifar-100-python.tar.gz"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def cifar(monkeypatch):
    """Make torchvision describe the small CIFAR-100, at the address given."""
    datasets = pytest.importorskip(
        "torchvision.datasets", exc_type=(ImportError, RuntimeError)
    )
    files = small_cifar100()

    def describe(url: str, archive: bytes) -> dict[str, bytes]:
        for key, value in description(files, archive, url).items():
            monkeypatch.setattr(datasets.CIFAR100, key, value)
        return files

    return describe


@pytest.fixture
def stored(cifar, folder) -> Path:
    """The small CIFAR-100, already in the data folder."""
    place = folder / FOLDER
    place.mkdir(parents=True)
    for name, content in cifar("http://127.0.0.1:9/", b"").items():
        (place / name).write_bytes(content)
    return place


def test_cifar100_has_fine_and_coarse_classes(stored):
    images = load("cifar100")
    raw = pickle.loads((stored / "train").read_bytes())
    assert (
        images.name == "cifar100"
        and images.classes == 100
        and images.class_names[7] == "fine 7"
    )
    assert torch.equal(images.train_images.flatten(1), torch.from_numpy(raw["data"]))
    assert images.train_labels.tolist() == raw["fine_labels"]
    assert images.superclass_of.tolist() == [label % 20 for label in range(100)]
    assert images.superclass_names[19] == "coarse 19"


def test_statistics_are_those_of_the_train_images(stored):
    images = load("cifar100")
    scaled = images.train_images.double() / 255
    assert torch.allclose(images.mean.double(), scaled.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(
        images.std.double(), scaled.std((0, 2, 3), correction=0), atol=1e-6
    )
    normal = normalise(images.train_images, images.mean, images.std)
    assert normal.dtype == torch.float32
    assert torch.allclose(normal.mean((0, 2, 3)), torch.zeros(3), atol=1e-4)
    assert torch.allclose(normal.std((0, 2, 3)), torch.ones(3), atol=1e-4)


def test_checksum_tells_sets_apart(stored):
    images = load("cifar100")
    assert (
        images.checksum() == load("cifar100").checksum() == images.to("cpu").checksum()
    )
    changed = images.train_images.clone()
    changed[0, 0, 0, 0] += 1
    assert (
        dataclasses.replace(images, train_images=changed).checksum()
        != images.checksum()
    )


@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_missing_file_is_named(stored, name):
    (stored / name).unlink()
    with pytest.raises(
        DataError, match=f"{name} is missing; delete the folder"
    ) as error:
        load("cifar100")
    assert str(stored) in one_sentence(error)


@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_cut_file_is_named(stored, name):
    content = (stored / name).read_bytes()
    (stored / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(
        DataError, match=f"{name} is damaged or cut short.*delete the folder"
    ) as error:
        load("auto")
    one_sentence(error)


def test_wrong_md5_is_found_before_anything_is_unpickled(stored, tmp_path):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    (stored / "train").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(DataError, match="md5"):
        load("cifar100")
    assert not (tmp_path / "harm").exists()


def test_download_arrives_whole(cifar, folder):
    archive = packed(small_cifar100())
    with Server(archive) as server:
        cifar(server.url, archive)
        images = load("cifar100")
        load("cifar100")
    assert server.downloads == 1 and len(images.train_images) == 200
    assert sorted(
        path.name for path in folder.iterdir() if path.name != ".cifar100.lock"
    ) == [FOLDER]


@pytest.mark.parametrize("sent", [0.0, 0.5])
def test_download_cut_half_way_leaves_nothing(cifar, folder, sent):
    archive = packed(small_cifar100())
    with Server(archive, sent=sent) as server:
        cifar(server.url, archive)
        with pytest.raises(DataError, match="check the network") as error:
            load("cifar100")
    one_sentence(error)
    assert [
        path.name for path in folder.iterdir() if path.name != ".cifar100.lock"
    ] == []


def test_interrupted_download_leaves_nothing_and_can_be_repeated(
    cifar, folder, monkeypatch
):
    from torchvision.datasets import utils

    def interrupted(url, filename, *_, **__):
        Path(filename).write_bytes(b"half")
        raise KeyboardInterrupt

    archive = packed(small_cifar100())
    with Server(archive) as server:
        cifar(server.url, archive)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(utils, "_urlretrieve", interrupted)
            load("cifar100")
        assert [
            path.name for path in folder.iterdir() if path.name != ".cifar100.lock"
        ] == []
        assert load("cifar100").classes == 100


def test_what_a_killed_download_left_is_cleared(cifar, folder):
    (folder / ".cifar100-staging").mkdir(parents=True)
    (folder / ".cifar100-staging" / "cifar-100-python.tar.gz").write_bytes(b"half")
    archive = packed(small_cifar100())
    with Server(archive) as server:
        cifar(server.url, archive)
        assert load("cifar100").classes == 100
    assert not (folder / ".cifar100-staging").exists()


def test_no_network(cifar, folder):
    cifar("http://127.0.0.1:9/cifar-100-python.tar.gz", b"")
    with pytest.raises(DataError, match="check the network") as error:
        load("cifar100")
    one_sentence(error)
    assert not (folder / FOLDER).exists()


def test_an_archive_with_other_files_is_refused(cifar, folder):
    archive = packed(small_cifar100() | {"train": b"something else"})
    with Server(archive) as server:
        cifar(server.url, archive)
        with pytest.raises(DataError, match="not the official one"):
            load("cifar100")
    assert not (folder / FOLDER).exists()


def test_two_processes_download_once(cifar, folder, tmp_path):
    script = (
        "import json, sys, torchvision\n"
        "from minisupernet.data import load\n"
        "for key, value in json.load(open(sys.argv[1])).items():\n"
        "    setattr(torchvision.datasets.CIFAR100, key, value)\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "print(load('cifar100').checksum())\n"
    )
    files = small_cifar100()
    archive = packed(files)
    with Server(archive, seconds=1.0) as server:
        (tmp_path / "description.json").write_text(
            json.dumps(description(files, archive, server.url))
        )
        command = [sys.executable, "-c", script, str(tmp_path / "description.json")]
        pipes = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
        }
        processes = [subprocess.Popen(command, **pipes) for _ in range(2)]
        for process in processes:
            assert process.stdout.readline() == "ready\n", process.stderr.read()
        results = []
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        for process in processes:
            output, errors = process.communicate(timeout=60)
            assert process.returncode == 0, errors
            results.append(output)
    assert server.downloads == 1 and results[0] == results[1]


def test_cifar10_from_its_official_files(folder, monkeypatch):
    datasets = pytest.importorskip(
        "torchvision.datasets", exc_type=(ImportError, RuntimeError)
    )
    place, lists = folder / "cifar-10-batches-py", {"train_list": [], "test_list": []}
    place.mkdir(parents=True)
    for number, name in enumerate(["data_batch_1", "data_batch_2", "test_batch"]):
        content = pickle.dumps(
            {
                "data": np.full((10, 3072), number, dtype=np.uint8),
                "labels": list(range(10)),
            }
        )
        (place / name).write_bytes(content)
        lists["test_list" if name == "test_batch" else "train_list"].append(
            [name, md5(content)]
        )
    meta = pickle.dumps({"label_names": list("abcdefghij")})
    (place / "batches.meta").write_bytes(meta)
    monkeypatch.setattr(datasets.CIFAR10, "train_list", lists["train_list"])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", lists["test_list"])
    described = {"filename": "batches.meta", "key": "label_names", "md5": md5(meta)}
    monkeypatch.setattr(datasets.CIFAR10, "meta", described)
    images = load("cifar10")
    assert images.class_names == tuple("abcdefghij") and images.superclass_of is None
    assert (
        images.train_images[:, 0, 0, 0].tolist() == [0] * 10 + [1] * 10
        and (images.test_images == 2).all()
    )
    assert images.train_labels.tolist() == list(range(10)) * 2


def test_torchvision_that_does_not_load(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(DataError, match="pip install .*torch torchvision") as error:
        load("cifar100")
    assert torch.__version__ in one_sentence(error)


def test_torchvision_for_another_torch(folder, monkeypatch, tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(DataError, match="matched pair"):
        load("cifar100")


# the data folder and "auto"


def test_the_data_folder_is_the_one_named(monkeypatch, tmp_path):
    monkeypatch.setenv("MINISUPERNET_DATA", str(tmp_path / "here"))
    assert data_folder() == tmp_path / "here"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems, other folders")
def test_the_data_folder_is_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("MINISUPERNET_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert data_folder() == tmp_path / "cache" / "minisupernet"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data_folder() == Path.home() / ".cache" / "minisupernet"


def test_unwritable_folder_stops_a_download(cifar, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MINISUPERNET_DATA", str(tmp_path / "file" / "images"))
    with pytest.raises(
        DataError, match="set MINISUPERNET_DATA to a folder that you can write in"
    ) as error:
        load("cifar100")
    assert str(tmp_path / "file" / "images") in one_sentence(error)


def test_unwritable_folder_leaves_shapes_without_a_cache(
    few_shapes, monkeypatch, tmp_path, capsys
):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MINISUPERNET_DATA", str(tmp_path / "file" / "images"))
    assert load("shapes100").classes == 100
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and "drawn anew each time" in said[0]


def test_auto_takes_the_stand_in_without_torchvision_and_says_how_to_get_cifar(
    folder, few_shapes, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert load("auto").name == "shapes100"
    said = capsys.readouterr().out
    assert (
        said.count("\n") == 1
        and "stand-in" in said
        and "make data" in said
        and str(folder) not in said
    )


def test_auto_takes_cifar100_where_it_is(stored, capsys):
    assert load().name == "cifar100"
    assert "CIFAR-100 from the data folder" in capsys.readouterr().out


def test_auto_takes_cifar10_where_it_is(folder, capsys):
    folder.mkdir()
    save(folder / "cifar10.npz", class_names=np.array(["cat", "dog", "frog"]))
    images = load()
    assert images.name == "cifar10" and images.class_names == ("cat", "dog", "frog")
    assert images.superclass_of is None and images.superclass_names == ()
    assert "CIFAR-10 from the data folder" in capsys.readouterr().out


def test_unknown_name(folder):
    with pytest.raises(
        DataError, match="unknown image set 'cifar1000'; use 'auto'"
    ) as error:
        load("cifar1000")
    one_sentence(error)


# the cache of Shapes-100


def test_shapes_are_cached_and_old_drawings_removed(folder, few_shapes, monkeypatch):
    folder.mkdir()
    (folder / "shapes100-0000old0.npz").write_bytes(b"an old drawing")
    first = load("shapes100")
    assert [path.name for path in folder.iterdir()] == [
        f"shapes100-{shapes.version()}.npz"
    ]
    monkeypatch.setattr(shapes, "draw", lambda: pytest.fail("drawn again"))
    assert load("shapes100").checksum() == first.checksum()
    assert (
        first.superclass_names == shapes.shape_names()
        and len(first.superclass_of) == 100
    )


def test_a_damaged_cache_is_drawn_again(folder, few_shapes):
    first = load("shapes100")
    cache = next(folder.iterdir())
    whole = cache.read_bytes()
    cache.write_bytes(whole[: len(whole) // 2])
    assert load("shapes100").checksum() == first.checksum()
    assert len(cache.read_bytes()) == len(whole)


# .npz files


def save(path: Path, **changes) -> Path:
    """Write a good .npz of three classes with the changes given; None leaves an array
    out.
    """
    rng = np.random.default_rng(0)
    arrays = {
        "train_images": rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8),
        "train_labels": np.array([0, 1, 2, 0, 1, 2], dtype=np.uint8),
        "test_images": rng.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8),
        "test_labels": np.array([2, 1, 0]),
    }
    arrays |= changes
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def test_npz(tmp_path):
    path = save(
        tmp_path / "own.npz", other=np.array([{}], dtype=object)
    )  # an array the course does not ask for
    images = load(path)
    assert images.name == "own" and images.class_names == (
        "class 0",
        "class 1",
        "class 2",
    )
    assert (
        images.train_labels.dtype == torch.int64
        and images.train_labels.tolist() == [0, 1, 2, 0, 1, 2]
    )
    with np.load(path) as archive:
        assert images.train_images[4, 2, 5, 7] == archive["train_images"][4, 5, 7, 2]
    assert load(str(path)).checksum() == images.checksum()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_labels": None}, "needs the arrays train_images and train_labels"),
        ({"test_images": None}, "needs the arrays test_images and test_labels"),
        (
            {"train_images": np.zeros((6, 32, 32, 3))},
            "train_images .* must be uint8 .* not float64",
        ),
        (
            {"train_images": np.zeros((6, 3, 32, 32), np.uint8)},
            r"not uint8 \(6, 3, 32, 32\)",
        ),
        (
            {"test_images": np.zeros((3, 28, 28, 3), np.uint8)},
            r"not uint8 \(3, 28, 28, 3\)",
        ),
        ({"test_images": np.zeros((), np.uint8)}, "test_images .* must be uint8"),
        ({"test_images": np.zeros((0, 32, 32, 3), np.uint8)}, "N at least 1"),
        ({"train_labels": np.arange(6) * 0.5}, "train_labels .* must be integers"),
        (
            {"train_labels": np.zeros(5, int)},
            r"must be integers \(6,\), one for each image, not int64 \(5,\)",
        ),
        ({"test_labels": np.array([0, -1, 2])}, "not -1..2"),
        ({"test_labels": np.array([0, 1, 10**12])}, "must lie in 0..5"),
        (
            {"class_names": np.array(["cat", "dog"])},
            "must lie in 0..1, as there are 2 class names, not 0..2",
        ),
        (
            {"class_names": np.array([1, 2, 3])},
            "class_names .* must be a list of strings",
        ),
        (
            {"class_names": np.array(["cat", {}, None], dtype=object)},
            "not a whole .npz of plain arrays",
        ),
        (
            {"train_labels": np.array([0, 1, 2, 0, 1, 2], dtype=object)},
            "not a whole .npz of plain arrays",
        ),
    ],
)
def test_npz_that_is_not_as_described(tmp_path, changes, words):
    path = save(tmp_path / "own.npz", **changes)
    with pytest.raises(DataError, match=words) as error:
        load(path)
    assert str(path) in one_sentence(error)


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize(("first", "without"), [(1, None), (0, 2), (0, 0)])
def test_npz_with_a_gap_in_its_labels_is_refused(tmp_path, part, first, without):
    labels = [number for number in range(first, first + 6) if number != without]
    other = list(range(first + 6))  # the other part is whole
    sets = {part: np.repeat(labels, 3), ({"train", "test"} - {part}).pop(): other}
    arrays = {f"{name}_labels": np.array(numbers) for name, numbers in sets.items()}
    for name, numbers in sets.items():
        arrays[f"{name}_images"] = np.zeros((len(numbers), 32, 32, 3), np.uint8)
    empty = 0 if first else without
    words = (
        f"class {empty} in .* has no {part} images; number the classes from 0 without"
        " gaps"
    )
    with pytest.raises(DataError, match=words) as error:
        load(save(tmp_path / "own.npz", **arrays))
    one_sentence(error)


def test_npz_with_a_name_too_many_or_a_single_class_is_refused(tmp_path):
    names = np.array(["cat", "dog", "frog", "newt"])
    with pytest.raises(DataError, match="class 3 in .* has no train images"):
        load(save(tmp_path / "own.npz", class_names=names))
    labels = {"train_labels": np.zeros(6, int), "test_labels": np.zeros(3, int)}
    with pytest.raises(DataError, match="holds a single class; give at least two"):
        load(save(tmp_path / "own.npz", **labels))


def test_npz_that_is_missing(tmp_path):
    with pytest.raises(DataError, match="there is no file .*none.npz; check the path"):
        load(tmp_path / "none.npz")


@pytest.mark.parametrize("kept", [0, 1, 100, 10_000, -1])
def test_npz_cut_short(tmp_path, kept):
    path = save(tmp_path / "own.npz")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match="not a whole .npz"):
        load(path)


def test_npz_with_flipped_bytes_is_never_read_wrong(tmp_path):
    path = save(tmp_path / "own.npz")
    content, checksum = path.read_bytes(), load(path).checksum()
    for place in np.random.default_rng(1).integers(0, len(content), 100):
        path.write_bytes(
            content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]
        )
        with contextlib.suppress(DataError):
            assert load(path).checksum() == checksum


def test_other_files_named_npz(tmp_path):
    path = tmp_path / "own.npz"
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(DataError, match="not a whole .npz"):
        load(path)
    path.write_bytes(pickle.dumps({"train_images": 1}))
    with pytest.raises(DataError, match="not a whole .npz"):
        load(path)


# what a chapter needs


def image_file(path: Path, classes: int, train: int = 20, test: int = 10) -> Path:
    """An .npz with so many classes and so many black images of each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for part, count in (("train", train), ("test", test)):
        arrays[f"{part}_labels"] = np.arange(classes).repeat(count)
        arrays[f"{part}_images"] = np.zeros((classes * count, 32, 32, 3), np.uint8)
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("chapter", sorted(NEEDS))
def test_the_least_that_a_chapter_needs_serves_and_less_does_not(tmp_path, chapter):
    least = dataclasses.asdict(NEEDS[chapter])
    assert load(image_file(tmp_path / "own.npz", **least), chapter=chapter)
    for what in least:
        fewer = image_file(tmp_path / "own.npz", **least | {what: least[what] - 1})
        words = f"the file own.npz has .*fewer than the {least[what]} that chapter"
        with pytest.raises(DataError, match=f"{words} {chapter} needs") as error:
            load(fewer, chapter=chapter)
        one_sentence(error)


def test_auto_takes_what_serves_the_chapter_and_says_so(folder, few_shapes, capsys):
    image_file(folder / "cifar10.npz", classes=10)
    assert load(chapter=7).name == "cifar10"
    assert capsys.readouterr().out.startswith("Images: CIFAR-10 from the data folder")
    with pytest.raises(DataError, match="Shapes-100.* has 2 train images of class 0"):
        load(chapter=8)  # the stand-in of this test is smaller than the real one
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.startswith("Images: Shapes-100")
    assert "has 10 classes, fewer than the 12 that chapter 8 needs" in said


@pytest.mark.parametrize("page", ["notebooks/*your_own.ipynb", "book/setup.md"])
def test_the_minimum_that_the_book_states_is_the_one_that_is_asked(page):
    (path,) = ROOT.glob(page)
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = " ".join(cell.source for cell in nbformat.reads(text, 4).cells)
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", " ".join(text.split()))
    stated = re.search(
        r"(\d+) classes(?: on)?, with (\d+) training and (\d+) test images of each.*?"
        r"chapters (\d+) and (\d+) need (\d+) classes",
        text,
    )
    least, of_each = NEEDS[11], dataclasses.astuple(NEEDS[11])
    assert tuple(map(int, stated.groups()[:3])) == of_each
    others = {chapter: own for chapter, own in NEEDS.items() if own != least}
    more = Need(int(stated[6]))
    assert others == {int(stated[4]): more, int(stated[5]): more}
    assert "fifth is kept for validation, at most 50" in text
    assert held_back(100, 50) == 20 and held_back(1_000, 50) == 50


def test_which_chapters_a_set_serves_is_said_in_one_sentence(tmp_path):
    def said(classes: int) -> str:
        return chapters_served(load(image_file(tmp_path / "own.npz", classes)))

    assert said(12) == "Chapters 1, 2, 3, 4, 5, 6, 7, 8, 9, 11 run on these images."
    assert said(10).endswith(
        "chapter 9 does not: 10 classes, fewer than the 12 it needs."
    )
    assert said(4).startswith("No chapter runs on the file own.npz: 4 classes")
    with pytest.raises(DataError, match="chapter 10 reads no images"):
        load(tmp_path / "own.npz", chapter=10)


# augmentation


def numbered_images(*leading: int) -> torch.Tensor:
    """Images whose pixels are all different from 0."""
    return torch.randint(
        1,
        256,
        (*leading, 3, 32, 32),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(0),
    )


def test_near_copies_are_found_and_other_pictures_are_not(squares):
    random = torch.Generator().manual_seed(0)
    pictures = squares.train_images[:200]
    noise = torch.randint(-9, 10, pictures.shape, generator=random)
    lighter = torch.randint(-20, 21, (200, 1, 1, 1), generator=random)
    again = (pictures.int() + noise + lighter).clamp(0, 255).byte()
    assert near_copies(again[:20], pictures).all()
    order = torch.randperm(200, generator=random)
    assert near_copies(again[order], pictures[:100]).equal(order < 100)
    assert not near_copies(squares.test_images[:50], pictures).any()


def augmented(images: torch.Tensor, seed: int = 0, **options) -> torch.Tensor:
    return augment(images, torch.Generator().manual_seed(seed), **options)


def test_augment_keeps_the_form_and_follows_the_generator():
    images = numbered_images(4, 5)
    before = images.clone()
    changed = augmented(images, cutout=8)
    assert changed.shape == images.shape and changed.dtype == torch.uint8
    assert torch.equal(images, before) and not torch.equal(changed, images)
    assert torch.equal(changed, augmented(images, cutout=8))
    assert not torch.equal(changed, augmented(images, seed=1, cutout=8))
    assert torch.equal(augmented(images, flip=False, crop=0), images)
    assert torch.equal(augmented(images.flatten(0, 1), cutout=8), changed.flatten(0, 1))


def test_each_image_has_its_own_flip():
    images = numbered_images(400)
    changed = augmented(images, crop=0)
    kept = (changed == images).flatten(1).all(1)
    mirrored = (changed == images.flip(-1)).flatten(1).all(1)
    assert (kept ^ mirrored).all() and 150 < int(mirrored.sum()) < 250


def test_each_image_has_its_own_shift():
    images = numbered_images(500)
    changed = augmented(images, flip=False, crop=2)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    shifts = [
        (padded[:, :, i : i + 32, j : j + 32] == changed).flatten(1).all(1)
        for i in range(5)
        for j in range(5)
    ]
    found = torch.stack(shifts)
    assert (found.sum(0) == 1).all() and (found.sum(1) > 0).all()


def test_each_image_has_its_own_hole():
    images = numbered_images(500)
    changed = augmented(images, flip=False, crop=0, cutout=10)
    hole = (changed == 0).all(1)
    assert torch.equal(changed == 0, hole.unsqueeze(1).expand_as(changed))
    assert (hole.sum((1, 2)) == 100).all()
    assert (hole.any(1).sum(1) == 10).all() and (hole.any(2).sum(1) == 10).all()
    assert torch.equal(changed, images * ~hole.unsqueeze(1))
    assert (
        hole.any(2).any(0).all() and hole.any(1).any(0).all()
    )  # no row or column is spared


# the real images


@pytest.mark.skipif(
    not (data_folder() / FOLDER / "train").exists(),
    reason="the real CIFAR-100 is not in the data folder (make data)",
)
def test_the_real_cifar100():
    images = load("cifar100")
    assert images.train_images.shape == (
        50_000,
        3,
        32,
        32,
    ) and images.test_images.shape == (10_000, 3, 32, 32)
    assert (torch.bincount(images.train_labels) == 500).all() and (
        torch.bincount(images.test_labels) == 100
    ).all()
    assert (
        len(images.superclass_names) == 20
        and (torch.bincount(images.superclass_of) == 5).all()
    )
    assert (
        images.class_names == tuple(sorted(images.class_names))
        and images.class_names[99] == "worm"
    )
    assert (
        images.checksum()
        == "7c4367d597145cc291932ea6209535d919b11c21a1430648f0810a2d789fdecb"
    )
