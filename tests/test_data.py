"""Data sets: what is embedded is there, what is missing says where to put it, damaged files are named."""

import gzip
import io
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from s3nn_deploy import data
from s3nn_deploy.errors import DeployError


def idx(array: np.ndarray) -> bytes:
    return (
        bytes([0, 0, 8, array.ndim])
        + b"".join(n.to_bytes(4, "big") for n in array.shape)
        + array.astype(np.uint8).tobytes()
    )


def test_digits_are_uint8_and_split_alike_every_time() -> None:
    digits = data.load("digits")
    assert digits.train_x.shape == (1437, 1, 8, 8)
    assert digits.test_x.shape == (360, 1, 8, 8)
    assert digits.test_x.dtype == np.uint8
    assert (digits.train_x.min(), digits.train_x.max()) == (0, 255)
    assert np.array_equal(digits.test_x, data.load("digits").test_x)
    assert np.bincount(digits.test_y).min() >= 34
    assert digits.quantised(4).test_x.max() == 15


def test_mnist_is_read_from_idx_files_plain_or_compressed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (5, 28, 28)), rng.integers(0, 10, 5)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(images))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images[:2])))
    (tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels[:2])))
    monkeypatch.setenv("S3NN_DATA", str(tmp_path))
    mnist = data.load("mnist")
    assert np.array_equal(mnist.train_x[:, 0], images)
    assert np.array_equal(mnist.test_y, labels[:2])


def test_missing_and_damaged_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("S3NN_DATA", raising=False)
    with pytest.raises(DeployError, match="--data DIR or S3NN_DATA"):
        data.load("mnist")
    with pytest.raises(DeployError, match="train-images-idx3-ubyte"):
        data.load("mnist", tmp_path)
    with pytest.raises(DeployError, match="Did you mean 'mnist'"):
        data.load("mnits")
    path = tmp_path / "train-images-idx3-ubyte"
    for content, words in (
        (b"", "magic"),
        (idx(np.zeros((3, 4, 4)))[:-1], "expected 48 bytes"),
        (bytes([0, 0, 8, 3]) + b"\xff" * 12, "declares"),
    ):
        path.write_bytes(content)
        with pytest.raises(DeployError, match=words):
            data.load("mnist", tmp_path)


