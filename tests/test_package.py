"""The package: light to import, whole as a wheel, its data found in a checkout and when installed."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "onnx", "onnxruntime", "h5py", "nir", "sklearn", "scipy"}


def loaded(*arguments: str) -> set[str]:
    code = "import sys, runpy\n" + "\n".join(arguments) + "\nprint(*sorted({m.partition('.')[0] for m in sys.modules}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split("\n")[-2].split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not loaded("import s3nn_deploy") & (HEAVY | {"numpy", "rich"})
    assert not loaded("import s3nn_deploy as s3", "s3.run, s3.price") & HEAVY


@pytest.mark.parametrize(
    "arguments", [["--help"], ["verify", "--help"], ["models"], ["targets"], ["targets", "loihi"], ["--version"]]
)
def test_help_and_lists_load_nothing_heavy(arguments: list[str]) -> None:
    code = f"from s3nn_deploy.cli import main\ntry: main({arguments!r})\nexcept SystemExit: pass"
    assert not loaded(code) & HEAVY


def test_the_public_api_is_there() -> None:
    import s3nn_deploy as s3

    for name in s3.__all__:
        assert getattr(s3, name) is not None
    assert callable(s3.convert)
    assert callable(s3.verify)
    with pytest.raises(AttributeError):
        _ = s3.nothing


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)],
        check=True,
        capture_output=True,
    )
    return next(out.glob("*.whl"))


def test_the_wheel_carries_recipes_and_targets_and_nothing_beside_the_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.partition("/")[0] for n in names} == {"s3nn_deploy", f"s3nn_deploy-{_version()}.dist-info"}
    assert "s3nn_deploy/models/digits-conv.toml" in names
    assert "s3nn_deploy/targets/loihi.toml" in names


def test_the_wheel_works_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "v", with_pip=False)
    python = tmp_path / "v" / "bin" / "python"
    site = next((tmp_path / "v" / "lib").glob("python*")) / "site-packages"
    zipfile.ZipFile(wheel).extractall(site)
    others = next(p for p in sys.path if p.endswith("site-packages"))
    (site / "others.pth").write_text(f"{others}\n")
    command = [str(python), "-m", "s3nn_deploy.cli"]
    shown = subprocess.run(
        [*command, "models", "digits-conv"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "conv = 32" in shown.stdout
    where = subprocess.run(
        [str(python), "-c", "import s3nn_deploy; print(s3nn_deploy.__file__)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(where.stdout.strip()).is_relative_to(tmp_path)
    small = ["--set", "epochs=1", "--set", "layers=[{conv = 4, kernel = 3, padding = 1}, {pool = 4}]"]
    subprocess.run(
        [*command, "train", "digits-conv", "--out", "m.pt", *small], cwd=tmp_path, check=True, capture_output=True
    )
    made = subprocess.run(
        [*command, "verify", "m.pt", "--backends", "emulator,onnx"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert "Equal: emulator, onnx" in made.stdout


def _version() -> str:
    import s3nn_deploy

    return s3nn_deploy.__version__
