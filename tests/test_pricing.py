"""A bill is an exact linear form of the counts; what nobody priced is named, and then there is no total."""

import json
from dataclasses import asdict
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import ZOO, samples

from s3nn_deploy.backends import run
from s3nn_deploy.counts import KINDS, Counts, join
from s3nn_deploy.errors import DeployError
from s3nn_deploy.pricing import charged, price, twins
from s3nn_deploy.targets import Price, Static, Target, load, names

SPIKES, IMAGES = (run(ZOO[name], samples(ZOO[name], 21)).counts for name in ("mlp", "lenet"))
PRICED = [name for name in names() if any(p.pj is not None for p in load(name).events.values())]


def counts(**events: list[int]) -> Counts:
    """Counts of one population, zero where not given."""
    n = len(next(iter(events.values())))
    return Counts({"layer": {kind: np.array(events.get(kind, [0] * n), dtype=np.int64) for kind in KINDS}})


def scaled(counted: Counts, factor: int) -> Counts:
    return Counts({p: {kind: n * factor for kind, n in kinds.items()} for p, kinds in counted.events.items()})


def target(static: Static | None = None, **events: Price) -> Target:
    return Target("mine", "a chip", events=events, static=static)


def at(pj: str, evidence: str = "metered", **more: object) -> Price:
    return Price(Fraction(pj), evidence, "a paper", **more)


FULL = {"synops": at("0.1"), "macs": at("0.3"), "neuron_updates": at("7"), "spikes": at("1.5")}


@pytest.mark.parametrize("name", PRICED)
@pytest.mark.parametrize("factor", [2, 1024])
def test_doubled_counts_double_the_bill_exactly(name, factor):
    once, more = price(IMAGES, name), price(scaled(IMAGES, factor), name)
    assert more.at_least == factor * once.at_least
    assert [line.nj for line in more.lines] == [factor * line.nj for line in once.lines]
    assert more.per_population == {p: factor * nj for p, nj in once.per_population.items()}
    assert more.distribution.p5 == factor * once.distribution.p5
    assert more.distribution.max == factor * once.distribution.max


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 1 << 40)] * 4), min_size=1, max_size=9))
def test_the_bill_is_the_rational_sum_of_counts_times_prices(rows):
    kinds = dict(zip(FULL, map(list, zip(*rows, strict=True)), strict=True))
    bill = price(counts(**kinds), target(**FULL))
    exact = [sum(FULL[kind].pj * n for kind, n in zip(FULL, row, strict=True)) for row in rows]
    assert bill.total == bill.at_least == bill.distribution.mean == float(sum(exact) / len(rows) / 1000)
    assert (bill.distribution.min, bill.distribution.max) == (float(min(exact) / 1000), float(max(exact) / 1000))
    assert bill.per_population == {"layer": bill.total}


def test_a_bill_does_not_depend_on_the_batches():
    parts = [run(ZOO["lenet"], part).counts for part in np.split(samples(ZOO["lenet"], 21), [4, 5])]
    assert price(join(parts), "emulator") == price(IMAGES, "emulator")


def test_a_worked_example():
    bill = price(
        counts(synops=[100, 300], neuron_updates=[10, 10], weight_bits=[800, 2400]),
        target(**FULL, weight_bits=at("100", "derived", per=64)),
    )
    assert [(line.event, line.count, line.pj, line.nj) for line in bill.lines if line.count] == [
        ("synops", 200.0, 0.1, 0.02),
        ("neuron_updates", 10.0, 7.0, 0.07),
        ("weight_bits", 1600.0, 1.5625, 2.5),
    ]
    assert (bill.total, bill.evidence, bill.samples, bill.bound) == (2.59, "derived", 2, "")


def test_percentiles_are_samples():
    spread = price(counts(synops=list(range(100, 0, -1))), target(synops=at("1000"))).distribution
    assert (spread.min, spread.p5, spread.p95, spread.max) == (1, 5, 95, 100)


def test_an_unpriced_event_leaves_no_total():
    some = {kind: p for kind, p in FULL.items() if kind != "spikes"}
    bill = price(counts(synops=[10], spikes=[3]), target(**some))
    assert bill.total is None
    assert bill.unpriced == {"spikes": 3.0}
    assert bill.at_least == 0.001
    assert bill.evidence == "unpublished"


def test_an_unpublished_price_is_not_zero():
    bill = price(counts(synops=[10]), target(**{**FULL, "synops": Price(None, "unpublished", "nobody")}))
    assert (bill.total, bill.unpriced) == (None, {"synops": 10.0})


def test_an_unpriced_event_that_did_not_occur_does_not_matter():
    some = {kind: p for kind, p in FULL.items() if kind != "macs"}
    assert price(counts(synops=[10]), target(**some)).total == 0.001


