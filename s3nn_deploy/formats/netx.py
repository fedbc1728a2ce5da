"""Lava's netx HDF5 file for Loihi: a chain of conv and dense layers of CUBA neurons without memory.

Weights are stored doubled, so that a mixed-sign synapse, whose lowest bit Loihi drops, keeps them. A neuron with
iDecay = vDecay = 4096 forgets everything at each step and fires where `2 u + bias > vThMant`; with

    bias = 1 - 2 threshold + vThMant

that is `u >= threshold`. The readout never fires: vThMant = 2^17 - 1, bias = 2 b, potential v = 64 * 2 (u + b). What
netx has no place for is one text beside the layers and a `name` in each; netx does not look there. A network that
Lava's simulation would not compute exactly is refused; what it computes but the chip may not is in `hardware_notes`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, assert_never

import h5py
import numpy as np
from numpy.typing import NDArray

from s3nn_deploy.errors import DeployError
from s3nn_deploy.files import MAX_BYTES, check_hdf5_heaps, existing, replacing
from s3nn_deploy.formats import description
from s3nn_deploy.intnet import (
    INPUT,
    Conv2d,
    Dense,
    Input,
    IntNet,
    Population,
    Projection,
    Synapses,
    check,
    clamp_thresholds,
    reach,
)

SCHEMA = "s3nn-deploy-netx/1"

VTH_MAX = (1 << 17) - 1
"""The highest vThMant, and the largest |2 u| in a neuron's 24 bits, 6 of which are fractional. Beyond, u wraps."""

BIAS_SIMULATED, BIAS_HARDWARE = 1 << 15, 1 << 12
"""Biases are -B .. B - 1: int16 in Lava's fixed-point LIF, 13 bits on Loihi."""

SUM_HARDWARE = (1 << 15) - 1
"""The 16-bit accumulator that Lava declares without enforcing it, and nengo-loihi enforces for Loihi 1."""

ELSEWHERE = "or deploy to a target without this limit, emulator or onnx"


def lower(net: IntNet) -> IntNet:
    """`net` with its thresholds clamped to the reachable range, if the file can hold it exactly.

    Raises:
        DeployError: names the population, the value, the limit and the way out.
    """
    net = clamp_thresholds(net)
    if net.input.bits > 8:
        hint = f"Train with 8 input bits or fewer, {ELSEWHERE}."
        raise DeployError("input", expected="at most 8 bits, Lava's graded input", got=f"{net.input.bits}", hint=hint)
    previous = INPUT
    for population in net.populations:
        where = f"population {population.name!r}"
        sources = [p.source for p in population.projections]
        if sources != [previous]:
            hint = f"netx files hold chains. Train a network without skip connections, {ELSEWHERE}."
            problem = f"reads {' and '.join(map(repr, sources))}: a join, or a skipped layer"
            raise DeployError(where, problem, expected=f"one projection, from {previous!r}", hint=hint)
        previous = population.name
        _check_weights(where, population)
        _check_sums(where, net, population)
        _check_bias(where, population)
    return net


def _check_weights(where: str, population: Population) -> None:
    synapses = population.projections[0].synapses
    low, high = int(synapses.weight.min()), int(synapses.weight.max())
    if low < -128 or high > 127:
        hint = f"Train with 8 weight bits or fewer, {ELSEWHERE}."
        raise DeployError(where, expected="weights -128..127", got=f"{low}..{high}", hint=hint)
    if isinstance(synapses, Conv2d) or high > 0:
        return
    if low == 0:
        hint = "It does not depend on its input: leave it out, or train again."
        raise DeployError(where, "all dense weights are zero, and netx divides by the largest", hint=hint)
    if -low & (-low - 1) == 0:  # netx scales the lowest to -256, and Lava then clips inhibitory synapses to -255
        problem = f"no dense weight is positive and the lowest is {low}, a power of two, which netx loads as another"
        raise DeployError(where, problem, hint=f"Train with another seed or weight width, {ELSEWHERE}.")


def _check_sums(where: str, net: IntNet, population: Population) -> None:
    low, high = _sums(net, population)
    if (worst := max(high, -low)) <= VTH_MAX:
        return
    hint = f"Train this layer with fewer weight bits or synapses, {ELSEWHERE}."
    if population is net.populations[0] and population.spiking:
        per_unit = worst // net.input.maximum
        if fits := [bits for bits in range(1, net.input.bits) if per_unit * ((1 << bits) - 1) <= VTH_MAX]:
            hint = f"With these weights {fits[-1]} input bits fit. {hint}"
    problem = "doubled sums can leave the 24 bits of a Loihi neuron"
    raise DeployError(where, problem, expected=f"at most {VTH_MAX:,}", got=f"{worst:,}", hint=hint)


def _check_bias(where: str, population: Population) -> None:
    bias, values = _neurons(population)[1], population.threshold if population.spiking else population.bias
    if values is None or (bias.min() >= -BIAS_SIMULATED and bias.max() < BIAS_SIMULATED):
        return
    name = "thresholds" if population.spiking else "biases"
    problem = f"{name} {values.min()}..{values.max()} need LIF biases beyond 16 bits beside the layer's one vThMant"
    limit, got = f"{-BIAS_SIMULATED}..{BIAS_SIMULATED - 1}", f"{bias.min()}..{bias.max()}"
    hint = f"Train this layer with fewer weight or input bits, {ELSEWHERE}."
    raise DeployError(where, problem, expected=limit, got=got, hint=hint)


