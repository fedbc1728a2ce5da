"""Post-training quantisation: a float-trained network with its weights on fixed integer steps, chosen with a calibration set.

The network's structure is read from its captured program, so its code may be any: sums of branches share their steps, the
readout has a single one, and a batch norm that rescales one branch of a sum is first folded into that branch's weights, as is
a scaling of the input that differs between its channels.
"""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from s3nn_deploy.capture import capture
from s3nn_deploy.errors import DeployError, suggestion
from s3nn_deploy.intnet import INPUT
from s3nn_deploy.nn import Afferents, IntConv2d, IntLinear
from s3nn_deploy.program import KINDS, Op, Program, program_dtype

CANDIDATES = 100
"""How many steps the MSE search tries: equally spaced, up to the one at which nothing is clipped."""


@dataclass(frozen=True)
class LayerReport:
    """What quantising one layer costs.

    Attributes:
        sqnr_db: 10 log10 of the weights' energy over that of their rounding error; None where that is zero.
        changed: how many predictions of the calibration set change when only this layer is quantised.
        lost: how many fewer of them are right then (None without labels).
    """

    path: str
    bits: int
    sqnr_db: float | None
    changed: int
    lost: int | None


@dataclass(frozen=True)
class Report:
    """What quantising a network costs, counted on the calibration set.

    Attributes:
        changed: predictions that change when all layers are quantised.
        right_before, right_after: right ones of the float and of the integer network (None without labels).
    """

    samples: int
    changed: int
    right_before: int | None
    right_after: int | None
    layers: tuple[LayerReport, ...]

    @property
    def costliest(self) -> LayerReport:
        """The layer that costs most: by predictions lost, then changed, then by its rounding error."""
        return max(self.layers, key=lambda r: (r.lost or 0, r.changed, -(r.sqnr_db or 0.0)))

    def plain(self) -> dict[str, Any]:
        return {**asdict(self), "costliest": self.costliest.path}

    def lines(self) -> Iterator[str]:
        """The report as text, a line for the whole and one for each layer."""
        if self.right_before is not None and self.right_after is not None:
            yield (
                f"accuracy {self.right_before / self.samples:.2%} -> {self.right_after / self.samples:.2%}, "
                f"{self.changed} of {self.samples} predictions change"
            )
        else:
            yield f"{self.changed} of {self.samples} predictions change"
        for layer in self.layers:
            noise = "exact" if layer.sqnr_db is None else f"SQNR {layer.sqnr_db:.1f} dB"
            lost = "" if layer.lost is None else f", {layer.lost} fewer right"
            mark = "  <- costs most" if layer is self.costliest else ""
            yield f"{layer.path}: {layer.bits} bits, {noise}, alone {layer.changed} change{lost}{mark}"


def quantise(
    module: torch.nn.Module, calibration_x: Any, bits: int | Mapping[str, int] = 8, steps: str = "mse"
) -> torch.nn.Module:
    """A copy of `module`, in eval mode, whose every `torch.nn.Conv2d` and `torch.nn.Linear` is an integer layer of fixed steps.

    Steps are per channel, shared by the branches of a sum (`a(x) + b(y)` or `nn.Afferents`), and one for all outputs of the
    readout, whose bias is an integer. Biases and batch-norm statistics are corrected by what the calibration set shows
    between the float and the integer network.

    Args:
        module: synapses, batch norm, `nn.Spike`, pooling of spikes, flatten and sums; trained in floats. It is not changed.
        calibration_x: integers 0 .. 255 [N, *input shape] as the network will get them; they run as one batch, and some
            hundreds suffice. A scaling of the input (x / 255) belongs into the module, one per channel into a submodule.
        bits: 2 to 8, or widths by module path (others get 8).
        steps: "mse" (the least squared error of the weights, over `CANDIDATES` steps) or "max" (nothing is clipped).

    Raises:
        DeployError: an operation that is none of a spiking network, an unknown path or word, weights that are used by torch
            functions outside of `torch.nn.Conv2d` and `torch.nn.Linear`, or a calibration set that is not integers.
    """
    x = _calibration(module, calibration_x)
    plan = _plan(module, x, bits, steps)
    return _with_integers(plan, x, set(plan.steps))


