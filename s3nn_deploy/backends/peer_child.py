"""Runs NIR and QONNX files in other people's tools, one step from rest. A script for the peers' interpreters, without s3nn_deploy.

    python -P -s peer_child.py FOLDER   FOLDER holds job.json, a list of {"id": [a, b], "file", "vectors": an .npy
                                        [N, *shape], "call": [peer, call]}; for each appears a-b.npz ("output" and what
                                        each neuron's node gave) and at the end of results.jsonl a line
                                        {"id", "lost": [neurons' nodes without a module], "error": text or null}
    python -P -s peer_child.py --check PEER ...     only prints the versions of the peers

`-P` matters: without it this script's folder leads the module path, and its `onnx.py` hides ONNX.

Each call is what a user of that peer would write. A neuron's module is found by its node's name in the imported module,
and what it gives is recorded: a reader that leaves out a node is seen, even where the output happens to be right.
"""

import contextlib
import importlib.metadata
import io
import json
import sys
import tempfile
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np

NEURONS = ("IF", "LIF", "CubaLIF", "Threshold")


def snntorch(path: str, x: Any, **_: Any) -> tuple[Any, Any]:
    from snntorch.import_nir import import_from_nir

    return import_from_nir(read(path)), lambda module: module(x)


def norse(path: str, x: Any, **options: Any) -> tuple[Any, Any]:
    import norse.torch

    return norse.torch.from_nir(read(path), **options), lambda module: module(x)


def spikingjelly(path: str, x: Any, **options: Any) -> tuple[Any, Any]:
    from spikingjelly.activation_based.nir_exchange import import_from_nir

    return import_from_nir(read(path), **options), lambda module: module(x)


def sinabs(path: str, x: Any, single: bool = False) -> tuple[Any, Any]:
    import sinabs.activation
    import sinabs.layers
    import sinabs.nir

    module = sinabs.nir.from_nir(read(path), batch_size=len(x))
    if single:
        for layer in module.modules():
            if isinstance(layer, sinabs.layers.StatefulLayer):
                layer.spike_fn = sinabs.activation.SingleSpike
    return module, lambda module: module(x)


def rockpool(path: str, x: Any, **_: Any) -> tuple[Any, Any]:
    import importlib.machinery

    vendor = types.ModuleType("samna")  # the package of this name downloads the vendor's libraries when imported
    vendor.__spec__ = importlib.machinery.ModuleSpec("samna", None)
    sys.modules.setdefault("samna", vendor)
    from rockpool.nn.modules.torch.nir import from_nir

    return from_nir(read(path)), lambda module: module(x[:, None])


def nirtorch(path: str, x: Any, mapped: bool = False) -> tuple[Any, Any]:
    import nir
    import nirtorch
    import torch

    class Fires(torch.nn.Module):
        def __init__(self, node: Any) -> None:
            super().__init__()
            given = node.threshold if isinstance(node, nir.Threshold) else node.v_threshold
            self.register_buffer("threshold", torch.as_tensor(np.asarray(given, np.float32)))

        def forward(self, v: Any) -> Any:
            return (v > self.threshold).to(v.dtype)

    def affine(node: Any) -> Any:
        module = torch.nn.Linear(node.weight.shape[1], node.weight.shape[0])
        module.weight.data, module.bias.data = torch.tensor(node.weight), torch.tensor(node.bias)
        return module

    def flatten(node: Any) -> Any:
        first, last = (int(d) + (d >= 0) for d in (node.start_dim, node.end_dim))
        return torch.nn.Flatten(first, last)

    neurons = {getattr(nir, kind): Fires for kind in NEURONS}
    maps = {**neurons, nir.Affine: affine, nir.Flatten: flatten} if mapped else neurons
    return nirtorch.nir_to_torch(read(path), maps), lambda module: module(x)


def sc_neurocore(path: str, x: Any, **options: Any) -> tuple[Any, Any]:
    from sc_neurocore.nir_bridge import from_nir

    def run(_: Any) -> Any:
        outputs = []
        for sample in np.asarray(x):
            network = from_nir(path, **options)
            (output,) = network.step({"input": sample}).values()
            outputs.append(np.asarray(output))
        return np.array(outputs)

    from_nir(path, **options)
    return None, run


def qonnx(path: str, x: Any) -> tuple[Any, Any]:
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx

    model = ModelWrapper(path)

    def run(_: Any) -> Any:
        runs = [execute_onnx(model, {"input": sample[None]}, return_full_exec_context=True) for sample in x]
        return {name: np.concatenate([run[name] for run in runs]) for name in (n.output[0] for n in model.graph.node)}

    return None, run


