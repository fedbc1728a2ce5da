"""The fast engine: NumPy and BLAS, bit-exact by bound, with an exact count of every event.

Populations are computed one after the other over all samples, in slabs that stay in the cache. Inside, signals are
unsigned integers [N, H, W, C], a flat population is 1 x 1 x C, and dense synapses are a convolution whose kernel is as
large as its source. A slab's source values are gathered as float32 columns and multiplied by BLAS: every partial sum is
an integer below 2^24 (`intnet.worst_case`), so the sum is exact in any order; else float64 below 2^53, else int64
without BLAS. Thresholds are clamped to the reachable range first, so that they are exact in the same type.

A spike causes as many synaptic operations as its neuron has synapses, so a count is the dot product of spikes and a
fan-out map, under the same kind of bound.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, reduce
from pathlib import Path
from typing import Any, assert_never

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from s3nn_deploy.counts import KINDS, Counts
from s3nn_deploy.formats import npz
from s3nn_deploy.intnet import (
    EXACT_FLOAT32,
    INPUT,
    Conv2d,
    Dense,
    IntNet,
    Population,
    Projection,
    clamp_thresholds,
    consumers,
    signed_bits,
    worst_case,
)
from s3nn_deploy.trace import Trace, checked_input

SLAB = 4 << 20
"""Bytes of gathered columns, or of membrane potentials, at a time; larger slabs leave the cache."""

SHORT = 16
"""Source values in one row of a kernel below which gathering takes another order (measured: 7 times faster at 3)."""

EXACT_FLOAT64 = 1 << 53
"""Sums of integers are exact in float64, in any order, while every partial sum stays below this."""

Signals = Mapping[str, NDArray[np.unsignedinteger[Any]]]


def run(net: IntNet, x: Any, file: Path | None = None) -> Trace:
    """Run `net`, or the network in `file` (.npz), on `x`, integers [N, *input shape]; the trace has exact counts.

    Raises:
        DeployError: `x` has another shape, dtype or range than the network's input, or `file` is not a valid network.
    """
    net = net if file is None else npz.read(file)
    x = checked_input(net, x)
    layers, tallies = _prepare(net)
    height, width, channels = _grid(net.input.shape)
    signals = {INPUT: np.ascontiguousarray(x.reshape(len(x), channels, height, width).transpose(0, 2, 3, 1))}
    for layer in layers:
        if layer.population.spiking:
            signals[layer.population.name] = _spikes(layer, signals)
    readout = _readout(layers[-1], signals)
    spikes = {p.name: _channels_first(signals[p.name], p.shape).view(np.bool_) for p in net.spiking}
    return Trace(spikes, readout, net.scale, "emulator", _count(net, tallies, signals))


@dataclass(frozen=True, eq=False)
class _Afferent:
    """One projection laid out for the engine.

    Attributes:
        weight: [groups, inputs, outputs], inputs in the order kh, kw, C; or, where each source channel has synapses of
            its own (`per_channel`), [kh, kw, C, outputs].
    """

    source: str
    conv: Conv2d
    per_channel: bool
    weight: NDArray[Any]


@dataclass(frozen=True, eq=False)
class _Layer:
    """A population with its thresholds clamped, the type that its sums are exact in, and its projections.

    Attributes:
        theta: [W * C], a row of thresholds in that type: longer inner loops than per channel.
        or_pool: one spike in a neuron's window is necessary and sufficient for it to fire.
    """

    population: Population
    grid: tuple[int, int, int]
    dtype: Any
    afferents: tuple[_Afferent, ...]
    theta: NDArray[Any]
    or_pool: bool


@dataclass(frozen=True, eq=False)
class _Tally:
    """What one spike of each neuron of `source` causes: two fan-outs for each efferent projection, of all its synapses
    and of those whose weight is not zero.

    Attributes:
        least: [fan-outs], the smallest fan-out of any neuron.
        rest: [H, W * C, varying], what each neuron has beyond it, for the `varying` fan-outs (borders and weights of
            zero make them vary), in a type in which the sum over a row is exact.
        efferents: for each projection from the source: target population, stored weight bits, synapses in all.
    """

    source: str
    least: NDArray[np.int64]
    rest: NDArray[Any]
    varying: NDArray[np.intp]
    efferents: tuple[tuple[str, int, int], ...]


@lru_cache(maxsize=2)
def _prepare(net: IntNet) -> tuple[tuple[_Layer, ...], tuple[_Tally, ...]]:
    layers = []
    for population in clamp_thresholds(net).populations:
        dtype, grid = _exact_dtype(worst_case(net, population)), _grid(population.shape)
        afferents = tuple(_afferent(net, p, dtype) for p in population.projections)
        theta = np.tile(0 if population.threshold is None else population.threshold, grid[1]).astype(dtype)
        layers.append(_Layer(population, grid, dtype, afferents, theta, _is_or_pool(net, population)))
    sources = {INPUT: net.input.shape, **{p.name: p.shape for p in net.spiking}}
    return tuple(layers), tuple(_tally(net, name, _grid(shape)) for name, shape in sources.items())


def _grid(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """The shape (C, H, W) or (N,) as (H, W, C)."""
    return (shape[1], shape[2], shape[0]) if len(shape) == 3 else (1, 1, shape[0])


def _channels_first(array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """[N, H, W, C] as a view [N, *shape]."""
    return array.transpose(0, 3, 1, 2) if len(shape) == 3 else array[:, 0, 0]


def _exact_dtype(bound: int) -> Any:
    """The fastest type in which sums of integers are exact while no partial sum exceeds `bound` in magnitude."""
    return np.float32 if bound < EXACT_FLOAT32 else np.float64 if bound < EXACT_FLOAT64 else np.int64


def _as_conv(net: IntNet, projection: Projection) -> Conv2d:
    """The projection's synapses as a convolution: dense ones have a kernel as large as the source."""
    match projection.synapses:
        case Conv2d() as conv:
            return conv
        case Dense(weight=weight):
            height, width, channels = _grid(net.source(projection).shape)
            return Conv2d(weight.reshape(-1, channels, height, width))
        case _:
            assert_never(projection.synapses)


