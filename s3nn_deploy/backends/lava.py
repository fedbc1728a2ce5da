"""Runs the exported .lava file in Lava's fixed-point simulation of Loihi, in an interpreter and processes of its own."""

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s3nn_deploy import lava_env
from s3nn_deploy.errors import DeployError
from s3nn_deploy.formats import lava, netx
from s3nn_deploy.intnet import IntNet
from s3nn_deploy.trace import Trace, checked_input

WHERE = "backend 'lava'"

FILES = {"lava": lava, "netx": netx}
"""What the child reads."""


Progress = Callable[[int, int], object]
"""Is told (time steps done, time steps in all) while a simulation runs."""


def run(net: IntNet, x: Any, file: Path | None = None, progress: Progress = lambda *_: None) -> Trace:
    """Run `net` on `x`, integers [N, *input shape], one sample a time step.

    Populations that the host computes (see the file's input encoding) are computed by the child as well.

    Args:
        file: the .lava or .net file of `net`; without it a temporary .lava file is written.

    Raises:
        DeployError: Lava cannot hold `net`, `file` is not its export, Lava is not installed, or the simulation
            failed or took longer than S3NN_LAVA_TIMEOUT seconds (default: a generous estimate); its log is then named.
    """
    return simulate(net, x, file, "netx" if file is not None and file.suffix == ".net" else "lava", progress)


def simulate(net: IntNet, x: Any, file: Path | None, kind: str, progress: Progress) -> Trace:
    """See `run`; `kind` is the format, "lava" or "netx"."""
    x = checked_input(net, x)
    lowered = FILES[kind].lower(net)
    if file is not None and FILES[kind].read(file) != lowered:
        hint = "Export the network again, or run it without a file."
        raise DeployError(str(file), "is not the export of this network", hint=hint)
    interpreter = str(lava_env.find())
    if not len(x):
        nothing = [np.zeros((0, *p.shape), dtype=bool) for p in net.spiking]
        return _trace(net, nothing, np.zeros((0, *net.readout.shape), dtype=np.int64), kind)
    try:
        with tempfile.TemporaryDirectory(prefix="s3nn-lava-", ignore_cleanup_errors=True) as name:
            folder = Path(name)
            file = FILES[kind].write(net, folder / f"net.{kind}") if file is None else file
            job = {"file": str(file.absolute()), "kind": kind, "message_bits": 8 if net.input.bits > 1 else 0}
            (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
            np.save(folder / "x.npy", x, allow_pickle=False)
            child = [interpreter, "-I", str(lava_env.CHILD), name, str(os.getpid())]
            _simulate(child, folder, _patience(net, len(x)), progress)
            with np.load(folder / "result.npz", allow_pickle=False) as results:
                spikes, readout = [results[str(index)] for index in range(len(net.spiking))], results["readout"]
    except OSError as error:
        hint = "Free some space, or set TMPDIR to a place that has it."
        raise DeployError(WHERE, f"cannot exchange files with the simulation: {error}", hint=hint) from error
    return _trace(net, spikes, _halved(readout) if kind == "netx" else readout, kind)


def _halved(v: NDArray[np.int32]) -> NDArray[np.int64]:
    """The integers of a netx file's readout: v is 64 times a doubled sum."""
    if np.any(v & 127):
        hint = "Please report this: it is a defect of s3nn-deploy or of Lava."
        raise DeployError(WHERE, expected="potentials v = 128 (u + bias)", got=f"{v[v & 127 != 0][0]}", hint=hint)
    return (v >> 7).astype(np.int64)


def _trace(net: IntNet, spikes: list[NDArray[np.bool_]], readout: NDArray[np.int64], kind: str) -> Trace:
    named = {population.name: layer for population, layer in zip(net.spiking, spikes, strict=True)}
    return Trace(named, readout.reshape(len(readout), net.readout.size), net.scale, kind)


def _patience(net: IntNet, samples: int) -> float:
    """Seconds after which a run is taken for dead: some ten times what Lava takes on one core."""
    if named := os.environ.get("S3NN_LAVA_TIMEOUT"):
        try:
            return float(named)
        except ValueError as error:
            raise DeployError("S3NN_LAVA_TIMEOUT", expected="a number of seconds", got=repr(named)) from error
    synapses = sum(p.size * j.synapses.weight[0].size for p in net.populations for j in p.projections)
    return 120 + samples * (0.1 + 5e-8 * synapses)


def _simulate(command: list[str], folder: Path, patience: float, progress: Progress) -> None:
    """Run the child to its end, whatever that is; afterwards no process of its group is left."""
    one_core_each = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with _log() as log, log.open("wb") as stream:
        try:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=one_core_each,
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
        except OSError as error:
            raise DeployError(command[0], f"does not run: {error}", hint="Correct S3NN_LAVA_PYTHON.") from error
        try:
            status = _wait(process, patience, log, progress)
        except subprocess.TimeoutExpired as error:
            hint = f"Its log is {log}. Give it more time with S3NN_LAVA_TIMEOUT=SECONDS, or run fewer samples."
            raise DeployError(WHERE, f"was stopped after {patience:g} s, {_reached(log)}", hint=hint) from error
        finally:
            _end(process)
        if status or not (folder / "result.npz").is_file():
            problem = f"the simulation ended with status {status}, {_reached(log)}"
            raise DeployError(WHERE, problem, got=_last_words(log), hint=f"Its log is {log}.")


def _wait(process: subprocess.Popen[bytes], patience: float, log: Path, progress: Progress) -> int:
    """The child's exit status; `TimeoutExpired` after `patience` seconds."""
    deadline = time.monotonic() + patience
    while True:
        try:
            return process.wait(max(0.0, min(0.5, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            if time.monotonic() >= deadline:
                raise
        if steps := _steps(log):
            progress(*steps)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process group, and wait until nobody is left in it."""
    deadline = time.monotonic() + 5
    with suppress(ProcessLookupError, PermissionError):  # on macOS the second one, where only the dead are left
        while time.monotonic() < deadline:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            time.sleep(0.01)
    process.wait()


def _steps(log: Path) -> tuple[int, int] | None:
    """Time steps done, and in all; None before the first ones."""
    lines = log.read_text(errors="replace").split("\n")[:-1]  # what follows the last line's end may be half a line
    last = next((json.loads(line) for line in reversed(lines) if line.startswith('{"steps"')), None)
    return None if last is None else (last["steps"], last["of"])


def _reached(log: Path) -> str:
    steps = _steps(log)
    return "before the first time steps" if steps is None else f"after {steps[0]:,} of {steps[1]:,} time steps"


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line[:300] for line in reversed(lines) if line and not line.startswith("{")), "no message")


@contextmanager
def _log() -> Iterator[Path]:
    """A new log file, which stays if the run fails, for its error names it."""
    from platformdirs import user_log_path

    place = user_log_path("s3nn-deploy", ensure_exists=True)
    handle, name = tempfile.mkstemp(prefix=time.strftime("lava-%Y%m%d-%H%M%S-"), suffix=".log", dir=place)
    os.close(handle)
    failed = False
    try:
        yield Path(name)
    except DeployError:
        failed = True
        raise
    finally:
        if not failed:
            Path(name).unlink(missing_ok=True)
