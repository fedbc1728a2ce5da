"""A network as what Lava builds: groups of neurons, synapses and injected input, which `backends/lava_builder.py` reads.

An `.npz` of plain data (without pickles) under the suffix `.lava`. Unlike a netx file it holds every network: joins, with
the relays that align their paths; thresholds of any spread; several projections into one population; any input encoding.
"""

from pathlib import Path
from typing import Any

from s3nn_deploy.errors import DeployError
from s3nn_deploy.files import read_npz, write_npz
from s3nn_deploy.formats import description
from s3nn_deploy.intnet import IntNet, clamp_thresholds
from s3nn_deploy.loihi import mapping
from s3nn_deploy.loihi.plan import Plan, from_plain, to_plain

SCHEMA = "s3nn-deploy-lava/1"


def lower(net: IntNet, encoding: str = "auto", generation: int = 0) -> IntNet:
    """`net` with its thresholds clamped to the reachable range, if it can be mapped; arguments as of `mapping.make`.

    Raises:
        DeployError: names the population, the value, the limit and the way out.
    """
    mapping.make(net, encoding, generation)
    return clamp_thresholds(net)


def write(net: IntNet, path: str | Path, encoding: str = "auto", generation: int = 0) -> Path:
    """Write `net`, mapped, to `path`; arguments as of `mapping.make`.

    Raises:
        DeployError: the network cannot be mapped (see `lower`), or the place cannot be written.
    """
    meta, arrays = to_plain(mapping.make(net, encoding, generation))
    text = description.to_text(net, SCHEMA)
    return write_npz(path, {"schema": SCHEMA, "plan": meta, description.KEY: text}, arrays)


def read(path: str | Path) -> IntNet:
    """Read the network from a file that `write` wrote: from what runs, not from a copy beside it.

    Raises:
        DeployError: no such file, or one that is damaged, was changed, or was not written by this package.
    """
    return read_plan(path)[1]


UNREADABLE = (DeployError, ValueError, LookupError, TypeError, AttributeError, OverflowError, MemoryError)
"""What damaged contents make this package and NumPy raise."""


def read_plan(path: str | Path) -> tuple[Plan, IntNet]:
    """The plan in a file, and the network that it computes; see `read`."""
    meta, arrays = read_npz(path, SCHEMA)
    try:
        plan = from_plain(_table(meta, "plan"), arrays)
        net = mapping.network(plan, description.from_text(meta[description.KEY], SCHEMA, str(path)))
        if mapping.make(net, plan.encoding) != plan:
            raise ValueError("it is not what this version makes of its own network")
    except UNREADABLE as error:
        hint = "It is damaged, was edited, or was written by another version. Export the network again."
        raise DeployError(str(path), f"is not a readable {SCHEMA} file ({error})", hint=hint) from error
    return plan, net


def _table(meta: dict[str, Any], key: str) -> dict[str, Any]:
    if not isinstance(meta.get(key), dict):
        raise ValueError(f"{key} is missing")
    return meta[key]


def hardware_notes(net: IntNet, encoding: str = "auto", generation: int = 0) -> list[str]:
    """What the file of `net` needs that Lava's simulation has but Loihi may not, one line a population and limit.

    Raises:
        DeployError: `net` cannot be written at all.
    """
    return mapping.notes(mapping.make(net, encoding, generation), clamp_thresholds(net))
