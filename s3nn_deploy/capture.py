"""Any `nn.Module` as the program of torch operations that it runs in eval mode.

A stand-in without data is sent through a copy of the module; every torch function that reaches it is recorded, whatever
Python code calls it. What is no operation of a single-step spiking network is refused, if the output depends on it.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from s3nn_deploy.errors import DeployError
from s3nn_deploy.intnet import INPUT, Input
from s3nn_deploy.program import BATCH, KINDS, Op, Program


class _Value(torch.Tensor):
    """A stand-in without data (device meta) that remembers which value of the program it is."""

    program_name: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _Capture.current.call(func, args, kwargs or {})


class _Capture:
    """The operations seen so far while a module runs on a `_Value`."""

    current: "_Capture"

    def __init__(self, spec: Input, dtype: torch.dtype) -> None:
        self.ops: list[Op] = []
        self.path: list[str] = []
        self.dtype = dtype
        self.refused: dict[str, DeployError] = {}
        self.start = self.stand_in(spec.shape, INPUT)

    def stand_in(self, shape: tuple[int, ...], name: str) -> _Value:
        value = torch.empty((BATCH, *shape), dtype=self.dtype, device="meta").as_subclass(_Value)
        value.program_name = name
        return value

    @property
    def where(self) -> str:
        return self.path[-1] if self.path else ""

    def op(
        self, kind: str, inputs: list[_Value], constants: Mapping[str, Any] | None = None, **attributes: Any
    ) -> _Value:
        """Record one operation and return the stand-in of its value."""
        tensors = {key: value.detach().clone() for key, value in (constants or {}).items()}
        if "value" in tensors:
            tensors["value"] = self.without_batch(kind, tensors["value"], inputs[0].dim())
        if any(t.is_meta for t in tensors.values()):
            raise self.refusal(kind, "uses a tensor without data", "Make constants with torch.tensor, on the CPU.")
        name = f"v{len(self.ops)}"
        with torch._C.DisableTorchFunctionSubclass():
            metas = [torch.empty(v.shape, dtype=self.dtype, device="meta") for v in inputs]
            moved = {key: torch.empty_like(t, device="meta") for key, t in tensors.items()}
            shape = tuple(KINDS[kind](*metas, **moved, **attributes).shape)
        if shape[:1] != (BATCH,):
            hint = "Keep the samples on the first axis."
            raise self.refusal(kind, f"makes {list(shape)} out of a batch of {BATCH}", hint)
        names = tuple(v.program_name for v in inputs)
        self.ops.append(Op(kind, name, names, shape[1:], self.where, tensors, attributes))
        return self.stand_in(shape[1:], name)

    def without_batch(self, kind: str, constant: Tensor, axes: int) -> Tensor:
        """A constant that was made for every sample of the batch, such as a neuron's initial state, for one."""
        if constant.is_meta or constant.dim() < axes or len(constant) == 1:
            return constant
        if not torch.equal(constant[:1].expand_as(constant), constant):
            raise self.refusal(kind, "takes other constants for other samples", "Treat all samples alike.")
        return constant[:1]

    def refusal(self, what: str, problem: str, hint: str) -> DeployError:
        return DeployError(f"module {self.where or '(top)'!r}, {what}", problem, hint=hint)

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a torch function does to stand-ins.

        A query is answered, a known operation is recorded. What is neither is refused, but only if the module's output
        depends on it: a neuron's reset, which no single step sees, may be anything.
        """
        name = str(func) if isinstance(func, torch._ops.OpOverload) else func.__name__.strip("_")
        if name == "get":
            name = next((n for n in _PROPERTIES if getattr(torch.Tensor, n).__get__ == func), "get")
            if name == "device":
                return torch.device("cpu")
        if name in _QUERIES or name in _PROPERTIES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if kwargs.get("out") is not None:
            raise self.refusal(name, "writes into a given tensor", "Write it without out=.")
        try:
            made = self._handled(name, args, kwargs)
        except DeployError as error:
            made = self._refused(func, args, kwargs, error)
        in_place = func.__name__.endswith("_") and not func.__name__.endswith("__")
        if (in_place or func.__name__.startswith("__i") or kwargs.get("inplace")) and isinstance(args[0], _Value):
            args[0].program_name = made.program_name
            return args[0]
        return made

    def _handled(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        handler = _HANDLERS.get(name)
        if handler is None:
            hint = _FUSED if name.endswith(".forward.default") else _ADVICE.get(name, _HINT)
            raise self.refusal(name, "is no operation of a single-step spiking network", hint)
        try:
            bound = inspect.signature(handler).bind(self, *args, **kwargs)
        except TypeError:
            raise self.refusal(name, f"has arguments that are not understood: {sorted(kwargs)}", _HINT) from None
        return handler(*bound.args, **bound.kwargs)

    def _refused(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], error: DeployError) -> _Value:
        """A stand-in for the result of a refused operation; raises at once where none can be made."""

        def bare(x: Any) -> Any:
            return torch.empty(x.shape, dtype=self.dtype, device="meta") if isinstance(x, torch.Tensor) else x

        try:
            with torch._C.DisableTorchFunctionSubclass():
                shape = func(*map(bare, args), **{key: bare(value) for key, value in kwargs.items()}).shape
        except Exception:  # whatever torch says of the call, the refusal is the better answer
            raise error from None
        name = f"refused{len(self.refused)}"
        self.refused[name] = error
        value = torch.empty(shape, dtype=self.dtype, device="meta").as_subclass(_Value)
        value.program_name = name
        return value


_HINT = (
    "Between spikes, use convolutions or linear layers with integer weights (nn.IntConv2d, nn.IntLinear), sums "
    "(nn.Afferents), batch norm, nn.Spike, pooling of spikes and flatten."
)
_FUSED = "This fused neuron cannot be seen through: use its surrogate on membrane potential - threshold."
_ADVICE = {
    "relu": "Use nn.Spike as the activation: populations exchange spikes.",
    "pad": "Give the padding to the convolution: nn.IntConv2d(..., padding=p).",
    "softmax": "Return the logits; a loss or a host takes the softmax.",
    "log_softmax": "Return the logits; a loss or a host takes the softmax.",
    "bool": "A network whose path depends on its data is no fixed network; decide by shapes or options instead.",
}
_PROPERTIES = (
    "shape",
    "dtype",
    "device",
    "ndim",
    "requires_grad",
    "is_leaf",
    "layout",
    "is_cuda",
    "is_sparse",
    "grad_fn",
)
_QUERIES = {
    "size",
    "dim",
    "is_floating_point",
    "numel",
    "stride",
    "is_complex",
    "len",
    "ndimension",
    "is_contiguous",
    "repr",
}


def _conv2d(
    c: _Capture,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    if isinstance(padding, str):
        reaches = [d * (k - 1) for d, k in zip(_pair(dilation), weight.shape[2:], strict=True)]
        if padding == "same" and any(r % 2 for r in reaches):
            hint = "Use an odd kernel with padding='same', or integer padding."
            raise c.refusal("conv2d", "pads one side more than the other", hint)
        padding = [r // 2 for r in reaches] if padding == "same" else 0
    pairs = {"stride": _pair(stride), "padding": _pair(padding), "dilation": _pair(dilation)}
    u = c.op("conv2d", [input], {"weight": weight}, groups=groups, **pairs)
    return u if bias is None else c.op("add", [u], {"value": bias.reshape(-1, 1, 1)})


def _linear(c: _Capture, input: Any, weight: Any, bias: Any = None) -> Any:
    if input.dim() != 2:
        shape = ", ".join(map(str, input.shape[1:]))
        raise c.refusal("linear", f"got a value of shape [N, {shape}]", "Flatten it before the linear layer.")
    u = c.op("linear", [input], {"weight": weight})
    return u if bias is None else c.op("add", [u], {"value": bias})


def _batch_norm(
    c: _Capture,
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if training or running_mean is None:
        hint = "Call module.eval(), with track_running_stats=True."
        raise c.refusal("batch_norm", "uses the statistics of the batch", hint)
    ones, zeros = torch.ones_like(running_mean), torch.zeros_like(running_mean)
    affine = {"weight": ones if weight is None else weight, "bias": zeros if bias is None else bias}
    return c.op("batch_norm", [input], {"mean": running_mean, "var": running_var, **affine}, eps=float(eps))


def _spike(c: _Capture, x: Any, threshold: float = 1.0, surrogate: str = "s2nn") -> Any:
    return _compare(c, x, threshold, strict=False)


def _compare(c: _Capture, x: Any, threshold: Any, strict: bool) -> Any:
    if isinstance(threshold, torch.Tensor) and threshold.numel() > 1:
        x, threshold = _sub(c, x, threshold), 0.0
    return c.op("spike", [x], threshold=float(threshold), strict=strict)


def _greater(c: _Capture, a: Any, b: Any) -> Any:
    return _above(c, a, b, True)


def _greater_equal(c: _Capture, a: Any, b: Any) -> Any:
    return _above(c, a, b, False)


def _above(c: _Capture, a: Any, b: Any, strict: bool) -> Any:
    if isinstance(a, _Value) and not isinstance(b, _Value):
        return _compare(c, a, b, strict)
    raise c.refusal("compare", "is not of the form value >= constant", "Write spikes as value >= threshold.")


def _heaviside(c: _Capture, input: Any, values: Any) -> Any:
    if isinstance(values, _Value) or float(values) not in (0.0, 1.0):
        raise c.refusal("heaviside", f"has the value {values} at zero", "Give torch.heaviside the value 0 or 1.")
    return _compare(c, input, 0.0, strict=float(values) == 0.0)


def _max_pool2d(
    c: _Capture,
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    if ceil_mode or return_indices:
        raise c.refusal("max_pool2d", "uses ceil_mode or return_indices", "Pad the input, or choose sizes that divide.")
    stride = kernel_size if stride is None or stride == [] else stride
    pairs = {"kernel_size": _pair(kernel_size), "stride": _pair(stride), "padding": _pair(padding)}
    return c.op("max_pool2d", [input], None, **pairs, dilation=_pair(dilation))


def _avg_pool2d(
    c: _Capture,
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    kernel, pad = _pair(kernel_size), _pair(padding)
    if ceil_mode or (not count_include_pad and pad != (0, 0)):
        problem = "uses ceil_mode, or counts windows at the border by what they hold"
        raise c.refusal("avg_pool2d", problem, "Use count_include_pad=True and sizes that divide.")
    stride = kernel if stride is None or stride == [] else _pair(stride)
    divisor = divisor_override or kernel[0] * kernel[1]
    return c.op("avg_pool2d", [input], kernel_size=kernel, stride=stride, padding=pad, divisor=divisor)


def _global_pool(c: _Capture, name: str, input: Any, output_size: Any, pool: Callable[..., Any]) -> Any:
    if input.dim() != 4:
        raise c.refusal(name, f"pools a value of {input.dim()} axes", "Pool values of shape [N, C, H, W].")
    size = tuple(input.shape[2:])
    outputs = (
        (output_size,) * 2
        if isinstance(output_size, int) or output_size is None
        else tuple(output_size) * (3 - len(output_size))
    )
    wanted = tuple(n if o is None else int(o) for n, o in zip(size, outputs, strict=True))
    if any(n % o for n, o in zip(size, wanted, strict=True)):
        raise c.refusal(name, f"pools {size} to {wanted}", "Choose an output size that divides the input's.")
    return pool(c, input, tuple(n // o for n, o in zip(size, wanted, strict=True)))


def _adaptive_avg_pool2d(c: _Capture, input: Any, output_size: Any) -> Any:
    return _global_pool(c, "adaptive_avg_pool2d", input, output_size, _avg_pool2d)


def _adaptive_max_pool2d(c: _Capture, input: Any, output_size: Any, return_indices: bool = False) -> Any:
    return _global_pool(c, "adaptive_max_pool2d", input, output_size, _max_pool2d)


def _reduce(c: _Capture, name: str, input: Any, dim: Any, keepdim: bool, pool: Callable[..., Any]) -> Any:
    axes = sorted(d % input.dim() for d in ([dim] if isinstance(dim, int) else dim or range(input.dim())))
    if input.dim() != 4 or axes != [2, 3]:
        raise c.refusal(
            name, f"reduces axes {axes} of {input.dim()}", "Reduce both image axes at once: x.mean((2, 3))."
        )
    pooled = pool(c, input, tuple(input.shape[2:]))
    return pooled if keepdim else c.op("flatten", [pooled])


def _mean(c: _Capture, input: Any, dim: Any = None, keepdim: bool = False) -> Any:
    return _reduce(c, "mean", input, dim, keepdim, _avg_pool2d)


def _sum(c: _Capture, input: Any, dim: Any = None, keepdim: bool = False) -> Any:
    return _reduce(c, "sum", input, dim, keepdim, lambda c, x, size: _avg_pool2d(c, x, size, divisor_override=1))


def _amax(c: _Capture, input: Any, dim: Any = (), keepdim: bool = False) -> Any:
    return _reduce(c, "amax", input, dim, keepdim, _max_pool2d)


def _dropout(c: _Capture, input: Any, p: float = 0.5, training: bool = False, inplace: bool = False) -> Any:
    if training:
        raise c.refusal("dropout", "is active", "Call module.eval() first.")
    return input


def _flatten(c: _Capture, input: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    return _reshaped(c, input, lambda x: x.flatten(start_dim, end_dim))


def _reshape(c: _Capture, input: Any, *shape: Any) -> Any:
    return _reshaped(c, input, lambda x: x.reshape(*shape))


def _squeeze(c: _Capture, input: Any, *dim: Any) -> Any:
    return _reshaped(c, input, lambda x: x.squeeze(*dim))


def _reshaped(c: _Capture, input: Any, reshape: Callable[[Tensor], Tensor]) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        got = tuple(reshape(torch.empty(input.shape, device="meta")).shape)
    if got == tuple(input.shape):
        return input
    if got == (BATCH, math.prod(input.shape[1:])):
        return c.op("flatten", [input])
    problem = f"turns [N, {', '.join(map(str, input.shape[1:]))}] into {list(got)} for N = {BATCH}"
    raise c.refusal("reshape", problem, "Only flattening everything behind the batch axis is possible.")


def _cat(c: _Capture, tensors: Any, dim: int = 0) -> Any:
    values = list(tensors)
    if not all(isinstance(v, _Value) for v in values) or dim % values[0].dim() != 1:
        raise c.refusal(
            "cat", "joins along another axis than the channels", "Concatenate spikes with torch.cat((a, b), 1)."
        )
    return c.op("concat", values)


def _unsqueeze(c: _Capture, input: Any, dim: int) -> Any:
    """One sample after another as a sequence of one step; only a fused neuron takes that."""
    if dim != 0:
        raise c.refusal("unsqueeze", f"adds axis {dim}", "Keep values of shape [N, C, H, W] or [N, features].")
    return _sequence(c, input)


def _sequence(c: _Capture, value: Any) -> Any:
    steps = torch.empty((1, *value.shape), dtype=c.dtype, device="meta").as_subclass(_Value)
    steps.program_name = value.program_name
    return steps


def _getitem(c: _Capture, input: Any, index: Any) -> Any:
    if index != 0 or len(input) != 1:
        raise c.refusal("getitem", f"takes a part of a value: [{index}]", "Let populations read whole values.")
    return c.stand_in(tuple(input.shape[2:]), input.program_name)


def _unbind(c: _Capture, input: Any, dim: int = 0) -> Any:
    return (_getitem(c, input, 0 if dim == 0 else dim),)


def _stack(c: _Capture, tensors: Any, dim: int = 0) -> Any:
    if dim != 0 or len(tensors) != 1:
        raise c.refusal("stack", f"stacks {len(tensors)} values", "Concatenate spikes with torch.cat((a, b), 1).")
    return _sequence(c, tensors[0])


def _integrate_and_fire(c: _Capture, x: Any, v: Any, threshold: float, reset: Any, *_: Any) -> Any:
    """SpikingJelly's IF: h = v + x, spikes where h >= threshold."""
    return _fired(c, x, lambda x: _plus(c, x, v), threshold)


