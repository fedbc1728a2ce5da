"""NIR graph: Affine and Conv2d nodes and neurons, integers held as float32, in the forms that peers run exactly.

NIR has no threshold per channel that every reader takes, and no word on integers. So a spiking population is

    bias of its first synapses = T - threshold [channels],    IF(r = 1, v_threshold = T - 1/2 for every neuron)

and fires where `u + T - threshold >= T`, that is `u >= threshold`. NIR fires where `v > v_threshold`, half of its
readers where `>=`: with integers and a half they agree. T is 2 above the largest `u - threshold`, so that
`v < 2 v_threshold` and readers whose neurons may fire several times a step emit 0 or 1. Two edges into a neuron (a
residual join) are summed, as NIR says. NIR's type check takes neither groups nor non-square kernels: `lower` rewrites
them. The numbers in the nodes are the whole network but for the input's bits, the readout's scale, classes and
provenance: JSON in the graph's metadata. That is profile `if`; `PROFILES` has the others, which differ in the neurons.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from pathlib import Path
from typing import Any

import h5py
import nir
import numpy as np
from numpy.typing import NDArray

from s3nn_deploy import rewrites
from s3nn_deploy.errors import DeployError, suggestion
from s3nn_deploy.files import MAX_BYTES, MAX_TEXT, check_hdf5_heaps, check_hdf5_texts, existing, replacing
from s3nn_deploy.formats import description
from s3nn_deploy.intnet import (
    INPUT,
    Conv2d,
    Dense,
    Input,
    IntArray,
    IntNet,
    Population,
    Projection,
    Synapses,
    check,
    clamp_thresholds,
    integers,
    reach,
    worst_case,
)
from s3nn_deploy.rewrites import MAX_UNROLLED, expand_groups, flat_input, is_square, square_kernels, unroll

SCHEMA = "s3nn-deploy-nir/1"

LIMIT = 1 << 23
"""Below this every multiple of 1/2 is exact in float32: membrane potentials, biases and v_threshold."""

DT = 1e-4
"""The time step of snnTorch, SpikingJelly and Lava's converter, in seconds; NIR files do not state one."""

ROCKPOOL_TAU, ROCKPOOL_R = 1.0, 1e9
"""Rockpool takes tau / (1 + r) for the time step; with these nothing decays in one."""


@dataclass(frozen=True)
class Profile:
    """One way of writing a spiking population.

    Attributes:
        node: the neurons, given the least integer v [*shape] at which each one fires, and their metadata.
        folded: that is one T for all of them, and T - threshold is in the bias; else it is the threshold itself.
        dense: everything is flat and dense, the input too.
        whole: arrays of integers of any size instead of float32.
    """

    summary: str
    node: Callable[[IntArray, Mapping[str, Any]], Any]
    folded: bool = True
    dense: bool = False
    whole: bool = False


def _if(top: IntArray, about: Mapping[str, Any]) -> Any:
    return nir.IF(r=_ones(top), v_threshold=_halved(top), metadata=about)


def _cubalif(top: IntArray, about: Mapping[str, Any]) -> Any:
    tau = np.full(top.shape, DT)  # not float32, whose 1e-4 is less than the time step that readers compare with
    return nir.CubaLIF(
        tau_syn=tau,
        tau_mem=tau,
        r=_ones(top),
        w_in=_ones(top),
        v_leak=0 * _ones(top),
        v_threshold=_halved(top),
        metadata=about,
    )


def _rockpool(top: IntArray, about: Mapping[str, Any]) -> Any:
    tau = ROCKPOOL_TAU * _ones(top)
    return nir.CubaLIF(
        tau_syn=tau,
        tau_mem=tau,
        r=np.full(top.shape, ROCKPOOL_R),
        w_in=_ones(top),
        v_leak=0 * _ones(top),
        v_threshold=_halved(top),
        metadata=about,
    )


def _threshold(top: IntArray, about: Mapping[str, Any]) -> Any:
    return nir.Threshold(threshold=_halved(top), metadata=about)


def _archive(top: IntArray, about: Mapping[str, Any]) -> Any:
    return nir.Threshold(threshold=integers(top - 1), metadata=about)  # NIR: it fires where v > threshold


def _ones(top: IntArray) -> NDArray[np.float32]:
    return np.ones(top.shape, np.float32)


def _halved(top: IntArray) -> NDArray[np.float32]:
    return (top - 0.5).astype(np.float32)


PROFILES = {
    "if": Profile("IF neurons: Norse, sinabs, SpikingJelly (dt=1.0), NIRTorch, Lava-DL's converter, Nengo", _if),
    "cubalif": Profile("CubaLIF at full leak, tau = 1e-4: snnTorch, SpikingJelly, Norse (dt=1e-4), Lava-DL", _cubalif),
    "threshold": Profile("Threshold nodes, one per neuron: sc-neurocore, spikeforge", _threshold, folded=False),
    "rockpool": Profile("CubaLIF that does not decay, all layers dense: Rockpool", _rockpool, dense=True),
    "archive": Profile(
        "the integers themselves, int8 and up, thresholds unfolded: no peer runs it", _archive, folded=False, whole=True
    ),
}
"""The forms of a file, and who runs them exactly."""


