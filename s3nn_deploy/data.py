"""Data sets by name: uint8 images, integer labels, a train and a held-out part."""

import gzip
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s3nn_deploy.errors import DeployError, suggestion


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images uint8 [N, C, H, W] (0..255) and labels int64 [N], to train on and held out."""

    name: str
    classes: tuple[str, ...]
    train_x: NDArray[np.uint8]
    train_y: NDArray[np.int64]
    test_x: NDArray[np.uint8]
    test_y: NDArray[np.int64]

    def quantised(self, bits: int) -> "Dataset":
        """The same images in 0 .. 2^bits - 1: of each pixel the highest `bits` of its eight."""
        return replace(self, train_x=self.train_x >> np.uint8(8 - bits), test_x=self.test_x >> np.uint8(8 - bits))


def _digits(_: Path | None) -> Dataset:
    """scikit-learn's 8x8 digits (1797 images, embedded in it): 0..16 stretched to 0..255, every class split 4 : 1."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    x = (images.reshape(-1, 1, 8, 8).astype(np.int64) * 255 // 16).astype(np.uint8)
    train_x, test_x, train_y, test_y = train_test_split(
        x, labels.astype(np.int64), test_size=0.2, random_state=0, stratify=labels
    )
    return Dataset("digits", tuple("0123456789"), train_x, train_y, test_x, test_y)


def _mnist(folder: Path | None) -> Dataset:
    """MNIST from its four IDX files (plain or .gz), in the data folder or its subfolder `mnist`."""
    parts = {}
    for part in (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    ):
        parts[part] = _idx(_find("mnist", folder, part, f"{part}.gz"))
    train_x, train_y, test_x, test_y = parts.values()
    return Dataset(
        "mnist",
        tuple("0123456789"),
        train_x[:, None],
        train_y.astype(np.int64),
        test_x[:, None],
        test_y.astype(np.int64),
    )


def _images(folder: Path | None) -> Dataset:
    """Your own images: PNG or JPEG of one size in train/<class>/ and test/<class>/ of the data folder; grey if the first one is.

    Source: the layout of torchvision's ImageFolder. Needs Pillow.
    """
    if folder is None:
        hint = "Name a folder with train/<class>/*.png and test/<class>/*.png by --data DIR or S3NN_DATA."
        raise DeployError("data set 'images'", "no data folder is given", hint=hint)
    try:
        pillow = import_module("PIL.Image")
    except ImportError as error:
        raise DeployError("data set 'images'", "needs Pillow", hint="Run: pip install pillow") from error
    found = {part: _image_files(folder / part) for part in ("train", "test")}
    classes = tuple(sorted(found["train"]))
    if unknown := sorted(set(found["test"]) - set(classes)):
        raise DeployError(str(folder / "test"), expected=f"classes {', '.join(classes)}", got=", ".join(unknown))
    with _open_image(pillow, found["train"][classes[0]][0]) as first:
        size, mode = first.size, "L" if first.mode in ("1", "L") else "RGB"
    arrays = {}
    for part, by_class in found.items():
        files = [(file, classes.index(name)) for name in sorted(by_class) for file in by_class[name]]
        shape = (len(files), len(mode), size[1], size[0])  # "L" has one channel, "RGB" three
        if (total := int(np.prod(shape, dtype=object))) > 1 << 32:
            raise DeployError(str(folder / part), expected="at most 4 GiB of pixels", got=f"{total:,} bytes")
        x = np.empty(shape, np.uint8)
        for row, (file, _) in zip(x, files, strict=True):
            with _open_image(pillow, file) as image:
                if image.size != size:
                    expected = f"{size[0]}x{size[1]} pixels, as the first image"
                    raise DeployError(str(file), expected=expected, got=f"{image.size[0]}x{image.size[1]}")
                try:
                    row[:] = np.asarray(image.convert(mode)).reshape(*size[::-1], len(row)).transpose(2, 0, 1)
                except (OSError, SyntaxError) as error:
                    raise DeployError(str(file), f"is not a readable image ({error})", hint="Save it again.") from error
        arrays[part] = x, np.array([label for _, label in files], np.int64)
    return Dataset("images", classes, *arrays["train"], *arrays["test"])


def _image_files(folder: Path) -> dict[str, list[Path]]:
    """The images in each subfolder."""
    places = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    files = {p.name: sorted(f for f in p.iterdir() if f.suffix.lower() in (".png", ".jpg", ".jpeg")) for p in places}
    empty = next((name for name, inside in files.items() if not inside), None)
    if not files or empty is not None:
        where = folder if empty is None else folder / empty
        raise DeployError(str(where), expected="PNG or JPEG images in a folder for each class", got="none")
    return files


def _open_image(pillow: Any, file: Path) -> Any:
    try:
        return pillow.open(file)
    except (OSError, pillow.DecompressionBombError) as error:
        raise DeployError(str(file), f"is not a readable image ({error})", hint="Save it again.") from error


DATASETS: dict[str, Callable[[Path | None], Dataset]] = {"digits": _digits, "mnist": _mnist, "images": _images}
"""Every data set by name."""


def load(name: str, folder: str | Path | None = None) -> Dataset:
    """A data set by name, from `folder` (by default `$S3NN_DATA`) where it is not embedded.

    Raises:
        DeployError: an unknown name, files that are missing, or damaged ones.
    """
    if name not in DATASETS:
        raise DeployError(f"data set {name!r}", "is not known", hint=suggestion(name, list(DATASETS)))
    folder = folder or os.environ.get("S3NN_DATA")
    return DATASETS[name](Path(folder) if folder else None)


def _find(name: str, folder: Path | None, *files: str) -> Path:
    hint = f"Put {files[0]} (or .gz) into a folder and name it with --data DIR or S3NN_DATA."
    if folder is None:
        raise DeployError(f"data set {name!r}", "is not embedded, and no data folder is given", hint=hint)
    for place in (folder, folder / name):
        for file in files:
            if (place / file).is_file():
                return place / file
    raise DeployError(
        f"data set {name!r}", expected=f"{files[0]} in {folder} or {folder / name}", got="no such file", hint=hint
    )


def _idx(path: Path) -> NDArray[np.uint8]:
    """An IDX file of unsigned bytes (the format of yann.lecun.com/exdb/mnist), its declared size checked against its length."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            magic = stream.read(4)
            if magic[:3] != b"\0\0\x08" or len(magic) < 4 or magic[3] > 4:
                raise ValueError(f"magic number {magic.hex()}")
            shape = tuple(int.from_bytes(stream.read(4), "big") for _ in range(magic[3]))
            size = int(np.prod(shape, dtype=object))
            if size > 1 << 30:
                raise ValueError(f"declares {size:,} bytes")
            content = stream.read(size + 1)
    except (OSError, EOFError, ValueError) as error:
        raise DeployError(str(path), f"is not a readable IDX file ({error})", hint="Fetch it again.") from error
    if len(content) != size:
        raise DeployError(
            str(path), expected=f"{size:,} bytes of data", got=f"{len(content):,}", hint="Fetch it again."
        )
    return np.frombuffer(content, np.uint8).reshape(shape)
