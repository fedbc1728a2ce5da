"""Other tools' NIR graphs: what is an integer network of one step is read as that network, the rest is refused by name."""

import itertools
import json
import os
import subprocess
from pathlib import Path

import nets
import nir
import numpy as np
import pytest
from click.testing import CliRunner
from test_nir import affine, chain, ends, ifs, interpret, put

import s3nn_deploy as s3
from s3nn_deploy import cli, formats, peers
from s3nn_deploy.backends import reference
from s3nn_deploy.errors import DeployError


def lif(*shape, at=0.5, tau=1e-4, r=1.0, v_leak=0.0):
    full = lambda value: np.full(shape, value)  # noqa: E731
    return nir.LIF(tau=full(tau), r=full(r), v_leak=full(v_leak), v_threshold=full(at))


def cuba(*shape, at=0.5, tau=1e-4, r=1.0, w_in=1.0):
    full = lambda value: np.full(shape, value)  # noqa: E731
    return nir.CubaLIF(
        tau_syn=full(tau), tau_mem=full(tau), r=full(r), v_leak=full(0.0), v_threshold=full(at), w_in=full(w_in)
    )


def li(*shape, tau=1e-4, r=1.0):
    return nir.LI(tau=np.full(shape, tau), r=np.full(shape, r), v_leak=np.zeros(shape))


def threshold(*shape, at=0.5):
    return nir.Threshold(threshold=np.full(shape, at))


def assert_read(path, fires=np.greater, **options):
    """Our reading gives what an interpreter of the raw graph gives: every neuron, and the output."""
    net = formats.read(path, **options)
    x = nets.samples(net, 32)
    got, want = reference.run(net, x), interpret(nir.read(path, type_check=False), x, fires)
    for name, spikes in got.spikes.items():
        assert np.array_equal(spikes, want[name].reshape(spikes.shape)), name
    assert np.array_equal(got.readout, want["output"].reshape(len(x), -1))
    return net


NEURONS = {
    "IF": lambda *n, at: ifs(*n, at=at),
    "IF of SpikingJelly, r = 1 / dt": lambda *n, at: nir.IF(r=np.full(n, 1e4), v_threshold=np.full(n, at)),
    "LIF": lif,
    "LIF in float32": lambda *n, at: lif(*n, at=np.float32(at), tau=np.float32(1e-4)),
    "CubaLIF": cuba,
    "CubaLIF of Rockpool": lambda *n, at: cuba(*n, at=at, tau=1.0, r=1e9),
    "Threshold": threshold,
}


@pytest.mark.parametrize("fires", [np.greater, np.greater_equal])
@pytest.mark.parametrize("at", [2.5, 2.0, 2.3, -1.5, 0.0])
@pytest.mark.parametrize("kind", NEURONS)
def test_a_neuron_of_one_step_is_read_with_either_comparison(kind, at, fires, tmp_path):
    rng = np.random.default_rng(0)
    first, last = ends((6,), (3,))
    nodes = {"input": first, "w": affine(rng.integers(-2, 3, (5, 6)), rng.integers(-2, 3, 5)), "s": NEURONS[kind](5, at=at),
             "r": affine(rng.integers(-9, 10, (3, 5))), "output": last}  # fmt: skip
    net = assert_read(put(tmp_path / "x.nir", nodes), fires, compare=">" if fires is np.greater else ">=")
    assert net.input.bits == 1


@pytest.mark.parametrize("tau", [1e-4, 1.0])
def test_an_integrator_before_a_threshold_is_one_neuron_and_sums_what_arrives(tau, tmp_path):
    rng = np.random.default_rng(1)
    first, last = ends((6,), (3,))
    nodes = {"input": first, "a": affine(rng.integers(-2, 3, (5, 6))), "b": affine(rng.integers(-2, 3, (5, 6))),
             "li": li(5, tau=tau), "s": threshold(5, at=2.0), "r": affine(rng.integers(-9, 10, (3, 5))), "output": last}  # fmt: skip
    edges = [("input", "a"), ("input", "b"), ("a", "li"), ("b", "li"), ("li", "s"), ("s", "r"), ("r", "output")]
    net = assert_read(put(tmp_path / "x.nir", nodes, edges))
    assert [len(p.projections) for p in net.populations] == [2, 1]


