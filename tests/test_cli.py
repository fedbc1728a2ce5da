"""The command line as a user meets it: good input, bad input, exit codes, files left behind."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

import s3nn_deploy as s3
from s3nn_deploy import cli, nn
from s3nn_deploy.backends import reference
from s3nn_deploy.trace import Trace


def call(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(cli.main, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "model.pt"
    call(
        "train",
        "digits-conv",
        "--out",
        path,
        "--set",
        "epochs=3",
        "--set",
        "layers=[{conv = 8, kernel = 3, padding = 1}, {pool = 2}, {linear = 20}]",
    )
    return path


def test_every_command_has_help_with_an_example() -> None:
    for command in (*cli.main.commands.values(), cli.setup_loihi):
        if command.name != "setup":
            assert "Example: s3nn-deploy" in (command.help or ""), command.name


@pytest.mark.parametrize(
    ("target", "suffix"),
    [("nir", ".nir"), ("onnx", ".onnx"), ("loihi", ".net"), ("loihi2", ".net"), ("emulator", ".npz")],
)
def test_export_inspect_and_simulate_what_was_exported(model: Path, target: str, suffix: str, tmp_path: Path) -> None:
    out = tmp_path / f"net{suffix}"
    made = json.loads(call("export", model, "--target", target, "--out", out, "--json").stdout)
    assert made["path"] == str(out)
    assert made["bytes"] == out.stat().st_size
    names = [p["name"] for p in json.loads(call("inspect", out, "--json").stdout)["populations"]]
    assert names == ["conv1", "pool2", "fc3", "readout"]
    assert "readout" in call("inspect", out).stdout
    plain = json.loads(call("simulate", out, "--samples", 50, "--json").stdout)
    want = json.loads(call("simulate", model, "--samples", 50, "--json").stdout)
    assert plain["predictions"] == want["predictions"]
    assert plain["accuracy"] == want["accuracy"] > 0.5


def test_export_goes_beside_the_model_by_default(model: Path) -> None:
    assert str(model.with_suffix(".onnx")) in call("export", model, "--target", "onnx").stdout
    assert model.with_suffix(".onnx").is_file()


def test_simulate_prints_operations_energy_and_accuracy(model: Path) -> None:
    out = call("simulate", model).stdout
    for words in ("synops", "energy nJ", "nJ per inference on emulator", "Horowitz", "Accuracy:", "Not in the bill"):
        assert words in out
    least = call("simulate", model, "--target", "loihi").stdout
    assert "At least" in least
    assert "Not priced" in least
    assert "No energy" in call("simulate", model, "--target", "loihi2").stdout


@pytest.mark.parametrize("backend", ["reference", "emulator", "onnx"])
def test_simulate_your_own_input(model: Path, backend: str, tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 16, (7, 1, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "x.npy", x)
    plain = json.loads(call("simulate", model, "--input", tmp_path / "x.npy", "--backend", backend, "--json").stdout)
    assert plain["predictions"] == s3.run(s3.load(model), x, "reference").predictions.tolist()


def test_verify_says_what_is_proved_then_what_was_run_with_exit_code_0(model: Path) -> None:
    result = call("verify", model, "--backends", "reference,emulator,onnx", "--samples", 20)
    words = (
        "Proved for every input",
        "Proved: no sum",
        "Run against PyTorch",
        "u = theta",
        "Equal: reference, emulator, onnx",
    )
    at = [result.stdout.index(w) for w in words]
    assert at == sorted(at)
    assert f"Certificate: {model.with_suffix('.certificate.json')}" in result.stdout
    result = call("verify", model, "--backends", "emulator", "--json")
    plain = json.loads(result.stdout)
    assert plain["equal"]
    assert plain["proved"]
    assert plain["baseline"] == "pytorch"
    assert plain["samples"] > 164
    assert "Certificate: " in result.stderr


def test_a_certificate_is_checked_later(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model.pt"
    copy.write_bytes(model.read_bytes())
    onnx = tmp_path / "model.onnx"
    call("export", copy, "--target", "onnx", "--out", onnx)
    path = tmp_path / "signed" / "c.json"
    assert str(path) in call("verify", copy, onnx, "--backends", "onnx", "--certificate-out", path).stdout
    assert not copy.with_suffix(".certificate.json").exists()
    assert "The certificate holds." in call("verify", "--certificate", path, copy, onnx).stdout
    path.write_text(path.read_text().replace('"differing": 0', '"differing": 1', 1))
    assert "Does not hold: its own content." in call("verify", "--certificate", path, copy, code=1).stdout
    plain = json.loads(call("verify", "--certificate", path, model.parent / "model.pt", "--json", code=1).stdout)
    assert [f["holds"] for f in plain["findings"]] == [False, True, True, True, True]
    assert "no such file" in call("verify", "--certificate", path, code=2).stderr
    assert "expected a MODEL" in call("verify", code=2).stderr


def test_verify_needs_no_data_set(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from s3nn_deploy.errors import DeployError

    def missing(*_: object) -> None:
        raise DeployError("data set 'digits'", "is not there")

    monkeypatch.setattr("s3nn_deploy.data.load", missing)
    result = call("verify", model, "--backends", "emulator", "--certificate-out", tmp_path / "c.json")
    assert "Generated inputs only." in result.stderr
    assert "is not there" in call("verify", model, "--data", tmp_path, code=2).stderr


def test_verify_says_where_it_differs_with_exit_code_1_and_how_to_see_it_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(net: object, x: np.ndarray, file: Path | None = None) -> Trace:
        trace = reference.run(net, x)
        trace.readout[5, 3] += 1
        return trace

    copy = tmp_path / "model.pt"
    copy.write_bytes(model.read_bytes())
    monkeypatch.setattr("s3nn_deploy.backends.onnx.run", wrong)
    result = call("verify", copy, "--backends", "emulator,onnx", "--budget", 0, code=1)
    assert "sample 5, population 'readout', neuron 3" in result.stdout
    assert (tmp_path / "mismatch-onnx.npz").is_file()
    assert json.loads((tmp_path / "model.certificate.json").read_text())["verdict"] == "different"
    (again,) = re.findall(r"^Again: s3nn-deploy (.*)$", result.stdout, re.MULTILINE)
    assert "sample 5, population 'readout', neuron 3" in call(*again.split(), code=1).stdout
    monkeypatch.undo()
    assert "Equal: onnx" in call(*again.split()).stdout
    assert (
        "another network" in call("verify", _other(tmp_path), "--input", tmp_path / "mismatch-onnx.npz", code=2).stderr
    )


def _other(folder: Path) -> Path:
    module = torch.nn.Sequential(nn.IntLinear(3, 3), nn.Spike(), nn.IntLinear(3, 2))
    return s3.save_model(module, folder / "other.pt", (3,))


def test_a_population_by_itself_is_run_again_by_the_printed_command(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(net: Any, x: np.ndarray, file: Path | None = None) -> Trace:
        trace = reference.run(net, x)
        if "fc3" in trace.spikes and len(net.populations) == 2:
            trace.spikes["fc3"][7, 11] ^= True
        return trace

    copy = tmp_path / "model.pt"
    copy.write_bytes(model.read_bytes())
    monkeypatch.setattr("s3nn_deploy.backends.onnx.run", wrong)
    result = call("verify", copy, "--backends", "onnx", code=1)
    assert "sample 7, population 'fc3' by itself, neuron 11" in result.stdout
    (again,) = re.findall(r"^Again: s3nn-deploy (.*)$", result.stdout, re.MULTILINE)
    assert "sample 7, population 'fc3' by itself, neuron 11" in call(*again.split(), code=1).stdout
    monkeypatch.undo()
    assert "Equal: onnx" in call(*again.split()).stdout


def test_models_and_targets_are_listed_and_shown() -> None:
    assert "digits-conv" in call("models").stdout
    assert "layers" in call("models", "digits-conv").stdout
    assert "23.6" in call("targets", "loihi").stdout
    assert {"emulator", "loihi", "loihi2"} <= {t["name"] for t in json.loads(call("targets", "--json").stdout)}
    assert json.loads(call("models", "digits-conv", "--json").stdout)["input_bits"] == 4


BAD = {
    "unknown recipe": (["train", "digit-conv"], "Did you mean 'digits-conv'"),
    "unknown setting": (["train", "digits-conv", "--set", "epoch=1"], "Did you mean 'epochs'"),
    "unknown target": (["export", "MODEL", "--target", "lohi"], "Did you mean 'loihi'"),
    "priced only": (["export", "MODEL", "--target", "odin"], "only has prices"),
    "unwritable": (["export", "MODEL", "--target", "onnx", "--out", "/proc/none/net.onnx"], "cannot be written"),
    "unknown backend": (["simulate", "MODEL", "--backend", "onx"], "Did you mean 'onnx'"),
    "unknown backends": (["verify", "MODEL", "--backends", "emulator,onx"], "Did you mean 'onnx'"),
    "missing model": (["inspect", "none.pt"], "no such file"),
    "wrong suffix": (["inspect", "pyproject.toml"], "expected one of .pt"),
    "no array": (["simulate", "MODEL", "--input", "pyproject.toml"], "not a readable .npy"),
    "missing data": (["train", "DATA"], "--data DIR or S3NN_DATA"),
    "nothing to resume": (["train", "digits-conv", "--out", "OUT", "--resume"], "nothing to resume"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_on_stderr_and_exit_code_2(
    case: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("S3NN_DATA", raising=False)
    (tmp_path / "own.toml").write_text('summary = "x"\ndata = "mnist"\nlayers = []\n')
    places = {"MODEL": str(model), "OUT": str(tmp_path / "m.pt"), "DATA": str(tmp_path / "own.toml")}
    arguments, words = BAD[case]
    result = call(*(places.get(a, a) for a in arguments), code=2)
    assert result.stdout == ""
    assert words in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_input_of_the_wrong_shape_type_or_range_is_refused(model: Path, tmp_path: Path) -> None:
    for x, words in (
        (np.zeros((3, 8, 8), np.uint8), r"expected shape \[N, 1, 8, 8\], got \[3, 8, 8\]"),
        (np.zeros((3, 1, 8, 8)), "got float64"),
        (np.full((3, 1, 8, 8), 16, np.uint8), r"values 0\.\.15 \(4 bits\)"),
    ):
        np.save(tmp_path / "x.npy", x)
        assert re.search(words, call("simulate", model, "--input", tmp_path / "x.npy", code=2).stderr)
    np.savez(tmp_path / "x.npz", x=x)
    assert "got an .npz archive" in call("simulate", model, "--input", tmp_path / "x.npz", code=2).stderr
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object), allow_pickle=True)
    assert "not a readable .npy" in call("simulate", model, "--input", tmp_path / "o.npy", code=2).stderr


def test_a_network_over_a_target_s_limit_is_named(tmp_path: Path) -> None:
    path = s3.save_model(
        torch.nn.Sequential(nn.IntLinear(3, 3), nn.Spike(), nn.IntLinear(3, 2)), tmp_path / "m.pt", (3,)
    )
    (tmp_path / "my.toml").write_text(
        'name = "my"\nsummary = "mine"\ntakes = "emulator"\n[limits]\nweight_bits = { max = 4, source = "me" }\n'
    )
    error = call("export", path, "--target", tmp_path / "my.toml", code=2).stderr
    assert "population 'layer0'" in error
    assert not (tmp_path / "m.npz").exists()


def test_lava_missing_names_the_one_command(model: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    environment.pop("S3NN_LAVA_PYTHON", None)
    run = subprocess.run(
        [sys.executable, "-m", "s3nn_deploy.cli", "verify", str(model), "--backends", "lava"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert run.returncode == 2
    assert "s3nn-deploy setup loihi" in run.stderr
