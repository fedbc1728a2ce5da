"""The shipped checkpoints are what their cards, certificates and recipes say, on every backend."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from s3nn_deploy import certificate, data, recipes, verify
from s3nn_deploy.backends import pytorch, run
from s3nn_deploy.files import builtin, sha256
from s3nn_deploy.intnet import IntNet
from s3nn_deploy.model import load_model

SHIPPED = sorted(builtin("models").glob("*.pt"))


def synapses(net: IntNet) -> int:
    return sum(j.synapses.weight.size for p in net.populations for j in p.projections)


def test_trained_checkpoints_are_shipped() -> None:
    assert {"digits-conv", "digits-mlp", "digits-resnet", "mnist-lenet", "mnist-mlp"} <= {p.stem for p in SHIPPED}
    assert all(path.stat().st_size < 8 << 20 for path in SHIPPED)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_card_certificate_and_recipe_are_those_of_the_file(path: Path) -> None:
    net = load_model(path).net
    recipe = recipes.load(path.stem)
    plain = {key: value for key, value in net.provenance["recipe"].items() if key != "name"}
    trained = recipes.parse(path.stem, plain, str(path))  # keys that are newer than the file have their defaults
    assert replace(trained, summary=recipe.summary, measured=recipe.measured) == recipe
    assert (recipe.measured["correct"], recipe.measured["total"]) == (
        net.provenance["test_correct"],
        net.provenance["test_total"],
    )
    findings = certificate.check(certificate.place(path), path)
    assert all(finding.holds for finding in findings), [f for f in findings if not f.holds]
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    plain = json.loads(certificate.place(path).read_text(encoding="utf-8"))
    assert all(
        word in text for word in (sha256(path), net.digest, plain["digest"], f"({recipe.measured['correct']:,})")
    )
    assert plain["verdict"] == "equal"
    ran = {row["backend"] for row in plain["run"]["backends"] if row["samples"]}
    assert ran >= {"reference", "emulator", "onnx", "lava"}
    assert "netx" in ran or "netx" in plain["run"]["not_run"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_backend_gives_what_pytorch_gives(path: Path) -> None:
    backends = ["emulator", "onnx"] if synapses(load_model(path).net) > 1 << 19 else ["reference", "emulator", "onnx"]
    made = verify(path, backends=backends, budget=10**8)
    assert made.equal, made.first_difference


@pytest.mark.lava
@pytest.mark.parametrize("path", [p for p in SHIPPED if p.stem.startswith("digits")], ids=lambda p: p.stem)
def test_lava_gives_what_pytorch_gives(path: Path) -> None:
    made = verify(path, data.load("digits").quantised(4).test_x[:100], backends=["lava"], budget=0)
    assert made.equal, made.first_difference


@pytest.mark.parametrize("path", [p for p in SHIPPED if p.stem.startswith("digits")], ids=lambda p: p.stem)
def test_the_accuracy_on_embedded_data_is_the_measured_one(path: Path) -> None:
    converted, digits = load_model(path), data.load("digits").quantised(4)
    measured = recipes.load(path.stem).measured
    trace, want = run(converted.net, digits.test_x), pytorch.run(converted, digits.test_x)
    assert np.array_equal(trace.readout, want.readout)
    assert int((trace.predictions == digits.test_y).sum()) == measured["correct"]
    assert round(float(trace.counts.total("synops").mean())) == measured["synops"]
