"""Verification: equal networks are equal, and a single wrong integer is found and located."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from modules import Residual, random_module, unsettle
from nets import SEQUENTIAL, ZOO, samples

import s3nn_deploy as s3
from s3nn_deploy import backends, verification
from s3nn_deploy.backends import BACKENDS, pytorch, reference
from s3nn_deploy.backends.emulator import run as emulator_run
from s3nn_deploy.errors import DeployError
from s3nn_deploy.files import sha256
from s3nn_deploy.intnet import IntNet
from s3nn_deploy.model import load_model
from s3nn_deploy.stimuli import stimuli
from s3nn_deploy.trace import Trace, join
from s3nn_deploy.verification import replay, verify

QUICK = ["reference", "emulator", "onnx"]


@pytest.mark.parametrize("name", ZOO)
def test_every_network_of_the_list_is_equal_on_every_engine(name: str) -> None:
    net, x = ZOO[name], samples(ZOO[name])
    result = verify(net, x, QUICK)
    assert result.equal
    assert result.baseline == "reference"
    assert [c.backend for c in result.checks] == ["reference", *QUICK]
    solved, *checks = result.checks
    assert (solved.compared > 0, solved.differing) == (True, 0)
    assert {c.compared for c in checks} == {checks[0].compared}
    assert all((c.samples, c.injected, c.left_out) == (result.samples, result.injected, {}) for c in checks)
    covered = result.coverage.values()
    assert all(c.pinned == c.channels and c.at == c.at_reachable and c.below == c.below_reachable for c in covered)
    assert list(result.coverage) == [p.name for p in net.spiking]


def test_without_a_budget_only_whole_networks_are_run() -> None:
    net, x = ZOO["lenet"], samples(ZOO["lenet"])
    result = verify(net, x, QUICK, budget=0)
    assert result.equal
    assert (result.samples, result.injected) == (len(x) + 64, 0)
    assert all(c.compared == result.samples * sum(p.size for p in net.populations) for c in result.checks)
    assert all(c.undecided == c.channels and c.pinned == 0 for c in result.coverage.values())


@pytest.mark.lava
def test_a_simulator_of_a_large_network_is_given_all_that_the_caller_gave_and_few_generated_inputs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, x = ZOO["mlp"], samples(ZOO["mlp"], 5)
    monkeypatch.setattr(verification, "SIMULATED", verification.synapses(net) - 1)
    assert verify(net, x, budget=0).not_run["lava"].startswith(f"simulates {verification.synapses(net):,} synapses")
    monkeypatch.setattr(verification, "PATIENCE", 7 * verification.synapses(net))
    monkeypatch.setattr(verification, "LEAST", 3)
    for given, simulated in ((x, 7), (np.concatenate([x, x]), 10), (None, 7)):
        _, check = verify(net, given, ["reference", "lava"], budget=0).checks
        assert (check.backend, check.samples, check.differing) == ("lava", simulated, 0)


@pytest.mark.parametrize("seed", range(12))
def test_random_modules_are_equal_to_pytorch_on_every_engine(seed: int, tmp_path: Path) -> None:
    module, shape, bits = random_module(seed)
    result = s3.verify(s3.save_model(module, tmp_path / "m.pt", shape, bits), backends=QUICK)
    assert result.equal
    assert result.proof.holds
    assert result.baseline == "pytorch"
    assert all(c.pinned == c.channels for c in result.coverage.values())


def test_a_residual_module_is_equal_on_every_engine(tmp_path: Path) -> None:
    import torch

    torch.manual_seed(0)
    module = unsettle(Residual(), 0, torch.randint(0, 256, (16, 2, 7, 9)).float())
    assert s3.verify(s3.save_model(module, tmp_path / "m.pt", (2, 7, 9)), backends=QUICK).equal


@pytest.mark.parametrize("part", ["threshold", "weight", "bias"])
def test_one_wrong_integer_is_located_and_leaves_evidence(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = SEQUENTIAL["mlp"]
    x = samples(net, 32)
    first, last = net.populations[0], net.readout
    u = x.astype(np.int64) @ first.projections[0].synapses.weight.astype(np.int64).T
    match part:
        case "threshold":  # some sample meets it exactly, so one more changes a spike
            broken = replace(
                net, populations=(replace(first, threshold=first.threshold.astype(int) + 1), *net.populations[1:])
            )
        case "weight":
            weight = first.projections[0].synapses.weight.astype(int).copy()
            weight[0] = -weight[0]
            changed = replace(
                first,
                projections=(
                    replace(first.projections[0], synapses=replace(first.projections[0].synapses, weight=weight)),
                ),
            )
            broken = replace(net, populations=(changed, *net.populations[1:]))
        case _:
            broken = replace(
                net,
                populations=(
                    *net.populations[:-1],
                    replace(last, bias=last.bias.astype(int) + np.eye(last.channels, dtype=int)[3]),
                ),
            )

    def wrong(given: object, inputs: np.ndarray, file: Path | None = None) -> Trace:
        return replace(reference.run(broken, inputs), backend="emulator")

    monkeypatch.setattr("s3nn_deploy.backends.emulator.run", wrong)
    result = verify(net, x, ["reference", "emulator"], evidence=tmp_path, budget=0)
    assert not result.equal
    assert [c.differing > 0 for c in result.checks] == [False, True]
    difference = result.first_difference
    assert (tmp_path / "mismatch-emulator.npz").is_file()
    if part == "bias":
        assert (difference.population, difference.neuron, difference.threshold) == (last.name, (3,), None)
        assert difference.got == difference.expected + 1
    else:
        assert difference.population == first.name
        assert difference.potential == u[difference.sample, difference.neuron[0]]
    assert f"sample {difference.sample}, population {difference.population!r}" in str(difference)


def engine_with(change: Callable[[IntNet], IntNet]) -> Callable[..., Trace]:
    """The emulator, running `change` of the network that it is given."""

    def run(given: IntNet, inputs: np.ndarray, file: Path | None = None) -> Trace:
        return emulator_run(change(given), inputs)

    return run


def one_more(name: str, channel: int) -> Callable[[IntNet], IntNet]:
    """A network's change: one channel's threshold is one too high."""

    def change(net: IntNet) -> IntNet:
        populations = []
        for population in net.populations:
            if population.name == name and population.threshold is not None:
                theta = population.threshold.astype(int)
                theta[channel] += 1
                population = replace(population, threshold=theta)
            populations.append(population)
        return replace(net, populations=tuple(populations))

    return change


def test_what_no_input_of_the_network_shows_is_found_in_a_population_by_itself_and_can_be_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In conv2 a threshold one too high shows in no generated sample; by itself the population meets it."""
    net, change = ZOO["lenet"], one_more("conv2", 3)
    x = stimuli(net)
    assert np.array_equal(emulator_run(net, x).spikes["conv2"], emulator_run(change(net), x).spikes["conv2"])
    monkeypatch.setattr("s3nn_deploy.backends.emulator.run", engine_with(change))
    assert verify(net, backends=["emulator"], budget=0).equal
    result = verify(net, backends=["emulator", "onnx"], evidence=tmp_path)
    assert not result.equal
    difference = result.first_difference
    assert (difference.backend, difference.population, difference.isolated) == ("emulator", "conv2", True)
    assert (difference.neuron[0], difference.expected, difference.got) == (3, 1, 0)
    assert difference.potential == difference.threshold == int(net["conv2"].threshold[3])
    assert "population 'conv2' by itself, channel 3, row" in str(difference)
    left = tmp_path / "mismatch-emulator.npz"
    assert [check.evidence for check in result.checks] == [None, left, None]
    again = replay(net, left)
    assert not again.equal
    assert again.first_difference == difference
    assert replay(net, left, ["onnx"]).equal
    monkeypatch.undo()
    assert replay(net, left).equal
    with pytest.raises(DeployError, match="evidence about another network"):
        replay(ZOO["residual"], left)


