"""The netx file: what it holds it gives back, and what Lava would not compute exactly it refuses."""

from dataclasses import replace

import h5py
import numpy as np
import pytest

from s3nn_deploy import formats
from s3nn_deploy.errors import DeployError
from s3nn_deploy.formats import netx
from s3nn_deploy.intnet import INPUT, Conv2d, Dense, Input, IntNet, Population, Projection, check, clamp_thresholds
from tests.nets import SEQUENTIAL, ZOO, random_net


def expressible(net):
    try:
        return netx.lower(net)
    except DeployError:
        return None


FITTING = {name: net for name, net in SEQUENTIAL.items() if expressible(net)}


def chain(*layers, bits=1, shape=None):
    """A network from (weight or synapses, threshold or bias) pairs; the last one reads out."""
    layers = [(s if isinstance(s, Conv2d | Dense) else Dense(s), v) for s, v in layers]
    source, at = INPUT, shape or (layers[0][0].weight.shape[1],)
    spec, populations = Input(at, bits), []
    for index, (synapses, values) in enumerate(layers):
        at = synapses.out_shape(at)
        neurons = {"threshold" if index < len(layers) - 1 else "bias": np.broadcast_to(values, at[0])}
        populations.append(Population(f"p{index}", at, (Projection(source, synapses),), **neurons))
        source = f"p{index}"
    return check(IntNet(spec, tuple(populations)))


def refused(net, *words):
    with pytest.raises(DeployError) as caught:
        netx.lower(net)
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


def test_most_of_the_shared_chains_fit():
    assert {"mlp", "chain2", "chain3", "chain5", "chain8"} <= set(FITTING)


@pytest.mark.parametrize("name", FITTING)
def test_a_file_gives_back_the_lowered_network_whole(name, tmp_path):
    net = replace(FITTING[name], provenance={"model": "m.pt", "épochs": [1, 2.5, None]})
    net = replace(net, classes=tuple(f"é{i}" for i in range(net.readout.size)))
    back = netx.read(netx.write(net, tmp_path / "x.net"))
    assert back == netx.lower(net)
    assert (back.classes, back.provenance) == (net.classes, net.provenance)
    assert formats.export(net, tmp_path / "y.net", "netx").read_bytes() == (tmp_path / "x.net").read_bytes()
    assert formats.read(tmp_path / "y.net") == back


def test_random_chains_read_back_or_are_refused(tmp_path):
    fitting = 0
    for seed in range(100, 160):
        if lowered := expressible(net := random_net(seed, residual=False)):
            assert netx.read(netx.write(net, tmp_path / "x.net")) == lowered
            assert netx.lower(lowered) == lowered
            fitting += 1
    assert fitting > 20


def test_clamping_thresholds_is_the_only_rewrite():
    net = chain(([[3, -2]], 1 << 40), ([[1]], 0))
    assert netx.lower(net) == clamp_thresholds(net)
    assert netx.lower(net)["p0"].threshold.tolist() == [4]


def test_the_file_is_what_netx_reads(tmp_path):
    conv = Conv2d([[[[1, -2, 3]]]], (2, 1), (1, 2), (1, 3))
    net = chain((conv, -1), (np.arange(1, 7).reshape(1, 6), 5), shape=(1, 4, 4))
    with h5py.File(netx.write(net, tmp_path / "x.net")) as file:
        layers = file["layer"]
        assert [layers[str(i)]["type"][0] for i in range(len(layers))] == [b"input", b"conv", b"flatten", b"dense"]
        assert layers["0/shape"][()].tolist() == [1, 4, 4]
        assert layers["1/weight"][()].tolist() == [[[[2, -4, 6]]]]
        window = {key: layers["1"][key][()].tolist() for key in ("stride", "padding", "dilation", "groups")}
        assert window == {"stride": [2, 1], "padding": [1, 2], "dilation": [1, 3], "groups": 1}
        neuron = {key: layers["1/neuron"][key][()] for key in ("iDecay", "vDecay", "vThMant")}
        assert neuron == {"iDecay": 4096, "vDecay": 4096, "vThMant": 1}
        assert layers["1/bias"][()].tolist() == [1 - 2 * -1 + 1]
        assert layers["3/neuron/vThMant"][()] == 131071
        assert layers["3/bias"][()].tolist() == [10]