def lower(net: IntNet, profile: str = "if", merge_skips: bool = False) -> IntNet:
    """`net` with groups expanded, kernels square (or else the population flat and dense) and thresholds clamped.

    Args:
        profile: a name in `PROFILES`; `rockpool` makes everything dense, `archive` does not clamp.
        merge_skips: make it a chain first, see `rewrites.merge_skips`.

    Raises:
        DeployError: an expanded or unrolled convolution would be too large, or skips cannot be merged.
    """
    chosen = _profile(profile)
    if merge_skips:
        net = rewrites.merge_skips(net)
    for population in net.populations:
        convs = [p.synapses for p in population.projections if isinstance(p.synapses, Conv2d)]
        size = sum(4 * conv.weight.size * conv.groups for conv in convs)
        if size > MAX_BYTES:
            raise DeployError(
                f"population {population.name!r}",
                "its groups written out with zeros",
                expected=f"at most {MAX_BYTES:,} bytes",
                got=f"{size:,}",
                hint="Use fewer groups or channels, or export to onnx, which has groups.",
            )
    if chosen.dense:
        return clamp_thresholds(flat_input(unroll(net, [p.name for p in net.populations])))
    net = square_kernels(expand_groups(net))
    odd = [p.name for p in net.populations if not all(is_square(j.synapses) for j in p.projections)]
    net = unroll(net, odd)
    return net if chosen.whole else clamp_thresholds(net)


def _profile(name: str) -> Profile:
    if name not in PROFILES:
        raise DeployError(f"profile {name!r}", "is not known", hint=suggestion(name, list(PROFILES)))
    return PROFILES[name]


def write(net: IntNet, path: str | Path, profile: str = "if", merge_skips: bool = False) -> Path:
    """Write `lower(net)` to `path` as a NIR graph; equal networks give equal bytes.

    Raises:
        DeployError: an unknown profile, a population whose potentials the profile would not hold exactly, or one that
            drives nothing.
    """
    net = lower(net, profile, merge_skips)
    driving = {p.source for q in net.populations for p in q.projections}
    for population in net.spiking:
        if population.name not in driving:
            raise DeployError(
                f"population {population.name!r}",
                "drives nothing, which NIR readers take for an output",
                hint="Leave it out of the network.",
            )
    graph = _graph(net, profile, merge_skips)
    with replacing(path) as temporary:
        nir.write(temporary, graph)
        with h5py.File(temporary, "a") as file:  # nir up to 1.0.4 does not know v_reset; a missing one is zero
            for population in net.spiking:
                file[f"node/nodes/{population.name}"].pop("v_reset", None)
    return Path(path)


def hardware_notes(net: IntNet, profile: str = "if", merge_skips: bool = False) -> list[str]:
    """Which NIR readers are known to run the file of `net` wrongly, measured with those versions."""
    sources = [p.source for q in lower(net, profile, merge_skips).populations for p in q.projections]
    several = sorted({source for source in sources if sources.count(source) > 1})
    if not several or PROFILES[profile].whole:
        return []
    return [
        f"{', '.join(several)} drives several synapses: SpikingJelly 2.0.0 (dt=1.0) runs such a graph exactly;"
        " Norse 1.1.0 and sinabs 3.1.3 give the output of another layer; snn-mlir 1.0.0 and Lava-DL refuse it."
        " With --merge-skips they get a chain."
    ]


def _graph(net: IntNet, profile: str, merge_skips: bool) -> Any:
    chosen = _profile(profile)
    taken = {INPUT, "output", *(p.name for p in net.populations)}
    nodes: dict[str, Any] = {INPUT: nir.Input(input_type={"input": np.array(net.input.shape)})}
    edges: list[tuple[str, str]] = []
    tops: dict[str, int] = {}
    for population in net.populations:
        top, bias = _folded(net, population, chosen)
        target = population.name if population.spiking else "output"
        for index, projection in enumerate(population.projections):
            source, shape = projection.source, net.source(projection).shape
            itself = index == 0 and not population.spiking
            name = population.name if itself else _free(f"{population.name}_w{index or ''}", taken)
            if isinstance(projection.synapses, Dense) and len(shape) == 3:
                flat = _free(f"{name}_flat", taken)
                nodes[flat] = nir.Flatten(input_type={"input": np.array(shape)}, start_dim=-3, end_dim=-1)
                edges.append((source, flat))
                source = flat
            own = bias if index == 0 else np.zeros_like(bias)
            nodes[name] = _synapses(projection.synapses, shape, own, chosen.whole)
            edges += [(source, name), (name, target)]
        if population.threshold is not None:
            theta = population.threshold.astype(np.int64)
            about: dict[str, Any] = {"theta": theta}
            if top is not None:
                tops[population.name] = about["T"] = top
            fires = theta if top is None else np.full(population.channels, top)
            fires = np.array(np.broadcast_to(population.per_neuron(fires), population.shape))
            nodes[population.name] = chosen.node(fires, about)
    nodes["output"] = nir.Output(output_type={"output": np.array(net.readout.shape)})
    text = description.to_text(
        net, SCHEMA, profile=profile, merge_skips=merge_skips, T=tops, dt=DT if profile == "cubalif" else 1.0
    )
    return nir.NIRGraph(nodes=nodes, edges=edges, metadata={description.KEY: text})


