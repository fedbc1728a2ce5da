"""Twins of a network: the same wiring with other neurons, to learn from or to compare with."""

import copy
from collections.abc import Callable

import torch

from s3nn_deploy.nn import IntConv2d, IntLinear, Spike
from s3nn_deploy.surrogate import spike


def relu(module: torch.nn.Module) -> torch.nn.Module:
    """The full-precision twin: float synapses with the same initial weights, ReLU in the place of spikes."""

    def change(found: torch.nn.Module) -> torch.nn.Module | None:
        return torch.nn.ReLU() if isinstance(found, Spike) else float_synapses(found)

    return substituted(module, change)


def binary(module: torch.nn.Module) -> torch.nn.Module:
    """The binary twin: activations and weights of -1 and +1 (a BNN), trained straight through.

    What reads the pixels and what reads out keep their widths, as is usual (XNOR-Net, arXiv 1603.05279).
    """
    layers = [name for name, m in module.named_modules() if isinstance(m, IntConv2d | IntLinear)]
    made = substituted(module, lambda found: Sign() if isinstance(found, Spike) else None)
    for name in layers[1:-1]:
        layer = made.get_submodule(name)
        assert isinstance(layer, IntConv2d | IntLinear)
        layer.bits = 1
    return made


class Sign(torch.nn.Module):
    """-1 or +1, the sign of the input, with the derivative of hard tanh as its gradient."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * spike(x, 0.0, "straight_through") - 1


def lif(module: torch.nn.Module, steps: int = 4) -> torch.nn.Module:
    """The twin over time: leaky integrate-and-fire neurons, `steps` time steps of the same input, the readouts' mean.

    Trained by backpropagation through time with the spikes' own surrogates.
    """

    def change(found: torch.nn.Module) -> torch.nn.Module | None:
        return LeakyIntegrateAndFire(found) if isinstance(found, Spike) else None

    return Unrolled(substituted(module, change), steps)


class LeakyIntegrateAndFire(torch.nn.Module):
    """v <- DECAY v + input; fires where v >= threshold, which is then subtracted from v. From rest it is a `Spike`."""

    DECAY = 0.5

    def __init__(self, like: Spike) -> None:
        super().__init__()
        self.fire = copy.deepcopy(like)
        self.v: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        v = x if self.v is None else self.DECAY * self.v + x
        spikes: torch.Tensor = self.fire(v)
        self.v = v - self.fire.threshold * spikes
        return spikes


class Unrolled(torch.nn.Module):
    """Runs a module with LIF neurons from rest for some time steps; the output is the mean over time."""

    def __init__(self, module: torch.nn.Module, steps: int) -> None:
        super().__init__()
        self.module, self.steps = module, steps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for neuron in self.modules():
            if isinstance(neuron, LeakyIntegrateAndFire):
                neuron.v = None
        outputs = [self.module(x) for _ in range(self.steps)]
        return torch.stack(outputs).mean(0)


def float_synapses(layer: torch.nn.Module) -> torch.nn.Module | None:
    """torch's own layer with the weights of an integer one; None for any other module."""
    if isinstance(layer, IntLinear):
        made: torch.nn.Linear | torch.nn.Conv2d = torch.nn.Linear(
            layer.in_features, layer.out_features, layer.bias is not None
        )
    elif isinstance(layer, IntConv2d):
        made = torch.nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            layer.dilation,  # type: ignore[arg-type]
            layer.groups,
            layer.bias is not None,
        )
    else:
        return None
    made.weight, made.bias = layer.weight, layer.bias
    return made


def substituted(
    module: torch.nn.Module, change: Callable[[torch.nn.Module], torch.nn.Module | None]
) -> torch.nn.Module:
    """A copy of `module` in which each submodule is what `change` gives for it, where that is not None."""
    module = copy.deepcopy(module)
    made = change(module)
    if made is not None:
        return made
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            made = change(child)
            if made is not None:
                setattr(parent, name, made)
    return module