def test_an_integrator_as_readout_adds_nothing(tmp_path):
    first, last = ends((2,), (2,))
    nodes = {"input": first, "w": affine([[1, 2], [3, -4]]), "s": lif(2), "r": affine([[1, 0], [2, 1]], [3, 4]),
             "li": li(2), "output": last}  # fmt: skip
    assert assert_read(put(tmp_path / "x.nir", nodes)).readout.name == "r"


def test_a_graph_that_ends_in_spikes_gives_them(tmp_path):
    first, last = ends((2, 3, 3), (4, 3, 3))
    conv = nir.Conv2d((3, 3), np.random.default_rng(2).integers(-2, 3, (4, 2, 3, 3)), 1, 1, 1, 1, np.zeros(4))
    net = assert_read(put(tmp_path / "x.nir", {"input": first, "c": conv, "s": ifs(4, 3, 3, at=1.5), "output": last}))
    assert net.readout.name == "readout"
    first, last = ends((2,), (2,))
    assert_read(put(tmp_path / "y.nir", {"input": first, "w": affine([[1, 2], [3, -4]]), "s": ifs(2), "output": last}))


def test_scalar_and_per_channel_parameters_are_for_all_neurons(tmp_path):
    rng = np.random.default_rng(3)
    conv = nir.Conv2d((3, 3), rng.integers(-2, 3, (4, 2, 3, 3)), 1, 1, 1, 1, np.zeros(4))
    first, last = ends((2, 3, 3), (3,))
    flat = nir.Flatten(input_type={"input": np.array([4, 3, 3])}, start_dim=0, end_dim=-1)
    for at in (np.array([1.5]), np.array([0.5, 1.5, 2.5, -1.5]), np.array([0.5, 1.5, 2.5, -1.5]).reshape(4, 1, 1)):
        node = nir.LIF(tau=at * 0 + 1e-4, r=at * 0 + 1, v_leak=at * 0, v_threshold=at)
        nodes = {
            "input": first,
            "c": conv,
            "s": node,
            "f": flat,
            "r": affine(rng.integers(-3, 4, (3, 36))),
            "output": last,
        }
        net = formats.read(put(tmp_path / "x.nir", nodes, check_types=False))
        assert net["s"].threshold.tolist() == np.broadcast_to(np.floor(at).reshape(-1) + 1, 4).tolist()


def test_the_input_is_pixels_where_the_reader_is_told_so(tmp_path):
    path = put(tmp_path / "x.nir", chain())
    assert assert_read(path, bits=8).input.maximum == 255
    assert s3.load(path, bits=4).input.maximum == 15


def pool(k, s, p=0):
    return nir.SumPool2d(np.array([k, k]), np.array([s, s]), np.array([p, p]))


def conv(rng, side, o, i, k, s=1, p=0, bias=True):
    b = rng.integers(-2, 3, o) if bias else np.zeros(o)
    return nir.Conv2d((side, side), rng.integers(-2, 3, (o, i, k, k)).astype(float), s, p, 1, 1, b)


def flat(*shape):
    return nir.Flatten(input_type={"input": np.array(shape)}, start_dim=-3, end_dim=-1)


@pytest.mark.parametrize("seed", range(4))
def test_linear_nodes_between_neurons_are_multiplied_out(seed, tmp_path):
    """All pairs of pooling and convolution, padded or not, then flattened into one or two affine nodes."""
    rng = np.random.default_rng(seed)
    read = refused = 0
    makers = {
        "pool2": lambda n, p: (pool(2, 2, p), 2, 2),
        "pool3": lambda n, p: (pool(3, 2, p), 3, 2),
        "conv3": lambda n, p: (conv(rng, n, 2, 2, 3, 1, p), 3, 1),
        "conv2": lambda n, p: (conv(rng, n, 2, 2, 2, 2, p, False), 2, 2),
    }
    for (a, pa), (b, pb) in itertools.product(itertools.product(makers, (0, 1)), repeat=2):
        side, nodes = 8 + seed % 2, {}
        first, last = ends((2, side, side), (3,))
        for name, (make, padding) in {"a": (a, pa), "b": (b, pb)}.items():
            nodes[name], k, s = makers[make](side, padding)
            side = (side + 2 * padding - k) // s + 1
        nodes |= {"s": ifs(2, side, side, at=1.5), "p": pool(side, side), "f": flat(2, 1, 1)}
        nodes |= {"w": affine(rng.integers(-3, 4, (4, 2)), [1, 2, 3, 4]), "r": affine(rng.integers(-3, 4, (3, 4)))}
        path = put(tmp_path / "x.nir", {"input": first, **nodes, "output": last}, check_types=False)
        try:
            assert_read(path)
            read += 1
        except DeployError as error:
            assert "node 'b': its padding is next to sums" in str(error)  # noqa: PT017
            assert pb
            refused += 1
    assert read >= 36
    assert refused >= 8


