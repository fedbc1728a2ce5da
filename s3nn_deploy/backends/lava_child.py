"""Runs one .net or .lava file in Lava's fixed-point simulation. A script for the Lava interpreter, without s3nn_deploy.

    python -I lava_child.py FOLDER PARENT_PID    FOLDER holds job.json {"file", "kind", "message_bits"} and x.npy [N, *shape];
                                                 result.npz appears there: "0", "1", ... bool [N, *shape], of each population
                                                 but the readout, and "readout" [N, *shape]: of a .net file its potential v
                                                 (int32), of a .lava file the network's integers (int64)
    python -I lava_child.py --check              only imports what a run needs and prints the versions

`-I` matters: without it this script's folder leads the module path, and its `lava.py` hides Lava. Progress goes to
stdout, one JSON object a line. When the parent dies, this process, all of Lava's and FOLDER go too. Nothing is ever in
/dev/shm.
"""

import contextlib
import ctypes
import functools
import importlib.machinery
import importlib.util
import json
import mmap
import os
import shutil
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

STEPS, SECONDS = 256, 1.0  # at most so many steps, and about so many seconds, between two lines of progress
ACTORS: list[Any] = []  # a handle of each process that Lava forked


def load_builder() -> Any:
    """The module beside this script."""
    spec = importlib.util.spec_from_file_location("lava_builder", Path(__file__).with_name("lava_builder.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


builder = load_builder()


# -- no process and no shared memory outlives the parent


def follow(parent: int, folder: Path) -> None:
    """End this process, its process group and `folder` as soon as process `parent` is gone."""
    if os.getpgrp() != os.getpid():
        os.setsid()

    def vanish(*_: Any) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        os.killpg(os.getpid(), signal.SIGKILL)

    def watch() -> None:
        while True:
            if os.getppid() != parent:
                vanish()
            if killed := killed_actor():
                print(f"a Lava process was killed by signal {killed}: out of memory?", file=sys.stderr, flush=True)
                os.killpg(os.getpid(), signal.SIGKILL)
            time.sleep(0.2)

    signal.signal(signal.SIGTERM, vanish)
    die_with_parent(signal.SIGTERM)
    os.register_at_fork(after_in_child=functools.partial(follow_child, os.getpid()))
    threading.Thread(target=watch, daemon=True).start()


def follow_child(child: int) -> None:
    """In each process that Lava forks: die with the one that forked it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent(signal.SIGKILL)
    if os.getppid() != child:
        os._exit(1)


def die_with_parent(number: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(number), 0, 0, 0)  # PR_SET_PDEATHSIG; elsewhere the watching thread does it


def killed_actor() -> int:
    """The signal that ended one of Lava's processes, or 0. Lava itself would wait for its answer for ever."""
    for actor in ACTORS:
        if actor.returncode is not None:  # Lava, or the next fork, has waited for it
            if actor.returncode < 0:
                return -int(actor.returncode)
            continue
        with contextlib.suppress(ChildProcessError, AttributeError):  # just waited for; no waitid on this system
            gone = os.waitid(os.P_PID, actor.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if gone is not None and gone.si_code in (os.CLD_KILLED, os.CLD_DUMPED):
                return gone.si_status
    return 0


class ForkedMemory:
    """In place of Lava's SharedMemoryManager: forked processes share it without a name, so it cannot be left behind."""

    def start(self) -> None:
        pass

    def shutdown(self) -> None:
        pass

    def create_shared_memory(self, size: int) -> types.SimpleNamespace:
        return types.SimpleNamespace(buf=memoryview(mmap.mmap(-1, size)))


def shared(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array of zeros that forked processes write into and this one reads."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(mmap.mmap(-1, max(size, 1)), dtype=dtype, count=int(np.prod(shape))).reshape(shape)


def rewire_lava() -> None:
    """Watch the processes that Lava forks, share memory without names, and exchange samples and results through it."""
    from lava.magma.runtime.message_infrastructure import multiprocessing as infrastructure
    from lava.proc.io import sink, source

    def build_actor(*arguments: Any) -> Any:
        actor = fork_actor(*arguments)
        ACTORS.append(actor._popen)
        return actor

    fork_actor, infrastructure.MultiProcessing.build_actor = infrastructure.MultiProcessing.build_actor, build_actor
    infrastructure.SharedMemoryManager = ForkedMemory
    source.AbstractPyRingBuffer.run_spk = send_sample
    sink.AbstractPyReceiveModel.run_spk = record_spikes
    sink.AbstractPyRead.run_post_mgmt = record_state


# -- making lava-dl 0.6.0 importable, without touching a file of its own; lava-nc is the builder's


def import_netx() -> Any:
    """netx imports torch for annotations and slayer for neurons not used here; hollow modules stand in meanwhile."""

    def unavailable(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("resonate-and-fire neurons need slayer")

    contents: dict[str, dict[str, Any]] = {
        "torch": {"Tensor": type("Tensor", (), {}), "tensor": unavailable, "is_tensor": lambda _: False},
        "lava.lib.dl.slayer": {},
        "lava.lib.dl.slayer.neuron": {},
        "lava.lib.dl.slayer.neuron.rf": {"neuron_params": unavailable},
    }
    hollow = [name for name in contents if name not in sys.modules]
    for name in hollow:
        module = types.ModuleType(name)
        module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None, is_package=True), []
        vars(module).update(contents[name])
        sys.modules[name] = module
    try:
        from lava.lib.dl import netx
    finally:
        for name in hollow:
            sys.modules.pop(name, None)
    return netx


# -- one sample a step in, spikes and potentials out, all of it through memory shared by forking
# Lava's own buffers would copy every sample into each process and hand results back one number a message, 16 us each.
# Lava's axes are (W, H, C), ours (C, H, W): each is the other's transpose.


def send_sample(model: Any) -> None:
    samples, at = model.proc_params["samples"], model.time_step - 1 - model.proc_params["lag"]
    model.s_out.send(samples[min(max(at, 0), len(samples) - 1)].T.astype(np.int32))


def record_spikes(model: Any) -> None:
    record(model, model.a_in.recv())


def record_state(model: Any) -> None:
    record(model, model.state.read())


def record(model: Any, data: np.ndarray) -> None:
    """What a layer at `depth` gives in this step belongs to the sample shown `depth` steps ago."""
    into, sample = model.proc_params["record"], model.time_step - 1 - model.proc_params["depth"]
    if 0 <= sample < len(into):
        into[sample] = data.T


Feed = tuple[np.ndarray, int, Callable[[Any], None]]  # samples [N, *shape], by how many steps late, into what
Probe = tuple[Any, int, tuple[int, ...], Any]  # port or variable, how many steps it lags, its shape, dtype


def run_netx(job: dict[str, Any], x: np.ndarray) -> dict[str, np.ndarray]:
    """A .net file's spikes of every layer but the last, and the last one's potential."""
    network = import_netx().hdf5.Network(net_config=job["file"], input_message_bits=job["message_bits"])
    inp, last = network.in_layer.inp, network.layers[-1].neuron
    feed = (x if len(inp.shape) == 3 else x.reshape(len(x), -1), 0, lambda s_out: s_out.connect(inp))
    probes: list[Probe] = [
        (layer.neuron.s_out, depth, layer.neuron.s_out.shape, bool) for depth, layer in enumerate(network.layers, 1)
    ]
    probes[-1] = (last.v, len(probes), last.s_out.shape, np.int32)
    *spikes, v = simulate([feed], probes, len(x))
    return {**{str(index): layer for index, layer in enumerate(spikes)}, "readout": v}


def run_lava(job: dict[str, Any], x: np.ndarray) -> dict[str, np.ndarray]:
    """A .lava file's spikes of every population, the host's included, and the readout."""
    plan, arrays = builder.load(job["file"])
    values, found = builder.injected(plan, arrays, x)
    neurons, inputs = builder.build(plan, arrays)
    feeds: list[Feed] = [
        (values[name], lag, functools.partial(builder.connect, wires=wires, flat=flat))
        for name, lag, wires, flat in inputs
    ]
    groups = [group for group in plan["groups"] if group["role"] in ("population", "readout")]
    probes: list[Probe] = [(neurons[g["name"]].s_out, g["depth"], neurons[g["name"]].s_out.shape, bool) for g in groups]
    last = neurons[groups[-1]["name"]]
    raw = last.v if groups[-1]["neuron"] == "lif" else last.s_out
    probes[-1] = (raw, groups[-1]["depth"], last.s_out.shape, np.int32)
    results = simulate(feeds, probes, len(x))
    found |= {group["name"]: spikes for group, spikes in zip(groups, results, strict=True)}
    found[groups[-1]["name"]] = builder.readout(plan, arrays, results[-1])
    return {**{str(i): found[name] for i, name in enumerate(plan["order"][:-1])}, "readout": found[plan["order"][-1]]}


def simulate(feeds: list[Feed], probes: list[Probe], samples: int) -> list[np.ndarray]:
    """Show the samples, one a step; returns what each probe saw of them, [samples, *shape]."""
    from lava.magma.core.process.ports.ports import OutPort
    from lava.magma.core.run_conditions import RunSteps
    from lava.magma.core.run_configs import Loihi2SimCfg
    from lava.proc.io import sink, source

    for values, lag, connect in feeds:
        feed = source.RingBuffer(data=np.zeros((*values.shape[:0:-1], 1), dtype=np.int32))
        feed.proc_params["samples"], feed.proc_params["lag"] = values, lag
        connect(feed.s_out)
    results = []
    for of, depth, shape, dtype in probes:
        spikes = isinstance(of, OutPort)
        probe = sink.RingBuffer(shape=shape, buffer=1) if spikes else sink.Read(buffer=1)
        results.append(shared((samples, *shape[::-1]), dtype))
        probe.proc_params["record"], probe.proc_params["depth"] = results[-1], depth
        if spikes:
            of.connect(probe.a_in)
        else:
            probe.connect_var(of)
    config = Loihi2SimCfg(select_tag="fixed_pt")  # without the tag it takes the floating-point models: other spikes
    steps = samples + max(depth for _, depth, _, _ in probes)
    done, count = 0, 1
    while done < steps:
        clock = time.perf_counter()
        feed.run(condition=RunSteps(num_steps=min(count, steps - done)), run_cfg=config)
        done = min(done + count, steps)
        print(json.dumps({"steps": done, "of": steps}), flush=True)
        count = max(1, min(4 * count, STEPS, int(count * SECONDS / (time.perf_counter() - clock))))
    feed.stop()
    return results


def report_lava_errors() -> None:
    """Print what went wrong inside Lava's processes, which Lava itself logs below the level that is shown."""
    from lava.magma.core.process.process import ProcessServer

    for runtime in {process.runtime for process in ProcessServer().processes if process.runtime is not None}:
        for actor in runtime._messaging_infrastructure.actors:
            if actor.exception:
                print(actor.exception[1], file=sys.stderr)


def main(folder: Path, parent: int) -> None:
    """Do the job in `folder`. On failure Lava is not stopped (that can wait for ever): leaving kills its processes."""
    follow(parent, folder)
    status = 1
    try:
        job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        x = np.load(folder / "x.npy", allow_pickle=False)
        builder.import_lava()
        rewire_lava()
        results = {"netx": run_netx, "lava": run_lava}[job["kind"]](job, x)
        np.savez(folder / "result.npz", **results)  # type: ignore[arg-type]
        status = 0
    except BaseException:
        traceback.print_exc()
        report_lava_errors()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        builder.import_lava()
        import_netx()
        print(json.dumps({"python": sys.version.split()[0], "numpy": np.__version__}))
    else:
        main(Path(sys.argv[1]), int(sys.argv[2]))
