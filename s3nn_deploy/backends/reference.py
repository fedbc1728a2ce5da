"""The meaning of a network: int64, one short function a case, no options, no speed. Every other engine is held to it."""

import math
from pathlib import Path
from typing import Any, assert_never

import numpy as np
from numpy.typing import NDArray

from s3nn_deploy.intnet import INPUT, Conv2d, Dense, IntNet, Synapses
from s3nn_deploy.trace import Trace, checked_input


def run(net: IntNet, x: Any, file: Path | None = None) -> Trace:
    """Run `net` on `x`, integers [N, *input shape]; `file` is not needed.

    Raises:
        DeployError: `x` has another shape, dtype or range than the network's input.
    """
    signals = {INPUT: checked_input(net, x).astype(np.int64)}
    for population in net.populations:
        u = sum(potential(p.synapses, signals[p.source]) for p in population.projections)
        if population.threshold is not None:
            signals[population.name] = (u >= population.per_neuron(population.threshold.astype(np.int64))).astype(
                np.int64
            )
        elif population.bias is not None:
            readout = u + population.per_neuron(population.bias.astype(np.int64))
    spikes = {p.name: signals[p.name].astype(bool) for p in net.spiking}
    return Trace(spikes, readout.reshape(len(x), net.readout.size), net.scale, "reference")


def potential(synapses: Synapses, s: NDArray[np.int64]) -> NDArray[np.int64]:
    """What the `synapses` add to the membrane potential, int64 [N, *shape], for source values `s` [N, *source shape]."""
    match synapses:
        case Dense(weight=weight):
            return s.reshape(len(s), math.prod(s.shape[1:])) @ weight.astype(np.int64).T
        case Conv2d():
            return _conv2d(synapses, s)
        case _:
            assert_never(synapses)


def _conv2d(conv: Conv2d, s: NDArray[np.int64]) -> NDArray[np.int64]:
    channels, height, width = conv.out_shape(s.shape[1:])
    weight = conv.weight.astype(np.int64)
    per_group = weight.shape[1]
    (ph, pw), (sh, sw), (dh, dw) = conv.padding, conv.stride, conv.dilation
    padded = np.pad(s, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    u = np.zeros((len(s), channels, height, width), dtype=np.int64)
    for out in range(channels):
        first = out // (channels // conv.groups) * per_group
        for (i, ky, kx), w in np.ndenumerate(weight[out]):
            window = padded[:, first + i, ky * dh :, kx * dw :]
            u[:, out] += w * window[:, : sh * height : sh, : sw * width : sw]
    return u
