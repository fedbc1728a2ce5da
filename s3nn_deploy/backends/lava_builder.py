"""Builds the network of a .lava file from Lava's own processes. Needs lava-nc and NumPy, and nothing of s3nn_deploy.

    python lava_builder.py MODEL.lava GOLDEN.npz     runs the golden samples in Lava's fixed-point simulation and compares
                                                     every spike and every readout, ==; exit code 0: all equal

The Python is one that has lava-nc: 3.10 with `pip install lava-nc==0.10.0`, or what `s3nn-deploy setup loihi` names. To
run on the chip, build the same processes with `build`, and put adapters between them and the host (see the delivery
note of the export).

The file is an .npz whose "meta.json" says what there is (`plan`) and whose arrays are weights, biases and thresholds:

    sources      what the host injects each step: the samples, encoded, or spikes of populations that the host computes
    groups       neurons without memory: a LIF fires where sum + (bias << bias_exp - 6) > vth; a graded one where sum > vth
    connections  stored weights, which count << weight_exp; `lag`: injected that many steps later than the sample

Sample k = 0, 1, ... is shown at step k + 1 (the first step is 1) and is in a group of depth d at step k + 1 + d. Arrays
of images are (C, H, W) in the file and (W, H, C) in Lava: each is the other's transpose.
"""

import dataclasses
import json
import multiprocessing
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np

Plan = dict[str, Any]
Arrays = dict[str, np.ndarray]