def _leaky_integrate_and_fire(
    c: _Capture, x: Any, v: Any, tau: float, decay_input: bool, threshold: float, reset: Any, *_: Any
) -> Any:
    """SpikingJelly's LIF: h = v + (x - (v - r)) / tau, or v - (v - r) / tau + x; spikes where h >= threshold."""
    above = v - (reset or 0.0)
    if decay_input:
        return _fired(c, x, lambda x: _plus(c, _div(c, _plus(c, x, -above), tau), v), threshold)
    return _fired(c, x, lambda x: _plus(c, x, v - above / tau), threshold)


def _plus(c: _Capture, x: Any, constant: Tensor) -> Any:
    return _add(c, x, constant) if bool((constant != 0).any()) else x


def _fired(c: _Capture, x: Any, charge: Callable[[Any], Any], threshold: float) -> Any:
    """The spikes of a fused neuron, as a sequence of one step; its state behind that step is nobody's."""
    if c.dtype != torch.float32:
        raise c.refusal("fused neuron", "computes in float32 amid float64", "Call module.float() first.")
    spikes = _sequence(c, _compare(c, charge(_getitem(c, x, 0)), threshold, strict=False))
    name = f"refused{len(c.refused)}"
    c.refused[name] = c.refusal("fused neuron", "gives its state after the step", "Use its spikes alone.")
    state = c.stand_in(tuple(spikes.shape[2:]), name)
    return spikes, state, state


