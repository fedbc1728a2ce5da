"""Training: it learns, repeats itself, and goes on after a kill as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import s3nn_deploy as s3
from s3nn_deploy import data, recipes
from s3nn_deploy.activity import fan_out
from s3nn_deploy.errors import DeployError
from s3nn_deploy.model import load_model
from s3nn_deploy.train import Epoch, _optimisers, correct_predictions, health, train

SMALL = ("epochs=5", "layers=[{conv = 12, kernel = 3, padding = 1}, {pool = 2}, {linear = 32}]")
FASTER = ("optimiser=muon", "learning_rate=0.02", "amp=true")


def small(*settings: str) -> recipes.Recipe:
    return recipes.load("digits-conv", (*SMALL, *settings))


def test_a_run_learns_repeats_itself_and_leaves_its_metrics(tmp_path: Path) -> None:
    digits = data.load("digits")
    first = train(small(), digits, tmp_path / "a.pt")
    again = train(small(), digits, tmp_path / "b.pt")
    assert first.accuracy > 0.8
    assert s3.load(first.path) == s3.load(again.path)
    lines = [json.loads(line) for line in first.metrics.read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, 6))
    assert set(lines[0]["rates"]) == {"spike1", "spike3"}
    assert lines[-1]["dead"] == {}
    assert lines[-1]["advice"] == []
    assert not (tmp_path / "a.pt.resume").exists()
    converted = load_model(first.path)
    assert converted.ambiguous == {}
    assert correct_predictions(converted, digits.quantised(4).test_x, digits.test_y) == first.correct
    assert converted.net.provenance["test_correct"] == first.correct


@pytest.mark.parametrize("settings", [SMALL, (*SMALL, *FASTER)], ids=["adamw", "muon-amp"])
def test_resuming_after_a_kill_gives_the_same_weights(settings: tuple[str, ...], tmp_path: Path) -> None:
    out = tmp_path / "killed.pt"
    command = [
        sys.executable,
        "-m",
        "s3nn_deploy.cli",
        "train",
        "digits-conv",
        *(p for s in settings for p in ("--set", s)),
    ]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    subprocess.run([*command, "--out", str(tmp_path / "whole.pt")], check=True, **quiet)
    child = subprocess.Popen([*command, "--out", str(out)], **quiet)
    metrics = Path(f"{out}.metrics.jsonl")
    deadline = time.monotonic() + 60
    while not (metrics.exists() and Path(f"{out}.resume").exists()) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not out.exists()
    assert Path(f"{out}.resume").exists()
    subprocess.run([*command, "--out", str(out), "--resume"], check=True, **quiet)
    want, got = (torch.load(p, weights_only=True)["ops"] for p in (tmp_path / "whole.pt", out))
    for a, b in zip(want, got, strict=True):
        assert all(torch.equal(a["constants"][key], b["constants"][key]) for key in a["constants"])
    assert len(metrics.read_text().splitlines()) == 5


def test_an_interrupted_run_can_be_finished_as_it_is(tmp_path: Path) -> None:
    digits, out = data.load("digits"), tmp_path / "m.pt"

    def interrupt(_done: int, _total: int, epoch: Epoch | None) -> None:
        if epoch is not None and epoch.epoch == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(small(), digits, out, report=interrupt)
    assert not out.exists()
    made = train(small(), digits, out, finish=True)
    assert load_model(out).net.provenance["epochs"] == 4
    assert len(made.metrics.read_text().splitlines()) == 4
    assert made.accuracy > 0.8
    with pytest.raises(DeployError, match="nothing to resume"):
        train(small(), digits, out, finish=True)


def test_muon_moves_hidden_weights_alike_in_every_direction() -> None:
    recipe = small("optimiser=muon", "learning_rate=0.5", "weight_decay=0.0")
    module = recipes.build(recipe, (1, 8, 8), 10)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    muon, adamw = _optimisers(module, recipe)
    torch.manual_seed(0)
    module(torch.randint(0, 16, (64, 1, 8, 8)).float())[:, 3].sum().backward()
    muon.step()
    moved = {name: (p.detach() - before[name]).flatten(1) for name, p in module.named_parameters() if p.ndim > 1}
    assert not moved.pop("readout.weight").any()
    assert set(moved) == {"conv1.weight", "fc3.weight"}
    for change in moved.values():
        sizes = torch.linalg.svdvals(change / 0.5 / max(1, len(change) / change.shape[1]) ** 0.5)
        assert sizes[0] < 1.4
        assert (sizes > 0.5).sum() > 0.5 * len(sizes)
    adamw.step()
    assert all(not torch.equal(p, before[n]) for n, p in module.named_parameters() if n not in moved and p.grad.any())


def test_mixed_precision_trains_and_what_comes_out_is_exact(tmp_path: Path) -> None:
    digits = data.load("digits")
    made = train(small(*FASTER), digits, tmp_path / "m.pt")
    assert made.accuracy > 0.8
    converted = load_model(made.path)
    assert converted.net.provenance["recipe"]["amp"] is True
    x = digits.quantised(4).test_x
    assert s3.verify(made.path, x, backends=["reference", "emulator"]).equal
    assert correct_predictions(converted, x, digits.test_y) == made.correct


def test_a_processor_without_bfloat16_trains_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s3nn_deploy.train.bfloat16", lambda kind: False)
    digits, weights = data.load("digits"), []
    for amp in ("true", "false"):
        made = train(small(f"amp={amp}", "epochs=1"), digits, tmp_path / f"{amp}.pt")
        weights.append(s3.load(made.path))
        assert weights[-1].provenance["bfloat16"] is False
    assert weights[0] == weights[1]


def test_mixed_precision_counts_synapses_exactly() -> None:
    layer = s3.nn.IntLinear(3, 1001)
    with torch.autocast("cpu", torch.bfloat16):
        assert fan_out(layer, (3,)).tolist() == [1001.0] * 3


@pytest.mark.parametrize("step", ["rule", "learned"])
@pytest.mark.parametrize("bits", [4, 3, 2, 1])
def test_every_width_trains_and_its_weights_keep_to_it(bits: int, step: str, tmp_path: Path) -> None:
    made = train(small(f"bits={bits}", f"step={step}", "epochs=2"), data.load("digits"), tmp_path / "m.pt")
    assert made.accuracy > {4: 0.5, 3: 0.5, 2: 0.3, 1: 0.2}[bits]
    net = s3.load(made.path)
    largest = max(2 ** (bits - 1) - 1, 1)
    for population in net.populations:
        for projection in population.projections:
            assert abs(projection.synapses.weight.astype(int)).max() <= largest
    assert net.provenance["recipe"]["step"] == step


def test_layers_may_have_widths_of_their_own(tmp_path: Path) -> None:
    layers = "layers=[{conv = 4, kernel = 3, bits = 4}, {linear = 16, bits = 2}]"
    net = s3.load(train(small("epochs=1", layers), data.load("digits"), tmp_path / "m.pt").path)
    assert [int(abs(p.projections[0].synapses.weight.astype(int)).max()) for p in net.populations] == [7, 1, 127]


def test_dead_layers_are_reported_with_advice(tmp_path: Path) -> None:
    rates, dead, advice = health({"a": [0.0, 0.0, 0.25, 0.25], "b": [1.0, 0.5, 1.0], "c": [0.1, 0.3, 0.0], "d": [0.5]})
    assert rates == {"a": 0.125, "b": 0.8333, "c": 0.1333, "d": 0.5}
    assert dead == {"a": 2, "b": 2, "c": 1}
    assert [line.partition(",")[0] for line in advice] == [
        "a: 2 of 4 channels are silent",
        "b: 2 of 3 channels fire for every sample",
    ]
    assert all("Lower learning_rate" in line for line in advice)
    made = train(small("epochs=2", "learning_rate=50"), data.load("digits"), tmp_path / "m.pt")
    last = json.loads(made.metrics.read_text().splitlines()[-1])
    assert last["dead"]
    assert any("channels" in line for line in last["advice"])


def test_residual_recipes_train_and_join(tmp_path: Path) -> None:
    layers = "layers=[{conv = 6, kernel = 3, padding = 1}, {block = 6}, {block = 8, stride = 2, bits = 4}]"
    made = train(small("epochs=3", layers), data.load("digits"), tmp_path / "m.pt")
    assert made.accuracy > 0.3
    net = s3.load(made.path)
    assert [len(p.projections) for p in net.populations] == [1, 1, 2, 1, 2, 1]
    assert net.populations[-2].shape == (8, 4, 4)


@pytest.mark.parametrize("name", recipes.names())
def test_every_shipped_recipe_builds_for_its_data(name: str) -> None:
    shape = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
    recipe = recipes.load(name)
    assert recipe.name == name
    module = recipes.build(recipe, shape[recipe.data], 10)
    net = s3.convert(module, shape[recipe.data], recipe.input_bits)
    assert net.readout.size == 10


def test_two_processes_train_one_network_and_one_of_them_reports(tmp_path: Path) -> None:
    out = tmp_path / "shared.pt"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = ["train", "digits-conv", "--out", str(out), "--json", *(part for s in SMALL for part in ("--set", s))]
    made = subprocess.run(
        [*torchrun, "-m", "s3nn_deploy.cli", *arguments],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    said = json.loads(made.stdout)
    assert said["accuracy"] > 0.8
    converted = load_model(out)
    assert converted.net.provenance["processes"] == 2
    digits = data.load("digits").quantised(4)
    assert correct_predictions(converted, digits.test_x, digits.test_y) == said["correct"]
    assert len(Path(said["metrics"]).read_text().splitlines()) == 5


def test_tensorboard_gets_the_figures_of_the_metrics_file(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = train(small("epochs=2"), data.load("digits"), tmp_path / "m.pt", tensorboard=tmp_path / "events")
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    lines = [json.loads(line) for line in made.metrics.read_text().splitlines()]
    for tag, value in (("synops", lambda e: e["synops"]), ("firing/spike1", lambda e: e["rates"]["spike1"])):
        assert [(e.step, torch.tensor(e.value)) for e in events.Scalars(tag)] == [
            (line["epoch"], torch.tensor(value(line))) for line in lines
        ]


def test_resuming_something_else_is_refused(tmp_path: Path) -> None:
    digits = data.load("digits")
    with pytest.raises(DeployError, match="nothing to resume"):
        train(small(), digits, tmp_path / "m.pt", resume=True)
    torch.save({"recipe": "another"}, tmp_path / "m.pt.resume")
    with pytest.raises(DeployError, match="another recipe"):
        train(small(), digits, tmp_path / "m.pt", resume=True)
    (tmp_path / "m.pt.resume").write_bytes(b"damaged")
    with pytest.raises(DeployError, match="not a readable training state"):
        train(small(), digits, tmp_path / "m.pt", resume=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs where there is no GPU")
def test_a_missing_gpu_is_said(tmp_path: Path) -> None:
    with pytest.raises(DeployError, match="Use --device cpu"):
        train(small(), data.load("digits"), tmp_path / "m.pt", device="cuda")


def test_recipes_refuse_what_they_do_not_know(tmp_path: Path) -> None:
    for setting, words in (
        ("epoch=3", "Did you mean 'epochs'"),
        ("epochs=0", "at least 1"),
        ("epochs=many", "expected a whole number"),
        ("layers=[{conf = 3}]", "conv, linear, pool"),
        ("layers=[{conv = 3, kernle = 3}]", "Did you mean 'kernel'"),
        ("input_bits=9", "at most 8"),
        ("layers=[{conv = 0}]", "a positive integer"),
        ("layers=[{block = 3, kernel = 3}]", "unknown key 'kernel' in a block layer"),
        ("step=learnt", "rule or learned"),
        ("optimiser=sgd", "adamw or muon"),
        ("amp=1", "true or false"),
    ):
        with pytest.raises(DeployError, match=words):
            recipes.load("digits-conv", (setting,))
    with pytest.raises(DeployError, match="Did you mean 'digits-conv'"):
        recipes.load("digit-conv")
    for layers, words in (("[{linear = 3}, {conv = 3}]", "behind a linear"), ("[{pool = 9}]", "nothing is left")):
        with pytest.raises(DeployError, match=words):
            recipes.build(recipes.load("digits-conv", (f"layers={layers}",)), (1, 8, 8), 10)
    own = tmp_path / "own.toml"
    own.write_text('summary = "mine"\ndata = "digits"\nlayers = [')
    with pytest.raises(DeployError, match="not readable TOML"):
        recipes.load(str(own))
    own.write_text('summary = "mine"\ndata = "digits"\n')
    with pytest.raises(DeployError, match="'layers' is missing"):
        recipes.load(str(own))
