"""ONNX files and ONNX Runtime: the same spikes at every optimisation level and batch size; other graphs are refused."""

import shutil
import subprocess
import sys
from dataclasses import replace

import nets
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from s3nn_deploy import formats
from s3nn_deploy.backends import onnx as backend
from s3nn_deploy.backends import reference, run
from s3nn_deploy.errors import DeployError
from s3nn_deploy.formats import onnx as onnx_format
from s3nn_deploy.intnet import INPUT, Conv2d, Dense, Input, IntNet, Population, Projection, check

LEVELS = {
    name: getattr(onnxruntime.GraphOptimizationLevel, f"ORT_{name}")
    for name in ("DISABLE_ALL", "ENABLE_BASIC", "ENABLE_EXTENDED", "ENABLE_ALL")
}


def one(weight, *, threshold=1, bias=0, bits=1, scale=1.0, classes=(), provenance=None):
    """A network of one dense population and a readout that copies it."""
    weight = np.array(weight)
    out = len(weight)
    return check(
        IntNet(
            Input((weight.shape[1],), bits),
            (
                Population("p", (out,), (Projection(INPUT, Dense(weight)),), threshold=np.broadcast_to(threshold, out)),
                Population(
                    "readout",
                    (out,),
                    (Projection("p", Dense(np.eye(out))),),
                    bias=[bias] * out,
                    scale=np.array(np.broadcast_to(scale, out), dtype=float),
                ),
            ),
            classes,
            provenance or {},
        )
    )


def conv_readout():
    """A network whose input goes into two populations and whose readout is two convolutions, of shape (C, H, W)."""
    rng = np.random.default_rng(5)
    conv = lambda o, i: Conv2d(rng.integers(-9, 10, (o, i, 3, 3)), padding=(1, 1))  # noqa: E731
    return nets.with_thresholds(
        check(
            IntNet(
                Input((2, 5, 4), 12),
                (
                    Population("a", (3, 5, 4), (Projection(INPUT, conv(3, 2)),), threshold=[0] * 3),
                    Population(
                        "b", (3, 5, 4), (Projection(INPUT, conv(3, 2)), Projection("a", conv(3, 3))), threshold=[0] * 3
                    ),
                    Population(
                        "readout", (2, 5, 4), (Projection("a", conv(2, 3)), Projection("b", conv(2, 3))), bias=[7, -8]
                    ),
                ),
            )
        )
    )


ALL = {**nets.ZOO, "conv_readout": conv_readout()}

# --------------------------------------------------------------------------------------- round trips and running


@pytest.mark.parametrize("name", ALL)
def test_a_file_comes_back_and_runs_exactly(name, tmp_path):
    net = ALL[name]
    path = formats.export(net, tmp_path / "net.onnx", "onnx")
    back = formats.read(path)
    assert back == onnx_format.lower(net) == onnx_format.lower(back)
    x = nets.samples(net)
    want = reference.run(net, x)
    nets.assert_same(reference.run(back, x), want)
    got = run(net, x, "onnx", path)
    nets.assert_same(got, want)
    assert (got.backend, got.scale.tolist()) == ("onnx", want.scale.tolist())
    onnx.checker.check_model(str(path), full_check=True)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(seed=st.integers(1000, 9999))
def test_random_networks_come_back_and_run_exactly(tmp_path_factory, seed):
    net = nets.random_net(seed)
    path = onnx_format.write(net, tmp_path_factory.mktemp("onnx") / "net.onnx")
    assert onnx_format.read(path) == onnx_format.lower(net)
    x = nets.samples(net, seed=seed)
    nets.assert_same(run(net, x, "onnx", path), reference.run(net, x))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ALL)
def test_no_optimisation_level_and_no_batch_size_changes_a_result(name, level, tmp_path):
    net = ALL[name]
    session = backend.session(net, onnx_format.write(net, tmp_path / "x.onnx"), LEVELS[level])
    for samples in (1, 3, 17):
        x = nets.samples(net, samples, seed=samples)
        nets.assert_same(backend._batch(net, session, x), reference.run(net, x))


