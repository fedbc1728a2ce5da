"""Winograd's way gives the very sums of the direct one, and its bound holds."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s3nn_deploy.backends import emulator, reference
from s3nn_deploy.engines import blas, winograd
from s3nn_deploy.engines.layers import layers
from s3nn_deploy.intnet import INPUT, Conv2d, Dense, Input, IntNet, Population, Projection, check

PADDINGS = [(0, 0), (1, 1), (2, 0), (1, 2), (2, 2)]


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """However few channels and tiles there are."""
    monkeypatch.setattr(winograd, "NARROW", 1)
    monkeypatch.setattr(blas, "MANY", 0)


def readout(conv: Conv2d, *more: Conv2d, shape: tuple[int, int, int]) -> IntNet:
    """Spikes of `shape` into a readout, whose sums are there to see."""
    projections = tuple(Projection(INPUT, each) for each in (conv, *more))
    out = conv.out_shape(shape)
    return check(IntNet(Input(shape, 1), (Population("readout", out, projections, bias=np.arange(out[0])),)))


def images(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """No spikes, all of them, and two at random."""
    x = np.random.default_rng(seed).integers(0, 2, (4, *shape), dtype=np.uint8)
    x[0], x[1] = 0, 1
    return x


def ways(net: IntNet) -> list[str]:
    return [type(way).__name__ for way in blas.prepare(layers(net)[-1]).args[0].many]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 1 << 30),
    channels=st.integers(1, 9),
    outputs=st.integers(1, 7),
    height=st.integers(3, 9),
    width=st.integers(3, 9),
    padding=st.sampled_from(PADDINGS),
    largest=st.sampled_from([1, 127, 3000]),
)
def test_sums_are_those_of_the_reference(seed, channels, outputs, height, width, padding, largest):
    rng = np.random.default_rng(seed)
    shape = (channels, height, width)
    conv = Conv2d(rng.integers(-largest, largest + 1, (outputs, channels, 3, 3)), padding=padding)
    more = [Conv2d(rng.integers(-9, 10, (outputs, channels, 1, 1)))] if padding == (1, 1) else []
    net, x = readout(conv, *more, shape=shape), images(shape, seed)
    want = reference.run(net, x).readout
    assert np.array_equal(emulator.run(net, x, engine="numpy").readout, want)
    _, rows, columns = conv.out_shape(shape)
    if 4 * -(-rows // 2) * -(-columns // 2) <= 1.5 * rows * columns:
        assert ways(net)[0] == "_Winograd"


def test_a_neuron_whose_potential_is_its_threshold_fires():
    rng, shape = np.random.default_rng(0), (24, 7, 6)
    conv = Conv2d(rng.integers(-128, 128, (5, 24, 3, 3)), padding=(1, 1))
    x = images(shape, 0)
    u = reference.run(readout(conv, shape=shape), x).readout.reshape(4, 5, 7, 6) - np.arange(5).reshape(1, 5, 1, 1)
    for more in (0, 1):
        fires = Population("a", (5, 7, 6), (Projection(INPUT, conv),), threshold=u[2, :, 3, 3] + more)
        last = Population("readout", (2,), (Projection("a", Dense(np.ones((2, 210)))),), bias=[0, 0])
        got = emulator.run(check(IntNet(Input(shape, 1), (fires, last))), x, engine="numpy").spikes["a"]
        assert got[2, :, 3, 3].tolist() == [more == 0] * 5
        assert np.array_equal(got, u >= (u[2, :, 3, 3] + more).reshape(1, 5, 1, 1))


@pytest.mark.parametrize("slab", [1 << 10, 1 << 13])
def test_slabs_of_some_rows_give_the_same(monkeypatch, slab):
    rng = np.random.default_rng(1)
    for height, width in ((9, 7), (8, 8), (5, 12)):
        conv = Conv2d(rng.integers(-128, 128, (6, 3, 3, 3)), padding=(1, 1))
        net, x = readout(conv, shape=(3, height, width)), images((3, height, width), 2)
        want = reference.run(net, x).readout
        monkeypatch.setattr(blas, "SLAB", slab)
        assert np.array_equal(emulator.run(net, x, engine="numpy").readout, want)


def test_the_bound_holds_for_every_intermediate_sum_and_is_reached_in_its_order_of_magnitude():
    rng = np.random.default_rng(3)
    b = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
    worst = 0.0
    for _ in range(50):
        conv = Conv2d(rng.choice([-127, 127], (4, 6, 3, 3)))
        quadruple = winograd.weights(conv)
        d = rng.integers(0, 2, (200, 6, 4, 4))
        d[:2] = [[[[1]]], [[[0]]]]
        seen = np.einsum("iy,ncyx,jx->nijc", b, d, b)
        magnitudes = np.einsum("nijc,ijco->no", np.abs(seen), np.abs(quadruple))
        assert magnitudes.max() <= winograd.bound(quadruple)
        worst = max(worst, magnitudes.max() / winograd.bound(quadruple))
    assert worst > 0.4


def test_sums_beyond_float32_go_the_direct_way():
    for channels, way in ((100, "_Winograd"), (900, "_Gathered")):
        net = readout(Conv2d(np.full((2, channels, 3, 3), 127), padding=(1, 1)), shape=(channels, 4, 4))
        assert ways(net) == [way]
        x = images((channels, 4, 4), 4)
        assert np.array_equal(emulator.run(net, x, engine="numpy").readout, reference.run(net, x).readout)


@pytest.mark.parametrize(
    "conv",
    [
        Conv2d(np.ones((8, 8, 3, 3)), stride=(1, 2)),
        Conv2d(np.ones((8, 8, 3, 3)), dilation=(2, 1)),
        Conv2d(np.ones((8, 2, 3, 3)), groups=4),
        Conv2d(np.ones((8, 8, 3, 2))),
    ],
)
def test_other_convolutions_go_the_direct_way(conv):
    assert ways(readout(conv, shape=(8, 12, 12))) == ["_Gathered"]


def test_pixels_go_the_direct_way():
    conv = Conv2d(np.ones((8, 8, 3, 3)))
    net = check(
        IntNet(Input((8, 9, 9), 8), (Population("readout", (8, 7, 7), (Projection(INPUT, conv),), bias=[0] * 8),))
    )
    assert ways(net) == ["_Gathered"]