def _folded(net: IntNet, population: Population, profile: Profile) -> tuple[int | None, NDArray[np.int64]]:
    """T (None if not folded) and the bias [channels] of the first synapses, if all is exact in the profile's numbers."""
    top, worst = None, worst_case(net, population)
    if population.threshold is None:
        assert population.bias is not None
        bias = population.bias.astype(np.int64)
    elif profile.folded:
        low, high = reach(net, population)
        theta = population.threshold.astype(np.int64)
        top = 2 + int((high - theta).max())
        bias = top - theta
        worst = int((high - low + np.abs(bias)).max())
    else:
        bias = np.zeros(population.channels, np.int64)
        worst = max(worst, int(np.abs(population.threshold.astype(np.float64)).max()))
    if worst >= LIMIT and not profile.whole:
        raise DeployError(
            f"population {population.name!r}",
            "worst-case membrane potential, bias included",
            expected=f"below 2^23 = {LIMIT:,} (where float32 holds halves)",
            got=f"{worst:,}",
            hint="Train with fewer weight or input bits or a smaller fan-in, or use the archive profile.",
        )
    return top, bias


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _synapses(synapses: Synapses, source: tuple[int, ...], bias: NDArray[np.int64], whole: bool) -> Any:
    # no metadata here: nir 1.0.4, which sinabs and Rockpool pin, does not read a Conv2d that has some
    numbers: dict[str, Any] = {"weight": synapses.weight, "bias": integers(bias)}
    if not whole:
        numbers = {name: array.astype(np.float32) for name, array in numbers.items()}
    if isinstance(synapses, Dense):
        return nir.Affine(**numbers)
    return nir.Conv2d(
        input_shape=source[1:],
        stride=synapses.stride,
        padding=synapses.padding,
        dilation=synapses.dilation,
        groups=synapses.groups,
        **numbers,
    )


# -------------------------------------------------------------------------------------- reading: the file

FIELDS: Mapping[str, tuple[frozenset[str], frozenset[str]]] = {
    kind: (frozenset(needed.split()), frozenset(optional.split()))
    for kind, needed, optional in (
        ("Input", "shape", ""),
        ("Output", "shape", ""),
        ("Affine", "weight bias", ""),
        ("Linear", "weight", ""),
        ("Conv2d", "weight bias stride padding dilation groups", "input_shape"),
        ("IF", "r v_threshold", "v_reset"),
        ("LIF", "tau r v_leak v_threshold", "v_reset"),
        ("Threshold", "threshold", ""),
        ("LI", "tau r v_leak", ""),
        ("CubaLIF", "tau_syn tau_mem r v_leak v_threshold", "v_reset w_in"),
        ("Flatten", "start_dim end_dim", "input_type"),
        ("SumPool2d", "kernel_size stride padding", ""),
    )
}
"""The nodes that are read: their data sets, needed and optional."""

NEURONS = ("IF", "LIF", "CubaLIF", "Threshold")
"""The nodes that spike."""


@dataclass(frozen=True)
class Reading:
    """How to take what NIR leaves open, see `read`."""

    dt: float
    compare: str | None
    bits: int | None


@dataclass(frozen=True)
class Node:
    """One node of a file: where it is, its type, and the contents of its data sets."""

    where: str
    kind: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Graph:
    """A file's nodes; for each those with an edge into it, in the order of the edges; and the description, if any."""

    where: str
    nodes: Mapping[str, Node]
    before: Mapping[str, list[str]]
    text: str | None


