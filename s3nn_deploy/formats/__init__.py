"""File formats of an integer network. Each module has `write(net, path)`, `read(path) -> IntNet` and `lower(net) -> IntNet`.

`lower` applies the exact rewrites that the format needs (no spike of any population changes, for any input), so that
`read(write(net)) == lower(net)` holds for every network that the format can express; others are refused by name. A
format's options (`Format.options`) go to both `write` and `lower`, so that this holds for each of its variants.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from s3nn_deploy.errors import DeployError, suggestion
from s3nn_deploy.files import existing
from s3nn_deploy.intnet import IntNet


@dataclass(frozen=True)
class Format:
    """One file format: its module, its file suffix, one line about it, and the names of its options."""

    module: str
    suffix: str
    summary: str
    options: tuple[str, ...] = ()

    def load(self) -> Any:
        return import_module(self.module)


FORMATS = {
    "emulator": Format("s3nn_deploy.formats.npz", ".npz", "the emulator's own file, lossless"),
    "nir": Format("s3nn_deploy.formats.nir", ".nir", "NIR graph, integers held as float32", ("profile", "merge_skips")),
    "onnx": Format(
        "s3nn_deploy.formats.onnx",
        ".onnx",
        "ONNX graph, integers held as float32, exact on any CPU",
        ("expose_spikes", "qonnx"),
    ),
    "netx": Format("s3nn_deploy.formats.netx", ".net", "Lava netx HDF5 for Loihi"),
    "lava": Format(
        "s3nn_deploy.formats.lava",
        ".lava",
        "description that a small runner builds from Lava's processes",
        ("encoding", "generation"),
    ),
}


def export(net: IntNet, path: str | Path, format: str, **options: Any) -> Path:
    """Write `net` to `path`, read the file back and compare; the file appears only when it equals the network.

    Args:
        options: of the format: for NIR `profile` (a name in `formats.nir.PROFILES`) and `merge_skips`; for ONNX
            `expose_spikes` and `qonnx`; for Lava `encoding` and `generation` (see `loihi.mapping.make`).

    Raises:
        DeployError: an unknown format or option, a network that it cannot express (named population, value, limit, way out), a
            place that cannot be written, or a file that does not read back equal.
    """
    if format not in FORMATS:
        raise DeployError(f"format {format!r}", "is not known", hint=suggestion(format, list(FORMATS)))
    check_options(format, options)
    from s3nn_deploy.files import replacing

    module = FORMATS[format].load()
    lowered = module.lower(net, **options)
    with replacing(path) as temporary:
        module.write(net, temporary, **options)
        if module.read(temporary) != lowered:
            raise DeployError(
                str(path),
                f"the {format} file does not read back as the network that was written",
                hint="Please report this: it is a defect of s3nn-deploy.",
            )
    return Path(path)


def check_options(format: str, options: Iterable[str]) -> None:
    """Refuse an option that the format does not have.

    Raises:
        DeployError: names it, and those that there are.
    """
    for name in options:
        if name not in (known := FORMATS[format].options):
            hint = suggestion(name, list(known)) if known else "It has none."
            raise DeployError(f"format {format!r}", f"has no option {name!r}", hint=hint)


def notes(net: IntNet, format: str, **options: Any) -> list[str]:
    """What a user of the file should know: limits of the hardware that the file's own simulator does not have."""
    describe = getattr(FORMATS[format].load(), "hardware_notes", None)
    return [] if describe is None else describe(net, **options)


def read(path: str | Path, **options: Any) -> IntNet:
    """Read a network from any format that the package writes, recognised by its suffix.

    Args:
        options: for another tool's NIR graph what NIR leaves open: `dt`, `compare`, `bits`, see `formats.nir.read`.

    Raises:
        DeployError: no such file, an unknown suffix, or contents that are not a valid network.
    """
    path = existing(path)
    for format in FORMATS.values():
        if path.suffix == format.suffix:
            return format.load().read(path, **options)
    known = ", ".join([".pt", *(f.suffix for f in FORMATS.values())])
    raise DeployError(
        str(path), expected=f"one of {known}", got=repr(path.suffix), hint="Rename the file, or export it again."
    )
