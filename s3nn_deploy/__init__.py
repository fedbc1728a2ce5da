"""s3nn-deploy: single-step spiking neural networks from PyTorch to neuromorphic hardware, with proof that nothing changed."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "convert": "s3nn_deploy.conversion",
    "quantise": "s3nn_deploy.quantisation",
    "quantisation_report": "s3nn_deploy.quantisation",
    "load": "s3nn_deploy.model",
    "save_model": "s3nn_deploy.model",
    "run": "s3nn_deploy.backends",
    "price": "s3nn_deploy.pricing",
    "export": "s3nn_deploy.formats",
    "verify": "s3nn_deploy.verification",
    "DeployError": "s3nn_deploy.errors",
}
__all__ = ["__version__", "nn", *_PUBLIC]


def __getattr__(name: str) -> Any:
    """The public API, imported when it is first used: importing the package itself loads no torch, onnx or h5py."""
    if name == "nn":
        return import_module("s3nn_deploy.nn")
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
