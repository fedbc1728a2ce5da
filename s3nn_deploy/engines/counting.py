"""The exact count of every event of a run, from spikes alone: one pass over them, whatever engine made them.

A spike causes as many synaptic operations as its neuron has synapses. The fan-outs of most rows of neurons are alike
(borders, strides and weights of zero make a few kinds). So spikes are first summed over the rows of each kind, in integers,
and then multiplied by the fan-outs of the kinds. Every count is a linear form of these sums. Products are exact: they are
taken in a type that holds their bound.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s3nn_deploy.counts import KINDS, Counts
from s3nn_deploy.engines.layers import as_conv, exact_dtype, grid
from s3nn_deploy.intnet import INPUT, Conv2d, IntNet, consumers, signed_bits


@dataclass(frozen=True, eq=False)
class Tally:
    """What one spike of each neuron of `source` causes: two fan-outs for each efferent projection, of all its synapses
    and of those whose weight is not zero.

    Attributes:
        graded: the source is the input, and has several bits: what is counted are values other than zero.
        rows: the kinds of rows: the indices that are of each kind.
        row_kinds: the same as the kind of each row, [H].
        fan_outs: [1 + fan-outs, kinds of rows * W * C]; the first row is ones, to count spikes; in a type in which the
            sum over all neurons is exact.
        bounds: [1 + fan-outs], the sums when every neuron fires.
        efferents: for each projection from the source: target population, stored weight bits, synapses in all.
        at: the tally's rows among the sums of all.
    """

    source: str
    graded: bool
    rows: tuple[Any, ...]
    row_kinds: NDArray[np.int64]
    fan_outs: NDArray[Any]
    bounds: tuple[int, ...]
    efferents: tuple[tuple[str, int, int], ...]
    at: slice


@dataclass(frozen=True, eq=False)
class Counter:
    """A tally for the input and for each spiking population, and what their sums mean.

    Attributes:
        effects: [populations * kinds of events, 1 + sums of all tallies], in a type in which the product is exact; the
            first column is what happens in any case.
    """

    tallies: Mapping[str, Tally]
    populations: tuple[str, ...]
    effects: NDArray[Any]


def counter(net: IntNet) -> Counter:
    """What counts the events of `net`."""
    sources = {INPUT: net.input.shape, **{p.name: p.shape for p in net.spiking}}
    tallies: dict[str, Tally] = {}
    width = 1
    for name, shape in sources.items():
        tallies[name] = _tally(net, name, grid(shape), width)
        width = tallies[name].at.stop
    names = tuple(p.name for p in net.populations)
    effects = np.zeros((len(names), len(KINDS), width), dtype=np.int64)
    at = {name: dict(zip(KINDS, rows, strict=True)) for name, rows in zip(names, effects, strict=True)}
    for population in net.populations:
        at[population.name]["neuron_updates"][0] = at[population.name]["membrane_reads"][0] = population.size
    for tally in tallies.values():
        column = tally.at.start
        if tally.source != INPUT:
            at[tally.source]["spikes"][column] = 1
            at[tally.source]["messages"][column] = len({target for target, _, _ in tally.efferents})
        kind = "macs" if tally.graded else "synops"
        for index, (target, weight_bits, synapses) in enumerate(tally.efferents):
            caused, nonzero, events = column + 1 + 2 * index, column + 2 + 2 * index, at[target]
            for each, times in ((kind, 1), ("weight_bits", weight_bits), ("membrane_reads", 1), ("membrane_writes", 1)):
                events[each][caused] += times
            events[f"{kind}_nonzero"][nonzero] += 1
            events["dense_macs"][0] += synapses
    flat = effects.reshape(-1, width)
    most = flat @ np.array([1, *(bound for t in tallies.values() for bound in t.bounds)])
    return Counter(tallies, names, flat.astype(exact_dtype(int(most.max()))))


def sums(counter: Counter, samples: int) -> NDArray[Any]:
    """Room for the sums of `samples` samples, [1 + sums of all tallies, samples], for `add` and then `count`."""
    room = np.empty((counter.effects.shape[1], samples), counter.effects.dtype)
    room[0] = 1
    return room


def add(tally: Tally, signal: NDArray[Any], sums: NDArray[Any]) -> None:
    """Put what the spikes `signal` [N, H, W, C] of a tally's source cause into its rows of `sums`."""
    n, height, width, channels = signal.shape
    spikes = (signal != 0).view(np.uint8) if tally.graded else signal
    by_row = _sum_alike(spikes.reshape(n, height, width * channels), tally.rows)
    kinds = by_row.reshape(n, tally.fan_outs.shape[1]).astype(tally.fan_outs.dtype)
    for row, fan_out in enumerate(tally.fan_outs, tally.at.start):  # one by one: BLAS is slow at few columns
        sums[row] = kinds @ fan_out