def quantisation_report(
    module: torch.nn.Module,
    calibration_x: Any,
    labels: Any = None,
    bits: int | Mapping[str, int] = 8,
    steps: str = "mse",
) -> Report:
    """What `quantise` with the same arguments costs, in all and for each layer alone. Raises as `quantise` does."""
    x = _calibration(module, calibration_x)
    plan = _plan(module, x, bits, steps)
    y = None if labels is None else torch.as_tensor(labels, device=x.device)
    if y is not None and y.shape != (len(x),):
        raise DeployError("labels", expected=f"shape [{len(x)}]", got=str(list(y.shape)))
    before = _predictions(plan.floating, x)

    def cost(paths: set[str]) -> tuple[int, int | None]:
        after = _predictions(_with_integers(plan, x, paths), x)
        return int((after != before).sum()), None if y is None else int((after == y).sum())

    right = None if y is None else int((before == y).sum())
    layers = []
    for path in plan.steps:
        changed, still = cost({path})
        lost = None if right is None or still is None else right - still
        layers.append(LayerReport(path, plan.bits[path], _sqnr(plan, path), changed, lost))
    changed, right_after = cost(set(plan.steps))
    return Report(len(x), changed, right, right_after, tuple(layers))


@dataclass(frozen=True, eq=False)
class _Plan:
    """A float network that only needs its layers replaced.

    Attributes:
        floating: a copy of the module, batch norms of branches folded.
        weights: by layer path, as the network uses them.
        steps: by layer path; [out], or [1] for the readout.
        moments: by path, the mean and variance per channel of a layer's output or of a batch norm's input, in floats; not of
            modules that run several times.
    """

    floating: torch.nn.Module
    bits: Mapping[str, int]
    weights: Mapping[str, Tensor]
    steps: Mapping[str, Tensor]
    moments: Mapping[str, tuple[Tensor, Tensor]]


def _calibration(module: torch.nn.Module, x: Any) -> Tensor:
    like = next((t for t in [*module.parameters(), *module.buffers()] if t.is_floating_point()), torch.empty(0))
    x = torch.as_tensor(x).detach().to(like.device, like.dtype)
    if x.ndim < 2 or not len(x) or not bool(((x >= 0) & (x <= 255) & (x == x.round())).all()):
        raise DeployError(
            "calibration_x",
            expected="integers 0 .. 255 of shape [N, *input shape], N > 0",
            got=f"{list(x.shape)}" + (f", {float(x.min()):g} to {float(x.max()):g}" if x.numel() else ""),
            hint="Give pixels as the deployed network will get them; scale them inside the module, if at all.",
        )
    return x


def _plan(module: torch.nn.Module, x: Tensor, bits: int | Mapping[str, int], steps: str) -> _Plan:
    if steps not in ("max", "mse"):
        raise DeployError(f"steps {steps!r}", "is not known", hint=suggestion(steps, ["max", "mse"]))
    floating = copy.deepcopy(module).eval()
    program = capture(floating, tuple(x.shape[1:]))
    for fold in (_fold_input_scaling, _fold_branches):
        if fold(floating, program):
            program = capture(floating, tuple(x.shape[1:]))
    weights = {op.where: program.constant(op, "weight").to(x.device) for op in program.ops if _is_float(floating, op)}
    if not weights:
        raise DeployError("module", "has no torch.nn.Conv2d or torch.nn.Linear to quantise")
    widths = _widths(bits, list(weights))
    chosen: dict[str, Tensor] = {}
    for group, readout in _groups(program):
        members = [path for path in group if path in weights]
        rows = [weights[path].reshape(1 if readout else len(weights[path]), -1) for path in members]
        if members:
            step = _best_step(rows, [(1 << (widths[path] - 1)) - 1 for path in members], steps)
            chosen.update(dict.fromkeys(members, step))
    moments: dict[str, list[tuple[Tensor, Tensor]]] = {}
    with (
        _observing(floating, lambda path, value: moments.setdefault(path, []).append(_moments(value))),
        torch.no_grad(),
    ):
        floating(x)
    once = {path: found[0] for path, found in moments.items() if len(found) == 1}
    return _Plan(floating, widths, weights, {path: chosen[path] for path in weights}, once)


