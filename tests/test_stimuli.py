"""Inputs that bite: every threshold is met exactly where that is possible, and a population by itself is what it is."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import ZOO, random_net, samples

from s3nn_deploy.backends import reference
from s3nn_deploy.intnet import INPUT, Conv2d, Dense, Input, IntNet, Population, Projection, check
from s3nn_deploy.stimuli import Isolated, injection, isolated, membrane_potential, nearest, solve, stimuli, sums


def preactivation() -> IntNet:
    """A network whose populations read the graded input beside spikes, and spikes of three sizes."""
    draw = np.random.default_rng(7)

    def conv(out: int, into: int, **options: object) -> Conv2d:
        return Conv2d(draw.integers(-20, 21, (out, into, 3, 3)), **options)

    first = Projection(INPUT, conv(4, 2, padding=(1, 1)))
    populations = (
        Population("a", (4, 8, 9), (first,), threshold=[100, -100, 0, 900]),
        Population("b", (4, 8, 9), (first, Projection("a", conv(4, 4, padding=(1, 1)))), threshold=[77, -50, 0, 300]),
        Population("c", (3, 3, 4), (Projection("b", conv(3, 4, stride=(2, 2))),), threshold=[1, 5, -9]),
        Population("d", (6,), (Projection("c", Dense(draw.integers(-9, 10, (6, 36)))),), threshold=[0, 1, 2, 3, 4, 5]),
        Population(
            "e",
            (5,),
            tuple(Projection(s, Dense(draw.integers(-9, 10, (5, n)))) for s, n in (("d", 6), ("a", 288), ("c", 36))),
            threshold=[0, 3, -3, 8, 20],
        ),
        Population(
            "out", (2,), (Projection("e", Dense([[1, -2, 3, -4, 5], [0, 1, 0, 1, 0]])),), bias=[1, 2], scale=[1, 1]
        ),
    )
    return check(IntNet(Input((2, 8, 9)), populations))


NETS = {**ZOO, "preactivation": preactivation()}


def test_stimuli_bite() -> None:
    net = ZOO["lenet"]
    x = stimuli(net, 64)
    assert not x[0].any()
    assert (x[1] == net.input.maximum).all()
    assert [int((x[i] != 0).sum()) for i in (2, 6, 10)] == [1, 1, 1]
    assert np.array_equal(x, stimuli(net, 64))


def whole_as_isolated(alone: Isolated, signals: dict[str, np.ndarray]) -> np.ndarray:
    """Inputs of a population by itself in which its sources give `signals`."""
    n = len(next(iter(signals.values())))
    x = np.zeros((n, *alone.net.input.shape), np.uint8)
    for name, place in alone.places.items():
        x[(slice(None), *place)] = signals[name].reshape(x[(slice(None), *place)].shape)
    return x


@pytest.mark.parametrize("name", NETS)
def test_a_population_by_itself_does_what_it_does_in_the_network(name: str) -> None:
    net, x = NETS[name], samples(NETS[name], 8)
    trace = reference.run(net, x)
    for population in net.populations:
        alone = isolated(net, population)
        assert alone is not None
        inputs = whole_as_isolated(alone, {INPUT: x, **trace.spikes})
        sources = alone.sources(inputs)
        for source in alone.places:
            assert np.array_equal(sources[source], x if source == INPUT else trace.spikes[source])
        got = reference.run(alone.net, inputs)
        if population.spiking:
            assert np.array_equal(got.spikes[population.name], trace.spikes[population.name])
        else:
            assert np.array_equal(got.readout, trace.readout)


@pytest.mark.parametrize("name", NETS)
def test_every_threshold_is_met_from_both_sides_and_exactly_where_it_can_be(name: str) -> None:
    net = NETS[name]
    for population in net.spiking:
        alone = isolated(net, population)
        assert alone is not None
        made = injection(alone)
        covered, spikes = made.coverage, reference.run(alone.net, made.x).spikes
        assert (covered.pinned, covered.undecided) == (covered.channels, 0)
        assert (covered.at, covered.below) == (covered.at_reachable, covered.below_reachable)
        assert covered.weights_pinned == covered.weights or name == "chain2"  # kernels there see padding everywhere
        theta, exact = population.threshold.tolist(), set()
        for point in made.points:
            signals = {INPUT: made.x[point.sample], **{n: s[point.sample] for n, s in spikes.items()}}
            assert membrane_potential(alone.net, population.name, point.neuron, signals) == point.u
            fires = spikes[population.name][(point.sample, *point.neuron)]
            assert fires == (point.u >= theta[point.neuron[0]])
            exact.add((point.neuron[0], point.u - theta[point.neuron[0]]))
        assert sum(distance == 0 for _, distance in exact) == covered.at
        assert sum(distance == -1 for _, distance in exact) == covered.below


def test_almost_every_channel_of_the_shared_networks_is_met_exactly() -> None:
    covered = [injection(isolated(net, p)).coverage for net in ZOO.values() for p in net.spiking]
    assert sum(c.at for c in covered) == sum(
        c.channels for c in covered
    )  # nets.with_thresholds puts them where u comes


def test_the_same_inputs_are_made_again() -> None:
    alone = isolated(ZOO["residual"], ZOO["residual"]["b2"])
    assert np.array_equal(injection(alone).x, injection(alone).x)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(-12, 12), st.integers(1, 2)), min_size=1, max_size=6),
    st.integers(-80, 80),
    st.data(),
)
def test_sums_are_those_that_exist(weighted: list[tuple[int, int]], threshold: int, data: st.DataObject) -> None:
    weight, bits = np.array([w for w, _ in weighted]), np.array([b for _, b in weighted])
    every = np.unique(np.array([v @ weight for v in np.ndindex(*(1 << bits))]))
    of = sums(weight, bits)
    assert (of.low, of.high) == (every.min(), every.max())
    above, below = every[every >= threshold], every[every < threshold]
    assert nearest(of, threshold) == (above.min() if above.size else None, below.max() if below.size else None)
    target = data.draw(st.integers(of.low - 1, of.high + 1))
    v = solve(of, target, np.array([True] * len(weight)), np.random.default_rng(0))
    assert (v is not None) == (target in every)
    if v is not None:
        assert v @ weight == target
        assert np.all((v >= 0) & (v < 1 << bits))


@pytest.mark.parametrize(("fan_in", "bits"), [(3000, 1), (75, 8), (500, 4)])
def test_wide_neurons_are_brought_to_any_potential(fan_in: int, bits: int) -> None:
    draw = np.random.default_rng(fan_in)
    weight = draw.integers(-127, 128, fan_in)
    of = sums(weight, np.full(fan_in, bits))
    for target in [0, 1, -1, *draw.integers(of.low // 2, of.high // 2, 20).tolist()]:
        v = solve(of, target, np.zeros(fan_in, bool), draw)
        assert v is not None
        assert v @ weight == target


def test_a_small_budget_says_what_was_left_undecided() -> None:
    net = random_net(4, convolutional=False)
    wide = Population(
        "wide", (64,), (Projection(INPUT, Dense(np.ones((64, net.input.shape[0]), int))),), threshold=[3] * 64
    )
    out = Population("out", (1,), (Projection("wide", Dense(np.ones((1, 64), int))),), bias=[0], scale=[1])
    alone = isolated(check(IntNet(net.input, (wide, out))), wide)
    covered = injection(alone, budget=10 * 64 * net.input.shape[0]).coverage
    assert (covered.channels, covered.at, covered.pinned, covered.undecided) == (64, 5, 5, 59)


def test_a_population_beside_a_larger_source_than_the_input_is_left_out() -> None:
    net = preactivation()
    big = Conv2d(np.ones((4, 2, 1, 1)), padding=(1, 1))
    a = Population("a", (4, 10, 11), (Projection(INPUT, big),), threshold=[9] * 4)
    joined = (Projection(INPUT, Conv2d(np.ones((1, 2, 1, 1)))), Projection("a", Conv2d(np.ones((1, 4, 3, 3)))))
    b = Population("b", (1, 8, 9), joined, threshold=[9])
    out = Population("out", (1,), (Projection("b", Dense(np.ones((1, 72)))),), bias=[0], scale=[1])
    made = check(replace(net, populations=(a, b, out)))
    assert isolated(made, b) is None
    assert isolated(made, a) is not None
