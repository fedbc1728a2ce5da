"""ONNX graph: Conv and Gemm on integers held as float32, exact in any order of summation, and so on any CPU.

A spiking population is `Clip(u + (1 - threshold), 0, 1)`, with 1 - threshold as the bias of its first synapses: the
integer u + 1 - threshold is at least 1 exactly where it fires, and at most 0 elsewhere. Every sum, with its bias, stays
below 2^24 in magnitude (refused otherwise). The value named like a population is its spikes, 0.0 or 1.0 [N, *shape];
the one named like the readout is its integers. Input `input`: uint8 (uint16 above 8 bits) [N, *shape]; output
`output`: int64 [N, classes].

With `expose_spikes` every population's spikes are outputs too, float32 [N, *shape], under the populations' names.

With `qonnx` the same sums are written for QONNX's tools (hls4ml, FINN): `input` and `output` are float32, and Quant nodes
of scale 1 state the bits of input, weights, biases and spikes; that of 1 unsigned bit is the Clip to 0 and 1. Those tools
want every shape in the file, with a batch of 1. ONNX Runtime does not know Quant; `qonnx.core.onnx_exec` does.

Floats and not QLinearConv or MatMulInteger: on x86 without VNNI those saturate in 16 bits between products of pixels
and 8-bit weights, and give other sums.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from s3nn_deploy import __version__
from s3nn_deploy.errors import DeployError
from s3nn_deploy.files import existing, replacing
from s3nn_deploy.formats import description
from s3nn_deploy.intnet import (
    EXACT_FLOAT32,
    INPUT,
    Conv2d,
    Dense,
    Input,
    IntNet,
    Population,
    Projection,
    Synapses,
    check,
    clamp_thresholds,
    reach,
    signed_bits,
    worst_case,
)

SCHEMA = "s3nn-deploy-onnx/1"

OPSET, IR_VERSION = 17, 8
"""What onnxruntime 1.12 and later execute."""

MAX_FILE = (1 << 31) - 1
"""The largest message that protobuf can hold."""

FLOAT, OUTPUT, LOW, HIGH = "input/float", "output", "clip/low", "clip/high"

QUANT = "qonnx.custom_op.general"
"""The domain of QONNX's Quant: inputs x, scale, zero point and bits, here always scale 1 and zero point 0."""


def lower(net: IntNet, expose_spikes: bool = False, qonnx: bool = False) -> IntNet:
    """`net` with its thresholds clamped to the reachable range, which bounds 1 - threshold; the same for all options."""
    return clamp_thresholds(net)


def write(net: IntNet, path: str | Path, expose_spikes: bool = False, qonnx: bool = False) -> Path:
    """Write `lower(net)` to `path`; equal networks give equal bytes.

    Args:
        expose_spikes: make the spikes of every population outputs.
        qonnx: write Quant nodes, for QONNX's tools.

    Raises:
        DeployError: a population whose potentials float32 would not sum exactly, or a network beyond 2 GiB.
    """
    net = lower(net)
    size = sum(4 * j.synapses.weight.size for p in net.populations for j in p.projections)
    if size > MAX_FILE:
        raise _too_large(size)
    model = _model(net, expose_spikes, 1 if qonnx else "N")
    if model.ByteSize() > MAX_FILE:
        raise _too_large(model.ByteSize())
    model = _quantised(model, net) if qonnx else model
    onnx.checker.check_model(model, full_check=not qonnx)  # shapes are inferred through known operators only
    with replacing(path) as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))
    return Path(path)


def _too_large(size: int) -> DeployError:
    return DeployError(
        "network",
        expected=f"an ONNX file of at most {MAX_FILE:,} bytes",
        got=f"{size:,}",
        hint="Export to the emulator's file, which has no such limit.",
    )


