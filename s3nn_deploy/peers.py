"""Other people's readers of NIR and QONNX: what each one does with a file, found out by running it.

A peer is tried in every way of calling it that is known to matter, on golden vectors, each in a fresh module and one step
from rest. It is exact if its output and the spikes of each population are those of the integer network, all of them; it
is wrong if it runs and they are not, or if it has left out a node; else it refused.
"""

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from s3nn_deploy import environments, golden
from s3nn_deploy.environments import Environment
from s3nn_deploy.errors import DeployError, suggestion

CHILD = Path(__file__).parent / "backends" / "peer_child.py"
"""The script that the environments' interpreters run."""

COMMAND = "s3nn-deploy setup peers"

TORCH = "torch==2.13.0"


def _environment(
    name: str, peers: Sequence[str], requirements: tuple[str, ...], variable: str, mb: int, torch: bool = True
) -> Environment:
    first: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (((), (TORCH,)),) if torch else ()
    return Environment(
        name=name,
        purpose=f"the environment of {', '.join(peers)}",
        installs=(*first, (("--prefer-binary",), ((TORCH, *requirements) if torch else requirements))),
        check=(str(CHILD), "--check", *peers),
        variable=variable,
        command=COMMAND,
        download_mb=mb,
        disk_mb=mb + mb // 3,
        peak_mb=2 * mb,
    )


CURRENT = _environment(
    "Peers",
    ("snntorch", "norse", "spikingjelly", "nirtorch", "sc-neurocore"),
    ("nir==1.0.8", "nirtorch==2.6", "snntorch==1.0.0", "norse==1.1.0", "spikingjelly==2.0.0", "sc-neurocore==3.16.0"),
    "S3NN_PEERS_PYTHON",
    1000,
)
OLDER = _environment(
    "Peers of nir 1.0.4",
    ("sinabs", "rockpool"),
    ("nir==1.0.4", "sinabs==3.1.3", "rockpool==3.1.0"),
    "S3NN_PEERS_NIR104_PYTHON",
    900,
)
QONNX = _environment(
    "Peers of QONNX",
    ("qonnx", "hls4ml"),
    ("qonnx==1.0.0", "hls4ml==1.3.0", "onnx==1.23.2", "onnxruntime==1.32.0"),
    "S3NN_PEERS_QONNX_PYTHON",
    200,
    torch=False,
)
ENVIRONMENTS = (CURRENT, OLDER, QONNX)
"""Sinabs 3.1.3 and Rockpool 3.1.0 pin an older nir than the others need; QONNX's tools have nothing to do with it."""


@dataclass(frozen=True)
class Peer:
    """One reader: the environment it lives in, and what users would write to import graph `g`, by the name of the call.

    Attributes:
        spikes: whether the spikes of its neurons can be seen, or only the output.
        takes: the suffix of the files that it reads.
    """

    environment: Environment
    calls: Mapping[str, str]
    spikes: bool = True
    takes: str = ".nir"


PEERS = {
    "snntorch": Peer(CURRENT, {"default": "snntorch.import_nir.import_from_nir(g)"}),
    "norse": Peer(
        CURRENT,
        {"default": "norse.torch.from_nir(g)", "dt": "norse.torch.from_nir(g, ignore_warnings=True, dt=1e-4)"},
    ),
    "spikingjelly": Peer(
        CURRENT,
        {
            "default": "spikingjelly.activation_based.nir_exchange.import_from_nir(g)",
            "dt": "spikingjelly.activation_based.nir_exchange.import_from_nir(g, dt=1.0)",
        },
    ),
    "nirtorch": Peer(
        CURRENT,
        {
            "default": "nirtorch.nir_to_torch(g, {neurons: step functions})",
            "mapped": "nirtorch.nir_to_torch(g, {neurons: step functions, nir.Affine: with its bias, nir.Flatten: dims + 1})",
        },
    ),
    "sc-neurocore": Peer(
        CURRENT,
        {
            "default": "sc_neurocore.nir_bridge.from_nir(path, dt=1.0)",
            "dt": "sc_neurocore.nir_bridge.from_nir(path, dt=1e-4)",
        },
        spikes=False,
    ),
    "sinabs": Peer(
        OLDER,
        {
            "default": "sinabs.nir.from_nir(g, batch_size=n)",
            "single": "sinabs.nir.from_nir(g, batch_size=n), then spike_fn = SingleSpike on every StatefulLayer",
        },
    ),
    "rockpool": Peer(OLDER, {"default": "rockpool.nn.modules.torch.nir.from_nir(g)"}),
    "qonnx": Peer(
        QONNX, {"default": "qonnx.core.onnx_exec.execute_onnx(ModelWrapper(path), {'input': x})"}, takes=".onnx"
    ),
    "hls4ml": Peer(
        QONNX,
        {
            "default": "hls4ml.converters.convert_from_onnx_model(m), with m = cleanup_model(ModelWrapper(path)),"
            " ConvertToChannelsLastAndClean and GemmToMatMul of QONNX, and default precision fixed<32,24>"
        },
        spikes=False,
        takes=".onnx",
    ),
}
"""The readers that can be run. Each peer's first call is the one without anything special."""