def hls4ml(path: str, x: Any) -> tuple[Any, Any]:
    import hls4ml
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation.channels_last import ConvertToChannelsLastAndClean
    from qonnx.transformation.gemm_to_matmul import GemmToMatMul
    from qonnx.util.cleanup import cleanup_model

    model = cleanup_model(ModelWrapper(path))
    if len(model.graph.output) > 1:
        raise ValueError("several outputs: export it without --expose-spikes")
    if x.ndim == 4:
        model, x = model.transform(ConvertToChannelsLastAndClean()), np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    model = cleanup_model(model.transform(GemmToMatMul()))
    options = {"backend": "Vitis", "default_precision": "fixed<32,24>"}
    config = hls4ml.utils.config_from_onnx_model(model, granularity="name", **options)
    with tempfile.TemporaryDirectory() as folder:
        project = hls4ml.converters.convert_from_onnx_model(
            model, output_dir=folder, io_type="io_parallel", backend="Vitis", hls_config=config
        )
        project.compile()
        output = project.predict(x)
    return None, lambda _: output


CALLS: dict[str, dict[str, tuple[Any, dict[str, Any]]]] = {
    "snntorch": {"default": (snntorch, {})},
    "norse": {"default": (norse, {}), "dt": (norse, {"dt": 1e-4, "ignore_warnings": True})},
    "spikingjelly": {"default": (spikingjelly, {}), "dt": (spikingjelly, {"dt": 1.0})},
    "nirtorch": {"default": (nirtorch, {}), "mapped": (nirtorch, {"mapped": True})},
    "sinabs": {"default": (sinabs, {}), "single": (sinabs, {"single": True})},
    "rockpool": {"default": (rockpool, {})},
    "sc-neurocore": {"default": (sc_neurocore, {"dt": 1.0}), "dt": (sc_neurocore, {"dt": 1e-4})},
    "qonnx": {"default": (qonnx, {})},
    "hls4ml": {"default": (hls4ml, {})},
}
"""For each peer its calls: a function (path, x, options) -> (module or None, how to run it)."""

WITHOUT_TORCH = {"sc-neurocore": np.float64, "qonnx": np.float32, "hls4ml": np.float32}
"""The peers that take arrays, and of which type; what they run gives the output, or all values by name."""


def read(path: str) -> Any:
    import nir

    return nir.read(path)


def recorded(module: Any, neurons: list[str], seen: dict[str, Any]) -> list[str]:
    """Keep in `seen` what the modules of the neurons' nodes give; returns the nodes that have none."""
    modules: dict[str, Any] = {}
    for name, one in module.named_modules():
        modules.setdefault(name.rsplit(".", 1)[-1], one)
    lost = []
    for neuron in neurons:
        one = next((modules[n] for n in (neuron, neuron.replace(".", "_"), f"nir_node_{neuron}") if n in modules), None)
        if one is None:
            lost.append(neuron)
        else:
            one.register_forward_hook(lambda _, __, value, neuron=neuron: seen.__setitem__(neuron, value))
    return lost


def array(value: Any) -> np.ndarray:
    while isinstance(value, tuple | list):
        value = value[0]
    return np.asarray(value.detach().numpy() if hasattr(value, "detach") else value, dtype=np.float64)


def attempt(path: str, peer: str, call: str, x: np.ndarray, place: Path) -> list[str]:
    """Import the file, run it, and write what came out; returns the neurons that the peer left out."""
    function, options = CALLS[peer][call]
    seen: dict[str, Any] = {}
    lost: list[str] = []
    if peer in WITHOUT_TORCH:
        module, run = function(path, x.astype(WITHOUT_TORCH[peer]), **options)
        output = run(module)
        if isinstance(output, dict):
            seen, output = output, output["output"]
    else:
        import torch

        nodes = read(path).nodes
        neurons = [name for name, node in nodes.items() if type(node).__name__ in NEURONS]
        torch.set_num_threads(1)
        torch.manual_seed(0)
        with torch.no_grad():
            module, run = function(path, torch.tensor(x.astype(np.float32)), **options)
            lost = recorded(module, neurons, seen)
            output = run(module)
    arrays = {"output": array(output), **{f"spikes/{name}": array(value) for name, value in seen.items()}}
    np.savez(place, **arrays)  # type: ignore[arg-type]
    return lost


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    jobs = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    with (folder / "results.jsonl").open("a", encoding="utf-8") as lines:
        for job in jobs:
            x = np.load(job["vectors"], allow_pickle=False)
            result: dict[str, Any] = {"id": job["id"], "lost": [], "error": None}
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    peer, call = job["call"]
                    result["lost"] = attempt(job["file"], peer, call, x, folder / "{}-{}.npz".format(*job["id"]))
            except Exception as error:  # whatever a peer raises is its answer
                result["error"] = f"{type(error).__name__}: {error}"
            lines.write(json.dumps(result) + "\n")
            lines.flush()


def check(peers: list[str]) -> None:
    print(json.dumps({peer: importlib.metadata.version(peer) for peer in peers}))


if __name__ == "__main__":
    check(sys.argv[2:]) if sys.argv[1] == "--check" else main(Path(sys.argv[1]))