def test_no_operation_is_charged_twice():
    nonzero = target(synops_nonzero=at("1"), macs=at("1"), neuron_updates=at("1"), spikes=at("1"))
    assert charged(nonzero) == ["synops_nonzero", "macs", "spikes", "neuron_updates"]
    assert price(counts(synops=[9], synops_nonzero=[5], dense_macs=[99]), nonzero).total == 0.005
    with pytest.raises(DeployError, match="count the same operations"):
        price(SPIKES, target(synops=at("1"), synops_nonzero=at("1")))


def test_a_price_may_cover_other_events():
    covering = target(synops=at("8.43", covers=("neuron_updates", "spikes")))
    assert price(counts(synops=[1000], neuron_updates=[50], spikes=[7]), covering).total == 8.43


def test_an_all_in_price_takes_no_other_terms():
    truenorth = load("truenorth")
    bill = price(SPIKES, truenorth)
    assert [line.event for line in bill.lines] == ["synops"]
    assert bill.total == float(Fraction(26 * int(SPIKES.total("synops").sum()), 21 * 1000))
    with pytest.raises(DeployError, match="includes static power already"):
        price(SPIKES, truenorth, rate_hz=100)
    with pytest.raises(DeployError, match="all-in price includes the rest"):
        price(SPIKES, target(synops=at("26", scope="all-in"), spikes=at("1")))


def test_a_chip_for_spikes_has_no_total_for_multi_bit_input():
    for name in ("loihi", "truenorth"):
        assert price(IMAGES, name).total is None
        assert set(price(IMAGES, name).unpriced) == {"macs"}
        assert price(SPIKES, name).total > 0
    assert price(SPIKES, "loihi").bound == "min"


def test_a_target_without_prices_bills_nothing_and_says_so():
    for name in ("loihi2", "nir", "onnx"):
        bill = price(IMAGES, name)
        assert (bill.lines, bill.total, bill.at_least, bill.evidence) == ((), None, 0.0, "unpublished")
        assert set(bill.unpriced) == {"synops", "macs", "neuron_updates", "spikes"}


def test_the_emulator_prices_every_event():
    for counted in (SPIKES, IMAGES):
        bill = price(counted, "emulator")
        assert bill.unpriced == {}
        assert bill.total == bill.at_least > 0
        assert set(bill.per_population) == set(counted.events)
        assert bill.evidence == "derived"


def test_static_power_is_charged_at_a_stated_rate_only():
    chip = target(Static(Fraction(104), "derived", "a paper"), **FULL)
    counted = counts(synops=[10, 30])
    assert [line.event for line in price(counted, chip).lines] == ["synops", "macs", "spikes", "neuron_updates"]
    bill = price(counted, chip, rate_hz=1000)
    assert bill.lines[-1].event == "static"
    assert bill.lines[-1].nj == 104_000.0
    assert bill.total == 104_000.002
    assert bill.distribution.min == 104_000.001
    assert bill.evidence == "derived"
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(DeployError, match="a positive number"):
            price(counted, chip, rate_hz=wrong)
    with pytest.raises(DeployError, match="static power is unknown"):
        price(counted, target(**FULL), rate_hz=10)


def test_the_evidence_is_the_weakest_that_was_used():
    mixed = {**FULL, "synops": at("1", "simulated", bound="min"), "macs": at("1", "derived", bound="max")}
    assert price(counts(synops=[1]), target(**mixed)).evidence == "simulated"
    assert price(counts(synops=[1], macs=[1]), target(**mixed)).evidence == "derived"
    assert price(counts(synops=[1], macs=[1]), target(**mixed)).bound == "mixed"
    assert price(counts(spikes=[1]), target(**mixed)).bound == ""


def test_no_samples_have_no_bill():
    with pytest.raises(DeployError, match="at least one sample"):
        price(counts(synops=[]), target(**FULL))


def test_a_bill_is_plain_data():
    plain = json.loads(json.dumps(asdict(price(IMAGES, "loihi", rate_hz=30))))
    assert plain["total"] is None
    assert {line["event"] for line in plain["lines"]} == {"synops", "neuron_updates", "spikes", "static"}
    assert all(line["source"] and line["evidence"] for line in plain["lines"])


@pytest.mark.parametrize("name", ["mlp", "lenet", "residual"])
def test_twins_cost_the_same_synapses_multiplied(name):
    net, chip = ZOO[name], load("emulator")
    counted = run(net, samples(net, 5)).counts
    bills = {twin: {line.event: line for line in bill.lines} for twin, bill in twins(net, counted, chip).items()}
    mean = lambda kind: float(counted.total(kind).sum() / 5)  # noqa: E731
    for twin, lines in bills.items():
        skips, floats = "zero-skipping" in twin, "float32" in twin
        kinds = ("synops", "macs") if skips else ("dense_macs",)
        operations = float(sum(int(counted.total(kind).sum()) for kind in kinds) / 5)
        assert (lines["synops"].count, lines["macs"].count) == (0, operations)
        assert lines["macs"].pj == (4.6 if floats else 0.3)
        if floats:
            assert lines["weight_bits"].count * 5 == 32 * sum(int(counted.total(kind).sum()) for kind in kinds)
    assert bills["int, zero-skipping"]["weight_bits"].count == mean("weight_bits")
