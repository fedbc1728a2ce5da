"""What training says of firing and synaptic operations is what the emulator counts, and both can be trained down."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from modules import Residual, random_module, unsettle

import s3nn_deploy as s3
from s3nn_deploy import data, nn, recipes, twins
from s3nn_deploy.activity import observing
from s3nn_deploy.recipes import Recipe
from s3nn_deploy.train import fit, train

SMALL = ("epochs=4", "layers=[{conv = 12, kernel = 3, padding = 1}, {pool = 2}, {linear = 32}]")


def _counted(module: torch.nn.Module, shape: tuple[int, ...], bits: int) -> None:
    x = torch.randint(0, 2**bits, (7, *shape), generator=torch.Generator().manual_seed(1))
    net = s3.convert(module, shape, bits)
    trace = s3.run(net, x.numpy().astype("uint8"))
    with observing(module) as activity:
        module(x.double())
    if bits > 1:
        assert round(float(activity.total.detach()) * len(x)) == int(trace.counts.total("synops").sum())


@pytest.mark.parametrize("seed", range(12))
def test_synaptic_operations_in_training_are_those_of_the_emulator(seed: int) -> None:
    module, shape, bits = random_module(seed)
    _counted(unsettle(module, seed).double(), shape, bits)


def test_joins_count_every_branch() -> None:
    torch.manual_seed(3)
    module = Residual()
    x = torch.randint(0, 16, (16, 2, 8, 10)).float()
    _counted(unsettle(module, 3, x).double(), (2, 8, 10), 4)


def test_firing_rates_in_training_are_those_of_the_emulator() -> None:
    torch.manual_seed(0)
    module = unsettle(recipes.build(recipes.load("digits-resnet"), (1, 8, 8), 10), 5)
    x = torch.randint(0, 16, (9, 1, 8, 8))
    trace = s3.run(s3.convert(module, (1, 8, 8), 4), x.numpy().astype("uint8"))
    with observing(module) as activity:
        module(x.float())
    assert len(activity.rates) == len(trace.spikes)
    for rate, spikes in zip(activity.rates.values(), trace.spikes.values(), strict=True):
        positions = spikes[:, 0].size
        assert (rate.double() * positions).round().long().tolist() == spikes.sum((0, 2, 3)).tolist()


def test_a_target_for_synaptic_operations_is_trained_down_to(tmp_path: Path) -> None:
    digits, recipe = data.load("digits"), recipes.load("digits-conv", SMALL)
    free = _last(train(recipe, digits, tmp_path / "free.pt").metrics)
    wanted = int(free["synops"] / 3)
    pressed = _last(train(replace(recipe, synops_target=wanted), digits, tmp_path / "pressed.pt").metrics)
    assert pressed["synops"] < 1.3 * wanted
    assert pressed["accuracy"] > 0.5


def test_distillation_trains_the_twin_first_and_learns_from_it(tmp_path: Path) -> None:
    digits = data.load("digits")
    layers = "layers=[{conv = 6, kernel = 3, padding = 1}, {block = 8, stride = 2}]"
    recipe = recipes.load("digits-resnet", ("epochs=2", layers))
    alone = train(recipe, digits, tmp_path / "alone.pt")
    taught = train(replace(recipe, distil=0.5), digits, tmp_path / "taught.pt")
    twin = _lines(tmp_path / "taught.pt.twin.metrics.jsonl")
    assert [(line["twin"], line["synops"], line["rates"]) for line in twin] == [(True, 0.0, {})] * 2
    assert [line["twin"] for line in _lines(taught.metrics)] == [False] * 2
    assert s3.load(alone.path) != s3.load(taught.path)
    assert 36 < s3.load(taught.path).provenance["twin_correct"] <= 360
    left = sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("taught"))
    assert left == ["taught.pt", "taught.pt.metrics.jsonl", "taught.pt.twin.metrics.jsonl"]


def test_twins_share_wiring_and_differ_in_the_neuron(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = recipes.build(recipes.load("digits-resnet"), (1, 8, 8), 10).eval()
    x = torch.randint(0, 16, (9, 1, 8, 8)).float()
    one_step = twins.lif(module, 1).eval()
    assert torch.equal(one_step(x), module(x))
    several = twins.lif(module, 3).eval()
    assert torch.equal(several(x), several(x))
    assert not torch.equal(several(x), module(x))
    seen: list[torch.Tensor] = []
    signs = twins.binary(module).eval()
    for found in signs.modules():
        if isinstance(found, twins.Sign):
            found.register_forward_hook(lambda _m, _i, out: seen.append(out))
    signs(x)
    assert all(set(out.unique().tolist()) <= {-1.0, 1.0} for out in seen)
    widths = [m.bits for m in signs.modules() if hasattr(m, "bits")]
    assert widths == [8, *[1] * (len(widths) - 2), 8]
    assert {m.bits for m in module.modules() if hasattr(m, "bits")} == {8}
    assert not any(isinstance(m, nn.Spike | nn.IntConv2d) for m in twins.relu(module).modules())


@pytest.mark.parametrize("twin", [twins.relu, twins.binary, twins.lif])
def test_twins_train_by_the_same_loop(twin: object, tmp_path: Path) -> None:
    recipe: Recipe = recipes.load("digits-conv", ("epochs=2", *SMALL[1:]))
    torch.manual_seed(0)
    module = twin(recipes.build(recipe, (1, 8, 8), 10))  # type: ignore[operator]
    fit(module, recipe, data.load("digits"), tmp_path / "twin")
    first, last = _lines(tmp_path / "twin.metrics.jsonl")
    assert last["accuracy"] > max(0.3, first["accuracy"])


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _last(path: Path) -> dict:
    return _lines(path)[-1]