def _same(c: _Capture, input: Any, *_: Any, **__: Any) -> Any:
    return input


def _filled(value: float) -> Callable[..., Any]:
    """zeros_like and its kin: a constant, not a value of the network."""
    return lambda c, input, *_, **__: torch.full((1,) * input.dim(), value, dtype=c.dtype)


def _full_like(c: _Capture, input: Any, fill_value: float, **_: Any) -> Any:
    return torch.full((1,) * input.dim(), float(fill_value), dtype=c.dtype)


def _add(c: _Capture, a: Any, b: Any, *, alpha: float = 1) -> Any:
    if alpha != 1:
        raise c.refusal("add", f"has alpha = {alpha}", "Scale the weights instead.")
    if isinstance(a, _Value) and isinstance(b, _Value):
        if a.shape != b.shape:
            shapes = f"{list(a.shape[1:])} and {list(b.shape[1:])}"
            raise c.refusal("add", f"joins shapes {shapes}", "Make the branches the same shape.")
        return c.op("join", [a, b])
    value, constant = (a, b) if isinstance(a, _Value) else (b, a)
    return c.op("add", [value], {"value": torch.as_tensor(constant, dtype=c.dtype)})


def _sub(c: _Capture, a: Any, b: Any, *, alpha: float = 1) -> Any:
    if isinstance(b, _Value) and not isinstance(a, _Value):
        return _add(c, _mul(c, b, -1.0), a, alpha=alpha)
    if isinstance(b, _Value):
        raise c.refusal("sub", "subtracts a value of the network", "Negate the weights of that branch instead.")
    return _add(c, a, -torch.as_tensor(b, dtype=c.dtype), alpha=alpha)


