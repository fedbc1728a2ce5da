"""NIR files: what is written is the network, for every reader; what is no integer network is refused by name."""

import itertools
import json
from dataclasses import replace

import h5py
import nets
import nir
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3nn_deploy import files, formats
from s3nn_deploy.backends import reference
from s3nn_deploy.errors import DeployError
from s3nn_deploy.formats import nir as nir_format
from s3nn_deploy.intnet import INPUT, Conv2d, Dense, Input, IntNet, Population, Projection, check

# ------------------------------------------------------------------------ an interpreter that knows nothing of us


def interpret(graph, x, fires=np.greater, dtype=np.float64):
    """Run a NIR graph for one step from rest, as the NIR specification has it. Gives every node's output."""
    values = {}

    def value(name):
        if name not in values:
            node = graph.nodes[name]
            arriving = [value(a) for a, b in graph.edges if b == name]
            values[name] = step(node, x.astype(dtype) if isinstance(node, nir.Input) else sum(arriving))
        return values[name]

    def step(node, v):
        match node:
            case nir.Input() | nir.Output():
                return v
            case nir.Affine():
                return v @ node.weight.astype(dtype).T + node.bias.astype(dtype)
            case nir.Linear():
                return v @ node.weight.astype(dtype).T
            case nir.Flatten():
                axes = v.shape[1:]
                start, end = node.start_dim % len(axes), node.end_dim % len(axes)
                return v.reshape(len(v), *axes[:start], -1, *axes[end + 1 :])
            case nir.Conv2d():
                return convolve(v, node.weight.astype(dtype), node) + node.bias.astype(dtype)[:, None, None]
            case nir.SumPool2d():
                c, ones = v.shape[1], np.ones((1, 1, *node.kernel_size), dtype)
                return np.concatenate([convolve(v[:, i : i + 1], ones, node) for i in range(c)], 1)
            case nir.IF() | nir.LIF() | nir.CubaLIF():  # at full leak
                return fires(v, node.v_threshold).astype(dtype)
            case nir.Threshold():
                return fires(v, node.threshold).astype(dtype)
            case nir.LI():
                return v
        raise TypeError(node)

    for name in graph.nodes:
        value(name)
    return values


