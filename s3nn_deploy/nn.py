"""Layers with torch's signatures whose forward pass computes with integer-valued weights: the trained network is the integer network.

A layer holds real weights w. With one step per output channel it computes, in the forward pass,

    W = clip(round(w / step)),   u = sum W x + round(b / step),   output = step * u

so `u` is the very integer that the hardware sums, and the step only scales it before batch norm. The gradient passes
straight through the rounding. Inputs are integers held as floats: pixels 0..255, or spikes 0/1.

Where the step comes from is the layer's `step`, one of `STEPS`: "rule" takes it from the weights anew in each pass, "fixed" is
a buffer (`quantise` chooses it), "learned" a parameter.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from s3nn_deploy.errors import DeployError, suggestion
from s3nn_deploy.intnet import EXACT_FLOAT32
from s3nn_deploy.surrogate import SURROGATES, spike

__all__ = ["Afferents", "IntConv2d", "IntLinear", "Residual", "Spike", "share_step"]

STEPS = ("rule", "fixed", "learned")
"""Where a layer's step comes from."""


class _IntSynapses(torch.nn.Module):
    """What the integer layers share: the step, the rounding, and the proof that float sums are exact."""

    weight: Tensor
    bias: Tensor | None
    bits: int
    per_channel: bool
    fixed_step: Tensor | None
    log_step: Tensor | None
    sharing: "tuple[_IntSynapses, ...]"

    def _init(self, plain: torch.nn.Conv2d | torch.nn.Linear, bits: int, per_channel: bool, step: str) -> None:
        if not 1 <= bits <= 8:
            raise DeployError("bits", expected="1 to 8", got=str(bits))
        self.weight, self.bias, self.bits, self.per_channel = plain.weight, plain.bias, bits, per_channel
        self.register_buffer("fixed_step", None)
        self.register_parameter("log_step", None)
        self.sharing = ()
        self.set_step(step)

    def set_step(self, step: str, values: Tensor | None = None) -> None:
        """Take the step from one of `STEPS`; "fixed" and "learned" start at the positive `values` [out], [1] where one step is
        shared, or else at what the rule gives now.

        Raises:
            DeployError: an unknown word, or values that are not positive or of another shape.
        """
        if step not in STEPS:
            raise DeployError(f"step {step!r}", "is not known", hint=suggestion(step, list(STEPS)))
        shape = (len(self.weight) if self.per_channel else 1,)
        start = self.rule_step()[: shape[0]] if values is None else values.detach().to(self.weight)
        if start.shape != shape or not bool((start > 0).all()):
            raise DeployError(
                "step",
                expected=f"positive values of shape {list(shape)}",
                got=str(start.tolist()[:4]),
                hint="Give one step per output channel, or a single one with per_channel=False.",
            )
        self.fixed_step = start.clone() if step == "fixed" else None
        self.log_step = torch.nn.Parameter(start.log()) if step == "learned" else None

    def step(self) -> Tensor:
        """The size of one integer unit, [out], positive; the largest of those that `share_step` put together.

        A learned one is that of LSQ (arXiv 1902.08153) with its gradient scale 1 / sqrt(weights a step * largest integer). Its
        logarithm is the parameter: so it stays positive, and Adam moves it in proportion.
        """
        if self.sharing:
            return torch.stack([layer.own_step() for layer in self.sharing]).amax(0)
        return self.own_step()

    def own_step(self) -> Tensor:
        """The layer's step, [out], before it is shared."""
        if self.fixed_step is not None:
            return self.fixed_step.expand(len(self.weight))
        if self.log_step is None:
            return self.rule_step()
        scaled = self.log_step / math.sqrt(self.weight.numel() / self.log_step.numel() * self.largest)
        return (self.log_step.detach() + (scaled - scaled.detach())).exp().expand(len(self.weight))

    def rule_step(self) -> Tensor:
        """The step that the weights suggest, [out] (not differentiated).

        Three bits and more: the largest |w| over the largest integer. Two bits are ternary with step 1.4 mean |w| (zero
        below 0.7 mean |w|, as in ternary weight networks, arXiv 1605.04711). One bit is the sign, with step mean |w|
        (XNOR-Net, arXiv 1603.05279). 1 where all weights are zero.
        """
        size = self.weight.detach().abs().flatten(1)
        if not self.per_channel:
            size = size.reshape(1, -1).expand(len(size), -1)
        mean: Tensor = size.mean(1)
        step = size.amax(1) / self.largest if self.bits > 2 else mean if self.bits == 1 else 1.4 * mean
        return torch.where(step > 0, step, torch.ones_like(step))

    @property
    def largest(self) -> int:
        """The largest integer weight."""
        return max((1 << (self.bits - 1)) - 1, 1)

    def integer_weight(self, step: Tensor) -> Tensor:
        """The integer weights as floats, of `weight`'s shape; the gradient is that of `weight / step`.

        A learned step gets LSQ's gradient, which counts a clipped weight as the largest integer. Unlike LSQ's, clipped weights
        keep their own: zero would freeze them (measured on digits, two and three bits: up to 4 points less accuracy).
        """
        column = (-1, *[1] * (self.weight.ndim - 1))
        scaled = self.weight / step.detach().reshape(column)
        clipped = scaled.detach().clamp(-self.largest, self.largest)
        rounded = _straight_through(clipped.round() if self.bits > 1 else torch.where(scaled < 0, -1.0, 1.0), scaled)
        if self.log_step is None:
            return rounded
        by_step = (self.weight.detach() / step.reshape(column)).clamp(-self.largest, self.largest)
        return rounded + (by_step - by_step.detach())

    def integer_bias(self, step: Tensor) -> Tensor | None:
        """The bias in units of the step, [out], as floats; None without one."""
        if self.bias is None:
            return None
        scaled = self.bias / step
        return _straight_through(scaled.round(), scaled)

    def sums(self, x: Tensor, step: Tensor) -> Tensor:
        """The integers u, as floats.

        Raises:
            DeployError: in eval mode, when float sums might not be exact for inputs as large as `x`'s.
        """
        weight, bias = self.integer_weight(step), self.integer_bias(step)
        if not self.training and type(x) is Tensor and x.numel():
            worst = weight.detach().abs().flatten(1).sum(1) * x.detach().abs().amax()
            most = float((worst if bias is None else worst + bias.detach().abs()).amax())
            limit = EXACT_FLOAT32 if x.dtype == torch.float32 else 1 << 53
            if most >= limit:
                raise DeployError(
                    repr(self),
                    expected=f"sums below {limit:,}, where {x.dtype} is exact",
                    got=f"up to {most:,.0f}",
                    hint="Use fewer input channels, fewer bits, or give the integers themselves (pixels 0..255).",
                )
        return self._synapses(x, weight, bias)

    def _synapses(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        step = self.step()
        u = self.sums(x, step)
        return u * _per_channel(step, u)


def _straight_through(rounded: Tensor, scaled: Tensor) -> Tensor:
    """`rounded`, to the last bit, with the gradient of `scaled`."""
    return rounded.detach().to(scaled.dtype) + (scaled - scaled.detach())


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 2))


