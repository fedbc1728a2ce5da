"""The mapping: passes from an integer network to what runs on Loihi, each pure, each saying what it did; and the way back.

For every input the plan gives the network's spikes and readout exactly, in Lava's fixed-point simulation. What the chip
may do otherwise, and the simulation cannot show, is in `notes`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from s3nn_deploy.errors import DeployError, suggestion
from s3nn_deploy.formats.description import Description
from s3nn_deploy.intnet import (
    INPUT,
    Conv2d,
    Dense,
    IntNet,
    Population,
    Projection,
    Synapses,
    check,
    clamp_thresholds,
    integers,
    reach,
)
from s3nn_deploy.loihi.plan import (
    ENCODINGS,
    GRADED,
    LIF,
    Connection,
    Group,
    OneToOne,
    PerChannel,
    Plan,
    Source,
    Step,
    Wires,
    levels,
)

VTH_MAX = (1 << 17) - 1
"""The highest vth of a LIF neuron, 17 bits, and the largest magnitude of its sum: 24 bits, 6 of them fractional."""

GRADED_MAX = (1 << 23) - 1
"""The largest magnitude of a graded neuron's sum and threshold: 24 bits (Lava GradedVec)."""

BIAS_MIN, BIAS_MAX = -(1 << 12), (1 << 12) - 1
"""Bias mantissas have 13 bits (Lava LIF)."""

ACCUMULATOR = (1 << 15) - 1
"""The 16-bit accumulator that Lava declares without enforcing it, and nengo-loihi enforces for Loihi 1."""

MESSAGE_BITS = 8
"""The widest payload of an injected graded spike that was compared with ==."""

PARTS, CHUNK, DIGIT = 16, 126, 7
"""A convolution may be the sum of so many with weights of so much at most (even: what is even stays it); dense weights
are split into two digits of so many bits, and a sign."""

LEVELS = 255
"""The most spikes that may stand for one value."""

COARSE = 64
"""What one unit of an always-on neuron's synapse moves a LIF neuron's threshold by."""


@dataclass(frozen=True, eq=False)
class Draft:
    """A plan in the making: the network with what the passes did so far, and what was asked for.

    Attributes:
        wish: a key of `ENCODINGS`, or "auto".
        generation: 1 or 2 for what that chip has; 0 for what the simulation has.
    """

    net: IntNet
    wish: str
    generation: int
    plan: Plan


Lines = list[str]


def make(net: IntNet, encoding: str = "auto", generation: int = 0) -> Plan:
    """The plan of `net`: what Lava's fixed-point simulation computes exactly.

    Args:
        encoding: a key of `ENCODINGS`, or "auto": graded where the first sums fit a LIF neuron, else by the host.
        generation: 1 or 2 to keep to what that chip has.

    Raises:
        DeployError: an unknown encoding, or a population that no neuron can hold: its name, the value, the limit, the way out.
    """
    if encoding not in ("auto", *ENCODINGS):
        raise DeployError(
            f"input encoding {encoding!r}", "is not known", hint=suggestion(encoding, ["auto", *ENCODINGS])
        )
    draft = Draft(net, encoding, generation, Plan(net.input, "spikes"))
    for name, apply in PASSES.items():
        draft, lines = apply(draft)
        step = Step(name, tuple(lines) or ("nothing to do",))
        draft = replace(draft, plan=replace(draft.plan, passes=(*draft.plan.passes, step)))
    return draft.plan


# 1. Thresholds


def clamp(draft: Draft) -> tuple[Draft, Lines]:
    """Thresholds that no input reaches go to the edge of what it reaches: no spike changes."""
    net, lines = clamp_thresholds(draft.net), []
    for before, after in zip(draft.net.spiking, net.spiking, strict=True):
        assert before.threshold is not None
        if moved := int((before.threshold != after.threshold).sum()):
            lines.append(
                f"{after.name}: {moved} of {after.channels} thresholds moved to the edge of the reachable range"
            )
    return replace(draft, net=net), lines


# 2. Input


