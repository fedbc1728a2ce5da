"""What a placed plan costs on Loihi: exact counts of its events, priced with published figures; time and hops estimated."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s3nn_deploy.errors import DeployError
from s3nn_deploy.intnet import INPUT, IntNet
from s3nn_deploy.loihi import mapping
from s3nn_deploy.loihi.fit import Core, Fit, grid, reach_of, receptive_box
from s3nn_deploy.loihi.plan import Plan
from s3nn_deploy.targets import Price, Target

MESH = (8, 4)
"""Tiles of a chip along a row and a column; SANA-FE, arch/loihi.yaml. The mesh of Loihi 2 is not published."""

PER_TILE = 4
"""Cores of a tile; the same source."""

EVENTS = {
    "synops": "synaptic operations",
    "macs": "multiply-accumulates of graded input",
    "neuron_updates": "neuron updates, relays and always-on neurons included",
    "spikes": "spikes sent to a core, one for each core that they reach",
    "hops_ew": "tiles passed eastward or westward (estimated)",
    "hops_ns": "tiles passed north- or southward (estimated)",
    "injected": "spikes or values injected by the host",
    "between_chips": "spikes sent to a core of another chip (estimated)",
}
"""What is counted, in the order of the report."""


@dataclass(frozen=True)
class Line:
    """`count` events per inference (mean); `pj` each and `nj` together, or None where nobody published a price."""

    event: str
    count: float
    pj: float | None
    nj: float | None
    evidence: str
    bound: str
    source: str


@dataclass(frozen=True)
class Cost:
    """Per inference, which is one time step once the pipeline is full.

    Attributes:
        at_least: nanojoules of all priced lines, or None where nothing is priced.
        static_nj: of all chips, at `rate_hz`; None without a rate or a published figure.
        step_ns: an estimate of a step's duration: the busiest core, and the barrier; None where no times are published.
        busiest: that core's number.
        latency_ns: from a sample to its readout.
    """

    target: str
    samples: int
    lines: tuple[Line, ...]
    at_least: float | None
    rate_hz: float | None
    static_nj: float | None
    static_source: str
    step_ns: float | None
    busiest: int | None
    latency_ns: float | None
    references: tuple[str, ...]
    not_modelled: tuple[str, ...]


Sums = Mapping[str, NDArray[np.int64]]


def spikes(plan: Plan, net: IntNet, x: NDArray[Any]) -> Sums:
    """How often each neuron of each source and group fires over the samples `x`: {name: [channels, rows, columns]}."""
    from s3nn_deploy.backends import run

    trace = run(net, x, "emulator")
    sums: dict[str, NDArray[np.int64]] = {}
    for source in plan.sources:
        values = mapping.encoded(plan, x) if source.of == INPUT else trace.spikes[source.of]
        sums[source.name] = (values != 0).sum(0).reshape(grid(source.shape))
    for group in plan.groups:
        match group.role:
            case "population" | "relay":
                sums[group.name] = trace.spikes[group.of].sum(0).reshape(grid(group.shape))
            case "always-on":
                sums[group.name] = np.full(grid(group.shape), len(x))
            case _:
                sums[group.name] = np.zeros(grid(group.shape), dtype=np.int64)
    return sums


def synops(plan: Plan, sums: Sums) -> list[int]:
    """Synaptic operations of each connection over all samples, exact at borders."""
    total = []
    for c in plan.connections:
        along = reach_of(c, sums[c.source].shape, plan[c.target], (1, 1, 1))
        total.append(int(np.einsum("chw,c,h,w->", sums[c.source], *along)))
    return total


def cost(plan: Plan, fit: Fit, target: Target, sums: Sums, samples: int, rate_hz: float | None = None) -> Cost:
    """The bill of `samples` inferences whose spikes are `sums`, per inference.

    Raises:
        DeployError: no samples, or a rate that is not positive.
    """
    if samples < 1:
        raise DeployError("samples", expected="at least one", got=str(samples))
    if rate_hz is not None and not (math.isfinite(rate_hz) and rate_hz > 0):
        raise DeployError("rate", expected="a positive number of inferences per second", got=repr(rate_hz))
    operations = synops(plan, sums)
    counts = dict.fromkeys(EVENTS, 0)
    for c, count in zip(plan.connections, operations, strict=True):
        counts["macs" if c.message_bits else "synops"] += count
    counts["neuron_updates"] = samples * sum(g.size for g in plan.groups)
    counts["injected"] = sum(int(sums[s.name].sum()) for s in plan.sources)
    counts |= _routed(plan, fit, sums)
    prices: dict[str, Price] = {**target.events, **target.routing}
    lines, known = [], Fraction(0)
    for event, count in counts.items():
        price = prices.get(event)
        each = None if price is None else price.each
        mean = Fraction(count, samples)
        if each is not None:
            known += mean * each
        if count or event in ("synops", "neuron_updates", "spikes"):
            source = price.source if price is not None else "no figure is published"
            nj = None if each is None else float(mean * each / 1000)
            evidence, bound = (price.evidence, price.bound) if price is not None else ("unpublished", "")
            lines.append(Line(event, float(mean), None if each is None else float(each), nj, evidence, bound, source))
    priced = any(line.pj is not None for line in lines)
    static = None
    if rate_hz is not None and target.static is not None:
        static = float(target.static.mw * 10**6 * fit.chips / Fraction(rate_hz))
    step, busiest = _step(plan, fit, target, operations, samples)
    return Cost(
        target.name,
        samples,
        tuple(lines),
        float(known / 1000) if priced else None,
        rate_hz,
        static,
        "" if target.static is None else target.static.source,
        step,
        busiest,
        None if step is None else step * (plan.latency + 1),
        target.references,
        tuple(term for term in target.not_modelled if term not in target.placed),
    )


def _at(fit: Fit, core: Core) -> tuple[int, int, int]:
    """The chip of a core, and its tile's column and row."""
    chip, within = divmod(core.number, fit.per_chip)
    return chip, within // PER_TILE % MESH[0], within // PER_TILE // MESH[0]


