"""The integer layers and the surrogates: what the forward pass computes with, and what the gradient is."""

import pytest
import torch

from s3nn_deploy import nn
from s3nn_deploy.errors import DeployError
from s3nn_deploy.surrogate import KAPPA, SURROGATES, antlr, s2nn, sigmoid, spike, straight_through, theta_u2


def test_s2nn_has_the_published_values() -> None:
    x = torch.tensor([-2, -1, -0.5, -0.25, 0, 0.5, 1, 3], dtype=torch.float64)
    want = torch.tensor([0.0013410, 0.0706508, 0.4199743, 0.7864477, 1.0, 0.6666667, 0.5, 0.25], dtype=torch.float64)
    assert torch.equal((s2nn(x) * 1e7).round(), (want * 1e7).round())


def test_the_other_reductions_have_the_values_of_their_formulas() -> None:
    silent, fired = torch.tensor([-2, -0.5, -0.25]).double(), torch.tensor([0, 1, 3]).double()
    u = torch.tensor([1, 2, 4]).double()
    assert torch.equal(theta_u2(silent), s2nn(silent))
    assert torch.equal(theta_u2(fired), 1 / u**2)
    assert torch.equal(antlr(silent), sigmoid(silent))
    assert torch.equal(antlr(fired), sigmoid(fired) + KAPPA / u)
    assert 0 < KAPPA < 1
    assert straight_through(torch.tensor([-1.0, -0.9, 0, 0.9, 1.0])).tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize("name", SURROGATES)
