"""Exact rewrites, `IntNet -> IntNet`: the same spikes and readout for every input, in a form that a format can hold."""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from s3nn_deploy.backends.reference import potential
from s3nn_deploy.errors import DeployError
from s3nn_deploy.intnet import (
    INPUT,
    Conv2d,
    Dense,
    IntArray,
    IntNet,
    Population,
    Projection,
    Synapses,
    check,
    rewrite,
)

MAX_UNROLLED = 1 << 26
"""The most weights that one convolution may have as a dense matrix."""


def expand_groups(net: IntNet) -> IntNet:
    """`net` with every grouped convolution as one of a single group, the new weights zero."""
    return rewrite(net, _ungrouped)


def _ungrouped(synapses: Synapses) -> Synapses:
    if isinstance(synapses, Dense) or synapses.groups == 1:
        return synapses
    out, per_group, *kernel = synapses.weight.shape
    groups = np.arange(synapses.groups)
    weight = np.zeros((len(groups), out // len(groups), len(groups), per_group, *kernel), synapses.weight.dtype)
    weight[groups, :, groups] = synapses.weight.reshape(len(groups), out // len(groups), per_group, *kernel)
    return replace(synapses, weight=weight.reshape(out, -1, *kernel), groups=1)


def expand_dilation(net: IntNet) -> IntNet:
    """`net` with every dilated kernel as a dense one, zeros between its weights."""
    return rewrite(net, _undilated)


def _undilated(synapses: Synapses) -> Synapses:
    if isinstance(synapses, Dense) or synapses.dilation == (1, 1):
        return synapses
    *outer, kh, kw = synapses.weight.shape
    dh, dw = synapses.dilation
    weight = np.zeros((*outer, dh * (kh - 1) + 1, dw * (kw - 1) + 1), synapses.weight.dtype)
    weight[..., ::dh, ::dw] = synapses.weight
    return replace(synapses, weight=weight, dilation=(1, 1))


def plain(synapses: Synapses) -> Synapses:
    """The same synapses without groups and dilation, zeros in their place."""
    return _undilated(_ungrouped(synapses))


def composed(first: Conv2d, second: Conv2d) -> Conv2d:
    """The convolution that is `second` of `first`, both plain, away from zeros that `second` pads."""
    (out, middle, kh, kw), (_, channels, h, w), (sh, sw) = second.weight.shape, first.weight.shape, first.stride
    weight = np.zeros((out, channels, (kh - 1) * sh + h, (kw - 1) * sw + w), np.int64)
    inner = first.weight.reshape(middle, -1).astype(np.int64)
    for y in range(kh):
        for x in range(kw):
            taps = (second.weight[:, :, y, x].astype(np.int64) @ inner).reshape(out, channels, h, w)
            weight[:, :, y * sh : y * sh + h, x * sw : x * sw + w] += taps
    stride = (sh * second.stride[0], sw * second.stride[1])
    padding = (first.padding[0] + sh * second.padding[0], first.padding[1] + sw * second.padding[1])
    return Conv2d(weight, stride, padding)


def square_kernels(net: IntNet) -> IntNet:
    """`net` with non-square kernels embedded in square ones of dilation 1, zeros and as much more padding around.

    A kernel whose extents differ by an odd number has no such form at stride 1 (it would need padding on one side
    only): it stays as it is, see `unroll`.
    """
    populations = []
    for population in net.populations:
        projections = [replace(j, synapses=_squared(j.synapses, net.source(j).shape)) for j in population.projections]
        populations.append(replace(population, projections=tuple(projections)))
    return check(replace(net, populations=tuple(populations)))


def is_square(synapses: Synapses) -> bool:
    """Whether the synapses are a convolution with a square kernel, or none."""
    return isinstance(synapses, Dense) or synapses.weight.shape[2] == synapses.weight.shape[3]


def _squared(synapses: Synapses, source: tuple[int, ...]) -> Synapses:
    if is_square(synapses):
        return synapses
    dense = _undilated(synapses)
    assert isinstance(dense, Conv2d)
    sides = dense.weight.shape[2:]
    for side in (max(sides), max(sides) + 1):
        top, left = (
            _zeros_before(n, k, side, p, s)
            for n, k, p, s in zip(source[1:], sides, dense.padding, dense.stride, strict=True)
        )
        if top is not None and left is not None:
            weight = np.zeros((*dense.weight.shape[:2], side, side), dense.weight.dtype)
            weight[..., top : top + sides[0], left : left + sides[1]] = dense.weight
            return replace(dense, weight=weight, padding=(dense.padding[0] + top, dense.padding[1] + left))
    return synapses


def _zeros_before(size: int, kernel: int, side: int, padding: int, stride: int) -> int | None:
    """How many zeros to put before a kernel, and how much padding on both sides, for as many outputs as without."""
    outputs = (size + 2 * padding - kernel) // stride
    return next((b for b in range(side - kernel + 1) if (size + 2 * (padding + b) - side) // stride == outputs), None)


def unroll(net: IntNet, names: Iterable[str]) -> IntNet:
    """`net` with the named populations flat (C order) and driven by dense synapses, and all that convolve a flat one.

    Raises:
        DeployError: a dense matrix would have more than `MAX_UNROLLED` weights.
    """
    flat, populations = set(names), []
    for population in net.populations:
        from_flat = any(isinstance(j.synapses, Conv2d) and j.source in flat for j in population.projections)
        if population.name in flat or from_flat:
            flat.add(population.name)
            population = _unrolled(net, population)
        populations.append(population)
    return check(replace(net, populations=tuple(populations)))


def _unrolled(net: IntNet, population: Population) -> Population:
    projections = []
    for projection in population.projections:
        shape = net.source(projection).shape
        _check_size(population, math.prod(shape) * population.size)
        projections.append(Projection(projection.source, Dense(matrix(projection.synapses, shape))))
    each = population.size // population.channels
    threshold, bias, scale = (_repeated(a, each) for a in (population.threshold, population.bias, population.scale))
    return Population(population.name, (population.size,), tuple(projections), threshold, bias, scale)


def _repeated(per_channel: Any, each: int) -> Any:
    """A per-channel array, if there is one, for channels that become `each` neurons."""
    return None if per_channel is None else np.repeat(per_channel, each)


def _check_size(population: Population, size: int) -> None:
    if size > MAX_UNROLLED:
        raise DeployError(
            f"population {population.name!r}",
            "its convolution as a dense matrix",
            expected=f"at most {MAX_UNROLLED:,} weights",
            got=f"{size:,}",
            hint="Export to a profile that keeps convolutions (not rockpool), with kernels whose sides are both odd or both even.",
        )


def matrix(synapses: Synapses, source: tuple[int, ...]) -> IntArray:
    """The weights [out, in] of the synapses: what each unit spike of a source of that shape adds."""
    if isinstance(synapses, Dense):
        return synapses.weight
    units = np.eye(math.prod(source), dtype=np.int64).reshape(-1, *source)
    return potential(synapses, units).reshape(len(units), -1).T


def flat_input(net: IntNet) -> IntNet:
    """`net`, whose input only dense synapses read, with that input flat (C order)."""
    return check(replace(net, input=replace(net.input, shape=(math.prod(net.input.shape),))))


def merge_skips(net: IntNet) -> IntNet:
    """`net` as a chain: each population has one projection, from the one before it (the first from the input).

    Projections from one source become their sum. Spikes that are needed further on are handed on: the populations in
    between get copies of them, as channels (neurons) behind their own; their own come first and stay as they are.
    Where one convolution cannot do that, this population and all after it become flat and dense.

    Raises:
        DeployError: a population behind the first reads pixels, which cannot be handed on as spikes, or a dense matrix
            would have more than `MAX_UNROLLED` weights.
    """
    names = [INPUT, *(p.name for p in net.populations)]
    if all([j.source for j in p.projections] == [before] for p, before in zip(net.populations, names, strict=False)):
        return net
    net = expand_dilation(expand_groups(net))
    for population in net.populations[1:]:
        if net.input.bits > 1 and any(j.source == INPUT for j in population.projections):
            raise DeployError(
                f"population {population.name!r}",
                f"reads the input of {net.input.bits} bits",
                expected="one that only the first population reads: spikes can be handed on, pixels not",
                hint="Export it without --merge-skips.",
            )
    todo = {p.name: list(p.projections) for p in net.populations}
    held: Signals = {INPUT: net.input.shape}
    flat, populations = len(net.input.shape) == 1, list[Population]()
    for index, population in enumerate(net.populations):
        later = [j.source for q in net.populations[index + 1 :] for j in todo[q.name]]
        copies = [name for name in held if name in later]
        conv = None if flat else _merged_conv(population, todo, held, copies)
        flat = conv is None
        synapses = conv or _merged_dense(population, todo, held, copies)
        each = population.size // population.channels if flat else 1
        theta, bias, scale = (_repeated(a, each) for a in (population.threshold, population.bias, population.scale))
        shape = (len(synapses.weight), *(() if flat else population.shape[1:]))
        if theta is not None:
            theta = np.concatenate([theta, np.ones(shape[0] - len(theta), np.int64)])
        projection = Projection(populations[-1].name if populations else INPUT, synapses)
        populations.append(Population(population.name, shape, (projection,), theta, bias, scale))
        grid = () if flat else population.shape[1:]
        held = {
            population.name: population.shape,
            **{name: (held[name][0], *grid) if grid else held[name] for name in copies},
        }
    return check(replace(net, populations=tuple(populations)))


Signals = dict[str, tuple[int, ...]]
"""Names and shapes of signals that lie one after the other in a population."""


def _merged_conv(
    population: Population,
    todo: dict[str, list[Projection]],
    held: Signals,
    copies: list[str],
) -> Conv2d | None:
    """One convolution from what is `held` (on one grid) to the population and the copies, or None.

    A copy that is only read by 1x1 kernels in the stride of this convolution holds no more than they read, and in
    `todo` their stride becomes 1.
    """
    own = [(j.source, j.synapses) for j in todo[population.name] if isinstance(j.synapses, Conv2d)]
    strides = {conv.stride for _, conv in own}
    if len(strides) != 1:  # none: it is dense
        return None
    (stride,) = strides
    grid = next(iter(held.values()))[1:]
    readers = [j for name, js in todo.items() if name != population.name for j in js if j.source in copies]
    thinned = tuple((n - 1) // s + 1 for n, s in zip(grid, stride, strict=True)) == population.shape[1:]
    if copies and (not thinned or (stride != (1, 1) and not all(_reads(j.synapses, stride) for j in readers))):
        return None
    starts, start = {}, 0
    for name, shape in held.items():
        starts[name], start = start, start + shape[0]
    parts = [(0, starts[name], conv) for name, conv in own]
    out = population.channels
    for name in copies:
        parts.append((out, starts[name], Conv2d(np.eye(held[name][0], dtype=np.int8)[:, :, None, None], stride)))
        out += held[name][0]
    if stride != (1, 1):
        for name, js in todo.items():
            if name != population.name:
                todo[name] = [Projection(j.source, Conv2d(j.synapses.weight)) if j.source in copies else j for j in js]
    return _sum(parts, (out, start), grid, population.shape[1:])


def _reads(synapses: Synapses, stride: tuple[int, int]) -> bool:
    return (
        isinstance(synapses, Conv2d)
        and synapses.stride == stride
        and synapses.padding == (0, 0)
        and synapses.weight.shape[2:] == (1, 1)
    )


def _sum(
    parts: list[tuple[int, int, Conv2d]], channels: tuple[int, int], source: tuple[int, ...], target: tuple[int, ...]
) -> Conv2d:
    """The convolution that is the sum of `parts`: first output and input channel, and synapses of one stride each."""
    stride = parts[0][2].stride
    before, side = [0, 0], [0, 0]  # zeros before the input's first row (column); the kernel's height (width)
    for axis in range(2):
        before[axis] = max(c.padding[axis] for _, _, c in parts)
        behind = max(c.weight.shape[2 + axis] - c.padding[axis] for _, _, c in parts)
        while (excess := (source[axis] + before[axis] - behind) // stride[axis] + 1 - target[axis]) != 0:
            behind, before[axis] = behind + (excess > 0), before[axis] + (excess < 0)
        side[axis] = before[axis] + behind
    weight = np.zeros((*channels, *side), np.int64)
    for out, first, conv in parts:
        (o, i, kh, kw), (top, left) = conv.weight.shape, (b - p for b, p in zip(before, conv.padding, strict=True))
        weight[out : out + o, first : first + i, top : top + kh, left : left + kw] += conv.weight
    return Conv2d(weight, stride, (before[0], before[1]))


def _merged_dense(population: Population, todo: dict[str, list[Projection]], held: Signals, copies: list[str]) -> Dense:
    """Dense synapses from what is `held` to the population and the copies."""
    starts, start = {}, 0
    for name, shape in held.items():
        starts[name], start = start, start + math.prod(shape)
    sizes = {name: math.prod(held[name]) for name in copies}
    total = population.size + sum(sizes.values())
    _check_size(population, total * start)
    weight = np.zeros((total, start), np.int64)
    for j in todo[population.name]:
        first, shape = starts[j.source], held[j.source]
        weight[: population.size, first : first + math.prod(shape)] += matrix(j.synapses, shape)
    row = population.size
    for name, size in sizes.items():
        weight[row : row + size, starts[name] : starts[name] + size] = np.eye(size, dtype=np.int64)
        row += size
    return Dense(weight)