def count(counter: Counter, sums: NDArray[Any]) -> Counts:
    """The counts of a run, from the sums of all tallies."""
    events = (counter.effects @ sums).astype(np.int64).reshape(len(counter.populations), len(KINDS), -1)
    return Counts(
        {name: dict(zip(KINDS, rows, strict=True)) for name, rows in zip(counter.populations, events, strict=True)}
    )


def _tally(net: IntNet, source: str, shape: tuple[int, int, int], start: int) -> Tally:
    efferents, maps = [], [np.ones(shape, dtype=np.int64)]
    for population, projection in consumers(net):
        if projection.source == source:
            conv = as_conv(net, projection)
            weight = conv.weight
            maps += [_fan_out(conv, shape, which) for which in (np.ones(weight.shape, dtype=bool), weight != 0)]
            bits = signed_bits(int(weight.min()), int(weight.max()))
            efferents.append((population.name, bits, int(maps[-2].sum())))
    rows, row_kinds, fan_outs = _alike(np.stack(maps, -1))
    bounds = tuple(int(m.sum()) for m in maps)
    kinds = fan_outs.reshape(-1, len(maps)).T.astype(exact_dtype(max(bounds)), order="C")
    graded, at = source == INPUT and net.input.bits > 1, slice(start, start + len(bounds))
    return Tally(source, graded, rows, row_kinds, kinds, bounds, tuple(efferents), at)


def _alike(fan_outs: NDArray[np.int64]) -> tuple[tuple[Any, ...], NDArray[np.int64], NDArray[np.int64]]:
    """Which rows of `fan_outs` are alike: the indices of each kind, as slices where they are evenly spaced; the kind of
    each row; and the fan-outs of each kind."""
    kinds: dict[bytes, list[int]] = {}
    for index, row in enumerate(fan_outs):
        kinds.setdefault(row.tobytes(), []).append(index)
    of = np.empty(len(fan_outs), dtype=np.int64)
    for kind, indices in enumerate(kinds.values()):
        of[indices] = kind
    first = [indices[0] for indices in kinds.values()]
    return tuple(map(_evenly, kinds.values())), of, fan_outs[first]


def _evenly(indices: list[int]) -> Any:
    step = indices[1] - indices[0] if len(indices) > 1 else 1
    even = slice(indices[0], indices[-1] + 1, step)
    return even if indices == list(range(even.start, even.stop, step)) else np.array(indices)


def _sum_alike(values: NDArray[Any], kinds: tuple[Any, ...]) -> NDArray[Any]:
    """`values` [N, H, M] of 0 and 1 summed over the rows of each kind, [N, kinds, M]."""
    if len(kinds) == values.shape[1]:  # every row is of its own kind, in order
        return values
    dtype = np.min_scalar_type(values.shape[1])
    sums = np.empty((len(values), len(kinds), values.shape[2]), dtype=dtype)
    for index, kind in enumerate(kinds):
        np.add.reduce(values[:, kind], axis=1, dtype=dtype, out=sums[:, index])
    return sums


def _fan_out(conv: Conv2d, grid: tuple[int, int, int], counted: NDArray[np.bool_]) -> NDArray[np.int64]:
    """How many `counted` synapses each neuron of a source of (H, W, C) has, exact at borders: int64 [H, W, C]."""
    out, per_group, *kernel = conv.weight.shape
    by_source = counted.reshape(conv.groups, out // conv.groups, per_group, *kernel)
    taps = by_source.sum(1, dtype=np.int64).reshape(-1, *kernel)
    _, *target = conv.out_shape((grid[2], *grid[:2]))
    axes = zip(grid[:2], target, kernel, conv.stride, conv.padding, conv.dilation, strict=True)
    rows, columns = (_contacts(*axis) for axis in axes)
    return (rows.T @ (taps @ columns)).transpose(1, 2, 0)


def _contacts(source: int, target: int, kernel: int, stride: int, padding: int, dilation: int) -> NDArray[np.int64]:
    """Along one axis, [kernel, source]: 1 where that tap connects that source position to some target position."""
    offset = np.arange(source) + padding - dilation * np.arange(kernel)[:, None]
    return ((offset % stride == 0) & (offset >= 0) & (offset < target * stride)).astype(np.int64)
