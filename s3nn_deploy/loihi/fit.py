"""The fit: a plan's groups cut into tiles, tiles put on cores, within a chip's published limits. An estimate on paper.

A tile is a block of neighbouring channels, rows and columns. Its synaptic memory is what the chip's formats take: a
matrix costs each incoming axon the tile's synapses, rounded up to 64-bit words; a convolution's kernels are held once a
core. Incoming axons are the distinct sources in the tile's receptive field, outgoing ones the cores that each neuron
reaches. All are upper bounds of their kind, but that the vendor's compiler may find another partition.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product

import numpy as np
from numpy.typing import NDArray

from s3nn_deploy.intnet import Conv2d, Dense
from s3nn_deploy.loihi.plan import Connection, Group, OneToOne, PerChannel, Plan
from s3nn_deploy.targets import LIMITS, Target

WORD = 64
"""Bits of a word of synaptic memory."""

OPEN = 32
"""So many of the last cores are tried before a new one is opened: neighbours stay together."""

RESOURCES = (
    "neurons_per_core",
    "synapse_bits_per_core",
    "input_axons_per_core",
    "output_axons_per_core",
    "groups_per_core",
)
"""The limits that each core has, keys of `LIMITS`."""

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class Tile:
    """A block of a group on one core: `box` is (first, end) of its channels, rows and columns.

    Attributes:
        uses: what it takes of each of `RESOURCES`.
    """

    group: str
    box: Box
    uses: Mapping[str, int]

    @property
    def neurons(self) -> int:
        return math.prod(end - first for first, end in self.box)


@dataclass(frozen=True)
class Core:
    """One core, by its number over all chips."""

    number: int
    tiles: tuple[Tile, ...]

    def use(self, key: str) -> int:
        return sum(tile.uses[key] for tile in self.tiles)


@dataclass(frozen=True)
class Unplaced:
    """A group of which not even one neuron fits a core."""

    group: str
    key: str
    figure: int
    limit: int
    source: str
    remedy: str

    def __str__(self) -> str:
        return (
            f"{self.group}: one neuron needs {self.figure:,} of {LIMITS[self.key]}, the limit is {self.limit:,} "
            f"({self.source}). {self.remedy}"
        )


@dataclass(frozen=True)
class Fit:
    """Where a plan lies.

    Attributes:
        limits: the target's, of `RESOURCES`; one that it does not state is not held.
        per_chip: cores on one chip.
        tiles: how each group was cut: (channels, rows, columns) of a tile.
    """

    target: str
    limits: Mapping[str, int]
    per_chip: int
    cores: tuple[Core, ...] = ()
    unplaced: tuple[Unplaced, ...] = ()
    tiles: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)

    @property
    def chips(self) -> int:
        return -(-len(self.cores) // self.per_chip)

    def utilisation(self, core: Core) -> dict[str, float]:
        """What the core uses of each limit, 0 to 1."""
        return {key: core.use(key) / limit for key, limit in self.limits.items()}

    def binding(self, group: str) -> tuple[str, float]:
        """The limit that a group's fullest tile comes nearest to, and how near."""
        of = [tile for core in self.cores for tile in core.tiles if tile.group == group]
        shares = {
            key: max(tile.uses[key] for tile in of) / limit
            for key, limit in self.limits.items()
            if key != "groups_per_core"
        }
        key = max(shares, key=lambda k: shares[k])
        return key, shares[key]

    def on(self, group: str) -> list[Core]:
        """The cores that hold neurons of a group."""
        return [core for core in self.cores if any(tile.group == group for tile in core.tiles)]


def place(plan: Plan, target: Target) -> Fit:
    """Cut and place the groups of `plan`, each into as few tiles as its limits allow; consumers are cut before their sources."""
    limits = {key: target.limits[key].max for key in RESOURCES if key in target.limits}
    per_chip = target.limits["cores"].max if "cores" in target.limits else 128
    sizes: dict[str, tuple[int, int, int]] = {}
    uses: dict[str, dict[str, int]] = {}
    unplaced = []
    for group in reversed(plan.groups):
        reached = [(c, sizes[c.target], plan[c.target]) for c in plan.connections if c.source == group.name]
        best = _cut(plan, group, reached, limits, target)
        if isinstance(best, Unplaced):
            unplaced.append(best)
            sizes[group.name] = grid(group.shape)
        else:
            sizes[group.name], uses[group.name] = best
    if unplaced:
        return Fit(target.name, limits, per_chip, unplaced=tuple(reversed(unplaced)))
    cores: list[list[Tile]] = []
    for group in plan.groups:
        for box in _boxes(grid(group.shape), sizes[group.name]):
            tile = Tile(group.name, box, uses[group.name])
            _put(cores, tile, limits)
    placed = tuple(Core(number, tuple(tiles)) for number, tiles in enumerate(cores))
    return Fit(target.name, limits, per_chip, placed, (), {g.name: sizes[g.name] for g in plan.groups})