def _afferent(net: IntNet, projection: Projection, dtype: Any) -> _Afferent:
    conv = _as_conv(net, projection)
    out, per_group, kh, kw = conv.weight.shape
    weight = conv.weight.reshape(conv.groups, out // conv.groups, per_group, kh, kw)
    per_channel = per_group == 1 < conv.groups
    if per_channel:
        weight = weight[:, :, 0].transpose(2, 3, 0, 1)
    else:
        weight = weight.transpose(0, 3, 4, 2, 1).reshape(conv.groups, -1, out // conv.groups)
    return _Afferent(projection.source, conv, per_channel, np.ascontiguousarray(weight, dtype=dtype))


def _is_or_pool(net: IntNet, population: Population) -> bool:
    projection, theta = population.projections[0], population.threshold
    conv, graded = projection.synapses, projection.source == INPUT and net.input.bits > 1
    if theta is None or graded or len(population.projections) > 1 or not isinstance(conv, Conv2d):
        return False
    alone = conv.weight.shape[:2] == (conv.groups, 1)
    return alone and bool(np.all(theta >= 1) and np.all(conv.weight >= theta[:, None, None, None]))


def _spikes(layer: _Layer, signals: Signals) -> NDArray[np.uint8]:
    """The spikes of a population, uint8 [N, H, W, C]."""
    _, width, channels = layer.grid
    spikes = np.empty((len(signals[INPUT]), *layer.grid), dtype=np.uint8)
    if layer.or_pool:
        (afferent,) = layer.afferents
        _any_in_window(afferent.conv, signals[afferent.source], spikes)
        return spikes
    for images, rows, u in _slabs(layer, signals):
        fires = spikes[images, rows].reshape(-1, width * channels).view(np.bool_)
        np.greater_equal(u.reshape(-1, width * channels), layer.theta, out=fires)
    return spikes


def _readout(layer: _Layer, signals: Signals) -> NDArray[np.int64]:
    """`u + bias` of the last population, int64 [N, size]."""
    u = np.empty((len(signals[INPUT]), *layer.grid), dtype=np.int64)
    for images, rows, potentials in _slabs(layer, signals):
        u[images, rows] = potentials
    assert layer.population.bias is not None
    u += layer.population.bias
    return _channels_first(u, layer.population.shape).reshape(len(u), layer.population.size)


def _slabs(layer: _Layer, signals: Signals) -> Iterator[tuple[slice, slice, NDArray[Any]]]:
    """Membrane potentials [samples, rows, W, C] of whole samples, or of rows of one; each slab overwrites the last."""
    samples, (height, width, channels) = len(signals[INPUT]), layer.grid
    columns = max((math.prod(a.weight.shape[:2]) for a in layer.afferents if not a.per_channel), default=0)
    at_once = max(1, SLAB // (width * max(channels, columns) * np.dtype(layer.dtype).itemsize))
    n_rows, n_images = min(height, at_once), max(1, min(samples, at_once // height))
    u, product = (np.empty(n_images * n_rows * width * channels, layer.dtype) for _ in range(2))
    gathered = np.empty(n_images * n_rows * width * columns, layer.dtype)
    for start in range(0, samples, n_images):
        images = slice(start, min(samples, start + n_images))
        windows = [_windows(a.conv, signals[a.source][images]) for a in layer.afferents]
        for top in range(0, height, n_rows):
            rows = slice(top, min(height, top + n_rows))
            shape = (images.stop - start, rows.stop - top, width, channels)
            total, part = (a[: math.prod(shape)].reshape(shape) for a in (u, product))
            for index, (afferent, window) in enumerate(zip(layer.afferents, windows, strict=True)):
                _drive(afferent, window[:, rows], gathered, part if index else total)
                if index:
                    total += part
            yield images, rows, total


def _windows(conv: Conv2d, source: NDArray[Any]) -> NDArray[Any]:
    """What each target position sees, as a view [N, H, W, kh, kw, C] of the zero-padded source."""
    (kh, kw), (sh, sw), (dh, dw) = conv.weight.shape[2:], conv.stride, conv.dilation
    view = sliding_window_view(_padded(conv, source), ((kh - 1) * dh + 1, (kw - 1) * dw + 1), axis=(1, 2))
    return view[:, ::sh, ::sw, :, ::dh, ::dw].transpose(0, 1, 2, 4, 5, 3)


def _padded(conv: Conv2d, source: NDArray[Any]) -> NDArray[Any]:
    (ph, pw), (n, height, width, channels) = conv.padding, source.shape
    if ph == pw == 0:
        return source
    padded = np.zeros((n, height + 2 * ph, width + 2 * pw, channels), dtype=source.dtype)
    padded[:, ph : ph + height, pw : pw + width] = source
    return padded


def _drive(afferent: _Afferent, windows: NDArray[Any], gathered: NDArray[Any], out: NDArray[Any]) -> None:
    """Put what one projection adds to the membrane potentials into `out` [N, H, W, C]."""
    n, height, width, kh, kw, _ = windows.shape
    weight, positions = afferent.weight, n * height * width
    if afferent.per_channel:
        by_source = out.reshape(n, height, width, weight.shape[2], -1)
        np.multiply(windows[:, :, :, 0, 0, :, None], weight[0, 0], out=by_source)
        for ky, kx in list(np.ndindex(kh, kw))[1:]:
            by_source += windows[:, :, :, ky, kx, :, None] * weight[ky, kx]
        return
    groups, inputs, outputs = weight.shape
    by_group = np.moveaxis(windows.reshape(*windows.shape[:-1], groups, -1), -2, 0)
    columns = gathered[: groups * positions * inputs]
    if inputs < SHORT * kh:  # copy along the image where a row of the kernel is too short
        along = by_group.transpose(0, 4, 5, 6, 1, 2, 3)
        np.copyto(columns.reshape(along.shape), along)
        columns = columns.reshape(groups, inputs, positions).transpose(0, 2, 1)
    else:
        np.copyto(columns.reshape(by_group.shape), by_group)
        columns = columns.reshape(groups, positions, inputs)
    if groups == 1:
        np.matmul(columns[0], weight[0], out=out.reshape(positions, outputs))
    else:
        out.reshape(positions, groups, outputs)[...] = np.matmul(columns, weight).transpose(1, 0, 2)


def _any_in_window(conv: Conv2d, source: NDArray[Any], out: NDArray[np.uint8]) -> None:
    """Put the OR of each window of 0/1 `source` into `out` [N, H, W, C], rows first and then columns."""
    (kh, kw), (sh, sw), (dh, dw) = conv.weight.shape[2:], conv.stride, conv.dilation
    block = max(1, SLAB // math.prod(source.shape[1:]))
    for start in range(0, len(source), block):
        padded, (_, height, width, _) = _padded(conv, source[start : start + block]), out.shape
        rows = reduce(np.bitwise_or, (padded[:, k : k + sh * height : sh][:, :height] for k in range(0, kh * dh, dh)))
        columns = (rows[:, :, k : k + sw * width : sw][:, :, :width] for k in range(0, kw * dw, dw))
        out[start : start + block] = reduce(np.bitwise_or, columns)


def _tally(net: IntNet, source: str, grid: tuple[int, int, int]) -> _Tally:
    efferents, maps = [], []
    for population, projection in consumers(net):
        if projection.source == source:
            conv, weight = _as_conv(net, projection), projection.synapses.weight
            counted = np.ones(conv.weight.shape, dtype=bool), conv.weight != 0
            maps += [_fan_out(conv, grid, which) for which in counted]
            bits = signed_bits(int(weight.min()), int(weight.max()))
            efferents.append((population.name, bits, int(maps[-2].sum())))
    fan_outs = np.stack(maps, -1).reshape(grid[0], -1, len(maps)) if maps else np.zeros((grid[0], 1, 0), dtype=np.int64)
    least = fan_outs.min((0, 1))
    varying = np.flatnonzero(fan_outs.max((0, 1)) > least)
    rest = (fan_outs - least)[..., varying]
    bound = int(rest.sum(1).max(initial=0))
    return _Tally(source, least, rest.astype(_exact_dtype(bound)), varying, tuple(efferents))


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


def _count(net: IntNet, tallies: tuple[_Tally, ...], signals: Signals) -> Counts:
    samples = len(signals[INPUT])
    events = {p.name: {kind: np.zeros(samples, dtype=np.int64) for kind in KINDS} for p in net.populations}
    for population in net.populations:
        events[population.name]["neuron_updates"] += population.size
        events[population.name]["membrane_reads"] += population.size
    for tally in tallies:
        graded = tally.source == INPUT and net.input.bits > 1
        signal = signals[tally.source] != 0 if graded else signals[tally.source].view(np.bool_)
        spikes = np.array([np.count_nonzero(sample) for sample in signal], dtype=np.int64)
        if tally.source != INPUT:
            events[tally.source]["spikes"] += spikes
            events[tally.source]["messages"] += spikes * len({target for target, _, _ in tally.efferents})
        caused = spikes * tally.least[:, None]
        caused[tally.varying] += _dot(signal, tally.rest)
        kind = "macs" if graded else "synops"
        for (target, weight_bits, synapses), operations, nonzero in zip(
            tally.efferents, caused[::2], caused[1::2], strict=True
        ):
            count = events[target]
            count[kind] += operations
            count[f"{kind}_nonzero"] += nonzero
            count["dense_macs"] += synapses
            count["weight_bits"] += operations * weight_bits
            count["membrane_reads"] += operations
            count["membrane_writes"] += operations
    return Counts(events)


def _dot(signal: NDArray[np.bool_], maps: NDArray[Any]) -> NDArray[np.int64]:
    """The sum of each of `maps` [H, W * C, M] over the spikes of `signal` [N, H, W, C], exact: int64 [M, N]."""
    sums = np.zeros((len(signal), maps.shape[-1]), dtype=np.int64)
    if maps.size == 0:
        return sums.T
    block = max(1, SLAB // (maps[..., 0].size * maps.itemsize))
    for start in range(0, len(signal), block):
        part = signal[start : start + block]
        spikes = part.reshape(len(part), len(maps), -1).astype(maps.dtype)
        sums[start : start + block] = (spikes.transpose(1, 0, 2) @ maps).astype(np.int64).sum(0)
    return sums.T
