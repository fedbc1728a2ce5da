"""Lava's fixed-point simulation computes what the reference does, and leaves nothing behind, however it ends."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from s3nn_deploy import environments, golden, lava_env
from s3nn_deploy.backends import lava, reference
from s3nn_deploy.backends import netx as netx_backend
from s3nn_deploy.errors import DeployError
from s3nn_deploy.files import read_npz, write_npz
from s3nn_deploy.formats import lava as lava_file
from s3nn_deploy.formats import netx
from s3nn_deploy.intnet import INPUT, Conv2d, Dense, Input, IntNet, Population, Projection, check
from s3nn_deploy.loihi import delivery, mapping
from s3nn_deploy.targets import load
from tests.nets import SEQUENTIAL, ZOO, assert_same, samples, with_thresholds

# -- the environment -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def interpreter():
    """The interpreter that runs Lava, installed now if it is not."""
    try:
        return lava_env.find()
    except DeployError:
        return lava_env.setup()


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A cache of its own and a counterfeit Python to build on: it counts installations, and fails while it is offline."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("S3NN_LAVA_PYTHON", raising=False)
    python = tmp_path / "python3"
    python.write_text(
        textwrap.dedent(f"""\
        #!/bin/sh
        case "$*" in
            *version_info*) echo "[3, $(cat {tmp_path}/minor)]" ;;
            *"-m venv"*) for place; do :; done; mkdir -p "$place/bin"; cp "$0" "$place/bin/python" ;;
            *"pip install"*)
                case "$*" in *"--ignore-requires-python lava-nc"*) ;; *lava-nc*) exit 1 ;; esac  # as pip does on 3.11
                mkdir -p "$(dirname "$0")/../lib/python3.11/site-packages/tests"
                echo . >> {tmp_path}/count; sleep 0.2; echo what pip says; test ! -e {tmp_path}/offline ;;
            *--check*) echo '{{"python": "3.11"}}' ;;
        esac
        """),
        encoding="utf-8",
    )
    python.chmod(0o755)
    (tmp_path / "minor").write_text("11")
    (tmp_path / "count").write_text("")
    return python


def installations(python):
    return (python.parent / "count").read_text().count(".")


def test_without_lava_the_hint_is_the_command_that_installs_it(elsewhere):
    for attempt in (lava_env.find, lambda: lava.run(SEQUENTIAL["mlp"], samples(SEQUENTIAL["mlp"]))):
        with pytest.raises(DeployError, match="Run: s3nn-deploy setup loihi"):
            attempt()


def test_setup_says_its_size_installs_once_and_is_found(elsewhere):
    said = []
    python = lava_env.setup(str(elsewhere), said.append)
    assert "135 MB to download" in said[0]
    assert lava_env.setup(str(elsewhere), said.append) == lava_env.find() == python
    assert installations(elsewhere) == 2  # what Lava needs, and Lava
    assert list(lava_env.folder().glob("lib/python3*/site-packages"))
    assert not list(lava_env.folder().glob("lib/python3*/site-packages/tests"))


def test_setup_removes_nothing_outside_the_environment(elsewhere, tmp_path):
    (precious := tmp_path / "precious").mkdir()
    wrong = replace(lava_env.ENVIRONMENT, bulk=("tests", str(precious), "../../../../../../precious", "."))
    environments.setup(wrong, str(elsewhere), lambda _: None)
    assert precious.is_dir()
    (packages,) = environments.folder(wrong).glob("lib/python3*/site-packages")
    assert packages.is_dir()
    assert not (packages / "tests").exists()


def test_a_setup_that_failed_is_not_found_and_the_next_one_mends_it(elsewhere):
    (elsewhere.parent / "offline").touch()
    with pytest.raises(DeployError, match="what pip says") as caught:
        lava_env.setup(str(elsewhere), lambda _: None)
    assert "what pip says" in Path(caught.value.hint.split(" is in ")[1].split(". ")[0]).read_text()
    with pytest.raises(DeployError, match="setup loihi"):
        lava_env.find()
    (elsewhere.parent / "offline").unlink()
    assert lava_env.setup(str(elsewhere), lambda _: None) == lava_env.find()


def test_two_setups_at_once_install_once(elsewhere):
    threads = [threading.Thread(target=lava_env.setup, args=(str(elsewhere), lambda _: None)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lava_env.find()
    assert installations(elsewhere) == 2


@pytest.mark.parametrize("minor", ["9", "14"])
def test_setup_refuses_a_python_that_lava_does_not_run_on(elsewhere, minor):
    (elsewhere.parent / "minor").write_text(minor)
    with pytest.raises(DeployError, match=f"3.10 to 3.13.*got 3.{minor}"):
        lava_env.setup(str(elsewhere), lambda _: None)
    with pytest.raises(DeployError, match="does not run"):
        lava_env.setup(str(elsewhere.parent / "missing"), lambda _: None)


def test_the_variable_names_another_interpreter(elsewhere, monkeypatch):
    monkeypatch.setenv("S3NN_LAVA_PYTHON", str(elsewhere))
    assert lava_env.find() == elsewhere
    for wrong in (str(elsewhere.parent), str(elsewhere.parent / "missing")):
        monkeypatch.setenv("S3NN_LAVA_PYTHON", wrong)
        with pytest.raises(DeployError, match="S3NN_LAVA_PYTHON"):
            lava_env.find()


# -- exactness -------------------------------------------------------------------------------------------------------


def chain(spec, *layers, seed=0):
    """A network of the given synapses, thresholds on potentials that occur."""
    rng, source, at, populations = np.random.default_rng(seed), INPUT, spec.shape, []
    for index, synapses in enumerate(layers):
        at = synapses.out_shape(at)
        last = index == len(layers) - 1
        neurons = {"bias": rng.integers(-999, 999, at[0])} if last else {"threshold": np.zeros(at[0], int)}
        populations.append(Population(f"p{index}", at, (Projection(source, synapses),), **neurons))
        source = f"p{index}"
    return with_thresholds(check(IntNet(spec, tuple(populations))), seed)


def nets():
    """Chains of the shared list that a netx file holds, and one for each corner."""
    rng = np.random.default_rng(0)
    w = lambda *shape: rng.integers(-128, 128, shape)  # noqa: E731
    extreme = lambda *shape: rng.choice([-128, 127], shape)  # noqa: E731
    lenet = SEQUENTIAL["lenet"]
    chosen = {name: SEQUENTIAL[name] for name in ("mlp", "chain2", "chain5")}
    chosen["lenet of 5 bits"] = with_thresholds(replace(lenet, input=Input(lenet.input.shape, 5)))
    chosen["dilation"] = chain(
        Input((2, 9, 11), 1),
        Conv2d(w(3, 2, 3, 2), (1, 1), (1, 2), (2, 3)),
        Conv2d(w(2, 3, 2, 3), (2, 1), (0, 3), (3, 1)),
    )
    chosen["groups"] = chain(
        Input((4, 6, 5), 2),
        Conv2d(w(6, 2, 3, 3), padding=(1, 1), groups=2),
        Conv2d(w(12, 1, 2, 2), groups=6),
        Conv2d(w(4, 3, 2, 2), groups=4),
        Dense(w(3, 48)),
    )
    chosen["beyond 8-bit fields"] = chain(
        Input((1, 3, 140), 1),
        Conv2d(w(130, 1, 2, 3), (2, 64), (1, 5)),
        Conv2d(w(130, 1, 1, 2), (1, 3), groups=130),
        Dense(w(2, 260)),
    )
    for sign, thresholds in ((1, [65535, 65280, 50000]), (-1, [0, -1, -16000])):
        limit = sign * np.array([[64, 64, 64, 65], [65, 64, 64, 64], [64, 64, 65, 64]])  # 2 * 255 * 257 = 131,070
        net = chain(Input((4,), 8), Dense(limit), Dense(extreme(5, 3)), Dense(np.full((2, 5), -127)), Dense([[77, 0]]))
        chosen[f"sums at the limit {sign}"] = with_first_thresholds(net, thresholds)
    chosen["extreme weights"] = chain(
        Input((2, 5, 6), 3),
        Conv2d(extreme(3, 2, 3, 3)),
        Conv2d(np.full((2, 3, 2, 2), -128)),
        Dense(extreme(9, 12)),
        Dense(extreme(10, 9)),
    )
    chosen["an image into dense"] = chain(Input((3, 4, 5), 1), Dense(w(9, 60)), Dense(rng.integers(-1, 2, (4, 9))))
    chosen["one neuron"] = chain(Input((1,), 8), Dense([[1]]), Dense([[-3]]))
    chosen["silent or always on"] = with_first_thresholds(SEQUENTIAL["mlp"], [1 << 40, -(1 << 40)] * 10)
    return chosen


def with_first_thresholds(net, thresholds):
    first, *rest = net.populations
    return check(replace(net, populations=(replace(first, threshold=thresholds), *rest)))


NETS = nets()


CHAINS = [name for name in NETS if name not in ZOO or name in ("mlp", "chain5")]
"""What the netx file is tried with; all that it cannot hold the .lava file does."""


@pytest.mark.lava
@pytest.mark.parametrize("name", CHAINS)
def test_the_netx_file_computes_the_reference_in_lava(name, interpreter):
    net = NETS[name]
    x = samples(net, 12, seed=1)
    trace = netx_backend.run(net, x)
    assert trace.backend == "netx"
    assert_same(trace, reference.run(net, x))


@pytest.mark.lava
@pytest.mark.parametrize("name", [*ZOO, *(name for name in NETS if name not in ZOO)])
def test_every_network_computes_the_reference_in_lava(name, interpreter):
    net = NETS.get(name) or ZOO[name]
    x = samples(net, 12, seed=1)
    trace = lava.run(net, x)
    assert trace.backend == "lava"
    assert_same(trace, reference.run(net, x))


def wide():
    """Networks whose thresholds, sums or weights exceed what one LIF neuron, one bias or one synapse holds."""
    rng = np.random.default_rng(5)
    w = lambda *shape: rng.integers(-128, 128, shape)  # noqa: E731
    image, flat = Input((3, 6, 5), 1), Input((600,), 1)
    apart = np.concatenate([np.full((1, 600), 127), np.full((1, 600), -127), w(3, 600)])  # thresholds about +-38,000
    apart_too = np.concatenate([np.full((1, 70, 3, 3), 63), np.full((1, 70, 3, 3), -63), w(3, 70, 3, 3) // 2])
    made = {
        "thresholds far apart, dense": chain(flat, Dense(apart), Dense(w(3, 5))),
        "thresholds far apart, conv": chain(Input((70, 4, 5), 1), Conv2d(apart_too), Conv2d(w(2, 5, 1, 2))),
        "weights of 13 bits, dense": chain(image, Dense(rng.integers(-4096, 4096, (9, 90))), Dense(w(2, 9))),
        "weights of 10 bits, conv": chain(
            image, Conv2d(rng.integers(-512, 512, (4, 3, 2, 2))), Conv2d(2 * w(3, 4, 2, 2)), Dense(w(2, 36))
        ),
        "all-zero and one-signed": chain(
            flat, Dense(np.zeros((3, 600))), Dense(np.full((4, 3), -128)), Dense(-np.ones((2, 4)))
        ),
        "a readout beyond 24 bits": chain(Input((600,), 8), Dense(w(4, 600))),
        "a readout whose bias is the host's": with_bias(SEQUENTIAL["mlp"], 1 << 40),
    }
    made["sums of a hidden layer beyond 24 bits"] = chain(
        Input((8,), 1), Dense(np.eye(8, dtype=int).repeat(280, 0)), Dense(np.full((3, 2240), 127)), Dense(w(2, 3))
    )
    return made


def with_bias(net, bias):
    readout = replace(net.readout, bias=net.readout.bias.astype(np.int64) + bias)
    return check(replace(net, populations=(*net.populations[:-1], readout)))


WIDE = wide()


@pytest.mark.lava
@pytest.mark.parametrize("name", WIDE)
def test_what_exceeds_one_neuron_or_synapse_is_exact_too(name, interpreter):
    net = WIDE[name]
    x = samples(net, 12, seed=1)
    assert_same(lava.run(net, x), reference.run(net, x))


@pytest.mark.lava
@pytest.mark.parametrize(
    ("name", "encoding"),
    [
        ("residual", "graded"),
        ("residual", "thermometer"),
        ("random11", "host"),
        ("chain2", "planes"),
        ("lenet", "graded"),
    ],
)
def test_every_input_encoding_gives_the_same_spikes(name, encoding, interpreter, tmp_path):
    net = ZOO[name]
    if encoding in ("thermometer", "planes"):
        net = with_thresholds(replace(net, input=Input(net.input.shape, 3)))
    file = lava_file.write(net, tmp_path / "x.lava", encoding)
    assert lava_file.read_plan(file)[0].encoding == encoding
    x = samples(net, 12, seed=1)
    assert_same(lava.run(net, x, file), reference.run(net, x))


@pytest.mark.lava
def test_a_given_file_is_run_and_must_be_the_networks(interpreter, tmp_path):
    net, other = SEQUENTIAL["mlp"], SEQUENTIAL["chain5"]
    file, x = netx.write(net, tmp_path / "mlp.net"), samples(net, 1)
    trace = lava.run(net, x, file)
    assert trace.backend == "netx"
    assert_same(trace, reference.run(net, x))
    assert_same(lava.run(net, x, lava_file.write(net, tmp_path / "mlp.lava")), reference.run(net, x))
    with pytest.raises(DeployError, match="not the export of this network"):
        lava.run(other, samples(other), file)
    assert lava.run(net, x[:0], file).readout.shape == (0, 10)


# -- how it ends -----------------------------------------------------------------------------------------------------

CONVOLUTIONS = (Conv2d(np.ones((8, channels, 3, 3)), padding=(1, 1)) for channels in (3, 8))
LONG = chain(Input((3, 16, 16), 4), *CONVOLUTIONS, Dense(np.ones((2, 2048))))


def shared_memory():
    return set(Path("/dev/shm").glob("*"))


class Left:
    """What a run, marked by its environment, has of processes, shared memory, temporary files and logs."""

    def __init__(self, folder, monkeypatch):
        self.mark, self.folder, self.shared_before = uuid.uuid4().hex, folder, shared_memory()
        monkeypatch.setenv("S3NN_TEST_MARK", self.mark)
        monkeypatch.setenv("XDG_STATE_HOME", str(folder))
        monkeypatch.setenv("TMPDIR", str(folder / "tmp"))
        monkeypatch.setattr("tempfile.tempdir", None)
        (folder / "tmp").mkdir()

    def processes(self):
        """Of the child and of all that Lava forked, the ids."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                environment, command = (process / "environ").read_bytes(), (process / "cmdline").read_bytes()
            except OSError:
                continue
            if self.mark.encode() in environment and b"lava_child" in command:
                found.append(int(process.name))
        return sorted(found)

    def until(self, count):
        """Wait until at least `count` processes run."""
        deadline = time.monotonic() + 30
        while len(running := self.processes()) < count:
            assert time.monotonic() < deadline, running
            time.sleep(0.05)
        return running

    def nothing(self, within=0.0):
        deadline = time.monotonic() + within
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.05)
        return not (self.processes() or list(self.folder.glob("tmp/*")) or shared_memory() - self.shared_before)

    def log(self):
        (log,) = self.folder.glob("s3nn-deploy/log/*.log")
        return log


