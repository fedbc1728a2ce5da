"""The shared list of integer networks that every format and every backend must pass, and a maker of random ones."""

from dataclasses import replace

import numpy as np

from s3nn_deploy.backends import reference
from s3nn_deploy.intnet import INPUT, Conv2d, Dense, Input, IntNet, Population, Projection, check


def samples(net: IntNet, n: int = 16, seed: int = 0) -> np.ndarray:
    """Inputs that bite: random, sparse, one-hot, all-zero and all-maximum ones."""
    rng = np.random.default_rng(seed)
    top = net.input.maximum
    x = rng.integers(0, top + 1, (n, *net.input.shape))
    x[1::4] *= rng.random(x[1::4].shape) < 0.1
    x[0], x[-1] = 0, top
    if n > 2:
        x[2] = 0
        x[2].flat[rng.integers(x[2].size)] = top
    return x.astype(np.uint8 if net.input.bits <= 8 else np.uint16)


def with_thresholds(net: IntNet, seed: int = 0) -> IntNet:
    """`net` with each threshold put on a membrane potential that some sample reaches exactly: u == theta does occur."""
    rng = np.random.default_rng(seed)
    x = samples(net, 8, seed)
    for index, population in enumerate(net.populations[:-1]):
        if all(np.all(p.synapses.weight == 1) for p in population.projections):
            continue  # an OR pool keeps its threshold of one
        until = replace(
            net,
            populations=(*net.populations[:index], replace(population, threshold=None, bias=[0] * population.channels)),
        )
        u = reference.run(until, x).readout.reshape(len(x), population.channels, -1)
        theta = [rng.choice(np.unique(u[:, c])) for c in range(population.channels)]
        net = replace(
            net, populations=tuple(replace(p, threshold=theta) if p is population else p for p in net.populations)
        )
    return check(net)