def _sums(net: IntNet, population: Population) -> tuple[int, int]:
    """The lowest and highest doubled sum that can occur; a readout's may not leave the range with its bias either."""
    low, high = (2 * side for side in reach(net, population))
    if not population.spiking:
        bias = _neurons(population)[1]
        low, high = np.minimum(low, low + bias), np.maximum(high, high + bias)
    return int(low.min()), int(high.max())


def _neurons(population: Population) -> tuple[int, NDArray[np.int64]]:
    """The layer's vThMant, which centres the biases, and the bias of each channel."""
    if population.threshold is None:
        assert population.bias is not None
        return VTH_MAX, 2 * population.bias.astype(np.int64)
    need = 1 - 2 * population.threshold.astype(np.int64)
    vth = min(max(-(int(need.min()) + int(need.max())) // 2, 1), VTH_MAX)
    return vth, need + vth


def hardware_notes(net: IntNet) -> list[str]:
    """What the file of `net` needs that Lava's simulation has but Loihi may not, one line a population and limit.

    Raises:
        DeployError: `net` cannot be written at all.
    """
    net, notes = lower(net), []
    for population in net.populations:
        synapses = population.projections[0].synapses
        low, high = (2 * side for side in reach(net, population))
        if max(int(high.max()), -int(low.min())) > SUM_HARDWARE:
            sums = f"doubled sums {low.min():,}..{high.max():,} can exceed 16-bit accumulators ({SUM_HARDWARE:,})"
            notes.append(f"{population.name}: {sums}; fewer input or weight bits avoid it")
        bias = _neurons(population)[1]
        if _beyond(bias):
            limit = f"{-BIAS_HARDWARE:,}..{BIAS_HARDWARE - 1:,}"
            notes.append(f"{population.name}: biases {bias.min():,}..{bias.max():,} exceed 13 bits ({limit})")
        if isinstance(synapses, Conv2d):
            source = net.source(population.projections[0])
            notes += [f"{population.name}: {note}" for note in _conv_notes(synapses, source)]
    return notes


def beyond_hardware(net: IntNet) -> list[str]:
    """The populations whose biases in the file of `net` do not fit the chip."""
    return [p.name for p in lower(net).populations if _beyond(_neurons(p)[1])]


def _beyond(bias: NDArray[np.int64]) -> bool:
    return bool(bias.min() < -BIAS_HARDWARE or bias.max() >= BIAS_HARDWARE)


def _conv_notes(conv: Conv2d, source: Input | Population) -> list[str]:
    notes, (_, height, width) = [], source.shape
    if max(height, width) >= 256:
        notes.append(f"convolves {height} x {width} neurons; Loihi 2's compiler vouches for maps below 256 only")
    sizes = {"groups": (conv.groups,), "kernel": conv.weight.shape[2:]}
    sizes |= {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
    for name, values in sizes.items():
        if max(values) > 127:
            notes.append(f"{name} {max(values)} exceeds the 8 bits of Lava's own model, which s3nn-deploy widens")
    return notes


def write(net: IntNet, path: str | Path) -> Path:
    """Write `net`, lowered, to `path`.

    Raises:
        DeployError: the network cannot be expressed (see `lower`), or the place cannot be written.
    """
    net = lower(net)
    with replacing(path) as temporary, h5py.File(temporary, "w") as file:
        file[description.KEY] = np.bytes_(description.to_text(net, SCHEMA))
        for index, layer in enumerate(_layers(net)):
            _put(file.create_group(f"layer/{index}"), layer)
    return Path(path)


def _layers(net: IntNet) -> list[dict[str, Any]]:
    """The layers as nested dictionaries, named as netx names them."""
    layers: list[dict[str, Any]] = [{"type": _slayer("input"), "shape": net.input.shape}]
    for population in net.populations:
        projection = population.projections[0]
        vth, bias = _neurons(population)
        layer = {"name": np.bytes_(population.name), "shape": population.shape, "bias": bias.astype(np.int32)}
        layer["weight"] = 2 * projection.synapses.weight.astype(np.int16)
        layer["neuron"] = {"type": _slayer("CUBA"), "iDecay": 4096, "vDecay": 4096, "vThMant": vth}
        match projection.synapses:
            case Dense():
                if len(net.source(projection).shape) == 3:
                    layers.append({"type": _slayer("flatten")})
                layers.append({"type": _slayer("dense"), **layer})
            case Conv2d(stride=stride, padding=padding, dilation=dilation, groups=groups):
                window = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
                layers.append({"type": _slayer("conv"), **layer, **window})
            case _:
                assert_never(projection.synapses)
    return layers


def _slayer(word: str) -> NDArray[np.bytes_]:
    """A type as slayer writes it."""
    return np.array([word], dtype="S10")


def _put(group: h5py.Group, contents: dict[str, Any]) -> None:
    for name, value in contents.items():
        if isinstance(value, dict):
            _put(group.create_group(name), value)
        else:
            group[name] = value


UNREADABLE = (DeployError, OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError)
"""What damaged contents make this package, h5py and NumPy raise."""


def read(path: str | Path) -> IntNet:
    """Read a network from a file that `write` wrote; other netx files are refused.

    Raises:
        DeployError: no such file, or one that is damaged, was changed, or was not written by this package.
    """
    path = existing(path)
    try:
        check_hdf5_heaps(path)
        with h5py.File(path, "r") as file:
            net = check(_net(file, _reader(min(path.stat().st_size, MAX_BYTES)), str(path)))
        if lower(net) != net:
            raise ValueError("a threshold lies outside the reachable range")
    except UNREADABLE as error:
        hint = "It is truncated, damaged, or was not written by s3nn-deploy. Export the network again."
        raise DeployError(str(path), f"is not a readable {SCHEMA} file ({error})", hint=hint) from error
    return net


Take = Callable[..., np.ndarray]


def _reader(budget: int) -> Take:
    """A function that reads one plain data set of that rank and kind, as long as all of them fit `budget` bytes."""

    def take(group: h5py.Group, name: str, ndim: int = 0, kind: str = "i") -> np.ndarray:
        nonlocal budget
        where = f"{group.name}/{name}"
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise ValueError(f"{where} is missing or in another file")
        data = group[name]
        if data.is_virtual or data.external or data.chunks or data.shape is None:
            raise ValueError(f"{where} is not stored plainly")
        if data.ndim != ndim or data.dtype.kind != kind:
            raise ValueError(f"{where} has shape {data.shape} and dtype {data.dtype}")
        budget -= data.nbytes
        if budget < 0:
            raise ValueError(f"{where} declares {data.nbytes:,} bytes, more than the file holds")
        return np.asarray(data[()])

    return take


def _net(file: h5py.File, take: Take, where: str) -> IntNet:
    about = description.from_text(take(file, description.KEY, kind="S").item(), SCHEMA, where)
    layers = [file["layer"][str(index)] for index in range(len(file["layer"]))]
    types = [take(layer, "type", 1, "S")[0].decode("ascii") for layer in layers]
    if types[:1] != ["input"]:
        raise ValueError("the first layer is not the input")
    shape, flat, populations = _ints(take(layers[0], "shape", 1)), False, list[Population]()
    net_input = Input(shape, about.bits)
    for layer, kind in zip(layers[1:], types[1:], strict=True):
        if kind == "flatten" and len(shape) == 3 and not flat:
            flat = True
            continue
        if kind not in ("conv", "dense") or flat != (kind == "dense" and len(shape) == 3):
            raise ValueError(f"{layer.name} is {kind!r} after a layer of shape {shape}")
        source = populations[-1].name if populations else INPUT
        scale = about.scale if layer == layers[-1] else None
        populations.append(_population(layer, _synapses(layer, kind, take), source, scale, take))
        shape, flat = populations[-1].shape, False
    return IntNet(net_input, tuple(populations), about.classes, about.provenance)


def _synapses(layer: h5py.Group, kind: str, take: Take) -> Synapses:
    if kind == "dense":
        return Dense(_half(take(layer, "weight", 2), layer.name))
    weight = _half(take(layer, "weight", 4), layer.name)
    (sh, sw), (ph, pw), (dh, dw) = (_ints(take(layer, pair, 1)) for pair in ("stride", "padding", "dilation"))
    return Conv2d(weight, (sh, sw), (ph, pw), (dh, dw), int(take(layer, "groups")))


def _population(
    layer: h5py.Group, synapses: Synapses, source: str, scale: NDArray[np.float64] | None, take: Take
) -> Population:
    """One layer's population, the readout if there is a scale."""
    name, shape = take(layer, "name", kind="S").item().decode("ascii"), _ints(take(layer, "shape", 1))
    neuron, projections = layer["neuron"], (Projection(source, synapses),)
    found = take(neuron, "type", 1, "S")[0], int(take(neuron, "iDecay")), int(take(neuron, "vDecay"))
    if found != (b"CUBA", 4096, 4096):
        raise ValueError(f"{neuron.name} is {found}, not a CUBA neuron that forgets at each step")
    vth, bias = int(take(neuron, "vThMant")), take(layer, "bias", 1).astype(np.int64)
    if scale is None:
        population = Population(name, shape, projections, threshold=_half(1 + vth - bias, layer.name))
    else:
        population = Population(name, shape, projections, bias=_half(bias, layer.name), scale=scale)
    written_vth, written_bias = _neurons(population)
    if vth != written_vth or not np.array_equal(bias, written_bias):
        raise ValueError(f"{layer.name} has another vThMant or bias than s3nn-deploy writes")
    return population


def _half(doubled: np.ndarray, where: str) -> np.ndarray:
    if np.any(doubled & 1):
        raise ValueError(f"{where} holds odd values where doubled ones belong")
    return doubled >> 1


def _ints(values: np.ndarray) -> tuple[int, ...]:
    return tuple(int(v) for v in values)
