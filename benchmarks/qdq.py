"""A network as an ONNX graph with QuantizeLinear nodes, as ONNX Runtime has fast kernels for: for the benchmark only.

Every scale is 1, so that quantising only saturates. What is quantised is `u - threshold + 1`, where saturation to 0..255
leaves zero and not zero apart, and spikes are the minimum of that and 1, taken after pooling.
"""

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from s3nn_deploy.intnet import INPUT, Conv2d, Dense, IntNet, Population


def model(net: IntNet) -> bytes:
    """The graph of a network as `speed_nets` makes them, with the input `INPUT` and the output "readout".

    Raises:
        NotImplementedError: a join of other shapes than theirs.
    """
    graph = _Graph()
    sums = {INPUT: INPUT}
    for population in net.populations:
        sums[population.name] = _population(graph, net, population, sums)
    shape = ["N", *net.input.shape]
    made = helper.make_graph(
        graph.nodes,
        "qdq",
        [helper.make_tensor_value_info(INPUT, TensorProto.UINT8, shape)],
        [helper.make_tensor_value_info(sums[net.readout.name], TensorProto.FLOAT, ["N", net.readout.size])],
        graph.constants,
    )
    whole = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(whole)
    return whole.SerializeToString()


class _Graph:
    """Nodes and constants so far."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.known: dict[tuple[str, str], str] = {}

    def constant(self, value: np.ndarray) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def floats(self, integers: str, zero: np.generic) -> str:
        return self.node("DequantizeLinear", integers, self.one, self.scalar(zero))

    def integers(self, floats: str, zero: np.generic) -> str:
        return self.node("QuantizeLinear", floats, self.one, self.scalar(zero))

    def scalar(self, value: np.generic) -> str:
        key = "scalar", f"{value.dtype}{value}"
        if key not in self.known:
            self.known[key] = f"s{len(self.known)}"
            self.constants.append(numpy_helper.from_array(np.array(value), self.known[key]))
        return self.known[key]

    @property
    def one(self) -> str:
        return self.scalar(np.float32(1))

    def spikes(self, sums: str) -> str:
        """0 or 1 where `sums` are zero or not; the input's values are their own."""
        if sums != INPUT and ("spikes", sums) not in self.known:
            self.known["spikes", sums] = self.node("Clip", sums, "", self.scalar(np.uint8(1)))
        return self.known.get(("spikes", sums), INPUT)


def _population(graph: _Graph, net: IntNet, population: Population, sums: dict[str, str]) -> str:
    projection, *others = population.projections
    synapses, source = projection.synapses, sums[projection.source]
    if population.name.startswith("pool"):
        kernel = synapses.weight.shape[2:]
        return graph.node("MaxPool", source, kernel_shape=kernel, strides=synapses.stride)
    offset = population.bias if population.threshold is None else 1 - population.threshold.astype(np.int64)
    weight, spikes, skip = synapses.weight, graph.spikes(source), None
    for other in others:
        added, from_ = other.synapses, graph.spikes(sums[other.source])
        one_by_one = isinstance(added, Conv2d) and added.weight.shape[2:] == (1, 1)
        if not one_by_one or not isinstance(synapses, Conv2d) or weight.shape[2:] != (3, 3):
            raise NotImplementedError(f"{population.name}: a join of other shapes")
        if added.groups == len(weight):  # each channel to itself; within 8 bits, because beyond them the sum decides
            skip = graph.node(
                "Mul",
                graph.floats(from_, np.uint8(0)),
                graph.constant(added.weight.reshape(1, -1, 1, 1).astype(np.float32)),
            )
        else:  # as more channels of the one convolution
            widened = np.zeros((*added.weight.shape[:2], 3, 3), dtype=weight.dtype)
            widened[:, :, 1, 1] = added.weight[:, :, 0, 0]
            from_ = graph.node("MaxPool", from_, kernel_shape=[1, 1], strides=added.stride)
            spikes, weight = graph.node("Concat", spikes, from_, axis=1), np.concatenate([weight, widened], 1)
    x = graph.floats(spikes, np.uint8(0))
    w = graph.floats(graph.constant(weight.astype(np.int8)), np.int8(0))
    b = graph.floats(graph.constant(offset.astype(np.int32)), np.int32(0))
    if isinstance(synapses, Dense):
        u = graph.node(
            "Gemm", graph.node("Flatten", x) if len(net.source(projection).shape) == 3 else x, w, b, transB=1
        )
    else:
        u = graph.node("Conv", x, w, b, strides=synapses.stride, pads=[*synapses.padding, *synapses.padding])
    if population.threshold is None:
        return u
    if skip is not None:
        skip = graph.floats(graph.integers(skip, np.int8(0)), np.int8(0))
        u = graph.node("Add", graph.floats(graph.integers(u, np.int8(0)), np.int8(0)), skip)
    return graph.integers(u, np.uint8(0))
