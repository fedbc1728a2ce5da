"""Runs the exported .net file, as netx loads it, in Lava's fixed-point simulation; see `lava`."""

from pathlib import Path
from typing import Any

from s3nn_deploy.backends import lava
from s3nn_deploy.backends.lava import Progress
from s3nn_deploy.intnet import IntNet
from s3nn_deploy.trace import Trace


def run(net: IntNet, x: Any, file: Path | None = None, progress: Progress = lambda *_: None) -> Trace:
    """Run `net`, which must be a chain, on `x`, integers of at most 8 bits [N, *input shape], one sample a time step.

    Args:
        file: the .net file of `net`; without it a temporary one is written.

    Raises:
        DeployError: the format cannot express `net`; else as `lava.run`.
    """
    return lava.simulate(net, x, file, "netx", progress)