def read(path: str | Path, *, dt: float = DT, compare: str | None = None, bits: int | None = None) -> IntNet:
    """Read a network of one time step from a NIR graph, ours or another tool's, following its edges.

    Its weights and biases are integers. Linear nodes between neurons are multiplied out, with LI at full leak among
    them; a neuron is Threshold, IF with r = 1 (or 1 / dt), LIF or CubaLIF at full leak (tau = dt, r = w_in = 1). Where
    the graph ends in spikes, they are the readout. A neuron fires at most once.

    Args:
        dt: the time step of the tool that wrote the graph, in seconds; NIR does not state it.
        compare: ">" or ">=", how a neuron of that tool decides where v equals v_threshold: snnTorch and Norse ">",
            SpikingJelly and sinabs ">=". Without it a v_threshold that is an integer is refused, but for Threshold's,
            which is ">" by NIR's definition.
        bits: of the input; by default what the file's description says, else 1: spikes.

    Raises:
        DeployError: not a NIR file, larger than `files.MAX_BYTES` in memory, or a node that no integer network has:
            names the node, what it is, and the way out.
    """
    if compare not in (None, ">", ">="):
        raise DeployError("compare", expected="'>' or '>='", got=repr(compare))
    if not 0 < dt < math.inf:
        raise DeployError("dt", expected="a time step above 0, in seconds", got=f"{dt:g}")
    path = existing(path)
    try:
        check_hdf5_heaps(path)
        with h5py.File(path, "r") as file:
            graph = _contents(str(path), file)
    except (OSError, KeyError, ValueError, RuntimeError, TypeError, AttributeError, MemoryError) as error:
        raise DeployError(
            str(path),
            f"is not a readable NIR file ({error})",
            hint="The file is truncated, damaged, or not written by a NIR library.",
        ) from error
    about = description.Description(1, None, (), {})
    if graph.text is not None:
        about = description.from_text(graph.text, SCHEMA, str(path))
    return _net(graph, about, Reading(dt, compare, bits))


def _contents(where: str, file: Any) -> Graph:
    """Read what a graph needs, after the links and the declared sizes of all of it have been checked."""
    top = _member(file, "node", h5py.Group)
    if _text(top, "type") != "NIRGraph":
        raise ValueError(f"the top node is {_text(top, 'type')!r}, not a NIRGraph")
    groups = _member(top, "nodes", h5py.Group)
    listed: dict[str, tuple[str, dict[str, Any]]] = {}
    for name in groups:
        group = _member(groups, name, h5py.Group)
        kind = _text(group, "type")
        at = f"{where}: node {name!r}"
        if kind not in FIELDS:
            raise DeployError(
                at,
                expected=f"one of {', '.join(FIELDS)}",
                got=repr(kind),
                hint="Networks of one time step are read: synapses, neurons at full leak, flattening, sum pooling.",
            )
        needed, optional = FIELDS[kind]
        found = set(group) - {"type", "metadata"}
        if not needed <= found or not found <= needed | optional:
            raise DeployError(at, f"the data sets of a {kind}", expected=f"{sorted(needed)}", got=f"{sorted(found)}")
        listed[name] = kind, {field: _member(group, field, h5py.Dataset) for field in sorted(found)}
    edges = _member(top, "edges", h5py.Dataset)
    every = [edges, *(data for _, sets in listed.values() for data in sets.values())]
    total = sum(max(data.dtype.itemsize, 8) * math.prod(data.shape or ()) for data in every)
    if total > MAX_BYTES:
        raise ValueError(f"declares arrays of {total:,} bytes; the limit is {MAX_BYTES:,}")
    nodes = {
        name: Node(f"{where}: node {name!r}", kind, {field: _value(data) for field, data in sets.items()})
        for name, (kind, sets) in listed.items()
    }
    text = None
    if "metadata" in top and description.KEY in (metadata := _member(top, "metadata", h5py.Group)):
        text = _text(metadata, description.KEY)
    return Graph(where, nodes, _before(where, nodes, edges), text)


def _member(group: Any, name: str, kind: type) -> Any:
    """A member of a group that lies in this very file: a group, or a data set of numbers or text."""
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise ValueError(f"{name!r} is missing or a link to another place")
    member = group[name]
    if not isinstance(member, kind):
        raise ValueError(f"{name!r} is a {type(member).__name__}, not a {kind.__name__}")
    if isinstance(member, h5py.Dataset):
        if member.external or member.is_virtual:
            raise ValueError(f"the data of {name!r} lie in another file")
        text = h5py.check_string_dtype(member.dtype)
        if (
            member.dtype.itemsize > MAX_TEXT
            or (text is None and member.dtype.kind not in "iufb")
            or (text is not None and name not in ("type", "edges", "padding", description.KEY))
        ):
            raise ValueError(f"{name!r} has the data type {member.dtype}")
        if text is not None and text.length is None:
            check_hdf5_texts(member)
    return member


def _value(data: Any) -> Any:
    value = data[()]
    return value.decode() if isinstance(value, bytes) else value


def _text(group: Any, name: str) -> str:
    data = _member(group, name, h5py.Dataset)
    if data.shape != ():
        raise ValueError(f"{name!r} has shape {data.shape}, not one text")
    return str(_value(data))


def _before(where: str, nodes: Mapping[str, Node], edges: Any) -> dict[str, list[str]]:
    if edges.ndim != 2 or edges.shape[1] != 2:
        raise ValueError(f"the edges have shape {edges.shape}, not (E, 2)")
    before: dict[str, list[str]] = {}
    for pair in edges[()]:
        source, target = (end.decode() for end in pair)
        if source not in nodes or target not in nodes:
            raise DeployError(where, f"the edge {source!r} -> {target!r} ends at no node")
        if source in before.setdefault(target, []):
            raise DeployError(
                where,
                f"the edge {source!r} -> {target!r} is there twice",
                hint="NIR does not say whether that counts twice: write it once, or double the weights.",
            )
        before[target].append(source)
    return before


