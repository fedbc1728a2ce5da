"""model.pt: it holds the network without its code, and opening a bad one is safe and clear."""

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from modules import random_module
from nets import assert_same, samples

import s3nn_deploy as s3
from s3nn_deploy.backends import pytorch, reference
from s3nn_deploy.errors import DeployError
from s3nn_deploy.model import load_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    module, shape, bits = random_module(3)
    return s3.save_model(module, tmp_path / "model.pt", shape, bits, provenance={"note": "test"})


def test_a_saved_model_runs_and_converts_without_its_code(model: Path) -> None:
    module, shape, bits = random_module(3)
    converted = load_model(model)
    assert converted.net == s3.convert(module, shape, bits)
    assert converted.net.provenance["note"] == "test"
    x = samples(converted.net)
    assert_same(reference.run(s3.load(model), x), pytorch.run(converted, x))


class _Evil:
    def __reduce__(self) -> tuple:
        return (Path("/tmp/s3nn-evil").touch, ())


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    Path("/tmp/s3nn-evil").unlink(missing_ok=True)
    bad = tmp_path / "evil.pt"
    torch.save({"schema": "s3nn-deploy-model/1", "x": _Evil()}, bad)
    with pytest.raises(DeployError, match="could be code; it was not executed"):
        s3.load(bad)
    bad.write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(DeployError, match="is not a model file"):
        s3.load(bad)
    assert not Path("/tmp/s3nn-evil").exists()


def test_truncated_foreign_and_missing_files_are_named(model: Path, tmp_path: Path) -> None:
    content = model.read_bytes()
    bad = tmp_path / "bad.pt"
    for cut in (0, 100, len(content) // 2, len(content) - 10):
        bad.write_bytes(content[:cut])
        with pytest.raises(DeployError, match=r"bad\.pt: is not a"):
            s3.load(bad)
    torch.save(torch.nn.Linear(2, 2).state_dict(), bad)
    with pytest.raises(DeployError, match="bare state_dict holds no structure"):
        s3.load(bad)
    with zipfile.ZipFile(bad, "w") as archive:
        archive.writestr("hello", "world")
    with pytest.raises(DeployError, match="is not a readable model"):
        s3.load(bad)
    with pytest.raises(DeployError, match="no such file"):
        s3.load(tmp_path / "none.pt")
    (tmp_path / "model.xyz").touch()
    with pytest.raises(DeployError, match=r"expected one of \.pt, \.npz"):
        s3.load(tmp_path / "model.xyz")


@pytest.mark.parametrize("damage", ["drop", "kind", "input", "dtype", "extra"])
def test_a_malformed_description_is_refused(model: Path, damage: str) -> None:
    plain = torch.load(model, weights_only=True)
    match damage:
        case "drop":
            del plain["input"]["bits"]
        case "kind":
            plain["ops"][0]["kind"] = "exec"
        case "input":
            plain["ops"][0]["inputs"] = ["nowhere"]
        case "dtype":
            plain["ops"][0]["constants"]["weight"] = plain["ops"][0]["constants"]["weight"].int()
        case "extra":
            plain["ops"][0]["attributes"]["surprise"] = 1
    torch.save(plain, model)
    with pytest.raises(DeployError, match="incomplete or malformed"):
        s3.load(model)


def test_classes_must_fit_and_provenance_be_plain(tmp_path: Path) -> None:
    module, shape, bits = random_module(3)
    with pytest.raises(DeployError, match="classes"):
        s3.save_model(module, tmp_path / "m.pt", shape, bits, classes=["only", *["one"] * 30])
    with pytest.raises(DeployError, match="plain data"):
        s3.save_model(module, tmp_path / "m.pt", shape, bits, provenance={"x": np.zeros(2)})
    assert not list(tmp_path.iterdir())
