"""The certificate: it says what was proved and run, of which bytes, and what no longer matches."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from modules import random_module
from nets import ZOO

import s3nn_deploy as s3
from s3nn_deploy import certificate, formats
from s3nn_deploy.errors import DeployError
from s3nn_deploy.files import sha256

SEED = 3


@pytest.fixture
def verified(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A model, its ONNX file and the certificate of both."""
    module, shape, bits = random_module(SEED)
    model = s3.save_model(module, tmp_path / "model.pt", shape, bits)
    onnx = s3.export(s3.load(model), tmp_path / "model.onnx", "onnx")
    result = s3.verify(model, backends=["emulator", "onnx"], exports=[onnx])
    return model, onnx, certificate.write(result, model)


def wrong(findings: list[certificate.Finding]) -> list[str]:
    return [finding.what for finding in findings if not finding.holds]


def test_it_says_what_was_proved_and_run_of_which_bytes(verified: tuple[Path, Path, Path]) -> None:
    model, onnx, path = verified
    assert path == certificate.place(model) == model.parent / "model.certificate.json"
    plain = json.loads(path.read_text())
    assert plain["verdict"] == "equal"
    assert plain["model"] == {"file": "model.pt", "sha256": sha256(model), "bytes": model.stat().st_size}
    assert plain["network"] == s3.load(model).digest
    assert [(f["name"], f["given"], f["difference"]) for f in plain["files"]] == [
        ("model.onnx", True, ""),
        ("model.npz", False, ""),
    ]
    assert plain["files"][0]["sha256"] == sha256(onnx)
    assert plain["proof"]["holds"]
    assert plain["proof"]["assumed"]
    assert [p["name"] for p in plain["proof"]["populations"]] == [p.name for p in s3.load(model).populations]
    assert {c["backend"]: c["equal"] for c in plain["run"]["backends"]} == {
        "pytorch": True,
        "emulator": True,
        "onnx": True,
    }
    assert all(c["pinned"] == c["channels"] for c in plain["run"]["coverage"].values())
    assert {"python", "numpy", "torch", "onnxruntime", "s3nn-deploy"} <= set(plain["versions"])
    assert plain["digest"] == certificate.digest(plain)


def test_a_file_that_is_exported_later_is_the_one_that_was_verified(verified: tuple[Path, Path, Path]) -> None:
    model, _, path = verified
    s3.export(s3.load(model), model.with_suffix(".npz"), "emulator")
    findings = certificate.check(path)
    assert wrong(findings) == []
    assert [f.what for f in findings][-2:] == ["model.onnx", "model.npz"]


def test_it_holds_wherever_the_files_lie(verified: tuple[Path, Path, Path], tmp_path: Path) -> None:
    model, onnx, path = verified
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    moved = [Path(shutil.move(file, elsewhere / file.name)) for file in (model, onnx)]
    assert wrong(certificate.check(path, moved[0], moved[1:])) == []
    with pytest.raises(DeployError, match="no such file"):
        certificate.check(path)


@pytest.mark.parametrize(
    "edit",
    [
        lambda plain: plain.update(verdict="not proved"),
        lambda plain: plain["run"]["backends"][1].update(differing=1),
        lambda plain: plain["proof"]["populations"][0]["theta"].__setitem__(0, 7),
        lambda plain: plain.update(created="2020-01-01T00:00:00+00:00"),
        lambda plain: plain.update(network="0" * 64),
    ],
)
def test_an_edit_shows(edit: object, verified: tuple[Path, Path, Path]) -> None:
    path = verified[2]
    plain = json.loads(path.read_text())
    edit(plain)  # type: ignore[operator]
    path.write_text(json.dumps(plain))
    assert "its own content" in wrong(certificate.check(path))
    plain["digest"] = certificate.digest(plain)  # one who mends the digest too is found by the files
    path.write_text(json.dumps(plain))
    found = wrong(certificate.check(path))
    assert "its own content" not in found
    if plain["network"] == "0" * 64:
        assert found == ["model.pt, integer network"]
    if plain["proof"]["populations"][0]["theta"][0] == 7:
        assert found == ["proof, done again"]


def test_another_model_and_another_export_show(verified: tuple[Path, Path, Path]) -> None:
    model, onnx, path = verified
    module, shape, bits = random_module(SEED)
    next(p for name, p in module.named_parameters() if name.endswith("weight")).data[0] *= -1
    s3.save_model(module, model, shape, bits)
    findings = certificate.check(path)
    assert set(wrong(findings)) >= {"model.pt, bytes", "model.pt, integer network", "proof, done again"}
    s3.export(s3.load(model), onnx, "onnx")
    assert "model.onnx" in wrong(certificate.check(path))


def test_an_export_with_one_wrong_integer_is_located(verified: tuple[Path, Path, Path], tmp_path: Path) -> None:
    model, _, path = verified
    net = s3.load(model)
    other = ZOO["lenet"]
    first = net.populations[0]
    theta = first.threshold.astype(int)
    theta[0] -= 1
    broken = type(net)(
        net.input, (type(first)(first.name, first.shape, first.projections, theta), *net.populations[1:])
    )
    npz = formats.export(broken, tmp_path / "model.npz", "emulator")
    result = s3.verify(model, backends=["onnx"], exports=[npz])
    assert not result.equal
    assert f"population 'layer0', threshold [0]: {theta[0]}, expected {theta[0] + 1}" in result.files[0].difference
    assert certificate.make(result, model)["verdict"] == "different"
    finding = certificate.check(path, model, [npz])[-1]
    assert (finding.holds, finding.what) == (False, "model.npz")
    assert "threshold [0]" in finding.detail
    stranger = formats.export(other, tmp_path / "stranger.npz", "emulator")
    assert "another input" in certificate.check(path, model, [stranger])[-1].detail


def test_a_failing_certificate_does_not_hold(
    verified: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from s3nn_deploy.backends import reference

    def wrong_engine(net: object, x: np.ndarray, file: Path | None = None) -> object:
        trace = reference.run(net, x)
        trace.readout[0] += 1
        return trace

    model, _, path = verified
    monkeypatch.setattr("s3nn_deploy.backends.emulator.run", wrong_engine)
    certificate.write(s3.verify(model, backends=["emulator"]), model)
    assert wrong(certificate.check(path)) == ["verdict"]
    assert json.loads(path.read_text())["run"]["backends"][1]["first_difference"]["neuron"] == [0]


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"schema": "s3nn-deploy-certificate/1"}', "[" * 5000])
def test_what_is_no_certificate_is_refused(text: str, verified: tuple[Path, Path, Path]) -> None:
    verified[2].write_text(text)
    with pytest.raises(DeployError, match=r"certificate"):
        certificate.check(verified[2])