def _model(net: IntNet, expose_spikes: bool, batch: int | str) -> Any:
    nodes = [helper.make_node("Cast", [INPUT], [FLOAT], name=FLOAT, to=TensorProto.FLOAT)]
    arrays: dict[str, NDArray[Any]] = {LOW: np.array(0), HIGH: np.array(1)}
    for population in net.populations:
        name, sums = population.name, []
        arrays[f"{name}/bias"] = _bias(net, population)
        for index, projection in enumerate(population.projections):
            source = FLOAT if projection.source == INPUT else projection.source
            own, weight = f"{name}/{index}", f"{name}/{index}/weight"
            arrays[weight] = projection.synapses.weight
            operands = [weight] if index else [weight, f"{name}/bias"]
            match projection.synapses:
                case Dense():
                    if len(net.source(projection).shape) == 3:
                        nodes.append(helper.make_node("Flatten", [source], [f"{own}/flat"], name=f"{own}/flat", axis=1))
                        source = f"{own}/flat"
                    nodes.append(helper.make_node("Gemm", [source, *operands], [own], name=own, transB=1))
                case Conv2d(stride=stride, padding=padding, dilation=dilation, groups=groups):
                    nodes.append(
                        helper.make_node(
                            "Conv",
                            [source, *operands],
                            [own],
                            name=own,
                            kernel_shape=projection.synapses.weight.shape[2:],
                            strides=stride,
                            pads=(*padding, *padding),
                            dilations=dilation,
                            group=groups,
                        )
                    )
            sums.append(own)
            if index:
                nodes.append(helper.make_node("Add", [sums[-2], own], [f"{own}/sum"], name=f"{own}/sum"))
                sums[-1] = f"{own}/sum"
        if population.spiking:
            nodes.append(helper.make_node("Clip", [sums[-1], LOW, HIGH], [name], name=name))
        else:
            nodes[-1].output[0] = nodes[-1].name = name
            last = name
            if len(population.shape) == 3:
                last = f"{name}/flat"
                nodes.append(helper.make_node("Flatten", [name], [last], name=last, axis=1))
            nodes.append(helper.make_node("Cast", [last], [OUTPUT], name=OUTPUT, to=TensorProto.INT64))
    initializers = []
    for name, array in arrays.items():
        exact = np.ascontiguousarray(array, dtype="<f4")
        initializers.append(helper.make_tensor(name, TensorProto.FLOAT, array.shape, exact.tobytes(), raw=True))
    kind = TensorProto.UINT8 if net.input.bits <= 8 else TensorProto.UINT16
    outputs = [helper.make_tensor_value_info(OUTPUT, TensorProto.INT64, [batch, net.readout.size])]
    graph = helper.make_graph(
        nodes,
        "s3nn",
        [helper.make_tensor_value_info(INPUT, kind, [batch, *net.input.shape])],
        outputs + (exposed(net, batch) if expose_spikes else []),
        initializers,
    )
    model = helper.make_model(
        graph,
        producer_name="s3nn-deploy",
        producer_version=__version__,
        ir_version=IR_VERSION,
        opset_imports=[helper.make_opsetid("", OPSET)],
    )
    helper.set_model_props(model, {description.KEY: description.to_text(net, SCHEMA)})
    return model


def exposed(net: IntNet, batch: int | str = "N") -> list[Any]:
    """What makes every population's spikes outputs of a graph."""
    return [helper.make_tensor_value_info(p.name, TensorProto.FLOAT, [batch, *p.shape]) for p in net.spiking]