@pytest.fixture
def left(tmp_path, monkeypatch):
    return Left(tmp_path, monkeypatch)


@pytest.mark.lava
def test_a_good_run_leaves_nothing(interpreter, left):
    lava.run(SEQUENTIAL["mlp"], samples(SEQUENTIAL["mlp"], 2))
    assert left.nothing()
    assert not list(left.folder.glob("s3nn-deploy/log/*"))


@pytest.mark.lava
def test_a_run_that_takes_too_long_is_ended_whole(interpreter, left, monkeypatch):
    monkeypatch.setenv("S3NN_LAVA_TIMEOUT", "8")
    seen = []
    watcher = threading.Thread(target=lambda: seen.extend(left.until(8)))
    watcher.start()
    with pytest.raises(DeployError, match=r"stopped after 8 s.*S3NN_LAVA_TIMEOUT") as caught:
        lava.run(LONG, samples(LONG, 5000))
    assert left.nothing()
    watcher.join()
    assert len(seen) >= 8
    assert str(left.log()) in str(caught.value)
    monkeypatch.setenv("S3NN_LAVA_TIMEOUT", "soon")
    with pytest.raises(DeployError, match="seconds, got 'soon'"):
        lava.run(LONG, samples(LONG, 4))


@pytest.mark.lava
def test_a_crash_names_its_log(left, monkeypatch):
    monkeypatch.setenv("S3NN_LAVA_PYTHON", sys.executable)  # which has no Lava
    with pytest.raises(DeployError, match="No module named 'lava'") as caught:
        lava.run(SEQUENTIAL["mlp"], samples(SEQUENTIAL["mlp"], 2))
    assert str(left.log()) in str(caught.value)
    assert "Traceback" in left.log().read_text()
    assert left.nothing()


