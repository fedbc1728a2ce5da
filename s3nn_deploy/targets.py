"""Targets: what a chip or accelerator takes, what it can hold, and what each event costs there, with provenance.

A target is a TOML file, shipped in `targets/` or the user's own. Every price says where it comes from, how good the
evidence is, and what it includes; what nobody published has no price, which is not the same as zero.
"""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from s3nn_deploy.counts import KINDS
from s3nn_deploy.errors import DeployError, suggestion
from s3nn_deploy.files import builtin, existing
from s3nn_deploy.formats import FORMATS
from s3nn_deploy.intnet import IntNet, Projection, reach, signed_bits
from s3nn_deploy.machine import Machine, Memory

EVIDENCE = ("metered", "measured", "fitted", "simulated", "derived", "unpublished")
"""How a price is known, the strongest first: a power meter on silicon, another measurement, a regression, a circuit
simulation, arithmetic on other numbers, not at all."""

SCOPES = ("marginal", "all-in")
"""Whether a price is that of one more event, or the whole machine's power divided by its events."""

EXCLUSIVE = (("synops", "synops_nonzero"), ("macs", "macs_nonzero"))
"""Kinds that count the same operations: a target prices one of each pair."""

MEMORIES = ("weights", "membranes", "spikes")
"""Memories of a machine's core; the price of an event may follow the size of one of them."""

LIMITS = {
    "input_bits": "bits of an input value",
    "weight_bits": "bits of a stored weight, two's complement",
    "state_bits": "bits of a membrane potential, two's complement",
    "fan_in": "source neurons of one neuron",
    "neurons_per_core": "neurons on one core",
    "synapse_bits_per_core": "bits of synaptic memory on one core",
    "cores": "cores on one chip",
    "message_bits": "bits of a spike's payload",
    "input_axons_per_core": "sources whose spikes reach one core",
    "output_axons_per_core": "pairs of a neuron on one core and a core that it reaches",
    "groups_per_core": "groups of neurons with a threshold of their own on one core",
    "synapse_bits": "bits of memory that one synapse takes",
    "kernel_weight_bits": "bits of memory that one shared weight of a convolution takes on each core that holds it",
}
"""Every limit that a target may state."""

TIMED = ("synops", "neuron_updates", "spikes", "hops_ew", "hops_ns", "barrier")
"""What a target may state the time of, nanoseconds each."""

ROUTED = ("hops_ew", "hops_ns")
"""What a spike costs beyond its core, priced by placement: tiles that it passes eastward or westward, north- or southward."""


@dataclass(frozen=True)
class Limit:
    """The largest admissible value of one of `LIMITS`, and the source of that number; `also`: what other sources say."""

    max: int
    source: str
    also: str = ""


@dataclass(frozen=True)
class Time:
    """How long one event takes; `bound` as for a price."""

    ns: Fraction
    evidence: str
    source: str
    bound: str = ""


@dataclass(frozen=True)
class Price:
    """What events of one kind cost.

    Attributes:
        pj: picojoules for `per` events; None when unpublished.
        per: how many of the counted events that buys (64 for bits read by 64-bit accesses).
        evidence: one of `EVIDENCE`.
        scope: one of `SCOPES`.
        bound: "min" or "max" where the source says so, else "".
        covers: other kinds of events that the price includes already.
    """

    pj: Fraction | None
    evidence: str
    source: str
    scope: str = "marginal"
    per: int = 1
    bound: str = ""
    covers: tuple[str, ...] = ()

    @property
    def each(self) -> Fraction | None:
        """Exact picojoules of one event."""
        return None if self.pj is None else self.pj / self.per


@dataclass(frozen=True)
class Static:
    """The power that a chip draws without events, in milliwatts."""

    mw: Fraction
    evidence: str
    source: str


