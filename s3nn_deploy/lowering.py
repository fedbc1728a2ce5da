"""From a program's operations to populations whose thresholds are still a chain of float operations."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from s3nn_deploy.intnet import INPUT, Conv2d, Dense, Input, Projection, Synapses, integers
from s3nn_deploy.program import Op, Program, program_dtype, refusal


@dataclass(frozen=True)
class Tap:
    """Where the program holds a population: channels from `first` on of a value; times `unit` they are integers."""

    value: str
    first: int = 0
    unit: int = 1


@dataclass(frozen=True)
class _Part:
    """Some channels of a source: a population (or the input) and its shape."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Source:
    """Spikes (or the input's integers): the channels of one or several populations; flattening is only a matter of shape.

    Attributes:
        shape: as the network sees it, pooled and perhaps flattened.
        pool: a sum over windows that waits for the synapses behind it to take it in; the value is the sum over `divisor`.
    """

    parts: tuple[_Part, ...]
    shape: tuple[int, ...]
    pool: Op | None = None
    divisor: int = 1

    @property
    def flat(self) -> bool:
        return len(self.shape) == 1

    @property
    def name(self) -> str:
        return self.parts[0].name


@dataclass(frozen=True, eq=False)
class _Sum:
    """A sum of projections and an integer offset, and the float operations applied to it since.

    Attributes:
        value: the name of the program's value that holds (u + offset) / unit.
        unit: a power of two.
        where: the module of the first synapses.
    """

    projections: tuple[Projection, ...]
    offset: np.ndarray
    shape: tuple[int, ...]
    value: str
    where: str
    unit: int = 1
    chain: tuple[Op, ...] = ()


@dataclass(frozen=True, eq=False)
class Draft:
    """A population with its integer synapses and offset, before its thresholds are taken.

    Attributes:
        tap: where the program holds its spikes; for the readout, (u + offset) / unit.
        chain: the float operations between (u + offset) / unit and the spike, or the readout's scaling.
        spike: the operation that compares; None for an OR pool, which has its threshold, and for the readout.
    """

    name: str
    shape: tuple[int, ...]
    projections: tuple[Projection, ...]
    offset: np.ndarray
    tap: Tap
    chain: tuple[Op, ...] = ()
    spike: Op | None = None
    pool: bool = False


def lower(program: Program) -> list[Draft]:
    """The populations of `program`, in topological order, the readout last.

    Raises:
        DeployError: an operation where it cannot be placed, with the module's path and what to write instead.
    """
    start = _Part(INPUT, program.input.shape)
    values: dict[str, _Source | _Sum] = {INPUT: _Source((start,), program.input.shape)}
    drafts: list[Draft] = []
    for op in program.ops:
        inputs = [values[name] for name in op.inputs]
        match op.kind:
            case "conv2d" | "linear":
                values[op.name] = _synapses(op, inputs[0], program)
            case "add" | "mul" | "div" | "batch_norm" | "slack":
                values[op.name] = _apply(op, inputs[0], program)
            case "join":
                values[op.name] = _join(op, _as_sum(op, inputs[0]), _as_sum(op, inputs[1]), program)
            case "spike":
                values[op.name] = _fire(op, inputs[0], drafts)
            case "max_pool2d":
                values[op.name] = _or_pool(op, inputs[0], program.input, drafts)
            case "avg_pool2d":
                values[op.name] = _sum_pool(op, inputs[0])
            case "flatten":
                values[op.name] = _flatten(op, inputs[0])
            case "concat":
                values[op.name] = _concat(op, inputs)
    out = values[program.ops[-1].name]
    if isinstance(out, _Source):
        hint = "End with a readout: nn.IntLinear(features, classes, per_channel=False)."
        raise refusal(program.ops[-1], "the network ends in spikes", hint)
    name = _name(out.where, "readout", drafts)
    drafts.append(Draft(name, out.shape, out.projections, out.offset, Tap(out.value, unit=out.unit), out.chain))
    return drafts


def _name(where: str, default: str, drafts: list[Draft]) -> str:
    name = re.sub(r"[^A-Za-z0-9_.\-]", "_", where) or default
    name = f"layer{name}" if not re.match(r"[A-Za-z_]", name) else name
    taken = {draft.name for draft in drafts} | {INPUT, "output"}
    return next(n for n in (name, *(f"{name}_{k}" for k in range(2, len(drafts) + 5))) if n not in taken)


