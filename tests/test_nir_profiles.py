"""The profiles of NIR files: each holds the network, each refuses by name just outside its bound."""

import itertools

import h5py
import nets
import nir
import numpy as np
import pytest
from test_nir import interpret, one

from s3nn_deploy import formats
from s3nn_deploy.backends import reference
from s3nn_deploy.errors import DeployError
from s3nn_deploy.formats import nir as nir_format
from s3nn_deploy.intnet import Conv2d, Dense, Input

EVERY = list(itertools.product(nir_format.PROFILES, (False, True)))
KINDS = {
    "if": nir.IF,
    "cubalif": nir.CubaLIF,
    "threshold": nir.Threshold,
    "rockpool": nir.CubaLIF,
    "archive": nir.Threshold,
}


def assert_same(got, want):
    """Equal readouts; equal spikes of every population, whose own neurons come first where it hands others on."""
    assert np.array_equal(got.readout, want.readout)
    for name, spikes in want.spikes.items():
        flat = spikes.reshape(len(spikes), -1)
        assert np.array_equal(got.spikes[name].reshape(len(spikes), -1)[:, : flat.shape[1]], flat), name


def assert_holds(net, path, options, x=None):
    """The file is read back as lowered, and that computes what the network does."""
    back = formats.read(nir_format.write(net, path, **options))
    assert back == nir_format.lower(net, **options)
    x = nets.samples(net, 8) if x is None else x
    assert_same(reference.run(back, x.reshape(-1, *back.input.shape)), reference.run(net, x))
    return back


@pytest.mark.parametrize("name", nets.ZOO)
def test_every_profile_holds_the_network(name, tmp_path):
    for profile, merge in EVERY:
        assert_holds(nets.ZOO[name], tmp_path / "net.nir", {"profile": profile, "merge_skips": merge})


@pytest.mark.parametrize("profile", ["cubalif", "threshold", "rockpool"])
@pytest.mark.parametrize("name", ["mlp", "lenet", "residual"])
def test_any_reader_computes_it_with_either_comparison(name, profile, tmp_path):
    path = formats.export(nets.ZOO[name], tmp_path / "net.nir", "nir", profile=profile)
    back = formats.read(path)
    x = nets.samples(back)
    want = reference.run(back, x)
    for fires in (np.greater, np.greater_equal):
        got = interpret(nir.read(path), x, fires)
        for population, spikes in want.spikes.items():
            assert np.array_equal(got[population].reshape(spikes.shape), spikes)
        assert np.array_equal(got["output"].reshape(len(x), -1), want.readout)


@pytest.mark.parametrize("profile", nir_format.PROFILES)
def test_neurons_and_numbers_are_the_profiles(profile, tmp_path):
    net = nets.ZOO["lenet"]
    path = formats.export(net, tmp_path / "net.nir", "nir", profile=profile)
    graph = nir.read(path)
    whole = profile == "archive"
    for node in graph.nodes.values():
        if isinstance(node, nir.Affine | nir.Conv2d):
            assert node.weight.dtype == (np.int8 if whole else np.float32)
        assert not (profile == "rockpool" and isinstance(node, nir.Conv2d | nir.Flatten))
    for population in net.spiking:
        node = graph.nodes[population.name]
        assert type(node) is KINDS[profile]
        assert node.metadata["theta"].size in (population.channels, population.size)
        if profile == "cubalif":
            assert node.tau_mem.dtype == node.tau_syn.dtype == np.float64
            assert np.all(node.tau_mem == 1e-4)
        if profile in ("threshold", "archive"):
            theta = nir_format.lower(net, profile)[population.name].threshold.astype(int)[:, None, None]
            assert np.all(node.threshold == (theta - 1 if whole else theta - 0.5))
    with h5py.File(path) as file:  # nir 1.0.4 does not know v_reset
        assert all("v_reset" not in node for node in file["node/nodes"].values())


@pytest.mark.parametrize("profile", nir_format.PROFILES)
def test_metadata_carry_nothing(profile, tmp_path):
    net = nets.ZOO["mlp"]
    path = formats.export(net, tmp_path / "net.nir", "nir", profile=profile)
    want = formats.read(path)
    with h5py.File(path, "a") as file:
        del file["node/metadata"]
        for node in file["node/nodes"].values():
            node.pop("metadata", None)
    assert formats.read(path) == want


def test_the_archive_keeps_thresholds_that_no_sum_reaches_and_integers_of_any_size(tmp_path):
    net = one(Dense([[3, -2], [1 << 40, 1]]), threshold=[1 << 50, -5])
    back = assert_holds(net, tmp_path / "net.nir", {"profile": "archive"})
    assert back == net
    for profile in ("if", "cubalif", "threshold", "rockpool"):
        with pytest.raises(DeployError, match=r"population 'p': worst-case.*2\^23.*archive profile"):
            formats.export(net, tmp_path / "net.nir", "nir", profile=profile)


