"""Files: written in one move or not at all, and read with care."""

import io
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from nets import ZOO

from s3nn_deploy.errors import DeployError
from s3nn_deploy.files import read_npz, replacing, write_npz
from s3nn_deploy.formats import export, read


@pytest.mark.parametrize("name", ZOO)
def test_the_emulator_file_is_lossless(name: str, tmp_path: Path) -> None:
    path = export(ZOO[name], tmp_path / "net.npz", "emulator")
    again = read(path)
    assert again == ZOO[name]
    assert again.classes == ZOO[name].classes


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "net.npz"
    path.write_text("old")
    code = f"""
import resource, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from nets import ZOO
from s3nn_deploy.formats import export
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
export(ZOO["residual"], {str(path)!r}, "emulator")
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "DeployError" in child.stderr
    assert "writing failed" in child.stderr
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_ctrl_c_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    code = f"""
import signal, time
from s3nn_deploy.files import replacing
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
with replacing({str(path)!r}) as temporary:
    temporary.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "writing\n"
    time.sleep(0.1)
    os.kill(child.pid, signal.SIGINT)
    child.wait(10)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "net.npz", tmp_path):
        with pytest.raises(DeployError, match="cannot be written"):
            export(ZOO["mlp"], path, "emulator")


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "a.npz", {"schema": "s"}, {})
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_damaged_and_hostile_files_are_refused(tmp_path: Path) -> None:
    good = export(ZOO["mlp"], tmp_path / "net.npz", "emulator")
    content = good.read_bytes()
    bad = tmp_path / "bad.npz"
    for cut in (0, 10, len(content) // 2, len(content) - 5):
        bad.write_bytes(content[:cut])
        with pytest.raises(DeployError, match="is not a readable"):
            read(bad)
    np.savez(bad, x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DeployError, match="dtype"):
        read(bad)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (1 << 40,)})
    with zipfile.ZipFile(bad, "w") as archive:
        archive.writestr("huge.npy", header.getvalue())
    with pytest.raises(DeployError, match="declares"):
        read(bad)
    write_npz(bad, {"schema": "something-else/9"}, {})
    with pytest.raises(DeployError, match="expected schema"):
        read_npz(bad, "s3nn-deploy-net/1")
    write_npz(bad, {"schema": "s3nn-deploy-net/1", "input": {"shape": [3]}, "populations": []}, {})
    with pytest.raises(DeployError, match="incomplete or malformed"):
        read(bad)


def test_a_flipped_weight_is_another_network(tmp_path: Path) -> None:
    good = export(ZOO["mlp"], tmp_path / "net.npz", "emulator")
    with np.load(good) as loaded:
        arrays = {name: loaded[name].copy() for name in loaded.files}
    arrays["fc1/0/weight"].flat[0] ^= 1
    with good.open("wb") as stream:
        np.savez(stream, **arrays)
    assert read(good) != ZOO["mlp"]
