"""`model.pt`: a trained network as plain data and tensors, safe to open, that needs none of the code that made it."""

import json
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s3nn_deploy import formats
from s3nn_deploy.errors import DeployError
from s3nn_deploy.files import MAX_BYTES, existing, replacing
from s3nn_deploy.intnet import IntNet, check

if TYPE_CHECKING:
    import torch

    from s3nn_deploy.conversion import Conversion


def save_model(
    module: "torch.nn.Module",
    path: str | Path,
    input_shape: tuple[int, ...],
    input_bits: int = 8,
    classes: Iterable[str] = (),
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Convert `module`, harden it, and write the program that PyTorch runs, with its structure, to `path`.

    Args:
        module: an `nn.Module` as `convert` takes it; it is not changed.
        input_shape: (C, H, W) or (N,) of one sample.
        input_bits: the input holds integers 0 .. 2^bits - 1.
        classes: names of the readout's outputs.
        provenance: plain data about how the model came to be.

    Raises:
        DeployError: the module cannot be converted, or the place cannot be written.
    """
    import torch

    from s3nn_deploy.capture import capture
    from s3nn_deploy.conversion import conversion
    from s3nn_deploy.program import to_plain

    converted = conversion(capture(module, input_shape, input_bits))
    classes = tuple(str(c) for c in classes)
    check(replace(converted.net, classes=classes))
    try:
        plain_provenance = json.loads(json.dumps(dict(provenance or {})))
    except TypeError as error:
        raise DeployError(
            "provenance", expected="plain data (text, numbers, lists, dictionaries)", got=str(error)
        ) from error
    plain_provenance = {**converted.net.provenance, **plain_provenance}
    plain = {**to_plain(converted.program), "classes": list(classes), "provenance": plain_provenance}
    with replacing(path) as temporary:
        torch.save(plain, temporary)
        if load_model(temporary).net != converted.net:
            raise DeployError(
                str(path),
                "the model does not read back as it was written",
                hint="Please report this: it is a defect of s3nn-deploy.",
            )
    return Path(path)


def load_model(path: str | Path) -> "Conversion":
    """Open a `model.pt`: the program that PyTorch runs and the integer network that it is.

    Raises:
        DeployError: no such file, a truncated file, a pickle with code in it, or one that `save_model` did not write.
    """
    import torch

    from s3nn_deploy.conversion import conversion
    from s3nn_deploy.program import from_plain

    path = existing(path)
    hint = "The file is truncated, damaged, or was not written by s3nn_deploy.save_model."
    if path.stat().st_size > MAX_BYTES:
        raise DeployError(str(path), expected=f"at most {MAX_BYTES:,} bytes", got=f"{path.stat().st_size:,}")
    if not zipfile.is_zipfile(path):
        raise DeployError(str(path), "is not a model file", hint=hint)
    try:
        plain = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DeployError(
            str(path),
            "holds something other than tensors and plain data, which could be code; it was not executed",
            hint="Rebuild the module in Python and write it with s3nn_deploy.save_model(module, path, input_shape).",
        ) from error
    except (RuntimeError, OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DeployError(str(path), f"is not a readable model ({str(error).splitlines()[0]})", hint=hint) from error
    if not isinstance(plain, dict) or not str(plain.get("schema", "")).startswith("s3nn-deploy-model/"):
        raise DeployError(
            str(path),
            "is a PyTorch file, but not one of s3nn-deploy (a bare state_dict holds no structure)",
            hint="Load it into your module and write it with s3nn_deploy.save_model(module, path, input_shape).",
        )
    converted = conversion(from_plain(plain))
    provenance = {**converted.net.provenance, **dict(plain.get("provenance", {}))}
    net = replace(converted.net, classes=tuple(str(c) for c in plain.get("classes", ())), provenance=provenance)
    return replace(converted, net=check(net))


def load(path: str | Path, **options: Any) -> IntNet:
    """The integer network in a file: `.pt` (a trained model), or `.npz`, `.nir`, `.onnx`, `.net` as this package writes them.

    Args:
        options: for another tool's NIR graph what NIR leaves open: `dt`, `compare`, `bits`, see `formats.nir.read`.

    Raises:
        DeployError: no such file, an unknown suffix, or contents that are not a valid network.
    """
    return load_model(path).net if Path(path).suffix == ".pt" else formats.read(path, **options)