def load(path: Any) -> tuple[Plan, Arrays]:
    """The plan, a dictionary, and the arrays of a .lava file."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    return json.loads(arrays.pop("meta.json").tobytes().decode())["plan"], arrays


# -- making lava-nc 0.10.0 importable, without touching a file of its own


def import_lava() -> None:
    """Make Lava importable on Python 3.10 to 3.13, with NumPy 1.26 or 2.x, and right for large networks."""
    warnings.filterwarnings("ignore", message="Cannot import module")
    import_var_model()
    from lava.magma.core.process.ports.ports import ReshapePort

    if np.lib.NumpyVersion(np.__version__) >= "2.1.0":  # np.reshape(newshape=) is gone from NumPy 2.4 on
        ReshapePort.get_transform_func_fwd = lambda port: lambda data: np.reshape(data, port.shape)
        ReshapePort.get_transform_func_bwd = lambda port: lambda data: np.reshape(data, port.old_shape)

    from lava.magma.core.model.py.type import LavaPyType
    from lava.proc.conv.models import AbstractPyConvModel

    for name in ("kernel_size", "stride", "padding", "dilation", "groups"):  # int8 there: 128 groups would become -128
        setattr(AbstractPyConvModel, name, LavaPyType(np.ndarray, np.int32))


def import_var_model() -> None:
    """Python >= 3.11 refuses an unhashable dataclass instance as a field's default, and Lava's ByteEncoder is one."""
    real = dataclasses.dataclass

    def tolerant(cls: Any = None, /, **options: Any) -> Any:
        if cls is None:
            return lambda cls: tolerant(cls, **options)
        made = real(cls, **options)
        if made.__name__ == "ByteEncoder" and made.__hash__ is None:
            made.__hash__ = object.__hash__
        return made

    dataclasses.dataclass = tolerant
    try:
        import lava.magma.compiler.var_model  # noqa: F401
    finally:
        dataclasses.dataclass = real


# -- the host's part


def injected(plan: Plan, arrays: Arrays, x: np.ndarray) -> tuple[Arrays, Arrays]:
    """What the sources inject for samples x [N, *shape], {source: [N, *its shape]}, and the spikes that the host computed."""
    signals = {"input": x.astype(np.int64)}
    for population in plan["host"]:
        name, u = population["name"], np.zeros(1, np.int64)
        for index, projection in enumerate(population["projections"]):
            weight = arrays[f"host/{name}/{index}/weight"].astype(np.int64)
            u = u + potential(projection["wires"], weight, signals[projection["source"]])
        theta = arrays[f"host/{name}/threshold"].astype(np.int64)
        signals[name] = (u >= theta.reshape(-1, *[1] * (u.ndim - 2))).astype(np.int64)
    values = signals["input"][:, :, None]
    bits, within = plan["input"]["bits"], [1] * (x.ndim - 2)
    if plan["encoding"] == "planes":
        signals["input"] = values >> np.arange(bits).reshape(-1, *within) & 1
    elif plan["encoding"] == "thermometer":
        signals["input"] = (values > np.arange((1 << bits) - 1).reshape(-1, *within)).astype(np.int64)
    feeds = {s["name"]: signals[s["of"]].reshape(len(x), *s["shape"]) for s in plan["sources"]}
    return feeds, {p["name"]: signals[p["name"]].astype(bool) for p in plan["host"]}


def potential(wires: dict[str, Any], weight: np.ndarray, s: np.ndarray) -> np.ndarray:
    """What the synapses of a population that the host computes add, int64 [N, *shape]."""
    if wires["kind"] == "dense":
        return s.reshape(len(s), -1) @ weight.T
    (sh, sw), (ph, pw), (dh, dw) = wires["stride"], wires["padding"], wires["dilation"]
    s = np.pad(s, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    out, per_group, kh, kw = weight.shape
    height, width = (
        (n - d * (k - 1) - 1) // t + 1 for n, k, t, d in zip(s.shape[2:], (kh, kw), (sh, sw), (dh, dw), strict=True)
    )
    u = np.zeros((len(s), wires["groups"], out // wires["groups"], height * width), dtype=np.int64)
    for y in range(kh):
        for x in range(kw):
            at = s[:, :, y * dh :, x * dw :][:, :, : sh * (height - 1) + 1 : sh, : sw * (width - 1) + 1 : sw]
            at = at.reshape(len(s), wires["groups"], per_group, height * width)
            u += weight[:, :, y, x].reshape(wires["groups"], -1, per_group) @ at
    return u.reshape(len(s), out, height, width)


def readout(plan: Plan, arrays: Arrays, raw: np.ndarray) -> np.ndarray:
    """The network's integers from the readout's raw values: a LIF's v (64 times its sum), or a graded neuron's message."""
    group = plan["groups"][-1]
    unit = group["scale"] * (64 if group["neuron"] == "lif" else 1)
    raw = raw.astype(np.int64)
    if np.any(raw % unit):
        raise ValueError(f"the readout {raw[raw % unit != 0][0]} is no multiple of {unit}")
    bias = arrays.get(f"group/{group['name']}/host_bias", np.zeros(1, np.int64)).astype(np.int64)
    return raw // unit + bias.reshape(-1, *[1] * (raw.ndim - 2))


# -- the chip's part


def build(plan: Plan, arrays: Arrays) -> tuple[dict[str, Any], list[tuple[str, int, Any, bool]]]:
    """Lava's processes: {group: neurons}, and [(source, lag, input port's process, flat)] for what is to be injected.

    `flat`: the process takes the source flattened in (C, H, W) order.
    """
    neurons = {group["name"]: make_neurons(group, arrays) for group in plan["groups"]}
    shapes = {entry["name"]: tuple(entry["shape"]) for entry in plan["sources"] + plan["groups"]}
    inputs = []
    for index, connection in enumerate(plan["connections"]):
        source, target = connection["source"], connection["target"]
        wires, flat = make_wires(connection, arrays.get(f"connection/{index}/weight"), shapes[source], shapes[target])
        a_out = wires.a_out
        if a_out.shape != neurons[target].a_in.shape:
            a_out = a_out.reshape(neurons[target].a_in.shape)
        a_out.connect(neurons[target].a_in)
        if source in neurons:
            connect(neurons[source].s_out, wires, flat)
        else:
            inputs.append((source, connection["lag"], wires, flat))
    return neurons, inputs


def connect(port: Any, wires: Any, flat: bool) -> None:
    """Spikes of `port`, (W, H, C) or (N,), into `wires`; dense ones read images flattened in (C, H, W) order."""
    if flat and len(port.shape) == 3:
        port = port.transpose([2, 1, 0]).flatten()
    port.connect(wires.s_in)


def make_neurons(group: dict[str, Any], arrays: Arrays) -> Any:
    from lava.proc.graded.process import GradedReluVec, GradedVec
    from lava.proc.lif.process import LIF

    shape = tuple(group["shape"][::-1])
    if group["neuron"] == "graded":
        return (GradedVec if group["role"] == "readout" else GradedReluVec)(shape=shape, vth=group["vth"])
    bias = np.broadcast_to(arrays[f"group/{group['name']}/bias"].astype(np.int32), shape).copy()
    return LIF(shape=shape, du=4095, dv=4096, vth=group["vth"], bias_mant=bias, bias_exp=group["bias_exp"])


def make_wires(connection: dict[str, Any], weight: Any, source: tuple[int, ...], target: tuple[int, ...]) -> Any:
    """The process of a connection, and whether it takes its source flat."""
    from lava.proc.conv.process import Conv
    from lava.proc.dense.process import Dense
    from lava.proc.sparse.process import Sparse
    from lava.utils.weightutils import SignMode

    wires = connection["wires"]
    synapses = {"weight_exp": connection["weight_exp"], "num_weight_bits": 8}
    synapses["num_message_bits"] = connection["message_bits"]
    if wires["kind"] == "dense":
        return Dense(weights=weight.astype(np.int32), sign_mode=SignMode.MIXED, **synapses), True
    if wires["kind"] == "per_channel":
        pixels = int(np.prod(target[1:]))
        return Dense(weights=np.tile(weight.astype(np.int32), (pixels, 1)), sign_mode=SignMode.MIXED, **synapses), True
    if wires["kind"] == "one_to_one" and len(source) == 1:
        from scipy.sparse import identity  # type: ignore[import-untyped]

        each = (wires["weight"] * identity(source[0], dtype=np.int32)).tocsr()
        return Sparse(weights=each, sign_mode=SignMode.MIXED, **synapses), True
    if wires["kind"] == "one_to_one":
        weight = np.full((source[0], 1, 1, 1), wires["weight"])
        wires = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": source[0]}
    weight = weight.astype(np.int32)[:, :, ::-1, ::-1].transpose(0, 3, 2, 1)  # Lava convolves, we correlate
    window = {key: tuple(wires[key][::-1]) for key in ("stride", "padding", "dilation")}
    return Conv(weight=weight, input_shape=source[::-1], groups=wires["groups"], **window, **synapses), False


# -- by itself


def main(file: Path, golden: Path) -> int:
    """Run the golden samples in simulation, one a step, and compare. Prints one line a population."""
    import_lava()
    from lava.magma.core.run_conditions import RunSteps
    from lava.magma.core.run_configs import Loihi2SimCfg
    from lava.proc.io import sink, source

    plan, arrays = load(file)
    with np.load(golden, allow_pickle=False) as stored:
        expected = {name: stored[name] for name in stored.files}
    feeds, found = injected(plan, arrays, expected["input"])
    neurons, inputs = build(plan, arrays)
    n, last = len(expected["input"]), plan["groups"][-1]
    for name, lag, wires, flat in inputs:
        data = np.concatenate([np.zeros((lag, *feeds[name].shape[1:]), np.int64), feeds[name]])
        data = np.concatenate([data, np.zeros((plan["latency"], *data.shape[1:]), np.int64)])
        connect(source.RingBuffer(data=data.T.astype(np.int32)).s_out, wires, flat)
    steps, sinks = n + plan["latency"], {}
    for group in plan["groups"]:
        if group["role"] not in ("population", "readout"):
            continue
        if group["role"] == "readout" and group["neuron"] == "lif":
            sinks[group["name"]] = sink.Read(buffer=steps)
            sinks[group["name"]].connect_var(neurons[group["name"]].v)
        else:
            sinks[group["name"]] = sink.RingBuffer(shape=neurons[group["name"]].s_out.shape, buffer=steps)
            neurons[group["name"]].s_out.connect(sinks[group["name"]].a_in)
    process = neurons[last["name"]]
    print(f"{steps} time steps in simulation", flush=True)
    # without the tag Lava takes its floating-point models: other spikes
    process.run(condition=RunSteps(num_steps=steps), run_cfg=Loihi2SimCfg(select_tag="fixed_pt"))
    for group in plan["groups"]:
        if group["name"] in sinks:
            data = sinks[group["name"]].data.get().T[group["depth"] :][:n]
            found[group["name"]] = readout(plan, arrays, data) if group is last else data != 0
    process.stop()
    wrong = 0
    for name, got in found.items():
        want = expected["output" if name == plan["order"][-1] else f"spikes/{name}"]
        different = int((got.reshape(want.shape) != want).sum())
        wrong += different
        print(f"{name}: {want.size} values of {n} samples, {different} different")
    return 1 if wrong else 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        status = main(Path(sys.argv[1]), Path(sys.argv[2]))
    except BaseException:
        traceback.print_exc()
        status = 2
        for actor in multiprocessing.active_children():  # Python waits for them, and they for ever
            if "Manager" not in actor.name:  # which ends by itself, and takes the shared memory with it
                actor.kill()
    sys.exit(status)
