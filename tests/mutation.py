"""Mutation tests: change single integers in networks and files, and count how many changes verification notices.

    python -m benchmarks.mutation        prints the score by kind

A mutant of a *file* is noticed if the file is refused or does not read back as the network. A mutant of the *network that
an engine runs* (a backend with one wrong integer) is noticed if any spike or readout differs on the inputs that `verify`
generates. What is not noticed must be equivalent: no input whatever makes the changed neurons decide otherwise, which is
decided here by going through all sums of the other weights. A mutant that is neither is missed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import onnx
from nets import SEQUENTIAL, ZOO
from onnx import numpy_helper

from s3nn_deploy import backends, formats
from s3nn_deploy.errors import DeployError
from s3nn_deploy.files import read_npz, write_npz
from s3nn_deploy.formats import lava, npz
from s3nn_deploy.formats import onnx as onnx_format
from s3nn_deploy.intnet import INPUT, Conv2d, IntNet, check
from s3nn_deploy.rewrites import unroll
from s3nn_deploy.stimuli import injection, isolated, stimuli

NETS = {
    name: ZOO[name] for name in ("mlp", "lenet", "chain2", "chain8", "residual", "random11", "random15", "random17")
}


@dataclass
class Score:
    """How many mutants of one kind were noticed, by what, and which of the others are proved equivalent.

    Attributes:
        by_reading: by reading the file back, or by the rules of a valid network.
        by_network: by generated inputs of the whole network (of files, besides: by ONNX Runtime alone).
        by_population: only by the inputs made for the changed population by itself.
    """

    mutants: int = 0
    by_reading: int = 0
    by_network: int = 0
    by_population: int = 0
    equivalent: int = 0
    missed: int = 0

    @property
    def score(self) -> float:
        return 1 - self.missed / max(1, self.mutants - self.equivalent)


# -- what verification runs


def observed(net: IntNet, inputs: dict[str | None, np.ndarray], name: str | None) -> list[np.ndarray]:
    """Every value that is compared when `net` (None), or one of its populations by itself, runs its inputs."""
    if name is None:
        trace = backends.run(net, inputs[None], "emulator")
        return [*trace.spikes.values(), trace.readout]
    trace = backends.run(isolated(net, net[name]).net, inputs[name], "emulator")
    return [trace.spikes[name] if net[name].spiking else trace.readout]


def same(net: IntNet, mutant: IntNet, inputs: dict[str | None, np.ndarray], name: str | None) -> bool:
    pairs = zip(observed(net, inputs, name), observed(mutant, inputs, name), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


@lru_cache
def generated(net: IntNet) -> dict[str | None, np.ndarray]:
    return {None: stimuli(net), **{p.name: injection(isolated(net, p)).x for p in net.populations}}


# -- mutants of the network that an engine runs


def changed(value: int, draw: np.random.Generator) -> int:
    """Another integer: one more, one less, the opposite, or one of the low eight bits flipped."""
    kind = draw.integers(4)
    other = (value + 1, value - 1, -value, value ^ 1 << int(draw.integers(8)))[kind]
    return other if other != value else value + 1


def one_element(array: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    wide = np.array(array, dtype=np.int64)
    at = int(draw.integers(wide.size))
    wide.flat[at] = changed(int(wide.flat[at]), draw)
    return wide


def with_synapses(net: IntNet, name: str, index: int, **changes: object) -> IntNet:
    population = net[name]
    projections = list(population.projections)
    projections[index] = replace(projections[index], synapses=replace(projections[index].synapses, **changes))
    return with_population(net, name, projections=tuple(projections))


def with_population(net: IntNet, name: str, **changes: object) -> IntNet:
    return replace(net, populations=tuple(replace(p, **changes) if p.name == name else p for p in net.populations))


def mutate_weight(net: IntNet, draw: np.random.Generator) -> tuple[str, IntNet]:
    population = net.populations[draw.integers(len(net.populations))]
    index = int(draw.integers(len(population.projections)))
    weight = one_element(population.projections[index].synapses.weight, draw)
    return population.name, with_synapses(net, population.name, index, weight=weight)


def mutate_threshold(net: IntNet, draw: np.random.Generator) -> tuple[str, IntNet]:
    population = net.spiking[draw.integers(len(net.spiking))]
    return population.name, with_population(net, population.name, threshold=one_element(population.threshold, draw))


def mutate_bias(net: IntNet, draw: np.random.Generator) -> tuple[str, IntNet]:
    return net.readout.name, with_population(net, net.readout.name, bias=one_element(net.readout.bias, draw))


def mutate_attribute(net: IntNet, draw: np.random.Generator) -> tuple[str, IntNet]:
    convs = [
        (p.name, k, j.synapses)
        for p in net.populations
        for k, j in enumerate(p.projections)
        if isinstance(j.synapses, Conv2d)
    ]
    name, index, conv = convs[draw.integers(len(convs))]
    key = ("stride", "padding", "dilation", "groups")[draw.integers(4)]
    value = getattr(conv, key)
    if key == "groups":
        return name, with_synapses(net, name, index, groups=changed(value, draw))
    pair = list(value)
    pair[draw.integers(2)] += int(draw.choice([-1, 1, 2]))
    return name, with_synapses(net, name, index, **{key: tuple(pair)})


def mutate_compare(net: IntNet, draw: np.random.Generator) -> tuple[str, IntNet]:
    """> instead of >= in one population."""
    population = net.spiking[draw.integers(len(net.spiking))]
    return population.name, with_population(net, population.name, threshold=population.threshold.astype(int) + 1)


ENGINE = {
    "weight": mutate_weight,
    "threshold": mutate_threshold,
    "readout bias": mutate_bias,
    "stride, padding, dilation, groups": mutate_attribute,
    "> for >=": mutate_compare,
}


def engine_score(kind: str, mutants: int, seed: int = 0) -> Score:
    """The score of `mutants` backends, each with one wrong integer."""
    draw, score = np.random.default_rng([seed, list(ENGINE).index(kind)]), Score()
    convolutional = [
        n for n in NETS.values() if any(isinstance(p.projections[0].synapses, Conv2d) for p in n.populations)
    ]
    nets = convolutional if kind.startswith("stride") else list(NETS.values())
    for _ in range(mutants):
        net = nets[draw.integers(len(nets))]
        inputs, (name, mutant) = generated(net), ENGINE[kind](net, draw)
        score.mutants += 1
        try:
            check(mutant)
        except DeployError:  # no network: an engine that had it would fail, not differ
            score.by_reading += 1
            continue
        if not same(net, mutant, inputs, None):
            score.by_network += 1
        elif not same(net, mutant, inputs, name):
            score.by_population += 1
        elif equivalent(net, mutant, name):
            score.equivalent += 1
        else:
            score.missed += 1
    return score


# -- equivalence, by going through all sums


def equivalent(net: IntNet, mutant: IntNet, name: str) -> bool:
    """Whether no source values at all make a neuron of population `name` behave otherwise in `mutant`."""
    mine, theirs = rows(net, name), rows(mutant, name)
    graded = {p.source == INPUT and net.input.bits > 1 for p in net[name].projections}
    assert len(graded) == 1, "sources of one kind"
    return len(mine) == len(theirs) and all(
        alike(a, b, net.input.maximum if True in graded else 1) for a, b in set(zip(mine, theirs, strict=True))
    )


def rows(net: IntNet, name: str) -> list[tuple[bytes, int | None]]:
    """For each neuron of a population its weights from every neuron of its sources, and its threshold (None: readout)."""
    flat = unroll(isolated(net, net[name]).net, [name])[name]
    by_source: dict[str, np.ndarray] = {}
    for projection in flat.projections:
        before = by_source.get(projection.source, 0)
        by_source[projection.source] = before + projection.synapses.weight.astype(np.int64)
    weights = np.concatenate(list(by_source.values()), 1)
    limits = [None] * len(weights) if flat.threshold is None else flat.threshold.tolist()
    return [(row.tobytes(), limit) for row, limit in zip(weights, limits, strict=True)]


def alike(a: tuple[bytes, int | None], b: tuple[bytes, int | None], top: int) -> bool:
    """Whether two neurons that differ in one weight at most, or in the threshold, decide alike for all source values."""
    (v, theta), (w, other) = ((np.frombuffer(row, np.int64), limit) for row, limit in (a, b))
    at = np.flatnonzero(v != w)
    if theta is None or len(at) > 1:
        return not len(at)
    rest = np.delete(v, at) if len(at) else v
    low, sums = int(np.minimum(rest, 0).sum()) * top, 1
    for weight in np.abs(rest[rest != 0]).tolist():
        for bit in range(top.bit_length()):
            sums |= sums << (weight << bit)
    reached = (
        np.flatnonzero(
            np.unpackbits(
                np.frombuffer(sums.to_bytes(sums.bit_length() // 8 + 1, "little"), np.uint8), bitorder="little"
            )
        )
        + low
    )
    for value in range(top + 1) if len(at) else (0,):
        mine, theirs = (int(row[at[0]]) * value if len(at) else 0 for row in (v, w))
        if np.any((reached + mine >= theta) != (reached + theirs >= other)):
            return False
    return True


# -- mutants of files


def mutate_npz(path: Path, draw: np.random.Generator) -> None:
    meta, arrays = read_npz(path, npz.SCHEMA)
    convs = [j for p in meta["populations"] for j in p["projections"] if j["kind"] == "conv2d"]
    if convs and draw.random() < 0.2:
        conv = convs[draw.integers(len(convs))]
        key = ("stride", "padding", "dilation")[draw.integers(3)]
        conv[key][draw.integers(2)] += 1
    else:
        name = str(draw.choice([n for n in arrays if not n.endswith("scale")]))
        arrays[name] = one_element(arrays[name], draw)
    write_npz(path, meta, arrays)


def mutate_lava(path: Path, draw: np.random.Generator) -> None:
    meta, arrays = read_npz(path, lava.SCHEMA)
    if draw.random() < 0.3:
        holder, key = (places := list(numbers_in(meta["plan"])))[draw.integers(len(places))]
        holder[key] = changed(holder[key], draw)
    else:
        name = str(draw.choice(list(arrays)))
        arrays[name] = one_element(arrays[name], draw)
    write_npz(path, meta, arrays)


def numbers_in(plain: Any) -> Iterator[tuple[Any, Any]]:
    """Where plain data hold integers: pairs of the list or table and the index or key."""
    for key, value in plain.items() if isinstance(plain, dict) else enumerate(plain):
        if isinstance(value, dict | list):
            yield from numbers_in(value)
        elif isinstance(value, int):
            yield plain, key


def mutate_onnx(path: Path, draw: np.random.Generator) -> None:
    model = onnx_format.load(path)
    lists = [a for n in model.graph.node for a in n.attribute if a.ints or a.type == onnx.AttributeProto.INT]
    if draw.random() < 0.2:
        attribute = lists[draw.integers(len(lists))]
        if attribute.ints:
            attribute.ints[draw.integers(len(attribute.ints))] += 1
        else:
            attribute.i += 1
    else:
        tensor = model.graph.initializer[draw.integers(len(model.graph.initializer))]
        array = one_element(numpy_helper.to_array(tensor), draw).astype(np.float32)
        tensor.raw_data = array.tobytes()
    path.write_bytes(model.SerializeToString())


def mutate_hdf5(path: Path, draw: np.random.Generator) -> str:
    with h5py.File(path, "r+") as file:
        found: list[h5py.Dataset] = []
        file.visititems(lambda _, item: found.append(item) if isinstance(item, h5py.Dataset) else None)
        numbers = [d for d in found if d.dtype.kind in "iuf" and d.size]
        data = numbers[draw.integers(len(numbers))]
        if data.dtype.kind == "f":  # halves too: NIR thresholds
            data[...] = one_element(np.asarray(data[()]) * 2, draw) / 2
        else:
            data[...] = one_element(data[()], draw)
        return str(data.name)


FILES: dict[str, Callable[[Path, np.random.Generator], str | None]] = {
    "emulator": mutate_npz,
    "onnx": mutate_onnx,
    "nir": mutate_hdf5,
    "netx": mutate_hdf5,
    "lava": mutate_lava,
}


def file_score(format: str, mutants: int, folder: Path, seed: int = 0) -> Score:
    """The score of `mutants` files, each with one changed number, by reading them back; an .onnx is also run as it is."""
    draw, score = np.random.default_rng([seed, len(format)]), Score()
    module, files = formats.FORMATS[format].load(), {}
    for name, net in (SEQUENTIAL if format == "netx" else NETS).items():
        try:
            lowered = module.lower(net)
            files[name] = (
                net,
                lowered,
                module.write(net, folder / f"{name}{formats.FORMATS[format].suffix}").read_bytes(),
            )
        except DeployError:
            continue
    for _ in range(mutants):
        net, lowered, content = files[str(draw.choice(list(files)))]
        path = folder / f"mutant{formats.FORMATS[format].suffix}"
        path.write_bytes(content)
        where = FILES[format](path, draw)
        score.mutants += 1
        try:
            read_back = module.read(path)
        except DeployError:
            score.by_reading += 1
            continue
        if read_back != lowered:
            score.by_reading += 1
            score.by_network += format == "onnx" and differs(net, path)
        elif format == "nir" and "/metadata/" in str(where):  # what NIR says has no meaning
            score.equivalent += 1
        else:
            score.missed += 1
    return score


def differs(net: IntNet, path: Path) -> bool:
    """Whether ONNX Runtime gives something else for a file than the network does."""
    x = stimuli(net)
    want = backends.run(net, x, "emulator")
    try:
        got = backends.run(net, x, "onnx", path)
    except DeployError:
        return True
    return not np.array_equal(got.readout, want.readout) or any(
        not np.array_equal(got.spikes[n], s) for n, s in want.spikes.items()
    )
