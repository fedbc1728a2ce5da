"""The emulator is the reference, fast; and its counts are those of a counter that walks every synapse."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import ZOO, assert_same, random_net, samples, weights, with_thresholds

from s3nn_deploy.backends import emulator, reference
from s3nn_deploy.counts import KINDS, join
from s3nn_deploy.engines import blas
from s3nn_deploy.errors import DeployError
from s3nn_deploy.formats import npz
from s3nn_deploy.intnet import (
    INPUT,
    Conv2d,
    Dense,
    Input,
    IntNet,
    Population,
    Projection,
    check,
    rewrite,
    signed_bits,
    worst_case,
)

few = settings(max_examples=25, deadline=None)


def synapses(projection: Projection, source: tuple[int, ...], target: tuple[int, ...]) -> list[tuple[int, int]]:
    """Every synapse inside the borders as (flat index of its source neuron, weight), target after target."""
    s = projection.synapses
    if isinstance(s, Dense):
        return [(i, w) for row in s.weight.tolist() for i, w in enumerate(row)]
    found = []
    _, height, width = source
    per_group, kh, kw = s.weight.shape[1:]
    for o, y, x in np.ndindex(*target):
        first = o // (target[0] // s.groups) * per_group
        for i, ky, kx in np.ndindex(per_group, kh, kw):
            row = y * s.stride[0] - s.padding[0] + ky * s.dilation[0]
            column = x * s.stride[1] - s.padding[1] + kx * s.dilation[1]
            if 0 <= row < height and 0 <= column < width:
                found.append((((first + i) * height + row) * width + column, int(s.weight[o, i, ky, kx])))
    return found


def counted(net: IntNet, x: np.ndarray) -> dict[str, dict[str, list[int]]]:
    """The counts of every population, from the reference's spikes, synapse by synapse."""
    spikes = reference.run(net, x).spikes
    signals = {INPUT: x != 0, **spikes}
    counts = {}
    for p in net.populations:
        count = {kind: np.zeros(len(x), dtype=np.int64) for kind in KINDS}
        for j in p.projections:
            active = signals[j.source].reshape(len(x), -1)
            kind = "macs" if j.source == INPUT and net.input.bits > 1 else "synops"
            stored = signed_bits(int(j.synapses.weight.min()), int(j.synapses.weight.max()))
            for i, w in synapses(j, net.source(j).shape, p.shape):
                hit = active[:, i].astype(np.int64)
                count[kind] += hit
                count[f"{kind}_nonzero"] += hit * (w != 0)
                count["dense_macs"] += 1
                count["weight_bits"] += hit * stored
                count["membrane_reads"] += hit
                count["membrane_writes"] += hit
        count["membrane_reads"] += p.size
        count["neuron_updates"] += p.size
        if p.spiking:
            fired = spikes[p.name].reshape(len(x), -1).sum(1)
            count["spikes"] += fired
            count["messages"] += fired * sum(p.name in {j.source for j in q.projections} for q in net.populations)
        counts[p.name] = {kind: n.tolist() for kind, n in count.items()}
    return counts


def assert_counts(net: IntNet, x: np.ndarray) -> None:
    events = emulator.run(net, x).counts.events
    assert all(array.dtype == np.int64 for kinds in events.values() for array in kinds.values())
    assert {p: {k: n.tolist() for k, n in kinds.items()} for p, kinds in events.items()} == counted(net, x)


def one_layer(synapses: Dense | Conv2d, shape: tuple[int, ...], bits: int = 1, threshold: object = None) -> IntNet:
    """`synapses` from the input, then a readout that copies the first spike."""
    target = synapses.out_shape(shape)
    theta = np.ones(target[0], dtype=int) if threshold is None else threshold
    first = np.zeros((1, int(np.prod(target))), dtype=int)
    first[0, 0] = 1
    return check(
        IntNet(
            Input(shape, bits),
            (
                Population("layer", target, (Projection(INPUT, synapses),), threshold=theta),
                Population("readout", (1,), (Projection("layer", Dense(first)),), bias=[0]),
            ),
        )
    )


@pytest.mark.parametrize("name", ZOO)
def test_spikes_and_readouts_are_those_of_the_reference(name):
    net = ZOO[name]
    x = samples(net, 23)
    got = emulator.run(net, x)
    assert got.backend == "emulator (numpy)"
    assert_same(got, reference.run(net, x))


@pytest.mark.parametrize("name", ZOO)
def test_counts_are_those_of_walking_every_synapse(name):
    assert_counts(ZOO[name], samples(ZOO[name], 5))


@few
@given(st.integers(100, 1 << 30))
def test_random_networks_run_and_count_exactly(seed):
    net = random_net(seed, max_side=7)
    x = samples(net, 6, seed)
    assert_same(emulator.run(net, x), reference.run(net, x))
    assert_counts(net, x[:3])


@few
@given(st.integers(0, 1 << 30), st.sampled_from([12, 20, 28, 44, 50]))
def test_weights_too_wide_for_float32_or_float64_stay_exact(seed, bits):
    rng = np.random.default_rng(seed)
    wide = rewrite(
        random_net(seed, max_side=6),
        lambda s: s if np.all(s.weight == 1) else replace(s, weight=weights(rng, s.weight.shape, bits)),
    )
    net = with_thresholds(wide, seed)
    x = samples(net, 6, seed)
    assert_same(emulator.run(net, x), reference.run(net, x))


