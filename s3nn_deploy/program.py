"""A network as a list of torch operations with their constants: run by torch, saved as plain data.

A program is what PyTorch computes in eval mode, no more: each operation is one call of torch on values named by strings.
It is an `nn.Module` itself, so it can be captured again, and it needs none of the code of the module it came from.
"""

import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from s3nn_deploy.errors import DeployError
from s3nn_deploy.intnet import INPUT, Input

MAX_NEURONS = 1 << 28
"""The most values of one sample that an operation in a file may make."""

BATCH = 3
"""The number of samples of the stand-in that is sent through a module while it is captured; only shapes flow."""


@dataclass(frozen=True, eq=False)
class Op:
    """One torch call.

    Attributes:
        kind: a name in `KINDS`.
        name: of the value that it makes.
        inputs: names of the values that it takes.
        constants: its tensors.
        attributes: its other arguments, plain data.
        where: the path of the module that made the call, for messages and names.
        shape: of its value, without the batch axis.
    """

    kind: str
    name: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    where: str
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)


def refusal(op: Op, problem: str, hint: str) -> DeployError:
    """The error of an operation that cannot be placed, with the path of the module that called it."""
    return DeployError(f"module {op.where or '(top)'!r}, {op.kind}", problem, hint=hint)


KINDS: dict[str, Callable[..., Tensor]] = {
    "conv2d": lambda x, weight, stride, padding, dilation, groups: F.conv2d(
        x, weight, None, stride, padding, dilation, groups
    ),
    "linear": lambda x, weight: F.linear(x, weight),
    "add": lambda x, value: x + value,
    "mul": lambda x, value: x * value,
    "div": lambda x, value: x / value,
    "batch_norm": lambda x, mean, var, weight, bias, eps: F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps),
    "slack": lambda x, bound: x,
    "spike": lambda x, threshold, strict: (x > threshold if strict else x >= threshold).to(x.dtype),
    "max_pool2d": lambda x, kernel_size, stride, padding, dilation: F.max_pool2d(
        x, kernel_size, stride, padding, dilation
    ),
    "avg_pool2d": lambda x, kernel_size, stride, padding, divisor: F.avg_pool2d(
        x, kernel_size, stride, padding, divisor_override=divisor
    ),
    "flatten": lambda x: x.flatten(1),
    "join": lambda a, b: a + b,
    "concat": lambda *parts: torch.cat(parts, 1),
}
"""What each kind of operation does, with its inputs first and its constants and attributes by name. A slack does nothing:
it states by how much floats before it may have missed, where a program replaces a module's roundings by others."""


class Program(torch.nn.Module):
    """Operations in the order of execution; `forward` runs them on a float tensor [N, *input shape] and returns the last value."""

    def __init__(self, input: Input, ops: list[Op]) -> None:
        super().__init__()
        self.input, self.ops = input, tuple(ops)
        for op in self.ops:
            for key, constant in op.constants.items():
                self.register_buffer(_buffer(op.name, key), constant.detach().clone())
        self.eval()

    def constant(self, op: Op, key: str) -> Tensor:
        return self.get_buffer(_buffer(op.name, key))

    def forward(self, x: Tensor, keep: dict[str, Tensor] | None = None) -> Tensor:
        """Run on `x`; with a dictionary `keep`, the values whose names are its keys are put into it."""
        values = {INPUT: x}
        last = {name: index for index, op in enumerate(self.ops) for name in op.inputs}
        for index, op in enumerate(self.ops):
            constants = {key: self.constant(op, key) for key in op.constants}
            value = KINDS[op.kind](*(values[name] for name in op.inputs), **constants, **op.attributes)
            values[op.name] = value
            if keep is not None and op.name in keep:
                keep[op.name] = value
            for name in op.inputs:
                if last[name] == index:
                    values.pop(name, None)
        return values[self.ops[-1].name]


def program_dtype(program: Program) -> torch.dtype:
    """The floating-point type that the program computes in."""
    return next((b.dtype for b in program.buffers()), torch.float32)


