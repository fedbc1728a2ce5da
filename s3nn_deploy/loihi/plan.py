"""What runs on Loihi: groups of neurons, the synapses between them, and what the host injects; plain data, no network.

Weights, biases and thresholds are the numbers that the chip (and Lava's processes) are given. Every neuron is without
memory: a LIF neuron with du = 4095 and dv = 4096, or Loihi 2's graded one. Sample k, shown at step k + 1, is in a group
of depth d at step k + 1 + d, so that one sample a step goes in and one comes out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, assert_never

import numpy as np

from s3nn_deploy.intnet import Conv2d, Dense, Input, IntArray, Population, Projection, integers

ENCODINGS = {
    "spikes": "the input is binary: each one of a sample is a spike",
    "graded": "each value is the payload of a graded spike (Loihi 2; Loihi 1 has none)",
    "host": "the populations that read the input are computed by the host, and their spikes are injected",
    "planes": "each value is as many spikes as it has bits, weighted by powers of two",
    "thermometer": "each value is as many spikes of one weight as it is worth",
}
"""How samples become what the chip is given."""

LIF, GRADED = "lif", "graded"
"""Kinds of neurons: LIF has 24 bits of state, 6 of them fractional; GradedReluVec (Loihi 2) has 24, and no bias."""


@dataclass(frozen=True, eq=False)
class OneToOne:
    """One synapse of `weight` to each neuron from its namesake."""

    weight: int


@dataclass(frozen=True, eq=False)
class PerChannel:
    """From each of few flat sources to every neuron of a channel the same `weight[channel, source]`."""

    weight: IntArray

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", integers(self.weight, "PerChannel.weight"))


Wires = Dense | Conv2d | OneToOne | PerChannel


@dataclass(frozen=True)
class Source:
    """What the host injects, once a step: `of` is the network's input, or a population that the host computes.

    Attributes:
        message_bits: of a graded spike's payload; 0: plain spikes.
    """

    name: str
    shape: tuple[int, ...]
    of: str
    message_bits: int = 0


@dataclass(frozen=True, eq=False)
class Group:
    """Neurons with one threshold. A LIF neuron fires where `sum + (bias << bias_exp - 6) > vth`, a graded one where `sum > vth`.

    Attributes:
        of: the population that it is or serves.
        role: "population", "relay" (repeats spikes one step later), "always-on" (fires at each step) or "readout".
        depth: how many steps it lags behind the input.
        scale: its sums are that many times the network's membrane potentials.
        bias: mantissas, [channels], or one for all.
        host_bias: of a readout, what the host adds to each channel of `sum / scale`.
    """

    name: str
    of: str
    role: str
    shape: tuple[int, ...]
    depth: int = 0
    neuron: str = LIF
    scale: int = 1
    vth: int = 0
    bias: IntArray | None = None
    bias_exp: int = 6
    host_bias: IntArray | None = None

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))


@dataclass(frozen=True, eq=False)
class Connection:
    """Synapses from a source or group into a group; stored weights count `<< weight_exp`.

    Attributes:
        projection: which of the population's projections it is (a part of); -1: none, it serves the mapping.
        lag: steps by which what the host injects is late, so that all of a join belongs to one sample.
    """

    source: str
    target: str
    wires: Wires
    projection: int = -1
    weight_exp: int = 0
    message_bits: int = 0
    lag: int = 0


@dataclass(frozen=True)
class Step:
    """What one pass of the mapping did, one line a finding."""

    name: str
    lines: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Plan:
    """The whole of it.

    Attributes:
        input: the trained network's input, before the encoding.
        encoding: a key of `ENCODINGS`.
        host: populations that the host computes.
        order: of all populations in the network.
        passes: what each pass of the mapping did, in order.
    """

    input: Input
    encoding: str
    host: tuple[Population, ...] = ()
    sources: tuple[Source, ...] = ()
    groups: tuple[Group, ...] = ()
    connections: tuple[Connection, ...] = ()
    order: tuple[str, ...] = ()
    passes: tuple[Step, ...] = ()

    def __getitem__(self, name: str) -> Group:
        return next(g for g in self.groups if g.name == name)

    def __eq__(self, other: object) -> bool:
        """The same things run; what the passes said is no part of it."""
        if not isinstance(other, Plan):
            return False
        (meta, arrays), (others, more) = to_plain(self), to_plain(other)
        same = meta == others and arrays.keys() == more.keys()
        return same and all(np.array_equal(array, more[name]) for name, array in arrays.items())

    __hash__ = None  # type: ignore[assignment]

    @property
    def readout(self) -> Group:
        return self.groups[-1]

    @property
    def latency(self) -> int:
        """Steps from a sample to its readout; so many first outputs belong to no sample."""
        return self.readout.depth

    def into(self, group: Group) -> list[Connection]:
        """The connections into a group, in order."""
        return [c for c in self.connections if c.target == group.name]


def levels(bits: int, encoding: str) -> np.ndarray:
    """What each of the spikes that stand for one value of `bits` bits is worth."""
    match encoding:
        case "planes":
            return 1 << np.arange(bits)
        case "thermometer":
            return np.ones((1 << bits) - 1, dtype=np.int64)
        case _:
            return np.ones(1, dtype=np.int64)


def to_plain(plan: Plan) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A plan as plain data and arrays, from which `from_plain` makes it again (without `passes`)."""
    arrays: dict[str, np.ndarray] = {}
    groups, connections, host = [], [], []
    for g in plan.groups:
        plain = {"name": g.name, "of": g.of, "role": g.role, "shape": list(g.shape), "depth": g.depth}
        groups.append({**plain, "neuron": g.neuron, "scale": g.scale, "vth": g.vth, "bias_exp": g.bias_exp})
        given = {f"group/{g.name}/bias": g.bias, f"group/{g.name}/host_bias": g.host_bias}
        arrays |= {name: array for name, array in given.items() if array is not None}
    for index, c in enumerate(plan.connections):
        plain = {"source": c.source, "target": c.target, "projection": c.projection, "weight_exp": c.weight_exp}
        wires = _wires_to_plain(c.wires, f"connection/{index}/weight", arrays)
        connections.append({**plain, "message_bits": c.message_bits, "lag": c.lag, "wires": wires})
    for p in plan.host:
        assert p.threshold is not None
        arrays[f"host/{p.name}/threshold"] = p.threshold
        projections = [
            {"source": j.source, "wires": _wires_to_plain(j.synapses, f"host/{p.name}/{index}/weight", arrays)}
            for index, j in enumerate(p.projections)
        ]
        host.append({"name": p.name, "shape": list(p.shape), "projections": projections})
    sources = [
        {"name": s.name, "shape": list(s.shape), "of": s.of, "message_bits": s.message_bits} for s in plan.sources
    ]
    meta = {
        "input": {"shape": list(plan.input.shape), "bits": plan.input.bits},
        "encoding": plan.encoding,
        "latency": plan.latency,
        "order": list(plan.order),
        "host": host,
        "sources": sources,
        "groups": groups,
        "connections": connections,
    }
    return meta, arrays


