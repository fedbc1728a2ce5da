"""Twins of a network: the same wiring with other neurons, to learn from or to compare with."""

import copy
from collections.abc import Callable

import torch

from s3nn_deploy.nn import IntConv2d, IntLinear, Spike


def relu(module: torch.nn.Module) -> torch.nn.Module:
    """The full-precision twin: float synapses with the same initial weights, ReLU in the place of spikes."""

    def change(found: torch.nn.Module) -> torch.nn.Module | None:
        return torch.nn.ReLU() if isinstance(found, Spike) else float_synapses(found)

    return substituted(module, change)


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
