"""Golden vectors: inputs with all that the network makes of them, beside the exported file, for any tool to check itself.

`net.nir` has `net.nir.golden.npz`, which `numpy.load` reads without pickles: `input` uint8 or uint16 [N, *shape], `output`
int64 [N, classes], for each population `spikes/<name>` bool [N, *shape], and `meta.json`. The inputs are general ones,
and for each population that reads only the input some that put its membrane potentials at the threshold and just below.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s3nn_deploy.backends import reference
from s3nn_deploy.errors import DeployError
from s3nn_deploy.files import read_npz, sha256, write_npz
from s3nn_deploy.intnet import INPUT, IntNet
from s3nn_deploy.stimuli import injection, isolated, stimuli
from s3nn_deploy.trace import Trace

SCHEMA = "s3nn-deploy-golden/1"

GENERAL, BITING = 16, 16
"""How many general inputs there are, and how many at thresholds."""


@dataclass(frozen=True, eq=False)
class Golden:
    """Inputs, the spikes of every population and the readout, and the SHA-256 of the file that they belong to."""

    x: NDArray[np.unsignedinteger[Any]]
    spikes: Mapping[str, NDArray[np.bool_]]
    readout: NDArray[np.int64]
    file: str


def place(file: str | Path) -> Path:
    """Where the golden vectors of a file lie."""
    file = Path(file)
    return file.with_name(f"{file.name}.golden.npz")


def vectors(net: IntNet) -> NDArray[np.unsignedinteger[Any]]:
    """Inputs [N, *input shape]: `stimuli`, and inputs that bring first populations to their thresholds."""
    found = [stimuli(net, GENERAL)]
    first = [p for p in net.spiking if all(j.source == INPUT for j in p.projections)]
    for population in first:
        if (alone := isolated(net, population)) is not None:
            made = injection(alone, budget=10**7)
            samples = sorted({point.sample for point in made.points})[: max(2, BITING // len(first))]
            found.append(made.x[samples].reshape(-1, *net.input.shape))
    return np.concatenate(found)


def make(net: IntNet, file: str | Path) -> Golden:
    """The golden vectors of `net`, which the `file` holds."""
    x = vectors(net)
    trace = reference.run(net, x)
    return Golden(x, trace.spikes, trace.readout, sha256(file))


def write(net: IntNet, file: str | Path) -> Path:
    """Write the golden vectors of `net`, as it is in `file`, beside that file."""
    golden = make(net, file)
    spikes = {f"spikes/{name}": s for name, s in golden.spikes.items()}
    meta = {"schema": SCHEMA, "file": Path(file).name, "sha256": golden.file, "network": net.digest}
    return write_npz(place(file), meta, {"input": golden.x, "output": golden.readout, **spikes})


def read(net: IntNet, file: str | Path) -> Golden:
    """The golden vectors beside a file that holds `net`, checked against the reference; made where there are none.

    Raises:
        DeployError: they are not readable, or not those of this file.
    """
    path = place(file)
    if not path.exists():
        return make(net, file)
    meta, arrays = read_npz(path, SCHEMA)
    try:
        golden = Golden(
            arrays["input"],
            {p.name: arrays[f"spikes/{p.name}"] for p in net.spiking},
            arrays["output"],
            str(meta["sha256"]),
        )
        same = _same(golden, reference.run(net, golden.x))
    except (KeyError, DeployError) as error:
        raise DeployError(str(path), f"are not the golden vectors of {file} ({error})", hint=HINT) from error
    if not same or golden.file != sha256(file):
        raise DeployError(str(path), f"are not the golden vectors of {file}", hint=HINT)
    return golden


HINT = "Export the network again, or delete them: they are made anew."


def _same(golden: Golden, trace: Trace) -> bool:
    return np.array_equal(golden.readout, trace.readout) and all(
        np.array_equal(golden.spikes[name], spikes) for name, spikes in trace.spikes.items()
    )
