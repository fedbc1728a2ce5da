"""Surrogate gradients: what training uses in place of the derivative of the spike.

With x = u - threshold, a surrogate is a function g'(x) of the derivative's shape; the forward pass is always [x >= 0].
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

ALPHA, BETA = 4.0, 1.0
"""Defaults of `s2nn`: they make it continuous at threshold (ALPHA / 4 = BETA)."""
KAPPA = 0.5
"""Weight of `antlr`'s spike-time part: the mean of its synaptic and membrane decays, in (0, 1); the value is ours."""


def s2nn(x: Tensor) -> Tensor:
    """ALPHA sig(ALPHA x)(1 - sig(ALPHA x)) below threshold, BETA / (x + 1) from it on.

    Source: S3NN, arXiv 2201.10879 (version 1 under the name S2NN), in the form that SpikingJelly's `S2NN` has; it follows
    from TSSL-BP at one time step, where a fired neuron's gradient is that of its spike time, 1 / u with threshold 1.
    """
    silent = torch.sigmoid(ALPHA * x)
    return torch.where(x < 0, ALPHA * silent * (1 - silent), BETA / (x.clamp(min=0) + 1))


def sigmoid(x: Tensor) -> Tensor:
    """ALPHA sig(ALPHA x)(1 - sig(ALPHA x)): the exact gradient of the expected spike under escape noise."""
    s = torch.sigmoid(ALPHA * x)
    return ALPHA * s * (1 - s)


def antlr(x: Tensor) -> Tensor:
    """h(x) + KAPPA [x >= 0] / (x + 1): the activation's and the spike time's gradient added.

    Source: ANTLR (Kim et al., NeurIPS 2020) at one time step with threshold 1; h is `sigmoid` here.
    """
    return sigmoid(x) + torch.where(x < 0, 0.0, KAPPA / (x.clamp(min=0) + 1))


def theta_u2(x: Tensor) -> Tensor:
    """`s2nn` with BETA / (x + 1)^2 from threshold on: the spike time's gradient by the input current, theta / u^2."""
    u = x.clamp(min=0) + 1
    return torch.where(x < 0, sigmoid(x), BETA / u / u)


def straight_through(x: Tensor) -> Tensor:
    """1 where |x| < 1: the straight-through estimator of binary networks (the derivative of hard tanh)."""
    return (x.abs() < 1).to(x.dtype)


def rectangle(x: Tensor) -> Tensor:
    """1 where |x| < 1/2 (STBP)."""
    return (x.abs() < 0.5).to(x.dtype)


def triangle(x: Tensor) -> Tensor:
    """max(0, 1 - |x|)."""
    return (1 - x.abs()).clamp(min=0)


def atan(x: Tensor) -> Tensor:
    """1 / (1 + (pi x)^2)."""
    return 1 / (1 + (torch.pi * x) ** 2)


SURROGATES: dict[str, Callable[[Tensor], Tensor]] = {
    f.__name__: f for f in (s2nn, sigmoid, antlr, theta_u2, rectangle, triangle, atan, straight_through)
}
"""Every surrogate by name."""


CHUNK = 1 << 16
"""Values at a time: a surrogate's temporaries then stay in the cache (measured: half the time on a CPU)."""


class _Fire(torch.autograd.Function):
    """[x >= 0] forward, g'(x) backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.gradient = gradient
        return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        if x.device.type != "cpu" or x.numel() <= CHUNK or not x.is_contiguous():
            return grad * ctx.gradient(x), None
        out = torch.empty_like(x)
        parts = (t.reshape(-1).split(CHUNK) for t in (grad, x, out))
        for g, v, o in zip(*parts, strict=True):
            torch.mul(g, ctx.gradient(v), out=o)
        return out, None


def spike(x: Tensor, threshold: float = 1.0, surrogate: str = "s2nn") -> Tensor:
    """Spikes [x >= threshold] as 0.0 / 1.0, of x's shape and dtype; differentiable through the named surrogate."""
    if has_torch_function_unary(x):
        return handle_torch_function(spike, (x,), x, threshold=threshold, surrogate=surrogate)
    return _Fire.apply(x - threshold, SURROGATES[surrogate])
