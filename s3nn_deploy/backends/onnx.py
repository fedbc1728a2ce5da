"""ONNX Runtime on the exported file, with every population's spikes tapped."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime

from s3nn_deploy.errors import DeployError
from s3nn_deploy.formats import onnx as format
from s3nn_deploy.intnet import INPUT, IntNet
from s3nn_deploy.trace import Trace, checked_input, join

BATCH_BYTES = 64 << 20
"""About how much memory the spikes of one batch take."""


def run(net: IntNet, x: Any, file: Path | None = None) -> Trace:
    """Run the ONNX `file` of `net` (without one, a temporary export) on `x`, integers [N, *input shape].

    Raises:
        DeployError: `x` is outside the input's range, or the file is not that of a network with these populations.
    """
    x = checked_input(net, x)
    if file is not None:
        tapped = session(net, file)
    else:
        with TemporaryDirectory(prefix="s3nn-onnx-") as folder:
            tapped = session(net, format.write(net, Path(folder) / "net.onnx"))
    samples = max(1, min(1024, BATCH_BYTES // (4 * sum(p.size for p in net.populations))))
    batches = [_batch(net, tapped, x[first : first + samples]) for first in range(0, len(x), samples)]
    if not batches:
        one = _batch(net, tapped, np.zeros((1, *net.input.shape), x.dtype))
        return Trace({name: s[:0] for name, s in one.spikes.items()}, one.readout[:0], one.scale, "onnx")
    return join(batches)


def session(net: IntNet, file: Path, level: Any = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL) -> Any:
    """An ONNX Runtime session on a copy of the file in memory that also outputs the spikes of every population.

    Raises:
        DeployError: the file cannot be read, lacks a population, or is refused by ONNX Runtime.
    """
    held, wanted = ({p.name: p.shape for p in n.populations} for n in (format.read(file), net))
    if held != wanted:
        raise DeployError(
            str(file),
            expected=f"the populations {wanted}",
            got=str(held),
            hint="This is the export of another network: export it again.",
        )
    model = format.load(file)
    if len(model.graph.output) == 1:
        model.graph.output.extend(format.exposed(net))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 4
    options.inter_op_num_threads = 1
    options.intra_op_num_threads = _processors()
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors have no other common class
        hint = "Export it again, without --qonnx: ONNX Runtime has no Quant nodes. `conformance` runs QONNX's tools."
        raise DeployError(str(file), f"ONNX Runtime does not load it ({error})", hint=hint) from error


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _batch(net: IntNet, tapped: Any, x: np.ndarray) -> Trace:
    names = [format.OUTPUT, *(p.name for p in net.spiking)]
    try:
        readout, *values = tapped.run(names, {INPUT: x})
    except Exception as error:
        raise DeployError("ONNX Runtime", f"does not run the file ({error})", hint="Export it again.") from error
    spikes = {}
    for name, value in zip(names[1:], values, strict=True):
        spikes[name] = value == 1
        if not np.array_equal(spikes[name], value):
            raise DeployError(
                f"population {name!r}", expected="spikes 0 or 1 from ONNX Runtime", got=str(np.unique(value)[:5])
            )
    scale = np.repeat(net.readout.scale, net.readout.size // net.readout.channels)  # type: ignore[arg-type]
    return Trace(spikes, readout, scale, "onnx")
