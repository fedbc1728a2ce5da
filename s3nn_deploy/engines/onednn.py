"""oneDNN's 8-bit integer convolutions, through PyTorch: unsigned signals, signed weights, 32-bit sums.

A neuron fires where `u - threshold + 1 >= 1`, so spikes are `clip(W s + (1 - threshold), 0, 1)`, which the kernel does
with a bias and a post-operation. The sum passes through float32, exact under 2^24 (`Layer.bound`).

Processors without VNNI add products in pairs that saturate in 16 bits. Spikes cannot saturate them (2 * 128), and input
of 8 bits is split into two parts of at most 128, whose pairs lie in -2 * 128 * 128 .. 2 * 128 * 127: exact on any
instruction set, without having to know it.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from s3nn_deploy.engines.layers import Afferent, Layer, Signals, Step, identity
from s3nn_deploy.errors import DeployError
from s3nn_deploy.intnet import EXACT_FLOAT32, Conv2d

try:
    from s3nn_deploy.engines.events import add_on_one_core as add
except ImportError:  # numba is not installed
    from s3nn_deploy.engines.counting import add

__all__ = ["add", "prepare"]

SPLIT = 127
"""The largest source value of which a pair of products with 8-bit weights fits 16 bits."""

Convolution = Callable[..., torch.Tensor]


def prepare(layer: Layer) -> Step | None:
    """The layer's step, or None: weights or inputs of more than 8 bits, sums beyond float32, or a shape that the kernels
    get wrong.

    Raises:
        DeployError: this PyTorch has no oneDNN.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.onednn, "qconv_pointwise"):
        raise DeployError(
            "engine 'onednn'",
            f"this PyTorch ({torch.__version__}) has no oneDNN for 8-bit integers",
            hint="Use --engine numpy or numba.",
        )
    if layer.or_pool:
        return _pool(layer)
    if layer.bound >= EXACT_FLOAT32 or not all(map(_expressible, layer.afferents)):
        return None
    if layer.threshold is None:
        return partial(_readout, layer, _potentials(layer, np.zeros(layer.grid[2])))
    above = 1 - layer.threshold
    if len(layer.afferents) == 1:
        (afferent,) = layer.afferents
        fire = _convolution(afferent, above, torch.uint8)
        return lambda signals, spikes: _put(fire(_tensor(afferent, signals)), spikes)
    joined = identity(layer.afferents)
    if joined is not None and len(np.unique(joined[1].conv.weight)) == 1:
        afferent, other = joined
        fire = _convolution(afferent, above, torch.uint8, accumulate=float(other.conv.weight.flat[0]))
        return partial(_fire_with_identity, fire, afferent, other)
    return partial(_fire, _potentials(layer, above))


def _expressible(afferent: Afferent) -> bool:
    """Whether the kernels take the afferent, and are right for any batch.

    PyTorch 2.13's (oneDNN 3.12) read beyond their input where a window lies in the padding alone, and some give wrong
    sums, for some batches, where a group has one channel and is not a depthwise convolution.
    """
    conv = afferent.conv
    sizes = zip(conv.padding, conv.dilation, conv.weight.shape[2:], strict=True)
    inside = all(padding <= dilation * (kernel - 1) for padding, dilation, kernel in sizes)
    several = conv.weight.shape[1] > 1 or conv.groups == 1 or conv.groups == len(conv.weight)
    return afferent.maximum <= 255 and conv.weight.dtype == np.int8 and inside and several


def _parts(afferent: Afferent) -> bool:
    """Whether the source's channels are split into two parts: values above `SPLIT`, or a channel alone."""
    return afferent.maximum > SPLIT or afferent.grid[2] == 1


def _fire(potentials: Callable[[Signals], torch.Tensor], signals: Signals, spikes: NDArray[np.uint8]) -> None:
    _put(torch.gt(potentials(signals), 0).view(torch.uint8), spikes)


def _fire_with_identity(
    fire: Convolution, afferent: Afferent, other: Afferent, signals: Signals, spikes: NDArray[np.uint8]
) -> None:
    """`fire` adds to the spikes of the identity in place of them: below 0 saturates to 0, above 1 is clipped."""
    np.minimum(_array(fire(_tensor(afferent, signals), _tensor(other, signals).clone())), 1, out=spikes)


def _readout(
    layer: Layer, potentials: Callable[[Signals], torch.Tensor], signals: Signals, u: NDArray[np.int64]
) -> None:
    assert layer.bias is not None
    _put(potentials(signals), u)
    u += layer.bias


def _potentials(layer: Layer, bias: NDArray[Any]) -> Callable[[Signals], torch.Tensor]:
    """Membrane potentials plus `bias` in float32, one afferent added after the other."""
    first, *others = layer.afferents
    start = _convolution(first, bias, torch.float32)
    adding = [(a, _convolution(a, np.zeros(len(bias)), torch.float32, accumulate=1.0)) for a in others]

    def potentials(signals: Signals) -> torch.Tensor:
        u = start(_tensor(first, signals))
        for afferent, add in adding:
            u = add(_tensor(afferent, signals), u)
        return u

    return potentials


