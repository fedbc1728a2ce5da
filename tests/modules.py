"""Torch modules that tests convert: random ones of many shapes, with batch norms that bite."""

import numpy as np
import torch

from s3nn_deploy import nn


def unsettle(module: torch.nn.Module, seed: int, x: torch.Tensor | None = None) -> torch.nn.Module:
    """Give every batch norm statistics and parameters of a trained network's kind: negative, zero, tiny and huge gammas too."""
    draw = torch.Generator().manual_seed(seed)
    if x is not None:
        module.train()
        with torch.no_grad():
            for _ in range(20):
                module(x)
    for norm in module.modules():
        if isinstance(norm, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d) and norm.affine:
            c = norm.num_features
            norm.weight.data = torch.randn(c, generator=draw).to(norm.weight.dtype)
            norm.bias.data = (1 + torch.randn(c, generator=draw)).to(norm.weight.dtype)
            norm.weight.data[torch.rand(c, generator=draw) < 0.1] = 0.0
            norm.weight.data[torch.rand(c, generator=draw) < 0.05] *= 100
    return module.eval()


class Residual(torch.nn.Module):
    """A stem, a block with an identity-like skip, a strided block with a 1x1 shortcut, and a readout."""

    def __init__(self, channels: int = 4, bits: int = 8) -> None:
        super().__init__()
        c = channels
        self.stem, self.bn0, self.spike = (
            nn.IntConv2d(2, c, 3, padding=1, bits=bits),
            torch.nn.BatchNorm2d(c),
            nn.Spike(),
        )
        self.conv1, self.bn1 = nn.IntConv2d(c, c, 3, padding=1, bias=False, bits=bits), torch.nn.BatchNorm2d(c)
        self.join1, self.bn2 = (
            nn.Afferents(nn.IntConv2d(c, c, 3, padding=1, bits=bits), nn.IntConv2d(c, c, 1, groups=c, bits=bits)),
            torch.nn.BatchNorm2d(c),
        )
        self.conv3, self.bn3 = nn.IntConv2d(c, 2 * c, 3, stride=2, padding=1, bits=bits), torch.nn.BatchNorm2d(2 * c)
        self.join2 = nn.Afferents(
            nn.IntConv2d(2 * c, 2 * c, 3, padding=1, bits=bits), nn.IntConv2d(c, 2 * c, 1, stride=2, bits=bits)
        )
        self.bn4 = torch.nn.BatchNorm2d(2 * c)
        self.readout = nn.IntLinear(2 * c * 4 * 5, 5, bits=bits, per_channel=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s = self.spike(self.bn0(self.stem(x)))
        s = self.spike(self.bn2(self.join1(self.spike(self.bn1(self.conv1(s))), s)))
        s = self.spike(self.bn4(self.join2(self.spike(self.bn3(self.conv3(s))), s)))
        return self.readout(s.view(s.size(0), -1))


def random_module(seed: int) -> tuple[torch.nn.Module, tuple[int, ...], int]:
    """A random sequential module, its input shape and its input bits."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    bits_in = int(rng.choice([1, 4, 8]))
    layers: list[torch.nn.Module] = []
    conv = rng.random() < 0.7
    shape: tuple[int, ...] = (
        (int(rng.integers(1, 4)), *map(int, rng.integers(4, 10, 2))) if conv else (int(rng.integers(2, 40)),)
    )
    start = shape

    def norm(c: int, two: bool) -> list[torch.nn.Module]:
        kind = torch.nn.BatchNorm2d if two else torch.nn.BatchNorm1d
        made: list[torch.nn.Module] = [kind(c, affine=bool(rng.random() < 0.8))] if rng.random() < 0.85 else []
        return [
            *made,
            *([torch.nn.Dropout(0.3)] if rng.random() < 0.2 else []),
            nn.Spike(threshold=float(rng.choice([1.0, 0.0, 0.3]))),
        ]

    for _ in range(int(rng.integers(1, 4)) if conv else 0):
        groups = int(rng.choice([g for g in range(1, shape[0] + 1) if shape[0] % g == 0]))
        out = groups * int(rng.integers(1, 5))
        kernel = tuple(int(min(k, n)) for k, n in zip(rng.integers(1, 4, 2), shape[1:], strict=True))
        layer = nn.IntConv2d(
            shape[0],
            out,
            kernel,
            stride=tuple(map(int, rng.integers(1, 3, 2))),
            padding=tuple(map(int, rng.integers(0, 3, 2))),
            groups=groups,
            bias=bool(rng.random() < 0.5),
            bits=int(rng.choice([1, 2, 3, 4, 8])),
        )
        layers += [layer, *norm(out, True)]
        shape = tuple(torch.nn.Sequential(*layers).eval()(torch.zeros(1, *start)).shape[1:])
        if min(shape[1:]) >= 3 and rng.random() < 0.5:
            layers.append(
                torch.nn.MaxPool2d(
                    int(rng.integers(2, 4)), stride=int(rng.integers(1, 3)), padding=int(rng.integers(0, 2))
                )
            )
            shape = tuple(torch.nn.Sequential(*layers).eval()(torch.zeros(1, *start)).shape[1:])
    if conv:
        layers.append(torch.nn.Flatten())
    features = int(np.prod(shape))
    for _ in range(int(rng.integers(0 if conv else 1, 3))):
        out = int(rng.integers(1, 30))
        layers += [
            nn.IntLinear(features, out, bias=bool(rng.random() < 0.5), bits=int(rng.choice([1, 2, 4, 8]))),
            *norm(out, False),
        ]
        features = out
    layers.append(
        nn.IntLinear(
            features, int(rng.integers(1, 11)), bias=bool(rng.random() < 0.7), per_channel=bool(rng.random() < 0.5)
        )
    )
    module = torch.nn.Sequential(*layers)
    x = torch.from_numpy(rng.integers(0, 1 << bits_in, (32, *start)).astype(np.float32))
    return unsettle(module, seed, x), start, bits_in