def _rsub(c: _Capture, b: Any, a: Any) -> Any:
    return _sub(c, a, b)


def _mul(c: _Capture, a: Any, b: Any) -> Any:
    if isinstance(a, _Value) and isinstance(b, _Value):
        hint = "Single-step populations only add; use nn.Afferents."
        raise c.refusal("mul", "multiplies two values of the network", hint)
    value, constant = (a, b) if isinstance(a, _Value) else (b, a)
    return c.op("mul", [value], {"value": torch.as_tensor(constant, dtype=c.dtype)})


def _div(c: _Capture, a: Any, b: Any, *, rounding_mode: str | None = None) -> Any:
    if isinstance(b, _Value) or rounding_mode is not None:
        raise c.refusal("div", "divides by a value of the network, or rounds", "Divide by constants only.")
    return c.op("div", [a], {"value": torch.as_tensor(b, dtype=c.dtype)})


def _neg(c: _Capture, a: Any) -> Any:
    return _mul(c, a, -1.0)


_HANDLERS: dict[str, Callable[..., Any]] = {
    "conv2d": _conv2d,
    "linear": _linear,
    "batch_norm": _batch_norm,
    **dict.fromkeys(("max_pool2d", "boolean_dispatch"), _max_pool2d),
    "avg_pool2d": _avg_pool2d,
    "adaptive_avg_pool2d": _adaptive_avg_pool2d,
    "adaptive_max_pool2d": _adaptive_max_pool2d,
    "mean": _mean,
    "sum": _sum,
    "amax": _amax,
    **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout"), _dropout),
    "flatten": _flatten,
    **dict.fromkeys(("view", "reshape"), _reshape),
    "squeeze": _squeeze,
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    **dict.fromkeys(
        ("contiguous", "detach", "clone", "float", "double", "to", "type", "type_as", "requires_grad"), _same
    ),
    **dict.fromkeys(("zeros_like", "new_zeros"), _filled(0.0)),
    **dict.fromkeys(("ones_like", "new_ones"), _filled(1.0)),
    "full_like": _full_like,
    **dict.fromkeys(("add", "radd", "iadd"), _add),
    **dict.fromkeys(("sub", "subtract", "isub"), _sub),
    "rsub": _rsub,
    **dict.fromkeys(("mul", "multiply", "rmul", "imul"), _mul),
    **dict.fromkeys(("div", "divide", "true_divide", "truediv", "itruediv"), _div),
    **dict.fromkeys(("neg", "negative"), _neg),
    **dict.fromkeys(("ge", "greater_equal"), _greater_equal),
    **dict.fromkeys(("gt", "greater"), _greater),
    "heaviside": _heaviside,
    "spike": _spike,
    "unsqueeze": _unsqueeze,
    "getitem": _getitem,
    "unbind": _unbind,
    "stack": _stack,
    "sj_if.forward.default": _integrate_and_fire,
    "sj_lif.forward.default": _leaky_integrate_and_fire,
}
"""What each torch function or method is, by its name without underscores."""