# ------------------------------------------------------------------------------------- reading: the network


@dataclass(frozen=True)
class Way:
    """How spikes arrive at a neuron or the output: from which node, and through which others."""

    source: str
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Linear:
    """What the nodes of a way make of its source: synapses (None: nothing yet) and a bias [channels] of that shape."""

    synapses: Synapses | None
    bias: NDArray[np.int64]
    shape: tuple[int, ...]


def _net(graph: Graph, about: description.Description, reading: Reading) -> IntNet:
    entry, output = _only(graph, "Input"), _only(graph, "Output")
    targets = [name for name in graph.before if graph.nodes[name].kind in NEURONS]
    ways = {name: _ways(graph, name) for name in (*targets, output)}
    used = {entry, *ways, *(name for each in ways.values() for way in each for name in (way.source, *way.nodes))}
    idle = [*sorted(graph.nodes.keys() - used), *(name for name in ways if not ways[name])]
    if idle:
        raise DeployError(graph.nodes[idle[0]].where, "lies on no way from the input to the output")
    names = {entry: INPUT, **{name: _name(name) for name in targets}}
    shapes = {entry: _shape(graph.nodes[entry])}
    populations = []
    for target in (*_order(graph, ways, targets), output):
        node, projections = graph.nodes[target], []
        arriving = [_along(graph, way, shapes[way.source], reading, node.kind) for way in ways[target]]
        shape, bias = arriving[0].shape, sum((made.bias for made in arriving[1:]), arriving[0].bias)
        for way, made in zip(ways[target], arriving, strict=True):
            if made.shape != shape:
                raise DeployError(
                    node.where,
                    f"what arrives from {[way.source, *way.nodes][-1]!r}",
                    expected=f"shape {shape}",
                    got=str(made.shape),
                )
            projections.append(Projection(names[way.source], made.synapses or _identity(node, shape)))
        if target == output:
            if _shape(node) != shape:
                raise DeployError(node.where, "what arrives", expected=f"shape {_shape(node)}", got=str(shape))
            name = next((n for n in ways[output][0].nodes if graph.nodes[n].kind not in ("Flatten", "LI")), "readout")
            populations.append(Population(_name(name), shape, tuple(projections), bias=bias, scale=about.scale))
        else:
            theta = _tops(node, shape, reading) - bias
            populations.append(Population(names[target], shape, tuple(projections), threshold=theta))
            shapes[target] = shape
    spec = Input(shapes[entry], about.bits if reading.bits is None else reading.bits)
    return check(IntNet(spec, tuple(populations), about.classes, about.provenance))


def _only(graph: Graph, kind: str) -> str:
    names = [name for name, node in graph.nodes.items() if node.kind == kind]
    if len(names) != 1:
        raise DeployError(graph.where, expected=f"one {kind} node", got=f"{len(names)}: {', '.join(names[:5])}")
    return names[0]


def _name(node: str) -> str:
    """A node's name as a population's: other characters become '_', a leading digit, dot or dash comes after 'n'."""
    name = re.sub(r"[^A-Za-z0-9_.\-]", "_", node)
    return name if re.match(r"[A-Za-z_]", name) else f"n{name}"


def _shape(node: Node) -> tuple[int, ...]:
    sizes = _whole(node, "shape").reshape(-1).tolist()
    if len(sizes) not in (1, 3) or min(sizes) < 1:
        raise DeployError(
            node.where,
            expected="shape (C, H, W) or (N,)",
            got=str(tuple(sizes)),
            hint="Shapes in NIR have no batch and no time axis.",
        )
    return tuple(int(n) for n in sizes)


def _order(graph: Graph, ways: Mapping[str, list[Way]], targets: list[str]) -> list[str]:
    """The neurons, sources before what they drive, otherwise in the order of their first edges."""
    rank = {name: index for index, name in enumerate(targets)}
    waiting = {name: {w.source for w in ways[name]} & rank.keys() for name in targets}
    driven: dict[str, list[str]] = {}
    for name, sources in waiting.items():
        for source in sources:
            driven.setdefault(source, []).append(name)
    ready = [rank[name] for name in targets if not waiting[name]]
    heapify(ready)
    order: list[str] = []
    while ready:
        order.append(targets[heappop(ready)])
        for after in driven.get(order[-1], ()):
            waiting[after].discard(order[-1])
            if not waiting[after]:
                heappush(ready, rank[after])
    if len(order) < len(targets):
        left = next(name for name in targets if waiting[name])
        raise DeployError(
            graph.nodes[left].where,
            "is part of a loop or behind one",
            expected="a feed-forward network",
            hint="A network of one time step has no recurrence.",
        )
    return order