def _synapses(op: Op, source: _Source | _Sum, program: Program) -> _Sum:
    if isinstance(source, _Sum):
        hint = "Put nn.Spike (after batch norm) between the two synapse layers."
        raise refusal(op, "takes membrane potentials, not spikes", hint)
    weight = program.constant(op, "weight").detach().cpu().numpy()
    if not np.all(np.isfinite(weight)) or np.any(weight != np.rint(weight)):
        hint = (
            "Train with nn.IntConv2d and nn.IntLinear, whose forward pass uses integers, or quantise a float network "
            "with s3nn_deploy.quantise(module, calibration_x)."
        )
        raise refusal(op, "has weights that are not integers", hint)
    if source.divisor.bit_count() != 1:
        hint = "Use sum pooling there: F.avg_pool2d(x, k, divisor_override=1), or x.sum((2, 3))."
        raise refusal(op, f"follows an average over {source.divisor} values, which floats do not hold exactly", hint)
    if op.kind == "conv2d" and source.flat:
        raise refusal(op, "convolves flattened spikes", "Keep the shape (C, H, W) for convolutions.")
    whole = integers(weight, op.where).astype(np.int64)
    make = _dense_parts if op.kind == "linear" else _conv_parts
    projections = tuple(Projection(part.name, synapses) for part, synapses in make(op, source, whole))
    return _Sum(projections, np.zeros(op.shape[0], np.int64), op.shape, op.name, op.where, source.divisor)


def _dense_parts(op: Op, source: _Source, weight: np.ndarray) -> Iterator[tuple[_Part, Synapses]]:
    """Columns for each part; each pooled value's weight is repeated over the spikes of its window."""
    start = 0
    for part in source.parts:
        shape = part.shape if source.pool is None else _pool_conv(source.pool, part.shape).out_shape(part.shape)
        columns = weight[:, start : start + math.prod(shape)]
        start += math.prod(shape)
        yield part, Dense(columns if source.pool is None else _spread(source.pool, columns, shape, part.shape))


