"""Data sets by name: uint8 images, integer labels, a train and a held-out part."""

import gzip
import os
import pickletools
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s3nn_deploy.errors import DeployError, suggestion
from s3nn_deploy.files import MAX_BYTES, existing, read_arrays


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


def _idx_files(name: str, classes: tuple[str, ...], folder: Path | None) -> Dataset:
    """Four IDX files (plain or .gz), in the data folder's subfolder of that name or in the folder itself."""
    parts = [
        _idx(_find(name, folder, file, f"{file}.gz"))
        for file in (
            "train-images-idx3-ubyte",
            "train-labels-idx1-ubyte",
            "t10k-images-idx3-ubyte",
            "t10k-labels-idx1-ubyte",
        )
    ]
    shaped = [part[:, None] if part.ndim == 3 else part for part in parts]
    train = _labelled(f"{name}, training part", shaped[0], shaped[1], len(classes))
    test = _labelled(f"{name}, test part", shaped[2], shaped[3], len(classes))
    return Dataset(name, classes, *train, *test)


def _mnist(folder: Path | None) -> Dataset:
    """MNIST: 60,000 and 10,000 grey digits of 28x28."""
    return _idx_files("mnist", tuple("0123456789"), folder)


def _fashion_mnist(folder: Path | None) -> Dataset:
    """Fashion-MNIST: MNIST's shape and file names, so keep it in a subfolder of its own."""
    classes = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
    return _idx_files("fashion-mnist", classes, folder)


CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""CIFAR-10's classes, in the order of its labels."""


def _cifar10(folder: Path | None) -> Dataset:
    """CIFAR-10 (50,000 and 10,000 colour images of 32x32): its binary or Python batches, or images in train/<class>/."""
    binary = ([f"data_batch_{n}.bin" for n in range(1, 6)], ["test_batch.bin"])
    python = ([f"data_batch_{n}" for n in range(1, 6)], ["test_batch"])
    places = ("cifar10", "cifar-10-batches-bin", "cifar-10-batches-py")
    found = _cifar("cifar10", folder, places, binary, python, 1, b"labels")
    if found is None:
        pictures = next((p for p in _places(folder, "cifar10") if (p / "train" / CIFAR10[0]).is_dir()), None)
        if pictures is None:
            raise _missing(
                "cifar10",
                folder,
                "cifar-10-batches-bin/, cifar-10-batches-py/ or train/airplane/*.jpg",
                "Unpack CIFAR-10's archive (the binary or the Python version) into a folder",
            )
        return replace(_images(pictures), name="cifar10")
    return Dataset("cifar10", CIFAR10, *found[0], *found[1])


def _cifar100(folder: Path | None) -> Dataset:
    """CIFAR-100 by its 100 fine labels: its binary or Python files."""
    places = ("cifar100", "cifar-100-binary", "cifar-100-python")
    found = _cifar(
        "cifar100", folder, places, (["train.bin"], ["test.bin"]), (["train"], ["test"]), 100, b"fine_labels"
    )
    if found is None:
        raise _missing(
            "cifar100",
            folder,
            "cifar-100-binary/ or cifar-100-python/",
            "Unpack CIFAR-100's archive (the binary or the Python version) into a folder",
        )
    return Dataset("cifar100", tuple(map(str, range(100))), *found[0], *found[1])


def _cifar(
    name: str,
    folder: Path | None,
    subfolders: tuple[str, ...],
    binary: tuple[list[str], list[str]],
    python: tuple[list[str], list[str]],
    coarse: int,
    key: bytes,
) -> Any:
    """((train x, y), (test x, y)) from the files that are there; None where none are. `coarse` > 1: a coarse label comes first."""
    classes = max(coarse, 10)
    for place in _places(folder, *subfolders):
        for files, read in ((binary, _cifar_binary), (python, _cifar_python)):
            if not all((place / file).is_file() for part in files for file in part):
                continue
            made = []
            for part in files:
                parts = [read(place / file, int(coarse > 1), key) for file in part]
                x, y = (np.concatenate(column) for column in zip(*parts, strict=True))
                made.append(_labelled(str(place / part[0]), x.reshape(-1, 3, 32, 32), y, classes))
            return made
    return None


