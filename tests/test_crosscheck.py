"""Other people's counters count what ours counts: SANA-FE's chip and NeuroBench, fed from the exported file."""

import contextlib
import io
import math
import os

import numpy as np
import pytest
from nets import samples, with_thresholds
from test_emulator import synapses

from s3nn_deploy.backends import run
from s3nn_deploy.formats import export, npz
from s3nn_deploy.intnet import INPUT, Conv2d, Dense, Input, IntNet, Population, Projection, check
from s3nn_deploy.pricing import price

pytestmark = pytest.mark.crosscheck


def needed(name: str):
    """The module, or a skip that says how to get it; where `S3NN_CROSSCHECK_REQUIRED` is set, it must be there."""
    if os.environ.get("S3NN_CROSSCHECK_REQUIRED"):
        return __import__(name)
    return pytest.importorskip(name, reason=f"{name} is not installed; run: make test-crosscheck")


def chain(shape: tuple[int, ...], bits: int, *layers: Dense | Conv2d) -> IntNet:
    populations, source = [], INPUT
    for index, each in enumerate(layers):
        shape, last = each.out_shape(shape if index == 0 else populations[-1].shape), index == len(layers) - 1
        rule = {"bias": [0] * shape[0]} if last else {"threshold": [1] * shape[0]}
        populations.append(Population(f"p{index}", shape, (Projection(source, each),), **rule))
        source = f"p{index}"
    first = populations[0].projections[0].synapses
    size = first.weight.shape[1] if isinstance(first, Dense) else None
    return with_thresholds(check(IntNet(Input((size,) if size else (1, 8, 8), bits), tuple(populations))))


def nets() -> dict[str, IntNet]:
    rng = np.random.default_rng(5)
    w = lambda *s: rng.integers(-8, 9, s)  # noqa: E731  (zeros among them)
    pool = Conv2d(np.ones((4, 1, 2, 2)), stride=(2, 2), groups=4)
    pad = {"padding": (1, 1)}
    return {
        "dense": chain((64,), 8, Dense(w(48, 64)), Dense(w(32, 48)), Dense(w(10, 32))),
        "padded conv": chain(
            (1, 8, 8), 8, Conv2d(w(4, 1, 3, 3), **pad), Conv2d(w(4, 4, 3, 3), **pad), Dense(w(10, 256))
        ),
        "pooled": chain(
            (1, 8, 8), 8, Conv2d(w(4, 1, 3, 3), **pad), pool, Conv2d(w(6, 4, 3, 3), **pad), Dense(w(10, 96))
        ),
    }


NETS = nets()


def exported(name: str, tmp_path) -> tuple[IntNet, np.ndarray]:
    path = tmp_path / "net.npz"
    export(NETS[name], path, "emulator")
    net = npz.read(path)
    return net, samples(net, 6, 3)