def _spread(pool: Op, columns: np.ndarray, pooled: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Weights over pooled values, [out, C * H' * W'], as weights over the values that were pooled, [out, C * H * W]."""
    (kh, kw), (sh, sw), (ph, pw) = (pool.attributes[key] for key in ("kernel_size", "stride", "padding"))
    windows = columns.reshape(len(columns), *pooled)
    spread = np.zeros((len(columns), shape[0], shape[1] + 2 * ph, shape[2] + 2 * pw), np.int64)
    for y, x in np.ndindex(*pooled[1:]):
        spread[:, :, y * sh : y * sh + kh, x * sw : x * sw + kw] += windows[:, :, y, x, None, None]
    return spread[:, :, ph : ph + shape[1], pw : pw + shape[2]].reshape(len(columns), -1)


def _conv_parts(op: Op, source: _Source, weight: np.ndarray) -> Iterator[tuple[_Part, Synapses]]:
    """Input channels for each part; pooling before the convolution is taken into its kernel."""
    attributes = dict(op.attributes)
    if len(source.parts) > 1 and attributes["groups"] > 1:
        hint = "Use groups=1 behind torch.cat, or convolve each part on its own."
        raise refusal(op, "has groups over concatenated spikes", hint)
    if source.pool is not None:
        weight, attributes = _pooled_kernel(op, source, weight)
    start = 0
    for part in source.parts:
        end = start + (weight.shape[1] if len(source.parts) == 1 else part.shape[0])
        conv = Conv2d(weight[:, start:end], **attributes)
        if conv.out_shape(part.shape) != op.shape:
            raise refusal(
                op, "pools a size that its window does not divide, before padding", "Choose sizes that divide."
            )
        yield part, conv
        start = end


def _pooled_kernel(op: Op, source: _Source, weight: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """The convolution that a sum over windows and a convolution behind it are."""
    assert source.pool is not None
    pool, conv = source.pool.attributes, op.attributes
    whole = pool["padding"] == (0, 0) and pool["kernel_size"] == pool["stride"]
    if conv["padding"] != (0, 0) and not whole:
        hint = "Pool windows side by side without padding, or convolve without padding."
        raise refusal(op, "pads what overlapping or padded windows were averaged over", hint)
    steps = [s * d for s, d in zip(pool["stride"], conv["dilation"], strict=True)]
    spans = [(n - 1) * step + k for n, step, k in zip(weight.shape[2:], steps, pool["kernel_size"], strict=True)]
    kernel = np.zeros((*weight.shape[:2], *spans), np.int64)
    kh, kw = pool["kernel_size"]
    for y, x in np.ndindex(*weight.shape[2:]):
        kernel[:, :, y * steps[0] : y * steps[0] + kh, x * steps[1] : x * steps[1] + kw] += weight[
            :, :, y, x, None, None
        ]
    return kernel, {
        "stride": tuple(a * b for a, b in zip(conv["stride"], pool["stride"], strict=True)),
        "padding": tuple(a * b + c for a, b, c in zip(conv["padding"], pool["stride"], pool["padding"], strict=True)),
        "dilation": (1, 1),
        "groups": conv["groups"],
    }


def _pool_conv(pool: Op, shape: tuple[int, ...]) -> Conv2d:
    """A pooling operation as depthwise synapses of ones over a source of `shape`."""
    attributes = pool.attributes
    ones = integers(np.ones((shape[0], 1, *attributes["kernel_size"])))
    dilation = attributes.get("dilation", (1, 1))
    return Conv2d(ones, attributes["stride"], attributes["padding"], dilation, groups=shape[0])


def _apply(op: Op, value: _Source | _Sum, program: Program) -> _Source | _Sum:
    if isinstance(value, _Source):
        neutral = {"add": 0.0, "mul": 1.0, "div": 1.0}.get(op.kind)
        if neutral is not None and bool((program.constant(op, "value") == neutral).all()):
            return value
        hint = (
            "Give the module the integers themselves; batch norm after the first layer makes any scaling unnecessary."
            if value.name == INPUT
            else "Put synapses (nn.IntConv2d, nn.IntLinear) behind the spikes first."
        )
        raise refusal(op, "scales or shifts the input" if value.name == INPUT else "scales or shifts spikes", hint)
    if op.kind == "add" and not value.chain:
        constant = per_channel(op, "value", program) * value.unit
        if np.all(constant == np.rint(constant)) and np.all(np.abs(constant) < 2**53):
            return replace(value, offset=value.offset + constant.astype(np.int64), value=op.name)
    return replace(value, chain=(*value.chain, op))


def _as_sum(op: Op, value: _Source | _Sum) -> _Sum:
    """Spikes that are added to a sum are an identity projection."""
    if isinstance(value, _Sum):
        return value
    if value.pool is not None or len(value.parts) > 1 or (value.flat and len(value.parts[0].shape) > 1):
        hint = "Put the parts through nn.Afferents, each with synapses of its own."
        raise refusal(op, "adds pooled, concatenated or flattened spikes to a sum", hint)
    channels = value.shape[0]
    ones = integers(np.ones((channels, 1, 1, 1)))
    identity: Synapses = Dense(integers(np.eye(channels))) if value.flat else Conv2d(ones, groups=channels)
    return _Sum((Projection(value.name, identity),), np.zeros(channels, np.int64), value.shape, op.name, op.where)


def _join(op: Op, a: _Sum, b: _Sum, program: Program) -> _Sum:
    """The sum of two sums; where both were scaled alike, its floats may miss the scaled sum, which a slack accounts for."""
    scaled = bool(a.chain or b.chain)
    if scaled and not _scaled_alike(a, b, program):
        hint = "Write nn.Afferents(branch_a, branch_b)(x_a, x_b): one shared step, batch norm after the sum; or nn.share_step."
        raise refusal(op, "adds branches that were scaled differently, so their sum is no integer", hint)
    unit = max(a.unit, b.unit)
    a, b = (_in_units(value, unit) for value in (a, b))
    joined = replace(a, projections=(*a.projections, *b.projections), offset=a.offset + b.offset)
    if not scaled:
        return replace(joined, value=op.name)
    slack = Op("slack", f"{op.name}_slack", (), op.shape, op.where, {}, {"bound": _join_slack(joined, program)})
    return replace(joined, value="", chain=(*(o for o in a.chain if o.kind != "slack"), slack))


def _scaled_alike(a: _Sum, b: _Sum, program: Program) -> bool:
    """Whether both were multiplied by the same numbers, and only that."""
    chains = [[op for op in value.chain if op.kind != "slack"] for value in (a, b)]
    if len(chains[0]) != len(chains[1]) or any(op.kind not in ("mul", "div") for chain in chains for op in chain):
        return False
    constants = [[(op.kind, per_channel(op, "value", program).tolist()) for op in chain] for chain in chains]
    return constants[0] == constants[1]


def _join_slack(joined: _Sum, program: Program) -> float:
    """How far floats may miss a sum of separately scaled sums: a rounding for each term and each addition so far."""
    scale = float(np.abs(scale_of(joined.chain, joined.shape[0], program)).max()) / joined.unit
    worst = sum(
        np.abs(p.synapses.weight.astype(np.float64)).reshape(joined.shape[0], -1).sum(1).max()
        * (program.input.maximum if p.source == INPUT else 1)
        for p in joined.projections
    ) + np.abs(joined.offset).max(initial=0)
    roundings = 2 * len(joined.projections) + 2 * len(joined.chain) + 2
    return 1.01 * roundings * float(unit_roundoff(program)) * scale * float(worst)


def _in_units(value: _Sum, unit: int) -> _Sum:
    if value.unit == unit:
        return value
    factor = unit // value.unit
    scaled = tuple(
        replace(p, synapses=replace(p.synapses, weight=p.synapses.weight.astype(np.int64) * factor))
        for p in value.projections
    )
    return replace(value, projections=scaled, offset=value.offset * factor, unit=unit)


def _fire(op: Op, source: _Source | _Sum, drafts: list[Draft]) -> _Source:
    if isinstance(source, _Source):
        hint = "Remove one of the two, or put synapses between them."
        raise refusal(op, "fires on values that are spikes already", hint)
    name = _name(source.where, "layer", drafts)
    tap = Tap(op.name, unit=source.unit)
    drafts.append(Draft(name, source.shape, source.projections, source.offset, tap, source.chain, op))
    return _Source((_Part(name, source.shape),), source.shape)


def _or_pool(op: Op, source: _Source | _Sum, spec: Input, drafts: list[Draft]) -> _Source:
    pixels = isinstance(source, _Source) and source.name == INPUT and spec.bits > 1
    if isinstance(source, _Sum) or pixels or source.flat or source.pool is not None:
        hint = "Put max pooling behind nn.Spike: there it is a logical OR, a population of its own."
        raise refusal(op, "pools values that are not spikes", hint)
    parts: list[_Part] = []
    for part in source.parts:
        pool = _pool_conv(op, part.shape)
        name, shape = _name(op.where, "pool", drafts), pool.out_shape(part.shape)
        tap = Tap(op.name, first=sum(p.shape[0] for p in parts))
        drafts.append(Draft(name, shape, (Projection(part.name, pool),), np.zeros(shape[0], np.int64), tap, pool=True))
        parts.append(_Part(name, shape))
    return _Source(tuple(parts), op.shape)


def _sum_pool(op: Op, source: _Source | _Sum) -> _Source:
    if isinstance(source, _Sum) or source.flat:
        raise refusal(
            op, "averages values that are not spikes", "Put average pooling behind nn.Spike, before synapses."
        )
    if source.pool is not None:
        raise refusal(op, "averages averages", "Write one pooling with the larger window.")
    return replace(source, shape=op.shape, pool=op, divisor=op.attributes["divisor"])


def _flatten(op: Op, value: _Source | _Sum) -> _Source | _Sum:
    if isinstance(value, _Source):
        return replace(value, shape=op.shape)
    if math.prod(value.shape) == value.shape[0]:
        return value
    raise refusal(op, "flattens membrane potentials", "Flatten the spikes instead, behind nn.Spike.")


def _concat(op: Op, values: list[_Source | _Sum]) -> _Source:
    sources = [value for value in values if isinstance(value, _Source)]
    if len(sources) < len(values) or any(s.pool is not None for s in sources):
        raise refusal(op, "joins values that are not spikes", "Concatenate spikes, and pool behind torch.cat.")
    return _Source(tuple(part for source in sources for part in source.parts), op.shape)


def unit_roundoff(program: Program) -> Fraction:
    """The unit roundoff of the program's floats."""
    return Fraction(1, 1 << 24 if program_dtype(program) == torch.float32 else 1 << 53)


def per_channel(op: Op, key: str, program: Program) -> np.ndarray:
    """A constant of an operation as float64 [channels].

    Raises:
        DeployError: it is not finite, or differs between neurons of one channel.
    """
    constant = program.constant(op, key).detach().cpu().double()
    if not bool(torch.isfinite(constant).all()):
        raise refusal(op, f"has a {key} that is NaN or infinite", "Retrain, or mend the parameter.")
    if op.kind == "batch_norm":
        return constant.numpy()
    full = torch.broadcast_to(constant, (1, *op.shape))[0].reshape(op.shape[0], -1)
    if not bool((full == full[:, :1]).all()):
        raise refusal(
            op, f"has a {key} that differs within a channel", "Use one value per channel, of shape [C, 1, 1]."
        )
    return full[:, 0].numpy()


def factors(op: Op, program: Program) -> list[Fraction]:
    """What a multiplication or division multiplies by, exactly."""
    values = [Fraction(v) for v in per_channel(op, "value", program)]
    if op.kind == "div" and 0 in values:
        raise refusal(op, "divides by zero", "Mend the constant.")
    return [1 / v for v in values] if op.kind == "div" else values


def scale_of(chain: tuple[Op, ...], channels: int, program: Program) -> np.ndarray:
    """The product of a chain's multiplications and divisions, float64 [channels]."""
    scale = np.ones(channels)
    for op in chain:
        if op.kind in ("mul", "div"):
            scale = scale * np.array([float(f) for f in factors(op, program)])
    return scale