@dataclass(frozen=True)
class Target:
    """A hardware description.

    Attributes:
        takes: the format that `export` writes for it (a key of `formats.FORMATS`), or None: it only has prices.
        limits: keys of `LIMITS`.
        events: prices of kinds of `counts.KINDS`.
        not_modelled: what costs energy there but is in no bill.
        placed: those of them that a placement accounts for.
        routing: prices of `ROUTED`.
        times: of kinds of `TIMED`.
        references: measurements of other networks on that chip, for comparison; each with its source.
        float_macs: price of a float32 multiply-accumulate, for the network's float twin.
        machine: the accelerator that is emulated, see `machine`; None: there is no description of one.
    """

    name: str
    summary: str
    takes: str | None = None
    limits: Mapping[str, Limit] = field(default_factory=dict)
    events: Mapping[str, Price] = field(default_factory=dict)
    static: Static | None = None
    not_modelled: tuple[str, ...] = ()
    placed: tuple[str, ...] = ()
    routing: Mapping[str, Price] = field(default_factory=dict)
    times: Mapping[str, Time] = field(default_factory=dict)
    references: tuple[str, ...] = ()
    machine: Machine | None = None
    float_macs: Price | None = None


def names() -> list[str]:
    """The shipped targets."""
    return sorted(path.stem for path in builtin("targets").glob("*.toml"))


def load(name: str | Path, changes: Mapping[str, str] | None = None) -> Target:
    """The shipped target of that name, or the one in a user's TOML file (a path with a suffix or a folder).

    Args:
        changes: dotted keys that the file has, and TOML values for them.

    Raises:
        DeployError: no such target, not TOML, an unknown or misspelt key, or a price without source or evidence.
    """
    path = Path(name)
    if path.suffix != ".toml" and len(path.parts) <= 1:
        if str(name) not in names():
            hint = f"{suggestion(str(name), names())} For a file of your own, give its path: ./my.toml."
            raise DeployError(f"target {str(name)!r}", "is not known", hint=hint)
        path = builtin("targets") / f"{name}.toml"
    try:
        plain = tomllib.loads(existing(path).read_text(encoding="utf-8"), parse_float=_exact)
    except (ValueError, OSError, RecursionError) as error:
        raise DeployError(str(path), f"is not readable TOML ({error})") from error
    for key, value in (changes or {}).items():
        _change(plain, key, value, str(path))
    return _target(plain, str(path))


def _change(plain: dict[str, Any], key: str, value: str, where: str) -> None:
    """Put the TOML `value` at the dotted `key`, which must be there already."""
    *path, last = key.split(".")
    table: Any = plain
    for name in path:
        table = table.get(name) if isinstance(table, dict) else None
    if not isinstance(table, dict) or last not in table or isinstance(table[last], dict):
        raise DeployError(
            where, f"has no value at {key!r} to change", hint="`s3nn-deploy targets NAME` shows the keys."
        )
    try:
        table[last] = tomllib.loads(f"value = {value}", parse_float=_exact)["value"]
    except ValueError as error:
        raise DeployError(f"{where}, {key}", f"{value!r} is not a TOML value ({error})") from error


def _exact(text: str) -> Fraction:
    number = Decimal(text)
    if not number.is_finite() or abs(number.adjusted()) > 30:
        raise ValueError(f"the number {text} is out of range")
    return Fraction(number)


def _target(plain: Mapping[str, Any], where: str) -> Target:
    keys = ["name", "summary", "takes", "limits", "events", "static", "not_modelled", "routing", "times", "references"]
    keys += ["machine", "twins"]
    _known(plain, keys, where)
    takes = _text(plain, "takes", where) if "takes" in plain else None
    if takes is not None and takes not in FORMATS:
        raise DeployError(f"{where}, takes", f"format {takes!r} is not known", hint=suggestion(takes, list(FORMATS)))
    limits, events = _table(plain, "limits", where), _table(plain, "events", where)
    machine = _machine(_table(plain, "machine", where), f"{where}, [machine]") if "machine" in plain else None
    _known(limits, list(LIMITS), f"{where}, [limits]")
    _known(events, list(KINDS), f"{where}, [events]")
    routing, times = _table(plain, "routing", where), _table(plain, "times", where)
    _known(routing, list(ROUTED), f"{where}, [routing]")
    _known(times, list(TIMED), f"{where}, [times]")
    return check_prices(
        Target(
            _text(plain, "name", where),
            _text(plain, "summary", where),
            takes,
            {key: _limit(_table(limits, key, where), f"{where}, [limits.{key}]") for key in limits},
            {key: _price(_table(events, key, where), f"{where}, [events.{key}]", machine) for key in events},
            _static(_table(plain, "static", where), f"{where}, [static]") if "static" in plain else None,
            _terms(_table(plain, "not_modelled", where), f"{where}, [not_modelled]"),
            _strings(_table(plain, "not_modelled", where), "placed", f"{where}, [not_modelled]"),
            {key: _price(_table(routing, key, where), f"{where}, [routing.{key}]") for key in routing},
            {key: _time(_table(times, key, where), f"{where}, [times.{key}]") for key in times},
            _strings(_table(plain, "references", where), "measured", f"{where}, [references]"),
            machine,
            _float_macs(_table(plain, "twins", where), f"{where}, [twins]"),
        ),
        where,
    )


