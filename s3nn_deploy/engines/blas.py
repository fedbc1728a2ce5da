"""The NumPy engine: needs nothing else, and is bit-exact by bound.

A slab's source values are gathered as float32 columns and multiplied by BLAS: every partial sum is an integer below
2^24 (`intnet.worst_case`), so the sum is exact in any order; else float64 below 2^53, else int64 without BLAS. 3x3
convolutions of spikes take Winograd's way where that has a proof, too (`winograd`) and there are enough tiles.
Thresholds are clamped to the reachable range first, so that they are exact in the same type.
"""

import math
import threading
from collections.abc import Iterator
from functools import cached_property, partial, reduce
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from s3nn_deploy.engines import winograd
from s3nn_deploy.engines.layers import Afferent, Layer, Signals, Step, exact_dtype
from s3nn_deploy.intnet import EXACT_FLOAT32, Conv2d

SLAB = 4 << 20
"""Bytes of gathered columns, or of membrane potentials, at a time; larger slabs leave the cache."""

MANY = 64
"""Tiles of 2x2 outputs below which Winograd's larger weights cost more to read than they save."""

ALIGNED = 16
"""Values after which a vector of the processor's starts."""

SHORT = 16
"""Source values in one row of a kernel below which gathering takes another order (measured: 7 times faster at 3)."""

Grid = tuple[int, int, int]


def prepare(layer: Layer) -> Step:
    """The layer's step; there is none that this engine cannot express."""
    if layer.or_pool:
        return partial(or_pool, layer)
    potentials = _Potentials(layer)
    if layer.threshold is None:
        return partial(_readout, potentials)
    # a row of thresholds: longer inner loops than per channel
    return partial(_spikes, potentials, np.tile(layer.threshold, layer.grid[1]).astype(potentials.dtype))


def _spikes(potentials: "_Potentials", theta: NDArray[Any], signals: Signals, spikes: NDArray[np.uint8]) -> None:
    _, width, channels = potentials.layer.grid
    for images, rows, u in potentials.slabs(signals):
        fires = spikes[images, rows].reshape(-1, width * channels).view(np.bool_)
        np.greater_equal(u.reshape(-1, width * channels), theta, out=fires)


def _readout(potentials: "_Potentials", signals: Signals, u: NDArray[np.int64]) -> None:
    for images, rows, some in potentials.slabs(signals):
        u[images, rows] = some
    assert potentials.layer.bias is not None
    u += potentials.layer.bias


