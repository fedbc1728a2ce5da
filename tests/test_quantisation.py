"""Post-training quantisation: a float network's integer copy converts, is equal everywhere, and keeps its accuracy."""

import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from nets import assert_same

import s3nn_deploy as s3
from s3nn_deploy import data, nn
from s3nn_deploy.backends import pytorch, reference
from s3nn_deploy.capture import capture
from s3nn_deploy.conversion import conversion
from s3nn_deploy.errors import DeployError
from s3nn_deploy.quantisation import quantisation_report, quantise

N = torch.nn
DIGITS = data.load("digits").quantised(4)
CALIBRATION, LABELS = DIGITS.train_x[:256], DIGITS.train_y[:256]


class Residual(N.Module):
    """A float residual network whose join is written as `style` says."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.style = style
        self.stem, self.spike = N.Sequential(N.Conv2d(1, 8, 3, padding=1), N.BatchNorm2d(8)), nn.Spike()
        self.conv1, self.bn1 = N.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), N.BatchNorm2d(16)
        self.conv2, self.bn2 = N.Conv2d(16, 16, 3, padding=1, bias=False), N.BatchNorm2d(16)
        self.shortcut, self.bn_shortcut = N.Conv2d(8, 16, 1, stride=2), N.BatchNorm2d(16)
        self.join = nn.Afferents(self.conv2, self.shortcut)
        self.readout = N.Linear(16 * 16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s = self.spike(self.stem(x))
        t = self.spike(self.bn1(self.conv1(s)))
        match self.style:
            case "afferents":
                u = self.bn2(self.join(t, s))
            case "plus":
                u = self.bn2(self.conv2(t) + self.shortcut(s))
            case _:
                u = self.bn2(self.conv2(t)) + self.bn_shortcut(self.shortcut(s))
        return self.readout(self.spike(u).flatten(1))


class Stream(N.Module):
    """A pre-activation stream: potentials that two blocks add to and that are read before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.spike = N.Conv2d(1, 8, 3, padding=1), nn.Spike()
        self.norms = N.ModuleList(N.BatchNorm2d(8) for _ in range(3))
        self.convs = N.ModuleList(N.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        self.readout = N.Linear(8 * 64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        u = self.stem(x)
        for conv, norm in zip(self.convs, self.norms, strict=False):
            u = u + conv(self.spike(norm(u)))
        return self.readout(self.spike(self.norms[2](u)).flatten(1))


def plain() -> N.Module:
    return N.Sequential(
        *(N.Conv2d(1, 8, 3, padding=1), N.BatchNorm2d(8), nn.Spike(), N.MaxPool2d(2)),
        *(N.Conv2d(8, 16, 3, padding=1, groups=2, bias=False), N.BatchNorm2d(16), nn.Spike(), N.Dropout(0.1)),
        *(N.Flatten(), N.Linear(256, 24), nn.Spike(threshold=0.5), N.Linear(24, 10)),
    )


NETS: Mapping[str, Callable[[], N.Module]] = {
    "plain": plain,
    "afferents": lambda: Residual("afferents"),
    "plus": lambda: Residual("plus"),
    "normalised branches": lambda: Residual("normalised branches"),
    "stream": Stream,
}


@pytest.fixture(scope="module", params=NETS)
def trained(request: pytest.FixtureRequest) -> N.Module:
    """A float network after three epochs."""
    torch.manual_seed(0)
    module = NETS[request.param]().train()
    x, y = torch.from_numpy(DIGITS.train_x).float(), torch.from_numpy(DIGITS.train_y)
    optimiser = torch.optim.AdamW(module.parameters(), lr=4e-3)
    for _ in range(3):
        for batch in torch.randperm(len(x)).split(64):
            optimiser.zero_grad()
            N.functional.cross_entropy(module(x[batch]), y[batch]).backward()
            optimiser.step()
    return module


def right(module: N.Module) -> int:
    with torch.no_grad():
        return int((module.eval()(torch.from_numpy(DIGITS.test_x).float()).argmax(1).numpy() == DIGITS.test_y).sum())


@pytest.mark.parametrize(("bits", "steps"), [(8, "max"), (8, "mse"), (4, "mse"), (3, "mse"), (2, "mse")])
def test_the_copy_is_integer_converts_equals_the_reference_and_keeps_its_accuracy(
    trained: N.Module, bits: int, steps: str
) -> None:
    before = {key: value.clone() for key, value in trained.state_dict().items()}
    module = quantise(trained, CALIBRATION, bits, steps)
    assert all(torch.equal(before[key], value) for key, value in trained.state_dict().items())
    assert not any(isinstance(m, N.Conv2d | N.Linear) for m in module.modules())
    layers = [m for m in module.modules() if isinstance(m, nn.IntConv2d | nn.IntLinear)]
    for layer in layers:
        weight = layer.integer_weight(layer.step())
        assert torch.equal(weight, weight.round())
        assert weight.abs().max() <= 2 ** (bits - 1) - 1
        assert layer.fixed_step is not None
    assert layers[-1].step().unique().numel() == 1
    converted = conversion(capture(module, (1, 8, 8), 4))
    want = reference.run(converted.net, DIGITS.test_x)
    assert_same(want, pytorch.run(converted, DIGITS.test_x))
    drop = {8: 7, 4: 18, 3: 36, 2: 90}[bits]
    assert int((want.predictions == DIGITS.test_y).sum()) >= right(trained) - drop
    assert right(trained) > 290


def test_the_best_step_errs_no_more_than_any_candidate_and_a_single_weight_is_exact() -> None:
    torch.manual_seed(0)
    module = N.Sequential(N.Linear(20, 6, bias=False), nn.Spike(), N.Linear(6, 3)).eval()
    module[0].weight.data[1] = 0
    module[0].weight.data[2] = torch.where(torch.arange(20) == 3, 0.7, 0.0)
    x = np.random.default_rng(0).integers(0, 2, (30, 20))
    errors = {}
    for steps in ("max", "mse"):
        layer = quantise(module, x, 3, steps)[0]
        unit = layer.step()[:, None]
        errors[steps] = (layer.integer_weight(layer.step()) * unit - module[0].weight).square().sum(1)
    assert (errors["mse"] <= errors["max"]).all()
    assert (errors["mse"] < errors["max"]).any()
    assert errors["mse"][1] == 0
    assert errors["mse"][2] < 1e-12


def test_widths_may_differ_by_layer() -> None:
    torch.manual_seed(0)
    module = quantise(plain(), CALIBRATION, {"0": 4, "9": 2})
    widths = {path: m.bits for path, m in module.named_modules() if isinstance(m, nn.IntConv2d | nn.IntLinear)}
    assert widths == {"0": 4, "4": 8, "9": 2, "11": 8}
    net = s3.convert(module, (1, 8, 8), 4)
    assert [int(np.abs(p.projections[0].synapses.weight).max()) for p in net.populations] == [7, 1, 127, 1, 127]


def test_a_bias_before_batch_norm_leaves_no_trace() -> None:
    torch.manual_seed(0)
    module = plain().train()
    with torch.no_grad():
        for _ in range(5):
            module(torch.from_numpy(CALIBRATION).float())
    net = s3.convert(quantise(module, CALIBRATION, 2), (1, 8, 8), 4)
    module[0].bias.data += 0.37
    module[1].running_mean += 0.37
    assert reference.run(net, CALIBRATION).predictions.tolist() == (
        reference.run(s3.convert(quantise(module, CALIBRATION, 2), (1, 8, 8), 4), CALIBRATION).predictions.tolist()
    )


class Scaling(N.Module):
    """x * factor - mean, by channel."""

    def __init__(self, mean: list[float]) -> None:
        super().__init__()
        self.mean, self.factor = (
            torch.tensor(mean).reshape(-1, 1, 1),
            torch.tensor([1 / 255, 1 / 100]).reshape(-1, 1, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor - self.mean


@pytest.mark.parametrize(("mean", "padding", "groups"), [([0.0, 0.0], 1, 1), ([0.3, 0.6], 0, 1), ([0.3, 0.6], 0, 2)])
def test_a_scaling_by_channel_goes_into_the_weights(mean: list[float], padding: int, groups: int) -> None:
    torch.manual_seed(0)
    network = N.Sequential(
        *(N.Conv2d(2, 4, 3, padding=padding, groups=groups), N.BatchNorm2d(4), nn.Spike()),
        *(N.Flatten(), N.Linear(4 * (4 + 2 * padding) ** 2, 5)),
    )
    module = N.Sequential(Scaling(mean), network).train()
    x = np.random.default_rng(0).integers(0, 256, (200, 2, 6, 6))
    with torch.no_grad():
        for _ in range(60):
            module(torch.from_numpy(x).float())
    net = s3.convert(quantise(module, x), (2, 6, 6), 8)
    with torch.no_grad():
        want = module.eval()(torch.from_numpy(x).float()).argmax(1).numpy()
    assert (reference.run(net, x).predictions == want).mean() > 0.95


def test_the_report_counts_what_changes_and_names_the_costliest_layer() -> None:
    torch.manual_seed(0)
    module = plain().train()
    x = torch.from_numpy(DIGITS.train_x).float()
    optimiser = torch.optim.AdamW(module.parameters(), lr=4e-3)
    for batch in torch.arange(len(x)).split(64):
        optimiser.zero_grad()
        N.functional.cross_entropy(module(x[batch]), torch.from_numpy(DIGITS.train_y[batch])).backward()
        optimiser.step()
    bits = {"0": 8, "4": 2, "9": 8, "11": 8}
    report = quantisation_report(module, CALIBRATION, LABELS, bits)
    assert [layer.path for layer in report.layers] == ["0", "4", "9", "11"]
    assert report.costliest.path == "4"
    assert report.samples == 256
    with torch.no_grad():
        quantised = quantise(module, CALIBRATION, bits)(x[:256]).argmax(1).numpy()
        floating = module.eval()(x[:256]).argmax(1).numpy()
    assert report.changed == int((quantised != floating).sum())
    assert report.right_before == int((floating == LABELS).sum())
    assert report.right_after == int((quantised == LABELS).sum())
    assert "accuracy" in next(report.lines())
    assert any("costs most" in line for line in report.lines())
    assert report.plain()["costliest"] == "4"
    assert quantisation_report(module, CALIBRATION, bits=8).right_before is None


def test_what_cannot_be_quantised_is_refused_with_the_way_out() -> None:
    module = plain()
    for arguments, words in (
        ((module, CALIBRATION, 1), "One bit needs training"),
        ((module, CALIBRATION, {"5": 4}), "no such layer"),
        ((module, CALIBRATION, 8, "mes"), "Did you mean 'mse'"),
        ((module, CALIBRATION / 255.0), "integers 0 .. 255"),
        ((module, CALIBRATION[:0]), "N > 0"),
        ((N.Sequential(nn.IntLinear(4, 2)), np.ones((3, 4))), "has no torch.nn.Conv2d"),
        ((N.Sequential(Scaling([0.3, 0.6]), N.Conv2d(2, 3, 3, padding=1)), np.ones((3, 2, 5, 5))), "was subtracted"),
    ):
        with pytest.raises(DeployError, match=words):
            quantise(*arguments)

    class Functional(N.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = N.Parameter(torch.ones(2, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return N.functional.linear(x, self.weight)

    with pytest.raises(DeployError, match=r"instead of torch\.nn\.functional"):
        quantise(Functional(), np.ones((3, 4)))
    with pytest.raises(DeployError, match="shape"):
        quantisation_report(module, CALIBRATION, LABELS[:3])


def test_a_quantised_network_trains_on_with_its_steps_fixed() -> None:
    torch.manual_seed(0)
    module = quantise(plain(), CALIBRATION, 3).train()
    before = module[4].step().clone()
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    x = torch.from_numpy(CALIBRATION).float()
    losses = []
    for _ in range(12):
        loss = N.functional.cross_entropy(module(x), torch.from_numpy(LABELS))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert torch.equal(module[4].step(), before)
    assert s3.convert(module, (1, 8, 8), 4).readout.size == 10


def test_the_python_of_the_document_runs() -> None:
    text = (Path(__file__).resolve().parent.parent / "docs" / "quantisation.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 1
    done = subprocess.run([sys.executable, "-c", blocks[0]], check=True, capture_output=True, text=True)
    assert "costs most" in done.stdout