def test_a_proof_that_fails_is_not_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every engine agrees with a network whose threshold is not the program's where no input shows it."""
    module, shape, bits = random_module(7)
    path = s3.save_model(module, tmp_path / "m.pt", shape, bits)
    converted = load_model(path)
    broken = replace(converted, net=one_more("layer0", 0)(converted.net))
    monkeypatch.setattr("s3nn_deploy.model.load_model", lambda _: broken)
    result = verify(path, np.zeros((1, *shape), int), backends=["onnx"], budget=0)
    assert not result.proof.holds
    assert not result.equal


def test_pytorch_itself_is_held_to_the_potentials_that_were_solved_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, shape, bits = random_module(7)
    path = s3.save_model(module, tmp_path / "m.pt", shape, bits)
    honest = pytorch.run_population

    def wrong(converted: object, name: str, sources: dict[str, np.ndarray]) -> np.ndarray:
        return honest(converted, name, sources) ^ (name == "layer0")

    monkeypatch.setattr("s3nn_deploy.backends.pytorch.run_population", wrong)
    difference = verify(path, backends=["onnx"]).first_difference
    assert (difference.backend, difference.population, difference.isolated) == ("pytorch", "layer0", True)
    assert difference.expected == (difference.potential >= difference.threshold) != difference.got


