"""The accelerator that a target's [machine] describes: exact memory accesses, messages, cycles and queues of a run.

`docs/accelerator.md` says what happens in which cycle. Channels are dealt to cores in blocks, so a spike causes the same
work wherever its neuron's channel lies, and every figure is a linear form of two numbers for each source channel: its
spikes, and its spikes times the kernel taps that they meet. That is one pass over the spikes, and no simulation of events.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s3nn_deploy.errors import DeployError
from s3nn_deploy.intnet import EXACT_FLOAT32, INPUT, Dense, Input, IntNet, Population, Projection, reach, signed_bits

FIGURES = {
    "spikes_in": "source neurons that sent an event, once for each projection",
    "spikes_out": "spikes fired",
    "messages": "events sent to a core (one for each spike and destination core), or readouts to the host",
    "weight_read_bits": "bits of the weight words read",
    "membrane_read_bits": "bits of the potential and threshold words read",
    "membrane_write_bits": "bits of the potential words written",
    "spike_write_bits": "bits of the events written to the queues",
    "spike_read_bits": "bits of the events read from the queues",
    "cycles": "clock cycles from the first event to the last spike, cores in parallel",
    "queue_peak": "events that wait in the fullest core's queue when the population begins",
}
"""What is counted of every population and sample."""


@dataclass(frozen=True)
class Memory:
    """One memory of a core: its size, and the width of the word that a cycle reads or writes."""

    bytes: int
    width: int


@dataclass(frozen=True)
class Machine:
    """An event-driven accelerator of equal cores.

    Attributes:
        elements: processing elements of a core; each adds one weight to one potential a cycle.
        accumulator_bits: of a potential, two's complement.
        event_bits: of an event in a queue: its source neuron's address and, of multi-bit input, its value.
        weight_bits: of a stored weight.
        source: where these figures come from.
    """

    cores: int
    elements: int
    clock_mhz: int
    accumulator_bits: int
    event_bits: int
    weight_bits: int
    weights: Memory
    membranes: Memory
    spikes: Memory
    source: str

    @property
    def lanes(self) -> int:
        """Potentials that one cycle updates: processing elements that a weight word and a potential word can feed."""
        return min(self.elements, self.weights.width // self.weight_bits, self.membranes.width // self.accumulator_bits)

    @property
    def queue(self) -> int:
        """Events that a core's queue holds."""
        return self.spikes.bytes * 8 // self.event_bits


@dataclass(frozen=True, eq=False)
class Placement:
    """Where a network's memory lies: bits occupied on the fullest core, by population."""

    machine: Machine
    weight_bits: Mapping[str, int]
    membrane_bits: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class Figures:
    """`events[population][figure]` is an int64 array [N]; figures as in `FIGURES`."""

    placement: Placement
    events: Mapping[str, Mapping[str, NDArray[np.int64]]]

    @property
    def summary(self) -> "Summary":
        """What stays of the figures when there are many samples; there must be one at least."""
        rows = [kinds["cycles"] for kinds in self.events.values()]
        cycles = np.stack(rows).sum(0)  # populations run one after the other
        spans = {p: {kind: _span(row) for kind, row in kinds.items()} for p, kinds in self.events.items()}
        return Summary(self.placement, len(cycles), spans, _span(cycles))


@dataclass(frozen=True)
class Span:
    """Of one figure over the samples: sum, minimum, maximum."""

    sum: int
    min: int
    max: int

    def plain(self, samples: int) -> dict[str, float]:
        return {"mean": self.sum / samples, "min": self.min, "max": self.max}


def _span(row: NDArray[np.int64]) -> Span:
    return Span(int(row.sum()), int(row.min()), int(row.max()))


def _together(spans: Iterable[Span]) -> Span:
    every = list(spans)
    return Span(sum(s.sum for s in every), min(s.min for s in every), max(s.max for s in every))


@dataclass(frozen=True)
class Summary:
    """The figures of many samples: `events[population][figure]`, and the cycles of an inference."""

    placement: Placement
    samples: int
    events: Mapping[str, Mapping[str, Span]]
    cycles: Span

    @property
    def queue_peak(self) -> int:
        """The most events that waited in one core's queue."""
        return max(kinds["queue_peak"].max for kinds in self.events.values())

    def plain(self) -> dict[str, Any]:
        """Plain data for JSON: for each population the mean, minimum and maximum of every figure, and the totals."""
        machine, cycles = self.placement.machine, self.cycles.plain(self.samples)
        return {
            "cores": machine.cores,
            "elements": machine.elements,
            "clock_mhz": machine.clock_mhz,
            "samples": self.samples,
            "cycles": cycles,
            "microseconds": {key: n / machine.clock_mhz for key, n in cycles.items()},
            "queue_peak": self.queue_peak,
            "queue_capacity": machine.queue,
            "populations": {
                name: {
                    **{key: span.plain(self.samples) for key, span in kinds.items()},
                    "weight_memory_bits": self.placement.weight_bits[name],
                    "membrane_memory_bits": self.placement.membrane_bits[name],
                }
                for name, kinds in self.events.items()
            },
        }


