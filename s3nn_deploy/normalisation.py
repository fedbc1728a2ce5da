"""A scaling of the input before the first synapses (x / 255, a mean and a deviation), moved behind them.

W (a x + b) = a (W x) + W b, so the synapses may take the integers x themselves and the scaling joins the float chain
between their sum and the spike. That the module rounds elsewhere is stated as a slack, which the thresholds' margins cover.
"""

from dataclasses import replace

import numpy as np
import torch

from s3nn_deploy.intnet import INPUT
from s3nn_deploy.program import Op, Program, program_dtype, refusal


def absorb_input_scaling(program: Program) -> Program:
    """`program` whose first synapses take the input as it is; the program itself where they do already.

    Raises:
        DeployError: a factor that differs between channels, or a mean subtracted in front of zero padding.
    """
    affine: list[Op] = []
    value = INPUT
    while len(readers := [op for op in program.ops if value in op.inputs]) == 1 and readers[0].kind in _AFFINE:
        affine.append(readers[0])
        value = readers[0].name
    if all(op.kind == "flatten" for op in affine) or any(op.kind not in ("conv2d", "linear") for op in readers):
        return program
    factor, shift = _combined(program, affine)
    kept = [op for op in affine if op.kind == "flatten"]
    source = kept[-1].name if kept else INPUT
    ops = [replace(op, inputs=(INPUT,)) for op in kept]
    for op in program.ops:
        if op not in affine:
            ops += _moved(program, op, source, factor, shift) if op in readers else [op]
    return Program(program.input, ops)


_AFFINE = ("add", "mul", "div", "batch_norm", "flatten")


def _combined(program: Program, affine: list[Op]) -> tuple[float, np.ndarray]:
    """The common factor of all inputs, and what is added to each, float64 of the last operation's shape."""
    factor, shift = np.ones(program.input.shape), np.zeros(program.input.shape)
    for op in affine:
        constants = {key: program.constant(op, key).double().numpy() for key in op.constants}
        match op.kind:
            case "flatten":
                factor, shift = factor.reshape(-1), shift.reshape(-1)
            case "add":
                shift = shift + constants["value"].reshape(constants["value"].shape[-shift.ndim :])
            case "mul" | "div":
                by = constants["value"].reshape(constants["value"].shape[-shift.ndim :])
                by = by if op.kind == "mul" else 1 / by
                factor, shift = factor * by, shift * by
            case "batch_norm":
                column = (-1, *[1] * (shift.ndim - 1))
                by = (constants["weight"] / np.sqrt(constants["var"] + op.attributes["eps"])).reshape(column)
                shift = (shift - constants["mean"].reshape(column)) * by + constants["bias"].reshape(column)
                factor = factor * by
    if not np.all(np.isfinite(factor)) or not np.all(np.isfinite(shift)) or np.any(factor == 0):
        raise refusal(affine[-1], "scales the input by zero, or by what is not finite", "Mend the constants.")
    if np.any(factor != factor.flat[0]):
        hint = (
            "Use one deviation for all channels, or none: batch norm after the first layer makes it unnecessary. "
            "A float network may keep it: s3nn_deploy.quantise takes it into the weights."
        )
        raise refusal(affine[-1], "scales the channels differently, so that integer weights no longer are", hint)
    return float(factor.flat[0]), shift


def _moved(program: Program, op: Op, source: str, factor: float, shift: np.ndarray) -> list[Op]:
    """The synapses `op` on the unscaled input, and the scaling behind them; the last of these has op's name."""
    weight = program.constant(op, "weight").double().numpy()
    dtype, rows = program_dtype(program), weight.reshape(len(weight), -1)
    column = (-1, *[1] * (len(op.shape) - 1))
    made = [replace(op, name=f"{op.name}_raw", inputs=(source,))]

    def then(kind: str, constants: dict[str, torch.Tensor], **attributes: float) -> None:
        name = f"{op.name}_{kind}"
        made.append(Op(kind, name, (made[-1].name,), op.shape, op.where, constants, attributes))

    then("mul", {"value": torch.tensor(factor, dtype=dtype)})
    if shift.any():
        added = torch.from_numpy(_through(op, rows, weight, shift).reshape(column)).to(dtype)
        then("add", {"value": added})
    largest = abs(factor) * program.input.maximum + float(np.abs(shift).max())
    unit = 2.0**-24 if dtype == torch.float32 else 2.0**-53
    bound = 1.01 * unit * (rows.shape[1] + 8) * float(np.abs(rows).sum(1).max()) * largest
    then("slack", {}, bound=bound)
    made[-1] = replace(made[-1], name=op.name)
    return made


def _through(op: Op, rows: np.ndarray, weight: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """What the synapses make of the shift alone, [out]."""
    if op.kind == "linear":
        return rows @ shift.reshape(-1)
    by_channel = shift.reshape(len(shift), -1)
    if np.any(by_channel != by_channel[:, :1]):
        raise refusal(
            op, "convolves an input that is shifted differently from pixel to pixel", "Shift all pixels alike."
        )
    if op.attributes["padding"] != (0, 0):
        hint = "Drop the mean (batch norm behind the convolution makes it unnecessary), or convolve without padding."
        raise refusal(
            op, "pads with zeros an input whose mean was subtracted: the border is no integer of the input", hint
        )
    per_group = weight.shape[1]
    group = np.arange(len(weight)) // (len(weight) // op.attributes["groups"])
    channels = group[:, None] * per_group + np.arange(per_group)
    return (weight.sum((2, 3)) * by_channel[channels, 0]).sum(1)