def _ways(graph: Graph, target: str) -> list[Way]:
    """How spikes arrive at a neuron or the output; what arrives at an LI before it is summed, as it is there."""
    found: list[Way] = []
    for last in graph.before.get(target, ()):
        if graph.nodes[last].kind == "LI":
            found += [replace(w, nodes=(*w.nodes, last)) for w in (_way(graph, b) for b in graph.before.get(last, ()))]
        else:
            found.append(_way(graph, last))
    return found


def _way(graph: Graph, last: str) -> Way:
    """Follow the edges back from `last`, through nodes with one edge into each."""
    nodes: list[str] = []
    while graph.nodes[last].kind not in (*NEURONS, "Input"):
        node, before = graph.nodes[last], graph.before.get(last, [])
        if node.kind == "Output" or last in nodes:
            raise DeployError(
                node.where,
                "comes before a neuron or the output, or is part of a loop",
                expected="synapses, sum pooling or spikes",
                got=node.kind,
            )
        if len(before) != 1:
            raise DeployError(
                node.where,
                expected="one edge into it",
                got=f"{len(before)}: {', '.join(before[:5])}",
                hint="Sum behind the synapses, by two edges into the neuron's node.",
            )
        nodes.append(last)
        last = before[0]
    return Way(last, tuple(reversed(nodes)))


def _along(graph: Graph, way: Way, source: tuple[int, ...], reading: Reading, target: str) -> Linear:
    """The nodes of a way, multiplied out, on a source of that shape."""
    at = Linear(None, np.zeros(source[0], np.int64), source)
    for name in way.nodes:
        node = graph.nodes[name]
        try:
            match node.kind:
                case "Affine" | "Linear":
                    at = _through_dense(node, at, source)
                case "Conv2d":
                    at = _through_conv(node, at, _read_conv(node, at.shape), source)
                case "SumPool2d":
                    at = _through_conv(node, at, _read_pool(node, at.shape), source)
                case "Flatten":
                    _check_flatten(node, at.shape)
                    bias = np.repeat(at.bias, math.prod(at.shape[1:]))
                    synapses = None if at.synapses is None else Dense(_dense(node, at.synapses, source, at.shape))
                    at = Linear(synapses, bias, (math.prod(at.shape),))
                case "LI":
                    _check_leak(node, reading.dt, *([1.0] if target == "Threshold" else []))
        except DeployError as error:
            if error.where.startswith(node.where):
                raise
            raise DeployError(node.where, str(error)) from error
    return at


def _through_dense(node: Node, at: Linear, source: tuple[int, ...]) -> Linear:
    if len(at.shape) != 1:
        raise DeployError(
            node.where,
            expected="a source of shape (N,)",
            got=str(at.shape),
            hint="Put Flatten(start_dim=-3) before it.",
        )
    own = Dense(_weights(node, 2))
    shape, weight = own.out_shape(at.shape), own.weight.astype(np.int64)
    bias = _product(node, weight, at.bias[:, None])[:, 0] + _bias(node, shape[0])
    if at.synapses is not None:
        own = Dense(_product(node, weight, _dense(node, at.synapses, source, at.shape)))
    return Linear(own, bias, shape)


def _through_conv(node: Node, at: Linear, own: Conv2d, source: tuple[int, ...]) -> Linear:
    """A convolution of what is there: one convolution of the source, if that has the same zeros around it."""
    shape = own.out_shape(at.shape)
    bias = _bias(node, shape[0])
    if at.synapses is None:
        return Linear(own, bias, shape)
    first, second = rewrites.plain(at.synapses), rewrites.plain(own)
    assert isinstance(first, Conv2d)
    assert isinstance(second, Conv2d)
    for n, out, s, p, padding in zip(
        source[1:], at.shape[1:], first.stride, first.padding, second.padding, strict=True
    ):
        if padding and (out * s - p < n or np.any(at.bias)):
            raise DeployError(
                node.where,
                "its padding is next to sums, not to spikes",
                got=f"padding {second.padding}",
                expected="none",
                hint="Put a neuron between the two nodes.",
            )
    at_once = math.prod(first.weight.shape) * second.weight.shape[0] * math.prod(second.weight.shape[2:])
    if at_once > MAX_UNROLLED:
        raise DeployError(
            node.where,
            "multiplied out with the node before",
            expected=f"at most {MAX_UNROLLED:,} weights",
            got=f"{at_once:,}",
            hint="Put a neuron between the two nodes.",
        )
    weight = second.weight.astype(np.int64)
    added = _product(node, weight.sum((2, 3)), at.bias[:, None])[:, 0]
    _product(node, weight.reshape(len(weight), -1), np.abs(first.weight).max().astype(np.int64).reshape(1, 1))
    return Linear(rewrites.composed(first, second), added + bias, shape)


