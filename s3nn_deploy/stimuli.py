"""Inputs that bite: membrane potentials exactly at a threshold and just below it, for each population by itself.

Data rarely meet a threshold exactly, and then a threshold that is wrong by one goes unnoticed. Here the source values of
a neuron are solved for: the nearest reachable potentials on both sides of its threshold, with as many of its weights
taking part as can. A channel that was shown both has no other threshold that would look the same.
"""

from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any, assert_never

import numpy as np
from numpy.typing import NDArray

from s3nn_deploy.intnet import INPUT, Conv2d, Dense, Input, IntNet, Population, Projection, Synapses, check

ROUNDS = 8
"""How many times a channel is brought to each side of its threshold at most, each time with other weights taking part."""

STORED, WALKED = 1 << 24, 1 << 31
"""Bits of sets of sums that are kept to find a solution, and that are gone through to prove that there is none."""

HEAD = 64
"""Half of the summands from whose subsets a solution is completed, where there are more than twice as many."""

SINGLED = 1 << 12
"""Weights of one population that are brought to the threshold one by one, at most, after those rounds."""

MOST = 1 << 12
"""Inputs that one population by itself is given at most, whatever the budget."""

GENERIC = 16
"""How many of `stimuli` each population by itself is given besides."""

BUDGET = 10**10
"""Synaptic operations that each engine spends on the inputs of one population by itself, about."""

Values = NDArray[np.unsignedinteger[Any]]
IntVector = NDArray[np.int64]
Position = tuple[int, ...]


def stimuli(net: IntNet, n: int = 64, seed: int = 0) -> Values:
    """Generated inputs [n, *input shape]: all zero, all maximum, one-hot, uniformly random, and sparse random ones in turn."""
    draw = np.random.default_rng(seed)
    top = net.input.maximum
    x = draw.integers(0, top + 1, (n, *net.input.shape))
    x[3::4] *= draw.random(x[3::4].shape) < 0.1
    x[:1], x[1:2] = 0, top
    for one_hot in x[2::4]:
        one_hot[...] = 0
        one_hot.flat[draw.integers(one_hot.size)] = top
    return _narrow(x, net.input)


def _narrow(x: NDArray[np.integer[Any]], spec: Input) -> Values:
    return x.astype(np.uint8 if spec.bits <= 8 else np.uint16)


# A population by itself.


