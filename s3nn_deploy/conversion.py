"""From a torch module to the integer network: capture, lower, harden, take the exact thresholds, check."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from s3nn_deploy import __version__
from s3nn_deploy.capture import capture
from s3nn_deploy.errors import DeployError
from s3nn_deploy.intnet import (
    EXACT_FLOAT32,
    IntNet,
    Population,
    Synapses,
    check,
    integers,
    reach,
    worst_case,
)
from s3nn_deploy.lowering import Draft, Tap, factors, lower, per_channel, scale_of, unit_roundoff
from s3nn_deploy.normalisation import absorb_input_scaling
from s3nn_deploy.program import Op, Program, program_dtype, refusal
from s3nn_deploy.thresholds import (
    OVERFLOW,
    TINY,
    Add,
    BatchNorm,
    Decision,
    Mul,
    Slack,
    Step,
    decide,
    evaluate,
    half_way,
    square_root,
)


@dataclass(frozen=True, eq=False)
class Conversion:
    """An integer network, and the program that computes the same in PyTorch.

    Attributes:
        net: the integer network.
        program: the hardened program.
        taps: for each population where the program holds its spikes, or the readout's integers.
        ambiguous: for each population the channels that had to be hardened because floats could not be relied on there.
    """

    net: IntNet
    program: Program
    taps: Mapping[str, Tap]
    ambiguous: Mapping[str, tuple[int, ...]]


def convert(
    module: torch.nn.Module, input_shape: tuple[int, ...], input_bits: int = 8, *, harden: bool = True
) -> IntNet:
    """The integer network that `module`, in eval mode, is; `provenance["hardened"]` names the channels that had to be.

    Args:
        module: any `nn.Module` of integer synapse layers, batch norm, spikes, pooling of spikes, flatten and sums.
        input_shape: (C, H, W) or (N,) of one sample.
        input_bits: the input holds integers 0 .. 2^bits - 1, which the module takes as they are, as floats.
        harden: move switching points half-way between integers in a copy; without it an ambiguous channel is refused.

    Raises:
        DeployError: an operation that cannot be placed, weights that are not integers, sums that float32 cannot hold
            exactly, or a channel whose decision floats cannot be relied on; each with the module's path.
    """
    return conversion(capture(module, input_shape, input_bits), harden=harden).net


def conversion(program: Program, *, harden: bool = True) -> Conversion:
    """See `convert`; with the hardened program and where to find each population in it."""
    program = absorb_input_scaling(program)
    drafts = lower(program)
    decisions = _decide(program, drafts)
    ambiguous = _ambiguous(decisions)
    if harden:
        program = _without_slack(_harden(program, drafts, decisions))
        drafts = lower(program)
        decisions = _decide(program, drafts)
        if flat := _ambiguous(decisions):
            program = _renormalise(program, drafts, decisions, flat)
            drafts = lower(program)
            decisions = _decide(program, drafts)
    if left := ambiguous if not harden else _ambiguous(decisions):
        name, channels = next(iter(left.items()))
        if harden:
            problem = "cannot be hardened: no parameter behind the sum can be moved to where floats decide them alike"
            hint = "Put batch norm between the synapses and the spike, or use a float64 module."
        else:
            problem = "switch within float rounding of an integer"
            hint = "Convert with harden=True: a copy gets switching points half-way between integers."
        raise DeployError(f"population {name!r}", f"channels {_some(channels)} {problem}", hint=hint)
    populations = tuple(_population(draft, program, decisions.get(draft.name)) for draft in drafts)
    provenance: dict[str, Any] = {"tool": f"s3nn-deploy {__version__}"}
    if ambiguous:
        provenance["hardened"] = {name: list(channels) for name, channels in ambiguous.items()}
    net = check(IntNet(program.input, populations, provenance=provenance))
    return Conversion(net, program, {draft.name: draft.tap for draft in drafts}, ambiguous)


def _some(channels: tuple[int, ...] | list[int]) -> str:
    return ", ".join(map(str, channels[:8])) + (f" and {len(channels) - 8} more" if len(channels) > 8 else "")


def _steps(draft: Draft, program: Program) -> list[tuple[Step, ...]]:
    """For each channel the chain from the integer u + offset to the compare."""
    columns: list[list[Step]] = [[Mul(Fraction(1, draft.tap.unit))] * draft.shape[0]] if draft.tap.unit > 1 else []
    for op in draft.chain:
        match op.kind:
            case "slack":
                columns.append([Slack(Fraction(op.attributes["bound"]))] * draft.shape[0])
            case "batch_norm":
                columns.append(list(_norms(op, program)))
            case "add":
                columns.append([Add(Fraction(v)) for v in per_channel(op, "value", program)])
            case "mul" | "div":
                columns.append([Mul(v) for v in factors(op, program)])
    return [tuple(column[c] for column in columns) for c in range(draft.shape[0])]


def float_chains(program: Program) -> tuple[list[Draft], list[list[tuple[Step, ...]]], Fraction]:
    """The populations of a converted program, for each channel the chain from u + offset on, and the unit roundoff."""
    drafts = lower(program)
    return drafts, [_steps(draft, program) for draft in drafts], unit_roundoff(program)


def _norms(op: Op, program: Program) -> Iterator[BatchNorm]:
    eps = Fraction(op.attributes["eps"])
    for mean, var, gamma, beta in zip(
        *(per_channel(op, k, program) for k in ("mean", "var", "weight", "bias")), strict=True
    ):
        if Fraction(var) + eps <= TINY:
            raise refusal(op, "has a variance plus eps that is not positive", "Retrain, or mend the running variance.")
        yield BatchNorm(Fraction(mean), square_root(Fraction(var) + eps), Fraction(gamma), Fraction(beta))


def _skeleton(program: Program, drafts: list[Draft]) -> IntNet:
    """The drafts as a network with offsets in place of thresholds, for the bounds of their sums."""
    return IntNet(program.input, tuple(Population(d.name, d.shape, d.projections, bias=d.offset) for d in drafts))


def _decide(program: Program, drafts: list[Draft]) -> dict[str, list[Decision]]:
    """The decisions of every channel whose spikes come from a float chain; sums are proved exact on the way."""
    skeleton, unit = _skeleton(program, drafts), unit_roundoff(program)
    limit = EXACT_FLOAT32 if program_dtype(program) == torch.float32 else 1 << 53
    decisions = {}
    for draft, population in zip(drafts, skeleton.populations, strict=True):
        if (worst := worst_case(skeleton, population)) >= limit:
            raise DeployError(
                f"population {draft.name!r}",
                expected=f"membrane potentials below {limit:,}, where {program_dtype(program)} sums are exact",
                got=f"up to {worst:,}",
                hint="Use fewer input channels, fewer weight bits or fewer input bits, or a float64 module.",
            )
        if draft.spike is not None:
            low, high = (edge + draft.offset for edge in reach(skeleton, population))
            threshold, strict = Fraction(draft.spike.attributes["threshold"]), bool(draft.spike.attributes["strict"])
            decisions[draft.name] = [
                decide(steps, threshold, int(lo), int(hi), unit, strict)
                for steps, lo, hi in zip(_steps(draft, program), low, high, strict=True)
            ]
    return decisions


def _ambiguous(decisions: Mapping[str, list[Decision]]) -> dict[str, tuple[int, ...]]:
    found = {name: tuple(c for c, d in enumerate(ds) if d.ambiguous) for name, ds in decisions.items()}
    return {name: channels for name, channels in found.items() if channels}


def _harden(program: Program, drafts: list[Draft], decisions: Mapping[str, list[Decision]]) -> Program:
    """A copy of `program` whose switching points lie half-way between integers.

    The additive constant of the last operation before the spike is moved (a batch norm's bias, or an addition; where
    that is none, or another operation reads its result too, an addition is put in).
    """
    ops = list(program.ops)
    constants = {(op.name, key): program.constant(op, key).clone() for op in program.ops for key in op.constants}
    readers = [name for op in program.ops for name in op.inputs]
    for draft in drafts:
        if draft.spike is None:
            continue
        threshold, unit = Fraction(draft.spike.attributes["threshold"]), unit_roundoff(program)
        shift = np.zeros(draft.shape[0])
        for c, (steps, decision) in enumerate(zip(_steps(draft, program), decisions[draft.name], strict=True)):
            if (middle := half_way(decision)) is not None:
                shift[c] = _float(threshold - evaluate(steps, middle, unit)[0])
        if not shift.any():
            continue
        last = draft.chain[-1] if draft.chain else None
        column = (-1, *[1] * (len(draft.shape) - 1))
        if last is not None and last.kind in ("batch_norm", "add") and readers.count(last.name) == 1:
            key = "bias" if last.kind == "batch_norm" else "value"
            moved = torch.from_numpy(per_channel(last, key, program) + shift).to(program_dtype(program))
            constants[last.name, key] = moved if last.kind == "batch_norm" else moved.reshape(column)
        else:
            at = ops.index(draft.spike)
            margin = Op("add", f"{draft.spike.name}_margin", draft.spike.inputs, draft.shape, draft.spike.where)
            delta = torch.from_numpy(shift).to(program_dtype(program)).reshape(column)
            ops[at : at + 1] = [
                replace(margin, constants={"value": delta}),
                replace(draft.spike, inputs=(margin.name,)),
            ]
            constants[margin.name, "value"] = delta
    return _with_constants(program, ops, constants)


def _renormalise(
    program: Program,
    drafts: list[Draft],
    decisions: Mapping[str, list[Decision]],
    channels: Mapping[str, tuple[int, ...]],
) -> Program:
    """A copy of `program` in which the batch norms of some channels, too flat, steep or far off for floats, are replaced.

    Such a channel's last batch norm subtracts what it is given half-way between theta - 1 and theta, and rises or falls
    by one for each unit of u from the spike's threshold on: the same integer decision.
    """
    constants = {(op.name, key): program.constant(op, key).clone() for op in program.ops for key in op.constants}
    for draft in drafts:
        last = draft.chain[-1] if draft.chain else None
        if draft.spike is None or last is None or last.kind != "batch_norm":
            continue
        steps = _steps(draft, program)
        for c in channels.get(draft.name, ()):
            decision, norm = decisions[draft.name][c], steps[c][-1]
            middle = decision.sign * (decision.theta - Fraction(1, 2))
            before, after = (evaluate(steps[c][:-1], middle + d, unit_roundoff(program))[0] for d in (0, 1))
            if isinstance(norm, BatchNorm) and after != before:
                constants[last.name, "mean"][c] = _float(before)
                constants[last.name, "weight"][c] = _float(decision.sign * norm.sigma / (after - before))
                constants[last.name, "bias"][c] = float(draft.spike.attributes["threshold"])
    return _with_constants(program, list(program.ops), constants)


def _without_slack(program: Program) -> Program:
    """`program` without the slacks of another module's roundings: from here on it is the program that PyTorch runs."""
    passed = {op.name: op.inputs[0] for op in program.ops if op.kind == "slack"}
    ops = [replace(op, inputs=tuple(passed.get(i, i) for i in op.inputs)) for op in program.ops if op.kind != "slack"]
    return _with_constants(
        program, ops, {(op.name, key): program.constant(op, key) for op in ops for key in op.constants}
    )


