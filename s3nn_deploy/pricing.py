"""What exact counts cost on a target: a linear form, with the provenance of every term and the terms that are missing.

A bill charges the kinds of events that the target prices, and those that no machine avoids (`UNAVOIDABLE`), unless a
price says that it covers them. Arithmetic is exact (rationals and Python integers); floats appear in the bill only.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s3nn_deploy.counts import KINDS, Counts, Totals
from s3nn_deploy.errors import DeployError
from s3nn_deploy.intnet import IntNet, signed_bits
from s3nn_deploy.machine import synapses
from s3nn_deploy.targets import EVIDENCE, EXCLUSIVE, Price, Target, check_prices, load

UNAVOIDABLE = ("synops", "macs", "neuron_updates", "spikes")
"""Kinds of events that every machine pays for, whether its energy was published or not."""


@dataclass(frozen=True)
class Line:
    """One priced term: `count` events per inference (mean) at `pj` picojoules each make `nj` nanojoules."""

    event: str
    count: float
    pj: float
    nj: float
    evidence: str
    scope: str
    bound: str
    source: str


@dataclass(frozen=True)
class Distribution:
    """Nanojoules of one inference over the samples: mean, extremes, and nearest-rank percentiles."""

    mean: float
    min: float
    p5: float
    p95: float
    max: float


@dataclass(frozen=True)
class Bill:
    """Energy per inference in nanojoules, as far as it is known.

    Attributes:
        samples: over how many inferences the means are taken.
        rate_hz: inferences per second over which static power is spread; None: no static power is in the bill.
        unpriced: mean counts per inference of charged events that have no price.
        reasons: what the target says of the price that they do not have, where it says something.
        total: the mean energy, or None when something is unpriced.
        at_least: the sum of the lines, whether or not something is unpriced.
        per_population: the events' share of `at_least` (static power belongs to no population).
        distribution: of the known part, static power included.
        evidence: the weakest grade that the bill rests on; "unpublished" when something is unpriced.
        bound: "min" when some line is a lower bound, "max" when some is an upper one, "mixed" when both, else "".
        not_modelled: what the target says is in no line.
    """

    target: str
    samples: int
    rate_hz: float | None
    lines: tuple[Line, ...]
    unpriced: Mapping[str, float]
    reasons: Mapping[str, str]
    total: float | None
    at_least: float
    per_population: Mapping[str, float]
    distribution: Distribution
    evidence: str
    bound: str
    not_modelled: tuple[str, ...]


def price(counts: Counts | Totals, target: Target | str, rate_hz: float | None = None) -> Bill:
    """Price `counts` on `target`, as energy per inference.

    Args:
        counts: exact counts of at least one sample, or the totals of many.
        target: a target, or the name or path of one.
        rate_hz: inferences per second; adds the target's static power divided by it.

    Raises:
        DeployError: no samples, a rate that is not positive, or a rate for a target whose static power is unknown or
            already in an all-in price.
    """
    target = check_prices(target, target.name) if isinstance(target, Target) else load(target)
    samples = len(counts)
    if samples == 0:
        raise DeployError("counts", expected="at least one sample", got="none")
    totals = counts.totals if isinstance(counts, Counts) else counts
    known = {kind: target.events[kind] for kind in charged(target) if kind in target.events}
    each = {kind: p.each for kind, p in known.items() if p.each is not None}
    means = {
        kind: Fraction(sum(kinds[kind] for kinds in totals.populations.values()), samples) for kind in charged(target)
    }
    lines = [_line(kind, means[kind], pj, known[kind]) for kind, pj in each.items()]
    static = Fraction(0)
    if rate_hz is not None:
        static, source = _static(target, rate_hz)
        lines.append(_line("static", Fraction(1), static, source))
    spent = {
        name: sum((pj * kinds[kind] for kind, pj in each.items()), Fraction(0))
        for name, kinds in totals.populations.items()
    }
    energies, unit = _by_sample(totals, each)
    mean = _nj(sum(spent.values(), Fraction(0)) / samples + static)
    ranks = (_nj(Fraction(n, unit) + static) for n in _ranks(np.sort(energies)))
    unpriced = {kind: float(n) for kind, n in means.items() if n and kind not in each}
    used = [line.evidence for line in lines if line.count] + ["unpublished"] * bool(unpriced or not lines)
    bounds = sorted({line.bound for line in lines if line.bound and line.count})
    return Bill(
        target.name,
        samples,
        rate_hz,
        tuple(lines),
        unpriced,
        {kind: known[kind].source for kind in unpriced if kind in known},
        None if unpriced else mean,
        mean,
        {name: _nj(pj / samples) for name, pj in spent.items()},
        Distribution(mean, *ranks),
        max(used, key=EVIDENCE.index, default=EVIDENCE[0]),
        "mixed" if len(bounds) > 1 else "".join(bounds),
        target.not_modelled,
    )


def by_sample(totals: Totals, target: Target, bill: Bill) -> NDArray[np.float64]:
    """Nanojoules of each sample, [N], rounded to floats: what `bill.distribution` has the exact mean and ranks of."""
    each = {line.event: target.events[line.event].each for line in bill.lines if line.event != "static"}
    energies, unit = _by_sample(totals, {kind: pj for kind, pj in each.items() if pj is not None})
    static = sum(line.nj for line in bill.lines if line.event == "static")
    return energies.astype(np.float64) / (1000 * unit) + static


def _by_sample(totals: Totals, each: Mapping[str, Fraction]) -> tuple[NDArray[Any], int]:
    """The energy of each sample without static power, in integers of 1/unit pJ, and that unit."""
    unit = math.lcm(*(pj.denominator for pj in each.values()))
    rows = [(int(pj * unit), totals.samples[kind]) for kind, pj in each.items()]
    most = sum(pj * int(row.max()) for pj, row in rows)
    energies = np.zeros(len(totals), np.int64 if most < 1 << 63 else object)
    for pj, row in rows:
        energies += row.astype(energies.dtype) * pj
    return energies, unit


def twins(net: IntNet, counts: Counts | Totals, target: Target) -> dict[str, Bill]:
    """The bills of `net`'s twins without spikes: the same synapses and activity, multi-bit activations, on the same target.

    A dense twin computes every synapse and keeps a potential in a register until it is stored once; a zero-skipping one
    does what the spiking network does, with multiplications. Its share of zeros is taken to be that of the spikes, and
    an activation to cost what a spike does, both in the twin's favour or even. Integer twins have the network's weight
    bits, float ones 32 and the target's `float_macs`. No static power. A twin with an unpriced term is left out.
    """
    totals = counts.totals if isinstance(counts, Counts) else counts
    stored = {
        p.name: sum(
            synapses(net, j) * signed_bits(int(j.synapses.weight.min()), int(j.synapses.weight.max()))
            for j in p.projections
        )
        for p in net.populations
    }
    outputs = {p.name: p.size for p in net.spiking}
    made: dict[str, Bill] = {}
    chips = {"int": target}
    if target.float_macs is not None:
        chips["float32"] = replace(target, events={**target.events, "macs": target.float_macs})
    for of, chip in chips.items():
        for way in ("dense", "zero-skipping"):
            twin = partial(_twin, dense=way == "dense", floats=of == "float32")
            populations = {
                name: twin(kinds, stored[name] * len(totals), outputs.get(name, 0) * len(totals))
                for name, kinds in totals.populations.items()
            }
            sample = twin(totals.samples, sum(stored.values()), sum(outputs.values()))
            samples = {kind: np.broadcast_to(np.asarray(row), len(totals)) for kind, row in sample.items()}
            bill = price(Totals(populations, samples), chip)
            made |= {f"{of}, {way}": bill} if bill.total is not None else {}
    return made


def _twin(had: Mapping[str, Any], stored: int, outputs: int, dense: bool, floats: bool) -> dict[str, Any]:
    """The counts of a twin, from those of the network: Python ints, or an array [N] a kind."""
    had = {kind: row if isinstance(row, int) else row.astype(np.int64) for kind, row in had.items()}
    made = {**had, "synops": 0, "synops_nonzero": 0}
    made |= {kind: had[kind] + had[f"synops{kind[4:]}"] for kind in ("macs", "macs_nonzero")}
    if dense:
        made |= dict.fromkeys(("macs", "macs_nonzero"), had["dense_macs"])
        made |= dict.fromkeys(("membrane_reads", "membrane_writes"), had["neuron_updates"])
        made |= {"weight_bits": stored, "spikes": outputs}
    if floats:
        made["weight_bits"] = 32 * made["macs"]
    return made


def charged(target: Target) -> list[str]:
    """The kinds that a bill of `target` charges: those it lists, and the unavoidable ones that none of them covers."""
    covered = {kind for p in target.events.values() for kind in p.covers}
    covered |= {a for pair in EXCLUSIVE for a, b in (pair, pair[::-1]) if b in target.events}
    return [k for k in KINDS if k in target.events or (k in UNAVOIDABLE and k not in covered)]


def _static(target: Target, rate_hz: float) -> tuple[Fraction, Price]:
    """The static picojoules of one inference, and their provenance."""
    where = f"target {target.name!r}"
    if not (math.isfinite(rate_hz) and rate_hz > 0):
        raise DeployError("rate", expected="a positive number of inferences per second", got=repr(rate_hz))
    if any(p.scope == "all-in" for p in target.events.values()):
        raise DeployError(where, "its all-in price includes static power already", hint="Leave the rate out.")
    if target.static is None:
        raise DeployError(where, "its static power is unknown", hint="Leave the rate out, or add [static] to the file.")
    each = target.static.mw * 10**9 / Fraction(rate_hz)
    source = f"{target.static.source}; spread over {rate_hz:g} inferences per second"
    return each, Price(each, target.static.evidence, source)


def _line(event: str, count: Fraction, each: Fraction, of: Price) -> Line:
    return Line(event, float(count), float(each), _nj(count * each), of.evidence, of.scope, of.bound, of.source)


def _nj(pj: Fraction) -> float:
    return float(pj / 1000)


def _ranks(ordered: NDArray[Any]) -> tuple[int, int, int, int]:
    """Minimum, 5th percentile, 95th percentile and maximum by nearest rank."""
    p5, p95 = (int(ordered[max(0, -(-len(ordered) * percent // 100) - 1)]) for percent in (5, 95))
    return int(ordered[0]), p5, p95, int(ordered[-1])