@pytest.mark.parametrize("level", LEVELS)
def test_the_file_itself_runs_without_the_taps(level, tmp_path):
    net = ALL["residual"]
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = LEVELS[level]
    session = onnxruntime.InferenceSession(onnx_format.write(net, tmp_path / "x.onnx"), options)
    assert [(i.name, i.type, i.shape) for i in session.get_inputs()] == [("input", "tensor(uint8)", ["N", 2, 7, 9])]
    assert [(o.name, o.type, o.shape) for o in session.get_outputs()] == [("output", "tensor(int64)", ["N", 5])]
    x = nets.samples(net, 5)
    assert np.array_equal(session.run(None, {"input": x})[0], reference.run(net, x).readout)


@pytest.mark.parametrize("name", ALL)
def test_exposed_spikes_are_outputs_that_any_runtime_gives(name, tmp_path):
    net = ALL[name]
    path = formats.export(net, tmp_path / "x.onnx", "onnx", expose_spikes=True)
    assert formats.read(path) == onnx_format.lower(net)
    session = onnxruntime.InferenceSession(path)
    x = nets.samples(net, 5)
    got = dict(zip([o.name for o in session.get_outputs()], session.run(None, {"input": x}), strict=True))
    want = reference.run(net, x)
    assert got.keys() == {"output", *want.spikes}
    assert np.array_equal(got["output"], want.readout)
    for population, spikes in want.spikes.items():
        assert got[population].dtype == np.float32
        assert np.array_equal(got[population], spikes)
    nets.assert_same(run(net, x, "onnx", path), want)


def quantise(x, scale, zero_point, bits, signed, narrow, rounding_mode):
    """QONNX's Quant, by its specification."""
    assert rounding_mode == b"ROUND"
    low = -(2.0 ** (bits - 1)) + narrow if signed else 0
    high = 2.0 ** (bits - 1) - 1 if signed else 2.0**bits - 1 - narrow
    return (np.clip(np.rint(x / scale + zero_point), low, high) - zero_point) * scale


def alone(node, operands):
    """What one standard node makes of its operands."""
    info = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, None)  # noqa: E731
    graph = helper.make_graph([node], "g", [info(n) for n in node.input], [info(node.output[0])])
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(None, dict(zip(node.input, operands, strict=True)))[0]


def execute_qonnx(path, x):
    """Run a QONNX graph node by node: Quant by its specification, the rest by ONNX Runtime."""
    model = onnx.load(path)
    values = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer} | {"input": x.astype(np.float32)}
    for node in model.graph.node:
        operands = [values[name] for name in node.input]
        if node.op_type == "Quant":
            options = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            values[node.output[0]] = np.asarray(quantise(*operands, **options), np.float32)
        else:
            values[node.output[0]] = alone(node, operands)
    return values


@pytest.mark.parametrize("name", ALL)
def test_a_qonnx_file_comes_back_and_computes_the_same_by_qonnx_rules(name, tmp_path):
    net = ALL[name]
    path = formats.export(net, tmp_path / "x.onnx", "onnx", qonnx=True, expose_spikes=True)
    assert formats.read(path) == onnx_format.lower(net)
    model = onnx.load(path)
    assert {n.op_type for n in model.graph.node} <= {"Quant", "Gemm", "Conv", "Add", "Flatten"}
    x = nets.samples(net, 3)
    values, want = execute_qonnx(path, x), reference.run(net, x)
    assert np.array_equal(values["output"], want.readout)
    for population, spikes in want.spikes.items():
        assert np.array_equal(values[population], spikes)
    with pytest.raises(DeployError, match="ONNX Runtime does not load it"):
        run(net, x, "onnx", path)


def quant(model, n=0):
    return [node for node in model.graph.node if node.op_type == "Quant"][n]


def quant_attribute(model, **values):
    for key, value in values.items():
        next(a for a in quant(model).attribute if a.name == key).CopyFrom(helper.make_attribute(key, value))