def check_prices(target: Target, where: str) -> Target:
    """Return `target` if no operation is priced twice in it; `where` names it in errors.

    Raises:
        DeployError: two kinds count the same operations, a covered kind has an entry, an all-in price is among others.
    """
    for pair in EXCLUSIVE:
        if set(pair) <= set(target.events):
            raise DeployError(
                f"{where}, [events]",
                f"{pair[0]!r} and {pair[1]!r} count the same operations",
                hint="Price one of them.",
            )
    if "dense_macs" in target.events:
        raise DeployError(f"{where}, [events.dense_macs]", "is what another machine would do, and is never charged")
    priced = {kind for kind, price in target.events.items() if price.pj is not None}
    for kind, price in target.events.items():
        if twice := sorted(set(price.covers) & set(target.events)):
            raise DeployError(f"{where}, [events.{kind}]", f"covers {twice[0]!r}, which has an entry of its own")
        if price.scope == "all-in" and (priced != {kind} or target.static):
            raise DeployError(
                f"{where}, [events.{kind}]",
                "an all-in price includes the rest of the machine",
                expected="no other price and no [static]",
                hint="Name what it includes in `covers`.",
            )
    return target


def _limit(plain: Mapping[str, Any], where: str) -> Limit:
    _known(plain, ["max", "source", "also"], where)
    also = _text(plain, "also", where) if "also" in plain else ""
    return Limit(_positive(plain, "max", where), _text(plain, "source", where), also)


def _time(plain: Mapping[str, Any], where: str) -> Time:
    _known(plain, ["ns", "evidence", "source", "bound"], where)
    evidence = _choice(plain, "evidence", EVIDENCE[:-1], where)
    bound = _choice(plain, "bound", ("min", "max"), where) if "bound" in plain else ""
    return Time(_number(plain, "ns", where), evidence, _text(plain, "source", where), bound)


def _price(plain: Mapping[str, Any], where: str, machine: Machine | None = None) -> Price:
    _known(plain, ["pj", "per", "evidence", "scope", "bound", "covers", "source", "memory", "pj_at"], where)
    if "memory" in plain or "pj_at" in plain:
        plain = _by_size(plain, where, machine)
    evidence = _choice(plain, "evidence", EVIDENCE, where)
    if (evidence == "unpublished") == ("pj" in plain):
        raise DeployError(
            where,
            expected="no pj where the evidence is 'unpublished', and a pj elsewhere",
            got=f"evidence {evidence!r} {'with' if 'pj' in plain else 'without'} pj",
            hint="An unpublished price is not zero: leave it out.",
        )
    covers = _strings(plain, "covers", where)
    for kind in covers:
        _known({kind: None}, list(KINDS), f"{where}, covers")
    return Price(
        _number(plain, "pj", where) if "pj" in plain else None,
        evidence,
        _text(plain, "source", where),
        _choice(plain, "scope", SCOPES, where) if "pj" in plain else "marginal",
        _positive(plain, "per", where) if "per" in plain else 1,
        _choice(plain, "bound", ("min", "max"), where) if "bound" in plain else "",
        covers,
    )