def test_a_folder_of_images_needs_pillow_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("S3NN_DATA", raising=False)
    with pytest.raises(DeployError, match=r"train/<class>/\*\.png"):
        data.load("images")
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(DeployError, match="needs Pillow"):
        data.load("images", tmp_path)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_folder_of_images_is_read_by_class(mode: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    channels = len(mode)
    pixels = rng.integers(0, 256, (2, 3, 2, 5, 4, channels), dtype=np.uint8)
    for p, part in enumerate(("train", "test")):
        for c, name in enumerate(("cat", "dog", "emu")[: 3 - p]):
            (tmp_path / part / name).mkdir(parents=True)
            for k in range(2):
                array = pixels[p, c, k] if mode == "RGB" else pixels[p, c, k, :, :, 0]
                Image.fromarray(array).save(tmp_path / part / name / f"{k}.png")
    made = data.load("images", tmp_path)
    assert made.classes == ("cat", "dog", "emu")
    assert np.array_equal(made.train_x, pixels[0].reshape(6, 5, 4, channels).transpose(0, 3, 1, 2))
    assert made.train_y.tolist() == [0, 0, 1, 1, 2, 2]
    assert np.array_equal(made.test_x, pixels[1, :2].reshape(4, 5, 4, channels).transpose(0, 3, 1, 2))
    assert made.test_y.tolist() == [0, 0, 1, 1]
    (tmp_path / "train" / "cat" / "2.png").write_bytes(b"no image")
    with pytest.raises(DeployError, match=r"2\.png.*not a readable image"):
        data.load("images", tmp_path)
    Image.new(mode, (3, 3)).save(tmp_path / "train" / "cat" / "2.png")
    with pytest.raises(DeployError, match="expected 4x5 pixels"):
        data.load("images", tmp_path)
    (tmp_path / "test" / "fox").mkdir()
    with pytest.raises(DeployError, match=r"fox.*expected PNG or JPEG"):
        data.load("images", tmp_path)
    (tmp_path / "test" / "fox" / "1.PNG").write_bytes(b"")
    with pytest.raises(DeployError, match="expected classes cat, dog, emu, got fox"):
        data.load("images", tmp_path)


def batch(rng: np.random.Generator, n: int, classes: int) -> tuple[np.ndarray, list[int]]:
    return rng.integers(0, 256, (n, 3072), dtype=np.uint8), [int(k) for k in rng.integers(0, classes, n)]


def python2_pickle(batch: dict[bytes, object]) -> bytes:
    """Protocol 2 with Python 2's short strings in the place of bytes, as CIFAR's own files have them."""

    class Old(pickle._Pickler):  # the pure Python pickler: its opcodes can be chosen
        dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012

        def save_bytes(self, text: bytes) -> None:
            if len(text) < 256:
                self.write(pickle.SHORT_BINSTRING + bytes([len(text)]) + text)
            else:
                self.write(pickle.BINSTRING + len(text).to_bytes(4, "little") + text)
            self.memoize(text)

        dispatch[bytes] = save_bytes

    stream = io.BytesIO()
    Old(stream, 2).dump(batch)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["bin", "python 2", "python 3"])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_read_from_its_own_batches(name: str, kind: str, tmp_path: Path) -> None:
    rng, classes = np.random.default_rng(0), 10 if name == "cifar10" else 100
    files = [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"] if classes == 10 else ["train", "test"]
    made = {}
    for file in files:
        x, y = made[file] = batch(rng, 4, classes)
        if kind == "bin":
            coarse = [[7]] * 4 if classes == 100 else [[]] * 4
            rows = b"".join(bytes([*c, k]) + row.tobytes() for c, k, row in zip(coarse, y, x, strict=True))
            (tmp_path / f"{file}.bin").write_bytes(rows)
        else:
            table = {b"data": x, (b"labels" if classes == 10 else b"fine_labels"): y, b"batch_label": b"one of them"}
            (tmp_path / file).write_bytes(python2_pickle(table) if kind == "python 2" else pickle.dumps(table, 4))
    found = data.load(name, tmp_path)
    want = [made[file] for file in files[:-1]]
    assert np.array_equal(found.train_x.reshape(-1, 3072), np.concatenate([x for x, _ in want]))
    assert found.train_y.tolist() == [k for _, y in want for k in y]
    assert np.array_equal(found.test_x.reshape(-1, 3072), made[files[-1]][0])
    assert len(found.classes) == classes


def test_a_pickle_with_code_in_it_is_named_and_not_executed(tmp_path: Path) -> None:
    class Bad:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "executed",))

    for file in [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]:
        (tmp_path / file).write_bytes(pickle.dumps({b"data": Bad(), b"labels": []}))
    with pytest.raises(DeployError, match="which could be code; it was not executed"):
        data.load("cifar10", tmp_path)
    assert not (tmp_path / "executed").exists()


def test_damaged_and_missing_cifar_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DeployError, match=r"cifar-10-batches-bin/, cifar-10-batches-py/ or train/airplane"):
        data.load("cifar10", tmp_path)
    files = [*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"]
    for file in files:
        (tmp_path / file).write_bytes(bytes(3073))
    assert data.load("cifar10", tmp_path).train_y.tolist() == [0] * 5
    (tmp_path / files[2]).write_bytes(bytes(3072))
    with pytest.raises(DeployError, match=r"data_batch_3\.bin.*expected records of 3073 bytes"):
        data.load("cifar10", tmp_path)
    (tmp_path / files[2]).write_bytes(bytes([10]) + bytes(3072))
    with pytest.raises(DeployError, match="expected labels 0 to 9"):
        data.load("cifar10", tmp_path)


def test_own_arrays_are_read_from_an_npz(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "train_x": rng.integers(0, 256, (5, 3, 6, 4), dtype=np.uint8),
        "train_y": np.array([0, 1, 2, 1, 0]),
        "test_x": rng.integers(0, 256, (2, 3, 6, 4), dtype=np.uint8),
        "test_y": np.array([3, 0], np.uint8),
    }
    np.savez(tmp_path / "own.npz", **arrays)
    for place in (tmp_path, tmp_path / "own.npz"):
        found = data.load("npz", place)
        assert np.array_equal(found.test_x, arrays["test_x"])
        assert found.test_y.tolist() == [3, 0]
        assert found.classes == ("0", "1", "2", "3")
    for change, words in (
        ({"train_y": np.array([0, 1])}, "as many labels as images"),
        ({"test_x": arrays["test_x"].astype(np.float32)}, "uint8 images"),
        ({"test_y": np.array([-1, 0])}, "got -1"),
        ({"test_x": arrays["test_x"][..., :3]}, "one shape"),
        ({"train_x": np.array([{}], dtype=object)}, "not a readable"),
    ):
        np.savez(tmp_path / "own.npz", **{**arrays, **change})
        with pytest.raises(DeployError, match=words):
            data.load("npz", tmp_path)