def scale(model, name, value):
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.raw_data = np.float32(value).tobytes()


def one_bit_less(model):
    of = next(node for node in model.graph.node if node.input[0] == "conv1/0/weight")
    assert of.input[3] == "quant/bits8"
    of.input[3] = "quant/bits7"
    assert any(tensor.name == "quant/bits7" for tensor in model.graph.initializer)


QUANTS = {
    "another scale": (lambda m: scale(m, "quant/one", 0.5), "expected scale 1"),
    "another zero point": (lambda m: scale(m, "quant/zero", 1), "expected scale 1"),
    "one bit too few for the input": (
        lambda m: scale(m, "quant/bits8", 7),
        "node 'input/float'.*expected bits that hold",
    ),
    "one bit too few for weights": (one_bit_less, "node 'conv1/0/weight/quant'.*expected bits that hold the values"),
    "another rounding": (lambda m: quant_attribute(m, rounding_mode="FLOOR"), "ROUND, not narrow"),
    "narrow": (lambda m: quant_attribute(m, narrow=1), "ROUND, not narrow"),
    "signed input": (lambda m: quant_attribute(m, signed=1), "expected bits that hold"),
    "another version": (lambda m: setattr(m.opset_import[1], "version", 2), "expected opset 17"),
    "integer input": (lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 2), "the type of 'input'"),
    "nothing out": (lambda m: m.graph.node.pop(), "expected a named node that makes 'output'"),
}


def test_the_bits_of_qonnx_weights_are_the_fewest_that_hold_them(tmp_path):
    for low, high, bits in ((-8, 7, 4), (-8, 8, 5), (-9, 7, 5), (0, 1, 2)):
        net = one([[low, high]], threshold=1)
        model = onnx.load(onnx_format.write(net, tmp_path / "x.onnx", qonnx=True))
        of = next(n for n in model.graph.node if n.input[0] == "p/0/weight")
        assert of.input[3] == f"quant/bits{bits}"
        assert onnx_format.read(tmp_path / "x.onnx") == net


def test_a_qonnx_file_states_every_shape_for_a_batch_of_one(tmp_path):
    for name in ("lenet", "residual", "mlp"):
        model = onnx.load(onnx_format.write(ALL[name], tmp_path / "x.onnx", qonnx=True))
        graph = model.graph
        values = [*graph.input, *graph.output, *graph.value_info]
        shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
        assert len(shapes) == len(values)
        assert shapes.keys() == {INPUT, *(n.output[0] for n in graph.node)}
        assert all(min(shape) > 0 for shape in shapes.values())
        assert shapes["input"] == [1, *ALL[name].input.shape]


@pytest.mark.parametrize("case", QUANTS)
def test_a_qonnx_file_that_means_something_else_is_refused(case, tmp_path):
    change, message = QUANTS[case]
    path = onnx_format.write(ALL["lenet"], tmp_path / "x.onnx", qonnx=True)
    model = onnx.load(path)
    change(model)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(DeployError, match=message):
        onnx_format.read(path)


def test_extreme_weights_and_pixels_do_not_saturate(tmp_path):
    """The sums at which x86 without VNNI saturates 16-bit pairs of u8 * s8 products."""
    for weights in ([[127] * 256], [[-128] * 256], [[127, -128] * 128], [[64] * 256]):
        net = one(weights * 2, threshold=np.array([1, sum(weights[0])]), bits=8)
        x = np.stack([np.full(256, 255), np.arange(256), np.zeros(256, int)]).astype(np.uint8)
        nets.assert_same(run(net, x, "onnx"), reference.run(net, x))


ON_HASWELL = """
import sys
import numpy, onnxruntime
for path in sys.argv[1:]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    numpy.save(path + ".npy", session.run(None, {"input": numpy.load(path + ".x.npy")})[0])
"""


