"""The proof: what holds is proved with figures, and an integer that is not the program's makes it fail."""

import re
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from modules import Residual, random_module, unsettle
from nets import ZOO

from s3nn_deploy import nn
from s3nn_deploy.capture import capture
from s3nn_deploy.conversion import Conversion, conversion
from s3nn_deploy.intnet import IntNet, reach
from s3nn_deploy.program import Program
from s3nn_deploy.proof import prove


def converted(seed: int) -> Conversion:
    module, shape, bits = random_module(seed)
    return conversion(capture(module, shape, bits))


def residual(dtype: torch.dtype = torch.float32) -> Conversion:
    torch.manual_seed(0)
    module = unsettle(Residual(), 0, torch.randint(0, 256, (16, 2, 7, 9)).float()).to(dtype)
    return conversion(capture(module, (2, 7, 9)))


@pytest.mark.parametrize("seed", range(12))
def test_random_modules_are_proved_and_every_u_is_tried(seed: int) -> None:
    made = converted(seed)
    proof = prove(made.net, made)
    assert proof.holds
    assert proof.dtype == "float32"
    for population, p in zip(made.net.populations, proof.populations, strict=True):
        low, high = reach(made.net, population)
        assert (p.low, p.high) == (tuple(low.tolist()), tuple(high.tolist()))
        assert p.worst_case < p.limit == 1 << 24
        assert p.kind == "readout" if not population.spiking else p.kind in ("threshold", "or")
        if p.kind == "threshold":
            assert p.evaluated == p.reachable == int((high - low + 1).sum())
            assert p.safety is None or p.safety > 1
            assert p.margin is None or p.margin > 0.3


def test_a_residual_network_is_proved_in_either_float_type() -> None:
    for dtype, name, limit in ((torch.float32, "float32", 1 << 24), (torch.float64, "float64", 1 << 53)):
        made = residual(dtype)
        proof = prove(made.net, made)
        assert (proof.holds, proof.dtype) == (True, name)
        assert {p.limit for p in proof.populations} == {limit}
        assert {sign for p in proof.populations for sign in p.direction} >= {1, -1}


def with_arrays(net: IntNet, name: str, **arrays: object) -> IntNet:
    return replace(net, populations=tuple(replace(p, **arrays) if p.name == name else p for p in net.populations))