def convolve(v, weight, node):
    kh, kw = weight.shape[2:]
    (ph, pw), (sh, sw) = (kh // 2, kw // 2) if isinstance(node.padding, str) else node.padding, node.stride
    dh, dw = getattr(node, "dilation", (1, 1))
    v = np.pad(v, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    windows = np.lib.stride_tricks.sliding_window_view(v, (dh * (kh - 1) + 1, dw * (kw - 1) + 1), (2, 3))
    return np.einsum("nchwij,ocij->nohw", windows[:, :, ::sh, ::sw, ::dh, ::dw], weight)


def assert_file_computes(path, net, **options):
    """The raw graph in the file gives every spike and readout of `net`, read with `>` and with `>=`."""
    x = nets.samples(net)
    want = reference.run(net, x)
    for fires in (np.greater, np.greater_equal):
        got = interpret(nir.read(path), x, fires, **options)
        for name, spikes in want.spikes.items():
            assert np.array_equal(got[name].reshape(spikes.shape), spikes), name
        assert np.array_equal(got["output"].reshape(len(x), -1), want.readout)


# --------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("name", nets.ZOO)
def test_a_file_holds_the_network_for_us_and_for_any_reader(name, tmp_path):
    net = nets.ZOO[name]
    path = formats.export(net, tmp_path / "net.nir", "nir")
    assert formats.read(path) == nir_format.lower(net)
    assert_file_computes(path, net)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(seed=st.integers(1000, 9999))
def test_random_networks_come_back(tmp_path_factory, seed):
    net = nets.random_net(seed)
    path = nir_format.write(net, tmp_path_factory.mktemp("nir") / "net.nir")
    back = nir_format.read(path)
    assert back == nir_format.lower(net) == nir_format.lower(back)
    assert_file_computes(path, net)


@pytest.mark.parametrize("name", ["residual", "chain3", "lenet"])
def test_the_lowered_network_fires_alike(name):
    net = nets.ZOO[name]
    x = nets.samples(net)
    got, want = reference.run(nir_format.lower(net), x), reference.run(net, x)
    for population in net.spiking:
        spikes = want.spikes[population.name]
        assert np.array_equal(got.spikes[population.name].reshape(spikes.shape), spikes)
    assert np.array_equal(got.readout, want.readout)


def test_description_scale_classes_and_odd_names_come_back(tmp_path):
    net = one(
        Dense([[1, 2], [3, -4]]),
        Input((2,), 3),
        names=("a.b-c", "r_w"),
        classes=("é", "b"),
        scale=[0.1, 1 / 3],
        provenance={"dataset": "x", "seed": 3, "none": None},
    )
    back = nir_format.read(nir_format.write(net, tmp_path / "x.nir"))
    assert back == net
    assert (back.classes, back.provenance, back.input) == (net.classes, net.provenance, net.input)


def test_equal_networks_give_equal_bytes(tmp_path):
    first, second = (nir_format.write(nets.ZOO["residual"], tmp_path / f"{n}.nir").read_bytes() for n in "ab")
    assert first == second


@pytest.mark.parametrize("name", ["lenet", "residual", "random10"])
def test_the_file_has_the_form_that_peers_need(name, tmp_path):
    path = nir_format.write(nets.ZOO[name], tmp_path / "x.nir")
    graph = nir.read(path)
    assert {"input", "output"} <= graph.nodes.keys()
    assert not any("/" in n for n in graph.nodes)
    x = nets.samples(nets.ZOO[name])
    values = interpret(graph, x)
    for name, node in graph.nodes.items():
        if isinstance(node, nir.Conv2d):
            assert node.groups == 1
            assert node.weight.shape[2] == node.weight.shape[3]
        if isinstance(node, nir.Affine | nir.Conv2d):
            assert node.weight.dtype == node.bias.dtype == np.float32
            assert np.all(node.weight == np.rint(node.weight))
        if isinstance(node, nir.Flatten):
            assert (node.start_dim, node.end_dim) == (-3, -1)
        if isinstance(node, nir.IF):
            assert node.v_threshold.shape == node.r.shape
            assert np.all(node.r == 1)
            assert len(np.unique(node.v_threshold)) == 1
            assert node.v_threshold.flat[0] % 1 == 0.5
            v = sum(values[a] for a, b in graph.edges if b == name)
            assert np.all(v < 2 * node.v_threshold)  # several spikes a step are impossible
            assert len([b for a, b in graph.edges if b == name and np.any(graph.nodes[a].bias)]) <= 1
    with h5py.File(path) as file:
        for node in file["node/nodes"].values():  # nir 1.0.4 reads neither
            assert "v_reset" not in node
            assert node["type"][()] == b"IF" or "metadata" not in node


def test_readers_known_to_run_a_graph_wrongly_are_noted():
    assert formats.notes(nets.ZOO["lenet"], "nir") == []
    (note,) = formats.notes(nets.ZOO["residual"], "nir")
    assert note.startswith("a2, stem drives several synapses: SpikingJelly")


def test_metadata_are_not_needed_for_the_numbers(tmp_path):
    net = nets.ZOO["mlp"]
    path = nir_format.write(net, tmp_path / "x.nir")
    with h5py.File(path, "a") as file:
        del file["node/metadata"]
        for node in file["node/nodes"].values():
            node.pop("metadata", None)
    assert nir_format.read(path) == replace(nir_format.lower(net), classes=(), provenance={})


def test_edges_may_come_in_any_order(tmp_path):
    net = nets.ZOO["residual"]
    path = nir_format.write(net, tmp_path / "x.nir")
    with h5py.File(path, "a") as file:
        edges = file["node/edges"][()]
        file["node/edges"][...] = np.random.default_rng(0).permutation(edges)
    back = nir_format.read(path)
    x = nets.samples(net)
    nets.assert_same(reference.run(back, x), reference.run(net, x))


@pytest.mark.parametrize("field", ["weight", "bias", "v_threshold", "padding", "stride"])
def test_every_changed_number_is_seen(field, tmp_path):
    net = nets.ZOO["lenet"]
    lowered, rng, seen = nir_format.lower(net), np.random.default_rng(0), 0
    for target in ("conv1_w", "conv2", "conv2_w", "pool2_w", "readout"):
        path = nir_format.write(net, tmp_path / "x.nir")
        with h5py.File(path, "a") as file:
            node = file[f"node/nodes/{target}"]
            if field not in node:
                continue
            values = node[field][()]
            at = ... if field == "v_threshold" else np.unravel_index(rng.integers(values.size), values.shape)
            values[at] += 1
            node[field][...] = values
        seen += 1
        try:
            assert nir_format.read(path) != lowered
        except DeployError:
            assert field in ("padding", "stride")
    assert seen


# --------------------------------------------------------------------------------------------------------- bounds


def one(synapses, spec=None, *, threshold=1, names=("p", "readout"), scale=1.0, bias=0, classes=(), provenance=None):
    """A network of one population and a readout that copies it."""
    spec = spec or Input((synapses.weight.shape[1],), 1)
    shape = synapses.out_shape(spec.shape)
    size = int(np.prod(shape))
    thresholds = np.broadcast_to(threshold, shape[0])
    scales = np.array(np.broadcast_to(scale, size), dtype=float)
    return check(
        IntNet(
            spec,
            (
                Population(names[0], shape, (Projection(INPUT, synapses),), threshold=thresholds),
                Population(
                    names[1], (size,), (Projection(names[0], Dense(np.eye(size))),), bias=[bias] * size, scale=scales
                ),
            ),
            classes,
            provenance or {},
        )
    )


@pytest.mark.parametrize(
    ("weight", "threshold"), [((1 << 22) - 1, 1), ((1 << 22) - 1, 1 << 22), ((1 << 23) - 2, 1 << 22)]
)
def test_just_inside_the_bound_float32_is_exact(weight, threshold, tmp_path):
    net = one(Dense([[weight]]), threshold=threshold)
    path = nir_format.write(net, tmp_path / "x.nir")
    assert nir_format.read(path) == nir_format.lower(net)
    assert_file_computes(path, net, dtype=np.float32)


@pytest.mark.parametrize(("weight", "threshold"), [(1 << 22, 1), (1 << 23, 1 << 22), (1 << 22, (1 << 22) + 1)])
def test_just_outside_the_bound_is_refused_by_name(weight, threshold, tmp_path):
    with pytest.raises(
        DeployError, match=r"population 'p': worst-case.*below 2\^23 = 8,388,608.*, got 8,388,6.*fan-in"
    ):
        nir_format.write(one(Dense([[weight]]), threshold=threshold), tmp_path / "x.nir")
    assert not (tmp_path / "x.nir").exists()


def test_the_readouts_bound_counts_its_bias(tmp_path):
    inside = one(Dense([[1]]), bias=(1 << 23) - 2)
    path = nir_format.write(inside, tmp_path / "x.nir")
    assert nir_format.read(path) == inside
    assert_file_computes(path, inside, dtype=np.float32)
    with pytest.raises(DeployError, match=r"population 'readout'.*got 8,388,608"):
        nir_format.write(one(Dense([[1]]), bias=(1 << 23) - 1), tmp_path / "y.nir")


@pytest.mark.parametrize(("weights", "thresholds"), [([[5, 2]], [3]), ([[5, 2], [-9, 4]], [1, -8]), ([[7, -7]], [8])])
def test_the_largest_potential_is_just_below_a_second_spike(weights, thresholds, tmp_path):
    """With T one less, a reader whose neurons fire once a v_threshold would emit two."""
    path = nir_format.write(one(Dense(weights), threshold=thresholds), tmp_path / "x.nir")
    graph = nir.read(path)
    x = np.array(list(itertools.product((0, 1), repeat=2)), np.uint8)
    highest = interpret(graph, x)["p_w"].max()
    assert highest + 1 == 2 * graph.nodes["p"].v_threshold[0]


def test_unreachable_thresholds_cost_nothing(tmp_path):
    net = one(Dense([[3, -2]] * 2), threshold=[1 << 40, -(1 << 40)])
    path = nir_format.write(net, tmp_path / "x.nir")
    assert nir_format.read(path)["p"].threshold.tolist() == [4, -2]
    assert_file_computes(path, net)


def test_a_population_that_drives_nothing_is_refused(tmp_path):
    net = one(Dense([[1, 2]]))
    idle = replace(net["p"], name="idle")
    with pytest.raises(DeployError, match="population 'idle': drives nothing"):
        nir_format.write(check(replace(net, populations=(idle, *net.populations))), tmp_path / "x.nir")


def test_groups_too_many_to_write_out_are_refused(monkeypatch):
    net = one(Conv2d(np.ones((4, 1, 2, 2)), groups=4), Input((4, 3, 3), 1))
    monkeypatch.setattr(nir_format, "MAX_BYTES", 4 * 4 * 4 * 4)
    assert nir_format.lower(net)["p"].projections[0].synapses.groups == 1
    monkeypatch.setattr(nir_format, "MAX_BYTES", 4 * 4 * 4 * 4 - 1)
    with pytest.raises(DeployError, match=r"population 'p'.*groups.*at most 255 bytes, got 256.*onnx"):
        nir_format.lower(net)


# ---------------------------------------------------------------------------------------------------- foreign files


def ifs(*shape, at=0.5, **fields):
    return nir.IF(r=np.ones(shape), v_threshold=np.full(shape, at), **fields)


def affine(weight, bias=None):
    weight = np.array(weight, float)
    return nir.Affine(weight=weight, bias=np.zeros(len(weight)) if bias is None else np.array(bias, float))


def put(path, nodes, edges=None, check_types=True):
    """Write nodes as a graph, by default one chain."""
    names = list(nodes)
    edges = list(itertools.pairwise(names)) if edges is None else edges
    nir.write(path, nir.NIRGraph(nodes=nodes, edges=edges, type_check=check_types))
    return path


def ends(i, o):
    return nir.Input(input_type={"input": np.array(i)}), nir.Output(output_type={"output": np.array(o)})


def test_a_foreign_graph_with_pooling_linear_int_arrays_and_number_names_is_read(tmp_path):
    rng = np.random.default_rng(0)
    first, last = ends((2, 6, 6), (3,))
    conv = nir.Conv2d(
        input_shape=(6, 6),
        weight=rng.integers(-3, 4, (4, 2, 3, 3)),
        stride=1,
        padding="same",
        dilation=1,
        groups=1,
        bias=rng.integers(-3, 4, 4),
    )
    path = put(
        tmp_path / "x.nir",
        {
            "input": first,
            "0": conv,
            "1": ifs(4, 6, 6, at=2.5),
            "2": nir.SumPool2d(np.array([2, 2]), np.array([2, 2]), np.array([0, 0])),
            "3": ifs(4, 3, 3),
            "4": nir.Flatten(input_type={"input": np.array([4, 3, 3])}, start_dim=0),
            "5": nir.Linear(weight=rng.integers(-3, 4, (7, 36)).astype(np.int8)),
            "6": ifs(7, at=-1.5),
            "7": affine(rng.integers(-9, 10, (3, 7)), [1, 2, 3]),
            "output": last,
        },
    )
    net = nir_format.read(path)
    assert [p.name for p in net.populations] == ["n1", "n3", "n6", "n7"]
    assert (net.input.bits, net.readout.scale.tolist()) == (1, [1, 1, 1])
    x = nets.samples(net)
    want, got = interpret(nir.read(path), x), reference.run(net, x)
    for name in ("1", "3", "6"):
        assert np.array_equal(got.spikes[f"n{name}"], want[name])
    assert np.array_equal(got.readout, want["output"])


def test_a_foreign_skip_without_synapses_and_thresholds_per_neuron_are_read(tmp_path):
    first, last = ends((3,), (2,))
    middle = nir.IF(r=np.ones(3), v_threshold=np.array([0.5, 1.5, -0.5]))
    second = affine([[1, -1, 1], [0, 1, 1], [2, 0, -3]], [1, 0, 0])
    nodes = {
        "input": first,
        "w1": affine([[1, 2, -1]] * 3),
        "a": ifs(3),
        "w2": second,
        "b": middle,
        "r": affine([[1, 2, 3], [4, 5, 6]]),
        "output": last,
    }
    edges = [("input", "w1"), ("w1", "a"), ("a", "w2"), ("w2", "b"), ("a", "b"), ("b", "r"), ("r", "output")]
    path = put(tmp_path / "x.nir", nodes, edges)
    net = nir_format.read(path)
    assert net["b"].threshold.tolist() == [0, 2, 0]
    x = nets.samples(net, 32)
    want, got = interpret(nir.read(path), x), reference.run(net, x)
    assert np.array_equal(got.spikes["b"], want["b"])
    assert np.array_equal(got.readout, want["output"])


def chain(**changed):
    """A small valid graph with some nodes replaced (or added before the output)."""
    first, last = ends((2,), (2,))
    nodes = {"input": first, "w": affine([[1, 2], [3, -4]]), "s": ifs(2), "r": affine([[1, 0], [0, 1]])}
    return {**nodes, **changed, "output": last}


REFUSED = {
    "fractions": (chain(w=affine([[0.5, 1], [1, 1]])), "node 'w', weight: expected integer values"),
    "nan": (chain(w=affine([[np.nan, 1], [1, 1]])), "node 'w', weight: expected integer values"),
    "large": (chain(w=affine([[2**24, 1], [1, 1]])), "node 'w': weight; expected integers below 16,777,216"),
    "bias": (chain(r=affine([[1, 0], [0, 1]], [0, 0.5])), "node 'r', bias: expected integer values"),
    "integer threshold": (
        chain(s=ifs(2, at=3)),
        "node 's': v_threshold; expected half-integers, got 3.*fires where v > 3, or v >= 4, has",
    ),
    "infinite threshold": (
        chain(s=ifs(2, at=np.inf)),
        "node 's': v_threshold; expected numbers below 8,388,608, got inf",
    ),
    "r": (chain(s=nir.IF(r=np.full(2, 2.0), v_threshold=np.full(2, 0.5))), "node 's': r; expected 1"),
    "v_reset": (chain(s=ifs(2, v_reset=np.ones(2))), "node 's': v_reset; expected 0"),
    "leaky": (
        chain(s=nir.LIF(tau=np.ones(2), r=np.ones(2), v_leak=np.zeros(2), v_threshold=np.ones(2))),
        "node 's': keeps something.*expected full leak: tau = 0.0001 .*and r = 1, got tau 1, r 1.*beta 0",
    ),
    "pool of a vector": (
        chain(w=nir.SumPool2d(np.array([1, 1]), np.array([1, 1]), np.array([0, 0]))),
        "node 'w': expected a source",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_integer_network_is_refused_by_name(case, tmp_path):
    nodes, message = REFUSED[case]
    path = put(tmp_path / "x.nir", nodes, check_types=False)
    with pytest.raises(DeployError, match=message):
        nir_format.read(path)


CHAIN = [("input", "w"), ("w", "s"), ("s", "r"), ("r", "output")]
WIRING = {
    "loop": ([*CHAIN, ("s", "s")], "node 's': is part of a loop"),
    "twice": ([*CHAIN, CHAIN[1]], "the edge 'w' -> 's' is there twice"),
    "unknown end": ([*CHAIN, ("s", "nowhere")], "the edge 's' -> 'nowhere' ends at no node"),
    "dangling": (CHAIN[:3], "lies on no way"),
    "no input": (CHAIN[1:], "node 'w': expected one edge into it, got 0"),
    "sum before synapses": (
        [*CHAIN, ("input", "r")],
        "node 'r': expected one edge into it, got 2: s, input.*Sum behind",
    ),
}


@pytest.mark.parametrize("case", WIRING)
def test_wiring_that_is_no_feed_forward_network_is_refused(case, tmp_path):
    edges, message = WIRING[case]
    path = put(tmp_path / "x.nir", chain(), CHAIN)
    with h5py.File(path, "a") as file:
        del file["node/edges"]
        file["node"].create_dataset("edges", data=edges, dtype=h5py.string_dtype())
    with pytest.raises(DeployError, match=message):
        nir_format.read(path)


# --------------------------------------------------------------------------------------- damaged and malicious files


def edit(path, change):
    with h5py.File(path, "a") as file:
        change(file["node"])
    return path


def swap(group, name, make):
    del group[name]
    make(group, name)


def huge(group, name):
    group.create_dataset(name, (1 << 20, 1 << 20), "f4", chunks=(64, 64))


MALICIOUS = {
    "huge declared shape": (
        lambda n: swap(n["nodes/w"], "weight", huge),
        r"declares arrays of 8,796,09.*the limit is 4,294,967,296",
    ),
    "huge edges": (lambda n: swap(n, "edges", huge), "declares arrays of|data type"),
    "external link": (
        lambda n: swap(n["nodes"], "w", lambda g, k: g.__setitem__(k, h5py.ExternalLink("other.nir", "/node"))),
        "'w' is missing or a link",
    ),
    "soft link": (
        lambda n: swap(n["nodes/w"], "weight", lambda g, k: g.__setitem__(k, h5py.SoftLink("/node/nodes/r/weight"))),
        "'weight' is missing or a link",
    ),
    "external data": (
        lambda n: swap(
            n["nodes/w"], "weight", lambda g, k: g.create_dataset(k, (2, 2), "f4", external=[("/etc/hostname", 0, 16)])
        ),
        "'weight' lie in another file",
    ),
    "a group for numbers": (
        lambda n: swap(n["nodes/w"], "weight", lambda g, k: g.create_group(k)),
        "'weight' is a Group",
    ),
    "text for numbers": (
        lambda n: swap(n["nodes/w"], "weight", lambda g, k: g.create_dataset(k, data="x")),
        "data type object",
    ),
    "a huge fixed text": (
        lambda n: swap(n["nodes/w"], "type", lambda g, k: g.create_dataset(k, (), f"S{1 << 25}")),
        "'type' has the data type",
    ),
    "complex numbers": (
        lambda n: swap(n["nodes/w"], "weight", lambda g, k: g.create_dataset(k, data=np.eye(2) * 1j)),
        "data type c",
    ),
    "no type": (lambda n: n["nodes/w"].__delitem__("type"), "'type' is missing"),
    "no weight": (lambda n: n["nodes/w"].__delitem__("weight"), r"node 'w': the data sets of a Affine"),
    "more data": (lambda n: n["nodes/w"].create_dataset("gain", data=2.0), r"node 'w'.*'gain'"),
    "a group in itself": (lambda n: n["nodes"].__setitem__("loop", n["nodes"]), "'type' is missing"),
    "metadata of another schema": (
        lambda n: n["metadata"]["s3nn"].__setitem__((), '{"schema": "x"}'),
        "expected schema",
    ),
    "metadata that are no JSON": (
        lambda n: n["metadata"]["s3nn"].__setitem__((), "[" * 100_000),
        "'s3nn' is not readable",
    ),
    "scale of another length": (
        lambda n: n["metadata"]["s3nn"].__setitem__(
            (), json.dumps({**json.loads(n["metadata/s3nn"][()]), "readout": {"scale": [1.0]}})
        ),
        "scale",
    ),
    "empty graph": (lambda n: swap(n, "nodes", lambda g, k: g.create_group(k)), "ends at no node"),
    "scalar threshold": (
        lambda n: swap(n["nodes/s"], "v_threshold", lambda g, k: g.create_dataset(k, data=1.0)),
        "node 's': v_threshold; expected half",
    ),
    "threshold of another shape": (
        lambda n: swap(n["nodes/s"], "v_threshold", lambda g, k: g.create_dataset(k, data=np.full(3, 0.5))),
        "node 's': v_threshold; expected shape .2,., like what arrives, got .3,.",
    ),
}


@pytest.mark.parametrize("case", MALICIOUS)
def test_malicious_files_are_refused(case, tmp_path):
    change, message = MALICIOUS[case]
    net = one(Dense([[1, 2], [3, -4]]), names=("s", "r"))
    path = nir_format.write(net, tmp_path / "x.nir")
    with h5py.File(path, "a") as file:
        file.move("node/nodes/s_w", "node/nodes/w")
        edges = [tuple(b"w" if e == b"s_w" else e for e in pair) for pair in file["node/edges"][()]]
        file["node/edges"][...] = edges
    assert nir_format.read(path) == net
    with pytest.raises(DeployError, match=message):
        nir_format.read(edit(path, change))


def test_sizes_are_added_up_before_anything_is_read(tmp_path, monkeypatch):
    path = put(tmp_path / "x.nir", chain())
    with h5py.File(path) as file:
        arrays = [n[k] for n in file["node/nodes"].values() for k in n if k not in ("type", "metadata")]
        total = sum(8 * a.size for a in arrays) + 16 * len(file["node/edges"])
    monkeypatch.setattr(nir_format, "MAX_BYTES", total)
    assert len(nir_format.read(path).populations) == 2
    monkeypatch.setattr(nir_format, "MAX_BYTES", total - 1)
    monkeypatch.setattr(nir_format, "_value", lambda data: pytest.fail("read") if data.ndim else data[()].decode())
    with pytest.raises(DeployError, match=f"declares arrays of {total:,} bytes; the limit is {total - 1:,}"):
        nir_format.read(path)
    assert files.MAX_BYTES == 4 << 30


def test_what_is_no_nir_file_is_refused(tmp_path):
    path = tmp_path / "x.nir"
    with pytest.raises(DeployError, match="no such file"):
        nir_format.read(path)
    for contents in (b"", b"not HDF5", b"\x89HDF\r\n\x1a\n" + bytes(100)):
        path.write_bytes(contents)
        with pytest.raises(DeployError, match="is not a readable NIR file"):
            nir_format.read(path)
    with h5py.File(path, "w") as file:
        file["weights"] = np.eye(3)
    with pytest.raises(DeployError, match="'node' is missing"):
        nir_format.read(path)


def test_truncated_files_are_refused(tmp_path):
    path = nir_format.write(nets.ZOO["mlp"], tmp_path / "x.nir")
    whole = path.read_bytes()
    for length in np.linspace(0, len(whole) - 1, 40, dtype=int):
        path.write_bytes(whole[:length])
        with pytest.raises(DeployError, match="is not a readable NIR file"):
            nir_format.read(path)


def test_damaged_texts_neither_hang_nor_take_memory(tmp_path):
    """libhdf5 2.0.0 loops for ever in the first of these files and takes 4 GB for the second."""
    path = nir_format.write(nets.ZOO["mlp"], tmp_path / "x.nir")
    with h5py.File(path) as file:
        offset = file["node/type"].id.get_offset()
    whole = path.read_bytes()
    heap = whole.index(files.HEAP)
    for at, damage, message in (
        (heap + 24, bytes([255] * 8), "heap of texts at byte"),
        (heap + 16, bytes(16), "heap of texts"),
        (offset, bytes([255] * 4), "'/node/type' claims more than 16,777,216 bytes"),
    ):
        path.write_bytes(whole[:at] + damage + whole[at + len(damage) :])
        with pytest.raises(DeployError, match=message):
            nir_format.read(path)


def test_an_old_file_survives_a_refused_export(tmp_path):
    path = nir_format.write(one(Dense([[1]])), tmp_path / "x.nir")
    before = path.read_bytes()
    with pytest.raises(DeployError):
        formats.export(one(Dense([[1 << 23]])), path, "nir")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.nir"]
