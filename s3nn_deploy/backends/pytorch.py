"""PyTorch's own run of a converted network: the hardened program, in floats, with every population tapped."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from s3nn_deploy.conversion import Conversion
from s3nn_deploy.errors import DeployError
from s3nn_deploy.intnet import INPUT
from s3nn_deploy.program import KINDS, program_dtype
from s3nn_deploy.trace import Trace, checked_input


def run(converted: Conversion, x: Any) -> Trace:
    """Run the program on integers `x` [N, *input shape], on the CPU.

    Raises:
        DeployError: a value that should be a spike or an integer is neither.
    """
    net, program = converted.net, converted.program
    kept: dict[str, torch.Tensor] = dict.fromkeys((tap.value for tap in converted.taps.values()), torch.empty(0))
    # NNPACK's Winograd convolutions do not give exact integer sums
    with torch.no_grad(), torch.backends.nnpack.flags(enabled=False):
        program(torch.from_numpy(checked_input(net, x)).to(program_dtype(program)), kept)
    spikes = {}
    for population in net.spiking:
        tap = converted.taps[population.name]
        value = kept[tap.value][:, tap.first : tap.first + population.channels].numpy()
        if not np.all((value == 0) | (value == 1)):
            raise DeployError(
                f"population {population.name!r}", expected="spikes 0 or 1 from PyTorch", got=str(np.unique(value)[:5])
            )
        spikes[population.name] = value.astype(bool)
    tap = converted.taps[net.readout.name]
    u = kept[tap.value].numpy().reshape(len(x), net.readout.size) * tap.unit
    if not np.all(u == np.rint(u)):
        raise DeployError(f"population {net.readout.name!r}", expected="integers from PyTorch", got="fractions")
    return Trace(spikes, u.astype(np.int64), net.scale, "pytorch")


def run_population(converted: Conversion, name: str, sources: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """The spikes of one population, or the readout's integers, [N, ...], for values [N, *shape] of its sources.

    Only the operations of the program between the sources and the population are run.
    """
    program, dtype = converted.program, program_dtype(converted.program)
    tap, values = converted.taps[name], dict[str, torch.Tensor]()
    shapes = {op.name: op.shape for op in program.ops}
    for source, array in sources.items():
        given = torch.from_numpy(np.ascontiguousarray(array)).to(dtype)
        if source == INPUT:
            values[INPUT] = given
            continue
        at = converted.taps[source]
        whole = values.setdefault(at.value, torch.zeros((len(array), *shapes[at.value]), dtype=dtype))
        whole[:, at.first : at.first + given.shape[1]] = given
    wanted, ops = {tap.value}, []
    for op in reversed(program.ops):
        if op.name in wanted and op.name not in values:
            ops.append(op)
            wanted.update(op.inputs)
    with torch.no_grad(), torch.backends.nnpack.flags(enabled=False):
        for op in reversed(ops):
            constants = {key: program.constant(op, key) for key in op.constants}
            values[op.name] = KINDS[op.kind](*(values[i] for i in op.inputs), **constants, **op.attributes)
    population = converted.net[name]
    value = values[tap.value][:, tap.first : tap.first + population.channels].numpy()
    exact = value if population.spiking else value * tap.unit
    if not np.all((exact == 0) | (exact == 1) if population.spiking else exact == np.rint(exact)):
        raise DeployError(f"population {name!r}", expected="spikes 0 or 1, or integers, from PyTorch", got="others")
    return exact.astype(bool if population.spiking else np.int64)
