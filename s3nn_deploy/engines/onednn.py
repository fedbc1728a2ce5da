"""oneDNN's 8-bit integer convolutions, through PyTorch: unsigned signals, signed weights, 32-bit sums.

A neuron fires where `u - threshold + 1 >= 1`, so spikes are `clip(W s + (1 - threshold), 0, 1)`, which the kernel does
with a bias and a post-operation. The sum passes through float32, exact under 2^24 (`Layer.bound`).

Processors without VNNI add products in pairs that saturate in 16 bits. Spikes cannot saturate them (2 * 128), and input
of 8 bits is split into two parts of at most 128, whose pairs lie in -2 * 128 * 128 .. 2 * 128 * 127: exact on any
instruction set, without having to know it.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
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
    if (joined := identity(layer.afferents)) is not None:
        return _fire_with_identity(*joined, above)
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
    torch.gt(potentials(signals), 0, out=_nchw(spikes).view(torch.bool))


def _fire_with_identity(afferent: Afferent, other: Afferent, above: NDArray[np.int64]) -> Step:
    """The step of a layer to which an identity adds the weight `f` of its channel: `v = clip(W s + 1 - threshold + max(f, 0))`
    exceeds `|f|` where the identity holds the neuron back (no spike if `f > 0`, a spike if `f < 0`), and 0 elsewhere."""
    weight = np.tile(other.conv.weight.reshape(-1).astype(np.int16), other.grid[1])
    excite, size = (weight > 0).astype(np.uint8), np.abs(weight).astype(np.uint8)
    values = _convolution(afferent, above + np.maximum(other.conv.weight.reshape(-1), 0), torch.uint8, clip=255)

    def step(signals: Signals, spikes: NDArray[np.uint8]) -> None:
        rows = len(spikes) * other.grid[0]
        held = np.bitwise_xor(signals[other.source].reshape(rows, -1), excite)
        np.multiply(held, size, out=held)
        v = _nhwc(values(_tensor(afferent, signals))).reshape(rows, -1)
        np.greater(v, held, out=spikes.reshape(rows, -1).view(np.bool_))

    return step


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
    adding = [(a, _convolution(a, np.zeros(len(bias)), torch.float32, accumulate=True)) for a in others]

    def potentials(signals: Signals) -> torch.Tensor:
        u = start(_tensor(first, signals))
        for afferent, add in adding:
            u = add(_tensor(afferent, signals), u)
        return u

    return potentials


def _convolution(
    afferent: Afferent, bias: NDArray[Any], dtype: torch.dtype, *, clip: int = 1, accumulate: bool = False
) -> Convolution:
    """A function of the source's signals [N, C, H, W] that gives sums: float32, or uint8 between 0 and `clip`.

    Args:
        accumulate: the function takes a second tensor and adds to it in place.
    """
    conv = _split(afferent.conv) if _parts(afferent) else afferent.conv
    if conv.weight.shape[2:] == afferent.grid[:2] and conv.padding == (0, 0) and conv.groups == 1:
        rows = conv.weight.transpose(0, 2, 3, 1).reshape(len(conv.weight), -1)
        return _dense(rows, bias, dtype, clip, accumulate)
    ones = torch.ones(len(conv.weight))
    zeros = torch.zeros(len(conv.weight), dtype=torch.int32)
    shape = [conv.stride, conv.padding, conv.dilation, conv.groups]
    offset = torch.from_numpy(np.asarray(bias, dtype=np.float32))
    scale = (1.0, 0, dtype)

    @lru_cache(maxsize=2)
    def packed(power: int) -> torch.Tensor:
        """The weights, laid out for a batch of about 2^power: laid out otherwise, each call would do it again."""
        source = [1 << power, conv.groups * conv.weight.shape[1], *afferent.grid[:2]]
        return torch.ops.onednn.qconv_prepack(torch.tensor(conv.weight), ones, 1.0, 0, *shape, source)

    def weight(x: torch.Tensor) -> torch.Tensor:
        return packed(len(x).bit_length() - 1)

    if not accumulate:
        kernel, post = torch.ops.onednn.qconv_pointwise.default, _clip(dtype, clip)
        return lambda x: kernel(x, 1.0, 0, weight(x), ones, zeros, offset, *shape, *scale, *post)
    add = torch.ops.onednn.qconv2d_pointwise.binary
    post = (1.0, 0, "sum", None, "none", [], "")
    return lambda x, u: add(x, 1.0, 0, weight(x), ones, zeros, u, offset, *shape, *scale, *post)


def _clip(dtype: torch.dtype, most: int) -> tuple[Any, ...]:
    """The operation after a sum; conversion to 8 bits clips to 0..255 by itself."""
    return ("hardtanh", [0.0, float(most)], "") if dtype == torch.uint8 and most < 255 else ("none", [], "")


def _dense(weight: NDArray[Any], bias: NDArray[Any], dtype: torch.dtype, clip: int, accumulate: bool) -> Convolution:
    """`_convolution` for a kernel as large as its source, which is one matrix product."""
    outputs = len(weight)
    ones, zeros = torch.ones(outputs), torch.zeros(outputs, dtype=torch.int32)
    packed = torch.ops.onednn.qlinear_prepack(torch.tensor(weight), None)
    offset = torch.from_numpy(np.asarray(bias, dtype=np.float32))
    kernel, post = torch.ops.onednn.qlinear_pointwise.default, _clip(dtype, clip)

    def product(x: torch.Tensor) -> torch.Tensor:
        flat = x.permute(0, 2, 3, 1).reshape(len(x), -1)
        return kernel(flat, 1.0, 0, packed, ones, zeros, offset, 1.0, 0, dtype, *post)[:, :, None, None]

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
    return _nchw(x)


def _nchw(array: NDArray[Any]) -> torch.Tensor:
    """[N, H, W, C] as [N, C, H, W], in channels-last order."""
    return torch.from_numpy(array).permute(0, 3, 1, 2)


def _put(tensor: torch.Tensor, out: NDArray[Any]) -> None:
    """Put [N, C, H, W] into `out` [N, H, W, C]."""
    np.copyto(out, _nhwc(tensor), casting="unsafe")


def _nhwc(tensor: torch.Tensor) -> NDArray[Any]:
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
