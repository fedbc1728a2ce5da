"""Each trap of Lava has a guard, and a network that shows when the guard is gone: other spikes, or a run that fails."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from s3nn_deploy import lava_env
from s3nn_deploy.backends import lava, reference
from s3nn_deploy.errors import DeployError
from s3nn_deploy.formats import lava as lava_file
from s3nn_deploy.formats import netx
from s3nn_deploy.intnet import Conv2d, Dense, Input
from s3nn_deploy.loihi import mapping
from tests.nets import ZOO, assert_same, samples
from tests.test_lava import NETS, WIDE, chain, interpreter, with_first_thresholds  # noqa: F401

BACKENDS = Path(lava_env.CHILD).parent

RNG = np.random.default_rng(11)
W = lambda *shape: RNG.integers(-128, 128, shape)  # noqa: E731

PIXELS = chain(Input((1, 6, 7), 3), Conv2d(W(4, 1, 3, 2)), Conv2d(W(3, 4, 2, 2)), Dense(W(5, 45)))
"""Non-square, asymmetric kernels, graded input, a flattened image: what a wrong axis or lost bit cannot pass."""

SMALL = chain(
    Input((300,), 1), Dense(RNG.integers(0, 3, (30, 300))), Dense(RNG.integers(-1, 2, (20, 30))), Dense(W(4, 20))
)
"""Potentials of some hundred next to the threshold: one unit, one bit, or the remainder of the last step decides."""

CHILD, BUILDER = "lava_child.py", "lava_builder.py"
DEPTH, LAG = 'model.time_step - 1 - model.proc_params["depth"]', 'model.time_step - 1 - model.proc_params["lag"]'
SINGLE = '(synapses.update(weight_exp=connection["weight_exp"] + 1), weight // 2)[1]'
FAR, BEYOND = WIDE["thresholds far apart, dense"], WIDE["sums of a hidden layer beyond 24 bits"]

FIELDS = NETS["beyond 8-bit fields"]

GUARDS = {
    "the fixed-point models": (CHILD, 'select_tag="fixed_pt"', "", SMALL),
    "dv = 4096 forgets the potential": (BUILDER, "dv=4096", "dv=4095", SMALL),
    "du = 4095 forgets the current": (BUILDER, "du=4095", "du=4094", SMALL),
    "> and not >=": (BUILDER, 'vth=group["vth"], bias_mant', 'vth=group["vth"] - 1, bias_mant', SMALL),
    "weights are stored doubled": (BUILDER, "weight.astype(np.int32), sign_mode", f"{SINGLE}, sign_mode", SMALL),
    "the kernel is flipped": (BUILDER, "[:, :, ::-1, ::-1]", "", PIXELS),
    "images are (W, H, C)": (BUILDER, "port.transpose([2, 1, 0]).flatten()", "port.flatten()", PIXELS),
    "stride and padding are (w, h)": (BUILDER, "tuple(wires[key][::-1])", "tuple(wires[key])", NETS["dilation"]),
    "a layer lags one step": (CHILD, DEPTH, DEPTH.replace(" - 1", ""), SMALL),
    "the input of a join waits": (CHILD, LAG, "model.time_step - 1", ZOO["residual"]),
    "graded input is a number": (BUILDER, 'connection["message_bits"]', "0", PIXELS),
    "always-on neurons": (BUILDER, "np.tile(weight.astype", "0 * np.tile(weight.astype", FAR),
    "graded neurons keep 24 bits": (BUILDER, 'if group["neuron"] == "graded":', "if not group:", BEYOND),
    "fields of more than 8 bits": (CHILD, 'for name in ("kernel_size"', 'for name in () and ("kernel_size"', FIELDS),
}
"""The script, the guard in it, what is there without it, and a network that shows it."""


def differs(net, file=None):
    """Whether a run gives other spikes or other readouts, or fails."""
    x = samples(net, 24, seed=1)
    try:
        assert_same(lava.run(net, x, file), reference.run(net, x))
    except (AssertionError, DeployError):
        return True
    return False


@pytest.mark.lava
@pytest.mark.parametrize("trap", GUARDS)
def test_without_its_guard_a_trap_shows(trap, interpreter, tmp_path, monkeypatch):  # noqa: F811
    script, guard, without, net = GUARDS[trap]
    for name in ("lava_child.py", "lava_builder.py"):
        shutil.copy(BACKENDS / name, tmp_path)
    text = (tmp_path / script).read_text()
    assert text.count(guard) == 1
    (tmp_path / script).write_text(text.replace(guard, without))
    monkeypatch.setattr(lava_env, "CHILD", tmp_path / "lava_child.py")
    monkeypatch.setenv("S3NN_LAVA_TIMEOUT", "60")
    assert differs(net)


@pytest.mark.lava
def test_the_networks_of_the_traps_are_exact_with_all_guards(interpreter):  # noqa: F811
    assert not differs(PIXELS)
    assert not differs(SMALL)


@pytest.mark.lava
def test_a_bias_beyond_13_bits_would_wrap(interpreter, monkeypatch):  # noqa: F811
    net = with_first_thresholds(FAR, [40000, -40000, 0, 1, 2])
    assert not differs(net)
    monkeypatch.setattr(mapping, "BIAS_MIN", -(1 << 20))
    monkeypatch.setattr(mapping, "BIAS_MAX", 1 << 20)
    assert {g.role for g in mapping.make(net).groups} == {"population", "readout"}
    assert differs(net)


@pytest.mark.lava
def test_a_sum_beyond_24_bits_would_wrap(interpreter, monkeypatch):  # noqa: F811
    net = WIDE["sums of a hidden layer beyond 24 bits"]
    assert mapping.make(net)["p1"].neuron == "graded"
    monkeypatch.setattr(mapping, "VTH_MAX", 1 << 23)
    assert mapping.make(net)["p1"].neuron == "lif"
    assert differs(net)


@pytest.mark.lava
def test_what_netx_loads_as_other_weights_would_differ(interpreter, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setattr(netx, "_check_weights", lambda where, population: None)
    for weight in (np.zeros((3, 4), int), np.full((3, 4), -128)):
        net = chain(Input((4,), 1), Dense(weight), Dense(W(2, 3)))
        net = replace(net, populations=(replace(net.populations[0], threshold=[-300, -256, -128]), net.populations[1]))
        assert differs(net, netx.write(net, tmp_path / "x.net"))
        assert not differs(net)


@pytest.mark.lava
def test_an_exception_inside_lava_is_in_the_error(interpreter, tmp_path, monkeypatch):  # noqa: F811
    for name in ("lava_child.py", "lava_builder.py"):
        shutil.copy(BACKENDS / name, tmp_path)
    text = (tmp_path / "lava_child.py").read_text()
    text = text.replace(
        "def record_spikes(model: Any) -> None:\n", "def record_spikes(model: Any) -> None:\n    1 / 0\n"
    )
    (tmp_path / "lava_child.py").write_text(text)
    monkeypatch.setattr(lava_env, "CHILD", tmp_path / "lava_child.py")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with pytest.raises(DeployError, match="ZeroDivisionError"):
        lava.run(SMALL, samples(SMALL, 4))


def test_the_file_of_every_trap_network_reads_back(tmp_path):
    for net in (PIXELS, SMALL, *WIDE.values()):
        assert lava_file.read(lava_file.write(net, tmp_path / "x.lava")) == lava_file.lower(net)