def _cifar_binary(path: Path, coarse: int, _: bytes) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Records of one label byte (CIFAR-100: the coarse one before it) and 3072 pixels."""
    size = path.stat().st_size
    record = 3073 + coarse
    if size == 0 or size % record or size > MAX_BYTES:
        raise DeployError(str(path), expected=f"records of {record} bytes", got=f"{size:,} bytes", hint=_AGAIN)
    records = np.fromfile(path, np.uint8).reshape(-1, record)
    return records[:, coarse + 1 :], records[:, coarse]


def _cifar_python(path: Path, _: int, key: bytes) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A pickled dictionary with `data` uint8 [N, 3072] and a list of labels, read without unpickling."""
    try:
        batch = read_pickled(path)
        data, labels = batch[b"data"], batch[key]
        if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != 3072 or not isinstance(labels, list):
            raise ValueError("holds no images [N, 3072] and labels")
        return data, np.array(labels, np.uint8)
    except (ValueError, KeyError, TypeError, IndexError, OverflowError, OSError) as error:
        raise DeployError(
            str(path),
            f"is not a readable CIFAR batch ({error})",
            hint="Fetch it again, or take CIFAR's binary version (.bin).",
        ) from error


def _npz(path: Path | None) -> Dataset:
    """Your own arrays: an .npz with uint8 train_x, test_x [N, C, H, W] or [N, H, W] and integer train_y, test_y [N]."""
    hint = (
        "Save uint8 train_x, test_x [N, C, H, W] and integer train_y, test_y [N] with numpy.savez; name it with --data."
    )
    if path is None or path.is_dir():
        inside = sorted(path.glob("*.npz")) if path is not None else []
        if len(inside) != 1:
            raise DeployError("data set 'npz'", expected="one .npz file", got=str(path or "no data folder"), hint=hint)
        path = inside[0]
    arrays = read_arrays(path)
    parts = []
    for part in ("train", "test"):
        try:
            x, y = arrays[f"{part}_x"], arrays[f"{part}_y"]
        except KeyError as error:
            raise DeployError(str(path), f"has no array {error}", hint=hint) from error
        if x.dtype != np.uint8 or x.ndim not in (3, 4) or y.dtype.kind not in "iu":
            got = f"{part}_x {x.dtype} {list(x.shape)}, {part}_y {y.dtype}"
            raise DeployError(str(path), expected="uint8 images and integer labels", got=got, hint=hint)
        parts.append((x[:, None] if x.ndim == 3 else x, y))
    classes = 1 + max(int(y.max(initial=0)) for _, y in parts)
    if parts[0][0].shape[1:] != parts[1][0].shape[1:]:
        got = f"{list(parts[0][0].shape)} and {list(parts[1][0].shape)}"
        raise DeployError(str(path), expected="train and test images of one shape", got=got, hint=hint)
    if classes > 1 << 16:
        raise DeployError(str(path), expected="labels 0 .. classes - 1", got=f"a label {classes - 1}", hint=hint)
    train, test = (_labelled(f"{path}, {p}", x, y, classes) for p, (x, y) in zip(("train", "test"), parts, strict=True))
    return Dataset("npz", tuple(map(str, range(classes))), *train, *test)


