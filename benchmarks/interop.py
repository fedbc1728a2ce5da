"""What other people's tools compute from our files: profile x reader x kind of network, written to docs/interop.md.

    python -m benchmarks.interop --networks 100

Random integer networks and the tests' shared list, as every NIR profile and as ONNX. Each file is read from disk and
compared with the reference by `==`: by our own reader, ONNX Runtime, and every installed peer (`s3nn-deploy setup peers`).
"""

import argparse
import collections
import datetime
import importlib.metadata
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import nets

from s3nn_deploy import formats, peers
from s3nn_deploy.backends import reference, run
from s3nn_deploy.errors import DeployError
from s3nn_deploy.formats.nir import PROFILES
from s3nn_deploy.intnet import INPUT, IntNet

ROOT = Path(__file__).resolve().parent.parent
OWN, RUNTIME = "own reader", "onnxruntime"


def kind_of(net: IntNet) -> str:
    names = [INPUT, *(p.name for p in net.populations)]
    if any([j.source for j in p.projections] != [n] for p, n in zip(net.populations, names, strict=False)):
        return "with joins"
    return "convolutional" if len(net.input.shape) == 3 else "dense"


def own(net: IntNet, file: Path, engine: str) -> str:
    """Read the file again and compare its readouts with the network's."""
    x = nets.samples(net, 16)
    back = formats.read(file)
    got = run(back, x.reshape(-1, *back.input.shape), engine, file if engine == "onnx" else None)
    return peers.EXACT if np.array_equal(got.readout, reference.run(net, x).readout) else peers.WRONG


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=100, help="how many random networks")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "interop.md")
    arguments = parser.parse_args()
    chosen = {**nets.ZOO, **{f"seed{s}": nets.random_net(s) for s in range(5000, 5000 + arguments.networks)}}
    kinds = {name: kind_of(net) for name, net in chosen.items()}
    tally: dict[tuple[str, str, str], collections.Counter] = collections.defaultdict(collections.Counter)
    calls: dict[tuple[str, str], set[str]] = collections.defaultdict(set)
    versions = {OWN: importlib.metadata.version("nir"), RUNTIME: importlib.metadata.version("onnxruntime")}
    ready = peers.installed()
    variants = [(p, merge) for p in PROFILES for merge in (False, True)]
    with tempfile.TemporaryDirectory() as folder:
        for profile, merge in variants:
            row, files, names = f"{profile}, merged skips" if merge else profile, [], []
            for name, net in chosen.items():
                if merge and kinds[name] != "with joins":
                    continue
                file = Path(folder) / f"{name}-{profile}-{merge}.nir"
                try:
                    formats.export(net, file, "nir", profile=profile, merge_skips=merge)
                    tally[row, OWN, kinds[name]][own(net, file, "reference")] += 1
                    files.append(file)
                    names.append(name)
                except DeployError:
                    tally[row, OWN, kinds[name]][peers.REFUSED] += 1
            for name, verdicts in zip(names, peers.conformance(files, ready) if ready else [], strict=False):
                for verdict in verdicts:
                    tally[row, verdict.peer, kinds[name]][verdict.best.status] += 1
                    versions[verdict.peer] = verdict.version
                    if verdict.best.status == peers.EXACT:
                        calls[row, verdict.peer].add(verdict.best.call)
            print(f"{row}: {len(files)} files", file=sys.stderr, flush=True)
        for name, net in chosen.items():
            file = Path(folder) / f"{name}.onnx"
            try:
                formats.export(net, file, "onnx")
                tally["onnx", RUNTIME, kinds[name]][own(net, file, "onnx")] += 1
            except DeployError:
                tally["onnx", RUNTIME, kinds[name]][peers.REFUSED] += 1
    arguments.output.write_text(document(tally, calls, versions, ready, arguments.networks), encoding="utf-8")
    sys.exit(any(c[peers.WRONG] for (_, reader, _), c in tally.items() if reader in (OWN, RUNTIME)))


def document(tally, calls, versions, ready, count: int) -> str:
    columns = ("dense", "convolutional", "with joins")
    lines = [
        "# Our files in other people's tools",
        "",
        f"Written by `python -m benchmarks.interop --networks {count}` on {datetime.date.today()}: {count} random networks"
        f" and the {len(nets.ZOO)} of `tests/nets.py`, untrained.",
        "A cell counts files; exact means that every output (for peers, the spikes too where they can be seen) is `==` the"
        " integer network's.",
        "",
        f"| profile | reader | {' | '.join(columns)} | call |",
        "|---|---|---|---|---|---|",
    ]
    for row, reader in dict.fromkeys((r, p) for r, p, _ in tally):
        cells = [", ".join(f"{n} {s}" for s, n in tally[row, reader, k].items()) or "-" for k in columns]
        call = "; ".join(f"`{c}`" for c in sorted(calls[row, reader])) or "-"
        lines.append(f"| {row} | {reader} | {' | '.join(cells)} | {call} |")
    lines += [
        "",
        "Versions: " + ", ".join(f"{n} {v}" for n, v in versions.items()).replace(OWN, "own reader on nir") + ".",
    ]
    if missing := [p for p in peers.PEERS if p not in ready]:
        lines += [
            "",
            f"Not installed in this run, so without figures: {', '.join(missing)}. `{peers.COMMAND}` installs them.",
        ]
    lines += [
        "",
        "## Loading our file, by peer",
        "",
        "`g = nir.read(path)`; images `(N, C, H, W)`, one step from rest.",
        "",
    ]
    for name, peer in peers.PEERS.items():
        lines.append(f"- {name}: " + " or ".join(f"`{call}`" for call in peer.calls.values()))
    lines += ["", "Which of them is exact for your file: `s3nn-deploy conformance net.nir`.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
