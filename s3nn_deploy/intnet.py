"""The integer network: populations of single-step neurons with integer synapses, and the rules a valid one obeys.

A population computes, once per inference, the membrane potential

    u[c, ...] = sum over its projections of  W * s          (W integer, s spikes 0/1, or the input's integers)

and either fires, `s = [u >= threshold[c]]`, or is the readout, whose output is `u + bias[c]` itself. That is all: a
residual join is a second projection, max pooling of spikes is a convolution with ones and threshold 1, flattening is
only how a dense projection reads its source (C order), and time does not exist.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, assert_never

import numpy as np
from numpy.typing import NDArray

from s3nn_deploy.errors import DeployError

INPUT = "input"
"""The name under which projections refer to the network's input."""

EXACT_FLOAT32 = 1 << 24
"""Sums of integers are exact in float32, in any order, while every partial sum stays below this."""

IntArray = NDArray[np.integer[Any]]


def integers(values: Any, where: str = "integers") -> IntArray:
    """`values` as a read-only, C-ordered array of the narrowest signed integer type that holds them.

    Raises:
        DeployError: a value is not an integer, or does not fit 64 bits.
    """
    array = np.asarray(values)
    if array.dtype.kind == "f":
        if not np.all(np.isfinite(array)) or np.any(array != np.rint(array)) or np.any(np.abs(array) >= 2.0**63):
            raise DeployError(where, expected="integer values", got="fractions, infinities or NaN")
        array = array.astype(np.int64)
    if array.dtype.kind not in "iub" or (array.dtype == np.uint64 and np.any(array >> 63)):
        raise DeployError(where, expected="integers of at most 64 bits", got=str(array.dtype))
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    narrowest = next(
        t for t in (np.int8, np.int16, np.int32, np.int64) if np.iinfo(t).min <= low and high <= np.iinfo(t).max
    )
    array = np.array(array, dtype=narrowest, order="C")
    array.flags.writeable = False
    return array


def signed_bits(low: int, high: int) -> int:
    """The width in bits of the narrowest two's complement integer that holds `low` to `high`."""
    return max(high.bit_length(), (-low - 1).bit_length() if low < 0 else 0) + 1


@dataclass(frozen=True)
class Input:
    """What the network is shown: integers 0 .. 2^bits - 1 of `shape` (C, H, W) or (N,); with one bit they are spikes."""

    shape: tuple[int, ...]
    bits: int = 8

    @property
    def maximum(self) -> int:
        return (1 << self.bits) - 1

    @property
    def dtype(self) -> Any:
        """The type that samples are computed in."""
        return np.uint8 if self.bits <= 8 else np.uint16