@pytest.mark.parametrize("name", NETS)
def test_spikes_and_operations_are_sana_fe_s_and_the_bill_is_its_energy(name, tmp_path):
    sanafe = needed("sanafe")
    net, x = exported(name, tmp_path)
    trace = run(net, x)
    arch, theirs, unit = sanafe.load_loihi(), sanafe.Network(), 1 / 64  # 1/64: the fixed-point step of its potentials
    groups = {}
    for p in net.populations:
        attributes = {"reset_mode": "hard", "leak_decay": 0.0, "force_update": True, "threshold": 1.0}
        groups[p.name] = theirs.create_neuron_group(
            p.name,
            p.size,
            soma_hw_name="loihi_lif",
            default_synapse_hw_name="loihi_dense_synapse",
            log_spikes=True,
            model_attributes=attributes,
        )
        # It fires where v > threshold and keeps thresholds in float32: half a step lower is the same rule, and exact.
        theta = np.full(p.size, 1 << 20) if p.threshold is None else np.repeat(p.threshold, p.size // p.channels)
        for neuron, limit in zip(groups[p.name], theta.tolist(), strict=True):
            neuron.set_attributes(model_attributes={**attributes, "threshold": (limit - 0.5) * unit})
        for j in p.projections:
            if j.source == INPUT:  # its currents are a host's affair
                continue
            target, pairs, weights = targets_of(net, p, j), [], []
            for (i, weight), n in zip(synapses(j, net.source(j).shape, p.shape), target, strict=True):
                pairs.append((i, n))
                weights.append(weight * unit)
            groups[j.source].connect_neurons_sparse(groups[p.name], {"w": weights}, pairs)
    for group, core in zip(groups.values(), arch.cores(), strict=False):
        for neuron in group:
            neuron.map_to_core(core)
    chip = sanafe.SpikingChip(arch)
    chip.load(theirs)
    first = net.populations[0]
    bills = price(trace.counts, "loihi-sanafe")
    assert set(bills.unpriced) == {"macs"}
    total = 0.0
    for sample, one in enumerate(x):
        current = np.zeros(first.size, dtype=np.int64)
        j = first.projections[0]
        for (i, weight), n in zip(synapses(j, net.input.shape, first.shape), targets_of(net, first, j), strict=True):
            current[n] += int(one.reshape(-1)[i]) * weight
        for value, neuron in zip(current.tolist(), chip.mapped_neuron_groups[first.name], strict=True):
            neuron.set_attributes(model_attributes={"bias": value * unit})
        steps = len(net.populations) + 1
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
            result = chip.sim(steps, spike_trace=True, perf_trace=True)
        chip.reset()
        # With a constant input the last step has every population at work on the same inference.
        want = {f"{p.name}.{n}" for p in net.spiking for n in np.flatnonzero(trace.spikes[p.name][sample])}
        got = {str(address) for address in result["spike_trace"][-1]}
        assert got == want
        last = {key: row[-1] for key, row in result["perf_trace"].items()}
        assert last["spikes"] == trace.counts.total("synops")[sample]
        assert last["fired"] == trace.counts.total("spikes")[sample]
        assert last["updated"] == trace.counts.total("neuron_updates")[sample]
        assert last["hops"] == 0  # all cores lie on one tile
        total += last["total_energy"]
    assert math.isclose(bills.at_least * 1e-9, total / len(x), rel_tol=1e-9)


def targets_of(net: IntNet, population: Population, projection: Projection) -> list[int]:
    """The target neuron of each of `synapses(projection)`, in its order."""
    s, source = projection.synapses, net.source(projection).shape
    if isinstance(s, Dense):
        return np.repeat(np.arange(population.size), math.prod(source)).tolist()
    found, (kh, kw) = [], s.weight.shape[2:]
    for n, (_, y, x) in enumerate(np.ndindex(*population.shape)):
        inside = sum(
            0 <= y * s.stride[0] - s.padding[0] + ky * s.dilation[0] < source[1]
            and 0 <= x * s.stride[1] - s.padding[1] + kx * s.dilation[1] < source[2]
            for ky in range(kh)
            for kx in range(kw)
        )
        found += [n] * (inside * s.weight.shape[1])
    return found


@pytest.mark.parametrize("name", NETS)
def test_operations_are_neurobench_s_effective_macs_and_acs(name, tmp_path):
    needed("neurobench")
    import torch
    from neurobench.benchmarks import Benchmark
    from neurobench.metrics.workload import SynapticOperations
    from neurobench.models import TorchModel

    class Fire(torch.nn.Module):
        def __init__(self, threshold) -> None:
            super().__init__()
            self.threshold = threshold

        def forward(self, u: torch.Tensor) -> torch.Tensor:
            theta = torch.tensor(self.threshold.astype(np.float32)).reshape(1, -1, *[1] * (u.ndim - 2))
            return (u >= theta).float()

    net, x = exported(name, tmp_path)
    layers = []
    for p in net.populations:
        s = p.projections[0].synapses
        weight = torch.tensor(s.weight.astype(np.float32))
        if isinstance(s, Dense):
            layers += [torch.nn.Flatten(), torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)]
        else:
            out, per_group, *kernel = weight.shape
            options = {"stride": s.stride, "padding": s.padding, "dilation": s.dilation, "groups": s.groups}
            layers.append(torch.nn.Conv2d(per_group * s.groups, out, kernel, bias=False, **options))
        layers[-1].weight.data = weight
        if p.spiking:
            layers.append(Fire(p.threshold))
    batch = [(torch.tensor(x.astype(np.float32)), torch.zeros(len(x)))]
    with contextlib.redirect_stdout(io.StringIO()):
        benchmark = Benchmark(TorchModel(torch.nn.Sequential(*layers)), batch, [], [], [[], [SynapticOperations]])
        got = benchmark.run(quiet=True)["SynapticOperations"]
    counts = run(net, x).counts
    for theirs, ours in (("Effective_MACs", "macs_nonzero"), ("Effective_ACs", "synops_nonzero")):
        exact = int(counts.total(ours).sum())
        assert exact < 1 << 24  # it sums in float32: exact below
        assert got[theirs] * len(x) == exact or np.float32(got[theirs]) == np.float32(exact / len(x))