def _by_size(plain: Mapping[str, Any], where: str, machine: Machine | None) -> dict[str, Any]:
    """The price whose `pj` is that of the smallest priced memory, in `pj_at`, that holds the machine's `memory`; with none
    that does, an unpublished one."""
    if machine is None:
        raise DeployError(where, "its price follows the size of a memory", expected="a [machine] in the file")
    if "pj" in plain:
        raise DeployError(where, "has both pj and pj_at", hint="Keep pj where the price follows no memory's size.")
    name, prices = _choice(plain, "memory", MEMORIES, where), _table(plain, "pj_at", where)
    if wrong := [key for key in prices if not key.isascii() or not key.isdecimal()]:
        raise DeployError(f"{where}, pj_at", expected="bytes of a memory = picojoules", got=repr(wrong[0]))
    if not prices:
        raise DeployError(f"{where}, pj_at", expected="bytes of a memory = picojoules", got="none")
    size, sizes = getattr(machine, name).bytes, sorted(prices, key=int)
    source = _text(plain, "source", where)
    rest = {key: value for key, value in plain.items() if key not in ("memory", "pj_at", "source")}
    if (chosen := next((key for key in sizes if int(key) >= size), None)) is None:
        why = f"no price for {name} of {size:,} bytes, the largest with one has {int(sizes[-1]):,}"
        return {**rest, "evidence": "unpublished", "source": why}
    source = f"{source}; the price of a memory of {int(chosen):,} bytes"
    return {**rest, "pj": _number(prices, chosen, f"{where}, pj_at"), "source": source}


def _static(plain: Mapping[str, Any], where: str) -> Static:
    _known(plain, ["mw", "evidence", "source"], where)
    evidence = _choice(plain, "evidence", EVIDENCE[:-1], where)
    return Static(_number(plain, "mw", where), evidence, _text(plain, "source", where))


def _float_macs(plain: Mapping[str, Any], where: str) -> Price | None:
    _known(plain, ["float_macs"], where)
    return _price(_table(plain, "float_macs", where), f"{where}, float_macs") if plain else None


def _machine(plain: Mapping[str, Any], where: str) -> Machine:
    numbers = ["cores", "elements", "clock_mhz", "accumulator_bits", "event_bits", "weight_bits"]
    _known(plain, [*numbers, *MEMORIES, "source"], where)
    sizes = {}
    for key in MEMORIES:
        table, here = _table(plain, key, where), f"{where}, {key}"
        _known(table, ["bytes", "width"], here)
        sizes[key] = Memory(_positive(table, "bytes", here), _positive(table, "width", here))
    cores, elements, clock, accumulator, event, weight = (_positive(plain, key, where) for key in numbers)
    for key, value, most in (("cores", cores, 4096), ("elements", elements, 1 << 20), ("clock_mhz", clock, 100_000)):
        if value > most:
            raise DeployError(where, key, expected=f"at most {most:,}", got=f"{value:,}")
    source = _text(plain, "source", where)
    queue, potentials = sizes["spikes"], sizes["membranes"]
    made = Machine(cores, elements, clock, accumulator, event, weight, sizes["weights"], potentials, queue, source)
    for width, one, what in (
        (made.weights.width, made.weight_bits, "weight"),
        (made.membranes.width, made.accumulator_bits, "potential"),
    ):
        if width < one:
            raise DeployError(where, f"a word of {width} bits holds no {what}", expected=f"at least {one} bits")
    return made


def _terms(plain: Mapping[str, Any], where: str) -> tuple[str, ...]:
    _known(plain, ["terms", "placed"], where)
    return (*_strings(plain, "terms", where), *_strings(plain, "placed", where))


def _known(plain: Mapping[str, Any], keys: list[str], where: str) -> None:
    for key in plain:
        if key not in keys:
            raise DeployError(where, f"unknown key {key!r}", hint=suggestion(key, keys))


