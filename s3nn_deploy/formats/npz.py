"""The emulator's own file: an `.npz` with a JSON description and one array for each weight, threshold, bias and scale."""

from pathlib import Path

from s3nn_deploy.files import read_npz, write_npz
from s3nn_deploy.intnet import IntNet, from_plain, to_plain

SCHEMA = "s3nn-deploy-net/1"


def lower(net: IntNet) -> IntNet:
    """The file holds the network as it is."""
    return net


def write(net: IntNet, path: str | Path) -> Path:
    """Write `net` to `path`."""
    meta, arrays = to_plain(net)
    return write_npz(path, {"schema": SCHEMA, **meta}, arrays)


def read(path: str | Path) -> IntNet:
    """Read a network from `path`.

    Raises:
        DeployError: the file is damaged, of another schema, or not a valid network.
    """
    return from_plain(*read_npz(path, SCHEMA))