@dataclass(frozen=True, eq=False)
class Dense:
    """All-to-all synapses, `weight[out, in]`; the source is read flattened in C order."""

    weight: IntArray

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", integers(self.weight, "Dense.weight"))

    def out_shape(self, source: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the population that these synapses drive from a source of shape `source`."""
        if self.weight.ndim != 2 or self.weight.shape[1] != math.prod(source):
            raise DeployError(
                "dense synapses", expected=f"weight [out, {math.prod(source)}]", got=str(self.weight.shape)
            )
        return (self.weight.shape[0],)


@dataclass(frozen=True, eq=False)
class Conv2d:
    """Shared synapses, `weight[out, in / groups, kh, kw]`: cross-correlation with zero padding, as in PyTorch."""

    weight: IntArray
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", integers(self.weight, "Conv2d.weight"))

    def out_shape(self, source: tuple[int, ...]) -> tuple[int, ...]:
        """The shape (C, H, W) of the population that these synapses drive from a source of shape `source`."""
        if self.weight.ndim != 4 or len(source) != 3:
            raise DeployError(
                "conv synapses", expected="a 4-D weight and a source (C, H, W)", got=f"{self.weight.shape} and {source}"
            )
        out, per_group, *kernel = self.weight.shape
        if self.groups < 1 or out % self.groups or per_group * self.groups != source[0]:
            raise DeployError(
                "conv synapses",
                expected=f"groups * weight.shape[1] = {source[0]} channels and groups dividing {out}",
                got=f"groups {self.groups}, weight {self.weight.shape}",
            )
        if min(*self.stride, *self.dilation) < 1 or min(self.padding) < 0:
            raise DeployError(
                "conv synapses",
                expected="stride and dilation of at least 1, padding of at least 0",
                got=f"stride {self.stride}, dilation {self.dilation}, padding {self.padding}",
            )
        spatial = tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(source[1:], kernel, self.stride, self.padding, self.dilation, strict=True)
        )
        if min(spatial) < 1:
            raise DeployError(
                "conv synapses",
                expected="a kernel that fits into the padded source",
                got=f"kernel {tuple(kernel)} on {source}",
            )
        return (out, *spatial)


Synapses = Dense | Conv2d


@dataclass(frozen=True)
class Projection:
    """Synapses from one source (a population's name, or `INPUT`) into the population that holds the projection."""

    source: str
    synapses: Synapses


@dataclass(frozen=True, eq=False)
class Population:
    """Neurons of one layer. With `threshold` (one integer per channel) they spike; with `bias` and `scale` they are the readout.

    Attributes:
        shape: (C, H, W) or (N,); the first axis is the channel.
        threshold: [channels]; a neuron fires where `u >= threshold`.
        bias: [channels]; the readout is the integer `u + bias`.
        scale: [channels], float64; `scale * (u + bias)` is the trained network's output, a host's affair.
    """

    name: str
    shape: tuple[int, ...]
    projections: tuple[Projection, ...]
    threshold: IntArray | None = None
    bias: IntArray | None = None
    scale: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        if self.threshold is not None:
            object.__setattr__(self, "threshold", integers(self.threshold, f"population {self.name!r}, threshold"))
        if self.bias is not None:
            object.__setattr__(self, "bias", integers(self.bias, f"population {self.name!r}, bias"))
            scale = np.array(1.0 if self.scale is None else self.scale, dtype=np.float64)
            scale = np.array(np.broadcast_to(scale, (self.channels,))) if scale.ndim == 0 else scale
            scale.flags.writeable = False
            object.__setattr__(self, "scale", scale)

    @property
    def channels(self) -> int:
        return self.shape[0]

    @property
    def size(self) -> int:
        """How many neurons it has."""
        return math.prod(self.shape)

    @property
    def spiking(self) -> bool:
        return self.threshold is not None

    def per_neuron(self, per_channel: NDArray[Any]) -> NDArray[Any]:
        """A per-channel array, shaped so that it broadcasts over `shape`."""
        return per_channel.reshape(-1, *[1] * (len(self.shape) - 1))


@dataclass(frozen=True, eq=False)
class IntNet:
    """An input, populations in topological order (the last one is the readout), and where they come from.

    Two networks are equal when their input and populations are, to the last integer; `provenance` does not count.
    """

    input: Input
    populations: tuple[Population, ...]
    classes: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Population:
        return next(p for p in self.populations if p.name == name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IntNet) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def readout(self) -> Population:
        return self.populations[-1]

    @property
    def scale(self) -> NDArray[np.float64]:
        """The readout's scale for each of its neurons, [classes]."""
        return np.broadcast_to(self.readout.per_neuron(np.asarray(self.readout.scale)), self.readout.shape).reshape(-1)

    @property
    def spiking(self) -> tuple[Population, ...]:
        return tuple(p for p in self.populations if p.spiking)

    def source(self, projection: Projection) -> Input | Population:
        return self.input if projection.source == INPUT else self[projection.source]

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the input's range and every population's name, shape, wiring, weights, thresholds, bias and scale."""
        digest = hashlib.sha256(json.dumps([list(self.input.shape), self.input.bits]).encode())
        for population in self.populations:
            header: list[Any] = [population.name, list(population.shape)]
            for projection in population.projections:
                header += [projection.source, *_attributes(projection.synapses).items()]
            arrays: list[NDArray[Any]] = [p.synapses.weight for p in population.projections]
            arrays += [a for a in (population.threshold, population.bias, population.scale) if a is not None]
            digest.update(json.dumps([header, [[a.dtype.str, list(a.shape)] for a in arrays]]).encode())
            for array in arrays:
                digest.update(array.tobytes())
        return digest.hexdigest()


def _attributes(synapses: Synapses) -> dict[str, Any]:
    match synapses:
        case Dense():
            return {"kind": "dense"}
        case Conv2d(stride=stride, padding=padding, dilation=dilation, groups=groups):
            return {
                "kind": "conv2d",
                "stride": list(stride),
                "padding": list(padding),
                "dilation": list(dilation),
                "groups": groups,
            }
        case _:
            assert_never(synapses)


def check(net: IntNet) -> IntNet:
    """Return `net` if it is a valid network; every stage that makes one, and every reader, ends with this.

    Raises:
        DeployError: names the population and the rule that it breaks.
    """
    if not 1 <= net.input.bits <= 16:
        raise DeployError("input", expected="1 to 16 bits", got=f"{net.input.bits}")
    _check_shape("input", net.input.shape)
    shapes: dict[str, tuple[int, ...]] = {INPUT: net.input.shape}
    if not net.populations:
        raise DeployError("network", expected="at least one population", got="none")
    for population in net.populations:
        where = f"population {population.name!r}"
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.\-]*", population.name) or population.name == "output":
            raise DeployError(
                where,
                expected="a name of letters, digits, '_', '.' and '-' other than 'output'",
                got=repr(population.name),
            )
        if population.name in shapes:
            raise DeployError(where, "the name is taken by another population or the input")
        _check_shape(where, population.shape)
        if not population.projections:
            raise DeployError(where, expected="at least one projection", got="none")
        for projection in population.projections:
            if projection.source not in shapes:
                raise DeployError(where, expected="a source that comes before it", got=repr(projection.source))
            shape = projection.synapses.out_shape(shapes[projection.source])
            if shape != population.shape:
                raise DeployError(
                    where,
                    f"the projection from {projection.source!r}",
                    expected=f"shape {population.shape}",
                    got=str(shape),
                )
        if population.spiking == (population.bias is not None):
            raise DeployError(
                where, expected="either a threshold or a bias", got="both" if population.spiking else "neither"
            )
        for kind in ("threshold", "bias", "scale"):
            array = getattr(population, kind)
            if array is not None and array.shape != (population.channels,):
                raise DeployError(where, kind, expected=f"shape ({population.channels},)", got=str(array.shape))
        if population.scale is not None and not (
            np.all(np.isfinite(population.scale)) and np.all(population.scale > 0)
        ):
            raise DeployError(where, "scale", expected="finite positive numbers", got=str(population.scale))
        if population.spiking == (population is net.readout):
            raise DeployError(
                where,
                expected="exactly one readout, in the last place",
                got="a spiking last population" if population.spiking else "a readout before the end",
            )
        if worst_case(net, population) >= 1 << 62:
            raise DeployError(where, expected="membrane potentials below 2^62", got=f"{worst_case(net, population):,}")
        if population.spiking:
            shapes[population.name] = population.shape
    if net.classes and len(net.classes) != net.readout.size:
        raise DeployError("classes", expected=f"{net.readout.size} names", got=str(len(net.classes)))
    return net


def _check_shape(where: str, shape: tuple[int, ...]) -> None:
    if len(shape) not in (1, 3) or min(shape, default=0) < 1:
        raise DeployError(where, expected="shape (C, H, W) or (N,) with positive sizes", got=str(shape))


def reach(net: IntNet, population: Population) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The interval [low, high] per channel that the membrane potential cannot leave, for any input: arrays [channels].

    Low takes every negative weight at the source's maximum and every positive one at zero; high the reverse.
    """
    low = np.zeros(population.channels, dtype=np.int64)
    high = np.zeros(population.channels, dtype=np.int64)
    for projection in population.projections:
        source = net.source(projection)
        maximum = source.maximum if isinstance(source, Input) else 1
        weight = projection.synapses.weight.reshape(population.channels, -1).astype(np.int64)
        low += maximum * np.minimum(weight, 0).sum(1)
        high += maximum * np.maximum(weight, 0).sum(1)
    return low, high


def worst_case(net: IntNet, population: Population) -> int:
    """The largest magnitude that any partial sum of the population's membrane potentials can have, bias included.

    Exact below 2^62; beyond, where int64 may wrap (a file's weights can be anything), rounded to a float64.
    """
    bias = np.zeros(population.channels, dtype=np.int64) if population.bias is None else population.bias
    rough = np.abs(bias.astype(np.float64))
    for projection in population.projections:
        source = net.source(projection)
        weight = np.abs(projection.synapses.weight.reshape(population.channels, -1).astype(np.float64))
        rough = rough + (source.maximum if isinstance(source, Input) else 1) * weight.sum(1)
    if rough.max() >= 2.0**62:
        return int(rough.max())
    low, high = reach(net, population)
    return int((high - low + np.abs(bias.astype(np.int64))).max())


def clamp_thresholds(net: IntNet) -> IntNet:
    """Move thresholds that lie outside the reachable range to its edge: no spike changes, for any input."""
    populations = []
    for population in net.populations:
        if population.threshold is not None:
            low, high = reach(net, population)
            population = replace(population, threshold=np.clip(population.threshold.astype(np.int64), low, high + 1))
        populations.append(population)
    return check(replace(net, populations=tuple(populations)))


def to_plain(net: IntNet) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """`net` as a dictionary of plain data and a dictionary of arrays, from which `from_plain` makes it again."""
    arrays: dict[str, np.ndarray] = {}
    populations = []
    for population in net.populations:
        projections = []
        for index, projection in enumerate(population.projections):
            arrays[f"{population.name}/{index}/weight"] = projection.synapses.weight
            projections.append({"source": projection.source, **_attributes(projection.synapses)})
        for kind in ("threshold", "bias", "scale"):
            if (array := getattr(population, kind)) is not None:
                arrays[f"{population.name}/{kind}"] = array
        populations.append({"name": population.name, "shape": list(population.shape), "projections": projections})
    meta = {
        "input": {"shape": list(net.input.shape), "bits": net.input.bits},
        "populations": populations,
        "classes": list(net.classes),
        "provenance": dict(net.provenance),
    }
    return meta, arrays


def from_plain(meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> IntNet:
    """The network that `to_plain` took apart, checked.

    Raises:
        DeployError: something is missing or invalid.
    """
    try:
        populations = tuple(_population_from_plain(p, arrays) for p in meta["populations"])
        net = IntNet(
            Input(_ints(meta["input"]["shape"]), int(meta["input"]["bits"])),
            populations,
            tuple(str(c) for c in meta.get("classes", ())),
            dict(meta.get("provenance", {})),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DeployError(
            "network description", f"is incomplete or malformed ({type(error).__name__}: {error})"
        ) from error
    return check(net)


def _population_from_plain(plain: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Population:
    name = str(plain["name"])
    projections = []
    for index, projection in enumerate(plain["projections"]):
        weight = arrays[f"{name}/{index}/weight"]
        if projection["kind"] == "dense":
            synapses: Synapses = Dense(weight)
        elif projection["kind"] == "conv2d":
            pairs = {key: _pair(projection[key]) for key in ("stride", "padding", "dilation")}
            synapses = Conv2d(weight, **pairs, groups=int(projection["groups"]))
        else:
            raise ValueError(f"unknown synapses {projection['kind']!r}")
        projections.append(Projection(str(projection["source"]), synapses))
    per_channel = {kind: arrays.get(f"{name}/{kind}") for kind in ("threshold", "bias", "scale")}
    return Population(name, _ints(plain["shape"]), tuple(projections), **per_channel)


def _ints(values: Any) -> tuple[int, ...]:
    return tuple(int(v) for v in values)


def _pair(values: Any) -> tuple[int, int]:
    first, second = values
    return int(first), int(second)


def rewrite(net: IntNet, change: Callable[[Synapses], Synapses]) -> IntNet:
    """`net` with every projection's synapses replaced by `change(synapses)`, checked."""
    return check(
        replace(
            net,
            populations=tuple(
                replace(p, projections=tuple(replace(j, synapses=change(j.synapses)) for j in p.projections))
                for p in net.populations
            ),
        )
    )


def consumers(net: IntNet) -> Iterator[tuple[Population, Projection]]:
    """Every projection together with the population that it drives, in order."""
    for population in net.populations:
        for projection in population.projections:
            yield population, projection
