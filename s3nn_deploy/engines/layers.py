"""An integer network as the engines take it: every projection a convolution, thresholds clamped, bounds at hand."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, assert_never

import numpy as np
from numpy.typing import NDArray

from s3nn_deploy.intnet import (
    EXACT_FLOAT32,
    INPUT,
    Conv2d,
    Dense,
    Input,
    IntNet,
    Population,
    Projection,
    clamp_thresholds,
    worst_case,
)

EXACT_FLOAT64 = 1 << 53
"""Sums of integers are exact in float64, in any order, while every partial sum stays below this."""

Signals = Mapping[str, NDArray[np.unsignedinteger[Any]]]
"""The input and the spikes of the populations so far, [N, H, W, C] each."""

Step = Callable[[Signals, NDArray[Any]], None]
"""What an engine makes of a layer, put into an array [N, H, W, C]: the spikes, uint8, or the readout's `u + bias`, int64."""


@dataclass(frozen=True, eq=False)
class Afferent:
    """One projection as a convolution (dense synapses have a kernel as large as their source).

    Attributes:
        grid: the source's (H, W, C).
        maximum: the largest value of the source: 1 for spikes.
    """

    source: str
    conv: Conv2d
    grid: tuple[int, int, int]
    maximum: int


@dataclass(frozen=True, eq=False)
class Layer:
    """A population with its afferents.

    Attributes:
        grid: (H, W, C).
        bound: no partial sum of its potentials, bias included, has a larger magnitude.
        threshold: int64 [C], clamped to the reachable range; None for the readout.
        bias: int64 [C]; None for spiking populations.
        or_pool: one spike in a neuron's window is necessary and sufficient for it to fire.
        macs: synapses in all, borders included as if the source went on.
    """

    name: str
    grid: tuple[int, int, int]
    bound: int
    afferents: tuple[Afferent, ...]
    threshold: NDArray[np.int64] | None
    bias: NDArray[np.int64] | None
    or_pool: bool
    macs: int


def apply(layer: Layer, step: Step, signals: Signals) -> NDArray[Any]:
    """What a step makes of the layer."""
    samples = len(signals[layer.afferents[0].source])
    made = np.empty((samples, *layer.grid), np.int64 if layer.threshold is None else np.uint8)
    step(signals, made)
    return made


def layers(net: IntNet) -> tuple[Layer, ...]:
    """The populations of `net` in order."""
    made = []
    for population in clamp_thresholds(net).populations:
        afferents = []
        for projection in population.projections:
            source = net.source(projection)
            maximum = source.maximum if isinstance(source, Input) else 1
            afferents.append(Afferent(projection.source, as_conv(net, projection), grid(source.shape), maximum))
        theta, bias = (None if a is None else a.astype(np.int64) for a in (population.threshold, population.bias))
        macs = sum(population.size * a.conv.weight[0].size for a in afferents)
        or_pool = _is_or_pool(net, population)
        bound = worst_case(net, population)
        made.append(Layer(population.name, grid(population.shape), bound, tuple(afferents), theta, bias, or_pool, macs))
    return tuple(made)


def grid(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """The shape (C, H, W) or (N,) as (H, W, C)."""
    return (shape[1], shape[2], shape[0]) if len(shape) == 3 else (1, 1, shape[0])


def channels_first(array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """[N, H, W, C] as a view [N, *shape]."""
    return array.transpose(0, 3, 1, 2) if len(shape) == 3 else array[:, 0, 0]


def channels_last(array: NDArray[Any]) -> NDArray[Any]:
    """[N, C, H, W] or [N, C] as C-ordered [N, H, W, C]."""
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1)) if array.ndim == 4 else array[:, None, None]


def exact_dtype(bound: int) -> Any:
    """The fastest type in which sums of integers are exact while no partial sum exceeds `bound` in magnitude."""
    return np.float32 if bound < EXACT_FLOAT32 else np.float64 if bound < EXACT_FLOAT64 else np.int64


def as_conv(net: IntNet, projection: Projection) -> Conv2d:
    """The projection's synapses as a convolution: dense ones have a kernel as large as the source."""
    match projection.synapses:
        case Conv2d() as conv:
            return conv
        case Dense(weight=weight):
            height, width, channels = grid(net.source(projection).shape)
            return Conv2d(weight.reshape(-1, channels, height, width))
        case _:
            assert_never(projection.synapses)


def identity(afferents: tuple[Afferent, ...]) -> tuple[Afferent, Afferent] | None:
    """Two afferents, the second of which gives each neuron the spike of its own position, times a weight for its channel."""
    for afferent, other in (afferents, afferents[::-1]) if len(afferents) == 2 else ():
        conv = other.conv
        alone = conv.groups == other.grid[2] == len(conv.weight) and conv.weight.shape[1:] == (1, 1, 1)
        if alone and conv.stride == (1, 1) and conv.padding == (0, 0) and other.maximum == 1:
            return afferent, other
    return None


def _is_or_pool(net: IntNet, population: Population) -> bool:
    projection, theta = population.projections[0], population.threshold
    conv, graded = projection.synapses, projection.source == INPUT and net.input.bits > 1
    if theta is None or graded or len(population.projections) > 1 or not isinstance(conv, Conv2d):
        return False
    alone = conv.weight.shape[:2] == (conv.groups, 1)
    return alone and bool(np.all(theta >= 1) and np.all(conv.weight >= theta[:, None, None, None]))
