"""The NumPy engine: needs nothing else, and is bit-exact by bound.

A slab's source values are gathered as float32 columns and multiplied by BLAS: every partial sum is an integer below
2^24 (`intnet.worst_case`), so the sum is exact in any order; else float64 below 2^53, else int64 without BLAS.
Thresholds are clamped to the reachable range first, so that they are exact in the same type.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from s3nn_deploy.engines.layers import Afferent, Layer, Signals, Step, exact_dtype
from s3nn_deploy.intnet import Conv2d

SLAB = 4 << 20
"""Bytes of gathered columns, or of membrane potentials, at a time; larger slabs leave the cache."""

SHORT = 16
"""Source values in one row of a kernel below which gathering takes another order (measured: 7 times faster at 3)."""


@dataclass(frozen=True, eq=False)
class _Weights:
    """The weights of an afferent in the type that the layer's sums are exact in.

    Attributes:
        array: [groups, inputs, outputs], inputs in the order kh, kw, C; or, where each source channel has synapses of
            its own (`per_channel`), [kh, kw, C, outputs].
    """

    afferent: Afferent
    per_channel: bool
    array: NDArray[Any]


def prepare(layer: Layer) -> Step:
    """The layer's step; there is none that this engine cannot express."""
    if layer.or_pool:
        return partial(or_pool, layer)
    dtype = exact_dtype(layer.bound)
    weights = [_weights(afferent, dtype) for afferent in layer.afferents]
    if layer.threshold is None:
        return partial(_readout, layer, dtype, weights)
    # a row of thresholds: longer inner loops than per channel
    theta = np.tile(layer.threshold, layer.grid[1]).astype(dtype)
    return partial(_spikes, layer, dtype, weights, theta)


def _weights(afferent: Afferent, dtype: Any) -> _Weights:
    conv = afferent.conv
    out, per_group, kh, kw = conv.weight.shape
    weight = conv.weight.reshape(conv.groups, out // conv.groups, per_group, kh, kw)
    per_channel = per_group == 1 < conv.groups
    if per_channel:
        weight = weight[:, :, 0].transpose(2, 3, 0, 1)
    else:
        weight = weight.transpose(0, 3, 4, 2, 1).reshape(conv.groups, -1, out // conv.groups)
    return _Weights(afferent, per_channel, np.ascontiguousarray(weight, dtype=dtype))


def _spikes(
    layer: Layer, dtype: Any, weights: list[_Weights], theta: NDArray[Any], signals: Signals
) -> NDArray[np.uint8]:
    _, width, channels = layer.grid
    spikes = np.empty((_samples(layer, signals), *layer.grid), dtype=np.uint8)
    for images, rows, u in _slabs(layer, dtype, weights, signals):
        fires = spikes[images, rows].reshape(-1, width * channels).view(np.bool_)
        np.greater_equal(u.reshape(-1, width * channels), theta, out=fires)
    return spikes


def _readout(layer: Layer, dtype: Any, weights: list[_Weights], signals: Signals) -> NDArray[np.int64]:
    u = np.empty((_samples(layer, signals), *layer.grid), dtype=np.int64)
    for images, rows, potentials in _slabs(layer, dtype, weights, signals):
        u[images, rows] = potentials
    assert layer.bias is not None
    u += layer.bias
    return u


def _samples(layer: Layer, signals: Signals) -> int:
    return len(signals[layer.afferents[0].source])


def _slabs(
    layer: Layer, dtype: Any, weights: list[_Weights], signals: Signals
) -> Iterator[tuple[slice, slice, NDArray[Any]]]:
    """Membrane potentials [samples, rows, W, C] of whole samples, or of rows of one; each slab overwrites the last."""
    samples, (height, width, channels) = _samples(layer, signals), layer.grid
    columns = max((math.prod(w.array.shape[:2]) for w in weights if not w.per_channel), default=0)
    at_once = max(1, SLAB // (width * max(channels, columns) * np.dtype(dtype).itemsize))
    n_rows, n_images = min(height, at_once), max(1, min(samples, at_once // height))
    u, product = (np.empty(n_images * n_rows * width * channels, dtype) for _ in range(2))
    gathered = np.empty(n_images * n_rows * width * columns, dtype)
    for start in range(0, samples, n_images):
        images = slice(start, min(samples, start + n_images))
        windows = [_windows(w.afferent.conv, signals[w.afferent.source][images]) for w in weights]
        for top in range(0, height, n_rows):
            rows = slice(top, min(height, top + n_rows))
            shape = (images.stop - start, rows.stop - top, width, channels)
            total, part = (a[: math.prod(shape)].reshape(shape) for a in (u, product))
            for index, (weight, window) in enumerate(zip(weights, windows, strict=True)):
                _drive(weight, window[:, rows], gathered, part if index else total)
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


def _drive(weights: _Weights, windows: NDArray[Any], gathered: NDArray[Any], out: NDArray[Any]) -> None:
    """Put what one projection adds to the membrane potentials into `out` [N, H, W, C]."""
    n, height, width, kh, kw, _ = windows.shape
    weight, positions = weights.array, n * height * width
    if weights.per_channel:
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


def or_pool(layer: Layer, signals: Signals) -> NDArray[np.uint8]:
    """The OR of each window of spikes, rows first and then columns."""
    (afferent,) = layer.afferents
    conv, source = afferent.conv, signals[afferent.source]
    out = np.empty((len(source), *layer.grid), dtype=np.uint8)
    (kh, kw), (sh, sw), (dh, dw) = conv.weight.shape[2:], conv.stride, conv.dilation
    block = max(1, SLAB // math.prod(source.shape[1:]))
    for start in range(0, len(source), block):
        padded, (_, height, width, _) = _padded(conv, source[start : start + block]), out.shape
        rows = reduce(np.bitwise_or, (padded[:, k : k + sh * height : sh][:, :height] for k in range(0, kh * dh, dh)))
        columns = (rows[:, :, k : k + sw * width : sw][:, :, :width] for k in range(0, kw * dw, dw))
        out[start : start + block] = reduce(np.bitwise_or, columns)
    return out