TAKES = "NIR: s3nn-deploy export model.pt --target nir. QONNX: s3nn-deploy export model.pt --target onnx --qonnx."

EXACT, WRONG, REFUSED, ABSENT = "exact", "silently wrong", "refused", "not installed"


@dataclass(frozen=True)
class Attempt:
    """What one call of a peer did with a file: the call, EXACT, WRONG or REFUSED, and why not exact."""

    call: str
    status: str
    detail: str = ""


@dataclass(frozen=True)
class Verdict:
    """What a peer does with a file: the best of its attempts, the first of which is the call without anything special."""

    peer: str
    version: str
    attempts: tuple[Attempt, ...]
    spikes: bool = True

    @property
    def best(self) -> Attempt:
        order = (EXACT, WRONG, REFUSED, ABSENT)
        return min(self.attempts, key=lambda attempt: order.index(attempt.status))


def setup(python: str | None = None, progress: Callable[[str], object] = print) -> list[Path]:
    """Build the environments of all peers, see `environments.setup`."""
    return [environments.setup(environment, python, progress) for environment in ENVIRONMENTS]


def installed() -> list[str]:
    """The peers that can be run now."""
    return [name for name, peer in PEERS.items() if _interpreter(peer.environment) is not None]


def conformance(files: Iterable[str | Path], names: Iterable[str] | None = None) -> list[list[Verdict]]:
    """Run every named peer on every file and its golden vectors; for each file a verdict a peer.

    Args:
        files: all NIR, or all QONNX.
        names: keys of `PEERS`, by default all that read such files.

    Raises:
        DeployError: an unknown peer or one that does not read such files, a file that is no integer network, or a
            peer's interpreter that does not start.
    """
    paths = [Path(file).absolute() for file in files]
    if names is None:
        names = [name for name, peer in PEERS.items() if all(path.suffix == peer.takes for path in paths)]
    names = list(names)
    for name in names:
        if name not in PEERS:
            raise DeployError(f"peer {name!r}", "is not known", hint=suggestion(name, list(PEERS)))
        for path in paths:
            if path.suffix != PEERS[name].takes:
                raise DeployError(f"peer {name!r}", expected=f"a {PEERS[name].takes} file", got=str(path), hint=TAKES)
    if paths and not names:
        raise DeployError(str(paths[0]), expected="a .nir or .onnx file", got=repr(paths[0].suffix), hint=TAKES)
    from s3nn_deploy import formats

    vectors = [golden.read(formats.read(path), path) for path in paths]
    verdicts: list[dict[str, Verdict]] = [{} for _ in paths]
    for environment in ENVIRONMENTS:
        here = [name for name in names if PEERS[name].environment is environment]
        interpreter = _interpreter(environment)
        if interpreter is None:
            absent = (Attempt("", ABSENT, f"Run: {COMMAND}"),)
            for found in verdicts:
                found.update({name: Verdict(name, "", absent) for name in here})
        elif here:
            versions = _versions(interpreter, here)
            for found, attempts in zip(verdicts, _run(interpreter, paths, vectors, here), strict=True):
                for name in here:
                    found[name] = Verdict(name, versions[name], tuple(attempts[name]), PEERS[name].spikes)
    return [[found[name] for name in names] for found in verdicts]


def _interpreter(environment: Environment) -> Path | None:
    try:
        return environments.find(environment)
    except DeployError:
        if environment.variable in os.environ:
            raise
        return None