def _quantised(model: Any, net: IntNet) -> Any:
    """The same graph with Quant nodes instead of casts and clips, and for every weight and bias; all shapes stated."""
    model = onnx.shape_inference.infer_shapes(model)
    graph = model.graph
    kept = [t for t in graph.initializer if t.name not in (LOW, HIGH)]
    arrays = {t.name: numpy_helper.to_array(t) for t in kept}
    numbers = {"quant/one": 1, "quant/zero": 0}
    nodes = []

    def quant(source: str, target: str, name: str, bits: int, signed: int) -> None:
        numbers[f"quant/bits{bits}"] = bits
        operands = [source, "quant/one", "quant/zero", f"quant/bits{bits}"]
        options: dict[str, Any] = {"signed": signed, "narrow": 0, "rounding_mode": "ROUND"}
        nodes.append(helper.make_node("Quant", operands, [target], name=name, domain=QUANT, **options))

    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in arrays:
                low, high = int(arrays[name].min()), int(arrays[name].max())
                quant(name, f"{name}/quant", f"{name}/quant", max(2, signed_bits(low, high)), 1)
                node.input[index] = f"{name}/quant"
        match node.op_type:
            case "Cast" if node.input[0] == INPUT:
                quant(INPUT, FLOAT, FLOAT, net.input.bits, 0)
            case "Cast":
                nodes[-1].output[0] = OUTPUT
            case "Clip":
                quant(node.input[0], node.output[0], node.name, 1, 0)
            case _:
                nodes.append(node)
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(
        [
            *kept,
            *(
                helper.make_tensor(n, TensorProto.FLOAT, (), np.float32(v).tobytes(), raw=True)
                for n, v in numbers.items()
            ),
        ]
    )
    for value in (graph.input[0], graph.output[0]):
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    made = {node.output[0] for node in nodes}
    values = [value for value in graph.value_info if value.name in made]
    weights = [helper.make_tensor_value_info(f"{n}/quant", TensorProto.FLOAT, a.shape) for n, a in arrays.items()]
    del graph.value_info[:]
    graph.value_info.extend([*values, *weights])
    model.opset_import.append(helper.make_opsetid(QUANT, 1))
    return model


def _bias(net: IntNet, population: Population) -> NDArray[np.int64]:
    """The bias of the first synapses, 1 - threshold or the readout's, if every sum with it is exact in float32."""
    if population.threshold is None:
        assert population.bias is not None
        bias, worst = population.bias.astype(np.int64), worst_case(net, population)
    else:
        low, high = reach(net, population)
        bias = 1 - population.threshold.astype(np.int64)
        worst = int((high - low + np.abs(bias)).max())
    if worst >= EXACT_FLOAT32:
        raise DeployError(
            f"population {population.name!r}",
            "worst-case membrane potential, bias included",
            expected=f"below 2^24 = {EXACT_FLOAT32:,} (exact in float32)",
            got=f"{worst:,}",
            hint="Train with fewer weight or input bits or a smaller fan-in, or use the emulator's file.",
        )
    return bias


# ------------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True)
class Source:
    """A value that synapses can read: the input's or a population's, as it is or flattened."""

    name: str
    shape: tuple[int, ...]
    flat: bool = False


@dataclass(frozen=True)
class Sum:
    """A value of membrane potentials: projections, the bias [channels], and the value's name before flattening."""

    name: str
    shape: tuple[int, ...]
    projections: tuple[Projection, ...]
    bias: NDArray[np.int64]
    flat: bool = False


def load(path: str | Path) -> Any:
    """The ONNX model in a file, of bounded size and with all data in it.

    Raises:
        DeployError: no such file, larger than 2 GiB, not an ONNX model, or data that lie in other files.
    """
    path = existing(path)
    size = path.stat().st_size
    if size > MAX_FILE:
        raise DeployError(str(path), expected=f"an ONNX file of at most {MAX_FILE:,} bytes", got=f"{size:,}")
    try:
        model = onnx.ModelProto.FromString(path.read_bytes())
    except (DecodeError, OSError, ValueError, RuntimeError) as error:
        raise DeployError(
            str(path), f"is not a readable ONNX file ({error})", hint="The file is truncated or damaged."
        ) from error
    for tensor in model.graph.initializer:
        if tensor.data_location != TensorProto.DEFAULT or tensor.external_data:
            raise DeployError(
                str(path),
                f"the data of initializer {tensor.name!r} lie in another file",
                hint="Save the model with all its data in one file.",
            )
    return model