def _table(plain: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    value = plain.get(key, {})
    if not isinstance(value, dict):
        raise DeployError(where, key, expected="a table", got=repr(value))
    return value


def _text(plain: Mapping[str, Any], key: str, where: str) -> str:
    value = plain.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DeployError(where, key, expected="a text", got="nothing" if value is None else repr(value))
    return value


def _strings(plain: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = plain.get(key, [])
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise DeployError(where, key, expected="a list of texts", got=repr(value))
    return tuple(value)


def _choice(plain: Mapping[str, Any], key: str, known: tuple[str, ...], where: str) -> str:
    value = _text(plain, key, where)
    if value not in known:
        raise DeployError(where, f"{key} {value!r} is not known", hint=suggestion(value, list(known)))
    return value


def _number(plain: Mapping[str, Any], key: str, where: str) -> Fraction:
    value = plain.get(key)
    if isinstance(value, bool) or not isinstance(value, int | Fraction) or value < 0:
        raise DeployError(
            where,
            key,
            expected="a number of at least 0",
            got=f"{float(value):g}" if isinstance(value, Fraction) else repr(value),
        )
    return Fraction(value)


def _positive(plain: Mapping[str, Any], key: str, where: str) -> int:
    value = plain.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise DeployError(where, key, expected="an integer of at least 1", got=repr(value))
    return value


def check_limits(net: IntNet, target: Target) -> None:
    """Hold `net` against the limits that `target` states. They are necessary; whether a mapping exists, its tools say.

    Raises:
        DeployError: names the population, the value, the limit with its source, and the way out.
    """
    if net.input.bits > _most(target, "input_bits"):
        raise _exceeded(target, "input_bits", "input", f"{net.input.bits} bits", "Train with coarser or binary input.")
    for population in net.populations:
        where = f"population {population.name!r}"
        bias = np.zeros(population.channels, dtype=np.int64) if population.bias is None else population.bias
        lows, highs = reach(net, population)
        low, high = int((lows + np.minimum(bias, 0)).min()), int((highs + np.maximum(bias, 0)).max())
        if (bits := signed_bits(low, high)) > _most(target, "state_bits"):
            raise _exceeded(
                target,
                "state_bits",
                where,
                f"{bits} bits (it can reach {low:,} to {high:,})",
                "Train with fewer weight or input bits, or a smaller fan-in.",
            )
        fan_in: dict[str, int] = {}
        for projection in population.projections:
            weight, source = projection.synapses.weight, projection.source
            if (bits := _weight_bits(projection)) > _most(target, "weight_bits"):
                raise _exceeded(
                    target,
                    "weight_bits",
                    where,
                    f"{bits} bits (weights {weight.min()} to {weight.max()})",
                    f"Train with at most {_most(target, 'weight_bits')} weight bits.",
                )
            seen = min(weight[0].size, math.prod(net.source(projection).shape))
            fan_in[source] = max(fan_in.get(source, 0), seen)
        if (total := sum(fan_in.values())) > _most(target, "fan_in"):
            raise _exceeded(target, "fan_in", where, f"{total:,}", "Put a convolution or pooling before it.")
    _check_chip(net, target)


def _check_chip(net: IntNet, target: Target) -> None:
    """The whole network on one chip; shared weights count once, as the most economical mapping would hold them."""
    cores = target.limits["cores"].max if "cores" in target.limits else 1
    neurons = {p.name: p.size for p in net.populations}
    memory = {p.name: sum(_weight_bits(j) * j.synapses.weight.size for j in p.projections) for p in net.populations}
    for key, amounts, hint in (
        ("neurons_per_core", neurons, "Train with fewer channels, or pool earlier."),
        ("synapse_bits_per_core", memory, "Train with fewer weight bits or smaller layers."),
    ):
        if sum(amounts.values()) > cores * _most(target, key):
            largest = max(amounts, key=lambda name: amounts[name])
            got = f"{sum(amounts.values()):,}, of which population {largest!r} has {amounts[largest]:,}"
            raise _exceeded(target, key, "network", got, hint, cores)


def _weight_bits(projection: Projection) -> int:
    weight = projection.synapses.weight
    return signed_bits(int(weight.min()), int(weight.max()))


def _most(target: Target, key: str) -> float:
    return target.limits[key].max if key in target.limits else math.inf


def _exceeded(target: Target, key: str, where: str, got: str, hint: str, cores: int = 0) -> DeployError:
    limit = target.limits[key]
    most = f"at most {limit.max:,}" + (f" x {cores} cores = {limit.max * cores:,}" if cores else "")
    expected = f"{most} ({LIMITS[key]}; {limit.source})"
    return DeployError(where, f"exceeds {key} of target {target.name!r}", expected=expected, got=got, hint=hint)