def test_a_join_is_refused_by_name():
    small = replace(ZOO["residual"], input=Input((2, 7, 9), bits=1))
    refused(small, "population 'a2'", "reads 'a1' and 'stem'", "expected one projection, from 'a1'", "emulator")


def test_a_skipped_layer_is_refused():
    net = chain(([[1]], 1), ([[1]], 1), ([[1]], 0))
    readout = replace(net.readout, projections=(Projection("p0", Dense([[1]])),))
    skipping = replace(net, populations=(*net.populations[:2], readout))
    refused(skipping, "population 'p2'", "'p0'", "from 'p1'")


def test_inputs_of_more_than_8_bits_are_refused():
    assert netx.lower(chain(([[1]], 0), ([[1]], 0), bits=8))
    refused(chain(([[1]], 0), ([[1]], 0), bits=9), "input", "8 bits", "got 9")


LIMITS = [([-128, 127], [-129, 127]), ([-128, 127], [-128, 128]), ([0, 127], [0, 128]), ([-127, 0], [-129, 0])]


@pytest.mark.parametrize(("inside", "outside"), LIMITS)
def test_weights_of_more_than_8_bits_are_refused(inside, outside):
    for synapses in (lambda w: Dense([w]), lambda w: Conv2d([[[w]]])):
        shape = (1, 1, 2) if synapses([1, 1]).weight.ndim == 4 else (2,)
        assert netx.lower(chain((synapses(inside), 0), ([[1]], 0), shape=shape))
        net = chain((synapses(outside), 0), ([[1]], 0), shape=shape)
        refused(net, "population 'p0'", "-128..127", f"{outside[0]}..{outside[1]}")


@pytest.mark.parametrize("weight", [[0, 0], [-128, -128], [-64, -3], [-1, 0], [-1, -1], [-32, 0]])
def test_dense_weights_that_netx_loads_as_others_are_refused(weight):
    refused(chain(([weight], 0), ([[1]], 0)), "population 'p0'")
    near = [[*weight, 1], [min(weight) - 1, max(weight)] if -128 < min(weight) < -1 else [-3, 0]]
    for other in near:
        assert netx.lower(chain(([other], 0), ([[1]], 0)))
    assert netx.lower(chain((Conv2d([[[weight]]]), 0), ([[1]], 0), shape=(1, 1, 2)))


def test_sums_that_leave_24_bits_are_refused():
    inside, outside = np.full((1, 4), 64), np.full((1, 5), 52)  # 2 * 255 * 256 = 130560; 2 * 255 * 260 = 132600
    assert netx.lower(chain((inside, 0), ([[1]], 0), bits=8))
    assert netx.lower(chain((-inside - 1 + [0, 0, 0, 3], -100), ([[1]], 0), bits=8))
    refused(chain((outside, 0), ([[1]], 0), bits=8), "population 'p0'", "131,071", "132,600", "7 input bits fit")
    refused(chain((-outside, 0), ([[1]], 0), bits=8), "132,600")
    assert netx.lower(replace(chain((outside, 0), ([[1]], 0), bits=8), input=Input((5,), 7)))


def test_a_readout_that_could_fire_is_refused():
    weight = np.full((1, 512), 127)  # 2 * 512 * 127 = 130048
    assert netx.lower(chain((weight, 511)))
    refused(chain((weight, 512)), "population 'p0'", "131,072")
    assert netx.lower(chain((-weight, -511)))
    refused(chain((-weight, -512)), "131,072")
    refused(chain(([[1]], 1 << 50)), "population 'p0'")