def join(parts: Sequence[Summary]) -> Summary:
    """The figures of all samples, from those of batches, in any order."""
    first = parts[0]
    spans = {
        p: {kind: _together(part.events[p][kind] for part in parts) for kind in kinds}
        for p, kinds in first.events.items()
    }
    samples, cycles = sum(part.samples for part in parts), _together(part.cycles for part in parts)
    return Summary(first.placement, samples, spans, cycles)


def check_queues(summary: Summary) -> Summary:
    """Return `summary` if its events fit the queues.

    Raises:
        DeployError: they do not: which population, how many wait, how many fit, and the way out.
    """
    for name, kinds in summary.events.items():
        most, capacity = kinds["queue_peak"].max, summary.placement.machine.queue
        if most > capacity:
            hint = "Take a larger spike memory or narrower events; or train for fewer spikes."
            raise _too_much(f"population {name!r}", "events waiting in one core's queue", most, capacity, hint)
    return summary


def place(net: IntNet, machine: Machine) -> Placement:
    """Hold `net` against the machine's widths and memories.

    Raises:
        DeployError: names the population, the figure, the limit, and the way out.
    """
    weights, potentials, thresholds = {}, {}, 0
    for population in net.populations:
        where = f"population {population.name!r}"
        bias = np.zeros(population.channels, dtype=np.int64) if population.bias is None else population.bias
        lows, highs = reach(net, population)
        low, high = int((lows + np.minimum(bias, 0)).min()), int((highs + np.maximum(bias, 0)).max())
        if (bits := signed_bits(low, high)) > machine.accumulator_bits:
            raise DeployError(
                where,
                "its accumulator could overflow",
                expected=f"at most {machine.accumulator_bits} bits",
                got=f"{bits} bits (it can reach {low:,} to {high:,})",
                hint="Widen accumulator_bits, or train with fewer weight or input bits, or a smaller fan-in.",
            )
        words = 0
        for projection in population.projections:
            weight, source = projection.synapses.weight, net.source(projection)
            if (bits := signed_bits(int(weight.min()), int(weight.max()))) > machine.weight_bits:
                raise _too_much(where, "bits of a weight", bits, machine.weight_bits, "Train with fewer weight bits.")
            bits = (math.prod(source.shape) - 1).bit_length()
            bits += source.bits if isinstance(source, Input) and source.bits > 1 else 0
            if bits > machine.event_bits:
                raise _too_much(where, "bits of an event", bits, machine.event_bits, "Widen event_bits.")
            blocks = -(-_blocks(population, projection, machine) // machine.lanes)
            words = words + blocks.sum(1) * math.prod(weight.shape[1:])
        rows = -(-int(_dealt(population, machine).max()) // machine.lanes)
        weights[population.name] = int(np.max(words)) * machine.weights.width
        potentials[population.name] = rows * _positions(population) * machine.membranes.width
        thresholds += rows * machine.membranes.width
    largest = max(weights, key=lambda name: weights[name])
    if (used := sum(weights.values())) > machine.weights.bytes * 8:
        hint = "Take more cores or a larger weight memory, or train smaller layers."
        where = f"population {largest!r}, the largest of its network"
        raise _too_much(where, "bits of weights on one core", used, machine.weights.bytes * 8, hint)
    for name, bits in potentials.items():
        if bits + thresholds > machine.membranes.bytes * 8:
            hint = "Take more cores or a larger membrane memory, or pool earlier."
            most = machine.membranes.bytes * 8
            raise _too_much(f"population {name!r}", "bits of potentials on one core", bits + thresholds, most, hint)
    return Placement(machine, weights, {name: bits + thresholds for name, bits in potentials.items()})


def figures(net: IntNet, placement: Placement, x: Any, spikes: Mapping[str, NDArray[np.bool_]]) -> Figures:
    """The figures of a run: `x` integers [N, *input shape] and the spikes of every population that it caused.

    Whether the queues hold the events that wait, `check_queues` says of all samples.
    """
    machine, samples = placement.machine, len(x)
    order = {INPUT: -1, **{p.name: i for i, p in enumerate(net.populations)}}
    events = {p.name: {k: np.zeros(samples, dtype=np.int64) for k in FIGURES} for p in net.populations}
    waiting = np.zeros((len(net.populations), samples, machine.cores), dtype=np.int64)
    sent = {p.name: np.zeros((samples, machine.cores), dtype=np.int64) for p in net.populations}
    for index, population in enumerate(net.populations):
        got, work = events[population.name], np.zeros((samples, machine.cores), dtype=np.int64)
        words = np.zeros(samples, dtype=np.int64)
        for projection in population.projections:
            signal = (np.asarray(x) != 0) if projection.source == INPUT else spikes[projection.source]
            fired, taps = _arrivals(net, projection, signal)
            blocks = _blocks(population, projection, machine)
            by_group = [a.reshape(samples, blocks.shape[1], -1).sum(2) for a in (fired, taps)]
            delivered = by_group[0] @ (blocks > 0).T
            accesses = by_group[1] @ (-(-blocks // machine.lanes)).T
            work += delivered + accesses
            words += accesses.sum(1)
            got["spikes_in"] += fired.sum(1)
            got["spike_write_bits"] += delivered.sum(1) * machine.event_bits
            waiting[order[projection.source] + 1 : index + 1] += delivered
            if projection.source != INPUT:
                source = net[projection.source]
                copies = np.repeat((blocks > 0).sum(0), fired.shape[1] // blocks.shape[1])
                home = np.repeat(_home(source, machine), fired.shape[1] // source.channels)
                np.add.at(sent[projection.source].T, home, (fired * copies).T)
        got["spike_read_bits"] += got["spike_write_bits"]
        got["weight_read_bits"] += words * machine.weights.width
        got["membrane_read_bits"] += words * machine.membranes.width
        got["membrane_write_bits"] += words * machine.membranes.width
        got["cycles"] += work.max(1)
    for index, population in enumerate(net.populations):
        got, positions = events[population.name], _positions(population)
        cores = _dealt(population, machine)
        if population.spiking:
            got["spikes_out"] += spikes[population.name].reshape(samples, -1).sum(1)
        else:
            sent[population.name] += cores * positions
        rows = -(-cores // machine.lanes)
        got["messages"] += sent[population.name].sum(1)
        got["cycles"] += (rows * (1 + positions) + sent[population.name]).max(1)
        got["membrane_read_bits"] += int(rows.sum()) * (1 + positions) * machine.membranes.width
        got["membrane_write_bits"] += int(rows.sum()) * positions * machine.membranes.width
        got["queue_peak"] += waiting[index].max(1)
    return Figures(placement, events)


def _too_much(where: str, what: str, got: int, most: int, hint: str) -> DeployError:
    return DeployError(
        where, "does not fit the machine", expected=f"at most {most:,} {what}", got=f"{got:,}", hint=hint
    )


def _positions(population: Population) -> int:
    return math.prod(population.shape[1:])


def _home(population: Population, machine: Machine) -> NDArray[np.int64]:
    """The core of each channel: consecutive blocks of as many channels as make the fewest on the fullest core."""
    return np.arange(population.channels) // -(-population.channels // machine.cores)


def _dealt(population: Population, machine: Machine) -> NDArray[np.int64]:
    """How many channels lie on each core, [cores]."""
    return np.bincount(_home(population, machine), minlength=machine.cores)


def _blocks(population: Population, projection: Projection, machine: Machine) -> NDArray[np.int64]:
    """How many of the channels that one source channel's group drives lie on each core: int64 [cores, groups]."""
    groups = 1 if isinstance(projection.synapses, Dense) else projection.synapses.groups
    group = np.arange(population.channels) // (population.channels // groups)
    blocks = np.zeros((machine.cores, groups), dtype=np.int64)
    np.add.at(blocks, (_home(population, machine), group), 1)
    return blocks


def _arrivals(net: IntNet, projection: Projection, signal: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
    """Of each source channel its spikes, and its spikes times the kernel taps that they meet: int64 [N, C] both."""
    shape, synapses = net.source(projection).shape, projection.synapses
    last = np.ascontiguousarray(np.moveaxis(signal, 1, -1)).reshape(
        len(signal), -1, shape[0]
    )  # no copy of our engine's
    fired = last.view(np.uint8).sum(1, dtype=np.uint32).astype(np.int64)
    if isinstance(synapses, Dense):
        return [fired, fired]
    target = synapses.out_shape(shape)
    axes = zip(shape[1:], target[1:], synapses.weight.shape[2:], *_geometry(synapses), strict=True)
    rows, columns = (_contacts(*axis) for axis in axes)
    taps = np.outer(rows, columns).reshape(-1)
    if np.all(taps == taps[0]):
        return [fired, fired * taps[0]]
    exact = np.float32 if int(taps.sum()) < EXACT_FLOAT32 else np.float64
    return [fired, np.matmul(taps.astype(exact), last.astype(exact)).astype(np.int64)]


def synapses(net: IntNet, projection: Projection) -> int:
    """How many synapses a projection has, exact at borders: what a dense accelerator computes."""
    met = int(_arrivals(net, projection, np.ones((1, *net.source(projection).shape), dtype=bool))[1].sum())
    match projection.synapses:
        case Dense(weight=weight):
            return met * len(weight)
        case conv:
            return met * len(conv.weight) // conv.groups


def _geometry(synapses: Any) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    return synapses.stride, synapses.padding, synapses.dilation


def _contacts(source: int, target: int, kernel: int, stride: int, padding: int, dilation: int) -> NDArray[np.int64]:
    """Along one axis, how many taps connect each source position to some target position: int64 [source]."""
    offset = np.arange(source) + padding - dilation * np.arange(kernel)[:, None]
    return ((offset % stride == 0) & (offset >= 0) & (offset < target * stride)).sum(0)
