"""The Python environment in which Lava runs. Lava is archived; the versions are pinned, and some of them are old."""

from collections.abc import Callable
from pathlib import Path

from s3nn_deploy import environments

CHILD = Path(__file__).parent / "backends" / "lava_child.py"
"""The script that the environment's interpreter runs."""

BESIDE = (
    "asteval==0.9.33",
    "h5py==3.14.0",
    "networkx==2.8.7",
    "numpy==1.26.4; python_version < '3.13'",
    "numpy==2.3.5; python_version >= '3.13'",
    "scipy==1.15.3",
)
LAVA = ("lava-nc==0.10.0", "lava-dl==0.6.0")
"""Installed without what they declare: an older Python, torch, and packages that a simulation does not touch."""

ENVIRONMENT = environments.Environment(
    name="Lava",
    purpose="the simulator of the Loihi targets",
    installs=(
        (("--only-binary=:all:",), BESIDE),
        (("--only-binary=:all:", "--no-deps", "--ignore-requires-python"), LAVA),
    ),
    check=(str(CHILD), "--check"),
    variable="S3NN_LAVA_PYTHON",
    command="s3nn-deploy setup loihi",
    download_mb=135,
    disk_mb=275,
    peak_mb=500,
    bulk=("tests", "lava/lib/dl/slayer/object_detection"),  # test data and camera networks in lava-dl's wheel, 160 MB
    oldest=(3, 10),
)


def folder() -> Path:
    """See `environments.folder`."""
    return environments.folder(ENVIRONMENT)


def find() -> Path:
    """See `environments.find`."""
    return environments.find(ENVIRONMENT)


def setup(python: str | None = None, progress: Callable[[str], object] = print) -> Path:
    """See `environments.setup`."""
    return environments.setup(ENVIRONMENT, python, progress)
