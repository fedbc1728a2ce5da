"""Every engine of the emulator gives the reference's spikes and readouts and the same counts, on any instruction set."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import threadpoolctl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import ZOO, assert_same, random_net, samples, weights, with_thresholds

import s3nn_deploy as s3
from s3nn_deploy.backends import emulator, reference
from s3nn_deploy.errors import DeployError
from s3nn_deploy.formats import export
from s3nn_deploy.intnet import INPUT, Conv2d, Dense, Input, IntNet, Population, Projection, check, rewrite

FAST = [
    pytest.param("numba", marks=pytest.mark.skipif(find_spec("numba") is None, reason="numba is not installed")),
    "onednn",
]


def assert_exact(net: IntNet, x: np.ndarray, engine: str) -> str:
    """Trace and counts are those of the reference and of the NumPy engine; gives the name of what ran."""
    got = emulator.run(net, x, engine=engine)
    assert_same(got, reference.run(net, x))
    assert got.counts == emulator.run(net, x, engine="numpy").counts
    return got.backend


class Hands:
    """The emulator's threads, and the first row of each part that they get."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, count: int) -> "Hands":
        self.pool = ThreadPoolExecutor(count)
        return self

    def map(self, compute, parts):
        parts = list(parts)
        self.rows += [part.start for part in parts]
        return self.pool.map(compute, parts)


def blas_threads() -> list[int]:
    return [library["num_threads"] for library in threadpoolctl.threadpool_info() if library["user_api"] == "blas"]


def extremes(net: IntNet, seed: int = 0) -> np.ndarray:
    """Nothing, everything at the maximum, everything at 0 or the maximum, and anything."""
    rng = np.random.default_rng(seed)
    low_or_high = rng.integers(0, 2, (4, *net.input.shape)) * net.input.maximum
    anything = rng.integers(0, net.input.maximum + 1, (3, *net.input.shape))
    ends = np.stack([np.zeros(net.input.shape, dtype=int), np.full(net.input.shape, net.input.maximum)])
    return np.concatenate([ends, low_or_high, anything])


def saturating(bits: int = 8) -> list[IntNet]:
    """Networks all of whose products have one sign and the largest magnitude, dense and convolutional, first and later."""
    made = []
    for weight in (127, -128):
        wide = Population(
            "wide",
            (8,),
            (Projection(INPUT, Dense(np.full((8, 96), weight))),),
            threshold=weight * 255 * np.arange(8) * 11,
        )
        last = Population("readout", (3,), (Projection("wide", Dense(np.full((3, 8), weight))),), bias=[1, 2, 3])
        made.append(check(IntNet(Input((96,), bits), (wide, last))))
        convs = [Conv2d(np.full((16, c, 3, 3), weight), padding=(1, 1)) for c in (4, 16)]
        theta = weight * 200 * np.linspace(1, 36, 16).astype(int)
        populations = (
            Population("a", (16, 6, 6), (Projection(INPUT, convs[0]),), threshold=theta),
            Population("b", (16, 6, 6), (Projection("a", convs[1]),), threshold=weight * np.arange(-8, 8) * 8),
            Population("readout", (2,), (Projection("b", Dense(np.full((2, 576), weight))),), bias=[0, 0]),
        )
        made.append(check(IntNet(Input((4, 6, 6), bits), populations)))
    return made


