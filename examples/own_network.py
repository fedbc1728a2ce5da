"""A network of one's own, from nn.Module to a verified deployment: python examples/own_network.py

A residual S3NN with weights of 4 and 8 bits is trained on scikit-learn's digits, converted, exported, run, priced and verified.
"""

import sys
import tempfile
from pathlib import Path

import torch

import s3nn_deploy as s3
from s3nn_deploy import data, nn


class Network(torch.nn.Module):
    """A stem, a block whose input joins its output in front of the spike, and a readout; pixels 0..15 as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.IntConv2d(1, 16, 3, padding=1, bias=False), torch.nn.BatchNorm2d(16)
        self.conv, self.norm_conv = nn.IntConv2d(16, 32, 3, 2, padding=1, bias=False, bits=4), torch.nn.BatchNorm2d(32)
        self.join = nn.Afferents(  # one step for both branches, so that their sum stays an integer
            nn.IntConv2d(32, 32, 3, padding=1, bias=False, bits=4), nn.IntConv2d(16, 32, 1, 2, bias=False, bits=4)
        )
        self.norm_join = torch.nn.BatchNorm2d(32)
        self.spike, self.readout = nn.Spike(), nn.IntLinear(32 * 16, 10, per_channel=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s = self.spike(self.norm(self.stem(x)))
        deep = self.spike(self.norm_conv(self.conv(s)))
        return self.readout(self.spike(self.norm_join(self.join(deep, s))).flatten(1))


def main(folder: Path) -> int:
    torch.manual_seed(0)
    digits = data.load("digits").quantised(bits=4)
    x, y = torch.from_numpy(digits.train_x).float(), torch.from_numpy(digits.train_y)
    module = Network()
    optimiser = torch.optim.AdamW(module.parameters(), lr=4e-3)
    for _ in range(6):
        for batch in torch.randperm(len(x)).split(64):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(module(x[batch]), y[batch]).backward()
            optimiser.step()

    model = s3.save_model(module, folder / "own.pt", input_shape=(1, 8, 8), input_bits=4)
    net = s3.load(model)
    trace = s3.run(net, digits.test_x, backend="emulator")
    print(f"held-out accuracy {(trace.predictions == digits.test_y).mean():.1%}")
    bill = s3.price(trace.counts, target="emulator")
    print(f"{trace.counts.total('synops').mean():,.0f} synaptic operations and {bill.total:,.0f} nJ an inference")
    exports = [s3.export(net, folder / f"own.{suffix}", format=f) for f, suffix in (("onnx", "onnx"), ("nir", "nir"))]
    result = s3.verify(model, digits.test_x[:100], backends=["reference", "emulator", "onnx"], exports=exports)
    print("equal, spike by spike" if result.equal else result.first_difference)
    return int(not result.equal)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(main(Path(folder)))
