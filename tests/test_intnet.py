"""The integer network: what a valid one is, its equality, and the bounds that proofs rest on."""

from dataclasses import replace

import numpy as np
import pytest
from nets import ZOO, assert_same, random_net, samples

from s3nn_deploy.backends import reference
from s3nn_deploy.errors import DeployError
from s3nn_deploy.intnet import (
    INPUT,
    Conv2d,
    Dense,
    Input,
    IntNet,
    Population,
    Projection,
    check,
    clamp_thresholds,
    from_plain,
    integers,
    reach,
    signed_bits,
    to_plain,
    worst_case,
)


def test_integers_are_stored_in_the_narrowest_type_and_frozen() -> None:
    for values, dtype in (
        ([1, -128], np.int8),
        ([128], np.int16),
        ([1 << 20], np.int32),
        ([1 << 40], np.int64),
        ([2.0], np.int8),
        ([], np.int8),
    ):
        assert integers(values).dtype == dtype
    with pytest.raises(ValueError, match="read-only"):
        integers([1])[0] = 2
    for bad in ([0.5], [np.nan], [np.inf], [1e30], np.array([2**63], np.uint64), ["a"]):
        with pytest.raises(DeployError):
            integers(bad)


@pytest.mark.parametrize(
    ("low", "high", "bits"), [(0, 0, 1), (0, 1, 2), (-1, 0, 1), (-128, 127, 8), (-129, 0, 9), (0, 128, 9)]
)
def test_signed_bits(low: int, high: int, bits: int) -> None:
    assert signed_bits(low, high) == bits


@pytest.mark.parametrize("name", ZOO)
def test_equality_is_over_every_integer_and_survives_plain_data(name: str) -> None:
    net = ZOO[name]
    assert from_plain(*to_plain(net)) == net
    assert replace(net, provenance={"other": 1}) == net
    for index, population in enumerate(net.populations):
        for field in ("threshold", "bias"):
            if (values := getattr(population, field)) is not None:
                changed = replace(
                    population, **{field: values.astype(np.int64) + np.eye(len(values), dtype=np.int64)[0]}
                )
                assert (
                    replace(net, populations=(*net.populations[:index], changed, *net.populations[index + 1 :])) != net
                )


def test_reach_and_worst_case_are_attained() -> None:
    net = random_net(4, convolutional=False, residual=False)
    first = net.populations[0]
    low, high = reach(net, first)
    weight = first.projections[0].synapses.weight.astype(np.int64)
    for c in range(first.channels):
        assert int(weight[c] @ (np.where(weight[c] > 0, net.input.maximum, 0))) == high[c]
        assert int(weight[c] @ (np.where(weight[c] < 0, net.input.maximum, 0))) == low[c]
    assert worst_case(net, first) == int((np.abs(weight).sum(1) * net.input.maximum).max())


@pytest.mark.parametrize("seed", range(20))
def test_clamping_thresholds_changes_no_spike(seed: int) -> None:
    net = random_net(seed)
    far = replace(
        net,
        populations=tuple(
            p
            if p.threshold is None
            else replace(
                p, threshold=p.threshold.astype(np.int64) + np.where(np.arange(p.channels) % 3 == 0, 10**12, 0)
            )
            for p in net.populations
        ),
    )
    x = samples(net)
    clamped = clamp_thresholds(far)
    assert_same(reference.run(clamped, x), reference.run(far, x))
    for p in clamped.spiking:
        low, high = reach(clamped, p)
        assert np.all((p.threshold >= low) & (p.threshold <= high + 1))


def _pop(**changes: object) -> Population:
    made = {"name": "a", "shape": (2,), "projections": (Projection(INPUT, Dense(np.ones((2, 3)))),), "bias": [0, 0]}
    return Population(**{**made, **changes})


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (IntNet(Input((3,)), ()), "at least one population"),
        (IntNet(Input((3,), 0), (_pop(),)), "1 to 16 bits"),
        (IntNet(Input((0,)), (_pop(),)), "positive sizes"),
        (IntNet(Input((3,)), (_pop(name="a/b"),)), "a name of letters"),
        (IntNet(Input((3,)), (_pop(name="input"),)), "taken"),
        (IntNet(Input((3,)), (_pop(projections=()),)), "at least one projection"),
        (
            IntNet(Input((3,)), (_pop(projections=(Projection("b", Dense(np.ones((2, 3)))),)),)),
            "a source that comes before it",
        ),
        (IntNet(Input((4,)), (_pop(),)), r"weight \[out, 4\]"),
        (IntNet(Input((3,)), (_pop(shape=(3,), bias=[0] * 3),)), r"expected shape \(3,\), got \(2,\)"),
        (IntNet(Input((3,)), (_pop(threshold=[0, 0]),)), "either a threshold or a bias"),
        (IntNet(Input((3,)), (_pop(bias=None),)), "neither"),
        (IntNet(Input((3,)), (_pop(bias=[0]),)), r"bias; expected shape \(2,\)"),
        (IntNet(Input((3,)), (_pop(scale=[0.0, 1.0]),)), "finite positive"),
        (IntNet(Input((3,)), (_pop(bias=None, threshold=[0, 0]),)), "exactly one readout"),
        (IntNet(Input((3,)), (_pop(), _pop(name="b"))), "a readout before the end"),
        (IntNet(Input((3,)), (_pop(),), classes=("x",)), "expected 2 names"),
        (
            IntNet(
                Input((2, 4, 4)), (_pop(projections=(Projection(INPUT, Conv2d(np.ones((2, 1, 9, 9)), groups=2)),)),)
            ),
            "a kernel that fits",
        ),
        (
            IntNet(
                Input((3, 4, 4)), (_pop(projections=(Projection(INPUT, Conv2d(np.ones((2, 1, 1, 1)), groups=2)),)),)
            ),
            "channels and groups",
        ),
        (
            IntNet(Input((3,)), (_pop(projections=(Projection(INPUT, Dense(np.full((2, 3), 1 << 60))),)),)),
            "below 2\\^62",
        ),
    ],
)
def test_what_breaks_a_rule_is_refused(net: IntNet, words: str) -> None:
    with pytest.raises(DeployError, match=words):
        check(net)
