"""The event-driven engine: each spike adds its neuron's row of weights, so that time is in proportion to spikes.

Where a target neuron looks, the indices of the spikes are gathered from lists kept for each row of the source, and eight
rows of weights are added at a time to 16-bit sums, which go over to 32 bits before they can overflow. Compiled by numba
when first used, and kept in its cache.
"""

from functools import lru_cache, partial
from threading import Lock
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from s3nn_deploy.engines import blas
from s3nn_deploy.engines.counting import Counter, Tally
from s3nn_deploy.engines.layers import Afferent, Layer, Signals, Step, identity

AT_ONCE = 8
"""Rows of weights added in one pass over the sums."""

NOTHING = np.empty((0, 0, 0, 0), dtype=np.uint8)

ALL = ""
"""All sources of a network: no population has this name."""

ONE_AT_A_TIME = Lock()
"""Each kernel takes all processors, and not every threading layer of numba stands two callers."""

compiled = partial(numba.njit, cache=True, nogil=True, error_model="numpy")


def prepare(layer: Layer) -> Step | None:
    """The layer's step, or None: input of several bits, weights of more than 8 bits, or sums beyond 32 bits."""
    if layer.or_pool:
        return blas.prepare(layer)
    wide = any(a.maximum > 1 or a.conv.weight.dtype != np.int8 for a in layer.afferents)
    if wide or layer.bound >= 1 << 30:
        return None
    theta = np.zeros(layer.grid[2]) if layer.threshold is None else layer.threshold
    summed, skip = sorted(layer.afferents, key=lambda a: -a.conv.groups), None
    if layer.threshold is not None and (joined := identity(layer.afferents)) is not None:
        summed, skip = [joined[0]], (joined[1].source, joined[1].conv.weight.reshape(-1).astype(np.int32))
    return partial(_run, layer, [_arguments(afferent) for afferent in summed], theta.astype(np.int32), skip)


