"""Time of `verify` for a CIFAR-size residual network of ResNet-18's widths (64 to 512 channels, 17 spiking populations).

    python -m benchmarks.verify

Random integer weights, batch norm statistics of random images. Prints what was proved, run and covered, and the seconds;
exit code 1 if anything differs.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

import s3nn_deploy as s3
from s3nn_deploy import nn
from s3nn_deploy.certificate import versions

SHAPE = (3, 32, 32)


class Block(torch.nn.Module):
    """conv, batch norm, spike, conv joined with a 1x1 convolution of the block's input, batch norm, spike."""

    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.IntConv2d(before, channels, 3, stride=stride, padding=1, bias=False)
        self.join = nn.Afferents(
            nn.IntConv2d(channels, channels, 3, padding=1, bias=False),
            nn.IntConv2d(before, channels, 1, stride=stride, bias=False),
        )
        self.norm, self.norm_joined = torch.nn.BatchNorm2d(channels), torch.nn.BatchNorm2d(channels)
        self.spike = nn.Spike()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.spike(self.norm_joined(self.join(self.spike(self.norm(self.conv(x))), x)))


def resnet18(seed: int = 0) -> torch.nn.Module:
    """An untrained S3NN of ResNet-18's depth and widths on inputs [N, 3, 32, 32], in eval mode."""
    torch.manual_seed(seed)
    layers: list[torch.nn.Module] = [
        nn.IntConv2d(3, 64, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(64),
        nn.Spike(),
    ]
    before = 64
    for channels in (64, 128, 256, 512):
        layers += [Block(before, channels, 1 if channels == before else 2), Block(channels, channels, 1)]
        before = channels
    module = torch.nn.Sequential(*layers, torch.nn.AvgPool2d(4), torch.nn.Flatten(), nn.IntLinear(512, 10))
    with torch.no_grad():
        for _ in range(3):
            module(torch.randint(0, 256, (16, *SHAPE)).float())
    return module.eval()


def main(budget: float) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path, clock = Path(folder) / "resnet18.pt", time.perf_counter()
        s3.save_model(resnet18(), path, input_shape=SHAPE, input_bits=8)
        net = s3.load(path)
        synapses = sum(j.synapses.weight.size for p in net.populations for j in p.projections)
        print(
            f"{len(net.populations)} populations, {synapses:,} weights; converted in {time.perf_counter() - clock:.1f} s"
        )
        clock = time.perf_counter()
        result = s3.verify(path, budget=int(budget * 1e9))
        seconds = time.perf_counter() - clock
    reached = sum(p.evaluated for p in result.proof.populations) / sum(p.reachable for p in result.proof.populations)
    channels, pinned = (sum(getattr(c, k) for c in result.coverage.values()) for k in ("channels", "pinned"))
    print(f"proved for every input: {result.proof.holds}; PyTorch's chain evaluated at {reached:.0%} of all potentials")
    print(
        f"{result.samples} inputs, {result.injected:,} of single populations; {pinned:,} of {channels:,} channels pinned"
    )
    for check in result.checks:
        print(f"{check.backend:10} {check.compared:>12,} values, {check.differing} different, {check.seconds:.1f} s")
    print(f"verify took {seconds:.1f} s, {torch.get_num_threads()} threads, torch {versions(lava=False)['torch']}")
    return int(not result.equal)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--budget", type=float, default=10, help="1e9 synaptic operations for each population by itself"
    )
    sys.exit(main(**vars(parser.parse_args())))