@pytest.mark.lava
@pytest.mark.parametrize("running", [3, 11])
def test_a_lava_process_that_is_killed_ends_the_run(interpreter, left, running):
    def kill():
        os.kill(left.until(running)[-1], signal.SIGKILL)

    threading.Thread(target=kill).start()
    with pytest.raises(DeployError, match="killed by signal 9"):
        lava.run(LONG, samples(LONG, 5000))
    assert left.nothing()


@pytest.mark.lava
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_when_the_program_is_ended_so_is_lava(interpreter, left, number):
    program = "from tests.test_lava import *; signal.signal(signal.SIGINT, signal.default_int_handler); "
    program += "lava.run(LONG, samples(LONG, 5000))"
    checkout = Path(__file__).parent.parent
    with subprocess.Popen([sys.executable, "-c", program], cwd=checkout, stderr=subprocess.DEVNULL) as parent:
        left.until(8)
        parent.send_signal(number)
    assert left.nothing(within=3)


@pytest.mark.lava
def test_two_runs_at_once_do_not_meet(interpreter, left):
    traces = {}

    def go(name):
        traces[name] = lava.run(NETS[name], samples(NETS[name], 20))

    threads = [threading.Thread(target=go, args=(name,)) for name in ("mlp", "chain2")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, trace in traces.items():
        assert_same(trace, reference.run(NETS[name], samples(NETS[name], 20)))
    assert len(traces) == 2
    assert left.nothing()


# -- what a delivery holds, with Lava alone ----------------------------------------------------------------------------


def delivered(net, folder, target="loihi2", encoding="auto"):
    """The delivery of `net` in `folder`, with stimuli of the tests as golden samples."""
    return delivery.deliver(net, load(target), folder / "own.net", samples(net, 10, 1), encoding=encoding)


def in_lava(interpreter, folder, *arguments):
    """What a script prints that Lava's interpreter runs in `folder`, with the files there beside it."""
    made = subprocess.run([interpreter, *arguments], cwd=folder, capture_output=True, text=True, timeout=120)
    return made.returncode, made.stdout + made.stderr


RUNNER = ("lava_builder.py", "own.lava", "own.lava.golden.npz")


@pytest.mark.lava
@pytest.mark.parametrize("name", ["residual", "beyond 8-bit fields"])
def test_the_runner_of_a_delivery_compares_every_value_and_says_what_differs(name, interpreter, tmp_path):
    net = NETS.get(name) or ZOO[name]
    delivered(net, tmp_path)
    status, said = in_lava(interpreter, tmp_path, *RUNNER)
    assert status == 0, said
    for p in net.populations:
        assert f"{p.name}: {10 * p.size} values of 10 samples, 0 different" in said
    meta, arrays = read_npz(tmp_path / "own.lava.golden.npz", golden.SCHEMA)
    arrays["output"][3, 0] += 1
    arrays[f"spikes/{net.populations[0].name}"][7].flat[5] ^= True
    write_npz(tmp_path / "own.lava.golden.npz", meta, arrays)
    status, said = in_lava(interpreter, tmp_path, *RUNNER)
    assert status == 1
    assert said.count(" 1 different") == 2


@pytest.mark.lava
def test_the_runner_leaves_nothing_when_it_fails(interpreter, left, tmp_path):
    delivered(SEQUENTIAL["mlp"], tmp_path)
    runner = tmp_path / RUNNER[0]
    runner.write_text(runner.read_text().replace("    process.stop()\n", "    process.stop() if n > 10 else 1 / 0\n"))
    status, said = in_lava(interpreter, tmp_path, *RUNNER)
    assert status == 2
    assert "ZeroDivisionError" in said
    assert left.nothing(within=3)
    assert in_lava(interpreter, tmp_path, RUNNER[0])[0] == 1


ADAPTERS = """
from types import SimpleNamespace
from lava.proc.graded.process import GradedVec

def through(shape, num_message_bits):
    same = GradedVec(shape=shape, vth=0)
    return SimpleNamespace(inp=same.a_in, out=same.s_out)

eio = SimpleNamespace(spike=SimpleNamespace(PyToNxAdapter=through, PyToN3ConvAdapter=through, NxToPyAdapter=through))
"""
"""In place of what only members have: spikes pass them, in the same step."""


@pytest.mark.lava
@pytest.mark.parametrize(
    ("name", "target", "encoding", "loads"),
    [
        ("mlp", "loihi2", "auto", "netx.hdf5.Network"),
        ("groups", "loihi2", "graded", "netx.hdf5.Network"),
        ("groups", "loihi", "thermometer", "lava_builder.load"),
        ("residual", "loihi", "host", "lava_builder.load"),
        ("a readout beyond 24 bits", "loihi2", "auto", "lava_builder.load"),
    ],
)
def test_the_lines_of_the_note_find_all_golden_samples(name, target, encoding, loads, interpreter, tmp_path):
    net = NETS.get(name) or WIDE.get(name) or ZOO[name]
    delivered(net, tmp_path, target, encoding)
    code = (tmp_path / f"own.{target}.md").read_text().split("```python\n")[1].split("```")[0]
    assert loads in code
    chip = "1" if target == "loihi" else "2"
    for line, instead in (
        ("from lava.proc import embedded_io as eio\n", ADAPTERS),
        ("from lava.utils import loihi\n", ""),
        (next(line for line in code.splitlines(True) if line.startswith("loihi.use")), ""),
        (f"Loihi{chip}HwCfg\n", f"Loihi{chip}SimCfg\n"),
        (f"Loihi{chip}HwCfg()", f'Loihi{chip}SimCfg(select_tag="fixed_pt")'),
    ):
        assert code.count(line) == 1
        code = code.replace(line, instead)
    if "eio.state.Read" in code:  # a sink of Lava's own reads the potential
        lines = [line for line in code.splitlines() if not line.startswith(("result = ", "back.out"))]
        code = "\n".join(lines).replace(
            "eio.state.Read(shape=neurons.s_out.shape)", "sink.Read(buffer=T + latency + late)"
        )
        code = code.replace("result.data", "back.data")
    shutil.copy(lava_env.CHILD, tmp_path)
    prelude = "import lava_child; lava_child.builder.import_lava(); lava_child.import_netx()\n"
    (tmp_path / "note.py").write_text(prelude + code)
    status, said = in_lava(interpreter, tmp_path, "note.py")
    assert status == 0, said
    assert "0 more steps: 10 of 10 golden samples" in said
    assert said.count("10 of 10") == 1


def test_the_wide_networks_need_what_they_are_here_for():
    plans = {name: mapping.make(net) for name, net in WIDE.items()}
    kinds = {name: {g.neuron for g in plan.groups} for name, plan in plans.items()}
    for name in ("thresholds far apart, dense", "thresholds far apart, conv"):
        assert kinds[name] == {"lif"}
        assert any(g.role == "always-on" for g in plans[name].groups)
    assert plans["sums of a hidden layer beyond 24 bits"]["p1"].neuron == "graded"
    for name in ("weights of 13 bits, dense", "weights of 10 bits, conv"):
        assert len([c for c in plans[name].connections if c.target == "p0" and c.projection == 0]) > 1
    assert plans["a readout beyond 24 bits"].readout.neuron == "graded"
    assert plans["a readout whose bias is the host's"].readout.host_bias is not None