def add(counter: Counter, block: NDArray[np.uint8], rows: slice, sums: NDArray[Any]) -> None:
    """`counting.add`, compiled: one call for all sources."""
    if rows.stop - rows.start == 1:  # sooner done than the other cores are awake
        add_on_one_core(counter, block, rows, sums)
        return
    with ONE_AT_A_TIME:
        _count(block, len(block) // counter.bytes, rows.start, rows.stop, *_tables(counter)[ALL], sums)


def add_on_one_core(counter: Counter, block: NDArray[np.uint8], rows: slice, sums: NDArray[Any], *sources: str) -> None:
    """`counting.add`, compiled, for an engine that has threads of its own; meanwhile other threads have Python's lock."""
    for source in sources or (ALL,):
        _count_some(block, len(block) // counter.bytes, rows.start, rows.stop, *_tables(counter)[source], sums)


Table = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[Any]]
"""For the kernel: of each tally [first byte, rows, bytes of a row, columns, kinds of rows, places in a kind, first of its sums,
sums]; the kind of each row and then column of all tallies; and the fan-outs of all, in a type that holds the sums: the
narrower one has faster loops."""


@lru_cache(maxsize=2)
def _tables(counter: Counter) -> dict[str, Table]:
    """A table for each source, and one for all of them."""
    tallies = counter.tallies
    return {ALL: _table(*tallies.values())} | {source: _table(tally) for source, tally in tallies.items()}


def _table(*tallies: Tally) -> Table:
    sizes, kinds, fan_outs = [], [], []
    for tally in tallies:
        height, size = len(tally.row_kinds), tally.place.stop - tally.place.start
        row_kinds = int(tally.row_kinds.max()) + 1
        geometry = height, size // height, len(tally.column_kinds), row_kinds, tally.fan_outs.shape[1] // row_kinds
        sizes.append([tally.place.start, *geometry, tally.at.start, len(tally.bounds)])
        kinds += [tally.row_kinds, tally.column_kinds]
        fan_outs.append(tally.fan_outs.reshape(-1))
    most = max(bound for tally in tallies for bound in tally.bounds)
    every = np.concatenate(fan_outs).astype(np.int32 if most < 1 << 31 else np.int64)
    return np.array(sizes), np.concatenate(kinds), every


def _arguments(afferent: Afferent) -> tuple[Any, ...]:
    """Weights as rows [kh * kw * C + 1, outputs of a group] in the order ky, kx, C, the last one of zeros, and geometry."""
    conv = afferent.conv
    out, per_group, kh, kw = conv.weight.shape
    group = out // conv.groups
    by_tap = conv.weight.reshape(conv.groups, group, per_group, kh, kw).transpose(3, 4, 0, 2, 1)
    rows = np.zeros((kh * kw * afferent.grid[2] + 1, group), dtype=np.int8)
    rows[:-1] = by_tap.reshape(-1, group)
    largest = max(1, int(np.abs(conv.weight.astype(np.int64)).max()))
    safe = min(np.iinfo(np.int16).max // largest, 1 << 14) // AT_ONCE * AT_ONCE
    geometry = np.array([kh, kw, *conv.stride, *conv.padding, *conv.dilation, per_group, safe])
    return afferent.source, rows.reshape(-1), geometry


def _run(
    layer: Layer,
    arguments: list[tuple[Any, ...]],
    theta: NDArray[np.int32],
    identity: tuple[str, NDArray[np.int32]] | None,
    signals: Signals,
    made: NDArray[Any],
) -> None:
    samples = len(made)
    skip, factors = (NOTHING, theta) if identity is None else (signals[identity[0]], identity[1])
    spikes = made if layer.bias is None else np.empty((samples, *layer.grid), dtype=np.uint8)
    whole = layer.threshold is None or len(arguments) > 1
    u = np.empty((samples, *layer.grid) if whole else (0, 0, 0, 0), dtype=np.int32)
    blocks = max(1, -(-numba.get_num_threads() // max(samples, 1)))
    for index, (source, rows, geometry) in enumerate(arguments):
        fire = layer.threshold is not None and index == len(arguments) - 1
        with ONE_AT_A_TIME:
            _all(signals[source], rows, geometry, blocks, index > 0, fire, theta, skip, factors, u, spikes)
    if layer.bias is not None:
        np.add(u, layer.bias, out=made)


@compiled(parallel=True)
def _all(source, rows, geometry, blocks, add, fire, theta, skip, factors, u, spikes):  # type: ignore[no-untyped-def]
    for task in numba.prange(source.shape[0] * blocks):
        n, block = task // blocks, task % blocks
        _block(source, rows, geometry, n, block, blocks, add, fire, theta, skip, factors, u, spikes)


@compiled(parallel=True)
def _count(block, samples, first, last, sizes, kinds, fan_outs, sums):  # type: ignore[no-untyped-def]
    for n in numba.prange(first, last):
        _count_one(block, samples, n, sizes, kinds, fan_outs, sums)


@compiled()
def _count_some(block, samples, first, last, sizes, kinds, fan_outs, sums):  # type: ignore[no-untyped-def]
    for n in range(first, last):
        _count_one(block, samples, n, sizes, kinds, fan_outs, sums)


@compiled()
def _count_one(block, samples, n, sizes, kinds, fan_outs, sums):  # type: ignore[no-untyped-def]
    at_kind, at_fan_out = 0, 0
    total = np.empty(1, dtype=fan_outs.dtype)  # a scalar would have 64 bits, and slower loops
    for start, height, size, width, row_kinds, places, at, maps in sizes:
        spikes = block[samples * start + n * height * size :]
        by_row = np.zeros((row_kinds, size), dtype=np.uint8)
        for y in range(height):
            of_kind, row = by_row[kinds[at_kind + y]], spikes[y * size :]
            for i in range(size):
                of_kind[i] += row[i]
        at_kind += height
        channels = size // width
        by_kind = np.zeros(row_kinds * places, dtype=np.int32)  # in which the loops over channels are fast
        for row_kind in range(row_kinds):
            for x in range(width):
                of_column = by_kind[row_kind * places + kinds[at_kind + x] * channels :]
                column = by_row[row_kind, x * channels :]
                for i in range(channels):
                    of_column[i] += column[i]
        at_kind += width
        for m in range(at, at + maps):
            fan_out = fan_outs[at_fan_out:]
            total[0] = 0
            for k in range(len(by_kind)):
                total[0] += fan_out[k] * by_kind[k]
            sums[m, n] = total[0]
            at_fan_out += len(by_kind)


@compiled()
def _block(  # type: ignore[no-untyped-def]
    source, rows, geometry, n, block, blocks, add, fire, theta, skip, factors, u, spikes
):
    """One of `blocks` parts of sample `n`: potentials into `u`, on top of what is there if `add`; spikes if `fire`, for which
    spikes of `skip` at the same place count `factors`, if there are any."""
    kh, kw, sh, sw, ph, pw, dh, dw, per_group, safe = geometry
    _, height, width, channels = source.shape
    _, out_height, out_width, outputs = spikes.shape
    group = outputs // (channels // per_group)
    nothing = kh * kw * channels
    top, bottom = out_height * block // blocks, out_height * (block + 1) // blocks
    first, last = max(0, top * sh - ph), min(height, (bottom - 1) * sh - ph + (kh - 1) * dh + 1)
    starts, events = _lists(source[n], first, last)
    active = np.empty(nothing + AT_ONCE, dtype=np.int32)
    short, sums = np.empty(outputs, dtype=np.int16), np.empty(outputs, dtype=np.int32)
    for y in range(top, bottom):
        for x in range(out_width):
            n_active = 0
            for ky in range(kh):
                row = y * sh - ph + ky * dh - first
                if row < 0 or row >= last - first:
                    continue
                for kx in range(1 if dw == 1 else kw):  # without dilation, a row of the kernel is one run of events
                    left = x * sw - pw + kx * dw
                    right = min(left + (kw if dw == 1 else 1), width)
                    shift = ((ky * kw + kx) - left) * channels
                    if right > max(left, 0):
                        for event in range(starts[row, max(left, 0)], starts[row, right]):
                            active[n_active] = events[event] + shift
                            n_active += 1
            if add:
                sums[:] = u[n, y, x]
            else:
                sums[:] = 0
            if group == outputs:
                _add(rows, active, n_active, nothing, safe, short, sums)
            else:
                for index in range(n_active):
                    row = active[index]
                    target = row % channels // per_group * group
                    for output in range(group):
                        sums[target + output] += rows[row * group + output]
            if fire:
                spike = spikes[n, y, x]
                if len(skip):
                    same = skip[n, y, x]
                    for output in range(outputs):
                        sums[output] += factors[output] * same[output]
                for output in range(outputs):
                    spike[output] = sums[output] >= theta[output]
            else:
                u[n, y, x] = sums


@compiled()
def _lists(source, first, last):  # type: ignore[no-untyped-def]
    """The positions x * C + c of the spikes in each row from `first` to `last`, and where in the list each pixel starts."""
    _, width, channels = source.shape
    starts = np.empty((max(last - first, 0), width + 1), dtype=np.int32)
    events = np.empty(max(last - first, 0) * width * channels, dtype=np.int32)
    found = 0
    for row in range(first, last):
        for x in range(width):
            starts[row - first, x] = found
            pixel = source[row, x]
            for channel in range(channels):
                events[found] = x * channels + channel
                found += pixel[channel]
        starts[row - first, width] = found
    return starts, events


@compiled()
def _add(rows, active, n_active, nothing, safe, short, sums):  # type: ignore[no-untyped-def]
    """Add the rows of weights listed in `active` to `sums`."""
    outputs = len(sums)
    for extra in range(n_active, n_active + AT_ONCE - 1):
        active[extra] = nothing
    for start in range(0, n_active, safe):
        short[:] = 0
        for index in range(start, min(start + safe, n_active), AT_ONCE):
            a = rows[active[index] * outputs :][:outputs]
            b = rows[active[index + 1] * outputs :][:outputs]
            c = rows[active[index + 2] * outputs :][:outputs]
            d = rows[active[index + 3] * outputs :][:outputs]
            e = rows[active[index + 4] * outputs :][:outputs]
            f = rows[active[index + 5] * outputs :][:outputs]
            g = rows[active[index + 6] * outputs :][:outputs]
            h = rows[active[index + 7] * outputs :][:outputs]
            for o in range(outputs):
                short[o] += a[o] + b[o] + c[o] + d[o] + e[o] + f[o] + g[o] + h[o]
        for o in range(outputs):
            sums[o] += short[o]