def _buffer(name: str, key: str) -> str:
    return f"{name.replace('.', '_')}__{key}"


SCHEMA = "s3nn-deploy-model/1"


def to_plain(program: Program) -> dict[str, Any]:
    """`program` as plain data and tensors, from which `from_plain` makes it again."""
    ops = [
        {
            "kind": op.kind,
            "name": op.name,
            "inputs": list(op.inputs),
            "shape": list(op.shape),
            "where": op.where,
            "constants": {key: _narrowed(program.constant(op, key)) for key in op.constants},
            "attributes": dict(op.attributes),
        }
        for op in program.ops
    ]
    return {"schema": SCHEMA, "input": {"shape": list(program.input.shape), "bits": program.input.bits}, "ops": ops}


def _narrowed(constant: Tensor) -> Tensor:
    """As int8 what float32 holds of integers from -127 to 127: a quarter of the bytes."""
    fits = constant.dtype == torch.float32 and bool(((constant.round() == constant) & (constant.abs() < 128)).all())
    return constant.to(torch.int8) if fits else constant


def from_plain(plain: Mapping[str, Any]) -> Program:
    """The program that `to_plain` took apart.

    Raises:
        DeployError: something is missing or malformed.
    """
    try:
        spec = Input(tuple(int(n) for n in plain["input"]["shape"]), int(plain["input"]["bits"]))
        ops = [_op_from_plain(op) for op in plain["ops"]]
        known = {INPUT}
        for op in ops:
            if not known.issuperset(op.inputs) or op.name in known:
                raise ValueError(f"operation {op.name!r} takes {op.inputs}")
            known.add(op.name)
        if not ops:
            raise ValueError("it has no operations")
        _check_shapes(spec, ops)
        return Program(spec, ops)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
        raise DeployError(
            "model", f"its description is incomplete or malformed ({type(error).__name__}: {error})"
        ) from error


def _check_shapes(spec: Input, ops: list[Op]) -> None:
    """Follow the shapes through the operations, without memory for their values."""
    shapes = {INPUT: spec.shape}
    for op in ops:
        metas = [torch.empty((BATCH, *shapes[name]), device="meta") for name in op.inputs]
        constants = {key: torch.empty(t.shape, device="meta") for key, t in op.constants.items()}
        shape = tuple(KINDS[op.kind](*metas, **constants, **op.attributes).shape)
        if shape != (BATCH, *op.shape) or math.prod(op.shape) > MAX_NEURONS:
            raise ValueError(f"operation {op.name!r} makes shape {shape[1:]}, and says {op.shape}")
        shapes[op.name] = op.shape


def _op_from_plain(plain: Mapping[str, Any]) -> Op:
    kind, name = str(plain["kind"]), str(plain["name"])
    if kind not in KINDS or not re.fullmatch(r"[a-z0-9_]+", name):
        raise ValueError(f"unknown operation {kind!r} ({name!r})")
    constants = {str(k): t for k, t in plain["constants"].items()}
    if not all(
        isinstance(t, Tensor) and t.dtype in (torch.float32, torch.float64, torch.int8) for t in constants.values()
    ):
        raise ValueError(f"operation {name!r} has constants that are not tensors of floats or of 8-bit integers")
    constants = {key: t.to(torch.float32) if t.dtype == torch.int8 else t for key, t in constants.items()}
    attributes = {str(k): tuple(v) if isinstance(v, list | tuple) else v for k, v in plain["attributes"].items()}
    inputs, shape = tuple(str(i) for i in plain["inputs"]), tuple(int(n) for n in plain["shape"])
    arity = {"join": 2, "concat": len(inputs)}.get(kind, 1)
    expected = set(inspect.signature(KINDS[kind]).parameters) - {"x", "a", "b", "parts"}
    if len(inputs) != arity or not inputs or expected != {*constants, *attributes}:
        raise ValueError(
            f"operation {name!r} ({kind}) has inputs {inputs}, constants and attributes {sorted({*constants, *attributes})}"
        )
    return Op(kind, name, inputs, shape, str(plain["where"]), constants, attributes)
