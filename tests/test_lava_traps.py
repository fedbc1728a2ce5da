"""Each trap of Lava has a guard, and a network that shows when the guard is gone: other spikes, or a run that fails."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from s3nn_deploy import formats, lava_env
from s3nn_deploy.backends import lava, reference
from s3nn_deploy.errors import DeployError
from s3nn_deploy.formats import lava as lava_file
from s3nn_deploy.formats import netx
from s3nn_deploy.intnet import Conv2d, Dense, Input
from s3nn_deploy.loihi import mapping
from tests.nets import ZOO, assert_same, samples
from tests.test_lava import (
    NETS,
    RUNNER,
    WIDE,
    chain,
    delivered,
    in_lava,
    interpreter,  # noqa: F401
    with_first_thresholds,
)

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
SCRIPTS = (CHILD, BUILDER)
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
    "fields of more than 8 bits": (BUILDER, 'for name in ("kernel_size"', 'for name in () and ("kernel_size"', FIELDS),
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


@pytest.fixture
def changed(tmp_path, monkeypatch):
    """A function that puts the scripts into a folder of their own, one of them changed, for the runs that follow."""

    def change(script, old, new):
        for name in SCRIPTS:
            shutil.copy(BACKENDS / name, tmp_path)
        text = (tmp_path / script).read_text()
        assert text.count(old) == 1
        (tmp_path / script).write_text(text.replace(old, new))
        monkeypatch.setattr(lava_env, "CHILD", tmp_path / CHILD)
        monkeypatch.setenv("S3NN_LAVA_TIMEOUT", "60")
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
        return tmp_path

    return change


@pytest.mark.lava
@pytest.mark.parametrize("trap", GUARDS)
def test_without_its_guard_a_trap_shows(trap, interpreter, changed):  # noqa: F811
    script, guard, without, net = GUARDS[trap]
    changed(script, guard, without)
    assert differs(net)


RUNNER_GUARDS = {
    "the fixed-point models": ('select_tag="fixed_pt"', "", SMALL),
    "a sink that is long enough does not wrap": ("shape, buffer=steps", "shape, buffer=n", SMALL),
    "a group lags its depth": ('.T[group["depth"] :]', ".T[1:]", SMALL),
    "the input of a join waits": ("np.zeros((lag, *feeds", "np.zeros((0, *feeds", ZOO["residual"]),
    "shims and fields of more than 8 bits": ("    import_lava()\n", "", FIELDS),
}
"""The guard in the delivered runner's own part, what is there without it, and a network that shows it."""


@pytest.mark.lava
@pytest.mark.parametrize("trap", RUNNER_GUARDS)
def test_without_its_guard_the_runner_says_so(trap, interpreter, changed, tmp_path):  # noqa: F811
    guard, without, net = RUNNER_GUARDS[trap]
    delivered(net, tmp_path)
    changed(BUILDER, guard, without)
    status, said = in_lava(interpreter, tmp_path, *RUNNER)
    assert status in (1, 2), said


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


IN_A_SINK = "def record_spikes(model: Any) -> None:\n"
BEFORE_A_RUN = "        rewire_lava()\n"


@pytest.mark.lava
def test_an_exception_inside_lava_is_in_the_error(interpreter, changed):  # noqa: F811
    changed(CHILD, IN_A_SINK, f"{IN_A_SINK}    1 / 0\n")
    with pytest.raises(DeployError, match="ZeroDivisionError"):
        lava.run(SMALL, samples(SMALL, 4))


@pytest.mark.lava
def test_no_value_is_fetched_by_a_message(interpreter, changed):  # noqa: F811
    """Lava's `Var.get` takes 16 us a value: a readout and spikes of some thousand samples would take minutes."""
    forbid = "        from lava.magma.core.process.variable import Var\n        Var.get = None\n"
    changed(CHILD, BEFORE_A_RUN, BEFORE_A_RUN + forbid)
    assert not differs(SMALL)
    assert not differs(WIDE["a readout beyond 24 bits"])


@pytest.mark.lava
@pytest.mark.parametrize("ours", [False, True])
def test_no_script_beside_ours_is_executed(ours, interpreter, changed):  # noqa: F811
    """Lava executes all that lies beside the module of a process's class; that is why we have no such classes."""
    old = "    return LIF(shape"
    new = "    class Ours(LIF):\n        pass\n\n    sys.modules['lava_builder'] = sys.modules[__name__]\n    return Ours(shape"
    folder = changed(BUILDER, old, new if ours else old)
    (folder / "neighbour.py").write_text(f"import pathlib\npathlib.Path({str(folder / 'executed')!r}).touch()\n")
    if ours:
        (folder / CHILD).write_text(
            (folder / CHILD)
            .read_text()
            .replace(
                "    spec.loader.exec_module(module)\n",
                "    sys.modules['lava_builder'] = module\n    spec.loader.exec_module(module)\n",
            )
        )
    differs(SMALL)
    assert (folder / "executed").exists() == ours


@pytest.mark.lava
def test_a_file_may_be_written_anew_while_lava_runs_it(interpreter, tmp_path):  # noqa: F811
    """netx never closes it."""
    file = netx.write(SMALL, tmp_path / "x.net")
    x = samples(SMALL, 600)

    def rewrite(done, total):
        formats.export(PIXELS, file, "netx")

    assert_same(lava.run(SMALL, x, file, rewrite), reference.run(SMALL, x))
    assert formats.read(file) == netx.lower(PIXELS)


def test_nothing_of_ours_but_the_scripts_imports_lava():
    """It sets the start method of `multiprocessing`, for good."""
    importing = [
        path.name
        for path in BACKENDS.parent.rglob("*.py")
        if re.search(r"^ *(from|import) lava[.]", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert sorted(importing) == sorted(SCRIPTS)


def test_versions_are_pinned_for_lava_is_archived():
    for _, requirements in lava_env.ENVIRONMENT.installs:
        assert all("==" in requirement.split(";")[0] for requirement in requirements)


@pytest.mark.lava
def test_lava_brings_no_package_called_tests(interpreter):  # noqa: F811
    if interpreter.parent.parent == lava_env.folder():
        assert not list(interpreter.parent.parent.glob("lib/python3*/site-packages/tests"))
        assert list(interpreter.parent.parent.glob("lib/python3*/site-packages/lava"))


def test_the_file_of_every_trap_network_reads_back(tmp_path):
    for net in (PIXELS, SMALL, *WIDE.values()):
        assert lava_file.read(lava_file.write(net, tmp_path / "x.lava")) == lava_file.lower(net)