@dataclass(frozen=True, eq=False)
class Isolated:
    """One population as a network of its own, whose input is the values of the population's sources.

    Attributes:
        net: the input; for several sources a relay for each, of its name and shape; the population; and behind one that
            spikes a readout of no interest.
        population: its name in `net`, as in the whole network.
        places: where in the input (without the sample axis) the values of each source are.
        shapes: of the sources, in the whole network.
    """

    net: IntNet
    population: str
    places: Mapping[str, tuple[slice, ...]]
    shapes: Mapping[str, tuple[int, ...]]

    def sources(self, x: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """What each source gives, [N, *shape], where the network's input is `x`."""
        taken = {n: x[(slice(None), *place)].reshape(len(x), *self.shapes[n]) for n, place in self.places.items()}
        return {name: values if name == INPUT else (values != 0).astype(np.uint8) for name, values in taken.items()}


def isolated(net: IntNet, population: Population) -> Isolated | None:
    """`population` by itself, exactly as it is in `net`.

    Several sources are stacked as channels of one input, smaller ones on a coarser grid, and relayed by populations that
    select them. The input of `net` needs no relay. None for a population that reads the input, and by groups or beside
    a source on a larger grid.
    """
    names = list(dict.fromkeys(p.source for p in population.projections))
    shapes = {name: _shape(net, name) for name in names}
    bits = net.input.bits if INPUT in names else 1
    relays: list[Population] = []
    if len(names) == 1:
        spec = Input(shapes[names[0]], bits)
        places: dict[str, tuple[slice, ...]] = {names[0]: tuple(slice(n) for n in spec.shape)}
        projections = tuple(replace(p, source=INPUT) for p in population.projections)
    else:
        names.sort(key=lambda name: name != INPUT)
        grids = {name: (*shape, 1, 1)[:3] for name, shape in shapes.items()}
        flat = all(len(shape) == 1 for shape in shapes.values())
        channels, *full = sum(g[0] for g in grids.values()), *(max(g[axis] for g in grids.values()) for axis in (1, 2))
        spec, first, places = Input((channels,) if flat else (channels, *full), bits), 0, {}
        for name in names:
            steps = [(n - 1) // (m - 1) if m > 1 else n for n, m in zip(full, grids[name][1:], strict=True)]
            spatial = (slice(0, (m - 1) * s + 1, s) for m, s in zip(grids[name][1:], steps, strict=True))
            places[name] = (slice(first, first + grids[name][0]), *(() if flat else spatial))
            if name != INPUT:
                select = _select(first, channels, grids[name], full, steps)
                synapses: Synapses = Dense(select[:, :, 0, 0]) if flat else Conv2d(select, (steps[0], steps[1]))
                shape = shapes[name] if flat else grids[name]
                relay = Population(name, shape, (Projection(INPUT, synapses),), threshold=np.ones(shape[0], np.int64))
                relays.append(relay)
            first += grids[name][0]
        if INPUT in names and (
            list(grids[INPUT][1:]) != full
            or any(
                isinstance(p.synapses, Conv2d) and p.synapses.groups > 1
                for p in population.projections
                if p.source == INPUT
            )
        ):
            return None
        projections = tuple(
            replace(p, synapses=_widened(p.synapses, spec.shape)) if p.source == INPUT else p
            for p in population.projections
        )
    populations = [*relays, replace(population, projections=projections)]
    if population.spiking:
        one = np.zeros((1, population.size), np.int64)
        one[0, 0] = 1
        taken = {p.name for p in populations}
        name = next(n for n in ("readout", "readout_", "readout__", *(f"r{k}" for k in range(99))) if n not in taken)
        populations.append(
            Population(name, (1,), (Projection(population.name, Dense(one)),), bias=np.zeros(1, np.int64))
        )
    return Isolated(check(IntNet(spec, tuple(populations))), population.name, places, shapes)


def _shape(net: IntNet, name: str) -> tuple[int, ...]:
    return net.input.shape if name == INPUT else net[name].shape


def _select(first: int, channels: int, grid: tuple[int, ...], full: list[int], steps: list[int]) -> NDArray[np.int64]:
    """The kernel [C, channels, kh, kw] that with strides `steps` takes channels from `first` on out of a coarser grid."""
    kernel = [max(1, n - m * s + 1) for n, m, s in zip(full, grid[1:], steps, strict=True)]
    weight = np.zeros((grid[0], channels, *kernel), np.int64)
    weight[np.arange(grid[0]), first + np.arange(grid[0]), 0, 0] = 1
    return weight


def _widened(synapses: Synapses, source: tuple[int, ...]) -> Synapses:
    """The same synapses on a source with more channels behind its own."""
    weight = synapses.weight
    match synapses:
        case Dense():
            wide = np.zeros((len(weight), int(np.prod(source))), np.int64)
        case Conv2d():
            wide = np.zeros((len(weight), source[0], *weight.shape[2:]), np.int64)
        case _:
            assert_never(synapses)
    wide[:, : weight.shape[1]] = weight
    return replace(synapses, weight=wide)


def afferents(
    net: IntNet, population: Population, neuron: tuple[int, ...]
) -> Iterator[tuple[str, IntVector, IntVector]]:
    """For each projection: its source, and which of that one's neurons (flat, C order) drive `neuron`, with which weights."""
    for projection in population.projections:
        shape, synapses = _shape(net, projection.source), projection.synapses
        match synapses:
            case Dense(weight=weight):
                yield projection.source, np.arange(weight.shape[1]), weight[neuron[0]].astype(np.int64)
            case Conv2d(weight=weight):
                per_group = weight.shape[1]
                first = neuron[0] // (len(weight) // synapses.groups) * per_group
                rows, columns = (
                    _taps(synapses, axis, n, at) for axis, n, at in zip((0, 1), shape[1:], neuron[1:], strict=True)
                )
                taps = (slice(None), *np.ix_(rows >= 0, columns >= 0))
                channels = np.arange(first, first + per_group)[:, None, None]
                flat = (channels * shape[1] + rows[rows >= 0][:, None]) * shape[2] + columns[columns >= 0]
                yield projection.source, flat.reshape(-1), weight[neuron[0]][taps].reshape(-1).astype(np.int64)
            case _:
                assert_never(synapses)


def _taps(conv: Conv2d, axis: int, size: int, at: int) -> IntVector:
    """Along one axis the source position of each tap of the kernel at target position `at`, -1 in the padding."""
    kernel, stride, padding, dilation = (
        v[axis] for v in (conv.weight.shape[2:], conv.stride, conv.padding, conv.dilation)
    )
    source = at * stride - padding + dilation * np.arange(kernel)
    return np.where((source >= 0) & (source < size), source, -1)


def membrane_potential(net: IntNet, population: str, neuron: tuple[int, ...], signals: Mapping[str, Values]) -> int:
    """u of one neuron, exactly, for one sample's values [*shape] of the population's sources."""
    return sum(
        int(signals[source].reshape(-1)[index].astype(np.int64) @ weight)
        for source, index, weight in afferents(net, net[population], neuron)
    )


# Which potentials a neuron can have, and by which source values.


@dataclass(frozen=True, eq=False)
class Sums:
    """The sums `weight @ v` over integers 0 <= v < 2^bits, each v with bits of its own, as a base and subsets of positive sizes.

    The base has every v of a negative weight at its maximum and the others at zero; size k is |weight| 2^bit of one v.

    Attributes:
        index, bit, size: [sizes].
        low, high: the least and the greatest sum.
        sets: bit s of `sets[k]` (little-endian) says whether some of the first k sizes add up to s; for as many sizes, the
            head, as `STORED` has room for.
    """

    weight: IntVector
    bits: IntVector
    index: IntVector
    bit: IntVector
    size: IntVector
    low: int
    high: int
    sets: tuple[bytes, ...]

    @property
    def head(self) -> int:
        return len(self.sets) - 1


def sums(weight: IntVector, bits: IntVector) -> Sums:
    """See `Sums`. The head is everything, where that is not too much; else the smallest sizes and some of all sizes."""
    index, bit = np.nonzero((weight[:, None] != 0) & (np.arange(bits.max(initial=0)) < bits[:, None]))
    size = np.abs(weight[index]) << bit
    order = np.argsort(size, kind="stable")
    if len(order) > 2 * HEAD:
        some = np.unique([*range(HEAD), *np.linspace(HEAD, len(order) - 1, HEAD).astype(int)])
        order = np.concatenate([order[some], np.delete(order, some)])
        head = size[order][: len(some)]
    else:
        head = size[order]
    sets = [1]
    for one in head[np.cumsum(head) * np.arange(1, len(head) + 1) <= STORED].tolist():
        sets.append(sets[-1] | sets[-1] << one)
    low = int((np.minimum(weight, 0) * ((1 << bits) - 1)).sum())
    stored = tuple(one.to_bytes(one.bit_length() // 8 + 1, "little") for one in sets)
    return Sums(weight, bits, index[order], bit[order], size[order], low, low + int(size.sum()), stored)


def nearest(of: Sums, threshold: int) -> tuple[int | None, int | None] | None:
    """The least sum >= threshold and the greatest below it, None where there is none; None if there are too many to tell."""
    if of.head < len(of.size) and len(of.size) * (of.high - of.low) > WALKED:
        return None
    every = int.from_bytes(of.sets[-1], "little")
    for one in of.size[of.head :].tolist():
        every |= every << one
    at = max(threshold - of.low, 0)
    above, below = every >> at, every & ((1 << at) - 1)
    least = (above & -above).bit_length() - 1 + at + of.low if above else None
    return least, below.bit_length() - 1 + of.low if below else None


def solve(of: Sums, target: int, wish: NDArray[np.bool_], draw: np.random.Generator) -> IntVector | None:
    """A v with `weight @ v == target`, random but for those with a `wish`, which rather are not zero; None if none was found.

    The sizes behind the head are chosen at random and led to where the head can do the rest: exactly where the head is all.
    """
    positive = of.weight[of.index] > 0
    for _ in range(1 if of.head == len(of.size) else 8):
        one_bits = draw.random(len(of.size)) < np.where(wish[of.index], 0.9, 0.5)
        chosen = one_bits == positive
        left = _lead(of, chosen, target - of.low, draw)
        if _fill(of, chosen, left):
            v = np.where(of.weight == 0, draw.integers(0, 1 << of.bits), 0)
            v[wish & (of.weight == 0)] = 1
            np.add.at(v, of.index, (chosen == positive).astype(np.int64) << of.bit)
            return v
    return None


def _lead(of: Sums, chosen: NDArray[np.bool_], target: int, draw: np.random.Generator) -> int:
    """Change what is `chosen` behind the head so that about half of the head is left to be added; returns what is left."""
    tail, size = chosen[of.head :], of.size[of.head :]
    need = target - int(size[tail].sum()) - int(of.size[: of.head].sum()) // 2
    movable = draw.permutation(np.flatnonzero(tail != (need > 0)))
    tail[movable[np.cumsum(size[movable]) <= abs(need)]] = need > 0
    return target - int(size[tail].sum())


def _fill(of: Sums, chosen: NDArray[np.bool_], left: int) -> bool:
    """Change what is `chosen` of the head, as little as may be, so that it adds up to `left`; whether that is possible."""
    if not _among(of.sets[-1], left):
        return False
    preferred, sizes = chosen[: of.head].tolist(), of.size[: of.head].tolist()
    for k in range(of.head - 1, -1, -1):
        rest = left - sizes[k]
        chosen[k] = _among(of.sets[k], rest) and (preferred[k] or not _among(of.sets[k], left))
        left = rest if chosen[k] else left
    return True


def _among(sums: bytes, s: int) -> bool:
    return 0 <= s < 8 * len(sums) and bool(sums[s >> 3] >> (s & 7) & 1)


# Inputs that bring each channel of a population by itself to its threshold.


@dataclass(frozen=True)
class Point:
    """In one sample, one neuron whose membrane potential u was solved for."""

    sample: int
    neuron: tuple[int, ...]
    u: int


@dataclass(frozen=True)
class Coverage:
    """How a population's channels were tried.

    Attributes:
        both: channels seen firing as well as silent.
        at, at_reachable: channels with a potential exactly at the threshold, of those where that is possible.
        below, below_reachable: the same for the threshold less one.
        pinned: channels shown the nearest reachable potentials on both sides: no other threshold would look the same.
        undecided: channels for which what is reachable was not settled within the budget.
        weights, weights_pinned: synapses of one neuron of each channel, and those whose source was active at the nearest
            potentials on both sides that it can be active at: a change of one weight that can be seen would be (of a
            graded input's weight, one that can be seen at the input's maximum).
    """

    channels: int
    both: int = 0
    at: int = 0
    at_reachable: int = 0
    below: int = 0
    below_reachable: int = 0
    pinned: int = 0
    undecided: int = 0
    weights: int = 0
    weights_pinned: int = 0

    def __add__(self, other: "Coverage") -> "Coverage":
        return Coverage(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True, eq=False)
class Injection:
    """Inputs [N, *input shape] of a population by itself, and what they are known to do there."""

    x: Values
    points: tuple[Point, ...]
    coverage: Coverage


@dataclass(frozen=True, eq=False)
class _Pattern:
    """Values of some neurons of the input that give `neuron` the membrane potential u; one slot's are never in one sample."""

    slot: int
    neuron: tuple[int, ...]
    index: IntVector
    values: IntVector
    u: int


def injection(alone: Isolated, budget: int = BUDGET, seed: int = 0) -> Injection:
    """Inputs that bring every channel of a population by itself to both sides of its threshold, as far as the budget goes.

    `GENERIC` general ones come first, then each channel once, and so on in rounds: a beginning of them is worth the most.
    """
    net, population = alone.net, alone.net[alone.population]
    draw, generic = np.random.default_rng(seed), stimuli(net, GENERIC, seed)
    if population.threshold is None:
        more = stimuli(net, 4 * GENERIC, seed + 1)
        return Injection(np.concatenate([generic, more]), (), Coverage(population.channels))
    slots, others = _slots(net, population)
    at_once = max(2, min(MOST, budget // synaptic_operations(population))) * len(slots)
    channels = np.arange(population.channels)
    if 2 * len(channels) > at_once:
        channels = np.sort(draw.choice(channels, max(1, at_once // 2), replace=False))
    rounds = max(1, min(ROUNDS, at_once // (2 * len(channels))))
    left_out = population.channels - len(channels)
    coverage = Coverage(left_out, undecided=left_out)
    singled = max(0, min(SINGLED, at_once - 2 * rounds * len(channels)) // len(channels))
    patterns: list[list[_Pattern]] = [[] for _ in range(rounds + 1)]
    cells = _cells(alone)
    for number, channel in enumerate(channels.tolist()):
        slot = number % len(slots)
        neurons = [(channel, *at) for at in (slots[slot], *(others or ()))]
        fields = [_receptive_field(alone, neuron, cells) for neuron in neurons]
        theta = int(population.threshold[channel])
        found, seen = _to_threshold(slot, neurons, fields, theta, others is not None, rounds, singled, draw)
        coverage += seen
        for into, each in zip(patterns, found, strict=False):
            into += each
    x, points = _packed(net.input, [pattern for each in patterns for pattern in each], draw)
    points = tuple(replace(point, sample=point.sample + len(generic)) for point in points)
    return Injection(np.concatenate([generic, x]), points, coverage)


def synaptic_operations(population: Population) -> int:
    """How many synapses drive a population, zero weights and padding included."""
    return sum(population.size * (p.synapses.weight.size // population.channels) for p in population.projections)


def _slots(net: IntNet, population: Population) -> tuple[list[Position], list[Position] | None]:
    """Positions whose neurons see the most synapses and share no source; and others to try, where none sees all.

    The second is empty if the first see all synapses, and None if there are too many others.
    """
    convs = [(p.source, p.synapses) for p in population.projections if isinstance(p.synapses, Conv2d)]
    if len(population.shape) == 1 or len(convs) < len(population.projections):
        return [()], []
    seen, every, fields = np.zeros(population.shape[1:], np.int64), 0, []
    used = {source: np.zeros(_shape(net, source)[1:], np.bool_) for source, _ in convs}
    for source, conv in convs:
        rows, columns = (
            [taps[taps >= 0] for taps in (_taps(conv, axis, used[source].shape[axis], at) for at in range(n))]
            for axis, n in enumerate(population.shape[1:])
        )
        seen += conv.weight.shape[1] * np.outer([len(taps) for taps in rows], [len(taps) for taps in columns])
        every += conv.weight[0].size
        fields.append((used[source], rows, columns))
    slots: list[Position] = []
    for y, x in np.argwhere(seen == seen.max()).tolist():
        if not any(taken[np.ix_(rows[y], columns[x])].any() for taken, rows, columns in fields):
            slots.append((y, x))
            for taken, rows, columns in fields:
                taken[np.ix_(rows[y], columns[x])] = True
    if seen.max() == every:
        return slots, []
    others = [at for at in np.ndindex(*population.shape[1:]) if at != slots[0]]
    return slots[:1], others if len(others) < 1 << 6 else None


def _cells(alone: Isolated) -> dict[str, IntVector]:
    """For each source of the population by itself the places (flat) of its neurons in the input."""
    every = np.arange(int(np.prod(alone.net.input.shape))).reshape(1, *alone.net.input.shape)
    cells = {n: every[(slice(None), *place)].reshape(-1) for n, place in alone.places.items()}
    return {INPUT: every.reshape(-1)[: len(next(iter(cells.values())))], **cells}


Field = tuple[IntVector, IntVector, IntVector]


def _receptive_field(alone: Isolated, neuron: Position, cells: Mapping[str, IntVector]) -> Field:
    """The input's neurons (flat) that drive a neuron, directly or relayed; their weights; and the bits of each."""
    population = alone.net[alone.population]
    index, weight, bits = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for source, driving, weights in afferents(alone.net, population, neuron):
        own = driving < len(cells[source])  # what widened synapses see beyond is not theirs
        index.append(cells[source][driving[own]])
        weight.append(weights[own])
        bits.append(np.full(int(own.sum()), alone.net.input.bits if source == INPUT else 1))
    places, first, inverse = np.unique(np.concatenate(index), return_index=True, return_inverse=True)
    total = np.zeros(len(places), np.int64)
    np.add.at(total, inverse, np.concatenate(weight))
    return places, total, np.concatenate(bits)[first]


def _to_threshold(
    slot: int,
    neurons: list[Position],
    fields: list[Field],
    theta: int,
    exact: bool,
    rounds: int,
    singled: int,
    draw: np.random.Generator,
) -> tuple[list[list[_Pattern]], Coverage]:
    """Patterns, round by round, that bring one of a channel's `neurons` to both sides of theta, and what they cover.

    Args:
        exact: no other neuron of the channel can have a potential that these cannot.
        singled: how many further patterns, in a last round, may each be for a weight that took no part so far.
    """
    every = [sums(weight, bits) for _, weight, bits in fields]
    goals = [_goal(every, theta, above, draw) for above in (True, False)]
    rows: list[list[_Pattern]] = [[] for _ in range(rounds + 1)]
    active, done = [], []
    for n, u, _ in goals:
        seen, shown = np.zeros(len(every[n].weight), np.bool_), u is None
        for row in rows[:rounds]:
            if u is None or (shown and seen.all()):
                break
            if (values := solve(every[n], u, ~seen, draw)) is not None:
                row.append(_Pattern(slot, neurons[n], fields[n][0], values, u))
                seen |= values > 0
                shown = True
        active.append(seen)
        done.append(shown)
    hit = [ok and u == target for ok, (_, u, _), target in zip(done, goals, (theta, theta - 1), strict=True)]
    settled = all(h or (exact and sure) for h, (_, _, sure) in zip(hit, goals, strict=True))
    if len(neurons) == 1:
        for above, seen in zip((True, False), active, strict=True):
            for j in np.flatnonzero(~seen)[: max(0, singled - len(rows[-1]))].tolist():
                seen[j], found = _single_out(every[0], j, theta, above, draw)
                rows[-1] += [_Pattern(slot, neurons[0], fields[0][0], v, int(every[0].weight @ v)) for v in found]
    weights = len(every[0].weight)
    pinned = int((active[0] & active[1]).sum()) if len(active[0]) == len(active[1]) == weights else 0
    at, below = hit
    covered = Coverage(1, 0, at, at, below, below, settled and all(done), not settled, weights, pinned)
    return rows, covered


def _single_out(of: Sums, j: int, theta: int, above: bool, draw: np.random.Generator) -> tuple[bool, list[IntVector]]:
    """Values with the j-th at its maximum and the nearest potential to theta from one side that it allows.

    The first result says whether that is settled: they were found, or there are none.
    """
    top = (1 << int(of.bits[j])) - 1
    rest = sums(np.where(np.arange(len(of.weight)) == j, 0, of.weight), of.bits)
    own = int(of.weight[j]) * top
    target = theta - own if above else theta - own - 1
    none = np.zeros(len(of.weight), np.bool_)
    values = solve(rest, target, none, draw)
    if values is None:
        if (pair := nearest(rest, theta - own)) is None:
            return False, []
        if (u := pair[not above]) is None:
            return True, []
        values = solve(rest, u, none, draw)
    if values is None:
        return False, []
    values[j] = top
    return True, [values]


def _goal(every: list[Sums], theta: int, above: bool, draw: np.random.Generator) -> tuple[int, int | None, bool]:
    """Which of some neurons can come nearest to theta from one side, with which potential, and whether that is certain.

    Any of them at theta (from above) or theta - 1 (from below) is as near as can be.
    """
    target = theta if above else theta - 1
    for n, of in enumerate(every):
        if solve(of, target, np.zeros(len(of.weight), np.bool_), draw) is not None:
            return n, target, True
    found = [nearest(of, theta) for of in every]
    side = [(pair[not above], n) for n, pair in enumerate(found) if pair is not None]
    reached = [(u, n) for u, n in side if u is not None]
    if not reached:
        return 0, None, None not in found
    u, n = min(reached) if above else max(reached)
    return n, u, None not in found


def _packed(spec: Input, patterns: list[_Pattern], draw: np.random.Generator) -> tuple[Values, tuple[Point, ...]]:
    """Inputs that hold the patterns, as many in one as there are slots, amid random values of all densities."""
    filled: dict[int, int] = {}
    samples = []
    for pattern in patterns:
        samples.append(filled.get(pattern.slot, 0))
        filled[pattern.slot] = samples[-1] + 1
    n = max(filled.values(), default=0)
    x = draw.integers(0, spec.maximum, (n, *spec.shape), np.uint8 if spec.bits <= 8 else np.uint16, endpoint=True)
    x *= draw.random(x.shape, np.float32) < draw.choice([0, 0.1, 0.5, 1], (n, *[1] * len(spec.shape)))
    flat = x.reshape(n, int(np.prod(spec.shape)))
    for sample, pattern in zip(samples, patterns, strict=True):
        flat[sample, pattern.index] = pattern.values
    points = (Point(s, pattern.neuron, pattern.u) for s, pattern in zip(samples, patterns, strict=True))
    return x, tuple(points)