def _widths(bits: int | Mapping[str, int], paths: list[str]) -> dict[str, int]:
    given = {**dict.fromkeys(paths, 8), **bits} if isinstance(bits, Mapping) else dict.fromkeys(paths, bits)
    for path, width in given.items():
        if path not in paths:
            raise DeployError(f"bits of {path!r}", "there is no such layer", hint=suggestion(path, paths))
        if not 2 <= width <= 8:
            hint = "One bit needs training: nn.IntConv2d(..., bits=1)." if width == 1 else ""
            raise DeployError(f"bits of {path!r}", expected="2 to 8", got=str(width), hint=hint)
    return given


# The structure, from the captured program.

_SYNAPSES = ("conv2d", "linear")
_PASSING = ("add", "mul", "div", "batch_norm", "flatten")


def _is_float(module: torch.nn.Module, op: Op) -> bool:
    """Whether an operation is the synapses of a float layer, which `quantise` replaces."""
    if op.kind not in _SYNAPSES:
        return False
    layer = _at(module, op.where)
    if not isinstance(layer, torch.nn.Conv2d | torch.nn.Linear | IntConv2d | IntLinear | Afferents):
        raise DeployError(
            f"module {op.where or '(top)'!r}, {op.kind}",
            "uses weights that belong to no torch.nn.Conv2d or torch.nn.Linear",
            hint="Call such a layer instead of torch.nn.functional.",
        )
    return isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)


def _at(module: torch.nn.Module, path: str) -> torch.nn.Module | None:
    return dict(module.named_modules()).get(path)


def _groups(program: Program) -> Iterator[tuple[list[str], bool]]:
    """The layers that must share their steps since they are summed, in order; and whether their sum is the output."""
    group: dict[str, set[str]] = {}
    value: dict[str, set[str]] = {}
    for op in program.ops:
        if op.kind in _SYNAPSES:
            value[op.name] = group.setdefault(op.where, {op.where})
        elif op.kind == "join" or op.kind in _PASSING:
            joined = set().union(*(value.get(name, set()) for name in op.inputs))
            joined = set().union(joined, *(group[path] for path in joined))
            group.update(dict.fromkeys(joined, joined))
            value[op.name] = joined
    last = value.get(program.ops[-1].name, set())
    seen: set[str] = set()
    for path in group:
        if path not in seen:
            seen |= group[path]
            yield [p for p in group if p in group[path]], bool(last & group[path])


def _fold_branches(module: torch.nn.Module, program: Program) -> bool:
    """Fold each batch norm that reaches a sum or the output, instead of a spike, into the one layer before it."""
    ops = {op.name: op for op in program.ops}
    uses = Counter(op.where for op in program.ops if op.kind in (*_SYNAPSES, "batch_norm"))
    readers = {name: [op for op in program.ops if name in op.inputs] for name in ops}

    def summed(op: Op) -> bool:
        after = readers[op.name]
        return not after or any(r.kind == "join" or (r.kind in _PASSING and summed(r)) for r in after)

    folded = False
    for op in program.ops:
        before = ops.get(op.inputs[0])
        if op.kind != "batch_norm" or before is None or not summed(op):
            continue
        values = [before]
        if before.kind == "add" and (earlier := ops.get(before.inputs[0])) and earlier.where == before.where:
            values.append(earlier)  # a layer's bias
        layer, norm = _at(module, values[-1].where), _at(module, op.where)
        if (
            values[-1].kind in _SYNAPSES
            and type(layer) in (torch.nn.Conv2d, torch.nn.Linear)
            and isinstance(norm, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d)
            and uses[op.where] == uses[before.where] == 1
            and all(len(readers[v.name]) == 1 for v in values)
        ):
            _fold(layer, norm)
            _replace(module, norm, torch.nn.Identity())
            folded = True
    return folded