def encode(draft: Draft) -> tuple[Draft, Lines]:
    """Choose what the host injects, and lay out a group for each population that is left for the chip."""
    net = draft.net
    encoding, why = _choose(draft)
    host = _host(net) if encoding == "host" else frozenset()
    worth = levels(net.input.bits, encoding)
    chip = [p for p in net.populations if p.name not in host]
    read = dict.fromkeys(j.source for p in chip for j in p.projections if j.source in (INPUT, *host))
    bits = MESSAGE_BITS if encoding == "graded" else 0
    sources = []
    for name in read:
        shape = net.input.shape if name == INPUT else net[name].shape
        wide = (shape[0] * len(worth), *shape[1:]) if name == INPUT else shape
        sources.append(Source(name, wide, name, bits if name == INPUT else 0))
    groups = [Group(p.name, p.name, "population" if p.spiking else "readout", p.shape) for p in chip]
    connections = []
    for p in chip:
        for index, j in enumerate(p.projections):
            wires = _widened(j.synapses, net.input.shape[0], worth) if j.source == INPUT else j.synapses
            connections.append(
                Connection(j.source, p.name, wires, index, message_bits=bits if j.source == INPUT else 0)
            )
    plan = replace(
        draft.plan,
        encoding=encoding,
        host=tuple(p for p in net.populations if p.name in host),
        sources=tuple(sources),
        groups=tuple(groups),
        connections=tuple(connections),
        order=tuple(p.name for p in net.populations),
    )
    lines = [f"{encoding}: {ENCODINGS[encoding]}", why]
    if host:
        lines.append(f"computed by the host: {', '.join(p.name for p in plan.host)}")
    return replace(draft, plan=plan), lines


def _choose(draft: Draft) -> tuple[str, str]:
    """The encoding, and why."""
    net, wish, bits = draft.net, draft.wish, draft.net.input.bits
    possible = net.readout.name not in _host(net)
    if wish == "host":
        if not possible:
            raise DeployError(
                "input encoding 'host'", "nothing is left for the chip: the readout depends on the input directly"
            )
        return wish, "as asked for"
    if bits == 1:
        return "spikes", "one bit a value needs no encoding"
    if wish == "spikes":
        hint = "Choose graded, host, planes or thermometer."
        raise DeployError("input encoding 'spikes'", expected="one-bit input", got=f"{bits} bits", hint=hint)
    if wish in ("planes", "thermometer"):
        if (most := len(levels(bits, wish))) > LEVELS:
            hint = "Train with fewer input bits, or choose planes or host."
            raise DeployError(
                f"input encoding {wish!r}", expected=f"at most {LEVELS} spikes a value", got=f"{most:,}", hint=hint
            )
        return wish, "as asked for"
    if wish == "graded":
        if draft.generation == 1 or bits > MESSAGE_BITS:
            expected = (
                "Loihi 2: Loihi 1 has no graded spikes"
                if draft.generation == 1
                else f"at most {MESSAGE_BITS} input bits"
            )
            raise DeployError("input encoding 'graded'", expected=expected, hint="Choose host, planes or thermometer.")
        return wish, "as asked for"
    if draft.generation == 1 or bits > MESSAGE_BITS:
        why = "Loihi 1 has no graded spikes" if draft.generation == 1 else f"{bits} bits exceed a graded spike's"
        return ("host", why) if possible else ("planes", f"{why}, and the readout depends on the input directly")
    wide = [p.name for p in net.populations if _reads_input(p) and _neuron(net, p) != LIF]
    if not wide:
        return "graded", "all sums over the input fit the 24 bits of a LIF neuron"
    if possible:
        return "host", f"sums over the input can leave the 24 bits of a LIF neuron in {', '.join(wide)}"
    return "graded", "the readout depends on the input directly"


def _reads_input(population: Population) -> bool:
    return any(j.source == INPUT for j in population.projections)


def _host(net: IntNet) -> frozenset[str]:
    """The populations that read the input, and all that these depend on."""
    host: set[str] = set()
    for p in reversed(net.populations):
        if _reads_input(p) or p.name in host:
            host |= {p.name, *(j.source for j in p.projections if j.source != INPUT)}
    return frozenset(host)


def _widened(synapses: Synapses, channels: int, worth: NDArray[np.int64]) -> Synapses:
    """The synapses from spikes `worth` so much each, those of one channel (or value) side by side."""
    if len(worth) == 1:
        return synapses
    if isinstance(synapses, Conv2d):
        weight = synapses.weight.astype(np.int64)[:, :, None] * worth[:, None, None]
        return replace(synapses, weight=weight.reshape(len(weight), -1, *weight.shape[3:]))
    by_channel = synapses.weight.astype(np.int64).reshape(len(synapses.weight), channels, 1, -1)
    return Dense((by_channel * worth[:, None]).reshape(len(by_channel), -1))


