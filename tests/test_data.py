"""Data sets: what is embedded is there, what is missing says where to put it, damaged files are named."""

import gzip
import sys
from pathlib import Path

import numpy as np
import pytest

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
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DeployError, match="needs Pillow"):
        data.load("images", tmp_path)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_folder_of_images_is_read_by_class(mode: str, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    channels = len(mode)
    pixels = rng.integers(0, 256, (2, 3, 2, 5, 4, channels), dtype=np.uint8)
    for p, part in enumerate(("train", "test")):
        for c, name in enumerate(("cat", "dog", "emu")[: 3 - p]):
            (tmp_path / part / name).mkdir(parents=True)
            for k in range(2):
                array = pixels[p, c, k] if mode == "RGB" else pixels[p, c, k, :, :, 0]
                image.fromarray(array).save(tmp_path / part / name / f"{k}.png")
    made = data.load("images", tmp_path)
    assert made.classes == ("cat", "dog", "emu")
    assert np.array_equal(made.train_x, pixels[0].reshape(6, 5, 4, channels).transpose(0, 3, 1, 2))
    assert made.train_y.tolist() == [0, 0, 1, 1, 2, 2]
    assert np.array_equal(made.test_x, pixels[1, :2].reshape(4, 5, 4, channels).transpose(0, 3, 1, 2))
    assert made.test_y.tolist() == [0, 0, 1, 1]
    (tmp_path / "train" / "cat" / "2.png").write_bytes(b"no image")
    with pytest.raises(DeployError, match=r"2\.png.*not a readable image"):
        data.load("images", tmp_path)
    image.new(mode, (3, 3)).save(tmp_path / "train" / "cat" / "2.png")
    with pytest.raises(DeployError, match="expected 4x5 pixels"):
        data.load("images", tmp_path)
    (tmp_path / "test" / "fox").mkdir()
    with pytest.raises(DeployError, match=r"fox.*expected PNG or JPEG"):
        data.load("images", tmp_path)
    (tmp_path / "test" / "fox" / "1.PNG").write_bytes(b"")
    with pytest.raises(DeployError, match="expected classes cat, dog, emu, got fox"):
        data.load("images", tmp_path)