def test_biases_beyond_16_bits_are_refused():
    wide = np.array([[127] * 130, [-127] * 130])  # sums -16510..16510

    def thresholds(low, high):
        return chain((wide, [high, low]), ([[1, 1]], 0))

    assert netx.lower(thresholds(-16382, 16382))
    for high in (16383, 16384, 16385):
        net = thresholds(-16382, high)
        _, bias = netx._neurons(net["p0"])
        (netx.lower if bias.min() >= -(1 << 15) and bias.max() < 1 << 15 else refused)(net)
    refused(thresholds(-16510, 16510), "population 'p0'", "thresholds -16510..16510", "-32768..32767")
    assert netx.lower(chain(([[1]], 16383)))
    refused(chain(([[1]], 16384)), "population 'p0'", "biases 16384..16384")


def test_vthmant_keeps_biases_within_13_bits_where_that_is_possible():
    wide = np.array([[127] * 500, [-127] * 500])
    for high in range(2049, 63000, 977):
        theta = [high, high - 4095]
        vth, bias = netx._neurons(chain((np.abs(wide), theta), ([[1, 1]], 0))["p0"])
        assert 1 <= vth <= netx.VTH_MAX
        assert -4096 <= bias.min() <= bias.max() <= 4095
        assert ((vth + 1 - bias) // 2).tolist() == theta


def test_hardware_only_limits_are_notes_and_not_refusals():
    quiet = chain((np.full((1, 129), 127), 2047), ([[1]], -2048))
    assert netx.hardware_notes(quiet) == []  # 2 * 129 * 127 = 32766
    loud = chain((np.full((1, 130), 127), [5]), ([[1]], 2048))
    sums, bias = netx.hardware_notes(loud)
    assert sums.startswith("p0: doubled sums 0..33,020 can exceed 16-bit accumulators (32,767)")
    assert bias == "p1: biases 4,096..4,096 exceed 13 bits (-4,096..4,095)"
    assert formats.notes(loud, "netx") == [sums, bias]
    spread = chain((np.array([[127] * 20, [-127] * 20]), [2048, -2048]), ([[1, 1]], 0))
    assert len(netx.hardware_notes(spread)) == 1
    refused(ZOO["residual"])
    with pytest.raises(DeployError):
        netx.hardware_notes(ZOO["residual"])


def test_wide_maps_and_many_groups_are_noted():
    def pool(channels, side):
        ones = Conv2d(np.ones((channels, 1, 1, 2)), (1, 2), groups=channels)
        return chain((ones, 1), (np.ones((1, channels * (side // 2))), 0), shape=(channels, 1, side))

    assert netx.hardware_notes(pool(127, 2)) == netx.hardware_notes(pool(1, 254)) == []
    assert "groups 128" in netx.hardware_notes(pool(128, 2))[0]
    assert "1 x 256" in netx.hardware_notes(pool(1, 256))[0]


@pytest.fixture
def written(tmp_path):
    return netx.write(FITTING["chain3"], tmp_path / "x.net")


def unreadable(path, *words):
    with pytest.raises(DeployError) as caught:
        netx.read(path)
    for word in (str(path), *words):
        assert word in str(caught.value)
    with h5py.File(path, "w"):  # it was closed
        pass


def test_truncated_and_foreign_files_are_refused(written, tmp_path):
    data = written.read_bytes()
    for size in [0, 1, 100, len(data) // 2, len(data) - 1]:
        written.write_bytes(data[:size])
        unreadable(written)
    np.savez(tmp_path / "a.npz", a=np.zeros(3))
    (tmp_path / "a.npz").rename(tmp_path / "a.net")
    unreadable(tmp_path / "a.net")
    with h5py.File(tmp_path / "b.net", "w") as file:  # as lava-dl exports it
        file["layer/0/type"] = np.array([b"input"])
    unreadable(tmp_path / "b.net", "s3nn")
    with pytest.raises(DeployError, match="no such file"):
        netx.read(tmp_path / "c.net")


def test_damaged_bytes_never_raise_another_error(written):
    data, rng = written.read_bytes(), np.random.default_rng(0)
    outcomes = set()
    for _ in range(300):
        damaged = bytearray(data)
        for at in rng.integers(0, len(data), 3):
            damaged[at] = rng.integers(256)
        written.write_bytes(damaged)
        try:
            outcomes.add(type(netx.read(written)))
        except DeployError:
            outcomes.add(DeployError)
    assert outcomes == {IntNet, DeployError}


CHANGES = {
    "another decay": ("layer/1/neuron/vDecay", 4095),
    "a leak": ("layer/1/neuron/iDecay", 1024),
    "another neuron": ("layer/1/neuron/type", np.array([b"SDNN"])),
    "an odd weight": ("layer/1/weight", np.full((1, 1, 1, 3), 3)),
    "float weights": ("layer/1/weight", np.full((1, 1, 1, 3), 2.0)),
    "a flat weight": ("layer/1/weight", np.full(4, 2)),
    "a weight of no size": ("layer/1/weight", np.zeros((1, 1, 0, 3), int)),
    "another bias": ("layer/1/bias", np.array([-300])),
    "a bias too many": ("layer/1/bias", np.array([1, 1])),
    "another vThMant": ("layer/1/neuron/vThMant", 7),
    "a readout that fires": ("layer/5/neuron/vThMant", 1),
    "another type": ("layer/1/type", np.array([b"pool"])),
    "two flattens": ("layer/5/type", np.array([b"flatten"])),
    "a taken name": ("layer/2/name", np.bytes_("layer0")),
    "another shape": ("layer/2/shape", np.array([1, 4, 6])),
    "no groups": ("layer/1/groups", 0),
    "an empty input": ("layer/0/shape", h5py.Empty("i8")),
    "no description": ("s3nn", np.bytes_("{}")),
    "a list for description": ("s3nn", np.bytes_("[1]")),
    "deep description": ("s3nn", np.bytes_("[" * 100000)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_file_is_refused(written, change):
    where, value = CHANGES[change]
    with h5py.File(written, "a") as file:
        assert where in file, list(file["layer"])
        del file[where]
        file[where] = value
    with pytest.raises(DeployError):
        netx.read(written)


def test_missing_parts_are_refused(written):
    data, names = written.read_bytes(), []
    with h5py.File(written) as file:
        file.visit(names.append)
    for name in names:
        written.write_bytes(data)
        with h5py.File(written, "a") as file:
            del file[name]
        unreadable(written)


def test_sizes_are_checked_before_memory_is_taken(written, tmp_path):
    data = written.read_bytes()

    def replaced(make):
        written.write_bytes(data)
        with h5py.File(written, "a") as file:
            del file["layer/1/weight"]
            make(file["layer/1"])
        unreadable(written)

    replaced(lambda layer: layer.create_dataset("weight", (1 << 20, 1 << 20, 1, 1), "i2"))
    replaced(lambda layer: layer.create_dataset("weight", (1 << 20, 1 << 20, 1, 1), "i2", chunks=(1, 1, 1, 1)))
    replaced(lambda layer: layer.create_dataset("weight", (1 << 12, 1 << 12, 1, 1), "i2"))
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(64))
    replaced(lambda layer: layer.create_dataset("weight", (1, 1, 1, 3), "i2", external=[(str(secret), 0, 6)]))
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["w"] = np.full((1, 1, 1, 3), 2, dtype=np.int16)
    replaced(lambda layer: layer.__setitem__("weight", h5py.ExternalLink(str(tmp_path / "other.h5"), "/w")))
    replaced(lambda layer: layer.__setitem__("weight", h5py.SoftLink("/layer/2/weight")))
    virtual = h5py.VirtualLayout((1, 1, 1, 3), "i2")
    virtual[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "w", (1, 1, 1, 3))
    replaced(lambda layer: layer.create_virtual_dataset("weight", virtual))


def test_a_place_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(DeployError, match="cannot be written"):
        netx.write(FITTING["mlp"], tmp_path)
    assert not list(tmp_path.parent.glob(".*.net*"))