def _convolution(
    afferent: Afferent, bias: NDArray[Any], dtype: torch.dtype, *, accumulate: float | None = None
) -> Convolution:
    """A function of the source's signals [N, C, H, W] that gives spikes (uint8) or sums (float32).

    Args:
        accumulate: the function takes a second tensor, multiplies it by this and adds to it in place.
    """
    conv = _split(afferent.conv) if _parts(afferent) else afferent.conv
    if conv.weight.shape[2:] == afferent.grid[:2] and conv.padding == (0, 0) and conv.groups == 1:
        rows = conv.weight.transpose(0, 2, 3, 1).reshape(len(conv.weight), -1)
        return _dense(rows, bias, dtype, accumulate is not None)
    ones = torch.ones(len(conv.weight))
    zeros = torch.zeros(len(conv.weight), dtype=torch.int32)
    shape = [conv.stride, conv.padding, conv.dilation, conv.groups]
    weight = torch.ops.onednn.qconv_prepack(torch.tensor(conv.weight), ones, 1.0, 0, *shape, None)
    offset = torch.from_numpy(np.asarray(bias, dtype=np.float32))
    scale = (1.0, 0, dtype)
    clip = ("hardtanh", [0.0, 1.0], "") if dtype == torch.uint8 else ("none", [], "")
    if accumulate is None:
        kernel = torch.ops.onednn.qconv_pointwise.default
        return lambda x: kernel(x, 1.0, 0, weight, ones, zeros, offset, *shape, *scale, *clip)
    add = torch.ops.onednn.qconv2d_pointwise.binary
    post: tuple[Any, ...] = (accumulate, 0, "sum", None, "none", [], "")
    return lambda x, u: add(x, 1.0, 0, weight, ones, zeros, u, offset, *shape, *scale, *post)


def _dense(weight: NDArray[Any], bias: NDArray[Any], dtype: torch.dtype, accumulate: bool) -> Convolution:
    """`_convolution` for a kernel as large as its source, which is one matrix product."""
    outputs = len(weight)
    ones, zeros = torch.ones(outputs), torch.zeros(outputs, dtype=torch.int32)
    packed = torch.ops.onednn.qlinear_prepack(torch.tensor(weight), None)
    offset = torch.from_numpy(np.asarray(bias, dtype=np.float32))
    clip = ("hardtanh", [0.0, 1.0], "") if dtype == torch.uint8 else ("none", [], "")
    kernel = torch.ops.onednn.qlinear_pointwise.default

    def product(x: torch.Tensor) -> torch.Tensor:
        flat = x.permute(0, 2, 3, 1).reshape(len(x), -1)
        return kernel(flat, 1.0, 0, packed, ones, zeros, offset, 1.0, 0, dtype, *clip)[:, :, None, None]

    return (lambda x, u: u.add_(product(x))) if accumulate else product


def _split(conv: Conv2d) -> Conv2d:
    """The convolution over a source whose channels `_tensor` has split into two parts."""
    return replace(conv, weight=np.concatenate([conv.weight, conv.weight], 1))


def _tensor(afferent: Afferent, signals: Signals) -> torch.Tensor:
    """The source's signals as [N, C, H, W] in channels-last order; where it is split, two channels sum to each of its."""
    x = signals[afferent.source]
    if _parts(afferent):
        n, height, width, channels = x.shape
        groups, half = afferent.conv.groups, x >> 1
        parts = np.empty((n, height, width, groups, 2, channels // groups), dtype=np.uint8)
        parts[..., 0, :], parts[..., 1, :] = (a.reshape(*a.shape[:3], groups, -1) for a in (half, x - half))
        x = parts.reshape(n, height, width, 2 * channels)
    return torch.from_numpy(x).permute(0, 3, 1, 2)


def _put(tensor: torch.Tensor, out: NDArray[Any]) -> None:
    """Put [N, C, H, W] into `out` [N, H, W, C]."""
    np.copyto(out, _array(tensor), casting="unsafe")


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    """[N, C, H, W] as [N, H, W, C]; what the kernels give lies so already."""
    return tensor.permute(0, 2, 3, 1).numpy()


def _pool(layer: Layer) -> Step | None:
    """Max pooling, where PyTorch takes its padding."""
    (afferent,) = layer.afferents
    conv = afferent.conv
    kernel = conv.weight.shape[2:]
    if len(conv.weight) != conv.groups or any(2 * p > k for p, k in zip(conv.padding, kernel, strict=True)):
        return None
    arguments = [kernel, conv.stride, conv.padding, conv.dilation, False]
    return lambda signals, spikes: _put(torch.ops.quantized.max_pool2d(_tensor(afferent, signals), *arguments), spikes)
