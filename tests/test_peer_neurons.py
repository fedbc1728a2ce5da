"""Neurons of other packages at one step, where those packages are installed: their first step is what they are."""

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from modules import unsettle
from nets import assert_same, samples

from s3nn_deploy import nn
from s3nn_deploy.backends import pytorch, reference
from s3nn_deploy.capture import capture
from s3nn_deploy.conversion import conversion
from s3nn_deploy.errors import DeployError

SNNTORCH, NORSE = "snntorch", "norse.torch"
NEURON, SURROGATE = "spikingjelly.activation_based.neuron", "spikingjelly.activation_based.surrogate"

ONE_STEP: dict[str, tuple[str, Callable[[Any], torch.nn.Module]]] = {
    "snnTorch Leaky": (SNNTORCH, lambda p: p.Leaky(beta=0.9, init_hidden=True)),
    "snnTorch Leaky, state returned": (SNNTORCH, lambda p: p.Leaky(beta=0.9, reset_mechanism="zero")),
    "snnTorch Leaky, learned": (SNNTORCH, lambda p: p.Leaky(0.9, 0.7, learn_beta=True, learn_threshold=True)),
    "snnTorch Lapicque": (SNNTORCH, lambda p: p.Lapicque(beta=0.9)),
    "snnTorch Synaptic": (SNNTORCH, lambda p: p.Synaptic(alpha=0.9, beta=0.8)),
    "Norse IAFCell": (NORSE, lambda p: p.IAFCell()),
    "Norse LIFBoxCell": (NORSE, lambda p: p.LIFBoxCell()),
    "Norse LIFCell": (NORSE, lambda p: p.LIFCell()),
    "SpikingJelly IFNode": (NEURON, lambda p: p.IFNode()),
    "SpikingJelly IFNode, soft reset": (NEURON, lambda p: p.IFNode(v_threshold=0.5, v_reset=None)),
    "SpikingJelly IFNode, resting elsewhere": (NEURON, lambda p: p.IFNode(v_reset=-0.25)),
    "SpikingJelly IFNode, S2NN": (NEURON, lambda p: p.IFNode(surrogate_function=import_module(SURROGATE).S2NN())),
    "SpikingJelly LIFNode": (NEURON, lambda p: p.LIFNode(tau=3.0)),
    "SpikingJelly LIFNode, input undecayed": (NEURON, lambda p: p.LIFNode(decay_input=False, v_reset=0.125)),
    "SpikingJelly S2NN": (SURROGATE, lambda p: p.S2NN()),
    "SpikingJelly ATan": (SURROGATE, lambda p: p.ATan()),
}

OTHERWISE: dict[str, tuple[str, Callable[[Any], torch.nn.Module], str]] = {
    "snnTorch Alpha": (SNNTORCH, lambda p: p.Alpha(alpha=0.9, beta=0.8), "subtracts a value"),
    "SpikingJelly, many steps": (NEURON, lambda p: p.IFNode(step_mode="m"), "takes a part"),
    "SpikingJelly QIFNode": (NEURON, lambda p: p.QIFNode(), "sj_qif.*fused neuron cannot be seen through"),
}


def _package(name: str) -> Any:
    if "S3NN_NEURONS_REQUIRED" in os.environ:
        return import_module(name)
    return pytest.importorskip(name, reason=f"runs where {name.partition('.')[0]} is installed")


class _Net(torch.nn.Module):
    def __init__(self, neuron: torch.nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.neuron = nn.IntConv2d(1, 3, 3), torch.nn.BatchNorm2d(3), neuron
        self.readout = nn.IntLinear(48, 3, per_channel=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fired = self.neuron(self.norm(self.conv(x)))
        return self.readout((fired[0] if isinstance(fired, tuple) else fired).flatten(1))


def _net(neuron: torch.nn.Module) -> _Net:
    torch.manual_seed(0)
    net = _Net(neuron)
    unsettle(net.norm, 0, net.conv(torch.randint(0, 256, (16, 1, 6, 6)).float()).detach())
    net.norm.weight.data *= 8
    return net.eval()


@pytest.mark.parametrize("name", ONE_STEP)
def test_the_first_step_of_another_package_s_neuron_converts(name: str) -> None:
    package, make = ONE_STEP[name]
    neurons = _package(package)
    converted = conversion(capture(_net(make(neurons)), (1, 6, 6)))
    assert not converted.ambiguous
    x = samples(converted.net, 24)
    want = reference.run(converted.net, x)
    fired = want.spikes[converted.net.populations[0].name]
    assert 0 < fired.mean() < 1
    assert_same(pytorch.run(converted, x), want)
    with torch.no_grad():
        theirs = _net(make(neurons))(torch.from_numpy(x).float())
        assert torch.equal(theirs, converted.program(torch.from_numpy(x).float()))


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_neuron_whose_first_step_is_not_known_is_refused(name: str) -> None:
    package, make, problem = OTHERWISE[name]
    net = _net(make(_package(package)))
    with pytest.raises(DeployError, match=problem):
        capture(net, (1, 6, 6))
