"""The certificate of a verification: what was proved, what was run, of which files, with which versions; checkable later.

JSON with a digest over its own content, which shows damage and careless edits. It is no signature: whoever can rewrite
the file can rewrite the digest.
"""

import hashlib
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from s3nn_deploy import __version__, formats
from s3nn_deploy.errors import DeployError
from s3nn_deploy.files import existing, sha256, write_text
from s3nn_deploy.intnet import IntNet
from s3nn_deploy.proof import ASSUMED, Proof, prove
from s3nn_deploy.verification import Result, file_difference

SCHEMA = "s3nn-deploy-certificate/1"

MAX_BYTES = 256 << 20
"""The largest certificate that is read."""

PACKAGES = ("numpy", "torch", "onnx", "onnxruntime", "h5py")


def place(model: str | Path) -> Path:
    """Where the certificate of a model lies by default: `model.certificate.json` beside `model.pt`."""
    return Path(model).with_suffix(".certificate.json")


def make(result: Result, model: str | Path) -> dict[str, Any]:
    """The certificate of a verification of the file `model`, as plain data."""
    path = existing(model)
    plain: dict[str, Any] = {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "verdict": "equal" if result.equal else "not proved" if not result.proof.holds else "different",
        "model": {"file": path.name, "sha256": sha256(path), "bytes": path.stat().st_size},
        "network": result.digest,
        "files": [asdict(file) for file in result.files],
        "proof": proof(result.proof),
        "run": {
            "baseline": result.baseline,
            "samples": result.samples,
            "injected": result.injected,
            "backends": [
                {
                    "backend": check.backend,
                    "what": check.what,
                    "samples": check.samples,
                    "injected": check.injected,
                    "compared": check.compared,
                    "differing": check.differing,
                    "equal": check.differing == 0,
                    "first_difference": None if check.first_difference is None else asdict(check.first_difference),
                    "left_out": dict(check.left_out),
                    "seconds": round(check.seconds, 3),
                }
                for check in result.checks
            ],
            "not_run": dict(result.not_run),
            "coverage": {name: asdict(covered) for name, covered in result.coverage.items()},
        },
        "versions": versions(lava=any(check.backend == "lava" for check in result.checks)),
        "platform": {"machine": platform.machine(), "processor": processor(), "system": platform.platform()},
    }
    plain = json.loads(json.dumps(plain))
    return {**plain, "digest": digest(plain)}


def write(result: Result, model: str | Path, path: str | Path | None = None) -> Path:
    """Write the certificate of a verification of `model` to `path`, by default to `place(model)`, in one move."""
    return write_text(path or place(model), json.dumps(make(result, model), indent=1) + "\n")


def digest(plain: dict[str, Any]) -> str:
    """SHA-256 over a certificate's content, without its own digest: sorted keys, no spaces."""
    content = {key: value for key, value in plain.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def proof(made: Proof) -> dict[str, Any]:
    """A proof as plain data, figures per channel included."""
    populations = [
        {**asdict(p), "margin": p.margin, "safety": p.safety, "failures": list(p.failures)} for p in made.populations
    ]
    plain = {"holds": made.holds, "dtype": made.dtype, "assumed": list(ASSUMED), "populations": populations}
    return dict(json.loads(json.dumps(plain)))


def versions(*, lava: bool) -> dict[str, str]:
    """The versions of what took part."""
    found = {"s3nn-deploy": __version__, "python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    if lava:
        from s3nn_deploy.lava_env import LAVA

        found |= dict(pinned.split("==") for pinned in LAVA)
    return found


def processor() -> str:
    """The processor's name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


@dataclass(frozen=True)
class Finding:
    """One thing that a certificate says, whether it still holds, and why not."""

    what: str
    holds: bool
    detail: str


def check(path: str | Path, model: str | Path | None = None, exports: Sequence[str | Path] = ()) -> list[Finding]:
    """Check a certificate against files as they are now; the proof is done again.

    Args:
        model: the model; by default the file of the recorded name beside the certificate.
        exports: exported files; by default those recorded, where they lie beside the certificate.

    Raises:
        DeployError: no certificate, no model, or files that cannot be read.
    """
    plain = _read(path)
    try:
        return [
            _same("its own content", plain["digest"], digest(plain), "it was changed after it was written"),
            Finding("verdict", plain["verdict"] == "equal", str(plain["verdict"])),
            *_model(plain, Path(path), model, exports),
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise DeployError(
            str(path), f"is not a complete certificate ({error!r})", hint="Verify the model again."
        ) from error


def _read(path: str | Path) -> dict[str, Any]:
    path = existing(path)
    if path.stat().st_size > MAX_BYTES:
        raise DeployError(str(path), expected=f"at most {MAX_BYTES:,} bytes", got=f"{path.stat().st_size:,}")
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(plain, dict) or plain.get("schema") != SCHEMA:
            raise ValueError(f"expected schema {SCHEMA!r}")
    except (ValueError, RecursionError) as error:
        raise DeployError(str(path), f"is not a certificate ({error})", hint="Verify the model again.") from error
    return plain


def _model(
    plain: dict[str, Any], certificate: Path, model: str | Path | None, exports: Sequence[str | Path]
) -> list[Finding]:
    path = existing(model if model is not None else certificate.parent / plain["model"]["file"])
    findings = [_same(f"{path.name}, bytes", plain["model"]["sha256"], sha256(path), "another file")]
    converted = None
    if path.suffix == ".pt":
        from s3nn_deploy.model import load_model

        converted = load_model(path)
        net = converted.net
    else:
        net = formats.read(path)
    findings.append(_same(f"{path.name}, integer network", plain["network"], net.digest, "another network"))
    again = prove(net, converted)
    detail = "; ".join(again.failures[:1]) or ("" if proof(again) == plain["proof"] else "its figures are others")
    findings.append(Finding("proof, done again", not detail, detail or "holds, with the same figures"))
    recorded = {file["name"]: file for file in plain["files"]}
    there = [certificate.parent / name for name in recorded if (certificate.parent / name).is_file()]
    for export in map(existing, exports or there):
        if export.resolve() != path.resolve():
            findings.append(_export(export, net, recorded.get(export.name)))
    return findings


def _export(path: Path, net: IntNet, recorded: dict[str, Any] | None) -> Finding:
    """Whether an exported file is the one that was verified."""
    if recorded is not None and recorded["sha256"] == sha256(path):
        return Finding(path.name, not recorded["difference"], recorded["difference"] or "the file that was verified")
    format = next((name for name, f in formats.FORMATS.items() if f.suffix == path.suffix), None)
    difference = "is no exported file" if format is None else file_difference(net, path, format)
    if not difference:
        difference = "holds the network, but was not verified" if recorded is None else "other bytes, the same network"
    return Finding(path.name, False, difference)


def _same(what: str, recorded: str, now: str, otherwise: str) -> Finding:
    detail = f"SHA-256 {now[:12]}" if recorded == now else f"{otherwise}: SHA-256 {now[:12]}, certified {recorded[:12]}"
    return Finding(what, recorded == now, detail)