@pytest.mark.parametrize("bound", [1 << 24, 1 << 31, 1 << 32, 1 << 53, 1 << 61])
@pytest.mark.parametrize("beyond", [-1, 0, 1])
@pytest.mark.parametrize("sign", [1, -1])
def test_decisions_are_exact_on_either_side_of_each_type_s_limit(bound, beyond, sign):
    half = bound // 2
    rows = sign * np.array([[half, half + beyond - 1, 1], [1, 1, 1], [half, 0, 1], [half, half + beyond - 1, -sign]])
    near = [d + s * b for b in (0, half, bound, 1 << 24, 1 << 31, 1 << 53) for s in (1, -1) for d in range(-2, 3)]
    net = one_layer(Dense(np.repeat(rows, len(near), 0)), (3,), threshold=np.tile(near, len(rows)))
    assert worst_case(net, net["layer"]) == max(bound + beyond, 3)
    every = np.array(list(np.ndindex(2, 2, 2)))
    assert_same(emulator.run(net, every), reference.run(net, every))


def test_readouts_beyond_float64_keep_every_digit():
    wide = Projection(INPUT, Dense([[(1 << 60) + 1, 1], [1, 2]]))
    net = check(IntNet(Input((2,), bits=1), (Population("readout", (2,), (wide,), bias=[-(1 << 58) - 1, 7]),)))
    got = emulator.run(net, [[1, 1], [0, 1]]).readout.tolist()
    assert got == [[(1 << 60) + 1 - (1 << 58), 10], [-(1 << 58), 9]]


@pytest.mark.parametrize("slab", [1, 1 << 9, 1 << 12])
def test_slabs_of_any_size_give_the_same(monkeypatch, slab):
    nets = [*ZOO.values(), random_net(77), random_net(78)]
    whole = [emulator.run(net, samples(net, 7)) for net in nets]
    monkeypatch.setattr(blas, "SLAB", slab)
    for net, want in zip(nets, whole, strict=True):
        got = emulator.run(net, samples(net, 7))
        assert_same(got, want)
        assert got.counts == want.counts


@pytest.mark.parametrize("name", ["lenet", "residual", "random12"])
def test_traces_and_counts_do_not_depend_on_the_batch(name):
    net = ZOO[name]
    x = samples(net, 13)
    whole = emulator.run(net, x)
    parts = [emulator.run(net, part) for part in np.split(x, [1, 2, 9])]
    assert join([part.counts for part in parts]) == whole.counts
    assert np.array_equal(np.concatenate([part.readout for part in parts]), whole.readout)


def test_no_samples_give_an_empty_trace():
    net = ZOO["residual"]
    got = emulator.run(net, np.zeros((0, *net.input.shape), dtype=np.uint8))
    assert got.readout.shape == (0, 5)
    assert got.spikes["b1"].shape == (0, 6, 4, 5)
    assert len(got.counts) == 0


def test_an_empty_input_causes_no_synaptic_operation_yet_updates_every_neuron():
    net = one_layer(Conv2d(np.full((3, 2, 3, 3), 5), padding=(1, 1)), (2, 6, 5))
    counts = emulator.run(net, np.zeros((2, 2, 6, 5), dtype=np.uint8)).counts
    assert counts.total("synops").tolist() == [0, 0]
    assert counts.total("weight_bits").tolist() == [0, 0]
    assert counts.total("neuron_updates").tolist() == [91, 91]


@pytest.mark.parametrize(
    "synapses",
    [
        Conv2d(np.full((4, 1, 3, 2), 3), stride=(2, 1), padding=(2, 1), dilation=(1, 2), groups=2),
        Conv2d(np.ones((4, 2, 5, 5)), padding=(4, 4)),
    ],
)
def test_a_full_binary_input_does_as_many_synaptic_operations_as_dense_hardware(synapses):
    net = one_layer(synapses, (2, 7, 6))
    layer = emulator.run(net, np.ones((1, 2, 7, 6), dtype=np.uint8)).counts.events["layer"]
    assert layer["synops"].tolist() == layer["dense_macs"].tolist()
    assert layer["macs"].tolist() == [0]


def test_multi_bit_input_is_counted_as_multiply_accumulates():
    net = one_layer(Dense([[1, 0, 2], [3, 4, 0]]), (3,), bits=8)
    layer = emulator.run(net, np.array([[0, 9, 255]], dtype=np.uint8)).counts.events["layer"]
    assert {kind: int(n[0]) for kind, n in layer.items()} == {
        "synops": 0,
        "synops_nonzero": 0,
        "macs": 4,
        "macs_nonzero": 2,
        "dense_macs": 6,
        "spikes": 2,
        "messages": 2,
        "neuron_updates": 2,
        "weight_bits": 16,
        "membrane_reads": 6,
        "membrane_writes": 4,
    }


@pytest.mark.parametrize("weight", [1 << 57, 1 << 62, -(1 << 63)])
def test_sums_that_would_wrap_in_64_bits_are_refused(weight):
    with pytest.raises(DeployError, match="membrane potentials below"):
        one_layer(Dense([[weight, 1]]), (2,), bits=8)


def test_counts_that_float32_cannot_hold_are_exact():
    net = one_layer(Conv2d(np.tri(402, 402)[:, :, None, None]), (402, 1, 301))
    counts = emulator.run(net, np.ones((2, 402, 1, 301), dtype=np.uint8)).counts
    assert counts.events["layer"]["synops_nonzero"].tolist() == [301 * 402 * 403 // 2] * 2  # odd, and above 2^24


def test_the_network_of_the_file_is_what_runs(tmp_path):
    net, other = ZOO["mlp"], ZOO["lenet"]
    path = npz.write(net, tmp_path / "net.npz")
    x = samples(net)
    assert_same(emulator.run(other, x, path), reference.run(net, x))
    with pytest.raises(DeployError, match="no such file"):
        emulator.run(net, x, tmp_path / "absent.npz")


def test_inputs_out_of_range_are_refused():
    with pytest.raises(DeployError, match=r"values 0\.\.1"):
        emulator.run(ZOO["mlp"], np.full((1, 30), 2))
