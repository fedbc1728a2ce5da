"""Neurons of other packages at one step, where those packages are installed: their first step is what they are."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from modules import unsettle
from nets import assert_same, samples

from s3nn_deploy import nn
from s3nn_deploy.backends import pytorch, reference
from s3nn_deploy.capture import capture
from s3nn_deploy.conversion import conversion


def _snntorch() -> torch.nn.Module:
    return pytest.importorskip("snntorch", reason="runs where snnTorch is installed").Leaky(
        beta=0.9, threshold=1.0, init_hidden=True
    )


def _norse() -> torch.nn.Module:
    return pytest.importorskip("norse.torch", reason="runs where Norse is installed").IAFCell()


def _spikingjelly() -> torch.nn.Module:
    surrogate = pytest.importorskip(
        "spikingjelly.activation_based.surrogate", reason="runs where SpikingJelly is installed"
    )
    return surrogate.S2NN()


class _Net(torch.nn.Module):
    def __init__(self, neuron: torch.nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.neuron = nn.IntConv2d(1, 3, 3), torch.nn.BatchNorm2d(3), neuron
        self.readout = nn.IntLinear(48, 3, per_channel=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fired = self.neuron(self.norm(self.conv(x)))
        return self.readout((fired[0] if isinstance(fired, tuple) else fired).flatten(1))


@pytest.mark.parametrize("make", [_snntorch, _norse, _spikingjelly])
def test_the_first_step_of_another_package_s_neuron_converts(make: Callable[[], torch.nn.Module]) -> None:
    def built() -> torch.nn.Module:
        torch.manual_seed(0)
        net = _Net(make())
        unsettle(net.norm, 0, net.conv(torch.randint(0, 256, (16, 1, 6, 6)).float()).detach())
        return net.eval()

    converted = conversion(capture(built(), (1, 6, 6)))
    x = samples(converted.net, 24)
    want = reference.run(converted.net, x)
    assert_same(pytorch.run(converted, x), want)
    if not converted.ambiguous:
        with torch.no_grad():
            theirs = built()(torch.from_numpy(x).float()).argmax(1).numpy()
        assert np.array_equal(theirs, want.predictions)