def _labelled(
    where: str, x: NDArray[np.uint8], y: NDArray[Any], classes: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images and labels that belong together."""
    if x.ndim != 4 or y.ndim != 1 or len(x) != len(y) or len(x) == 0:
        got = f"images {list(x.shape)}, labels {list(y.shape)}"
        raise DeployError(where, expected="as many labels as images", got=got, hint=_AGAIN)
    if not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise DeployError(where, expected=f"labels 0 to {classes - 1}", got=f"{y.min()} to {y.max()}", hint=_AGAIN)
    return x, y.astype(np.int64)


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


DATASETS: dict[str, Callable[[Path | None], Dataset]] = {
    "digits": _digits,
    "mnist": _mnist,
    "fashion-mnist": _fashion_mnist,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "images": _images,
    "npz": _npz,
}
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


_AGAIN = "Fetch it again."


def _places(folder: Path | None, *subfolders: str) -> list[Path]:
    return [] if folder is None else [*(folder / name for name in subfolders), folder]


def _missing(name: str, folder: Path | None, files: str, advice: str) -> DeployError:
    hint = f"{advice} and name it with --data DIR or S3NN_DATA."
    if folder is None:
        return DeployError(f"data set {name!r}", "is not embedded, and no data folder is given", hint=hint)
    expected = f"{files} in {folder} or {folder / name}"
    return DeployError(f"data set {name!r}", expected=expected, got="no such files", hint=hint)


def _find(name: str, folder: Path | None, *files: str) -> Path:
    for place in _places(folder, name):
        for file in files:
            if (place / file).is_file():
                return place / file
    raise _missing(name, folder, files[0], f"Put {files[0]} (or .gz) into a folder")


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
        raise DeployError(str(path), f"is not a readable IDX file ({error})", hint=_AGAIN) from error
    if len(content) != size:
        raise DeployError(str(path), expected=f"{size:,} bytes of data", got=f"{len(content):,}", hint=_AGAIN)
    return np.frombuffer(content, np.uint8).reshape(shape)


def read_pickled(path: Path) -> Any:
    """The plain data and uint8 arrays in a pickle, by its opcodes alone: nothing is imported or called.

    Only what CIFAR's Python batches consist of is understood (Python 2's or 3's texts, whole numbers, lists, tuples,
    dictionaries, and NumPy arrays of bytes); texts are given as bytes.

    Raises:
        ValueError: any other opcode, any other global than NumPy's array, or a damaged file.
    """
    content = existing(path).read_bytes() if path.stat().st_size <= MAX_BYTES else b""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        at = marks.pop()
        items = stack[at:]
        del stack[at:]
        return items

    value: Any
    for opcode, value, _ in pickletools.genops(content):
        name = opcode.name
        if name in ("PROTO", "FRAME", "STOP"):
            continue
        if name == "MARK":
            marks.append(len(stack))
        elif isinstance(value, int) and name in ("INT", "BININT", "BININT1", "BININT2", "LONG1"):
            stack.append(value)
        elif name in ("SHORT_BINSTRING", "BINSTRING"):
            stack.append(value.encode("latin-1"))
        elif name in ("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"):
            stack.append(value)
        elif name in ("SHORT_BINUNICODE", "BINUNICODE"):
            stack.append(value.encode())
        elif name in ("NONE", "NEWTRUE", "NEWFALSE"):
            stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
        elif name in ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_TUPLE"):
            stack.append([] if name == "EMPTY_LIST" else {} if name == "EMPTY_DICT" else ())
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name in ("APPENDS", "APPEND"):
            items = since_mark() if name == "APPENDS" else [stack.pop()]
            stack[-1].extend(items)
        elif name in ("SETITEMS", "SETITEM"):
            items = since_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[value] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[value])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            parts = value.split(" ") if name == "GLOBAL" else [part.decode() for part in (stack.pop(-2), stack.pop())]
            if tuple(parts) not in _PICKLED_GLOBALS:
                raise ValueError(f"names {'.'.join(parts)}, which could be code; it was not executed")
            stack.append(_Pickled(parts[1]))
        elif name == "REDUCE":
            arguments, what = stack.pop(), stack.pop()
            stack.append(_Pickled(what.name, arguments))
        elif name == "BUILD":
            state = stack.pop()
            stack[-1].build(state)
        else:
            raise ValueError(f"holds the opcode {name}")
    if len(stack) != 1:
        raise ValueError("is truncated")
    return _plain(stack[0])


_PICKLED_GLOBALS = {
    (module, name)
    for core in ("numpy.core.multiarray", "numpy._core.multiarray")
    for module, name in ((core, "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype"))
}


class _Pickled:
    """A global of a pickle, its arguments and its state, none of them used for anything but to read an array of bytes."""

    def __init__(self, name: str, arguments: tuple[Any, ...] = ()) -> None:
        self.name, self.arguments = name, arguments
        self.state: Any = ()

    def build(self, state: Any) -> None:
        self.state = state

    def array(self) -> NDArray[np.uint8]:
        """The array that `_reconstruct` with its state (version, shape, dtype, Fortran order, content) would give."""
        _, shape, dtype, fortran, content = self.state
        if self.name != "_reconstruct" or dtype.name != "dtype" or dtype.arguments[0] != b"u1" or fortran:
            raise ValueError(f"holds a {self.name} that is no array of bytes")
        return np.frombuffer(content, np.uint8).reshape(shape)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.array() if isinstance(value, _Pickled) else value