def read(path: str | Path) -> IntNet:
    """Read a network that `write` wrote, node by node.

    Raises:
        DeployError: not such a file; names the node or initializer that is not an integer network's.
    """
    where, model = str(path), load(path)
    props = {p.key: p.value for p in model.metadata_props}
    if description.KEY not in props:
        raise DeployError(
            where,
            "was not written by s3nn-deploy",
            expected=f"{description.KEY!r} in its metadata",
            hint="Only networks that s3nn-deploy exported are read back.",
        )
    about = description.from_text(props[description.KEY], SCHEMA, where)
    if any(o.domain == QUANT for o in model.opset_import):
        model = _unquantised(where, model, about.bits)
    versions = [(o.domain, o.version) for o in model.opset_import]
    if versions != [("", OPSET)] or model.functions or model.graph.sparse_initializer:
        raise DeployError(where, expected=f"opset {OPSET}, no functions, no sparse tensors", got=f"opsets {versions}")
    graph = model.graph
    spec = _spec(where, graph, about)
    arrays = _arrays(where, graph)
    values: dict[str, Source | Sum] = {INPUT: Source(INPUT, spec.shape)}
    populations: list[Population] = []
    for node in graph.node:
        at = f"{where}: node {node.name or node.output[:1]!r} ({node.op_type})"
        if len(node.output) != 1 or node.output[0] in values or node.output[0] in arrays:
            raise DeployError(at, expected="one output, of a new name", got=str(list(node.output)))
        if populations and not populations[-1].spiking:
            raise DeployError(at, "comes behind the readout")
        made = _step(at, node, values, arrays)
        if isinstance(made, Population):
            made = replace(made, scale=about.scale) if not made.spiking else made
            populations.append(made)
            values[node.output[0]] = Source(made.name, made.shape)
        else:
            values[node.output[0]] = made
    outputs, spikes = [o.name for o in graph.output], [p.name for p in populations if p.spiking]
    if not populations or populations[-1].spiking or outputs not in ([OUTPUT], [OUTPUT, *spikes]):
        raise DeployError(
            where, expected=f"one output {OUTPUT!r}, the readout as integers, or all populations too", got=str(outputs)
        )
    return check(IntNet(spec, tuple(populations), about.classes, about.provenance))


def _unquantised(where: str, model: Any, bits: int) -> Any:
    """The graph of which `_quantised` made this one, if every Quant node changes nothing or only clips to 0 and 1."""
    versions = [(o.domain, o.version) for o in model.opset_import]
    if versions != [("", OPSET), (QUANT, 1)]:
        raise DeployError(where, expected=f"opset {OPSET} and {QUANT} 1", got=f"opsets {versions}")
    graph = model.graph
    arrays = _arrays(where, graph)
    same: dict[str, str] = {}
    nodes = []
    for node in graph.node:
        at = f"{where}: node {node.name!r} ({node.op_type})"
        for index, name in enumerate(node.input):
            node.input[index] = same.get(name, name)
        if node.op_type != "Quant" or node.domain != QUANT:
            nodes.append(node)
            continue
        options = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        numbers = [arrays[name] for name in node.input[1:] if name in arrays]
        scales = [float(a) if a.shape == () else None for a in numbers]
        signed, width = options.get("signed"), None if len(scales) != 3 else scales[2]
        right = len(node.input) == 4 and scales[:2] == [1.0, 0.0] and options.get("rounding_mode") == b"ROUND"
        if not right or len(node.output) != 1 or width is None or options.get("narrow") != 0:
            raise DeployError(at, expected="scale 1, zero point 0, ROUND, not narrow", got=f"{scales}, {options}")
        source, target = node.input[0], node.output[0]
        if source in arrays and signed == 1 and np.all(np.abs(arrays[source] + 0.5) < 2.0 ** (width - 1)):
            same[target] = source
        elif source == INPUT and signed == 0 and width == bits:
            nodes.append(helper.make_node("Cast", [source], [target], name=node.name, to=TensorProto.FLOAT))
        elif source not in arrays and source != INPUT and signed == 0 and width == 1:
            nodes.append(helper.make_node("Clip", [source, LOW, HIGH], [target], name=node.name))
        else:
            raise DeployError(
                at, expected="bits that hold the values, or 1 unsigned bit for spikes", got=f"{width} bits"
            )
    last = next((node for node in nodes if list(node.output) == [OUTPUT]), None)
    if last is None or not last.name:
        raise DeployError(where, expected=f"a named node that makes {OUTPUT!r}", got="none")
    last.output[0] = last.name
    nodes.append(helper.make_node("Cast", [last.name], [OUTPUT], name=OUTPUT, to=TensorProto.INT64))
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    del plain.graph.node[:], plain.opset_import[1:], plain.graph.initializer[:]
    plain.graph.node.extend(nodes)
    limits = [
        helper.make_tensor(n, TensorProto.FLOAT, (), np.float32(v).tobytes(), raw=True)
        for n, v in ((LOW, 0), (HIGH, 1))
    ]
    plain.graph.initializer.extend([*limits, *(t for t in graph.initializer if not t.name.startswith("quant/"))])
    for value in (plain.graph.input[0], plain.graph.output[0]):
        if value.type.tensor_type.elem_type != TensorProto.FLOAT:
            raise DeployError(
                where, f"the type of {value.name!r}", expected="float32", got=str(value.type.tensor_type.elem_type)
            )
    plain.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8 if bits <= 8 else TensorProto.UINT16
    return plain