def _routed(plan: Plan, fit: Fit, sums: Sums) -> dict[str, int]:
    """Spikes to each core that they reach, and the tiles between."""
    counts = dict.fromkeys(("spikes", "hops_ew", "hops_ns", "between_chips"), 0)
    for group in plan.groups:
        leaving = [(c, plan[c.target]) for c in plan.connections if c.source == group.name]
        for core in fit.on(group.name):
            for tile in (t for t in core.tiles if t.group == group.name):
                reached: dict[int, NDArray[np.bool_]] = {}
                (c0, c1), (h0, h1), (w0, w1) = tile.box
                for c, consumer in leaving:
                    for other in fit.on(consumer.name):
                        for box in (t.box for t in other.tiles if t.group == consumer.name):
                            field = receptive_box(c, grid(group.shape), consumer, box)
                            mask = reached.setdefault(other.number, np.zeros((c1 - c0, h1 - h0, w1 - w0), dtype=bool))
                            at = tuple(
                                slice(max(f - t, 0), max(e - t, 0))
                                for (f, e), t in zip(field, (c0, h0, w0), strict=True)
                            )
                            mask[at] = True
                fired = sums[group.name][c0:c1, h0:h1, w0:w1]
                here = _at(fit, core)
                for number, mask in reached.items():
                    there, count = _at(fit, fit.cores[number]), int(fired[mask].sum())
                    counts["spikes"] += count
                    if here[0] != there[0]:
                        counts["between_chips"] += count
                        continue
                    counts["hops_ew"] += count * abs(here[1] - there[1])
                    counts["hops_ns"] += count * abs(here[2] - there[2])
    return counts


def _step(plan: Plan, fit: Fit, target: Target, operations: list[int], samples: int) -> tuple[float | None, int | None]:
    """A step's duration in nanoseconds: the busiest core's operations one after the other, and the barrier; and that core."""
    times = target.times
    if "synops" not in times or not fit.cores:
        return None, None
    into: dict[str, int] = {}
    for c, count in zip(plan.connections, operations, strict=True):
        into[c.target] = into.get(c.target, 0) + count
    update = times["neuron_updates"].ns if "neuron_updates" in times else Fraction(0)
    busy = []
    for core in fit.cores:
        work = Fraction(0)
        for tile in core.tiles:
            share = Fraction(tile.neurons, plan[tile.group].size)
            work += Fraction(into.get(tile.group, 0), samples) * share * times["synops"].ns + tile.neurons * update
        busy.append(work)
    number = max(range(len(busy)), key=lambda n: busy[n])
    barrier = times["barrier"].ns if "barrier" in times else Fraction(0)
    return float(busy[number] + barrier), number
