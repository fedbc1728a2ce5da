"""The networks of the speed benchmark: random weights of 8 bits, thresholds at which a given share of the neurons fires."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from s3nn_deploy.engines import blas
from s3nn_deploy.engines.layers import apply, channels_last, layers
from s3nn_deploy.intnet import INPUT, Conv2d, Dense, Input, IntNet, Population, Projection, check

SAMPLES = 8
"""Random images on which thresholds are set."""


def mlp() -> Iterator[Population]:
    """784-512-512-10."""
    rng = np.random.default_rng(0)
    yield _dense(rng, "fc1", INPUT, 784, 512)
    yield _dense(rng, "fc2", "fc1", 512, 512)
    yield _dense(rng, "readout", "fc2", 512, 10)


def lenet() -> Iterator[Population]:
    """28x28: c32 - p - c64 - p - fc128 - fc10, kernels of 3x3."""
    rng = np.random.default_rng(1)
    yield _conv(rng, "conv1", (INPUT, 1), 32, 28)
    yield _pool("pool1", "conv1", 32, 14)
    yield _conv(rng, "conv2", ("pool1", 32), 64, 14)
    yield _pool("pool2", "conv2", 64, 7)
    yield _dense(rng, "fc1", "pool2", 64 * 49, 128)
    yield _dense(rng, "readout", "fc1", 128, 10)


def resnet18() -> Iterator[Population]:
    """32x32x3: 64-128-256-512, 8 blocks; skips add to the membrane by identity times 100, or a 1x1 of stride 2; OR-pool."""
    rng = np.random.default_rng(2)
    yield _conv(rng, "stem", (INPUT, 3), 64, 32)
    source, channels, side = "stem", 64, 32
    for index, out in enumerate((64, 64, 128, 128, 256, 256, 512, 512)):
        stride = 1 if out == channels else 2
        yield _conv(rng, f"a{index}", (source, channels), out, side, stride)
        side //= stride
        if stride == 1:
            skip = Conv2d(np.full((out, 1, 1, 1), 100), groups=out)
        else:
            skip = Conv2d(_weights(rng, (out, channels, 1, 1)), stride=(2, 2))
        joined = _conv(rng, f"b{index}", (f"a{index}", out), out, side)
        yield replace(joined, projections=(*joined.projections, Projection(source, skip)))
        source, channels = f"b{index}", out
    yield _pool("pool", source, 512, 1, 4)
    yield _dense(rng, "readout", "pool", 512, 10)


NETS = {"mlp": (mlp, Input((784,))), "lenet": (lenet, Input((1, 28, 28))), "resnet18": (resnet18, Input((3, 32, 32)))}


def build(name: str, firing: float = 0.15) -> IntNet:
    """A network of `NETS` in which about `firing` of each population's neurons fire, pools apart."""
    populations, spec = NETS[name]
    net = check(IntNet(spec, tuple(populations())))
    signals, thresholds = {INPUT: channels_last(inputs(spec, SAMPLES, 1))}, []
    for population, layer in zip(net.populations, layers(net), strict=True):
        if not population.spiking or population.name.startswith("pool"):
            signals[layer.name] = apply(layer, blas.prepare(layer), signals)
            thresholds.append(population.threshold)
            continue
        potentials = replace(layer, threshold=None, bias=np.zeros(population.channels, np.int64))
        u = apply(potentials, blas.prepare(potentials), signals)
        theta = np.floor(np.quantile(u, 1 - firing, axis=(0, 1, 2))) + 1
        signals[layer.name] = (u >= theta).astype(np.uint8)
        thresholds.append(theta)
    made = zip(net.populations, thresholds, strict=True)
    return check(replace(net, populations=tuple(replace(p, threshold=theta) for p, theta in made)))


def inputs(spec: Input, samples: int, seed: int = 0) -> np.ndarray:
    """Random images of `spec`: blurred in no way, half of the pixels zero."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, spec.maximum + 1, (samples, *spec.shape))
    return (x * rng.integers(0, 2, x.shape)).astype(np.uint8)


def _weights(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.clip(np.rint(rng.normal(0, 43, shape)), -128, 127)


def _conv(
    rng: np.random.Generator, name: str, source: tuple[str, int], out: int, side: int, stride: int = 1
) -> Population:
    synapses = Conv2d(_weights(rng, (out, source[1], 3, 3)), stride=(stride, stride), padding=(1, 1))
    side //= stride
    return Population(name, (out, side, side), (Projection(source[0], synapses),), threshold=np.zeros(out))


def _pool(name: str, source: str, channels: int, side: int, by: int = 2) -> Population:
    synapses = Conv2d(np.ones((channels, 1, by, by)), stride=(by, by), groups=channels)
    return Population(name, (channels, side, side), (Projection(source, synapses),), threshold=np.ones(channels))


def _dense(rng: np.random.Generator, name: str, source: str, inputs: int, outputs: int) -> Population:
    neurons = {"bias": rng.integers(-500, 500, outputs)} if name == "readout" else {"threshold": np.zeros(outputs)}
    return Population(name, (outputs,), (Projection(source, Dense(_weights(rng, (outputs, inputs)))),), **neurons)