@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="runs where qemu-user is installed")
def test_a_processor_without_vnni_gives_the_same_where_integer_operators_saturate(tmp_path):
    """An emulated Haswell; the control is the product that our files avoid, which is wrong there."""
    weight = np.array([[127] * 256, [-128] * 256, [64] * 256, [127, -128] * 128])
    extreme = one(weight, threshold=np.array([127 * 255 * 100, -1, 64 * 255 * 200, 1]), bits=8)
    want, paths = {}, []
    for name, net in {"extreme": extreme, **{n: ALL[n] for n in ("mlp", "lenet", "residual")}}.items():
        paths.append(onnx_format.write(net, tmp_path / name))
        x = nets.samples(net, 8)
        want[name] = reference.run(net, x).readout
        np.save(f"{paths[-1]}.x.npy", x)
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["input", "w"], ["output"])],
        "control",
        [info("input", TensorProto.UINT8, ["N", 256])],
        [info("output", TensorProto.INT32, ["N", 4])],
        [numpy_helper.from_array(np.ascontiguousarray(weight.T, np.int8), "w")],
    )
    paths.append(tmp_path / "control")
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    paths[-1].write_bytes(model.SerializeToString())
    x = nets.samples(extreme, 8)
    np.save(f"{paths[-1]}.x.npy", x)
    command = ["qemu-x86_64", "-cpu", "Haswell", sys.executable, "-c", ON_HASWELL, *map(str, paths)]
    subprocess.run(command, check=True, capture_output=True, timeout=500)
    for name, readout in want.items():
        assert np.array_equal(np.load(tmp_path / f"{name}.npy"), readout), name
    assert not np.array_equal(np.load(tmp_path / "control.npy"), x.astype(np.int64) @ weight.T)


def test_more_than_eight_input_bits_are_uint16(tmp_path):
    net = ALL["conv_readout"]
    session = backend.session(net, onnx_format.write(net, tmp_path / "x.onnx"))
    assert session.get_inputs()[0].type == "tensor(uint16)"


def test_batches_are_bounded_and_none_is_lost(monkeypatch):
    net = ALL["lenet"]
    monkeypatch.setattr(backend, "BATCH_BYTES", 4 * sum(p.size for p in net.populations) * 3)
    x = nets.samples(net, 10)
    nets.assert_same(run(net, x, "onnx"), reference.run(net, x))
    none = run(net, x[:0], "onnx")
    assert {name: s.shape for name, s in none.spikes.items()} == {p.name: (0, *p.shape) for p in net.spiking}
    assert none.readout.shape == (0, 10)


def test_scale_classes_and_provenance_come_back(tmp_path):
    net = one([[1, 2], [3, -4]], scale=[0.1, 1 / 3], classes=("é", "b"), provenance={"seed": 3, "none": None}, bits=5)
    back = onnx_format.read(onnx_format.write(net, tmp_path / "x.onnx"))
    assert back == net
    assert (back.classes, back.provenance, back.input) == (net.classes, net.provenance, net.input)


def test_equal_networks_give_equal_bytes(tmp_path):
    first, second = (onnx_format.write(ALL["residual"], tmp_path / f"{n}.onnx").read_bytes() for n in "ab")
    assert first == second


def test_every_changed_number_is_seen_in_the_file_and_in_the_run(tmp_path):
    net = ALL["lenet"]
    lowered, rng = onnx_format.lower(net), np.random.default_rng(0)
    model = onnx.load(onnx_format.write(net, tmp_path / "x.onnx"))
    x = nets.samples(net, 64)
    want, noticed = reference.run(net, x), 0
    for index, tensor in enumerate(model.graph.initializer):
        if tensor.name.startswith("clip/"):
            continue
        changed = onnx.ModelProto.FromString(model.SerializeToString())
        values = numpy_helper.to_array(tensor).copy()
        values[np.unravel_index(rng.integers(values.size), values.shape)] += 1
        changed.graph.initializer[index].CopyFrom(numpy_helper.from_array(values, tensor.name))
        onnx.save(changed, tmp_path / "y.onnx")
        assert onnx_format.read(tmp_path / "y.onnx") != lowered, tensor.name
        got = run(net, x, "onnx", tmp_path / "y.onnx")
        noticed += not np.array_equal(got.readout, want.readout)
    assert noticed >= 5