def _float(x: Fraction) -> float:
    """x as a float, infinite where it is too large: what holds it is then refused as not finite."""
    return float(x) if abs(x) < OVERFLOW else math.copysign(math.inf, x)


def _with_constants(program: Program, ops: list[Op], constants: Mapping[tuple[str, str], torch.Tensor]) -> Program:
    return Program(
        program.input, [replace(op, constants={key: constants[op.name, key] for key in op.constants}) for op in ops]
    )


def _population(draft: Draft, program: Program, decisions: list[Decision] | None) -> Population:
    if draft.pool:
        return Population(draft.name, draft.shape, draft.projections, threshold=integers(np.ones(draft.shape[0])))
    if decisions is None:
        return Population(
            draft.name, draft.shape, draft.projections, bias=draft.offset, scale=_readout_scale(draft, program)
        )
    sign = np.array([d.sign for d in decisions])
    # fires where sign * (u + offset) >= theta: with the weights times sign, where u' >= theta - sign * offset
    theta = np.array([d.theta for d in decisions], dtype=np.int64) - sign * draft.offset
    projections = tuple(replace(p, synapses=_negated(p.synapses, sign)) for p in draft.projections)
    return Population(draft.name, draft.shape, projections, threshold=theta)


def _negated(synapses: Synapses, sign: np.ndarray) -> Synapses:
    weight = synapses.weight.astype(np.int64)
    return replace(synapses, weight=weight * sign.reshape(-1, *[1] * (weight.ndim - 1)))


def _readout_scale(draft: Draft, program: Program) -> np.ndarray:
    """The positive factor per channel between the readout's integers and the module's output."""
    for op in draft.chain:
        if op.kind not in ("mul", "div"):
            problem = "follows the readout's sum with something other than a positive scale"
            if op.kind == "slack":
                problem = "makes the readout a sum of separately scaled branches, which floats round"
            hint = "End with nn.IntLinear(features, classes, per_channel=False); its bias is an integer too."
            raise refusal(op, problem, hint)
    scale = scale_of(draft.chain, draft.shape[0], program) / draft.tap.unit
    if not np.all(scale > 0):
        hint = "Negate the weights of that class instead."
        raise refusal(draft.chain[-1], "scales the readout by a number that is not positive", hint)
    return scale