def test_a_spike_is_a_step_forward_and_the_surrogate_backward(name: str) -> None:
    x = torch.linspace(-3, 5, 33, requires_grad=True)
    fired = spike(x, 1.0, name)
    assert torch.equal(fired, (x >= 1).float())
    fired.sum().backward()
    assert torch.equal(x.grad, SURROGATES[name](x.detach() - 1))
    assert torch.isfinite(SURROGATES[name](torch.tensor([-1.0, -1e30, 1e30]))).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("step", nn.STEPS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_the_forward_pass_uses_integers_of_the_stated_width(bits: int, step: str, training: bool) -> None:
    torch.manual_seed(bits)
    layer = nn.IntConv2d(3, 5, 3, bits=bits, step=step).train(training)
    weight = layer.integer_weight(layer.step())
    largest = max(2 ** (bits - 1) - 1, 1)
    assert torch.equal(weight, weight.round())
    assert weight.abs().max() <= largest
    assert weight.unique().numel() == 2 if bits == 1 else weight.abs().max() >= largest - 1
    x = torch.randint(0, 256, (2, 3, 7, 7)).float()
    u = layer.sums(x, layer.step())
    want = torch.nn.functional.conv2d(x.double(), weight.double(), layer.integer_bias(layer.step()).double())
    assert torch.equal(u.double(), want)
    assert torch.equal(layer(x), u * layer.step().reshape(-1, 1, 1))


def test_the_gradient_passes_straight_through() -> None:
    layer = nn.IntLinear(4, 3, bits=8)
    x = torch.randint(0, 2, (6, 4)).float()
    layer(x).sum().backward()
    plain = torch.nn.Linear(4, 3)
    plain(x).sum().backward()
    assert (layer.weight.grad - plain.weight.grad).abs().max() < 1e-5 * plain.weight.grad.abs().max()


def test_a_silent_channel_has_a_step_of_one_and_zero_weights() -> None:
    layer = nn.IntLinear(4, 2)
    layer.weight.data[0] = 0
    assert layer.step()[0] == 1
    assert not layer.integer_weight(layer.step())[0].any()


def test_a_learned_step_has_the_gradient_of_lsq() -> None:
    torch.manual_seed(0)
    for bits in (8, 3, 2):
        layer = nn.IntLinear(6, 4, bias=False, bits=bits, step="learned")
        layer.set_step("learned", layer.step().detach() * 0.7)
        x = torch.randint(0, 2, (5, 6)).float()
        layer(x).sum().backward()
        q, s = layer.largest, layer.step().detach()
        v = layer.weight.detach() / s[:, None]
        each = torch.where(v.abs() < q, v.round() - v, v.sign() * q)  # LSQ, equation 3
        want = (each * x.sum(0)).sum(1) * s / (6 * q) ** 0.5
        assert (layer.log_step.grad - want).abs().max() < 1e-4
        assert (v.abs() > q).any()


def test_a_step_moves_between_its_kinds_and_survives_a_state_dict() -> None:
    torch.manual_seed(0)
    layer = nn.IntConv2d(2, 3, 3, bits=4)
    assert set(layer.state_dict()) == {"weight", "bias"}
    rule = layer.step()
    layer.set_step("fixed")
    layer.weight.data *= 2
    assert torch.equal(layer.step(), rule)
    copy = nn.IntConv2d(2, 3, 3, bits=4, step="fixed")
    copy.load_state_dict(layer.state_dict())
    assert torch.equal(copy.step(), rule)
    layer.set_step("learned", torch.tensor([1.0, 2.0, 4.0]))
    assert set(layer.state_dict()) == {"weight", "bias", "log_step"}
    copy = nn.IntConv2d(2, 3, 3, bits=4, step="learned")
    copy.load_state_dict(layer.state_dict())
    x = torch.randint(0, 16, (2, 2, 5, 5)).float()
    assert torch.equal(copy(x), layer(x))
    layer.set_step("rule")
    assert torch.equal(layer.step(), rule * 2)
    shared = nn.IntLinear(4, 3, per_channel=False, step="learned")
    assert shared.log_step.shape == (1,)
    assert shared.step().unique().numel() == 1


def test_one_shared_step_makes_the_argmax_that_of_the_integers() -> None:
    layer = nn.IntLinear(4, 3, per_channel=False)
    assert layer.step().unique().numel() == 1


def test_afferents_share_one_step_and_sum_integers() -> None:
    join = nn.Afferents(nn.IntConv2d(2, 4, 3, padding=1), nn.IntConv2d(4, 4, 1, groups=4))
    a, b = torch.randint(0, 2, (3, 2, 5, 5)).float(), torch.randint(0, 2, (3, 4, 5, 5)).float()
    step = torch.stack([branch.step() for branch in join.branches]).amax(0)
    u = join(a, b).double() / step.double().reshape(-1, 1, 1)
    assert (u - u.round()).abs().max() < 1e-3
    join(a, b).sum().backward()
    assert all(branch.weight.grad is not None for branch in join.branches)


def test_float_afferents_are_the_sum_of_their_branches() -> None:
    a, b = torch.nn.Linear(4, 3), torch.nn.Linear(2, 3)
    x, y = torch.rand(5, 4), torch.rand(5, 2)
    assert torch.equal(nn.Afferents(a, b)(x, y), a(x) + b(y))
    with pytest.raises(DeployError, match="IntLinear, Linear"):
        nn.Afferents(nn.IntLinear(4, 3), b)
    with pytest.raises(DeployError, match="got none"):
        nn.Afferents()


@pytest.mark.parametrize(("channels", "stride"), [(4, 1), (6, 2), (6, 1)])
def test_a_residual_block_carries_spikes_and_is_three_projections(channels: int, stride: int) -> None:
    block = nn.Residual(4, channels, stride, bits=4, step="learned")
    s = torch.randint(0, 2, (3, 4, 7, 8)).float()
    out = block(s)
    assert out.shape == (3, channels, -(-7 // stride), -(-8 // stride))
    assert set(out.unique().tolist()) <= {0.0, 1.0}
    shortcut = block.join.branches[1]
    assert shortcut.groups == (4 if (channels, stride) == (4, 1) else 1)
    assert shortcut.bits == 4


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(DeployError, match="1 to 8"):
        nn.IntLinear(3, 3, bits=9)
    with pytest.raises(DeployError, match="Did you mean 'learned'"):
        nn.IntLinear(3, 3, step="learnt")
    for values in (torch.tensor([1.0, 0.0, 1.0]), torch.ones(2)):
        with pytest.raises(DeployError, match="positive values of shape"):
            nn.IntLinear(3, 3).set_step("fixed", values)
    with pytest.raises(DeployError, match="Did you mean 's2nn'"):
        nn.Spike("s2n")
    with pytest.raises(DeployError, match="groups=c"):
        nn.Afferents(nn.IntLinear(3, 3), torch.nn.Identity())
    with pytest.raises(DeployError, match="2 inputs"):
        nn.Afferents(nn.IntLinear(3, 3), nn.IntLinear(3, 3))(torch.zeros(1, 3))