def _fold(layer: Any, norm: Any) -> None:
    """Give `layer` the weights and the bias with which it computes what `norm` makes of its output."""
    with torch.no_grad():
        factor = (norm.weight if norm.affine else 1.0) / (norm.running_var + norm.eps).sqrt()
        bias = ((0.0 if layer.bias is None else layer.bias) - norm.running_mean) * factor
        layer.weight.mul_(factor.reshape(-1, *[1] * (layer.weight.ndim - 1)))
        layer.bias = torch.nn.Parameter(bias + norm.bias if norm.affine else bias)


def _fold_input_scaling(module: torch.nn.Module, program: Program) -> bool:
    """Fold a scaling of the input that differs between channels into the first layers; a common one the conversion moves."""
    affine: list[Op] = []
    source = INPUT
    while len(readers := [op for op in program.ops if source in op.inputs]) == 1 and readers[0].kind in _PASSING:
        affine.append(readers[0])
        source = readers[0].name
    scaling = [op for op in affine if op.kind != "flatten"]
    ends = torch.stack([torch.zeros(program.input.shape), torch.ones(program.input.shape)])
    ends = ends.to(program_dtype(program))
    for op in affine:
        constants = {key: program.constant(op, key) for key in op.constants}
        ends = KINDS[op.kind](ends, **constants, **op.attributes)
    shift, factor = ends[0], ends[1] - ends[0]
    if not scaling or bool((factor == factor.flatten()[0]).all()):
        return False
    owners = {op.where for op in scaling}
    layers = [_at(module, op.where) for op in readers]
    if any(
        op.where in owners or op.where.startswith(f"{o}." if o else "") for op in readers for o in owners
    ) or not all(type(layer) in (torch.nn.Conv2d, torch.nn.Linear) for layer in layers):
        raise DeployError(
            f"module {scaling[0].where or '(top)'!r}",
            "scales the channels of the input differently",
            hint="Write torch.nn.Sequential(scaling, network) with the scaling in a module of its own, before the first layer.",
        )
    for layer in layers:
        _fold_scaling(layer, factor, shift)
    for path in owners:
        _replace(module, module.get_submodule(path), torch.nn.Identity())
    return True


