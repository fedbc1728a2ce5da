"""Reading untrusted files with care, and writing files that are either the old one or the new one."""

import contextlib
import hashlib
import json
import mmap
import os
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from s3nn_deploy.errors import DeployError

MAX_BYTES = 4 << 30
"""The most memory that arrays read from one file may take."""

MAX_TEXT = 16 << 20
"""The most bytes that one text of an HDF5 file may have."""

HEAP = b"GCOL\x01\0\0\0"
"""How a heap of texts begins in an HDF5 file."""


def builtin(kind: str) -> Path:
    """The folder of shipped `targets` or `models`: inside the wheel, or beside the package in a checkout."""
    packaged = Path(str(files("s3nn_deploy"))) / kind
    return packaged if packaged.is_dir() else Path(__file__).resolve().parent.parent / kind


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; on success move it into place, on any failure remove it.

    Raises:
        DeployError: the place cannot be written, or the disk is full.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise DeployError(str(path), f"cannot be written: {error}", hint="Choose another place with --out.") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask()
        temporary.chmod(mode)
        temporary.replace(path)
    except OSError as error:
        hint = "The old file, if there was one, is unchanged. Free some space or choose another place."
        raise DeployError(str(path), f"writing failed: {error}", hint=hint) from error
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | Path, text: str) -> Path:
    """Write `text` to `path` in one move."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def write_npz(path: str | Path, meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Path:
    """Write a `meta` dictionary (plain data) and named arrays to one compressed `.npz`, without pickles."""
    text = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)
    with replacing(path) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **{"meta.json": text}, **arrays)
    return Path(path)


def read_npz(path: str | Path, schema: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read what `write_npz` wrote. Every array's size is taken from its header and added up before any is loaded.

    Raises:
        DeployError: no such file, not such a file, another schema, an object array, or more than `MAX_BYTES`.
    """
    path = existing(path)
    try:
        arrays = _arrays(path)
        meta = json.loads(arrays.pop("meta.json").tobytes().decode())
        if not isinstance(meta, dict) or meta.get("schema") != schema:
            found = meta.get("schema") if isinstance(meta, dict) else type(meta).__name__
            raise ValueError(f"expected schema {schema!r}, got {found!r}")
    except _DAMAGED as error:
        hint = "The file is truncated, damaged, or was not written by s3nn-deploy."
        raise DeployError(str(path), f"is not a readable {schema} file ({error})", hint=hint) from error
    return meta, arrays


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """The named arrays of any `.npz` without pickles; sizes are checked as in `read_npz`.

    Raises:
        DeployError: no such file, not such a file, an object array, or more than `MAX_BYTES`.
    """
    path = existing(path)
    try:
        return _arrays(path)
    except _DAMAGED as error:
        hint = "Save it with numpy.savez, without objects."
        raise DeployError(str(path), f"is not a readable .npz file ({error})", hint=hint) from error


_DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile, RecursionError)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        total = 0
        for entry in archive.infolist():
            with archive.open(entry) as stream:
                total += _declared_bytes(stream, entry)
        if total > MAX_BYTES:
            raise ValueError(f"declares {total:,} bytes of arrays; the limit is {MAX_BYTES:,}")
    with np.load(path, allow_pickle=False) as loaded:
        return {name: loaded[name] for name in loaded.files}


def _declared_bytes(stream: Any, entry: zipfile.ZipInfo) -> int:
    version = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(stream)
    if dtype.hasobject or any(n < 0 for n in shape):
        raise ValueError(f"array {entry.filename!r} has dtype {dtype} and shape {shape}")
    size = dtype.itemsize
    for n in shape:
        size *= n
    if size > entry.file_size:
        raise ValueError(f"array {entry.filename!r} declares {size:,} bytes but the file holds {entry.file_size:,}")
    return size


def existing(path: str | Path) -> Path:
    """`path`, if it is a file.

    Raises:
        DeployError: it is not.
    """
    path = Path(path)
    if not path.is_file():
        raise DeployError(str(path), "no such file" if not path.exists() else "is a folder, not a file")
    return path


def check_hdf5_heaps(path: Path) -> None:
    """Walk the heaps in which an HDF5 file keeps its texts: libhdf5 (2.0.0 too) loops for ever in a damaged one.

    See HDFGroup/hdf5 issue 1707; the layout is "Global Heap" in the HDF5 file format specification, with 8-byte lengths.

    Raises:
        ValueError: an object of a heap does not end within it.
    """
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = data.find(HEAP)
        while start >= 0:
            end = start + int.from_bytes(data[start + 8 : start + 16], "little")
            at = start + 16
            while at + 16 <= min(end, len(data)):
                size = int.from_bytes(data[at + 8 : at + 16], "little")
                taken = 16 + (size + 7) // 8 * 8 if data[at : at + 2] != b"\0\0" else size
                if taken < 16 or at + taken > end:
                    raise ValueError(f"the heap of texts at byte {start} is damaged")
                at += taken
            start = data.find(HEAP, start + 8)


def check_hdf5_texts(dataset: Any) -> None:
    """Look up the lengths of a data set's texts before libhdf5, which takes the memory first and then sees what is there.

    Raises:
        ValueError: a text claims to be longer than `MAX_TEXT`, or the lengths cannot be looked up.
    """
    path, offset = Path(dataset.file.filename), dataset.id.get_offset()
    if offset is None:
        raise ValueError(f"the texts of {dataset.name!r} are not stored one after the other")
    stored = np.dtype([("length", "<u4"), ("heap", "<u8"), ("index", "<u4")])
    lengths = np.fromfile(path, stored, count=min(dataset.size, path.stat().st_size // 16), offset=offset)["length"]
    if lengths.size < dataset.size or lengths.max(initial=0) > MAX_TEXT:
        raise ValueError(f"a text of {dataset.name!r} claims more than {MAX_TEXT:,} bytes, or lies behind the end")


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
