"""Converting a torch module: the integer network gives the module's own spikes and integers."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modules import Residual, random_module, unsettle
from nets import assert_same, samples

import s3nn_deploy as s3
from s3nn_deploy import nn
from s3nn_deploy.backends import pytorch, reference
from s3nn_deploy.capture import capture
from s3nn_deploy.conversion import conversion
from s3nn_deploy.errors import DeployError
from s3nn_deploy.intnet import Conv2d
from s3nn_deploy.model import load_model
from s3nn_deploy.program import from_plain, to_plain
from s3nn_deploy.proof import prove


def outputs(module: torch.nn.Module, x: np.ndarray) -> torch.Tensor:
    with torch.no_grad(), torch.backends.nnpack.flags(enabled=False):
        dtype = next(t.dtype for t in [*module.parameters(), *module.buffers()] if t.is_floating_point())
        return module(torch.from_numpy(x).to(dtype))


def agree(module: torch.nn.Module, shape: tuple[int, ...], bits: int, seed: int = 0) -> None:
    """The program runs as the module does, the integer network as the program, and no channel stays ambiguous."""
    program = capture(module, shape, bits)
    converted = conversion(program)
    x = samples(converted.net, 24, seed)
    assert torch.equal(outputs(module, x), outputs(program, x))
    ours = pytorch.run(converted, x)
    assert_same(reference.run(converted.net, x), ours)
    again = conversion(converted.program, harden=False)
    assert again.net == converted.net
    assert not again.ambiguous
    if not converted.ambiguous:
        assert np.array_equal(ours.readout, reference.run(converted.net, x).readout)
        hardened = outputs(converted.program, x)
        assert torch.equal(hardened, outputs(module, x))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10**6))
def test_random_modules_convert_to_equal_networks(seed: int) -> None:
    agree(*random_module(seed), seed)


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
def test_residual_joins_become_second_projections(bits: int) -> None:
    torch.manual_seed(bits)
    module = unsettle(Residual(bits=bits), bits, torch.randint(0, 256, (16, 2, 7, 9)).float())
    agree(module, (2, 7, 9), 8)
    net = s3.convert(module, (2, 7, 9))
    assert [len(p.projections) for p in net.populations] == [1, 1, 2, 1, 2, 1]


def test_float64_modules_convert() -> None:
    torch.manual_seed(0)
    module = unsettle(Residual().double(), 0, torch.randint(0, 256, (16, 2, 7, 9)).double())
    agree(module, (2, 7, 9), 8)


def test_negative_gamma_negates_the_filter_and_zero_gamma_is_constant() -> None:
    module = torch.nn.Sequential(
        nn.IntLinear(3, 3, bias=False), torch.nn.BatchNorm1d(3), nn.Spike(), nn.IntLinear(3, 2, per_channel=False)
    ).eval()
    module[1].weight.data = torch.tensor([1.0, -1.0, 0.0])
    module[1].bias.data = torch.tensor([0.5, 0.5, 1.0])
    net = s3.convert(module, (3,), 8)
    weight = module[0].integer_weight(module[0].step()).detach().numpy()
    first = net.populations[0]
    assert np.array_equal(first.projections[0].synapses.weight, weight * [[1], [-1], [1]])
    assert np.all(reference.run(net, samples(net)).spikes["layer0"][:, 2])
    agree(module, (3,), 8)


def test_max_pooling_is_a_population_of_ones() -> None:
    module = torch.nn.Sequential(
        nn.IntConv2d(1, 2, 3), nn.Spike(), torch.nn.MaxPool2d(2), torch.nn.Flatten(), nn.IntLinear(8, 2)
    ).eval()
    pool = s3.convert(module, (1, 6, 6)).populations[1]
    assert isinstance(pool.projections[0].synapses, Conv2d)
    assert np.all(pool.projections[0].synapses.weight == 1)
    assert pool.threshold.tolist() == [1, 1]


def test_a_program_survives_plain_data() -> None:
    module, shape, bits = random_module(5)
    program = capture(module, shape, bits)
    copy = from_plain(to_plain(program))
    x = torch.randint(0, 1 << bits, (8, *shape)).float()
    assert torch.equal(copy(x), program(x))
    assert conversion(copy).net == conversion(program).net


class _Functional(torch.nn.Module):
    """The same layers spelled with functions, shapes asked for, and containers nested."""

    def __init__(self, flatten: str) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleDict(
            {"a": torch.nn.Sequential(nn.IntConv2d(1, 4, 3, padding="same"), torch.nn.BatchNorm2d(4), nn.Spike())}
        )
        self.readout, self.flatten = nn.IntLinear(4 * 3 * 3, 3, per_channel=False), flatten

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.dropout(self.parts["a"](x), 0.5, self.training)
        if x.shape[-1] > 3:
            x = torch.nn.functional.max_pool2d(x, (2, 2))
        x = {
            "view": lambda: x.view(x.shape[0], -1),
            "reshape": lambda: x.reshape(len(x), 36),
            "flatten": lambda: x.flatten(1),
            "torch": lambda: torch.flatten(x, start_dim=1),
            "module": lambda: torch.nn.Flatten()(x),
        }[self.flatten]()
        return self.readout(x)


@pytest.mark.parametrize("spelling", ["view", "reshape", "flatten", "torch", "module"])
def test_flatten_in_every_spelling(spelling: str) -> None:
    torch.manual_seed(0)
    agree(_Functional(spelling).eval(), (1, 6, 6), 8)


def bad(*layers: torch.nn.Module, shape: tuple[int, ...] = (1, 6, 6)) -> str:
    with pytest.raises(DeployError) as error:
        s3.convert(torch.nn.Sequential(*layers), shape)
    return str(error.value)


def test_what_cannot_be_placed_is_refused_with_its_path_and_the_way_out() -> None:
    spiking = (nn.IntConv2d(1, 2, 3), nn.Spike())
    assert "'1', relu" in bad(nn.IntConv2d(1, 2, 3), torch.nn.ReLU())
    assert "nn.Spike as the activation" in bad(nn.IntConv2d(1, 2, 3), torch.nn.ReLU())
    assert "not integers" in bad(torch.nn.Conv2d(1, 2, 3), nn.Spike(), torch.nn.Flatten(), nn.IntLinear(32, 2))
    assert "membrane potentials, not spikes" in bad(nn.IntConv2d(1, 2, 3), nn.IntConv2d(2, 2, 3))
    assert "ends in spikes" in bad(*spiking)
    assert "logical OR" in bad(
        nn.IntConv2d(1, 2, 3), torch.nn.MaxPool2d(2), nn.Spike(), torch.nn.Flatten(), nn.IntLinear(8, 2)
    )
    assert "ceil_mode" in bad(*spiking, torch.nn.MaxPool2d(2, ceil_mode=True))
    assert "scales or shifts spikes" in bad(*spiking, torch.nn.BatchNorm2d(2), torch.nn.Flatten(), nn.IntLinear(32, 2))
    assert "spikes already" in bad(*spiking, nn.Spike())
    assert "ends in spikes" in bad(*spiking, torch.nn.AvgPool2d(2))
    assert "Flatten it before" in bad(*spiking, nn.IntLinear(4, 2))


def test_branches_scaled_separately_are_refused() -> None:
    class Sum(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.IntLinear(3, 3), nn.IntLinear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) + self.b(x)

    assert "nn.Afferents" in bad(Sum(), shape=(3,))


def test_nan_and_sums_beyond_float32_are_refused_by_name() -> None:
    module = torch.nn.Sequential(nn.IntLinear(3, 3), torch.nn.BatchNorm1d(3), nn.Spike(), nn.IntLinear(3, 2))
    module[1].weight.data[1] = float("nan")
    with pytest.raises(DeployError, match="module '1', batch_norm: has a weight that is NaN"):
        s3.convert(module, (3,))
    wide = torch.nn.Sequential(nn.IntLinear(600, 3, bias=False), nn.Spike(), nn.IntLinear(3, 2)).eval()
    wide[0].weight.data[:] = 1.0
    with pytest.raises(DeployError, match=r"'layer0'.*below 16,777,216.*up to 19,431,000"):
        s3.convert(wide, (600,))
    with pytest.raises(DeployError, match=r"IntLinear.*sums below 16,777,216"):
        wide(torch.full((1, 600), 255.0))
    assert s3.convert(wide.double(), (600,)).readout.size == 2


def test_an_ambiguous_channel_is_hardened_or_refused() -> None:
    module = torch.nn.Sequential(
        nn.IntLinear(2, 2, bias=False), torch.nn.BatchNorm1d(2), nn.Spike(), nn.IntLinear(2, 2)
    ).eval()
    module[0].weight.data = torch.tensor([[127.0, 3.0], [127.0, 5.0]])
    module[1].running_mean[:] = torch.tensor([100.0, 100.5])  # channel 0 switches exactly at u = 100
    module[1].bias.data[:] = 1.0
    with pytest.raises(DeployError, match=r"channels 0 switch within float rounding"):
        s3.convert(module, (2,), harden=False)
    converted = conversion(capture(module, (2,)))
    assert converted.ambiguous == {"layer0": (0,)}
    assert converted.net.populations[0].threshold.tolist() == [100, 101]
    agree(module, (2,), 8)


def test_hardened_channels_stay_named_in_the_file_and_in_the_proof(tmp_path: Path) -> None:
    module = torch.nn.Sequential(
        nn.IntLinear(2, 2, bias=False), torch.nn.BatchNorm1d(2), nn.Spike(), nn.IntLinear(2, 2)
    )
    module.eval()[0].weight.data = torch.tensor([[127.0, 3.0], [127.0, 5.0]])
    module[1].running_mean[:] = torch.tensor([100.5, 100.0])
    module[1].bias.data[:] = 1.0
    saved = load_model(s3.save_model(module, tmp_path / "model.pt", input_shape=(2,)))
    assert not saved.ambiguous
    assert saved.net.provenance["hardened"] == {"layer0": [1]}
    assert [p.hardened for p in prove(saved.net, saved).populations] == [(1,), ()]
    hostile = replace(saved.net, provenance={"hardened": {"layer0": {"1": None}}})
    assert [p.hardened for p in prove(hostile).populations] == [(), ()]


def test_a_module_is_left_as_it_was() -> None:
    module = torch.nn.Sequential(
        nn.IntLinear(3, 3), torch.nn.BatchNorm1d(3), nn.Spike(), torch.nn.Dropout(), nn.IntLinear(3, 2)
    ).train()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    s3.convert(module, (3,))
    assert all(m.training for m in module.modules())
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


class Calls(torch.nn.Module):
    """A module whose forward is a given function of its parts and the input."""

    def __init__(self, forward: object, **parts: torch.nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(self, x)


def trained(module: torch.nn.Module, shape: tuple[int, ...], seed: int = 0, top: int = 256) -> torch.nn.Module:
    torch.manual_seed(seed)
    return unsettle(module, seed, torch.randint(0, top, (16, *shape)).float())


def conv_block(i: int, o: int, **options: object) -> torch.nn.Sequential:
    return torch.nn.Sequential(nn.IntConv2d(i, o, 3, padding=1, **options), torch.nn.BatchNorm2d(o), nn.Spike())


POOLS = {
    "avg": torch.nn.AvgPool2d(2),
    "avg overlapping": torch.nn.AvgPool2d((2, 4), stride=(1, 2)),
    "avg padded": torch.nn.AvgPool2d(4, stride=2, padding=1),
    "sum": Calls(lambda _, x: torch.nn.functional.avg_pool2d(x, 3, divisor_override=1)),
    "global": torch.nn.AdaptiveAvgPool2d(1),
    "adaptive": torch.nn.AdaptiveAvgPool2d((2, None)),
    "mean": Calls(lambda _, x: x.mean((2, 3))),
    "mean kept": Calls(lambda _, x: torch.mean(x, dim=(-1, -2), keepdim=True).squeeze()),
    "total": Calls(lambda _, x: x.sum((2, 3))),
    "global or": torch.nn.AdaptiveMaxPool2d(1),
    "amax": Calls(lambda _, x: x.amax((2, 3))),
    "dilated or": torch.nn.MaxPool2d(2, stride=1, dilation=2),
}


@pytest.mark.parametrize("pool", POOLS)
def test_pooling_before_a_readout(pool: str) -> None:
    head = torch.nn.Sequential(conv_block(2, 3), POOLS[pool], torch.nn.Flatten())
    features = head.eval()(torch.zeros(2, 2, 4, 8)).shape[1]
    module = trained(torch.nn.Sequential(head, nn.IntLinear(features, 4, per_channel=False)), (2, 4, 8))
    agree(module, (2, 4, 8), 8)


@pytest.mark.parametrize("padding", [0, 1])
def test_average_pooling_before_a_convolution_is_one_kernel(padding: int) -> None:
    pool, conv = (
        torch.nn.AvgPool2d(2),
        nn.IntConv2d(3, 4, (3, 2), padding=padding, stride=(1, 2), dilation=(1, 2), groups=1),
    )
    tail = [pool, conv, torch.nn.BatchNorm2d(4), nn.Spike(), torch.nn.Flatten()]
    head = torch.nn.Sequential(conv_block(2, 3), *tail)
    features = head.eval()(torch.zeros(2, 2, 8, 12)).shape[1]
    module = trained(torch.nn.Sequential(head, nn.IntLinear(features, 4)), (2, 8, 12))
    agree(module, (2, 8, 12), 8)
    kernel = s3.convert(module, (2, 8, 12)).populations[1].projections[0].synapses
    assert kernel.weight.shape[2:] == (6, 6)


def test_averages_that_floats_do_not_hold_are_refused() -> None:
    head = (nn.IntConv2d(1, 2, 1), nn.Spike(), torch.nn.AvgPool2d(3), torch.nn.Flatten(), nn.IntLinear(8, 2))
    assert "sum pooling" in bad(*head)
    overlapping = (nn.IntConv2d(1, 2, 1), nn.Spike(), torch.nn.AvgPool2d(2, stride=1), nn.IntConv2d(2, 2, 3, padding=1))
    assert "overlapping" in bad(*overlapping)


def test_concatenated_spikes_are_several_projections() -> None:
    def forward(m: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        a, b = m.a(x), m.b(x)
        both = torch.nn.functional.max_pool2d(torch.cat((a, b), 1), 2)
        return m.readout(torch.cat([m.c(both), both], dim=1).flatten(1))

    module = Calls(
        forward,
        a=conv_block(1, 2),
        b=conv_block(1, 3),
        c=conv_block(5, 4),
        readout=nn.IntLinear(81, 3, per_channel=False),
    )
    module = trained(module, (1, 6, 6))
    agree(module, (1, 6, 6), 8)
    assert [len(p.projections) for p in s3.convert(module, (1, 6, 6)).populations] == [1, 1, 1, 1, 2, 3]


def test_a_pre_activation_network_with_one_step_throughout() -> None:
    class PreActivation(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.IntConv2d(1, 4, 3, padding=1, bias=False)
            self.convs = torch.nn.ModuleList(nn.IntConv2d(4, 4, 3, padding=1, bias=False, bits=b) for b in (8, 4, 3))
            self.norms = torch.nn.ModuleList(torch.nn.BatchNorm2d(4) for _ in range(4))
            self.spike, self.readout = nn.Spike(), nn.IntLinear(4 * 36, 3, per_channel=False)
            nn.share_step(self.stem, *self.convs)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            u = self.stem(x)
            for conv, norm in zip(self.convs, self.norms, strict=False):
                u = u + conv(self.spike(norm(u)))
            return self.readout(self.spike(self.norms[3](u)).flatten(1))

    module = trained(PreActivation(), (1, 6, 6))
    steps = [layer.step() for layer in (module.stem, *module.convs)]
    assert all(torch.equal(step, steps[0]) for step in steps)
    converted = conversion(capture(module, (1, 6, 6)))
    x = samples(converted.net, 40)
    assert_same(reference.run(converted.net, x), pytorch.run(converted, x))
    assert [len(p.projections) for p in converted.net.populations] == [1, 2, 3, 4, 1]
    with pytest.raises(DeployError, match="same number of outputs"):
        nn.share_step(nn.IntLinear(3, 3), nn.IntLinear(3, 4))


@pytest.mark.parametrize("wrong", [False, True])
def test_a_pre_activation_stream_is_read_by_several_populations(wrong: bool) -> None:
    """u1 = a(x); u2 = u1 + b(s(bn(u1))): the stream's projections appear in every population that reads it."""
    a, b = nn.IntConv2d(1, 4, 3, padding=1, bias=False), nn.IntConv2d(4, 4, 3, padding=1, bias=False)
    if not wrong:
        b.weight.data = b.weight.data.abs().clamp(max=1)
        scale = a.weight.detach().abs().flatten(1).amax(1)
        b.weight.data[:, 0, 0, 0] = scale
        b.weight.data[:, 1:] = torch.minimum(b.weight.data[:, 1:], scale.reshape(-1, 1, 1, 1))
        b.weight.data[:, 0] = torch.minimum(b.weight.data[:, 0], scale.reshape(-1, 1, 1))

    def forward(m: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        u = m.a(x)
        u = u + m.b(m.spike(m.bn1(u)))
        return m.readout(m.spike(m.bn2(u)).flatten(1))

    parts = {"a": a, "b": b, "bn1": torch.nn.BatchNorm2d(4), "bn2": torch.nn.BatchNorm2d(4), "spike": nn.Spike()}
    module = trained(Calls(forward, **parts, readout=nn.IntLinear(4 * 36, 3, per_channel=False)), (1, 6, 6))
    if wrong:
        with pytest.raises(DeployError, match=r"nn\.Afferents"):
            s3.convert(module, (1, 6, 6))
        return
    converted = conversion(capture(module, (1, 6, 6)))
    x = samples(converted.net, 24)
    assert_same(reference.run(converted.net, x), pytorch.run(converted, x))
    assert [len(p.projections) for p in converted.net.populations] == [1, 2, 1]


def test_spikes_are_added_to_an_unscaled_sum_as_an_identity() -> None:
    def forward(m: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        s = m.a(x)
        step = m.b.step()
        return m.readout(m.spike(m.bn(m.b.sums(s, step) + s)).flatten(1))

    parts = {
        "a": conv_block(1, 4),
        "b": nn.IntConv2d(4, 4, 3, padding=1),
        "bn": torch.nn.BatchNorm2d(4),
        "spike": nn.Spike(),
    }
    module = trained(Calls(forward, **parts, readout=nn.IntLinear(4 * 36, 3)), (1, 6, 6))
    agree(module, (1, 6, 6), 8)
    assert s3.convert(module, (1, 6, 6)).populations[1].projections[1].synapses.groups == 4


@pytest.mark.parametrize("spelling", ["divide", "normalise", "batch norm"])
@pytest.mark.parametrize("padding", [0, 1])
def test_a_scaling_of_the_input_is_absorbed(spelling: str, padding: int) -> None:
    scalings = {
        "divide": lambda m, x: x / 255,
        "normalise": lambda m, x: (x.float() / 255 - torch.tensor([0.1, 0.2]).view(1, 2, 1, 1)) / 0.3,
        "batch norm": lambda m, x: m.norm(x),
    }
    norm = torch.nn.BatchNorm2d(2, affine=False).eval()
    norm.running_mean[:], norm.running_var[:] = torch.tensor([100.0, 120.0]), 50.0
    conv = torch.nn.Sequential(
        nn.IntConv2d(2, 4, 3, padding=padding), torch.nn.BatchNorm2d(4), nn.Spike(), torch.nn.Flatten()
    )
    side = 4 + 2 * padding
    readout = nn.IntLinear(4 * side * side, 3)
    module = Calls(lambda m, x: m.readout(m.conv(scalings[spelling](m, x))), conv=conv, readout=readout)
    trained(module.conv, (2, 6, 6), top=2)
    module.norm = norm
    if padding and spelling != "divide":
        with pytest.raises(DeployError, match="pads with zeros an input whose mean was subtracted"):
            s3.convert(module.eval(), (2, 6, 6))
        return
    converted = conversion(capture(module.eval(), (2, 6, 6)))
    x = samples(converted.net, 40)
    ours = pytorch.run(converted, x)
    assert_same(reference.run(converted.net, x), ours)
    if not converted.ambiguous:
        with torch.no_grad():
            theirs = module.conv(scalings[spelling](module, torch.from_numpy(x).float())).numpy().astype(bool)
        assert np.array_equal(ours.spikes["conv.0"].reshape(len(x), -1), theirs)


def test_channels_scaled_differently_are_refused() -> None:
    layer = torch.nn.Sequential(nn.IntConv2d(2, 2, 3), nn.Spike(), torch.nn.Flatten(), nn.IntLinear(32, 2))
    with pytest.raises(DeployError, match="scales the channels differently"):
        s3.convert(Calls(lambda m, x: m.layer(x / torch.tensor([1.0, 2.0]).view(2, 1, 1)), layer=layer), (2, 6, 6))


class _Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return (x > 0).float()

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
        return grad


ACTIVATIONS = {
    "custom function, strict": lambda u: _Custom.apply(u - 1.0),
    "compare": lambda u: (u >= 0.5).to(u.dtype),
    "heaviside": lambda u: torch.heaviside(u - 0.25, torch.tensor(1.0)),
    "heaviside strict": lambda u: torch.heaviside(u, torch.tensor(0.0)),
    "per channel": lambda u: (u > torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)).type_as(u),
    "one step of a leaky neuron with a reset": lambda u: _leaky(u),
    "in place": lambda u: _in_place(u),
}


def _leaky(u: torch.Tensor) -> torch.Tensor:
    membrane = torch.zeros_like(u)
    membrane = membrane + (u - membrane) / 2.0
    fired = (membrane >= 1.0).float()
    membrane = (1 - fired) * membrane  # what no later step sees
    return fired


def _in_place(u: torch.Tensor) -> torch.Tensor:
    v = u * 1.0
    v.mul_(2.0).add_(0.5)
    v -= 0.25
    return (v >= 1).float()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_spikes_in_other_spellings(activation: str) -> None:
    def forward(m: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return m.readout(ACTIVATIONS[activation](m.bn(m.conv(x))).flatten(1))

    module = Calls(forward, conv=nn.IntConv2d(1, 3, 3), bn=torch.nn.BatchNorm2d(3), readout=nn.IntLinear(48, 3))
    agree(trained(module, (1, 6, 6)), (1, 6, 6), 8)


@pytest.mark.parametrize("alike", [True, False])
def test_a_state_that_a_module_makes_for_every_sample_is_a_constant_if_all_samples_have_the_same(alike: bool) -> None:
    def forward(m: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        u = m.bn(m.conv(x))
        state = torch.full(u.shape, 0.25) if alike else torch.rand(u.shape)
        return m.readout((u + state >= 1).float().flatten(1))

    module = Calls(forward, conv=nn.IntConv2d(1, 3, 3), bn=torch.nn.BatchNorm2d(3), readout=nn.IntLinear(48, 3))
    module = trained(module, (1, 6, 6))
    if alike:
        agree(module, (1, 6, 6), 8)
    else:
        with pytest.raises(DeployError, match="other constants for other samples"):
            s3.convert(module, (1, 6, 6))


def test_in_place_changes_that_cannot_be_placed_are_seen() -> None:
    def forward(m: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        u = m.conv(x)
        u.clamp_(-5, 5)
        return m.readout((u >= 1).float().flatten(1))

    with pytest.raises(DeployError, match="clamp"):
        s3.convert(Calls(forward, conv=nn.IntConv2d(1, 3, 3), readout=nn.IntLinear(48, 3)), (1, 6, 6))


@pytest.mark.parametrize("gamma", [1e-30, 1e-6, 1e6, 1e30, -1e-30, -1e30])
@pytest.mark.parametrize("var", [1e-12, 1.0, 1e30])
@pytest.mark.parametrize("beta", [1.0, 0.0])
def test_extreme_batch_norms_are_hardened_without_changing_a_decision(gamma: float, var: float, beta: float) -> None:
    module = torch.nn.Sequential(
        nn.IntLinear(4, 3, bias=False), torch.nn.BatchNorm1d(3), nn.Spike(), nn.IntLinear(3, 2)
    ).eval()
    module[1].weight.data[:], module[1].running_var[:], module[1].bias.data[:] = gamma, var, beta
    module[1].running_mean[:] = torch.tensor([10.0, -3.5, 0.0])
    converted = conversion(capture(module, (4,)))
    x = samples(converted.net, 64)
    assert_same(reference.run(converted.net, x), pytorch.run(converted, x))
    assert not conversion(converted.program, harden=False).ambiguous


def test_a_stream_read_twice_is_hardened_without_touching_the_other_reader() -> None:
    def forward(m: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        u = m.bn(m.conv(x))
        return m.readout(torch.cat(((u >= 1.0).float(), (u >= 0.5).float()), 1).flatten(1))

    module = Calls(forward, conv=nn.IntConv2d(1, 3, 3), bn=torch.nn.BatchNorm2d(3), readout=nn.IntLinear(96, 3))
    agree(trained(module, (1, 6, 6)), (1, 6, 6), 8)