def capture(module: torch.nn.Module, input_shape: tuple[int, ...], input_bits: int = 8) -> Program:
    """The program that a copy of `module`, in eval mode, runs on inputs of `input_shape`; the module is not touched.

    Any Python code is allowed in its `forward`; what counts is which torch operations reach the data.

    Raises:
        DeployError: an operation that is none of a single-step spiking network, with the module's path and what to write instead.
    """
    if isinstance(module, Program):
        return module
    spec = Input(tuple(int(n) for n in input_shape), int(input_bits))
    dtypes = {t.dtype for t in [*module.parameters(), *module.buffers()] if t.is_floating_point()}
    if len(dtypes) > 1 or dtypes - {torch.float32, torch.float64}:
        raise DeployError("module", expected="float32 or float64 throughout", got=", ".join(sorted(map(str, dtypes))))
    recorder = _Capture(spec, next(iter(dtypes), torch.float32))
    try:
        # a copy, because a stateful neuron keeps what it is given; buffers with a history cannot be copied as they are
        detached = {id(buffer): buffer.detach().clone() for buffer in module.buffers() if buffer.grad_fn is not None}
        copy = deepcopy(module, detached).eval()
    except RuntimeError as error:
        raise DeployError("module", f"cannot be copied ({error})", hint="Reset its state first.") from error
    with _paths(copy, recorder.path), torch.no_grad():
        _Capture.current = recorder
        try:
            out = copy(recorder.start)
        except DeployError:
            raise
        except Exception as error:  # the module's own code fails in its own ways
            problem = f"its forward fails for an input of shape [N, {', '.join(map(str, spec.shape))}] ({error})"
            hint = "Check input_shape; only torch operations on the samples can be followed."
            raise DeployError(f"module {recorder.where or '(top)'!r}", problem, hint=hint) from error
    if not isinstance(out, _Value) or not recorder.ops:
        raise DeployError(
            "module",
            expected="one tensor as its output",
            got=type(out).__name__,
            hint="Return the readout's logits alone.",
        )
    needed = list(_needed(recorder.ops, out.program_name))
    for name in (out.program_name, *(name for op in needed for name in op.inputs)):
        if name in recorder.refused:
            raise recorder.refused[name]
    return Program(spec, [_cpu(op) for op in needed])


def _needed(ops: list[Op], output: str) -> Iterator[Op]:
    """The operations that reach the output, in order, ending with the one that makes it."""
    wanted = {output}
    for op in reversed(ops):
        if op.name in wanted:
            wanted.update(op.inputs)
    return (op for op in ops if op.name in wanted)


def _cpu(op: Op) -> Op:
    constants = {key: value.cpu() for key, value in op.constants.items()}
    return Op(op.kind, op.name, op.inputs, op.shape, op.where, constants, op.attributes)


@contextmanager
def _paths(module: torch.nn.Module, path: list[str]) -> Iterator[None]:
    """Keep `path[-1]` at the name of the submodule that is running."""

    def leave(*_: Any) -> None:
        path.pop()

    handles = []
    for name, submodule in module.named_modules():
        handles.append(submodule.register_forward_pre_hook(lambda *_, name=name: path.append(name)))
        handles.append(submodule.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pair(value: Any) -> tuple[int, int]:
    first, second = (value, value) if isinstance(value, int) else (tuple(value) * 2)[:2]
    return int(first), int(second)
