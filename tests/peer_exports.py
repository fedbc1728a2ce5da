"""Users of other tools: integer networks built, run and exported there. A script for the peers' interpreters.

python -P -s peer_exports.py TOOL FOLDER    writes FOLDER/TOOL-<network>.nir and .npz with "x" and "output"
"""

import sys
import warnings
from pathlib import Path

import nir
import numpy as np
import torch


def integers(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """`module` with integer weights and biases."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in (
        p for m in module.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d) for p in m.parameters()
    ):
        parameter.data = torch.randint(-4, 5, parameter.shape, generator=draw).float()
    return module


def snntorch(folder: Path) -> None:
    import snntorch as snn
    from snntorch.export_nir import export_to_nir

    # one value per neuron: nir does not write scalars
    leaky = lambda t, *n: snn.Leaky(beta=torch.zeros(n), threshold=torch.full(n, t), init_hidden=True)  # noqa: E731
    synaptic = lambda t, n: snn.Synaptic(  # noqa: E731
        alpha=torch.zeros(n), beta=torch.zeros(n), threshold=torch.full((n,), t), init_hidden=True
    )
    for name, neuron in (("leaky", leaky), ("synaptic", synaptic)):
        parts = [torch.nn.Linear(12, 9), neuron(3.0, 9), torch.nn.Linear(9, 5), neuron(2.0, 5), torch.nn.Linear(5, 3)]
        net = torch.nn.Sequential(*parts)
        x = torch.randint(0, 2, (32, 12)).float()
        graph = export_to_nir(integers(net, 1), x[:1], ignore_dims=[0])
        for module in net.modules():
            if isinstance(module, snn.SpikingNeuron):
                module.reset_mem()
        save(folder / f"snntorch-{name}", graph, x, net(x))
    x = torch.randint(0, 2, (32, 2, 6, 6)).float()
    conv = [torch.nn.Conv2d(2, 4, 3, padding=1), leaky(3.0, 4, 6, 6), torch.nn.Flatten()]
    net = integers(torch.nn.Sequential(*conv, torch.nn.Linear(144, 5)), 2)
    graph = export_to_nir(net, x[:1], ignore_dims=[0])
    conv[1].reset_mem()
    save(folder / "snntorch-conv", graph, x, net(x))


def norse(folder: Path) -> None:
    import norse.torch as norse

    neuron = lambda t, *n: norse.IAFCell(norse.IAFParameters(v_th=torch.full(n, t)), dt=1.0)  # noqa: E731
    dense = norse.SequentialState(torch.nn.Linear(12, 9), neuron(3.0, 9), torch.nn.Linear(9, 3))
    conv = norse.SequentialState(torch.nn.Conv2d(2, 4, 6), neuron(2.0, 4, 1, 1), torch.nn.Conv2d(4, 5, 1))
    for name, net, shape in (("dense", dense, (12,)), ("conv", conv, (2, 6, 6))):
        x = torch.randint(0, 2, (32, *shape)).float()
        graph = norse.to_nir(integers(net, 3), x[0])
        graph.infer_types()  # or the shapes of convolutions are missing, and it cannot be written
        save(folder / f"norse-{name}", graph, x, net(x)[0])


def spikingjelly(folder: Path) -> None:
    from spikingjelly.activation_based import functional, layer, neuron
    from spikingjelly.activation_based.nir_exchange import export_to_nir

    for name, make in (
        ("if", lambda t: neuron.IFNode(v_threshold=t, v_reset=0.0)),
        ("cuba", lambda t: neuron.CUBALIFNode(c_decay=0.0, v_decay=0.0, v_threshold=t, v_reset=0.0)),
    ):
        net = torch.nn.Sequential(
            layer.Conv2d(2, 4, 3, padding=1), make(2.0), layer.Conv2d(4, 3, 3, stride=2, bias=False), make(3.0),
            layer.Flatten(), layer.Linear(12, 6), make(1.0), layer.Linear(6, 5),
        )  # fmt: skip
        x = torch.randint(0, 2, (32, 2, 6, 6)).float()
        graph = export_to_nir(integers(net, 4), x[:1])
        functional.reset_net(net)
        save(folder / f"spikingjelly-{name}", graph, x, net(x))


def sinabs(folder: Path) -> None:
    import sinabs.activation
    import sinabs.layers as sl
    import sinabs.nir

    single = {"spike_fn": sinabs.activation.SingleSpike, "batch_size": 32, "min_v_mem": None}
    for name, pool in (("pool", sl.SumPool2d(2)), ("plain", torch.nn.Identity())):
        side = 3 if name == "pool" else 6
        parts = [
            torch.nn.Conv2d(2, 4, 3, padding=1), sl.IAFSqueeze(spike_threshold=torch.tensor(3.0), **single), pool,
            torch.nn.Conv2d(4, 3, 3, padding=1, bias=False), sl.IAFSqueeze(spike_threshold=torch.tensor(2.0), **single),
            torch.nn.Flatten(), torch.nn.Linear(3 * side**2, 5),
        ]  # fmt: skip
        net = integers(torch.nn.Sequential(*(p for p in parts if not isinstance(p, torch.nn.Identity))), 5)
        x = torch.randint(0, 2, (32, 2, 6, 6)).float()
        output = net(x)
        graph = sinabs.nir.to_nir(net, x)
        graph.infer_types()
        save(folder / f"sinabs-{name}", graph, x, output)


def save(place: Path, graph: nir.NIRGraph, x: torch.Tensor, output: torch.Tensor) -> None:
    nir.write(place.with_suffix(".nir"), graph)
    np.savez(place.with_suffix(".npz"), x=x.numpy().astype(np.uint8), output=output.detach().numpy())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    with torch.no_grad():
        globals()[sys.argv[1]](Path(sys.argv[2]))