def grid(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """A shape as (channels, rows, columns)."""
    return (*shape, 1, 1)[:3]  # type: ignore[return-value]


def _boxes(shape: tuple[int, int, int], size: tuple[int, int, int]) -> Iterator[Box]:
    parts = [[(first, min(first + s, n)) for first in range(0, n, s)] for n, s in zip(shape, size, strict=True)]
    yield from product(*parts)


def _put(cores: list[list[Tile]], tile: Tile, limits: Mapping[str, int]) -> None:
    for tiles in cores[-OPEN:]:
        if all(sum(t.uses[key] for t in tiles) + tile.uses[key] <= limit for key, limit in limits.items()):
            tiles.append(tile)
            return
    cores.append([tile])


Reached = list[tuple[Connection, tuple[int, int, int], Group]]


def _cut(
    plan: Plan, group: Group, reached: Reached, limits: Mapping[str, int], target: Target
) -> tuple[tuple[int, int, int], dict[str, int]] | Unplaced:
    """The tile size that needs the fewest tiles within the limits (then the fewest axons), and what a tile uses."""
    shape = grid(group.shape)
    options = [sorted({-(-n // parts) for parts in range(1, n + 1)}, reverse=True) for n in shape]
    best: tuple[tuple[int, int], tuple[int, int, int], dict[str, int]] | None = None
    for size in product(*options):
        count = math.prod(-(-n // s) for n, s in zip(shape, size, strict=True))
        if (best is not None and count > best[0][0]) or math.prod(size) > limits.get("neurons_per_core", math.inf):
            continue
        used = _uses(plan, group, size, reached, target)  # type: ignore[arg-type]
        if any(used[key] > limit for key, limit in limits.items()):
            continue
        rank = count, used["input_axons_per_core"] + used["output_axons_per_core"]
        if best is None or rank < best[0]:
            best = rank, size, used  # type: ignore[assignment]
    if best is not None:
        return best[1], best[2]
    used = _uses(plan, group, (1, 1, 1), reached, target)
    key = max(limits, key=lambda k: used[k] / limits[k])
    return Unplaced(
        group.name,
        key,
        used[key],
        limits[key],
        target.limits[key].source,
        _remedy(plan, group, key, used[key], limits[key]),
    )


def _uses(plan: Plan, group: Group, size: tuple[int, int, int], reached: Reached, target: Target) -> dict[str, int]:
    """What a tile of that size uses at most, of `RESOURCES`."""
    shape, volume = grid(group.shape), math.prod(size)
    per_synapse = target.limits["synapse_bits"].max if "synapse_bits" in target.limits else 9
    per_weight = target.limits["kernel_weight_bits"].max if "kernel_weight_bits" in target.limits else per_synapse
    bits, axons = 0, dict[str, int]()
    for c in plan.into(group):
        source = grid(_shape(plan, c.source))
        match c.wires:
            case Dense():
                incoming = math.prod(source)
                bits += incoming * _words(volume * per_synapse)
            case PerChannel():
                incoming = math.prod(source)
                bits += incoming * _words(volume * per_synapse)
            case OneToOne():
                incoming = volume
                bits += (volume if len(group.shape) == 1 else size[0]) * WORD
            case Conv2d():
                incoming = math.prod(_field(c.wires, source, shape, size))
                per_group = c.wires.weight.shape[1]
                groups = min(c.wires.groups, -(-size[0] * c.wires.groups // shape[0]) + 1) if c.wires.groups > 1 else 1
                kernel = size[0] * c.wires.weight.shape[2] * c.wires.weight.shape[3]
                bits += per_group * groups * _words(-(-kernel // groups) * per_weight)
        axons[c.source] = max(axons.get(c.source, 0), incoming)
    leaving: dict[str, int] = {}
    for c, tile, consumer in reached:
        most = math.prod(
            int(_most(along, s)) for along, s in zip(reach_of(c, shape, consumer, tile), size, strict=True)
        )
        leaving[consumer.name] = max(leaving.get(consumer.name, 0), most)
    return {
        "neurons_per_core": volume,
        "synapse_bits_per_core": bits,
        "input_axons_per_core": sum(axons.values()),
        "output_axons_per_core": sum(leaving.values()),
        "groups_per_core": 1,
    }


def _words(bits: int) -> int:
    return -(-bits // WORD) * WORD


def _shape(plan: Plan, name: str) -> tuple[int, ...]:
    return next((s.shape for s in plan.sources if s.name == name), None) or plan[name].shape


def _field(
    conv: Conv2d, source: tuple[int, int, int], shape: tuple[int, int, int], size: tuple[int, int, int]
) -> tuple[int, int, int]:
    """How many channels, rows and columns of the source the receptive field of a tile has, at most."""
    channels = source[0]
    if conv.groups > 1:
        per_group = shape[0] // conv.groups
        channels = min(source[0], (-(-size[0] // per_group) + (1 if size[0] % per_group else 0)) * conv.weight.shape[1])
    rows, columns = (
        min(n, (s - 1) * stride + dilation * (k - 1) + 1)
        for n, s, stride, dilation, k in zip(
            source[1:], size[1:], conv.stride, conv.dilation, conv.weight.shape[2:], strict=True
        )
    )
    return channels, rows, columns


Along = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


def reach_of(c: Connection, source: tuple[int, int, int], consumer: Group, tile: tuple[int, int, int]) -> Along:
    """How many tiles of the consumer a spike reaches, for each channel, row and column of its source: multiply them.

    With tiles of one neuron each that is the fan-out.
    """
    shape = grid(consumer.shape)
    ones = tuple(np.ones(n, dtype=np.int64) for n in source)
    match c.wires:
        case Dense() | PerChannel():
            return np.full(source[0], math.prod(-(-n // s) for n, s in zip(shape, tile, strict=True))), ones[1], ones[2]
        case OneToOne():
            return ones[0], ones[1], ones[2]
        case Conv2d() as conv:
            outs, per_group = shape[0] // conv.groups, conv.weight.shape[1]
            first = np.arange(source[0]) // per_group * outs
            channels = (first + outs - 1) // tile[0] - first // tile[0] + 1
            rows, columns = (
                _tiles_along(source[axis + 1], shape[axis + 1], tile[axis + 1], conv, axis) for axis in (0, 1)
            )
            return channels, rows, columns


def _tiles_along(source: int, target: int, size: int, conv: Conv2d, axis: int) -> NDArray[np.int64]:
    """Along one axis, for each source position the number of tiles with a neuron that it projects to."""
    k, stride, padding = conv.weight.shape[2 + axis], conv.stride[axis], conv.padding[axis]
    hit = np.zeros((source, -(-target // size)), dtype=bool)
    at = np.arange(target)
    for tap in range(k):
        position = at * stride - padding + tap * conv.dilation[axis]
        inside = (position >= 0) & (position < source)
        hit[position[inside], at[inside] // size] = True
    return hit.sum(1)


def receptive_box(c: Connection, source: tuple[int, int, int], consumer: Group, box: Box) -> Box:
    """The part of the source that a tile of the consumer listens to, as (first, end) of channels, rows and columns."""
    match c.wires:
        case Dense() | PerChannel():
            return (0, source[0]), (0, source[1]), (0, source[2])
        case OneToOne():
            return box
        case Conv2d() as conv:
            outs, per_group = grid(consumer.shape)[0] // conv.groups, conv.weight.shape[1]
            spans = [(box[0][0] // outs * per_group, ((box[0][1] - 1) // outs + 1) * per_group)]
            for axis, (first, end) in enumerate(box[1:]):
                k, stride, padding = conv.weight.shape[2 + axis], conv.stride[axis], conv.padding[axis]
                last = (end - 1) * stride - padding + (k - 1) * conv.dilation[axis]
                spans.append((max(0, first * stride - padding), min(source[axis + 1], last + 1)))
            return spans[0], spans[1], spans[2]


def _most(along: NDArray[np.int64], size: int) -> int:
    """The largest sum over the blocks of that size."""
    return int(np.add.reduceat(along, np.arange(0, len(along), size)).max())


def _remedy(plan: Plan, group: Group, key: str, figure: int, limit: int) -> str:
    """What would make it fit, with the figure."""
    into = plan.into(group)
    names, factor = ", ".join(dict.fromkeys(c.source for c in into)), -(-figure // limit)
    channels = sum(grid(_shape(plan, name))[0] for name in dict.fromkeys(c.source for c in into))
    match key:
        case "input_axons_per_core":
            most = max(1, channels * limit // figure)
            return (
                f"It fits with at most {most:,} channels in {names} (now {channels:,}), or with pooling before it, "
                "or with a convolution in place of all-to-all synapses."
            )
        case "synapse_bits_per_core":
            return (
                f"It fits with {factor} times fewer synapses: fewer channels in {names}, or a convolution, whose weights are "
                f"shared. 4-bit weights would not help: each source takes a word of {WORD} bits at least."
            )
        case "output_axons_per_core":
            return f"It fits where what it projects to lies on {factor} times fewer cores: fewer channels there."
        case _:
            return "Use fewer channels."
