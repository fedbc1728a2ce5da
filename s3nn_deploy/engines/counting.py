"""The exact count of every event of a run, from spikes alone: one pass over them, whatever engine made them.

A spike causes as many synaptic operations as its neuron has synapses. The fan-outs of most rows of neurons are alike
(borders, strides and weights of zero make a few kinds). So spikes are first summed over the rows of each kind, in integers,
and then multiplied by the fan-outs of the kinds. Every count is a linear form of these sums. Products are exact: they are
taken in a type that holds their bound. Fan-outs are taken apart so that float32 mostly does: what all of them have in
common is a factor of the linear form, and of the weights that are not zero, those that are zero are counted.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s3nn_deploy.counts import KINDS, Counts, Rows
from s3nn_deploy.engines.layers import as_conv, exact_dtype, grid
from s3nn_deploy.intnet import INPUT, Conv2d, IntNet, consumers, signed_bits

LARGEST = 255
"""Spikes are summed in 8 bits."""

CHANNELS = 48
"""Fewer are not worth summing over columns."""

ROW = 64
"""Rows of fewer bytes are not worth summing."""

LOOP = 128
"""What NumPy could sum, in bytes, in the time that each loop over neighbouring bytes takes to start."""

SMALL = 1_000_000
"""Multiply-accumulates up to which BLAS has a fast way for few columns; beyond, a product with each of them is faster."""

Alike = tuple[Any, int, int, bool]
"""Indices of rows or columns, the first and the end of the kinds that they are of by turns, and whether each is a kind of its own."""


@dataclass(frozen=True, eq=False)
class Tally:
    """What one spike of each neuron of `source` causes, as the fan-outs of which its efferent projections' are multiples.

    Attributes:
        graded: the source is the input, and has several bits: what is counted are values other than zero.
        place: of its spikes among those of a sample, in bytes.
        rows, columns: which rows are alike, and which columns within all of them; nothing where none are. Where columns differ
            too much, a row is one column of W * C channels.
        row_kinds, column_kinds: the same as the kind of each row and column.
        fan_outs: [fan-outs, kinds of rows * kinds of columns * C]; the first row is ones, to count spikes; in a type in
            which the sum over all neurons is exact.
        bounds: [fan-outs], the sums when every neuron fires.
        efferents: the projections from the source.
        at: the tally's rows among the sums of all.
    """

    source: str
    graded: bool
    place: slice
    rows: tuple[Alike, ...]
    row_kinds: NDArray[np.int64]
    columns: tuple[Alike, ...]
    column_kinds: NDArray[np.int64]
    fan_outs: NDArray[Any]
    bounds: tuple[int, ...]
    efferents: tuple["Efferent", ...]
    at: slice


@dataclass(frozen=True)
class Efferent:
    """A projection from a tally's source.

    Attributes:
        bits: of a stored weight.
        synapses: in all.
        fan_out, zeros: the fan-out of all synapses, and of those whose weight is zero: rows of `Tally.fan_outs` with the
            factor of each.
    """

    target: str
    bits: int
    synapses: int
    fan_out: Mapping[int, int]
    zeros: Mapping[int, int]


@dataclass(frozen=True, eq=False)
class Counter:
    """A tally for the input and for each spiking population, and what their sums mean.

    What is counted lies in one block of memory, a byte for each value: all samples of one source after those of another, with 1
    for a spike or for an input that is not zero. The operating system gives a large block in large pages.

    Attributes:
        bytes: of a sample in the block.
        effects: [populations * kinds of events, 1 + sums of all tallies], in a type in which the product is exact; the
            first column is what happens in any case.
    """

    tallies: Mapping[str, Tally]
    populations: tuple[str, ...]
    effects: NDArray[Any]
    bytes: int


def counter(net: IntNet) -> Counter:
    """What counts the events of `net`."""
    sources = {INPUT: net.input.shape, **{p.name: p.shape for p in net.spiking}}
    tallies: dict[str, Tally] = {}
    width, bytes_ = 1, 0
    for name, shape in sources.items():
        tallies[name] = tally = _tally(net, name, grid(shape), bytes_, width)
        bytes_, width = tally.place.stop, tally.at.stop
    names = tuple(p.name for p in net.populations)
    effects = np.zeros((len(names), len(KINDS), width), dtype=np.int64)
    at = {name: dict(zip(KINDS, rows, strict=True)) for name, rows in zip(names, effects, strict=True)}
    for population in net.populations:
        at[population.name]["neuron_updates"][0] = at[population.name]["membrane_reads"][0] = population.size
    for tally in tallies.values():
        column = tally.at.start
        if tally.source != INPUT:
            at[tally.source]["spikes"][column] = 1
            at[tally.source]["messages"][column] = len({efferent.target for efferent in tally.efferents})
        kind = "macs" if tally.graded else "synops"
        for efferent in tally.efferents:
            events = at[efferent.target]
            for row, factor in efferent.fan_out.items():
                for each in (kind, f"{kind}_nonzero", "membrane_reads", "membrane_writes"):
                    events[each][column + row] += factor
                events["weight_bits"][column + row] += factor * efferent.bits
            for row, factor in efferent.zeros.items():
                events[f"{kind}_nonzero"][column + row] -= factor
            events["dense_macs"][0] += efferent.synapses
    flat = effects.reshape(-1, width)
    most = np.abs(flat) @ np.array([1, *(bound for t in tallies.values() for bound in t.bounds)])
    return Counter(tallies, names, flat.astype(exact_dtype(int(most.max()))), bytes_)


def sums(counter: Counter, samples: int) -> NDArray[Any]:
    """Room for the sums of `samples` samples, [1 + sums of all tallies, samples], for `add` and then `count`."""
    room = np.empty((counter.effects.shape[1], samples), counter.effects.dtype)
    room[0] = 1
    return room


def view(counter: Counter, source: str, block: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The place of a source in the block, [N, H, W * C]."""
    tally, samples = counter.tallies[source], len(block) // counter.bytes
    height = len(tally.row_kinds)
    row = (tally.place.stop - tally.place.start) // height
    return block[samples * tally.place.start : samples * tally.place.stop].reshape(samples, height, row)