def _product(node: Node, left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.int64]:
    """`left @ right`, or with one number at the right only the check that sums of such products fit 64 bits."""
    if float(np.abs(left).astype(np.float64).sum(1).max()) * float(np.abs(right).max(initial=0)) >= 2.0**62:
        raise DeployError(node.where, "multiplied out with the node before", expected="weights below 2^62", got="more")
    return left if right.shape == (1, 1) and left.shape[1] != 1 else left @ right


def _dense(node: Node, synapses: Synapses, source: tuple[int, ...], shape: tuple[int, ...]) -> NDArray[np.int64]:
    """The synapses as a matrix."""
    if (size := math.prod(source) * math.prod(shape)) > MAX_UNROLLED:
        raise DeployError(
            node.where,
            "multiplied out with the node before",
            expected=f"at most {MAX_UNROLLED:,} weights",
            got=f"{size:,}",
            hint="Put a neuron between the two nodes.",
        )
    return rewrites.matrix(synapses, source).astype(np.int64)


def _identity(node: Node, shape: tuple[int, ...]) -> Synapses:
    if len(shape) == 3:
        return Conv2d(np.ones((shape[0], 1, 1, 1), np.int8), groups=shape[0])
    if shape[0] ** 2 > MAX_UNROLLED:
        raise DeployError(node.where, expected="synapses before it", got=f"{shape[0]:,} spikes themselves")
    return Dense(np.eye(shape[0], dtype=np.int8))


def _read_pool(node: Node, source: tuple[int, ...]) -> Conv2d:
    kernel = _pair(node, "kernel_size")
    if len(source) != 3 or min(kernel) < 1 or source[0] * math.prod(kernel) > MAX_UNROLLED:
        raise DeployError(node.where, expected="a source (C, H, W) and a window in it", got=f"{source}, {kernel}")
    ones = np.ones((source[0], 1, *kernel), np.int8)
    return Conv2d(ones, _pair(node, "stride"), _pair(node, "padding"), groups=source[0])


