"""What a file says of a network beside its numbers, one JSON text: input bits, readout scale, classes, provenance."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s3nn_deploy import __version__
from s3nn_deploy.errors import DeployError
from s3nn_deploy.intnet import IntNet

KEY = "s3nn"
"""Under which the text is found in a file's metadata."""


@dataclass(frozen=True)
class Description:
    """The input's bits, the readout's scale [channels] (None: one), classes and provenance."""

    bits: int
    scale: NDArray[np.float64] | None
    classes: tuple[str, ...]
    provenance: Mapping[str, Any]


def to_text(net: IntNet, schema: str, **more: Any) -> str:
    """The description of `net` as JSON; equal networks with equal provenance give equal text."""
    scale = net.readout.scale
    assert scale is not None
    plain = {
        "schema": schema,
        "s3nn_deploy": __version__,
        "time_steps": 1,
        "compare": ">=",
        "input": {"shape": list(net.input.shape), "bits": net.input.bits},
        "readout": {"scale": scale.tolist()},
        "classes": list(net.classes),
        "provenance": dict(net.provenance),
        **more,
    }
    return json.dumps(plain, sort_keys=True)


def from_text(text: str | bytes, schema: str, where: str) -> Description:
    """The description that `to_text` wrote.

    Raises:
        DeployError: it is not JSON of that schema, or something is missing or of another type.
    """
    try:
        plain = json.loads(text)
        if plain["schema"] != schema:
            raise ValueError(f"expected schema {schema!r}, got {plain['schema']!r}")
        scale = np.array(plain["readout"]["scale"], dtype=np.float64)
        bits, classes, provenance = plain["input"]["bits"], plain["classes"], plain["provenance"]
        kinds = isinstance(bits, int), isinstance(classes, list), isinstance(provenance, dict), scale.ndim == 1
        if not all(kinds):
            raise ValueError("expected integer bits, a list of scales, a list of classes and a table of provenance")
        return Description(bits, scale, tuple(str(c) for c in classes), provenance)
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise DeployError(
            where,
            f"its description in {KEY!r} is not readable ({type(error).__name__}: {error})",
            hint="The file was damaged or edited, or written by another version.",
        ) from error