# --------------------------------------------------------------------------------------------------------- bounds

M = 1 << 23


@pytest.mark.parametrize(("weights", "threshold"), [([M], M), ([M, 2 - M], 0), ([M - 1, 1 - M], 2), ([2 * M - 1], 1)])
def test_just_inside_the_bound_the_run_is_exact(weights, threshold, tmp_path):
    net = one([weights], threshold=threshold)
    path = onnx_format.write(net, tmp_path / "x.onnx")
    assert onnx_format.read(path) == onnx_format.lower(net)
    x = np.array(np.meshgrid(*[[0, 1]] * len(weights))).reshape(len(weights), -1).T.astype(np.uint8)
    nets.assert_same(run(net, x, "onnx", path), reference.run(net, x))


@pytest.mark.parametrize(
    ("weights", "threshold", "worst"),
    [([2 * M], 1, 2 * M), ([M, -M], 1, 2 * M), ([M, 1 - M], 0, 2 * M), ([M], M + 1, 2 * M)],
)
def test_just_outside_the_bound_is_refused_by_name(weights, threshold, worst, tmp_path):
    with pytest.raises(DeployError, match=rf"population 'p': worst-case.*below 2\^24.*got {worst:,}.*fan-in"):
        onnx_format.write(one([weights], threshold=threshold), tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


def test_the_readouts_bound_counts_its_bias(tmp_path):
    net = one([[1]], bias=2 * M - 2)
    path = onnx_format.write(net, tmp_path / "x.onnx")
    x = np.array([[0], [1]], np.uint8)
    nets.assert_same(run(net, x, "onnx", path), reference.run(net, x))
    with pytest.raises(DeployError, match=r"population 'readout'.*got 16,777,216"):
        onnx_format.write(one([[1]], bias=2 * M - 1), tmp_path / "y.onnx")


def test_unreachable_thresholds_cost_nothing():
    net = one([[3, -2]] * 2, threshold=[1 << 40, -(1 << 40)])
    x = nets.samples(net)
    nets.assert_same(run(net, x, "onnx"), reference.run(net, x))


def test_files_beyond_protobufs_limit_are_refused(tmp_path, monkeypatch):
    net = ALL["lenet"]
    size = onnx_format.write(net, tmp_path / "x.onnx").stat().st_size
    weights = sum(4 * j.synapses.weight.size for p in net.populations for j in p.projections)
    monkeypatch.setattr(onnx_format, "MAX_FILE", size)
    assert onnx_format.read(onnx_format.write(net, tmp_path / "x.onnx")) == onnx_format.lower(net)
    for limit, got in ((size - 1, size), (weights, size), (weights - 1, weights)):
        monkeypatch.setattr(onnx_format, "MAX_FILE", limit)
        with pytest.raises(
            DeployError, match=rf"network: expected an ONNX file of at most {limit:,} bytes, got {got:,}"
        ):
            onnx_format.write(net, tmp_path / "y.onnx")
        with pytest.raises(DeployError, match=rf"expected an ONNX file of at most {limit:,} bytes, got {size:,}"):
            onnx_format.read(tmp_path / "x.onnx")
    assert not (tmp_path / "y.onnx").exists()


@pytest.mark.parametrize("bits", [1, 8, 9, 16])
def test_pixels_of_up_to_eight_bits_are_bytes(bits, tmp_path):
    net = one([[1, 2]], threshold=(1 << bits) - 1, bits=bits)
    path = onnx_format.write(net, tmp_path / "x.onnx")
    assert onnx_format.read(path) == net
    assert backend.session(net, path).get_inputs()[0].type == ("tensor(uint8)" if bits <= 8 else "tensor(uint16)")
    x = np.array([[0, 0], [1, 0], [(1 << bits) - 1, 0]], np.uint8 if bits <= 8 else np.uint16)
    nets.assert_same(run(net, x, "onnx", path), reference.run(net, x))


# ------------------------------------------------------------------------------- foreign, damaged, malicious files


def external(model):
    model.graph.initializer[2].data_location = TensorProto.EXTERNAL
    model.graph.initializer[2].external_data.add(key="location", value="/etc/passwd")


def node(model, op):
    return next(n for n in model.graph.node if n.op_type == op)


def attribute(model, op, **values):
    for key, value in values.items():
        of = node(model, op)
        kept = [a for a in of.attribute if a.name != key]
        del of.attribute[:]
        of.attribute.extend([*kept, *([] if value is None else [helper.make_attribute(key, value)])])


def initializer(model, name, array):
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(array, name))