def test_by_default_what_cannot_run_the_network_is_named_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s3nn_deploy.verification.BACKENDS", {n: BACKENDS[n] for n in ("emulator", "netx")})
    result = verify(ZOO["residual"])
    assert result.equal
    assert list(result.not_run) == ["netx"]
    assert "population 'stem'" in result.not_run["netx"]
    with pytest.raises(DeployError, match="population 'stem'"):
        verify(ZOO["residual"], backends=["emulator", "netx"])
    monkeypatch.setattr("s3nn_deploy.verification.BACKENDS", {"netx": BACKENDS["netx"]})
    with pytest.raises(DeployError, match="none could run the network"):
        verify(ZOO["residual"])
    with pytest.raises(DeployError, match="at least one"):
        verify(ZOO["residual"], backends=[])


def test_the_reference_is_left_out_of_large_networks_unless_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, shape, bits = random_module(3)
    path = s3.save_model(module, tmp_path / "m.pt", shape, bits)
    monkeypatch.setattr("s3nn_deploy.verification.BACKENDS", {n: BACKENDS[n] for n in ("reference", "emulator")})
    monkeypatch.setattr("s3nn_deploy.verification.SLOW", 10)
    assert list(verify(path).not_run) == ["reference"]
    assert [c.backend for c in verify(path, backends=["reference"]).checks] == ["pytorch", "reference"]


def test_a_file_that_was_exported_is_the_one_that_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from s3nn_deploy.backends import onnx

    net, honest, run = ZOO["lenet"], onnx.run, []
    path = s3.export(net, tmp_path / "own.onnx", "onnx")

    def noting(given: IntNet, x: np.ndarray, file: Path | None = None) -> Trace:
        run.append(file)
        return honest(given, x, file)

    monkeypatch.setattr("s3nn_deploy.backends.onnx.run", noting)
    for result in (verify(net, backends=["onnx"], exports=[path]), verify(path, backends=["onnx"])):
        assert result.equal
        assert [(f.name, f.given, f.sha256) for f in result.files] == [("own.onnx", True, sha256(path))]
    assert run.count(path) == 2
    nir = s3.export(net, tmp_path / "own.nir", "nir")
    assert [f.format for f in verify(net, backends=["emulator"], exports=[nir], budget=0).files] == ["nir", "emulator"]
    with pytest.raises(DeployError, match="one exported file of each kind"):
        verify(net, backends=["onnx"], exports=[path, path])
    with pytest.raises(DeployError, match="one exported file of each kind"):
        verify(net, backends=["onnx"], exports=[Path(__file__)])


def test_predictions_follow_the_scaled_readout() -> None:
    trace = Trace({}, np.array([[3, 4], [5, 5]]), np.array([2.0, 1.0]), "x")
    assert trace.predictions.tolist() == [0, 0]
    assert replace(trace, scale=np.ones(2)).predictions.tolist() == [1, 0]


def test_joined_batches_are_the_whole() -> None:
    net, x = ZOO["residual"], samples(ZOO["residual"])
    whole, parts = backends.run(net, x), [backends.run(net, x[:5]), backends.run(net, x[5:])]
    assert np.array_equal(join(parts).readout, whole.readout)
    assert join(parts).counts == whole.counts


def test_wrong_input_and_unknown_backends_are_refused() -> None:
    net = ZOO["lenet"]
    good = samples(net, 2)
    for x, words in (
        (good[0], "Add a leading axis"),
        (good[:, :, :5], "expected shape"),
        (good.astype(float), "integers 0..255"),
        (good.astype(int) - 1, "values 0..255"),
        (good.astype(int) + 200, "values 0..255"),
    ):
        for backend in QUICK:
            with pytest.raises(DeployError, match=words):
                s3.run(net, x, backend)
    with pytest.raises(DeployError, match="Did you mean 'emulator'"):
        s3.run(net, good, "emulater")
    with pytest.raises(DeployError, match="Did you mean 'onnx'"):
        verify(net, good, ["onx"])