def _spec(where: str, graph: Any, about: description.Description) -> Input:
    if [i.name for i in graph.input] != [INPUT]:
        raise DeployError(where, expected=f"one input {INPUT!r}", got=str([i.name for i in graph.input]))
    tensor = graph.input[0].type.tensor_type
    if tensor.elem_type != (TensorProto.UINT8 if about.bits <= 8 else TensorProto.UINT16):
        raise DeployError(
            where, "the input's type", expected=f"unsigned integers for {about.bits} bits", got=str(tensor.elem_type)
        )
    return Input(tuple(d.dim_value for d in tensor.shape.dim[1:]), about.bits)


def _arrays(where: str, graph: Any) -> dict[str, NDArray[np.float32]]:
    arrays: dict[str, NDArray[np.float32]] = {}
    for tensor in graph.initializer:
        at, size = f"{where}: initializer {tensor.name!r}", 4 * math.prod(tensor.dims)
        if tensor.data_type != TensorProto.FLOAT or min(tensor.dims, default=1) < 1 or size != len(tensor.raw_data):
            raise DeployError(
                at,
                expected=f"float32 raw data of {size:,} bytes",
                got=f"type {tensor.data_type} and {len(tensor.raw_data):,} bytes",
            )
        if tensor.name in arrays:
            raise DeployError(at, "is there twice")
        arrays[tensor.name] = np.frombuffer(tensor.raw_data, "<f4").reshape(tuple(tensor.dims))
    return arrays


ATTRIBUTES: Mapping[str, Mapping[str, Any]] = {
    "Cast": {"to": None},
    "Flatten": {"axis": 1},
    "Add": {},
    "Clip": {},
    "Gemm": {"transB": 1, "transA": 0, "alpha": 1.0, "beta": 1.0},
    "Conv": {"kernel_shape": None, "strides": None, "pads": None, "dilations": None, "group": None},
}
"""The operators that are read, with their attributes and the one value that each may have (None: any)."""


