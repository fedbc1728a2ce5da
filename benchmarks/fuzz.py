"""Random networks by the thousand: torch modules against the reference and the engines, every spike and readout, `==`.

    python -m benchmarks.fuzz --count 2000

Odd shapes, strides, padding, dilation, groups, pooling, joins, 1 to 8 bit weights, 1 to 8 bit inputs, batch norms with
negative, zero and huge gammas; inputs all zero, all maximum, one-hot, sparse and random. Prints each failing seed.
"""

import argparse
import collections
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from modules import random_module
from nets import assert_same, random_net, samples

from s3nn_deploy.backends import emulator, pytorch, run
from s3nn_deploy.capture import capture
from s3nn_deploy.conversion import conversion
from s3nn_deploy.engines import blas, winograd
from s3nn_deploy.intnet import IntNet
from s3nn_deploy.trace import Trace

ENGINES = (*(("emulator", engine) for engine in emulator.ENGINES), ("onnx", "auto"))
"""Each backend, and the engine that computes for it."""


def engines(net: IntNet, x: np.ndarray, want: Trace) -> None:
    """Every engine on all samples and, since kernels differ by batch, on a few; those that count agree on the counts."""
    few = 1 + int(x.sum()) % 9
    for n in (len(x), few):
        counts = []
        for backend, engine in ENGINES:
            got = run(net, x[:n], backend, engine=engine)
            assert_same(
                got, Trace({k: v[:n] for k, v in want.spikes.items()}, want.readout[:n], want.scale, "reference")
            )
            counts += [got.counts] if got.counts is not None else []
        assert all(count == counts[0] for count in counts), "the counts differ"


def module_case(seed: int, tally: collections.Counter) -> None:
    """A random module: the module, its program, the hardened program, the reference and every engine."""
    module, shape, bits = random_module(seed)
    program = capture(module, shape, bits)
    converted = conversion(program)
    x = samples(converted.net, 24, seed)
    with torch.no_grad(), torch.backends.nnpack.flags(enabled=False):
        theirs, ours = module(torch.from_numpy(x).float()), program(torch.from_numpy(x).float())
    assert torch.equal(theirs, ours), "the program differs from the module"
    want = run(converted.net, x, "reference")
    assert_same(pytorch.run(converted, x), want)
    engines(converted.net, x, want)
    tally["convolutional" if len(shape) == 3 else "dense"] += 1
    tally["samples"] += len(x)
    tally["values"] += len(x) * sum(p.size for p in converted.net.populations)
    tally["channels"] += sum(p.channels for p in converted.net.spiking)
    tally["ambiguous channels, hardened"] += sum(map(len, converted.ambiguous.values()))


def net_case(seed: int, tally: collections.Counter) -> None:
    """A random integer network, joins included, with thresholds that samples meet exactly."""
    net = random_net(seed)
    x = samples(net, 16, seed)
    want = run(net, x, "reference")
    engines(net, x, want)
    tally["with joins" if any(len(p.projections) > 1 for p in net.populations) else "sequential"] += 1
    tally["samples"] += len(x)
    tally["values"] += len(x) * sum(p.size for p in net.populations)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="random modules, and as many random integer networks")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    arguments = parser.parse_args()
    failed = []
    for name, case in (("modules", module_case), ("integer networks", net_case)):
        tally: collections.Counter = collections.Counter()
        clock = time.perf_counter()
        for index in range(arguments.count):
            seed = arguments.first + index
            winograd.NARROW, blas.MANY = ((24, 64), (1, 0))[seed % 2]  # every other network goes that way wherever it can
            try:
                case(seed, tally)
            except Exception as error:  # any failure is a finding: it is counted, named, and makes the run fail
                failed.append((name, seed))
                print(f"FAILED {name}, seed {seed}: {type(error).__name__}: {error}", flush=True)
            if sys.stderr.isatty():
                print(f"\r{name}: {index + 1}/{arguments.count}", end="", file=sys.stderr, flush=True)
        figures = ", ".join(f"{np.int64(count):,} {kind}" for kind, count in tally.items())
        print(f"\r{name}: {arguments.count:,} tried in {time.perf_counter() - clock:.0f} s; {figures}")
    print(f"{len(failed)} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