def add(counter: Counter, block: NDArray[np.uint8], rows: slice, sums: NDArray[Any], *sources: str) -> None:
    """Put what the spikes in the block cause into `sums`, for the samples `rows`, of all sources if none is named."""
    for source in sources or counter.tallies:
        tally = counter.tallies[source]
        _add(tally, view(counter, source, block)[rows], sums[tally.at, rows])


def _add(tally: Tally, spikes: NDArray[np.uint8], sums: NDArray[Any]) -> None:
    n, _, size = spikes.shape
    width = len(tally.column_kinds)
    by_row = _sum_alike(spikes, tally.rows)
    by_kind = _sum_alike(by_row.reshape(-1, width, size // width), tally.columns)
    kinds = by_kind.reshape(n, tally.fan_outs.shape[1]).astype(tally.fan_outs.dtype)
    if kinds.size * len(tally.fan_outs) <= SMALL:
        sums[:] = tally.fan_outs @ kinds.T
        return
    for row, fan_out in zip(sums, tally.fan_outs, strict=True):
        row[:] = kinds @ fan_out


def count(counter: Counter, sums: NDArray[Any]) -> Counts:
    """The counts of a run, from the sums of all tallies."""
    rows = (counter.effects @ sums).astype(np.int64)
    return Counts(Rows(counter.populations, rows.reshape(len(counter.populations), len(KINDS), -1)))


def _tally(net: IntNet, source: str, shape: tuple[int, int, int], byte: int, row: int) -> Tally:
    maps = [np.ones(shape, dtype=np.int64)]

    def rows_of(fan_out: NDArray[np.int64]) -> dict[int, int]:
        """`fan_out` as a multiple of one of `maps`."""
        common = int(np.gcd.reduce(fan_out, axis=None))
        if common == 0:
            return {}
        least = fan_out // common
        at = next((row for row, known in enumerate(maps) if np.array_equal(known, least)), len(maps))
        if at == len(maps):
            maps.append(least)
        return {at: common}

    efferents = []
    for population, projection in consumers(net):
        if projection.source == source:
            conv = as_conv(net, projection)
            weight = conv.weight
            every, zeros = (_fan_out(conv, shape, which) for which in (np.ones(weight.shape, dtype=bool), weight == 0))
            bits = signed_bits(int(weight.min()), int(weight.max()))
            efferents.append(Efferent(population.name, bits, int(every.sum()), rows_of(every), rows_of(zeros)))
    bounds = tuple(int(m.sum()) for m in maps)
    fan_outs = np.stack(maps, -1)
    width = shape[1] * shape[2]
    rows, row_kinds = _alike(fan_outs, LARGEST if width >= ROW else 1, width)
    fan_outs = fan_outs[np.unique(row_kinds, return_index=True)[1]].swapaxes(0, 1)
    most = LARGEST // int(np.bincount(row_kinds).max())
    columns, column_kinds = _alike(fan_outs, most, shape[2])
    if shape[2] < CHANNELS or 2 * (column_kinds.max() + 1) > shape[1]:  # not worth a pass of its own: the row as one column
        fan_outs = fan_outs.swapaxes(0, 1).reshape(1, -1, width, len(maps))
        columns, column_kinds = _alike(fan_outs, most, width)
    fan_outs = fan_outs[np.unique(column_kinds, return_index=True)[1]].swapaxes(0, 1)
    flat = fan_outs.reshape(-1, len(maps)).T.astype(exact_dtype(max(bounds)), order="C")
    graded = source == INPUT and net.input.bits > 1
    place, at = slice(byte, byte + math.prod(shape)), slice(row, row + len(bounds))
    return Tally(source, graded, place, rows, row_kinds, columns, column_kinds, flat, bounds, tuple(efferents), at)


def _alike(fan_outs: NDArray[np.int64], most: int, size: int) -> tuple[tuple[Alike, ...], NDArray[np.int64]]:
    """Which entries along the first axis are alike, at most `most` of a kind (nothing if all are kinds of their own), and the
    kind of each entry.

    Args:
        size: bytes of spikes in an entry.
    """
    found: dict[bytes, list[int]] = {}
    for index, entry in enumerate(fan_outs):
        found.setdefault(entry.tobytes(), []).append(index)
    runs = [run for indices in found.values() for run in _runs(indices, most, size)]
    alone = sorted(index for indices, kinds in runs if kinds == len(indices) for index in indices)
    summed = sorted((indices, kinds) for indices, kinds in runs if kinds < len(indices))
    runs = [(alone, len(alone)), *summed] if alone else summed
    of, alike, start = np.empty(len(fan_outs), dtype=np.int64), [], 0
    for indices, kinds in runs:
        of[indices] = start + np.arange(len(indices)) % kinds
        alike.append((_evenly(indices), start, start + kinds, kinds == len(indices)))
        start += kinds
    return tuple(alike) if start < len(of) else (), of


def _runs(indices: list[int], most: int, size: int) -> list[tuple[list[int], int]]:
    """Indices that are alike, in parts with the number of kinds that each part makes by turns: side by side, kinds are
    summed in one loop, so that a few are faster than one where entries are small."""
    count = len(indices)
    if indices[-1] - indices[0] + 1 > count:  # apart
        return [(indices[at : at + most], 1) for at in range(0, count, most)]
    kinds = min(
        (k for k in range(-(-count // most), count + 1) if count % k == 0),
        key=lambda k: count // k * LOOP + k * size,
    )
    if kinds == count > most > 1:  # such as a prime number of them
        return [*_runs(indices[:-1], most, size), (indices[-1:], 1)]
    return [(indices, kinds)]


def _evenly(indices: list[int]) -> Any:
    """The indices as a slice, if they are evenly spaced."""
    step = indices[1] - indices[0] if len(indices) > 1 else 1
    even = slice(indices[0], indices[-1] + 1, step)
    return even if indices == list(range(even.start, even.stop, step)) else np.array(indices)


def _sum_alike(values: NDArray[Any], alike: tuple[Alike, ...]) -> NDArray[Any]:
    """`values` [N, A, M] summed over the entries of each kind, [N, kinds, M]; no sum exceeds `LARGEST`."""
    if not alike:
        return values
    samples, _, size = values.shape
    sums = np.empty((samples, alike[-1][2], size), dtype=np.uint8)
    flat = sums.reshape(samples, -1)
    for indices, start, stop, alone in alike:
        some = values[:, indices]
        if alone:
            sums[:, start:stop] = some
        else:
            by_turns = some.reshape(samples, -1, (stop - start) * size)
            np.add.reduce(by_turns, axis=1, dtype=np.uint8, out=flat[:, start * size : stop * size])
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
