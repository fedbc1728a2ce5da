"""Other people's NIR readers on our files: exact where the docs say so, and a node left out is never taken for exact."""

import json
import os
from pathlib import Path

import nets
import numpy as np
import pytest
from click.testing import CliRunner

from s3nn_deploy import cli, environments, formats, golden, peers
from s3nn_deploy.backends import reference
from s3nn_deploy.errors import DeployError
from s3nn_deploy.files import sha256
from s3nn_deploy.intnet import INPUT

READERS = {
    "if": ("norse", "spikingjelly", "nirtorch", "sinabs"),
    "cubalif": ("snntorch", "norse", "spikingjelly", "nirtorch"),
    "threshold": ("nirtorch",),
    "rockpool": ("rockpool",),
}
"""Who runs a profile exactly."""

SUM = ("snntorch", "spikingjelly", "nirtorch")
"""Who runs two synapses from one source exactly; the others are given chains."""

REQUIRED = "S3NN_PEERS_REQUIRED" in os.environ
"""Whether the peers must be there (`make test-peers`), and all networks run."""


@pytest.fixture
def installed():
    if REQUIRED:
        assert peers.installed() == list(peers.PEERS)
    elif peers.installed() != list(peers.PEERS):
        pytest.skip("make test-peers installs the peers")


def is_chain(net):
    names = [INPUT, *(p.name for p in net.populations)]
    return all([j.source for j in p.projections] == [n] for p, n in zip(net.populations, names, strict=False))


# ---------------------------------------------------------------------------------------------------- golden vectors


@pytest.mark.parametrize("name", ["mlp", "lenet", "residual"])
def test_golden_vectors_meet_thresholds_and_are_read_by_numpy_alone(name, tmp_path):
    net = nets.ZOO[name]
    path = formats.export(net, tmp_path / "net.nir", "nir")
    held = formats.read(path)
    with np.load(golden.write(held, path), allow_pickle=False) as arrays:
        x, output = arrays["input"], arrays["output"]
        spikes = {key.removeprefix("spikes/"): arrays[key] for key in arrays if key.startswith("spikes/")}
    assert golden.place(path).name == "net.nir.golden.npz"
    trace = reference.run(net, x)
    assert np.array_equal(output, trace.readout)
    assert spikes.keys() == trace.spikes.keys()
    for population, fired in trace.spikes.items():
        assert np.array_equal(spikes[population].reshape(fired.shape), fired)
    first = net.populations[0]
    u = reference.potential(first.projections[0].synapses, x.astype(np.int64)).reshape(len(x), first.channels, -1)
    for delta in (0, -1):
        assert np.any(u == first.threshold.astype(np.int64)[:, None] + delta)


def test_golden_vectors_of_another_file_are_refused(tmp_path):
    mlp, lenet = (formats.export(nets.ZOO[n], tmp_path / f"{n}.nir", "nir") for n in ("mlp", "lenet"))
    golden.write(formats.read(mlp), mlp)
    assert golden.read(formats.read(mlp), mlp).file == sha256(mlp)
    golden.place(mlp).rename(golden.place(lenet))
    with pytest.raises(DeployError, match=r"are not the golden vectors of .*lenet.nir"):
        golden.read(formats.read(lenet), lenet)
    golden.place(lenet).unlink()
    assert golden.read(formats.read(lenet), lenet).file == sha256(lenet)  # made anew


# --------------------------------------------------------------------------------------------------------- judgement


def vectors():
    net = nets.ZOO["mlp"]
    trace = reference.run(net, golden.vectors(net))
    right = {"output": trace.readout, **{f"spikes/{name}": s for name, s in trace.spikes.items()}}
    return golden.Golden(golden.vectors(net), trace.spikes, trace.readout, ""), right


def test_only_all_equal_values_are_exact():
    want, right = vectors()
    assert peers.judge("f()", want, right).status == peers.EXACT
    assert peers.judge("f()", want, {"output": right["output"]}).status == peers.EXACT  # the output alone was seen
    for key in right:
        wrong = {**right, key: right[key].astype(float)}
        wrong[key].flat[-1] += 1
        assert peers.judge("f()", want, wrong).status == peers.WRONG
    assert "shape" in peers.judge("f()", want, {**right, "output": right["output"][:, :3]}).detail