def skipping(seed: int) -> IntNet:
    """An identity of every kind of weight beside a convolution, whose thresholds potentials reach exactly, miss by one, or pass
    by far."""
    rng = np.random.default_rng(seed)
    skip = rng.permutation([-128, -127, -1, 0, 1, 2, 100, 127])
    weight = rng.integers(-1, 2, (8, 8, 3, 3)) * rng.choice([1, 1, 1, 127], (8, 1, 1, 1))
    both = (
        Projection("a", Conv2d(weight, padding=(1, 1))),
        Projection("a", Conv2d(skip.reshape(8, 1, 1, 1), groups=8)),
    )
    populations = (
        Population("a", (8, 5, 7), (Projection(INPUT, Conv2d(rng.integers(-3, 4, (8, 3, 1, 1)))),), threshold=[1] * 8),
        Population(
            "b",
            (8, 5, 7),
            both[:: rng.choice([-1, 1])],
            threshold=skip * rng.integers(0, 2, 8) + rng.integers(-2, 4, 8),
        ),
        Population("readout", (2,), (Projection("b", Dense(rng.integers(-9, 9, (2, 280)))),), bias=[0, 0]),
    )
    return check(IntNet(Input((3, 5, 7), 1), populations))


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize("name", ZOO)
def test_every_engine_gives_the_same_traces_and_counts(name, engine):
    net = ZOO[name]
    assert assert_exact(net, samples(net, 23), engine).startswith(f"emulator ({engine}")


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("cores", [2, 3])
@pytest.mark.parametrize("engine", ["numpy", "onednn"])
def test_cores_that_share_a_batch_give_the_same_traces_and_counts(name, cores, engine, monkeypatch):
    net = ZOO[name]
    for size in (2 * cores, 23):
        x = samples(net, size)
        want = emulator.run(net, x, engine="numpy")
        monkeypatch.setattr(emulator, "TOGETHER", 0)
        monkeypatch.setattr(emulator, "_hands", hands := Hands())
        with threadpoolctl.threadpool_limits(cores, "blas"):
            got = emulator.run(net, x, engine=engine)
            assert set(blas_threads()) == {cores}
        assert sorted(hands.rows) == [size * core // cores for core in range(cores)]
        assert_same(got, want)
        assert_same(got, reference.run(net, x))
        assert got.counts == want.counts
        monkeypatch.undo()


@pytest.mark.parametrize("engine", ["numpy", *FAST])
def test_a_trace_keeps_its_spikes_while_any_part_of_them_is_held_and_then_leaves_its_memory(engine):
    net = ZOO["residual"]

    def address(array: np.ndarray) -> int:
        return array.__array_interface__["data"][0]

    traces = [emulator.run(net, samples(net, 40, seed), engine=engine) for seed in range(3)]
    for seed, trace in enumerate(traces):
        assert_same(trace, reference.run(net, samples(net, 40, seed)))
    name = next(iter(traces[0].spikes))
    part = traces[0].spikes[name][3:, ::2]
    before = part.copy()
    free = {address(trace.spikes[name]) for trace in traces[1:]}
    del trace, traces
    later = [emulator.run(net, samples(net, 40, 5), engine=engine) for _ in range(3)]
    assert np.array_equal(part, before)
    assert not any(np.shares_memory(part, trace.spikes[name]) for trace in later)
    assert free < {address(trace.spikes[name]) for trace in later}


@pytest.mark.parametrize("engine", ["numpy", *FAST])
def test_more_cores_than_samples(engine, monkeypatch):
    monkeypatch.setattr(emulator, "TOGETHER", 0)
    for net in (ZOO["lenet"], ZOO["mlp"]):
        want = emulator.run(net, samples(net, 5), engine="numpy")
        with threadpoolctl.threadpool_limits(16, "blas"):
            assert_same(emulator.run(net, samples(net, 5), engine=engine), want)


@pytest.mark.parametrize("engine", ["numpy", *FAST])
def test_parts_of_a_batch_give_the_same_traces_and_counts(engine, monkeypatch):
    net = ZOO["residual"]
    want = emulator.run(net, x := samples(net, 23), engine="numpy")
    monkeypatch.setattr(emulator, "PART", 1)
    monkeypatch.setattr(emulator, "LEAST", 4)
    got = emulator.run(net, x, engine=engine)
    assert_same(got, want)
    assert got.counts == want.counts


@pytest.mark.parametrize("engine", FAST)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(1, 1 << 30))
def test_random_networks_are_exact_for_extreme_inputs(engine, seed):
    net = random_net(seed, max_side=8)
    assert_exact(net, extremes(net, seed), engine)


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize("bits", [1, 7, 8])
def test_the_largest_products_of_either_sign_are_exact(engine, bits):
    for net in saturating(bits):
        assert_exact(net, extremes(net), engine)


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize(
    ("source", "outputs", "synapses"),
    [
        ((1, 8, 4), 1, {"kernel": (2, 3), "stride": (1, 2), "dilation": (2, 1)}),
        ((1, 7, 3), 3, {"kernel": (3, 2), "stride": (1, 2), "padding": (2, 0)}),
        ((2, 9, 3), 10, {"kernel": (3, 2), "stride": (1, 2), "groups": 2}),
        ((4, 10, 2), 8, {"kernel": (4, 2), "stride": (1, 3), "padding": (1, 0), "groups": 4}),
        ((3, 6, 1), 2, {"kernel": (4, 1), "stride": (3, 2), "padding": (2, 3), "dilation": (2, 3)}),
        ((7, 7, 1), 5, {"kernel": (3, 1), "stride": (3, 2), "padding": (0, 1), "dilation": (3, 3)}),
        ((9, 8, 1), 12, {"kernel": (2, 2), "stride": (3, 2), "padding": (0, 3), "dilation": (1, 2), "groups": 3}),
    ],
)
def test_shapes_that_onednn_gets_wrong_are_exact_for_any_batch(engine, source, outputs, synapses):
    rng = np.random.default_rng(0)
    options = {key: value for key, value in synapses.items() if key != "kernel"}
    weight = rng.integers(-128, 128, (outputs, source[0] // synapses.get("groups", 1), *synapses["kernel"]))
    conv = Conv2d(weight, **options)

    shape = conv.out_shape(source)
    last = Projection("layer", Dense(rng.integers(-128, 128, (3, int(np.prod(shape))))))
    layer = Population("layer", shape, (Projection(INPUT, conv),), threshold=[0] * outputs)
    net = check(IntNet(Input(source, 4), (layer, Population("readout", (3,), (last,), bias=[0] * 3))))
    for n in (1, 2, 3, 5, 9, 17, 64):
        assert_exact(net, samples(net, n, n), engine)


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize("seed", range(12))
def test_an_identity_of_any_weights_is_exact_and_left_to_no_other_engine(seed, engine):
    net = skipping(seed)
    assert assert_exact(net, samples(net, 40, seed), engine) == f"emulator ({engine})"


@pytest.mark.parametrize("engine", FAST)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(1, 1 << 30), bits=st.sampled_from([9, 12, 20, 28, 44]))
def test_layers_beyond_an_engine_are_run_by_numpy_and_the_trace_says_so(engine, seed, bits):
    rng = np.random.default_rng(seed)
    wide = rewrite(
        random_net(seed, max_side=6),
        lambda s: s if np.all(s.weight == 1) else replace(s, weight=weights(rng, s.weight.shape, bits)),
    )
    net = with_thresholds(wide, seed)
    name = assert_exact(net, extremes(net, seed), engine)
    narrow = all(j.synapses.weight.dtype == np.int8 for p in net.populations for j in p.projections)
    assert narrow or ", numpy for " in name


@pytest.mark.parametrize("engine", FAST)
def test_input_of_more_than_8_bits_is_left_to_numpy(engine):
    net = random_net(4, convolutional=True)
    net = with_thresholds(replace(net, input=replace(net.input, bits=12)), 4)
    assert ", numpy for " in assert_exact(net, extremes(net), engine)


@pytest.mark.parametrize("engine", FAST)
def test_sums_of_more_than_16_bits_are_carried_over(engine):
    rng = np.random.default_rng(0)
    w = rng.choice([-128, 127], (5, 3000))
    w[0], w[1] = 127, -128
    layer = Population("layer", (5,), (Projection(INPUT, Dense(w)),), threshold=[127 * 2999, -128 * 2999, 0, 1, -1])
    last = Population("readout", (5,), (Projection("layer", Dense(np.eye(5, dtype=int))),), bias=[0] * 5)
    net = check(IntNet(Input((3000,), 1), (layer, last)))
    assert_exact(net, extremes(net), engine)


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_no_samples_and_few_samples(engine, n):
    net = ZOO["residual"]
    assert_exact(net, samples(net, n) if n else np.zeros((0, *net.input.shape), dtype=np.uint8), engine)


CAPPED = """
import sys
sys.path[:0] = {path!r}
from nets import ZOO, random_net, samples
from test_engines import assert_exact, extremes, saturating, skipping
from s3nn_deploy.engines import onednn
{before}
names = [assert_exact(net, extremes(net), "onednn") for net in [*saturating(), *saturating(7), *saturating(1)]]
for net in [*ZOO.values(), *(random_net(seed, max_side=8) for seed in range(500, 520))]:
    assert_exact(net, extremes(net), "onednn")
for net in map(skipping, range(12)):
    assert assert_exact(net, samples(net, 40), "onednn") == "emulator (onednn)"
print(*names, sep="\\n")
"""


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE", "AVX512_CORE_VNNI"])
def test_the_integers_do_not_depend_on_the_instruction_set(isa):
    names = capped(isa, "import torch; torch.backends.mkldnn.set_flags(False)" if isa == "AVX2" else "")
    assert names == ["emulator (onednn)"] * 12


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_a_kernel_that_saturates_is_found_when_it_is_prepared_and_not_used(isa):
    names = capped(isa, "onednn.SPLIT = 255")
    assert (
        names
        == ["emulator (onednn, numpy for 1 of 2 layers)", "emulator (onednn, numpy for 1 of 3 layers)"] * 2
        + ["emulator (onednn)"] * 8
    )


def capped(isa: str, before: str, first: str = "") -> list[str]:
    """What ran on the saturating networks, in a process whose oneDNN may not use more than `isa`."""
    code = first + CAPPED.format(path=[str(Path(__file__).parent), *sys.path], before=before)
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_without_numba_onednn_counts_by_numpy():
    before = "from s3nn_deploy.engines import counting; assert onednn.add is counting.add"
    names = capped("DEFAULT", before, first="import sys; sys.modules['numba'] = None")
    assert names == ["emulator (onednn)"] * 12


def test_a_short_command_starts_no_engine(tmp_path):
    path = export(ZOO["lenet"], tmp_path / "net.npz", "emulator")
    np.save(tmp_path / "x.npy", samples(ZOO["lenet"], 64))
    arguments = ["simulate", str(path), "--input", str(tmp_path / "x.npy")]
    code = f"import sys\nfrom s3nn_deploy.cli import main\nmain({arguments!r}, standalone_mode=False)\n"
    code += "assert not {'torch', 'numba'} & set(sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "emulator (numpy)" in run.stdout


@pytest.mark.parametrize("engine", FAST)
def test_work_that_would_have_paid_for_a_start_moves_to_a_faster_engine(engine, monkeypatch):
    net = replace(ZOO["lenet"], classes=tuple("abcdefghij"))
    emulator._prepare.cache_clear()
    import_module(emulator.ENGINES[engine][1])  # what is loaded starts in a tenth of the time
    monkeypatch.setattr(emulator, "START", {name: 10.0 if name == engine else float("inf") for name in emulator.START})
    monkeypatch.setattr(emulator, "LAYER_SECONDS", 0.07)
    names = [s3.run(net, samples(net, 2)).backend for _ in range(4)]
    assert names[0] == "emulator (numpy)"
    assert names[-1].startswith(f"emulator ({engine}")
    emulator._prepare.cache_clear()


def test_an_unknown_engine_is_refused_with_the_name_that_was_meant():
    with pytest.raises(DeployError, match="Did you mean 'onednn'"):
        s3.run(ZOO["mlp"], samples(ZOO["mlp"]), engine="onedn")


def test_other_backends_have_no_engines():
    with pytest.raises(DeployError, match="is for the backend 'emulator'"):
        s3.run(ZOO["mlp"], samples(ZOO["mlp"]), "reference", engine="numpy")


@pytest.mark.parametrize("engine", ["numpy", *FAST])
@pytest.mark.parametrize(
    ("shape", "conv"),
    [
        ((16, 300, 40), {"padding": (1, 1)}),  # more rows and columns of a kind than 8 bits can sum
        ((24, 9, 33), {"stride": (2, 3)}),
        ((17, 260, 1), {"padding": (2, 1)}),
        ((3, 5, 300), {"padding": (0, 1)}),
        ((48, 40, 33), {"padding": (1, 1)}),  # a prime number of columns alike, more than 8 bits can sum at 38 rows
        ((64, 7, 32), {"padding": (1, 1)}),
        ((64, 9, 20), {"stride": (2, 2), "padding": (1, 1)}),  # columns of a kind apart from each other
    ],
)
def test_sums_over_rows_and_columns_of_one_kind_are_exact(engine, shape, conv):
    rng = np.random.default_rng(0)
    ternary = rng.integers(-1, 2, (2, shape[0], 3, 1 if shape[2] == 1 else 3))
    synapses = Conv2d(ternary, **conv)
    spikes = Population("layer", (2, *synapses.out_shape(shape)[1:]), (Projection(INPUT, synapses),), threshold=[1, 0])
    last = Population("readout", (1,), (Projection("layer", Dense(np.ones((1, spikes.size)))),), bias=[0])
    net = check(IntNet(Input(shape, 1), (spikes, last)))
    x = rng.integers(0, 2, (35, *shape)).astype(np.uint8)
    x[0], x[1] = 1, 0
    for samples_ in (x[:1], x):
        counts = emulator.forward(net, samples_, engine).counts.events["layer"]
        for kind, counted in (("synops", np.ones_like(ternary)), ("synops_nonzero", ternary != 0)):
            each = torch.nn.functional.conv2d(
                torch.tensor(samples_).double(),
                torch.tensor(counted).double(),
                None,
                synapses.stride,
                synapses.padding,
            )
            assert counts[kind].tolist() == each.flatten(1).sum(1).long().tolist()