def _read_conv(node: Node, source: tuple[int, ...]) -> Conv2d:
    if "input_shape" in node.fields and _pair(node, "input_shape") != source[1:]:
        raise DeployError(node.where, "input_shape", expected=str(source[1:]), got=str(_pair(node, "input_shape")))
    groups, _ = _pair(node, "groups")
    conv = Conv2d(_weights(node, 4), _pair(node, "stride"), (0, 0), _pair(node, "dilation"), groups)
    word = node.fields["padding"]
    if not isinstance(word, str):
        return replace(conv, padding=_pair(node, "padding"))
    extent = [d * (k - 1) for k, d in zip(conv.weight.shape[2:], conv.dilation, strict=True)]
    if word == "same" and conv.stride == (1, 1) and not any(n % 2 for n in extent):
        return replace(conv, padding=(extent[0] // 2, extent[1] // 2))
    if word != "valid":
        raise DeployError(
            node.where,
            "padding",
            got=repr(word),
            expected="integers, 'valid', or 'same' with stride 1 and an odd kernel",
        )
    return conv


def _check_flatten(node: Node, source: tuple[int, ...]) -> None:
    first, last, axes = _pair(node, "start_dim")[0], _pair(node, "end_dim")[0], len(source)
    if first not in (0, -axes) or last not in (-1, axes - 1):
        raise DeployError(
            node.where,
            expected="start_dim 0 or -3 and end_dim -1 (no batch axis is counted)",
            got=f"{first} and {last}",
        )
    if "input_type" in node.fields and _whole(node, "input_type").reshape(-1).tolist() != list(source):
        raise DeployError(node.where, "input_type", expected=str(source), got=str(node.fields["input_type"]))


def _whole(node: Node, field: str, limit: int = 1 << 31) -> NDArray[np.int64]:
    """A data set of integers of a magnitude below `limit`, of whatever type they are."""
    given = np.asarray(node.fields[field])
    if given.dtype.kind == "f" and np.any(part := given != np.rint(given)):  # NaN, too
        raise DeployError(
            f"{node.where}, {field}",
            expected="integer values",
            got=f"{given[part].reshape(-1)[0]} and {np.count_nonzero(part) - 1:,} more fractions",
            hint="Round the weights to integers in that tool, and the thresholds with them; or turn the PyTorch module"
            " into integers here: s3nn_deploy.quantise(module, calibration_x, bits=8).",
        )
    whole = integers(given, f"{node.where}, {field}").astype(np.int64)
    if whole.size and (int(whole.min()) <= -limit or int(whole.max()) >= limit):
        raise DeployError(
            node.where, field, expected=f"integers below {limit:,}", got=f"{whole.min():,}..{whole.max():,}"
        )
    return whole


def _number_limit(node: Node, field: str) -> int:
    """Most readers take floats for float32, where larger ones may be the rounding of another integer."""
    return 1 << 62 if np.asarray(node.fields[field]).dtype.kind in "iub" else 2 * LIMIT


def _pair(node: Node, field: str) -> tuple[int, int]:
    value = _whole(node, field).reshape(-1)
    if value.size not in (1, 2):
        raise DeployError(node.where, field, expected="one or two integers", got=f"{value.size}")
    return int(value[0]), int(value[-1])


def _weights(node: Node, axes: int) -> NDArray[np.int64]:
    weight = _whole(node, "weight", _number_limit(node, "weight"))
    if weight.ndim != axes or weight.size == 0:
        raise DeployError(node.where, "weight", expected=f"{axes} axes", got=f"shape {weight.shape}")
    return weight


def _bias(node: Node, channels: int) -> NDArray[np.int64]:
    if "bias" not in node.fields:
        return np.zeros(channels, np.int64)
    bias = _whole(node, "bias", _number_limit(node, "bias"))
    if bias.shape != (channels,):
        raise DeployError(node.where, "bias", expected=f"shape ({channels},)", got=str(bias.shape))
    return bias


def _tops(node: Node, shape: tuple[int, ...], reading: Reading) -> NDArray[np.int64]:
    """T per channel of neurons of that shape which fire where v >= T."""
    field = "threshold" if node.kind == "Threshold" else "v_threshold"
    if node.kind != "Threshold":
        _check_leak(node, reading.dt)
    given = np.asarray(node.fields[field])
    if given.dtype.kind in "iub":
        tops = _whole(node, field, 1 << 62) + 1
        whole = np.ones(given.shape, bool)
    else:
        wrong = ~(np.abs(given.astype(np.float64)) < LIMIT)
        if np.any(wrong):
            raise DeployError(
                node.where, field, expected=f"numbers below {LIMIT:,}", got=str(given[wrong].reshape(-1)[0])
            )
        single = given.astype(np.float32)  # what most readers compare with
        tops, whole = np.floor(single).astype(np.int64) + 1, single == np.rint(single)
    compare = reading.compare or (">" if node.kind == "Threshold" else None)
    if np.any(whole) and compare is None:
        raise DeployError(
            node.where,
            field,
            got=str(given[whole].reshape(-1)[0]),
            expected="half-integers",
            hint="NIR fires where v > v_threshold, half of its readers where >=. Write the half between two"
            " integers (a neuron that fires where v > 3, or v >= 4, has v_threshold 3.5), or say which:"
            " s3nn-deploy import FILE --compare '>', or s3nn_deploy.load(path, compare='>').",
        )
    if compare == ">=":
        tops = tops - whole
    if tops.ndim < len(shape) and tops.size == shape[0]:
        tops = tops.reshape(shape[0], *[1] * (len(shape) - 1))
    try:
        rows = np.broadcast_to(tops.reshape(()) if tops.size == 1 else tops, shape).reshape(shape[0], -1)
    except ValueError as error:
        raise DeployError(
            node.where, field, expected=f"shape {shape}, like what arrives", got=str(given.shape)
        ) from error
    if np.any(rows != rows[:, :1]):
        raise DeployError(
            node.where,
            field,
            expected="one per channel",
            got="several in one channel",
            hint="Flatten before it: neurons of shape (N,) may differ.",
        )
    return rows[:, 0]


def _check_leak(node: Node, *steps: float) -> None:
    """Whether the potential after one step from rest is the sum of what arrived, for a time step that is one of `steps`."""
    value = {
        field: np.unique(np.asarray(node.fields.get(field, one), np.float32))
        for field, one in (
            ("r", 1),
            ("w_in", 1),
            ("v_leak", 0),
            ("v_reset", 0),
            ("tau", 0),
            ("tau_mem", 0),
            ("tau_syn", 0),
        )
    }
    for field in ("v_leak", "v_reset"):
        if np.any(value[field] != 0):
            raise DeployError(node.where, field, expected="0", got=str(value[field][0]))
    taus = [field for field in ("tau", "tau_mem", "tau_syn") if field in node.fields]
    whole = [(dt, 1.0) for dt in steps]
    if node.kind == "IF":
        whole = [(0.0, 1.0), *((0.0, 1 / dt) for dt in steps)]
    if node.kind == "CubaLIF":
        whole.append((ROCKPOOL_TAU, ROCKPOOL_R))
    for tau, r in whole:
        if all(np.all(value[field] == np.float32(tau)) for field in taus) and np.all(value["r"] == np.float32(r)):
            break
    else:
        if not taus:
            raise DeployError(node.where, "r", expected="1", got=str(value["r"][0]), hint="Scale the weights.")
        got = ", ".join(f"{field} {value[field][0]:g}" for field in (*taus, "r"))
        raise DeployError(
            node.where,
            "keeps something from step to step, or scales",
            got=got,
            expected=f"full leak: {' = '.join(taus)} = {steps[0]:g} (the time step) and r = 1",
            hint="Train with a leak of everything (beta 0), or give the time step: s3nn-deploy import FILE --dt 0.001.",
        )
    if np.any(value["w_in"] != 1):
        raise DeployError(node.where, "w_in", expected="1", got=str(value["w_in"][0]), hint="Scale the weights.")