@pytest.mark.parametrize("step", [-1, 1])
def test_every_threshold_that_is_off_by_one_is_disproved(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s3nn_deploy.proof.EVERY", 1)
    made = residual()
    for population in made.net.spiking:
        low, high = reach(made.net, population)
        theta = population.threshold.astype(int)
        proof = prove(with_arrays(made.net, population.name, threshold=theta + step), made)
        matters = (np.maximum(theta, theta + step) > low) & (np.minimum(theta, theta + step) <= high)
        found = {
            int(re.search(r"channel (\d+): u = ", failure)[1]) for failure in proof.failures if ": u = " in failure
        }
        assert found == set(np.flatnonzero(matters).tolist())
        assert len(found) > 0


def test_a_weight_a_bias_a_scale_or_a_wire_that_is_not_the_program_s_is_disproved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("s3nn_deploy.proof.EVERY", 1)
    made = residual()
    net, readout = made.net, made.net.readout
    for population in net.populations:
        projection = population.projections[0]
        weight = projection.synapses.weight.astype(int)
        weight.flat[0] += 1
        changed = replace(projection, synapses=replace(projection.synapses, weight=weight))
        projections = (changed, *population.projections[1:])
        proof = prove(with_arrays(net, population.name, projections=projections), made)
        assert proof.failures[0].startswith(f"population {population.name!r}: its shape, wiring or weights")
    assert "biases" in prove(with_arrays(net, readout.name, bias=readout.bias.astype(int) + 1), made).failures[0]
    assert "scale" in prove(with_arrays(net, readout.name, scale=readout.scale * 2), made).failures[0]
    swapped = net.populations[2].projections[::-1]
    assert not prove(with_arrays(net, net.populations[2].name, projections=swapped), made).holds
    assert "other populations" in prove(ZOO["residual"], made).failures[0]


def test_a_program_that_was_not_hardened_is_disproved() -> None:
    """A switching point on an integer: floats decide it one way here, and perhaps otherwise elsewhere."""
    norm = torch.nn.BatchNorm1d(1).eval()
    norm.running_mean[:], norm.running_var[:], norm.bias.data[:] = 100.0, 9.0 - 1e-5, 1.0
    layer = nn.IntLinear(1, 1, bias=False, step="fixed")
    layer.fixed_step.fill_(1.0)
    layer.weight.data.fill_(1.0)
    module = torch.nn.Sequential(layer, norm, nn.Spike(), nn.IntLinear(1, 1, per_channel=False)).eval()
    soft = capture(module, (1,))
    hard = conversion(soft)
    assert prove(hard.net, hard).holds
    proof = prove(hard.net, replace(hard, program=soft))
    assert not proof.holds
    assert "floats may decide u = 100 either way" in proof.failures[0]


def test_sums_that_floats_do_not_hold_are_disproved() -> None:
    module = torch.nn.Sequential(nn.IntLinear(20, 3), nn.Spike(), nn.IntLinear(3, 2, per_channel=False)).eval()
    made = conversion(capture(module, (20,)))
    program = Program(replace(made.program.input, bits=16), list(made.program.ops))
    wide = replace(made, net=replace(made.net, input=program.input), program=program)
    assert prove(made.net, made).holds
    proof = prove(wide.net, wide)
    assert proof.populations[0].worst_case >= 1 << 24
    assert "floats are exact below 16,777,216 only" in proof.failures[0]


def test_a_bare_integer_network_has_ranges_only() -> None:
    proof = prove(ZOO["lenet"])
    assert (proof.holds, proof.dtype) == (True, None)
    assert all(p.limit is None and not p.evaluated for p in proof.populations)


def test_pytorch_s_own_wrong_decision_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    made = converted(1)
    monkeypatch.setitem(
        sys.modules["s3nn_deploy.program"].KINDS,
        "spike",
        lambda x, threshold, strict: (x >= threshold + 0.5).to(x.dtype),
    )
    assert "PyTorch itself decides u" in prove(made.net, made).failures[0]


def test_where_not_every_u_is_tried_it_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s3nn_deploy.proof.EVERY", 64)
    made = converted(1)
    first = prove(made.net, made).populations[0]
    assert 0 < first.evaluated < first.reachable


def test_figures_are_those_of_the_channel() -> None:
    """u from -6 to 6, fires where u / 2 - 1 / 4 >= 1, that is from 3 on, half-way at 2.5."""
    layer = nn.IntLinear(2, 1, bias=False, step="fixed")
    layer.fixed_step.fill_(1.0)
    layer.weight.data[:] = torch.tensor([[6.0, -6.0]])
    norm = torch.nn.BatchNorm1d(1, eps=0).eval()
    norm.weight.data[:], norm.bias.data[:] = 0.5, -0.25
    module = torch.nn.Sequential(layer, norm, nn.Spike(), nn.IntLinear(1, 1, per_channel=False)).eval()
    made = conversion(capture(module, (2,), 1))
    p = prove(made.net, made).populations[0]
    assert (p.low, p.high, p.theta, p.direction, p.distance) == ((-6,), (6,), (3,), (1,), (0.5,))
    assert p.error[0] is not None
    assert 0 < p.error[0] < 1e-4
    assert p.safety == 0.5 / p.error[0]
    assert np.array_equal([Fraction(p.worst_case)], [12])


def test_the_proof_of_a_path_is_in_the_result(tmp_path: Path) -> None:
    import s3nn_deploy as s3

    module, shape, bits = random_module(1)
    result = s3.verify(s3.save_model(module, tmp_path / "m.pt", shape, bits), backends=["emulator"])
    assert result.equal
    assert result.proof.holds
    assert result.proof.populations[0].name == "layer0"