def test_an_unknown_profile_or_option_is_refused(tmp_path):
    net = nets.ZOO["mlp"]
    with pytest.raises(DeployError, match=r"profile 'cuba': is not known. Did you mean 'cubalif'"):
        formats.export(net, tmp_path / "x.nir", "nir", profile="cuba")
    with pytest.raises(DeployError, match=r"format 'nir': has no option 'profil'. Did you mean 'profile'"):
        formats.export(net, tmp_path / "x.nir", "nir", profil="if")
    with pytest.raises(DeployError, match=r"format 'emulator': has no option 'profile'. It has none"):
        formats.export(net, tmp_path / "x.npz", "emulator", profile="if")
    assert not list(tmp_path.iterdir())


def test_pixels_are_not_handed_on_as_spikes(tmp_path):
    from dataclasses import replace

    from s3nn_deploy.intnet import INPUT, Projection, check

    net = one(Dense(np.eye(2)), Input((2,), 8))
    p, readout = net.populations
    again = replace(readout, projections=(*readout.projections, Projection(INPUT, Dense(np.eye(2)))))
    net = check(replace(net, populations=(p, again)))
    assert_holds(net, tmp_path / "x.nir", {})
    with pytest.raises(DeployError, match=r"population 'readout': reads the input of 8 bits.*without --merge-skips"):
        formats.export(net, tmp_path / "y.nir", "nir", merge_skips=True)
    assert_holds(replace(net, input=Input((2,), 1)), tmp_path / "y.nir", {"merge_skips": True})


# --------------------------------------------------------------------------------------------------------- bounds

M = 1 << 22
BOUNDS = {
    "if": ([(M - 1, 1), (M - 1, M), (2 * M - 2, M)], [(M, 1), (2 * M, M), (M, M + 1)]),
    "cubalif": ([(M - 1, 1), (M - 1, M), (2 * M - 2, M)], [(M, 1), (2 * M, M), (M, M + 1)]),
    "rockpool": ([(M - 1, 1), (M - 1, M), (2 * M - 2, M)], [(M, 1), (2 * M, M), (M, M + 1)]),
    "threshold": ([(2 * M - 1, 1), (2 * M - 1, 2 * M - 1), (2 * M - 2, 2 * M - 1)], [(2 * M, 1), (2 * M - 1, 2 * M)]),
}
"""Weights and thresholds of one neuron, just inside and just outside of each profile's bound."""

AT_THE_BOUND = {
    profile: [one(Dense([[weight]]), threshold=threshold) for weight, threshold in inside]
    for profile, (inside, _) in BOUNDS.items()
}


@pytest.mark.parametrize("profile", BOUNDS)
def test_just_inside_the_bound_float32_is_exact(profile, tmp_path):
    for net in AT_THE_BOUND[profile]:
        x = np.array([[0], [1]], np.uint8)
        assert_holds(net, tmp_path / "x.nir", {"profile": profile}, x)
        for fires in (np.greater, np.greater_equal):
            got = interpret(nir.read(tmp_path / "x.nir"), x, fires, np.float32)
            assert np.array_equal(got["output"], reference.run(net, x).readout)


@pytest.mark.parametrize("profile", BOUNDS)
def test_just_outside_the_bound_is_refused_by_name(profile, tmp_path):
    for weight, threshold in BOUNDS[profile][1]:
        with pytest.raises(DeployError, match=r"population 'p': worst-case.*below 2\^23 = 8,388,608.*, got 8,388,6"):
            formats.export(one(Dense([[weight]]), threshold=threshold), tmp_path / "x.nir", "nir", profile=profile)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("profile", [p for p in nir_format.PROFILES if p != "archive"])
def test_the_readouts_bound_counts_its_bias(profile, tmp_path):
    x = np.array([[0], [1]], np.uint8)
    assert_holds(one(Dense([[1]]), bias=2 * M - 2), tmp_path / "x.nir", {"profile": profile}, x)
    with pytest.raises(DeployError, match=r"population 'readout'.*got 8,388,608"):
        formats.export(one(Dense([[1]]), bias=2 * M - 1), tmp_path / "y.nir", "nir", profile=profile)


def test_what_would_be_too_large_as_dense_synapses_is_refused_by_name(tmp_path, monkeypatch):
    from s3nn_deploy import rewrites

    net = one(Conv2d(np.ones((1, 1, 2, 2))), Input((1, 4, 4), 1))
    monkeypatch.setattr(rewrites, "MAX_UNROLLED", 16 * 9)
    assert_holds(net, tmp_path / "x.nir", {"profile": "rockpool"})
    monkeypatch.setattr(rewrites, "MAX_UNROLLED", 16 * 9 - 1)
    with pytest.raises(DeployError, match=r"population 'p'.*dense matrix.*at most 143 weights, got 144"):
        formats.export(net, tmp_path / "x.nir", "nir", profile="rockpool")