def _step(
    at: str,
    node: Any,
    values: Mapping[str, Source | Sum],
    arrays: Mapping[str, NDArray[np.float32]],
) -> Source | Sum | Population:
    """What one node makes of the values before it."""
    if node.op_type not in ATTRIBUTES or node.domain:
        raise DeployError(
            at,
            expected=f"one of {', '.join(ATTRIBUTES)}",
            got=f"{node.op_type!r} of {node.domain!r}",
            hint="Only networks that s3nn-deploy exported are read back.",
        )
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    allowed = ATTRIBUTES[node.op_type]
    for key, value in attributes.items():
        if key not in allowed or allowed[key] not in (None, value):
            expected = str(allowed.get(key, "no such attribute"))
            raise DeployError(at, f"attribute {key!r}", expected=expected, got=str(value)[:80])
    operands = [values.get(name) for name in node.input]
    first = operands[0] if operands else None
    match node.op_type, first:
        case "Cast", Source() if node.input[0] == INPUT and attributes.get("to") == TensorProto.FLOAT:
            return first
        case "Cast", Sum() if node.output[0] == OUTPUT and attributes.get("to") == TensorProto.INT64:
            if first.flat or len(first.shape) == 1:
                return Population(first.name, first.shape, first.projections, bias=first.bias)
        case "Flatten", Source() | Sum() if node.input[0] != INPUT:
            return replace(first, flat=True)
        case "Add", Sum(flat=False) if len(operands) == 2:
            if isinstance(second := operands[1], Sum) and second.shape == first.shape and not second.flat:
                both = (*first.projections, *second.projections)
                return Sum(node.output[0], first.shape, both, first.bias + second.bias)
        case "Clip", Sum(flat=False) if len(node.input) == 3:
            limits = [arrays.get(name) for name in node.input[1:]]
            if [a.tolist() if a is not None else None for a in limits] == [0.0, 1.0]:
                return Population(node.output[0], first.shape, first.projections, threshold=1 - first.bias)
        case "Gemm" | "Conv", Source() if node.input[0] != INPUT and 2 <= len(node.input) <= 3:
            tensors = [arrays.get(name) for name in node.input[1:]]
            if all(t is not None for t in tensors):
                return _sum(at, node, first, attributes, [t for t in tensors if t is not None])
    raise DeployError(
        at,
        expected="a step of a network that s3nn-deploy exported",
        got=f"inputs {list(node.input)} and attributes {attributes}",
        hint="The file was edited or damaged: export it again.",
    )


def _sum(at: str, node: Any, source: Source, attributes: Mapping[str, Any], tensors: list[NDArray[np.float32]]) -> Sum:
    weight = _exact(at, tensors[0])
    synapses: Synapses = Dense(weight) if node.op_type == "Gemm" else _conv(at, weight, attributes)
    if isinstance(synapses, Dense) != (source.flat or len(source.shape) == 1):
        raise DeployError(at, expected="a flat source for Gemm, another for Conv", got=f"{source}")
    if isinstance(synapses, Dense) and attributes.get("transB") != 1:
        raise DeployError(at, expected="transB = 1", got=f"{attributes}")
    try:
        shape = synapses.out_shape(source.shape)
    except DeployError as error:
        raise DeployError(at, str(error)) from error
    bias = _exact(at, tensors[1]) if len(tensors) == 2 else np.zeros(shape[0], np.int64)
    if bias.shape != (shape[0],):
        raise DeployError(at, "bias", expected=f"shape ({shape[0]},)", got=str(bias.shape))
    return Sum(node.output[0], shape, (Projection(source.name, synapses),), bias)


def _conv(at: str, weight: NDArray[np.int64], attributes: Mapping[str, Any]) -> Conv2d:
    lengths = {"kernel_shape": 2, "strides": 2, "pads": 4, "dilations": 2}
    found = {key: np.array(attributes.get(key, ())) for key in lengths}
    kernel, strides, pads, dilations = (tuple(found[key].tolist()) for key in lengths)
    whole = all(v.shape == (lengths[key],) and v.dtype.kind == "i" for key, v in found.items())
    if not whole or pads[:2] != pads[2:] or kernel != weight.shape[2:] or not isinstance(attributes.get("group"), int):
        raise DeployError(
            at,
            f"with a kernel of shape {weight.shape}",
            got=str(dict(attributes)),
            expected="its kernel_shape, two strides and dilations, equal pads on both sides, a group",
        )
    return Conv2d(weight, strides, pads[:2], dilations, attributes["group"])


def _exact(at: str, values: NDArray[np.float32]) -> NDArray[np.int64]:
    if not np.all(np.abs(values) < EXACT_FLOAT32) or np.any(values != np.rint(values)):
        raise DeployError(at, expected="integers below 2^24", got="fractions, larger values or NaN")
    return values.astype(np.int64)