def _fold_scaling(layer: Any, factor: Tensor, shift: Tensor) -> None:
    """Give `layer` the weights and the bias with which it computes from x what it did from x * factor + shift."""
    weight = layer.weight
    with torch.no_grad():
        if shift.any():
            if weight.ndim == 4 and any(layer._reversed_padding_repeated_twice):
                raise DeployError(
                    "module",
                    "pads with zeros an input whose mean was subtracted: the border is no integer of the input",
                    hint="Drop the mean (batch norm behind the convolution makes it unnecessary), or do not pad.",
                )
            constant = layer(shift.to(weight)[None])
            layer.bias = torch.nn.Parameter(constant[0].reshape(len(weight), -1)[:, 0].clone())
        if weight.ndim == 4:
            by_channel = factor.flatten(1)[:, 0].to(weight).reshape(layer.groups, 1, -1)
            each = by_channel.expand(-1, len(weight) // layer.groups, -1).reshape(len(weight), -1, 1, 1)
            weight.mul_(each)
        else:
            weight.mul_(factor.to(weight).flatten())


# The steps.


def _best_step(rows: list[Tensor], largest: list[int], steps: str) -> Tensor:
    """One step per row, shared by the weights [n, *] of several layers with integers up to `largest`."""
    top = torch.stack([w.abs().amax(1) / most for w, most in zip(rows, largest, strict=True)]).amax(0)
    top = torch.where(top > 0, top, torch.ones_like(top))
    if steps == "max":
        return top
    best, least = top, torch.full_like(top, torch.inf)
    for k in range(CANDIDATES, 0, -1):
        step = top * (k / CANDIDATES)
        error = torch.stack([_error(w, step, most) for w, most in zip(rows, largest, strict=True)]).sum(0)
        best, least = torch.where(error < least, step, best), torch.minimum(error, least)
    return best


def _error(rows: Tensor, step: Tensor, largest: int) -> Tensor:
    """The squared rounding error of each row."""
    unit = step[:, None]
    return ((rows / unit).round().clamp(-largest, largest) * unit - rows).square().sum(1)


def _sqnr(plan: _Plan, path: str) -> float | None:
    weight, step = plan.weights[path].double(), plan.steps[path].double()
    rows = weight.reshape(len(step), -1)
    error = float(_error(rows, step, (1 << (plan.bits[path] - 1)) - 1).sum())
    energy = float(rows.square().sum())
    return None if error == 0 or energy == 0 else float(10 * torch.log10(torch.tensor(energy / error)))


# The integer network, and what its statistics need.


def _with_integers(plan: _Plan, x: Tensor, paths: set[str]) -> torch.nn.Module:
    """A copy of the float network with the layers at `paths` made integer, its biases and batch norms corrected on `x`."""
    module = copy.deepcopy(plan.floating)
    for path in paths:
        layer = module.get_submodule(path)
        made = integer_layer(layer, plan.weights[path], plan.bits[path], plan.steps[path])
        if path == "":
            module = made
        else:
            _replace(module, layer, made)

    def correct(path: str, value: Tensor) -> None:
        if path not in plan.moments:
            return
        (mean, var), (old_mean, old_var) = _moments(value), plan.moments[path]
        found: Any = module.get_submodule(path)
        if path not in plan.weights and not isinstance(found, IntConv2d | IntLinear):
            found.running_mean += mean - old_mean
            found.running_var *= torch.where((old_var > 0) & (var > 0), var / old_var, torch.ones_like(var))
        elif path in paths and found.bias is not None:  # a float layer is left as it is
            found.bias.data += old_mean - mean

    with _observing(module, correct), torch.no_grad():
        module(x)
    return module


def integer_layer(layer: Any, weight: Tensor, bits: int, step: Tensor) -> IntConv2d | IntLinear:
    """The integer layer of fixed `step` [1] or [out] that stands for a `torch.nn.Conv2d` or `torch.nn.Linear` with `weight`."""
    same: dict[str, Any] = {"bias": layer.bias is not None, "bits": bits, "per_channel": len(step) == len(weight)}
    same |= {"device": weight.device, "dtype": weight.dtype}
    if isinstance(layer, torch.nn.Linear):
        made: IntConv2d | IntLinear = IntLinear(layer.in_features, layer.out_features, **same)
    else:
        shape: Any = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups)
        made = IntConv2d(layer.in_channels, layer.out_channels, *shape, **same)
    made.weight.data = weight.detach().clone()
    if made.bias is not None:
        made.bias.data = layer.bias.detach().clone()
    made.set_step("fixed", step)
    return made.eval()


def _replace(module: torch.nn.Module, old: torch.nn.Module, new: torch.nn.Module) -> None:
    """Put `new` wherever `old` is."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new)


@contextmanager
def _observing(module: torch.nn.Module, see: Any) -> Iterator[None]:
    """Show `see(path, value)` each batch norm's input before it runs, and each layer's output; then the layer runs again."""

    def norm(path: str) -> Any:
        return lambda _, inputs: see(path, inputs[0])

    def layer(path: str) -> Any:
        def hook(found: torch.nn.Module, inputs: Any, out: Tensor) -> Tensor:
            see(path, out)
            again: Tensor = found.forward(*inputs)
            return again

        return hook

    handles = []
    for path, found in module.named_modules():
        if isinstance(found, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            handles.append(found.register_forward_pre_hook(norm(path)))
        elif isinstance(found, torch.nn.Conv2d | torch.nn.Linear | IntConv2d | IntLinear):
            handles.append(found.register_forward_hook(layer(path)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _moments(value: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel of [N, C, ...]."""
    columns = value.double().transpose(0, 1).flatten(1)
    return columns.mean(1).to(value.dtype), columns.var(1, correction=0).to(value.dtype)


def _predictions(module: torch.nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = module(x)
    return out.argmax(1)
