"""Hardening: one network on every instruction set, layout, batch size and thread count; without it, several."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from modules import Residual, unsettle
from nets import assert_same, samples

from s3nn_deploy import nn
from s3nn_deploy.backends import pytorch, reference
from s3nn_deploy.capture import capture
from s3nn_deploy.conversion import conversion
from s3nn_deploy.model import load_model, save_model

CHANNELS = 500


def tied_norm(kind: type[torch.nn.Module] = torch.nn.BatchNorm1d) -> torch.nn.Module:
    """A batch norm whose every channel switches at an integer u, as nearly as float32 parameters can say it."""
    draw = torch.Generator().manual_seed(0)
    norm = kind(CHANNELS).eval()
    norm.weight.data = torch.rand(CHANNELS, generator=draw) + 0.1
    norm.bias.data = torch.randn(CHANNELS, generator=draw)
    norm.running_var[:] = torch.rand(CHANNELS, generator=draw) * 1000 + 1
    sigma = (norm.running_var.double() + norm.eps).sqrt()
    u = torch.randint(0, 200, (CHANNELS,), generator=draw).double()
    norm.running_mean[:] = (u - (1 - norm.bias.double()) * sigma / norm.weight.double()).float()
    return norm


def tied_module() -> torch.nn.Module:
    """Every channel's u is the one pixel shown, so that samples can meet every tie."""
    synapses = torch.nn.Conv2d(1, CHANNELS, 1, bias=False)
    synapses.weight.data[:] = 1.0
    readout = nn.IntLinear(CHANNELS, 2, per_channel=False)
    return torch.nn.Sequential(
        synapses, tied_norm(torch.nn.BatchNorm2d), nn.Spike(), torch.nn.Flatten(), readout
    ).eval()


RUN = """
import sys, numpy as np, torch
from s3nn_deploy.backends import pytorch
from s3nn_deploy.model import load_model
for stem in sys.argv[1:]:
    converted, x = load_model(stem + ".pt"), np.load(stem + ".npy")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        trace = pytorch.run(converted, x)
        np.savez(f"{stem}-{threads}.npz", readout=trace.readout, **trace.spikes)
"""

NORM = """
import sys, numpy as np, torch
sys.path.insert(0, sys.argv[1])
from test_hardening import tied_norm
with torch.no_grad():
    u = torch.arange(0, 256).float()[:, None].expand(-1, 500).contiguous()
    np.save(sys.argv[2], (tied_norm()(u) >= 1).numpy())
"""


def capabilities() -> list[str]:
    """The instruction sets that this processor's PyTorch can be told to use."""
    best = torch.backends.cpu.get_cpu_capability().lower()
    known = ["default", "avx2", "avx512"]
    return known[: known.index(best) + 1] if best in known else ["default"]


def child(code: str, *arguments: object, capability: str) -> None:
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True, env=environment)


@pytest.mark.skipif(
    len(capabilities()) < 2, reason="runs on processors with AVX2 or more: two instruction sets are compared"
)
def test_an_unhardened_tie_is_decided_differently_by_two_instruction_sets(tmp_path: Path) -> None:
    for capability in ("default", "avx2"):
        child(NORM, Path(__file__).parent, tmp_path / f"{capability}.npy", capability=capability)
    fired = [np.load(tmp_path / f"{capability}.npy") for capability in ("default", "avx2")]
    assert (fired[0] != fired[1]).any(0).sum() > CHANNELS // 100


def test_the_ties_are_found_and_hardened() -> None:
    converted = conversion(capture(tied_module(), (1, 1, 1)))
    assert len(converted.ambiguous["layer0"]) > CHANNELS * 0.99
    assert not conversion(converted.program, harden=False).ambiguous


def test_a_hardened_module_is_one_network_everywhere(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = unsettle(Residual(), 0, torch.randint(0, 256, (16, 2, 7, 9)).float())
    wanted = {}
    for name, made, shape in (("ties", tied_module(), (1, 1, 1)), ("residual", module, (2, 7, 9))):
        net = load_model(save_model(made, tmp_path / f"{name}.pt", shape)).net
        x = np.arange(256, dtype=np.uint8).reshape(-1, 1, 1, 1) if name == "ties" else samples(net, 12)
        np.save(tmp_path / f"{name}.npy", x)
        wanted[name] = reference.run(net, x)
    for capability in capabilities():
        child(RUN, *(tmp_path / name for name in wanted), capability=capability)
        for name, want in wanted.items():
            for threads in (1, 2):
                with np.load(tmp_path / f"{name}-{threads}.npz") as got:
                    assert np.array_equal(got["readout"], want.readout)
                    assert all(np.array_equal(got[p], spikes) for p, spikes in want.spikes.items())


def test_batch_size_and_memory_layout_do_not_matter() -> None:
    torch.manual_seed(1)
    module = unsettle(Residual(), 1, torch.randint(0, 256, (16, 2, 7, 9)).float())
    converted = conversion(capture(module, (2, 7, 9)))
    x = samples(converted.net, 32)
    want = reference.run(converted.net, x)
    assert_same(pytorch.run(converted, x), want)
    singles = [pytorch.run(converted, x[i : i + 1]).readout for i in range(len(x))]
    assert np.array_equal(np.concatenate(singles), want.readout)
    last = torch.from_numpy(x).float().contiguous(memory_format=torch.channels_last)
    kept = {converted.taps[net.name].value: torch.empty(0) for net in converted.net.spiking}
    program = converted.program.to(memory_format=torch.channels_last)
    with torch.no_grad(), torch.backends.nnpack.flags(enabled=False):
        program(last, kept)
    for population in converted.net.spiking:
        assert np.array_equal(
            kept[converted.taps[population.name].value].numpy().astype(bool), want.spikes[population.name]
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="runs where there is a GPU")
def test_a_gpu_computes_the_same_network() -> None:
    torch.manual_seed(1)
    module = unsettle(Residual(), 1, torch.randint(0, 256, (16, 2, 7, 9)).float())
    converted = conversion(capture(module, (2, 7, 9)))
    x = samples(converted.net, 32)
    kept = {converted.taps[net.name].value: torch.empty(0) for net in converted.net.spiking}
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        converted.program.cuda()(torch.from_numpy(x).float().cuda(), kept)
    want = reference.run(converted.net, x)
    for population in converted.net.spiking:
        assert np.array_equal(
            kept[converted.taps[population.name].value].cpu().numpy().astype(bool), want.spikes[population.name]
        )
