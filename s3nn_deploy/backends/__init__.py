"""Engines that run an integer network. Each module has `run(net, x, file=None) -> Trace`; all traces are equal, by `==`."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from s3nn_deploy.errors import DeployError, suggestion
from s3nn_deploy.intnet import IntNet
from s3nn_deploy.trace import Trace


@dataclass(frozen=True)
class Backend:
    """One engine: its module, the format of the file that it executes (None: the network itself), and one line about it.

    Attributes:
        steps: whether it tells `progress` of its time steps.
    """

    module: str
    takes: str | None
    summary: str
    steps: bool = False


BACKENDS = {
    "reference": Backend("s3nn_deploy.backends.reference", None, "int64 NumPy, the meaning of a network"),
    "emulator": Backend("s3nn_deploy.backends.emulator", "emulator", "fast and exact, counts every event"),
    "onnx": Backend("s3nn_deploy.backends.onnx", "onnx", "ONNX Runtime on the exported file"),
    "lava": Backend(
        "s3nn_deploy.backends.lava", "lava", "Lava's fixed-point Loihi simulation of the exported file", True
    ),
    "netx": Backend(
        "s3nn_deploy.backends.netx", "netx", "the same simulation of the netx file, which holds chains", True
    ),
}


def run(
    net: IntNet,
    x: Any,
    backend: str = "emulator",
    file: str | Path | None = None,
    progress: Callable[[int, int], object] = lambda *_: None,
    *,
    engine: str = "auto",
) -> Trace:
    """Run `net` on integers `x` [N, *input shape].

    Args:
        backend: a name in `BACKENDS`.
        file: the export of `net` in the format that the backend takes; without it a temporary one is written.
        progress: called with (time steps done, time steps in all) by a backend that takes time over them.
        engine: what computes for the emulator, numpy, numba or onednn, all exact; auto takes what is fastest for the
            work so far.

    Raises:
        DeployError: an unknown backend or engine, an input outside the network's range, or a network that the backend cannot run.
    """
    if backend not in BACKENDS:
        raise DeployError(f"backend {backend!r}", "is not known", hint=suggestion(backend, list(BACKENDS)))
    told: dict[str, Any] = {"progress": progress} if BACKENDS[backend].steps else {}
    if engine != "auto":
        if backend != "emulator":
            raise DeployError(f"engine {engine!r}", f"is for the backend 'emulator', not for {backend!r}")
        told["engine"] = engine
    return import_module(BACKENDS[backend].module).run(net, x, None if file is None else Path(file), **told)