class IntLinear(_IntSynapses):
    """`torch.nn.Linear` with integer-valued weights of `bits` bits. `per_channel=False` shares one step over all outputs,
    which makes the argmax over the integers that of the outputs: use it for the readout. `step` is one of `STEPS`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        bits: int = 8,
        per_channel: bool = True,
        step: str = "rule",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        plain = torch.nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._init(plain, bits, per_channel, step)
        self.in_features, self.out_features = in_features, out_features

    def _synapses(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, bits={self.bits}"


class IntConv2d(_IntSynapses):
    """`torch.nn.Conv2d` (zero padding) with integer-valued weights of `bits` bits; `per_channel` and `step` as in `IntLinear`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        bits: int = 8,
        per_channel: bool = True,
        step: str = "rule",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        plain = torch.nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device=device, dtype=dtype
        )
        self._init(plain, bits, per_channel, step)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.dilation = plain.kernel_size, plain.stride, plain.dilation
        self.padding = plain.padding

    def _synapses(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={tuple(self.kernel_size)}, stride={self.stride}, "
            f"padding={self.padding}, groups={self.groups}, bias={self.bias is not None}, bits={self.bits}"
        )


class Afferents(torch.nn.Module):
    """Several branches into one neuron: `forward(x_a, x_b, ...) = a(x_a) + b(x_b) + ...` with one shared step per channel.

    The shared step is what makes the sum an integer, so that a residual join is only a second projection. Each branch is
    an `IntConv2d` or `IntLinear` with the same number of outputs; a plain skip is `IntConv2d(c, c, 1, groups=c)`. Branches
    that all are `torch.nn.Conv2d` or `torch.nn.Linear` make the float join that `quantise` takes.

    Raises:
        DeployError: a branch of another kind, or integer and float ones mixed.
    """

    def __init__(self, *branches: torch.nn.Module) -> None:
        super().__init__()
        kinds = {_IntSynapses if isinstance(b, IntConv2d | IntLinear) else _plain(b) for b in branches}
        if len(kinds) != 1 or None in kinds:
            raise DeployError(
                "Afferents",
                expected="IntConv2d or IntLinear branches, or only torch.nn.Conv2d and torch.nn.Linear ones",
                got=", ".join(type(branch).__name__ for branch in branches) or "none",
                hint="Write a plain skip over c channels as IntConv2d(c, c, 1, groups=c).",
            )
        self.branches = torch.nn.ModuleList(branches)

    def forward(self, *inputs: Tensor) -> Tensor:
        if len(inputs) != len(self.branches):
            raise DeployError(
                "Afferents", expected=f"{len(self.branches)} inputs, one for each branch", got=str(len(inputs))
            )
        branches: list[Any] = list(self.branches)
        if not all(isinstance(branch, _IntSynapses) for branch in branches):
            return sum((branch(x) for branch, x in zip(branches[1:], inputs[1:], strict=True)), branches[0](inputs[0]))
        step = torch.stack([branch.step() for branch in branches]).amax(0)
        total = branches[0].sums(inputs[0], step)
        for branch, x in zip(branches[1:], inputs[1:], strict=True):
            total = total + branch.sums(x, step)
        return total * _per_channel(step, total)


