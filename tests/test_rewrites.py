"""Exact rewrites: no spike and no readout changes, for any input."""

import itertools
from dataclasses import replace

import nets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3nn_deploy import rewrites
from s3nn_deploy.backends import reference
from s3nn_deploy.errors import DeployError
from s3nn_deploy.intnet import INPUT, Conv2d, Dense, Input, IntNet, Population, Projection, check

SEEDS = st.integers(1000, 9999)
FEW = settings(derandomize=True, deadline=None, max_examples=40)


def convolutions(net):
    return [j.synapses for p in net.populations for j in p.projections if isinstance(j.synapses, Conv2d)]


def one_conv(conv, source):
    """A network with one convolution and a readout of ones."""
    shape = conv.out_shape(source)
    return check(
        IntNet(
            Input(source, 4),
            (
                Population("conv", shape, (Projection(INPUT, conv),), threshold=[1] * shape[0]),
                Population("readout", (1,), (Projection("conv", Dense(np.ones((1, int(np.prod(shape)))))),), bias=[0]),
            ),
        )
    )


@pytest.mark.parametrize("rewrite", [rewrites.expand_groups, rewrites.expand_dilation, rewrites.square_kernels])
@FEW
@given(seed=SEEDS)
def test_a_rewrite_keeps_every_spike(rewrite, seed):
    net = nets.random_net(seed, convolutional=True)
    x = nets.samples(net)
    nets.assert_same(reference.run(rewrite(net), x), reference.run(net, x))
    assert rewrite(rewrite(net)) == rewrite(net)


@pytest.mark.parametrize("name", nets.ZOO)
def test_rewritten_networks_have_the_promised_form(name):
    net = nets.ZOO[name]
    assert all(c.groups == 1 for c in convolutions(rewrites.expand_groups(net)))
    assert all(c.dilation == (1, 1) for c in convolutions(rewrites.expand_dilation(net)))
    for conv in convolutions(rewrites.square_kernels(net)):
        assert rewrites.is_square(conv) or 1 in conv.stride


def test_a_kernel_is_squared_wherever_symmetric_padding_can_do_it():
    rng = np.random.default_rng(0)
    source, squared = (2, 7, 8), 0
    u = rng.integers(0, 16, (2, *source))
    cases = itertools.product(range(1, 5), range(1, 5), (1, 2, 3), (1, 2), (0, 2), (1, 2))
    for kh, kw, sh, sw, padding, dilation in cases:
        conv = Conv2d(rng.integers(-9, 10, (3, 1, kh, kw)), (sh, sw), (padding, 0), (1, dilation), groups=1)
        conv = replace(conv, weight=np.repeat(conv.weight, 2, 1))
        before = rewrites._squared(conv, source)
        assert np.array_equal(reference.potential(before, u), reference.potential(conv, u))
        if rewrites.is_square(before):
            squared += 1
            continue
        extents = kh, dilation * (kw - 1) + 1
        for side in range(max(extents), max(extents) + 5):
            fits = [
                any((n + 2 * (p + b) - side) // s == (n + 2 * p - k) // s for b in range(side - k + 1))
                for n, k, p, s in zip(source[1:], extents, conv.padding, conv.stride, strict=True)
            ]
            assert not all(fits)
    assert squared > 200


def test_a_pool_of_one_row_becomes_a_square_kernel():
    net = one_conv(Conv2d(np.ones((4, 1, 1, 2)), stride=(1, 2), groups=4), (4, 5, 6))
    conv = rewrites.square_kernels(net)["conv"].projections[0].synapses
    assert conv.weight.shape[2:] == (3, 3)
    assert net["conv"].shape == (4, 5, 3)


@FEW
@given(seed=SEEDS)
def test_unrolling_keeps_every_spike_in_c_order(seed):
    net = nets.random_net(seed, convolutional=True, max_side=7)
    first = net.populations[0].name
    flat = rewrites.unroll(net, [first])
    assert len(flat[first].shape) == 1
    assert rewrites.unroll(net, []) == net
    x = nets.samples(net)
    got, want = reference.run(flat, x), reference.run(net, x)
    for name in want.spikes:
        assert np.array_equal(got.spikes[name].reshape(want.spikes[name].shape), want.spikes[name])
    assert np.array_equal(got.readout, want.readout)


def test_a_convolutional_readout_is_unrolled_with_its_bias_and_scale():
    conv = Conv2d([[[[1, -2]]], [[[3, 4]]]])
    net = check(
        IntNet(
            Input((1, 2, 3), 4),
            (Population("readout", (2, 2, 2), (Projection(INPUT, conv),), bias=[5, -6], scale=np.array([0.5, 0.25])),),
        )
    )
    x = nets.samples(net)
    got, want = reference.run(rewrites.unroll(net, ["readout"]), x), reference.run(net, x)
    nets.assert_same(got, want)
    assert np.array_equal(got.scale, want.scale)


def test_a_chain_that_would_be_too_large_is_refused_by_name(monkeypatch):
    net = nets.random_net(5014)
    largest = max(p.projections[0].synapses.weight.size for p in rewrites.merge_skips(net).populations)
    monkeypatch.setattr(rewrites, "MAX_UNROLLED", largest)
    rewrites.merge_skips(net)
    monkeypatch.setattr(rewrites, "MAX_UNROLLED", largest - 1)
    with pytest.raises(DeployError, match=rf"at most {largest - 1:,} weights, got {largest:,}"):
        rewrites.merge_skips(net)


def test_what_would_unroll_too_large_is_refused_by_name(monkeypatch):
    net = one_conv(Conv2d(np.ones((1, 1, 2, 1))), (1, 4, 4))
    monkeypatch.setattr(rewrites, "MAX_UNROLLED", 16 * 12)
    rewrites.unroll(net, ["conv"])
    monkeypatch.setattr(rewrites, "MAX_UNROLLED", 16 * 12 - 1)
    with pytest.raises(DeployError, match=r"population 'conv'.*at most 191 weights, got 192.*both odd or both even"):
        rewrites.unroll(net, ["conv"])