def huge(model):
    del model.graph.initializer[2].dims[:]
    model.graph.initializer[2].dims.extend([1 << 40, 1 << 20])


def dimension(model):
    return model.graph.input[0].type.tensor_type.shape.dim[1]


def props(model, text):
    model.metadata_props[0].value = text


def bits(model, text):
    props(model, model.metadata_props[0].value.replace('"bits": 8', f'"bits": {text}'))


BAD = {
    "external data": (external, "the data of initializer 'conv1/bias' lie in another file"),
    "huge declared shape": (
        huge,
        r"initializer 'conv1/bias': expected float32 raw data of 4,611,686,018,427,387,904 b",
    ),
    "unknown operator": (
        lambda m: setattr(node(m, "Clip"), "op_type", "Relu"),
        r"node 'conv1' \(Relu\): expected one of",
    ),
    "another domain": (
        lambda m: setattr(node(m, "Conv"), "domain", "com.microsoft"),
        "node 'conv1/0'.*'com.microsoft'",
    ),
    "a subgraph": (lambda m: setattr(node(m, "Add"), "op_type", "If"), r"node 'b/1/sum' \(If\)"),
    "another opset": (lambda m: setattr(m.opset_import[0], "version", 18), "expected opset 17"),
    "fractions": (
        lambda m: initializer(m, "conv1/0/weight", np.full((4, 1, 3, 3), 0.5, np.float32)),
        "node 'conv1/0'.*expected integers below 2",
    ),
    "nan": (
        lambda m: initializer(m, "conv1/bias", np.full(4, np.nan, np.float32)),
        "node 'conv1/0'.*expected integers",
    ),
    "double weights": (
        lambda m: initializer(m, "conv1/0/weight", np.ones((4, 1, 3, 3))),
        "initializer 'conv1/0/weight'",
    ),
    "another clip": (
        lambda m: initializer(m, "clip/high", np.array(2, np.float32)),
        "node 'conv1' .Clip.*edited or damaged",
    ),
    "uneven padding": (lambda m: attribute(m, "Conv", pads=[1, 1, 0, 1]), "node 'conv1/0'.*equal pads"),
    "padding by name": (lambda m: attribute(m, "Conv", auto_pad="SAME_UPPER"), "attribute 'auto_pad'"),
    "no strides": (lambda m: attribute(m, "Conv", strides=None), "node 'conv1/0'.*two strides"),
    "no stride": (lambda m: attribute(m, "Conv", strides=[0, 0]), "node 'conv1/0'.*stride"),
    "groups": (lambda m: attribute(m, "Conv", group=3), "node 'conv1/0'.*groups"),
    "text for groups": (lambda m: attribute(m, "Conv", group="x"), "node 'conv1/0'.*a group"),
    "alpha": (lambda m: attribute(m, "Gemm", alpha=2.0), "node 'readout'.*attribute 'alpha'; expected 1.0"),
    "transposed": (lambda m: attribute(m, "Gemm", transB=None), "node 'readout'.*transB = 1"),
    "another cast": (lambda m: attribute(m, "Cast", to=TensorProto.DOUBLE), "node 'input/float'.*edited or damaged"),
    "value twice": (lambda m: m.graph.node.append(m.graph.node[1]), "expected one output, of a new name"),
    "node behind the readout": (
        lambda m: m.graph.node.append(helper.make_node("Flatten", ["conv1"], ["z"], name="z")),
        "node 'z' .Flatten.: comes behind the readout",
    ),
    "no readout": (lambda m: m.graph.node.pop(), "expected one output 'output', the readout"),
    "another input": (lambda m: setattr(m.graph.input[0], "name", "x"), "expected one input 'input'"),
    "float input": (lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 1), "the input's type"),
    "another input shape": (lambda m: setattr(dimension(m), "dim_value", 7), "node 'conv1/0'.*7 channels"),
    "free input shape": (lambda m: setattr(dimension(m), "dim_param", "C"), "node 'conv1/0'.*0 channels"),
    "initializer twice": (lambda m: m.graph.initializer.append(m.graph.initializer[2]), "'conv1/bias'.*is there twice"),
    "no description": (lambda m: m.metadata_props.pop(), "was not written by s3nn-deploy"),
    "another schema": (lambda m: props(m, '{"schema": "x"}'), "expected schema"),
    "deep description": (lambda m: props(m, "[" * 100_000), "'s3nn' is not readable"),
    "bits as text": (lambda m: bits(m, '"8"'), "integer bits"),
    "too many bits": (lambda m: bits(m, "99"), "the input's type"),
    "no bits": (lambda m: bits(m, "0"), "1 to 16 bits"),
}