FULL_LEAK = "keeps something from step to step, or scales; expected full leak"
REFUSED = {
    "a leaky LIF": (chain(s=lif(2, tau=2e-3)), f"node 's': {FULL_LEAK}: tau = 0.0001 .*got tau 0.002, r 1.*--dt 0.001"),
    "a leaky CubaLIF": (chain(s=cuba(2, tau=2e-3)), f"node 's': {FULL_LEAK}: tau_mem = tau_syn"),
    "tau just below": (chain(s=lif(2, tau=0.99999e-4)), f"node 's': {FULL_LEAK}"),
    "r": (chain(s=lif(2, r=2.0)), f"node 's': {FULL_LEAK}.*got tau 0.0001, r 2"),
    "r of an IF": (chain(s=nir.IF(r=np.full(2, 3.0), v_threshold=np.full(2, 0.5))), "node 's': r; expected 1, got 3"),
    "w_in": (chain(s=cuba(2, w_in=2.0)), "node 's': w_in; expected 1, got 2"),
    "v_leak": (chain(s=lif(2, v_leak=-65.0)), "node 's': v_leak; expected 0, got -65"),
    "a leaky integrator": (chain(r=li(2, tau=0.02)), f"node 'r': {FULL_LEAK}"),
    "one second": (chain(s=lif(2, tau=1.0)), f"node 's': {FULL_LEAK}"),
    "an integer threshold": (chain(s=lif(2, at=3.0)), "node 's': v_threshold; expected half-integers.*load.path, compare='>'"),
    "almost an integer": (chain(s=lif(2, at=3.00000001)), "node 's': v_threshold; expected half-integers"),
    "average pooling": (chain(w=nir.AvgPool2d(np.array([2, 2]), np.array([2, 2]), np.array([0, 0]))),
                        "node 'w': expected one of .*got 'AvgPool2d'"),
    "a delay": (chain(w=nir.Delay(np.ones(2))), "node 'w': expected one of .*got 'Delay'"),
    "recurrence": (chain(w=nir.NIRGraph({"input": ends((2,), (2,))[0], "output": ends((2,), (2,))[1]}, [("input", "output")])),
                   "node 'w'.*NIRGraph"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exact_is_refused_with_the_nodes_name(case, tmp_path):
    nodes, message = REFUSED[case]
    path = put(tmp_path / "x.nir", nodes, check_types=False)
    with pytest.raises(DeployError, match=message):
        formats.read(path)


def test_another_time_step_is_taken_where_it_is_given(tmp_path):
    path = put(tmp_path / "x.nir", chain(s=lif(2, tau=1e-3)))
    assert_read(path, dt=1e-3)
    with pytest.raises(DeployError, match="compare: expected '>' or '>='"):
        formats.read(path, compare="=")


def test_the_command_takes_what_nir_leaves_open_and_says_how(tmp_path):
    def call(*arguments, code=0):
        result = CliRunner().invoke(cli.main, [str(a) for a in ("import", *arguments)])
        assert result.exit_code == code, result.output
        return result

    path = put(tmp_path / "theirs.nir", chain(s=lif(2, at=3.0, tau=1e-3)))
    assert "s3nn-deploy import FILE --dt 0.001" in call(path, code=2).stderr
    assert "s3nn-deploy import FILE --compare '>'" in call(path, "--dt", 1e-3, code=2).stderr
    assert "Next: s3nn-deploy inspect" in call(path, "--dt", 1e-3, "--compare", ">", "--bits", 8).stdout
    assert s3.load(tmp_path / "theirs.npz") == formats.read(path, dt=1e-3, compare=">", bits=8)
    made = json.loads(call(path, "--dt", 1e-3, "--compare", ">=", "--out", tmp_path / "x.npz", "--json").stdout)
    assert s3.load(made["path"]).digest == made["digest"] == formats.read(path, dt=1e-3, compare=">=").digest
    assert "expected a .nir file, got '.npz'" in call(tmp_path / "x.npz", code=2).stderr


def test_a_loop_of_linear_nodes_ends(tmp_path):
    nodes = chain(a=affine([[1, 0], [0, 1]]), b=affine([[1, 0], [0, 1]]))
    edges = [("input", "w"), ("w", "s"), ("s", "r"), ("r", "output"), ("a", "b"), ("b", "a"), ("b", "s")]
    path = put(tmp_path / "x.nir", nodes, edges, check_types=False)
    with pytest.raises(DeployError, match="part of a loop"):
        formats.read(path)


def test_products_too_large_for_64_bits_are_refused(tmp_path):
    eye, big = np.eye(2, dtype=np.int64), np.full((2, 2), 1 << 31, np.int64)
    nodes = chain(w=nir.Affine(weight=big, bias=np.zeros(2)), s=nir.Affine(weight=big, bias=np.zeros(2)), r=ifs(2))
    assert formats.read(put(tmp_path / "y.nir", chain(w=nir.Affine(weight=eye, bias=np.zeros(2))))) is not None
    with pytest.raises(DeployError, match=r"node 's': multiplied out.*below 2\^62"):
        formats.read(put(tmp_path / "x.nir", nodes))


# --------------------------------------------------------------------------------------------------------- bounds

B24, B23, B62, B31 = 1 << 24, 1 << 23, 1 << 62, 1 << 31


def whole(weight, bias=None):
    """An affine node of int64 arrays."""
    weight = np.array(weight, np.int64)
    return nir.Affine(weight=weight, bias=np.zeros(len(weight), np.int64) if bias is None else np.array(bias))


def integer(at):
    return nir.IF(r=np.ones(2), v_threshold=np.full(2, at))


def strided(stride):
    ones = np.ones((2, 2, 1, 1))
    return {**chain(w=nir.Conv2d((1, 1), ones, stride, 0, 1, 1, np.zeros(2)), s=ifs(2, 1, 1), r=flat(2, 1, 1)),
            "input": ends((2, 1, 1), (2,))[0]}  # fmt: skip


IN_AND_OUT = {
    "float weights": (chain(w=affine([[B24 - 1, 1 - B24], [1, 1]])), chain(w=affine([[B24, 1], [1, 1]])),
                      "node 'w': weight; expected integers below 16,777,216"),
    "negative float weights": (chain(w=affine([[1 - B24, 0], [1, 1]])), chain(w=affine([[-B24, 1], [1, 1]])),
                               "node 'w': weight; expected integers below 16,777,216"),
    "float bias": (chain(r=affine([[1, 0], [0, 1]], [0, B24 - 1])), chain(r=affine([[1, 0], [0, 1]], [0, B24])),
                   "node 'r': bias; expected integers below 16,777,216"),
    "whole weights": (chain(w=whole([[B62 - 512, 0], [1, 1]])), chain(w=whole([[B62, 0], [1, 1]])),
                      "node 'w': weight; expected integers below 4,611,686,018,427,387,904"),
    "thresholds": (chain(s=ifs(2, at=B23 - 0.5)), chain(s=ifs(2, at=float(B23))),
                   "node 's': v_threshold; expected numbers below 8,388,608"),
    "negative thresholds": (chain(s=ifs(2, at=0.5 - B23)), chain(s=ifs(2, at=-float(B23))),
                            "node 's': v_threshold; expected numbers below 8,388,608"),
    "whole thresholds": (chain(s=integer(B62 - 1)), chain(s=integer(B62)),
                         "node 's': v_threshold; expected integers below 4,611,686"),
    "products": (chain(w=whole(np.eye(2), [B31 - 1, 0]), s=whole([[B31, 0], [0, 1]]), r=ifs(2)),
                 chain(w=whole(np.eye(2), [B31, 0]), s=whole([[B31, 0], [0, 1]]), r=ifs(2)),
                 r"node 's': multiplied out.*below 2\^62"),
    "strides": (strided(B31 - 1), strided(B31), "node 'w': stride; expected integers below 2,147,483,648"),
}  # fmt: skip
"""Graphs just inside and just outside of the bounds of what is read."""


@pytest.mark.parametrize("case", IN_AND_OUT)
def test_numbers_just_inside_a_bound_are_read_and_just_outside_refused_by_name(case, tmp_path):
    inside, outside, message = IN_AND_OUT[case]
    assert formats.read(put(tmp_path / "in.nir", inside, check_types=False), compare=">") is not None
    with pytest.raises(DeployError, match=message):
        formats.read(put(tmp_path / "out.nir", outside, check_types=False), compare=">")


ONE = nir.Conv2d((4, 4), np.ones((2, 2, 3, 3)), 1, 0, 1, 1, np.zeros(2))
LAST = {"f": flat(2, 1, 1), "r": affine([[1, 1]])}
SIZES = {
    "a convolution of a convolution": (2 * 2 * 9 * 2 * 4, "b", {"a": ONE, "b": nir.Conv2d(
        (2, 2), np.ones((2, 2, 2, 2)), 1, 0, 1, 1, np.zeros(2)), "s": ifs(2, 1, 1), **LAST}),
    "a convolution as a matrix": (32 * 8, "f", {"a": ONE, "f": flat(2, 2, 2), "w": affine(np.ones((1, 8))),
                                                "s": ifs(1), "r": affine([[1]])}),
    "a pool": (2 * 16, "p", {"p": pool(4, 4), "s": ifs(2, 1, 1), **LAST}),
    "spikes themselves": (4, "b", {**{n: node for n, node in chain().items() if n in "ws"}, "b": ifs(2), "r": affine([[1, 1]])}),
}  # fmt: skip
"""Graphs that multiply out to so many weights, and the node at which."""


@pytest.mark.parametrize("case", SIZES)
def test_what_multiplies_out_to_too_many_weights_is_refused_by_name(case, tmp_path, monkeypatch):
    size, node, nodes = SIZES[case]
    first, last = ends((2, 4, 4) if "w" not in nodes or "f" in nodes else (2,), (1,))
    path = put(tmp_path / "x.nir", {"input": first, **nodes, "output": last}, check_types=False)
    for limit in (size, 1 << 26):
        monkeypatch.setattr("s3nn_deploy.formats.nir.MAX_UNROLLED", limit)
        assert_read(path)
    monkeypatch.setattr("s3nn_deploy.formats.nir.MAX_UNROLLED", size - 1)
    with pytest.raises(DeployError, match=f"node {node!r}: "):
        formats.read(path)


def test_the_input_has_one_to_sixteen_bits_and_the_time_step_is_positive(tmp_path):
    path = put(tmp_path / "x.nir", chain())
    for bits in (1, 16):
        assert formats.read(path, bits=bits).input.bits == bits
    for bits in (0, 17, -1):
        with pytest.raises(DeployError, match=f"expected 1 to 16 bits, got {bits}"):
            formats.read(path, bits=bits)
    for dt in (0.0, -1e-3, float("nan"), float("inf")):
        with pytest.raises(DeployError, match="dt: expected a time step above 0"):
            formats.read(path, dt=dt)


# ---------------------------------------------------------------------------------- trained and exported in other tools

COMPARE = {"snntorch": ">", "norse": ">", "spikingjelly": ">=", "sinabs": ">="}


@pytest.mark.peers
@pytest.mark.parametrize("tool", COMPARE)
def test_what_a_user_of_another_tool_exports_there_computes_the_same_here(tool, tmp_path):
    if tool not in peers.installed():
        assert "S3NN_PEERS_REQUIRED" not in os.environ
        pytest.skip("make test-peers installs the peers")
    from s3nn_deploy.environments import find

    script = Path(__file__).with_name("peer_exports.py")
    command = [str(find(peers.PEERS[tool].environment)), "-P", "-s", str(script), tool, str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    found = sorted(tmp_path.glob("*.nir"))
    assert len(found) >= 2
    for path in found:
        net = s3.load(path, compare=COMPARE[tool])
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
            x, output = arrays["x"], arrays["output"]
        trace = reference.run(net, x)
        assert np.array_equal(trace.readout, output.reshape(len(x), -1)), path.name
        assert np.any(trace.readout != trace.readout[0])
        with pytest.raises(DeployError, match=r"v_threshold; expected half-integers"):
            s3.load(path)