def from_plain(meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Plan:
    """The plan that `to_plain` took apart.

    Raises:
        KeyError, TypeError, ValueError, DeployError: something is missing or of another type.
    """
    host = tuple(
        Population(
            str(p["name"]),
            _ints(p["shape"]),
            tuple(
                Projection(str(j["source"]), _synapses(_wires(j["wires"], f"host/{p['name']}/{index}/weight", arrays)))
                for index, j in enumerate(p["projections"])
            ),
            threshold=arrays[f"host/{p['name']}/threshold"],
        )
        for p in meta["host"]
    )
    groups = tuple(
        Group(
            str(g["name"]),
            str(g["of"]),
            str(g["role"]),
            _ints(g["shape"]),
            int(g["depth"]),
            str(g["neuron"]),
            int(g["scale"]),
            int(g["vth"]),
            arrays.get(f"group/{g['name']}/bias"),
            int(g["bias_exp"]),
            arrays.get(f"group/{g['name']}/host_bias"),
        )
        for g in meta["groups"]
    )
    connections = tuple(
        Connection(
            str(c["source"]),
            str(c["target"]),
            _wires(c["wires"], f"connection/{index}/weight", arrays),
            int(c["projection"]),
            int(c["weight_exp"]),
            int(c["message_bits"]),
            int(c["lag"]),
        )
        for index, c in enumerate(meta["connections"])
    )
    sources = tuple(
        Source(str(s["name"]), _ints(s["shape"]), str(s["of"]), int(s["message_bits"])) for s in meta["sources"]
    )
    spec = Input(_ints(meta["input"]["shape"]), int(meta["input"]["bits"]))
    order = tuple(str(name) for name in meta["order"])
    plan = Plan(spec, str(meta["encoding"]), host, sources, groups, connections, order)
    if meta["latency"] != plan.latency:
        raise ValueError(f"latency {meta['latency']}, but the readout's depth is {plan.latency}")
    return plan


def _wires_to_plain(wires: Wires, key: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Wires as plain data; their weights go into `arrays` under `key`."""
    if isinstance(wires, OneToOne):
        return {"kind": "one_to_one", "weight": wires.weight}
    arrays[key] = wires.weight
    match wires:
        case Dense():
            return {"kind": "dense"}
        case PerChannel():
            return {"kind": "per_channel"}
        case Conv2d(stride=stride, padding=padding, dilation=dilation, groups=groups):
            window = {"stride": list(stride), "padding": list(padding), "dilation": list(dilation)}
            return {"kind": "conv2d", **window, "groups": groups}
        case _:
            assert_never(wires)


def _wires(plain: Mapping[str, Any], key: str, arrays: Mapping[str, np.ndarray]) -> Wires:
    match plain["kind"]:
        case "one_to_one":
            return OneToOne(int(plain["weight"]))
        case "dense":
            return Dense(arrays[key])
        case "per_channel":
            return PerChannel(arrays[key])
        case "conv2d":
            (sh, sw), (ph, pw), (dh, dw) = (_ints(plain[pair]) for pair in ("stride", "padding", "dilation"))
            return Conv2d(arrays[key], (sh, sw), (ph, pw), (dh, dw), int(plain["groups"]))
        case kind:
            raise ValueError(f"unknown wires {kind!r}")


def _synapses(wires: Wires) -> Dense | Conv2d:
    if not isinstance(wires, Dense | Conv2d):
        raise ValueError("the host computes dense and convolutional synapses only")
    return wires


def _ints(values: Any) -> tuple[int, ...]:
    return tuple(int(v) for v in values)