def share_step(*layers: IntConv2d | IntLinear) -> None:
    """Give `layers` one step per channel, the largest of theirs, so that what they put out can be added anywhere.

    `nn.Afferents` does so for the branches of one sum. This is for sums that several populations read, such as the stream
    of a pre-activation network: `u = stem(x)`, then `u = u + conv(spike(bn(u)))` block by block, with one step throughout.

    Raises:
        DeployError: layers with different numbers of outputs.
    """
    outputs = {len(layer.weight) for layer in layers}
    if len(outputs) != 1:
        raise DeployError("share_step", expected="layers with the same number of outputs", got=str(sorted(outputs)))
    for layer in layers:
        layer.sharing = layers


def _plain(branch: torch.nn.Module) -> type | None:
    return torch.nn.Module if isinstance(branch, torch.nn.Conv2d | torch.nn.Linear) else None


class Spike(torch.nn.Module):
    """The neuron: fires 1.0 where its input is at or above `threshold`, else 0.0; trained through a surrogate gradient.

    Args:
        surrogate: a name in `surrogate.SURROGATES`.
        threshold: 1 makes the `s2nn` surrogate what its derivation says; batch norm gives every scale and shift anyway.
    """

    def __init__(self, surrogate: str = "s2nn", threshold: float = 1.0) -> None:
        super().__init__()
        if surrogate not in SURROGATES:
            raise DeployError(f"surrogate {surrogate!r}", "is not known", hint=suggestion(surrogate, list(SURROGATES)))
        self.surrogate, self.threshold = surrogate, threshold

    def forward(self, x: Tensor) -> Tensor:
        return spike(x, self.threshold, self.surrogate)

    def extra_repr(self) -> str:
        return f"surrogate={self.surrogate!r}, threshold={self.threshold}"


class Residual(torch.nn.Module):
    """A residual block from spikes to spikes: conv, batch norm, spike, conv; the shortcut joins before batch norm and spike.

    The shortcut is a 1x1 convolution, one weight a channel where shape and channels stay.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        bits: int = 8,
        surrogate: str = "s2nn",
        step: str = "rule",
    ) -> None:
        super().__init__()
        same: dict[str, Any] = {"bias": False, "bits": bits, "step": step}
        groups = in_channels if in_channels == out_channels and stride == 1 else 1
        self.conv = IntConv2d(in_channels, out_channels, 3, stride, padding=1, **same)
        self.bn1, self.spike1 = torch.nn.BatchNorm2d(out_channels), Spike(surrogate)
        self.join = Afferents(
            IntConv2d(out_channels, out_channels, 3, padding=1, **same),
            IntConv2d(in_channels, out_channels, 1, stride, groups=groups, **same),
        )
        self.bn2, self.spike2 = torch.nn.BatchNorm2d(out_channels), Spike(surrogate)

    def forward(self, s: Tensor) -> Tensor:
        inner: Tensor = self.spike1(self.bn1(self.conv(s)))
        out: Tensor = self.spike2(self.bn2(self.join(inner, s)))
        return out