def weights(rng: np.random.Generator, shape: tuple[int, ...], bits: int = 8) -> np.ndarray:
    """Random weights of one of several kinds: full range, ternary, extremes only, mostly zero, all negative."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    kind = rng.integers(5)
    w = rng.integers(low, high + 1, shape)
    if kind == 1:
        w = rng.integers(-1, 2, shape)
    elif kind == 2:
        w = rng.choice([low, high], shape)
    elif kind == 3:
        w *= rng.random(shape) < 0.1
    elif kind == 4:
        w = -np.abs(w) + (np.abs(w) > high)
    w.flat[0] = w.flat[0] or 1
    return w


def random_net(seed: int, *, residual: bool = True, convolutional: bool | None = None, max_side: int = 9) -> IntNet:
    """A small network of random shape: dense or conv, odd sizes, strides, padding, dilation, groups, pooling, joins."""
    rng = np.random.default_rng(seed)
    conv = rng.random() < 0.7 if convolutional is None else convolutional
    bits = int(rng.choice([1, 4, 8]))
    populations: list[Population] = []

    def add(shape: tuple[int, ...], *projections: Projection, threshold: object = None) -> str:
        name = f"layer{len(populations)}"
        theta = np.zeros(shape[0], int) if threshold is None else threshold
        populations.append(Population(name, shape, projections, threshold=theta))
        return name

    shape: tuple[int, ...] = (
        (int(rng.integers(1, 4)), *map(int, rng.integers(4, max_side + 1, 2))) if conv else (int(rng.integers(2, 30)),)
    )
    spec, source = Input(shape, bits), INPUT
    while conv and len(populations) < rng.integers(1, 5):
        pooled = source != INPUT and min(shape[1:]) >= 2 and rng.random() < 0.3
        groups = int(rng.choice([g for g in range(1, shape[0] + 1) if shape[0] % g == 0]))
        kernel = tuple(int(min(k, n)) for k, n in zip(rng.integers(1, 4, 2), shape[1:], strict=True))
        if pooled:
            pool = Conv2d(np.ones((shape[0], 1, 2, 2)), stride=(2, 2), groups=shape[0])
            source, shape = (
                add(pool.out_shape(shape), Projection(source, pool), threshold=np.ones(shape[0], int)),
                pool.out_shape(shape),
            )
            continue
        out = groups * int(rng.integers(1, 4))
        dilation = tuple(
            int(rng.integers(1, 3)) if (k - 1) * 2 < n else 1 for k, n in zip(kernel, shape[1:], strict=True)
        )
        synapses = Conv2d(
            weights(rng, (out, shape[0] // groups, *kernel)),
            tuple(map(int, rng.integers(1, 3, 2))),
            tuple(map(int, rng.integers(0, 3, 2))),
            dilation,
            groups,
        )
        target = synapses.out_shape(shape)
        joins = [Projection(source, synapses)]
        if residual and source != INPUT and rng.random() < 0.5:
            joins.append(Projection(source, replace(synapses, weight=weights(rng, synapses.weight.shape))))
        if residual and target == shape and source != INPUT and rng.random() < 0.5:
            identity = Conv2d(int(rng.integers(1, 100)) * np.ones((out, 1, 1, 1)), groups=out)
            joins.append(Projection(source, identity))
        source, shape = add(target, *joins), target
    while not populations or (len(populations) < 5 and rng.random() < 0.4):
        wide = int(rng.integers(1, 20))
        joins = [Projection(source, Dense(weights(rng, (wide, int(np.prod(shape))))))]
        if residual and len(populations) > 1 and rng.random() < 0.4:
            other = populations[int(rng.integers(len(populations) - 1))]
            joins.append(Projection(other.name, Dense(weights(rng, (wide, other.size)))))
        source, shape = add((wide,), *joins), (wide,)
    classes = int(rng.integers(1, 11))
    last = Projection(source, Dense(weights(rng, (classes, int(np.prod(shape))))))
    populations.append(
        Population("readout", (classes,), (last,), bias=rng.integers(-300, 300, classes), scale=np.full(classes, 0.5))
    )
    return with_thresholds(check(IntNet(spec, tuple(populations))), seed)


def _lenet() -> IntNet:
    rng = np.random.default_rng(1)
    pool = [Conv2d(np.ones((c, 1, 2, 2)), stride=(2, 2), groups=c) for c in (4, 6)]
    return with_thresholds(
        check(
            IntNet(
                Input((1, 12, 12)),
                (
                    Population(
                        "conv1",
                        (4, 12, 12),
                        (Projection(INPUT, Conv2d(rng.integers(-128, 128, (4, 1, 3, 3)), padding=(1, 1))),),
                        threshold=[0] * 4,
                    ),
                    Population("pool1", (4, 6, 6), (Projection("conv1", pool[0]),), threshold=[1] * 4),
                    Population(
                        "conv2",
                        (6, 6, 6),
                        (Projection("pool1", Conv2d(rng.integers(-128, 128, (6, 4, 3, 3)), padding=(1, 1))),),
                        threshold=[0] * 6,
                    ),
                    Population("pool2", (6, 3, 3), (Projection("conv2", pool[1]),), threshold=[1] * 6),
                    Population(
                        "readout",
                        (10,),
                        (Projection("pool2", Dense(rng.integers(-128, 128, (10, 54)))),),
                        bias=rng.integers(-50, 50, 10),
                    ),
                ),
            )
        )
    )


def _mlp() -> IntNet:
    rng = np.random.default_rng(2)
    return with_thresholds(
        check(
            IntNet(
                Input((30,), bits=1),
                (
                    Population(
                        "fc1", (20,), (Projection(INPUT, Dense(rng.integers(-128, 128, (20, 30)))),), threshold=[0] * 20
                    ),
                    Population(
                        "fc2", (15,), (Projection("fc1", Dense(rng.integers(-128, 128, (15, 20)))),), threshold=[0] * 15
                    ),
                    Population(
                        "readout", (10,), (Projection("fc2", Dense(rng.integers(-128, 128, (10, 15)))),), bias=[0] * 10
                    ),
                ),
            )
        )
    )


def _residual() -> IntNet:
    rng = np.random.default_rng(3)
    conv = lambda o, i, s=1: Conv2d(rng.integers(-128, 128, (o, i, 3, 3)), stride=(s, s), padding=(1, 1))  # noqa: E731
    identity = Conv2d(np.full((4, 1, 1, 1), 77), groups=4)
    shortcut = Conv2d(rng.integers(-128, 128, (6, 4, 1, 1)), stride=(2, 2))
    return with_thresholds(
        check(
            IntNet(
                Input((2, 7, 9)),
                (
                    Population("stem", (4, 7, 9), (Projection(INPUT, conv(4, 2)),), threshold=[0] * 4),
                    Population("a1", (4, 7, 9), (Projection("stem", conv(4, 4)),), threshold=[0] * 4),
                    Population(
                        "a2", (4, 7, 9), (Projection("a1", conv(4, 4)), Projection("stem", identity)), threshold=[0] * 4
                    ),
                    Population("b1", (6, 4, 5), (Projection("a2", conv(6, 4, 2)),), threshold=[0] * 6),
                    Population(
                        "b2", (6, 4, 5), (Projection("b1", conv(6, 6)), Projection("a2", shortcut)), threshold=[0] * 6
                    ),
                    Population(
                        "readout",
                        (5,),
                        (Projection("b2", Dense(rng.integers(-128, 128, (5, 120)))),),
                        bias=[3, -3, 0, 1, 2],
                    ),
                ),
            )
        )
    )


SEQUENTIAL = {"mlp": _mlp(), "lenet": _lenet(), **{f"chain{s}": random_net(s, residual=False) for s in (1, 2, 3, 5, 8)}}
"""Networks in which every population has one projection, from the population before it."""

ZOO = {**SEQUENTIAL, "residual": _residual(), **{f"random{s}": random_net(s) for s in range(10, 18)}}
"""Every network of the shared list."""


def assert_same(got: object, want: object) -> None:
    """Every spike of every population and every readout, `==`."""
    assert set(got.spikes) == set(want.spikes)
    for name, spikes in want.spikes.items():
        assert got.spikes[name].dtype == bool, name
        assert np.array_equal(got.spikes[name], spikes), name
    assert got.readout.dtype == np.int64
    assert np.array_equal(got.readout, want.readout)