def _start(interpreter: Path, arguments: list[str], seconds: float) -> tuple[int | None, str]:
    """Run the child to its end; its exit code (None: it was stopped) and what it said. Equal hashes in every run."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    fixed = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    command = [str(interpreter), "-P", "-s", str(CHILD), *arguments]
    with tempfile.TemporaryFile() as log:
        try:
            process = subprocess.Popen(
                command,
                env={**kept, **fixed},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise DeployError(str(interpreter), f"does not run: {error}", hint=f"Run: {COMMAND}") from error
        code: int | None = None
        try:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(seconds)
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        return code, log.read().decode(errors="replace")


def _versions(interpreter: Path, names: list[str]) -> dict[str, str]:
    code, said = _start(interpreter, ["--check", *names], 300)
    try:
        if code == 0:
            return json.loads(said.strip().splitlines()[-1])
    except (ValueError, IndexError):
        pass
    last = (said.strip().splitlines() or ["nothing"])[-1]
    raise DeployError(
        str(interpreter), "does not have the peers", got=last, hint=f"Delete its folder and run: {COMMAND}"
    )


def _run(
    interpreter: Path, files: list[Path], vectors: list[golden.Golden], names: list[str]
) -> list[dict[str, list[Attempt]]]:
    """For each file and peer the attempts, in one child; one that dies takes what it was at for its answer."""
    calls = [(name, call) for name in names for call in PEERS[name].calls]
    done: dict[tuple[int, int], tuple[Mapping[str, Any], str]] = {}
    found: list[dict[str, list[Attempt]]] = [{name: [] for name in names} for _ in files]
    with tempfile.TemporaryDirectory(prefix="s3nn-peers-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        for index, one in enumerate(vectors):
            np.save(folder / f"{index}.npy", one.x, allow_pickle=False)
        todo = [(index, number) for index in range(len(files)) for number in range(len(calls))]
        while left := [pair for pair in todo if pair not in done]:
            jobs = [
                {"file": str(files[i]), "vectors": str(folder / f"{i}.npy"), "id": [i, n], "call": calls[n]}
                for i, n in left
            ]
            (folder / "job.json").write_text(json.dumps(jobs), encoding="utf-8")
            (folder / "results.jsonl").unlink(missing_ok=True)
            code, said = _start(interpreter, [name], 120 + 20 * len(left))
            lines = folder / "results.jsonl"
            results = [json.loads(line) for line in lines.read_text().splitlines()] if lines.is_file() else []
            for result in results:
                done[tuple(result["id"])] = result, ""
            if len(results) < len(left):
                if not results and left == todo:
                    last = (said.strip().splitlines() or ["nothing"])[-1]
                    raise DeployError(str(interpreter), f"ended with {code}", got=last, hint=f"Run: {COMMAND}")
                died = "was stopped: it took too long" if code is None else f"died, exit code {code}"
                done[left[len(results)]] = {"lost": [], "error": died}, died
        for i, n in todo:
            peer, call = calls[n]
            result, _ = done[i, n]
            if result["error"] is not None:
                attempt = Attempt(PEERS[peer].calls[call], REFUSED, " ".join(result["error"].split())[:300])
            else:
                with np.load(folder / f"{i}-{n}.npz", allow_pickle=False) as got:
                    attempt = judge(PEERS[peer].calls[call], vectors[i], dict(got), result["lost"])
            found[i][peer].append(attempt)
    return found


def judge(call: str, want: golden.Golden, got: Mapping[str, np.ndarray], lost: Sequence[str] = ()) -> Attempt:
    """What a peer that ran is: EXACT only if it has lost no node and every value that was recorded is as it should be.

    Args:
        got: "output", and "spikes/<population>" for each population that could be seen (all, or none).
        lost: neurons' nodes without a module.
    """
    if lost:
        return Attempt(call, WRONG, f"it left out {', '.join(lost)} without a word")
    for name, spikes in want.spikes.items():
        if (recorded := got.get(f"spikes/{name}")) is None:
            if any(key.startswith("spikes/") for key in got):
                return Attempt(call, WRONG, f"{name!r} was never run")
        elif (detail := _difference(recorded, spikes)) is not None:
            return Attempt(call, WRONG, f"spikes of {name!r}: {detail}")
    detail = _difference(got["output"], want.readout)
    return Attempt(call, EXACT) if detail is None else Attempt(call, WRONG, f"output: {detail}")


def _difference(got: np.ndarray, want: np.ndarray) -> str | None:
    if got.size != want.size:
        return f"shape {list(got.shape)} instead of {list(want.shape)}"
    differ = got.reshape(-1) != want.reshape(-1).astype(np.float64)
    return f"{np.count_nonzero(differ):,} of {want.size:,} values differ" if np.any(differ) else None


def report(file: Path, verdicts: Iterable[Verdict]) -> dict[str, Any]:
    """The verdicts on one file as plain data."""
    return {
        "file": str(file),
        "peers": [
            {
                "peer": v.peer,
                "version": v.version,
                "status": v.best.status,
                "call": v.best.call if v.best.status == EXACT else None,
                "compared": "output and every population's spikes" if v.spikes else "output",
                "attempts": [{"call": a.call, "status": a.status, "detail": a.detail} for a in v.attempts],
            }
            for v in verdicts
        ],
    }