class _Gathered:
    """An afferent as one matrix product a group: what each target neuron sees is gathered into columns.

    Attributes:
        weight: [groups, inputs, outputs], inputs in the order kh, kw, C.
    """

    def __init__(self, afferent: Afferent, grid: Grid, dtype: Any) -> None:
        self.conv = conv = afferent.conv
        out, per_group, kh, kw = conv.weight.shape
        weight = conv.weight.reshape(conv.groups, out // conv.groups, per_group, kh, kw)
        rows = weight.transpose(0, 3, 4, 2, 1).reshape(conv.groups, -1, out // conv.groups)
        self.weight = np.ascontiguousarray(rows, dtype=dtype)
        self.row = conv.groups * self.weight.shape[1] * grid[1]

    def room(self, rows: int) -> int:
        """Values to work in, for `rows` target rows of an image."""
        return rows * self.row

    def see(self, source: NDArray[Any]) -> NDArray[Any]:
        """What `drive` takes, of whole images."""
        return _windows(self.conv, source)

    def drive(self, seen: NDArray[Any], rows: slice, room: NDArray[Any], out: NDArray[Any]) -> None:
        """Put what the afferent adds to the membrane potentials of some target rows into `out` [N, rows, W, C]."""
        windows = seen[:, rows]
        n, height, width, kh = windows.shape[:4]
        groups, inputs, outputs = self.weight.shape
        positions = n * height * width
        by_group = np.moveaxis(windows.reshape(*windows.shape[:-1], groups, -1), -2, 0)
        columns = room[: groups * positions * inputs]
        if inputs < SHORT * kh:  # copy along the image where a row of the kernel is too short
            along = by_group.transpose(0, 4, 5, 6, 1, 2, 3)
            np.copyto(columns.reshape(along.shape), along)
            columns = columns.reshape(groups, inputs, positions).transpose(0, 2, 1)
        else:
            np.copyto(columns.reshape(by_group.shape), by_group)
            columns = columns.reshape(groups, positions, inputs)
        if groups == 1:
            np.matmul(columns[0], self.weight[0], out=out.reshape(positions, outputs))
        else:
            out.reshape(positions, groups, outputs)[...] = np.matmul(columns, self.weight).transpose(1, 0, 2)


class _Apart:
    """`_Gathered` where each source channel has synapses of its own (depthwise): no sums over channels, no product."""

    def __init__(self, afferent: Afferent, dtype: Any) -> None:
        self.conv = conv = afferent.conv
        weight = conv.weight.reshape(conv.groups, -1, *conv.weight.shape[2:]).transpose(2, 3, 0, 1)
        self.weight = np.ascontiguousarray(weight, dtype=dtype)

    def room(self, rows: int) -> int:
        return 0

    def see(self, source: NDArray[Any]) -> NDArray[Any]:
        return _windows(self.conv, source)

    def drive(self, seen: NDArray[Any], rows: slice, room: NDArray[Any], out: NDArray[Any]) -> None:
        windows = seen[:, rows, ..., None]
        by_source = out.reshape(*windows.shape[:3], self.weight.shape[2], -1)
        np.multiply(windows[:, :, :, 0, 0], self.weight[0, 0], out=by_source)
        for ky, kx in list(np.ndindex(self.weight.shape[:2]))[1:]:
            by_source += windows[:, :, :, ky, kx] * self.weight[ky, kx]


class _Winograd:
    """`_Gathered` with fewer multiplications (see `winograd`), for an even number of rows, or the last ones."""

    def __init__(self, afferent: Afferent, grid: Grid, quadruple: NDArray[np.int64]) -> None:
        self.padding, self.grid = afferent.conv.padding, grid
        self.weight = (quadruple / 4).astype(np.float32).reshape(16, *quadruple.shape[2:])

    def room(self, rows: int) -> int:
        return 16 * -(-rows // 2) * -(-self.grid[1] // 2) * sum(self.weight.shape[1:])

    def see(self, source: NDArray[Any]) -> NDArray[Any]:
        return winograd.by_parity(source, self.padding, self.grid)

    def drive(self, seen: NDArray[Any], rows: slice, room: NDArray[Any], out: NDArray[Any]) -> None:
        winograd.drive(seen[:, rows.start : rows.stop + rows.stop % 2 + 2], self.weight, room, out)


Way = _Gathered | _Apart | _Winograd


class _Potentials:
    """The membrane potentials of a layer, slab by slab, in the type that its sums are exact in.

    Attributes:
        few: the way of each afferent for fewer than `MANY` tiles.
    """

    def __init__(self, layer: Layer) -> None:
        self.layer, self.dtype = layer, exact_dtype(layer.bound)
        self.few: list[Way] = []
        for afferent in layer.afferents:
            apart = afferent.conv.weight.shape[1] == 1 < afferent.conv.groups
            self.few.append(_Apart(afferent, self.dtype) if apart else _Gathered(afferent, layer.grid, self.dtype))

    @cached_property
    def many(self) -> list[Way]:
        """The ways for `MANY` tiles and more."""
        ways, bound = list(self.few), 4 * self.layer.bound
        for index, afferent in enumerate(self.layer.afferents if bound < EXACT_FLOAT32 else ()):
            if afferent.maximum == 1 and winograd.pays(afferent.conv, self.layer.grid):
                quadruple = winograd.weights(afferent.conv)
                bound += winograd.bound(quadruple)
                ways[index] = _Winograd(afferent, self.layer.grid, quadruple)
        return ways if bound < EXACT_FLOAT32 else self.few

    def slabs(self, signals: Signals) -> Iterator[tuple[slice, slice, NDArray[Any]]]:
        """Potentials [samples, rows, W, C] of whole samples, or of rows of one; each slab overwrites the last."""
        sources = [afferent.source for afferent in self.layer.afferents]
        samples, (height, width, channels) = len(signals[sources[0]]), self.layer.grid
        ways = self.many if samples * height * width >= 4 * MANY else self.few
        row = max(width * channels, *(way.room(2) // 2 for way in ways))
        at_once = max(1, SLAB // (row * np.dtype(self.dtype).itemsize))
        n_rows, n_images = min(height, max(2, at_once // 2 * 2)), max(1, min(samples, at_once // height))
        values = -(-n_images * n_rows * width * channels // ALIGNED) * ALIGNED
        memory = _scratch(2 * values + n_images * max(way.room(n_rows) for way in ways), self.dtype)
        u, product, room = memory[:values], memory[values : 2 * values], memory[2 * values :]
        for start in range(0, samples, n_images):
            images = slice(start, min(samples, start + n_images))
            seen = [way.see(signals[source][images]) for way, source in zip(ways, sources, strict=True)]
            for top in range(0, height, n_rows):
                rows = slice(top, min(height, top + n_rows))
                shape = (images.stop - start, rows.stop - top, width, channels)
                total, part = (a[: math.prod(shape)].reshape(shape) for a in (u, product))
                for index, (way, view) in enumerate(zip(ways, seen, strict=True)):
                    way.drive(view, rows, room, part if index else total)
                    if index:
                        total += part
                yield images, rows, total


_kept = threading.local()


def _scratch(values: int, dtype: Any) -> NDArray[Any]:
    """Memory of this thread's own, kept for its next slabs: its pages need not be made again."""
    size = values * np.dtype(dtype).itemsize
    memory: NDArray[np.uint8] | None = getattr(_kept, "memory", None)
    if memory is None or len(memory) < size:
        memory = _kept.memory = np.empty(size, dtype=np.uint8)
    return memory[:size].view(dtype)


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


def or_pool(layer: Layer, signals: Signals, out: NDArray[np.uint8]) -> None:
    """The OR of each window of spikes, rows first and then columns."""
    (afferent,) = layer.afferents
    conv, source = afferent.conv, signals[afferent.source]
    (kh, kw), (sh, sw), (dh, dw) = conv.weight.shape[2:], conv.stride, conv.dilation
    block = max(1, SLAB // math.prod(source.shape[1:]))
    for start in range(0, len(source), block):
        padded, (_, height, width, _) = _padded(conv, source[start : start + block]), out.shape
        rows = reduce(np.bitwise_or, (padded[:, k : k + sh * height : sh][:, :height] for k in range(0, kh * dh, dh)))
        columns = (rows[:, :, k : k + sw * width : sw][:, :, :width] for k in range(0, kw * dw, dw))
        out[start : start + block] = reduce(np.bitwise_or, columns)