def encoded(plan: Plan, x: NDArray[np.integer]) -> NDArray[np.integer]:
    """What the input's source injects for samples `x` [N, *shape]: [N, *source shape]."""
    worth = levels(plan.input.bits, plan.encoding)
    if plan.encoding == "planes":
        spikes = x[:, :, None] >> np.arange(len(worth)).reshape(-1, *[1] * (x.ndim - 2)) & 1
    elif plan.encoding == "thermometer":
        spikes = (x[:, :, None] > np.arange(len(worth)).reshape(-1, *[1] * (x.ndim - 2))).astype(np.uint8)
    else:
        return x
    return spikes.reshape(len(x), -1, *x.shape[2:])


# 3. Weights of more than 8 bits


def split_weights(draft: Draft) -> tuple[Draft, Lines]:
    """Synapses beyond 8 bits become several into the same population: dense ones by digits, convolutions by sums."""
    connections, lines = [], []
    for c in draft.plan.connections:
        assert isinstance(c.wires, Dense | Conv2d)
        low, high = int(c.wires.weight.min()), int(c.wires.weight.max())
        if low >= -128 and high <= 127:
            connections.append(c)
            continue
        size, sign = np.abs(c.wires.weight.astype(np.int64)), np.sign(c.wires.weight).astype(np.int64)
        if isinstance(c.wires, Dense):
            base, exps = 1 << DIGIT, [0, DIGIT]
            least, most = 1 - base * (base + 1), base * base - 1  # the higher digit of a negative weight goes to -128
            parts = [size % base, size // base]
        else:
            count = -(-int(size.max()) // CHUNK)
            exps, least, most = [0] * count, -CHUNK * PARTS, CHUNK * PARTS
            parts = [np.clip(size - CHUNK * k, 0, CHUNK) for k in range(count)]
        if low < least or high > most:
            hint = (
                "Train with fewer weight or input bits, or let the host compute the first layer: --input-encoding host."
            )
            raise DeployError(
                f"population {c.target!r}", "its weights cannot be split into 8-bit ones",
                expected=f"{least:,}..{most:,}", got=f"{low:,}..{high:,}", hint=hint,
            )  # fmt: skip
        lines.append(f"{c.target} <- {c.source}: weights {low}..{high} as {len(parts)} projections of 8 bits")
        for part, exp in zip(parts, exps, strict=True):
            connections.append(replace(c, wires=replace(c.wires, weight=integers(sign * part)), weight_exp=exp))
    return replace(draft, plan=replace(draft.plan, connections=tuple(connections))), lines


# 4. Paths


def align(draft: Draft) -> tuple[Draft, Lines]:
    """Each projection takes one step. A path that is shorter than its join's longest gets relays, or is injected later."""
    plan, depth, lines = draft.plan, {s.name: 0 for s in draft.plan.sources}, []
    groups: list[Group] = []
    connections: list[Connection] = []
    known = {g.name: g for g in plan.groups}
    for group in plan.groups:
        depth[group.name] = 1 + max(depth[c.source] for c in plan.into(group))
        for c in plan.into(group):
            behind = depth[group.name] - 1 - depth[c.source]
            if behind and c.source not in known:
                c = replace(c, lag=behind)
                lines.append(f"{group.name} <- {c.source}: injected {behind} steps later")
            for k in range(1, behind + 1 if c.source in known else 1):
                relay, before = f"{c.source}+{k}", f"{c.source}+{k - 1}" if k > 1 else c.source
                if relay not in depth:
                    shape, depth[relay] = known[c.source].shape, depth[c.source] + k
                    groups.append(Group(relay, c.source, "relay", shape, depth[relay]))
                    connections.append(Connection(before, relay, OneToOne(1)))
                    lines.append(f"{relay}: relays the {math.prod(shape):,} neurons of {c.source} to {group.name}")
            if behind and c.source in known:
                c = replace(c, source=f"{c.source}+{behind}")
            connections.append(c)
        groups.append(replace(group, depth=depth[group.name]))
    return replace(draft, plan=replace(plan, groups=tuple(groups), connections=tuple(connections))), lines


# 5. Scale


def scale(draft: Draft) -> tuple[Draft, Lines]:
    """All weights are stored even, for of mixed-sign ones chip and simulation drop the lowest bit.

    Dense ones are doubled and their exponent is -1: the sums stay what they are. Convolutions have no exponent, in Lava
    and on the chip: unless all weights are even, all sums of the population are doubled with them.
    """
    plan, lines = draft.plan, []
    doubled = {g.name: any(_needs_doubling(c.wires) for c in plan.into(g)) for g in plan.groups}
    connections = []
    for c in plan.connections:
        match c.wires:
            case Dense(weight=weight):
                c = replace(c, wires=Dense(2 * weight.astype(np.int16)), weight_exp=c.weight_exp - 1)
            case Conv2d(weight=weight) if doubled[c.target]:
                c = replace(c, wires=replace(c.wires, weight=2 * weight.astype(np.int16)))
            case OneToOne():
                c = replace(c, wires=OneToOne(2))
        connections.append(c)
    groups = tuple(replace(g, scale=2 if doubled[g.name] else 1) for g in plan.groups)
    if any(doubled[g.name] for g in groups if g.role != "relay"):
        lines.append(f"sums doubled: {', '.join(g.name for g in groups if g.scale == 2 and g.role != 'relay')}")
    if plain := [g.name for g in groups if g.scale == 1]:
        lines.append(f"sums as they are: {', '.join(plain)}")
    return replace(draft, plan=replace(plan, groups=groups, connections=tuple(connections))), lines


def _needs_doubling(wires: Wires) -> bool:
    return isinstance(wires, OneToOne) or (isinstance(wires, Conv2d) and bool(np.any(wires.weight & 1)))


def _scale(population: Population) -> int:
    """What `scale` will give it, its weights being split or not."""
    return 2 if any(_needs_doubling(j.synapses) for j in population.projections) else 1


# 6. Thresholds and biases


@dataclass(frozen=True, eq=False)
class Level:
    """How a threshold is told to a group: `u >= threshold` is `u + moved + bias > vth`, all of them times the scale.

    Attributes:
        bias: [channels], of a LIF neuron; zero for a graded one.
        moved: [channels], what always-on neurons add.
    """

    neuron: str
    vth: int
    bias: NDArray[np.int64]
    moved: NDArray[np.int64]


def _level(net: IntNet, population: Population) -> Level | None:
    """The threshold of a spiking population told to LIF neurons, or else to graded ones, or None where no neuron holds it."""
    assert population.threshold is not None
    factor, theta = _scale(population), population.threshold.astype(np.int64)
    low, high = reach(net, population)
    least, most = int(theta.min()), int(theta.max())
    top = VTH_MAX // factor
    start, end = max(1, most + BIAS_MIN + 1 - 2), min(top, least + BIAS_MAX - 1)
    middle = (least + most) // 2
    vth = min(max(middle, start), end) if start <= end else min(max(middle, 1), top)
    need = vth + 1 - theta
    moved = COARSE * np.sign(need) * np.maximum(0, -(-(np.abs(need) - BIAS_MAX) // COARSE))
    if _widest(factor, low, high, moved) <= VTH_MAX:
        return Level(LIF, vth, need - moved, moved)
    vth = min(max(middle, 0), GRADED_MAX // factor)
    need = vth + 1 - theta
    if _widest(factor, low, high, need) <= GRADED_MAX:
        return Level(GRADED, vth, np.zeros_like(theta), need)
    return None


def _widest(factor: int, low: NDArray[np.int64], high: NDArray[np.int64], moved: NDArray[np.int64]) -> int:
    """The largest magnitude that any partial sum can have."""
    return factor * int(max((high + np.maximum(moved, 0)).max(), -(low + np.minimum(moved, 0)).min()))


def _neuron(net: IntNet, population: Population) -> str | None:
    """The kind of neuron that holds the population, or None."""
    if population.spiking:
        level = _level(net, population)
        return None if level is None else level.neuron
    low, high = reach(net, population)
    widest = _widest(_scale(population), low, high, np.zeros_like(low))
    return LIF if widest <= VTH_MAX else GRADED if widest <= GRADED_MAX else None


def split_thresholds(draft: Draft) -> tuple[Draft, Lines]:
    """Each threshold as one vth a group and a 13-bit bias a channel; what is left over comes from always-on neurons."""
    groups: list[Group] = []
    connections, lines = list(draft.plan.connections), []
    for group in draft.plan.groups:
        if group.role == "relay":
            groups.append(replace(group, vth=1, bias=integers([0])))
            continue
        population = draft.net[group.name]
        kind = _neuron(draft.net, population)
        if kind is None or (kind == GRADED and draft.generation == 1):
            raise _too_wide(draft, population, kind)
        if kind == GRADED:
            lines.append(f"{group.name}: sums beyond 24 bits with 6 fractional ones: graded neurons (Loihi 2, 24 bits)")
        if not population.spiking:
            groups.append(_reading(draft.net, group, kind))
            if groups[-1].host_bias is not None:
                lines.append(f"{group.name}: the host adds the bias")
            continue
        level = _level(draft.net, population)
        assert level is not None
        exp = group.scale - 1  # 2 ** exp == scale
        bias = integers(level.bias) if kind == LIF else None
        groups.append(replace(group, neuron=kind, vth=group.scale * level.vth, bias=bias, bias_exp=6 + exp))
        if level.moved.any():
            always, synapses = _always_on(group, level.moved, COARSE if kind == LIF else 1, exp)
            groups.insert(len(groups) - 1, always)
            connections += synapses
            span = f"{level.moved.min():,}..{level.moved.max():,}"
            lines.append(f"{group.name}: {always.size} always-on neurons move thresholds by {span}")
        if kind == LIF:
            lines.append(f"{group.name}: vth {groups[-1].vth:,}, biases {level.bias.min():,}..{level.bias.max():,}")
    return replace(draft, plan=replace(draft.plan, groups=tuple(groups), connections=tuple(connections))), lines


def _always_on(group: Group, moved: NDArray[np.int64], unit: int, exp: int) -> tuple[Group, list[Connection]]:
    """Neurons that fire at each step, and synapses by which they add `scale * moved`, a multiple of `unit`, to a channel."""
    fine, coarse = (moved // unit, None) if unit != 1 else (np.sign(moved) * (np.abs(moved) % 128), moved)
    exps = [(fine, int(math.log2(unit)))] if coarse is None else [
        (fine, 0), (np.sign(moved) * (np.abs(moved) // 128), DIGIT)]  # fmt: skip
    count = max(1, max(-(-int(np.abs(amount).max()) // 127) for amount, _ in exps))
    always = Group(f"{group.name}+on", group.name, "always-on", (count,), vth=1, bias=integers([2]))
    connections = []
    for amount, shift in exps:
        size = np.clip(np.abs(amount)[:, None] - 127 * np.arange(count), 0, 127)
        if size.any():
            weight = PerChannel(integers(2 * np.sign(amount)[:, None] * size))
            connections.append(Connection(always.name, group.name, weight, weight_exp=shift - 1 + exp))
    return always, connections


def _reading(net: IntNet, group: Group, kind: str) -> Group:
    """A readout: LIF neurons that never fire, whose v is read, or graded ones that send their sum; the bias on the chip if it fits."""
    population = net[group.name]
    assert population.bias is not None
    bias = population.bias.astype(np.int64)
    low, high = reach(net, population)
    fits = bias.min() >= BIAS_MIN and bias.max() <= BIAS_MAX and _widest(group.scale, low, high, bias) <= VTH_MAX
    if kind == LIF and fits:
        return replace(group, vth=VTH_MAX, bias=population.bias, bias_exp=5 + group.scale)
    if kind == LIF:
        return replace(group, vth=VTH_MAX, bias=integers([0]), host_bias=population.bias)
    return replace(group, neuron=GRADED, vth=0, host_bias=population.bias)


def _too_wide(draft: Draft, population: Population, kind: str | None) -> DeployError:
    low, high = reach(draft.net, population)
    factor = _scale(population)
    most, what = (GRADED_MAX, "a graded neuron") if kind is None else (VTH_MAX, "a LIF neuron, the only one of Loihi 1")
    hint = "Train this layer with fewer weight bits or synapses."
    if _reads_input(population):
        hint += " Or let the host compute it: --input-encoding host."
    return DeployError(
        f"population {population.name!r}",
        f"its sums, {factor} x {low.min():,}..{high.max():,} and thresholds beside them, can leave {what}",
        expected=f"at most {most:,}",
        got=f"{factor * max(int(high.max()), -int(low.min())):,}",
        hint=hint,
    )


# 7. Time


def pipeline(draft: Draft) -> tuple[Draft, Lines]:
    """Which step's output belongs to which sample; nothing is changed."""
    plan = draft.plan
    last = plan.latency
    return draft, [
        "sample k = 0, 1, ... is shown at step k + 1; a group of depth d gives its spikes at step k + 1 + d",
        f"the readout of sample k is there after step k + {1 + last}; what it shows in the first {last} steps belongs to no sample",
        f"n samples take n + {last} steps",
    ]  # fmt: skip


PASSES: Mapping[str, Callable[[Draft], tuple[Draft, Lines]]] = {
    "clamp thresholds": clamp,
    "encode the input": encode,
    "split wide weights": split_weights,
    "align paths": align,
    "keep the lowest bit": scale,
    "split thresholds": split_thresholds,
    "fill the pipeline": pipeline,
}
"""The mapping, in order."""


def network(plan: Plan, about: Description) -> IntNet:
    """The network that a plan computes, from what runs alone: the inverse of `make`, but for thresholds out of reach.

    Raises:
        ValueError, LookupError, DeployError: the plan is none that `make` gives.
    """
    by_name = {g.name: g for g in plan.groups}
    of = {s.name: s.of for s in plan.sources} | {g.name: g.of for g in plan.groups}
    worth = levels(plan.input.bits, plan.encoding)
    populations = list(plan.host)
    for group in plan.groups:
        if group.role not in ("population", "readout"):
            continue
        into = plan.into(group)
        projections = []
        for index in range(1 + max(c.projection for c in into)):
            parts = [c for c in into if c.projection == index]
            synapses = _joined([(c.wires, c.weight_exp) for c in parts], group.scale)
            if of[parts[0].source] == INPUT:
                synapses = _narrowed(synapses, plan.input.shape[0], len(worth))
            projections.append(Projection(of[parts[0].source], synapses))
        moved = np.zeros(group.shape[0], dtype=np.int64)
        for c in into:
            if isinstance(c.wires, PerChannel) and by_name[c.source].role == "always-on":
                moved += _shifted(c.wires.weight, c.weight_exp, group.scale).sum(1)
        bias = np.zeros(1, np.int64) if group.bias is None else group.bias.astype(np.int64)
        bias = (bias << (group.bias_exp - 6)) // group.scale
        if group.role == "population":
            theta = group.vth // group.scale + 1 - bias - moved
            populations.append(Population(group.name, group.shape, tuple(projections), threshold=integers(theta)))
        else:
            given = integers(np.broadcast_to(bias, group.shape[:1]) if group.host_bias is None else group.host_bias)
            populations.append(Population(group.name, group.shape, tuple(projections), bias=given, scale=about.scale))
    populations.sort(key=lambda p: plan.order.index(p.name))
    return check(IntNet(plan.input, tuple(populations), about.classes, about.provenance))


def _shifted(weight: NDArray[np.integer], exp: int, factor: int) -> NDArray[np.int64]:
    """What stored weights count, in units of the membrane potential."""
    if not -1 <= exp <= 16:
        raise ValueError(f"weight exponent {exp}")
    doubled = weight.astype(np.int64) << (exp + 1)
    if np.any(doubled % (2 * factor)):
        raise ValueError("weights that lose their lowest bit")
    return doubled // (2 * factor)


def _joined(parts: list[tuple[Wires, int]], factor: int) -> Synapses:
    first = parts[0][0]
    if not isinstance(first, Dense | Conv2d):
        raise ValueError("a projection that is neither dense nor a convolution")
    total = sum(_shifted(wires.weight, exp, factor) for wires, exp in parts if not isinstance(wires, OneToOne))
    return replace(first, weight=integers(total))


def _narrowed(synapses: Synapses, channels: int, count: int) -> Synapses:
    """The inverse of `_widened`; the first of the spikes of a value is worth one."""
    if count == 1:
        return synapses
    if isinstance(synapses, Conv2d):
        return replace(synapses, weight=synapses.weight[:, ::count])
    by_channel = synapses.weight.reshape(len(synapses.weight), channels, count, -1)
    return Dense(by_channel[:, :, 0].reshape(len(by_channel), -1))


def notes(plan: Plan, net: IntNet) -> list[str]:
    """What the plan needs that Lava's simulation has but the chip may not, one line a population and limit."""
    found = []
    for group in plan.groups:
        if group.role not in ("population", "readout"):
            continue
        population = net[group.name]
        low, high = reach(net, population)
        if (worst := _widest(group.scale, low, high, np.zeros_like(low))) > ACCUMULATOR:
            found.append(
                f"{group.name}: sums up to {worst:,} can exceed 16-bit accumulators ({ACCUMULATOR:,}); "
                "fewer input or weight bits avoid it"
            )
        if group.neuron == GRADED:
            found.append(f"{group.name}: needs Loihi 2's graded neurons with 24-bit sums")
        for c in plan.into(group):
            if isinstance(c.wires, Conv2d):
                shape = next((s.shape for s in plan.sources if s.name == c.source), None) or plan[c.source].shape
                if max(shape[1:]) >= 256:
                    found.append(
                        f"{group.name}: convolves {shape[1]} x {shape[2]} neurons; Loihi 2's compiler vouches for "
                        "maps below 256 only"
                    )
    return list(dict.fromkeys(found))