def test_a_node_left_out_is_silently_wrong_even_if_every_value_is_right():
    want, right = vectors()
    lost = peers.judge("f()", want, right, ["fc1"])
    assert (lost.status, lost.detail) == (peers.WRONG, "it left out fc1 without a word")
    unseen = {key: value for key, value in right.items() if key != "spikes/fc2"}
    assert peers.judge("f()", want, unseen).detail == "'fc2' was never run"


def test_the_best_call_is_what_a_peer_is():
    attempts = [peers.Attempt("a", peers.REFUSED), peers.Attempt("b", peers.WRONG), peers.Attempt("c", peers.EXACT)]
    verdict = peers.Verdict("x", "1", tuple(attempts))
    assert verdict.best.call == "c"
    plain = peers.report(Path("f"), [verdict])["peers"][0]
    assert (plain["status"], plain["call"]) == ("exact", "c")
    assert peers.report(Path("f"), [peers.Verdict("x", "1", tuple(attempts[:2]))])["peers"][0]["call"] is None


def test_peers_that_are_missing_are_named_with_the_command_that_installs_them(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for environment in peers.ENVIRONMENTS:
        monkeypatch.delenv(environment.variable, raising=False)
        with pytest.raises(DeployError, match=r"is not installed. Run: s3nn-deploy setup peers"):
            environments.find(environment)
    path = formats.export(nets.ZOO["mlp"], tmp_path / "net.nir", "nir")
    assert peers.installed() == []
    assert {v.best.status for v in peers.conformance([path])[0]} == {peers.ABSENT}
    result = CliRunner().invoke(cli.main, ["conformance", str(path), "--json"])
    assert json.loads(result.stdout)["peers"][0]["attempts"][0]["detail"] == "Run: s3nn-deploy setup peers"
    assert result.exit_code == 0
    assert CliRunner().invoke(cli.main, ["conformance", str(path), "--peers", "norse"]).exit_code == 1
    result = CliRunner().invoke(cli.main, ["conformance", str(path), "--peers", "nors"])
    assert (result.exit_code, "Did you mean 'norse'" in result.stderr) == (2, True)


def counterfeit(tmp_path, monkeypatch, does):
    """Interpreters of the peers that only do what a line of shell says; results go to $4/results.jsonl."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *--check*) echo \'{{"norse": "1", "nir": "1", "torch": "1"}}\';; *) {does};; esac\n'
    )
    python.chmod(0o755)
    monkeypatch.setenv(peers.CURRENT.variable, str(python))


def test_a_peer_that_dies_has_refused_and_the_rest_is_run(tmp_path, monkeypatch):
    path = formats.export(nets.ZOO["mlp"], tmp_path / "net.nir", "nir")
    line = '{\\"id\\": [0, 1], \\"lost\\": [], \\"error\\": \\"E: no\\"}'
    lines = "$4/results.jsonl"
    first = f'touch {tmp_path}/once; echo "{line}" | sed s/1/0/ > {lines}; kill -9 $$'
    dies = f'if [ -e {tmp_path}/once ]; then echo "{line}" > {lines}; else {first}; fi'
    counterfeit(tmp_path, monkeypatch, dies)
    (verdict,) = peers.conformance([path], ["norse"])[0]
    assert [a.status for a in verdict.attempts] == [peers.REFUSED] * 2
    assert [a.detail for a in verdict.attempts] == ["E: no", "died, exit code -9"]


def test_an_interpreter_without_the_peers_is_an_error(tmp_path, monkeypatch):
    path = formats.export(nets.ZOO["mlp"], tmp_path / "net.nir", "nir")
    monkeypatch.setenv(peers.CURRENT.variable, "/bin/false")
    with pytest.raises(DeployError, match="/bin/false: does not have the peers"):
        peers.conformance([path], ["norse"])
    monkeypatch.setenv(peers.CURRENT.variable, str(tmp_path / "none"))
    with pytest.raises(DeployError, match="S3NN_PEERS_PYTHON"):
        peers.conformance([path], ["norse"])


# ------------------------------------------------------------------------------------------------------- real readers


def exported(name, net, profile, merge, tmp_path):
    path = tmp_path / f"{name}-{profile}-{merge}.nir"
    return formats.export(net, path, "nir", profile=profile, merge_skips=merge)


@pytest.mark.peers
@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("profile", READERS)
def test_every_reader_of_a_profile_is_exact(profile, tmp_path):
    seeds = range(5000, 5100) if REQUIRED else range(5000, 5002)
    chosen = (
        {**nets.ZOO, **{f"seed{s}": nets.random_net(s) for s in seeds}}
        if REQUIRED
        else {
            **{name: nets.ZOO[name] for name in ("mlp", "lenet", "residual")},
            **{f"seed{s}": nets.random_net(s) for s in seeds},
        }
    )
    cases = [
        (name, net, merge) for name, net in chosen.items() for merge in ((False,) if is_chain(net) else (False, True))
    ]
    files = [exported(name, net, profile, merge, tmp_path) for name, net, merge in cases]
    for (name, net, merge), verdicts in zip(cases, peers.conformance(files, READERS[profile]), strict=True):
        for verdict in verdicts:
            if merge or is_chain(net) or verdict.peer in SUM:
                assert verdict.best.status == peers.EXACT, (name, merge, verdict)


@pytest.mark.peers
@pytest.mark.usefixtures("installed")
def test_qonnx_is_exact_on_every_quantised_onnx_file_and_hls4ml_on_chains_of_dense_layers(tmp_path):
    chosen = {**nets.ZOO, **{f"seed{s}": nets.random_net(s) for s in range(5000, 5100 if REQUIRED else 5002)}}
    files = [formats.export(n, tmp_path / f"{name}.onnx", "onnx", qonnx=True) for name, n in chosen.items()]
    for name, (verdict,) in zip(chosen, peers.conformance(files, ["qonnx"]), strict=True):
        assert verdict.best.status == peers.EXACT, (name, verdict)
    ((verdict,),) = peers.conformance([files[list(chosen).index("mlp")]], ["hls4ml"])
    assert verdict.best.status == peers.EXACT, verdict


def test_a_peer_is_given_only_files_of_its_kind(tmp_path):
    path = formats.export(nets.ZOO["mlp"], tmp_path / "net.onnx", "onnx", qonnx=True)
    with pytest.raises(
        DeployError, match=r"peer 'norse': expected a .nir file, got .*net.onnx. NIR: s3nn-deploy export"
    ):
        peers.conformance([path], ["norse"])
    other = formats.export(nets.ZOO["mlp"], tmp_path / "net.npz", "emulator")
    with pytest.raises(DeployError, match=r"net.npz: expected a .nir or .onnx file, got '.npz'"):
        peers.conformance([other])


@pytest.mark.peers
@pytest.mark.usefixtures("installed")
def test_a_reader_that_drops_thresholds_is_not_exact(tmp_path):
    """sinabs and Norse delete nodes that they do not know; what then happens depends on how a set is ordered."""
    path = exported("mlp", nets.ZOO["mlp"], "threshold", False, tmp_path)
    for verdict in peers.conformance([path], ["norse", "sinabs"])[0]:
        assert verdict.best.status in (peers.WRONG, peers.REFUSED)


@pytest.mark.peers
@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("profile", READERS)
def test_just_inside_the_bound_the_readers_are_exact(profile, tmp_path):
    from test_nir_profiles import AT_THE_BOUND

    files = [exported(f"bound{k}", net, profile, False, tmp_path) for k, net in enumerate(AT_THE_BOUND[profile])]
    for verdicts in peers.conformance(files, READERS[profile]):
        for verdict in verdicts:
            assert verdict.best.status == peers.EXACT, verdict
