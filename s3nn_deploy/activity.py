"""What a module does while it runs: firing rates, and synaptic operations as the emulator counts them, differentiable."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from s3nn_deploy.nn import Afferents, IntConv2d, IntLinear, Spike


@dataclass
class Activity:
    """What the passes since `clear` did, by the path of the module.

    Attributes:
        rates: of each spike layer the firing rate of each channel, [C]; a layer that is used for several numbers of channels
            has one entry for each.
        synops: of each layer the synaptic operations that it receives per sample, a scalar with the spikes' gradient;
            for what pixels drive there are none.
        means: `mean`'s, with the spikes themselves, until `clear`.
    """

    rates: dict[str, Tensor] = field(default_factory=dict)
    synops: dict[str, Tensor] = field(default_factory=dict)
    means: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def clear(self) -> None:
        self.rates.clear()
        self.synops.clear()
        self.means.clear()

    def mean(self, spikes: Tensor) -> Tensor:
        """The mean over the samples, taken once of what several layers read."""
        if id(spikes) not in self.means:
            self.means[id(spikes)] = spikes, spikes.mean(0)
        return self.means[id(spikes)][1]

    @property
    def total(self) -> Tensor:
        """Synaptic operations per sample, of all layers."""
        return sum(self.synops.values(), torch.zeros(()))


@contextmanager
def observing(module: torch.nn.Module) -> Iterator[Activity]:
    """Record the activity of every pass of `module` while the context is open; several passes add up.

    An inference's synaptic operations are sum over spikes of the spike's fan-out: every programmed synapse, exact at the
    borders, the windows of max pooling included. The network's input is told by its having no gradient, so they are only
    recorded with gradients enabled. A module without spikes, such as a ReLU twin, has no activity.
    """
    activity = Activity()
    if not any(isinstance(found, Spike) for found in module.modules()):
        yield activity
        return
    fans: dict[tuple[Any, ...], Tensor] = {}

    def fired(name: str, spikes: Tensor) -> None:
        rate = activity.mean(spikes).detach().reshape(spikes.shape[1], -1).mean(1)
        if name in activity.rates and activity.rates[name].shape != rate.shape:
            name = f"{name} ({len(rate)} channels)"
        activity.rates[name] = activity.rates[name] + rate if name in activity.rates else rate

    def received(name: str, layer: torch.nn.Module, spikes: Tensor) -> None:
        if spikes.requires_grad:
            mean = activity.mean(spikes)
            key = name, id(layer), mean.shape
            if key not in fans:
                fans[key] = fan_out(layer, mean.shape, mean.device)
            synops = (mean * fans[key]).sum()
            activity.synops[name] = activity.synops[name] + synops if name in activity.synops else synops

    def joined(name: str, layer: Afferents, inputs: tuple[Tensor, ...]) -> None:
        for branch, spikes in zip(layer.branches, inputs, strict=True):
            received(name, branch, spikes)

    handles = []
    for path, found in module.named_modules():
        if isinstance(found, Spike):
            handles.append(found.register_forward_hook(lambda _m, _i, out, name=path: fired(name, out)))
        elif isinstance(found, Afferents):  # it does not call its branches' forward
            handles.append(found.register_forward_pre_hook(lambda m, xs, name=path: joined(name, m, xs)))
        elif isinstance(found, IntConv2d | IntLinear | torch.nn.MaxPool2d):
            handles.append(found.register_forward_pre_hook(lambda m, xs, name=path: received(name, m, xs[0])))
    try:
        yield activity
    finally:
        for handle in handles:
            handle.remove()


def fan_out(layer: Any, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """How many synapses of `layer` (an integer layer or max pooling) each value of its input [C, H, W] or [N] has.

    It is the gradient of the sum over a layer whose weights are all one.
    """
    with torch.enable_grad(), torch.autocast(torch.device(device).type, enabled=False):
        x = torch.zeros((1, *shape), device=device, requires_grad=True)
        if isinstance(layer, torch.nn.MaxPool2d):
            out = F.avg_pool2d(x, layer.kernel_size, layer.stride, layer.padding, divisor_override=1)
        else:
            out = layer._synapses(x, torch.ones_like(layer.weight, dtype=x.dtype, device=device), None)
        return torch.autograd.grad(out.sum(), x)[0][0]