def lenet_with_a_join():
    lenet = nets.ZOO["lenet"]
    again = Projection("pool1", Conv2d(np.ones((6, 4, 3, 3)), padding=(1, 1)))
    conv1, pool1, conv2, pool2, readout = lenet.populations
    joined = replace(conv2, name="b", projections=(*conv2.projections, again))
    after = replace(pool2, projections=(replace(pool2.projections[0], source="b"),))
    return check(replace(lenet, populations=(conv1, pool1, joined, after, readout)))


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_exported_network_is_refused_by_name(case, tmp_path):
    change, message = BAD[case]
    path = onnx_format.write(lenet_with_a_join(), tmp_path / "x.onnx")
    model = onnx.load(path)
    change(model)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(DeployError, match=message):
        onnx_format.read(path)
    with pytest.raises(DeployError):
        backend.session(lenet_with_a_join(), path)


def test_what_is_no_onnx_file_is_refused(tmp_path):
    path = tmp_path / "x.onnx"
    with pytest.raises(DeployError, match="no such file"):
        onnx_format.read(path)
    for contents in (b"", b"not protobuf", b"\x08" * 50):
        path.write_bytes(contents)
        with pytest.raises(DeployError, match=r"is not a readable ONNX file|was not written by"):
            onnx_format.read(path)


def test_truncated_and_damaged_files_are_refused_or_differ(tmp_path):
    net = nets.ZOO["mlp"]
    path = onnx_format.write(net, tmp_path / "x.onnx")
    whole, lowered = path.read_bytes(), onnx_format.lower(net)
    for length in np.linspace(0, len(whole) - 1, 60, dtype=int):
        path.write_bytes(whole[:length])
        with pytest.raises(DeployError):
            onnx_format.read(path)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            assert isinstance(onnx_format.read(path), IntNet)
        except DeployError:
            refused += 1
    assert refused > 100
    path.write_bytes(whole)
    assert onnx_format.read(path) == lowered


def test_the_export_of_another_network_is_refused(tmp_path):
    path = onnx_format.write(nets.ZOO["mlp"], tmp_path / "x.onnx")
    with pytest.raises(DeployError, match="export of another network"):
        run(nets.ZOO["lenet"], nets.samples(nets.ZOO["lenet"]), "onnx", path)


@pytest.mark.parametrize("bad", [np.zeros((1, 2)), np.zeros((1, 3), np.uint8), np.full((1, 2), 2, np.uint8)])
def test_inputs_outside_the_range_are_refused(bad):
    with pytest.raises(DeployError, match="input: expected"):
        run(one([[1, 2]]), bad, "onnx")
