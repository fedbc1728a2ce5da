"""What other people's tools compute from our files: profile x reader x kind of network, written to docs/interop.md.

    python -m benchmarks.interop --networks 100                       with all checkpoints in models/
    python -m benchmarks.interop --networks 100 --models a.pt b.pt    with these

Random integer networks, the tests' shared list and trained networks, as every NIR profile, as ONNX and as QONNX. Each
file is read from disk and compared with the reference by `==`: by our own reader, ONNX Runtime, and every installed peer
(`s3nn-deploy setup peers`). A peer runs all files of the profiles in `EXPECTED`, and of the others the shared list.
Exit code 1 if a reader of ours is wrong, or a peer is not exact where `EXPECTED` says so.
"""

import argparse
import collections
import datetime
import importlib.metadata
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import nets

from s3nn_deploy import formats, model, peers
from s3nn_deploy.backends import reference, run
from s3nn_deploy.errors import DeployError
from s3nn_deploy.formats.nir import PROFILES
from s3nn_deploy.intnet import INPUT, IntNet

ROOT = Path(__file__).resolve().parent.parent
OWN, RUNTIME = "own reader", "onnxruntime"

DENSE, CONV, JOINS, MERGED = KINDS = ("dense", "convolutional", "joins", "joins, merged")
"""Kinds of files: a chain of dense populations, with convolutions, one that is no chain, and that as `--merge-skips` has it."""

CHAINS, EVERY = (DENSE, CONV, MERGED), KINDS

EXPECTED = {
    "if": {"norse": CHAINS, "sinabs": CHAINS, "spikingjelly": EVERY, "nirtorch": EVERY, "sc-neurocore": (DENSE,)},
    "cubalif": {
        "snntorch": EVERY,
        "norse": CHAINS,
        "spikingjelly": EVERY,
        "nirtorch": EVERY,
        "sc-neurocore": (DENSE,),
    },
    "threshold": {"nirtorch": EVERY, "sc-neurocore": (DENSE,)},
    "rockpool": {"rockpool": CHAINS, "nirtorch": EVERY},
    "archive": {"sc-neurocore": (DENSE,)},
    "onnx": {RUNTIME: EVERY},
    "qonnx": {"qonnx": EVERY},
}
"""Who must be exact: file x reader -> kinds. Norse and sinabs give another layer's output where one population drives two
others; sc-neurocore does not take a Conv2d; Rockpool has no joins and no convolutions, which its profile makes dense;
hls4ml compiles each network for seconds, so it is with the others."""


@dataclass(frozen=True)
class Case:
    """A network, what it is called, and whether it was trained."""

    name: str
    net: IntNet
    trained: bool

    @property
    def chain(self) -> bool:
        names = [INPUT, *(p.name for p in self.net.populations)]
        return all([j.source for j in p.projections] == [n] for p, n in zip(self.net.populations, names, strict=False))

    @property
    def kind(self) -> str:
        return (CONV if len(self.net.input.shape) == 3 and not self.dense else DENSE) if self.chain else JOINS

    @property
    def dense(self) -> bool:
        return all(j.synapses.weight.ndim == 2 for p in self.net.populations for j in p.projections)


Tally = dict[tuple[str, str, str, bool], collections.Counter]
"""For a file form, reader, kind and trained or not: how many files are exact, wrong, refused."""


def own(net: IntNet, file: Path, engine: str) -> str:
    """Read the file again and compare its readouts with the network's."""
    x = nets.samples(net, 16)
    back = formats.read(file)
    got = run(back, x.reshape(-1, *back.input.shape), engine, file if engine == "onnx" else None)
    return peers.EXACT if np.array_equal(got.readout, reference.run(net, x).readout) else peers.WRONG


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=100, help="how many random networks")
    parser.add_argument("--models", type=Path, nargs="*", help="trained networks; default all in models/")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "interop.md")
    arguments = parser.parse_args()
    trained = sorted((ROOT / "models").glob("*.pt")) if arguments.models is None else arguments.models
    cases = [
        *(Case(name, net, False) for name, net in nets.ZOO.items()),
        *(Case(f"seed{s}", nets.random_net(s), False) for s in range(5000, 5000 + arguments.networks)),
        *(Case(path.stem, model.load(path), True) for path in trained),
    ]
    tally: Tally = collections.defaultdict(collections.Counter)
    calls: dict[tuple[str, str], collections.Counter] = collections.defaultdict(collections.Counter)
    versions = {"nir": importlib.metadata.version("nir"), RUNTIME: importlib.metadata.version("onnxruntime")}
    unwritten: list[str] = []
    ready = peers.installed()
    for form in EXPECTED:
        with tempfile.TemporaryDirectory() as folder:
            files: list[tuple[Case, str, Path]] = []
            for case, merge in [(c, False) for c in cases] + [(c, True) for c in cases if c.kind == JOINS]:
                if merge and form not in PROFILES:
                    continue
                kind = MERGED if merge else case.kind
                name, options = "onnx", {"qonnx": True} if form == "qonnx" else {}
                if form in PROFILES:
                    name, options = "nir", {"profile": form, "merge_skips": merge}
                file = Path(folder) / f"{case.name}{'-merged' if merge else ''}.{name}"
                try:
                    formats.export(case.net, file, name, **options)
                except DeployError as error:
                    unwritten.append(f"`{form}`, {case.name}{', merged' if merge else ''}: {error}")
                    continue
                files.append((case, kind, file))
                tally[form, OWN, kind, case.trained][own(case.net, file, "reference")] += 1
                if form == "onnx":
                    tally[form, RUNTIME, kind, case.trained][own(case.net, file, "onnx")] += 1
            print(f"{form}: {len(files)} files written", file=sys.stderr, flush=True)
            for few in (False, True):
                takes = ".nir" if form in PROFILES else ".onnx"
                names = [n for n in ready if peers.PEERS[n].takes == takes and (n not in EXPECTED[form]) == few]
                chosen = [one for one in files if not few or one[0].name in nets.ZOO]
                if form == "onnx" or not names or not chosen:
                    continue
                found = peers.conformance([file for _, _, file in chosen], names)
                for (case, kind, _), verdicts in zip(chosen, found, strict=True):
                    for verdict in verdicts:
                        tally[form, verdict.peer, kind, case.trained][verdict.best.status] += 1
                        versions[verdict.peer] = verdict.version
                        if verdict.best.status == peers.EXACT:
                            calls[form, verdict.peer][verdict.best.call] += 1
                        elif kind in EXPECTED[form].get(verdict.peer, ()):
                            print(f"{form}, {verdict.peer}, {case.name}: {verdict.best}", file=sys.stderr, flush=True)
                print(f"{form}: {', '.join(names)}", file=sys.stderr, flush=True)
    text = document(tally, calls, versions, ready, unwritten, arguments.networks, [path.stem for path in trained])
    arguments.output.write_text(text, encoding="utf-8")
    failed = [key for key, counts in tally.items() if must_be_exact(*key[:3]) and set(counts) != {peers.EXACT}]
    for form, reader, kind, _ in failed:
        print(f"not exact, though expected: {form}, {reader}, {kind}", file=sys.stderr)
    return min(len(failed), 1)


def must_be_exact(form: str, reader: str, kind: str) -> bool:
    return reader == OWN or kind in EXPECTED[form].get(reader, ())


def document(
    tally: Tally, calls: dict, versions: dict, ready: list[str], unwritten: list[str], count: int, trained: list[str]
) -> str:
    about = f"{count} random networks and the {len(nets.ZOO)} of `tests/nets.py`"
    lines = [
        "# Our files in other people's tools",
        "",
        f"Written by `python -m benchmarks.interop --networks {count}` on {datetime.date.today()}: {about}, and trained"
        f" ones: {', '.join(trained) or 'none'}.",
        "Exact means that every output, and for peers the spikes of every population where they can be seen, is `==` the"
        " integer network's.",
        "",
        "Versions: " + ", ".join(f"{n} {v}" for n, v in versions.items()) + ".",
    ]
    if missing := [p for p in peers.PEERS if p not in ready]:
        lines += ["", f"Not installed in this run: {', '.join(missing)}. `{peers.COMMAND}` installs them."]
    lines += [
        "",
        "## Which file for which tool",
        "",
        "How many files are exact: of untrained + of trained networks. Other counts say what else happened; a dash: there"
        " is no such file. The call that is exact is below.",
        "",
        f"| file | reader | {' | '.join(KINDS)} |",
        "|---|---|" + "---|" * len(KINDS),
    ]
    readers = list(dict.fromkeys((form, reader) for form, reader, _, _ in tally))
    best = [key for key in readers if key[1] == OWN or key[1] in EXPECTED[key[0]]]
    for form, reader in best:
        cells = [cell(tally, form, reader, kind) for kind in KINDS]
        lines.append(f"| `{form}` | {reader} | {' | '.join(cells)} |")
    lines += [
        "",
        "`if` to `archive` are NIR profiles (`--target nir --profile NAME`), `onnx` is `--target onnx`, `qonnx` is"
        " `--target onnx --qonnx`; merged is `--merge-skips`.",
        "",
        "## What the others do",
        "",
        f"Those that do not belong to a profile, on the {len(nets.ZOO)} networks of `tests/nets.py` and merged ones."
        " Silently wrong: it loads and gives other numbers.",
        "",
    ]
    forms = [*PROFILES, "qonnx"]
    lines += [f"| reader | {' | '.join(f'`{f}`' for f in forms)} |", "|---|" + "---|" * len(forms)]
    for peer in ready:
        cells = []
        for form in forms:
            counts = sum((c for (f, p, _, _), c in tally.items() if (f, p) == (form, peer)), collections.Counter())
            words = ", ".join(f"{n} {s}" for s, n in sorted(counts.items())) or "-"
            cells.append("above" if peer in EXPECTED[form] else words)
        lines.append(f"| {peer} | {' | '.join(cells)} |")
    if unwritten:
        lines += ["", "Refused at export, by a bound that keeps the numbers exact:", ""]
        lines += [f"- {one}" for one in unwritten]
    lines += [
        "",
        "## Loading our file, by peer",
        "",
        "`g = nir.read(path)`; images `(N, C, H, W)`, one step from rest; for QONNX's tools one image at a time.",
        "",
    ]
    for name, peer in peers.PEERS.items():
        for call in peer.calls.values():
            forms = [f for f in EXPECTED if name in EXPECTED[f] or (f == "qonnx" and calls[f, name])]
            exact = [form for form in forms if [call] == [c for c, _ in calls[form, name].most_common(1)]]
            if exact:
                lines.append(f"- {name}, {', '.join(f'`{form}`' for form in exact)}: `{call}`")
    lines += ["", "Which of them is exact for your file: `s3nn-deploy conformance net.nir`.", ""]
    return "\n".join(lines)


def cell(tally: Tally, form: str, reader: str, kind: str) -> str:
    """Such as `31 + 2`, or what was not exact in words."""
    plain, trained = (tally.get((form, reader, kind, t), collections.Counter()) for t in (False, True))
    if not plain and not trained:
        return "-"
    exact = f"{plain[peers.EXACT]} + {trained[peers.EXACT]}"
    others = plain + trained
    words = [f"{others[s]} {s}" for s in (peers.WRONG, peers.REFUSED) if others[s]]
    return ", ".join([exact, *words] if others[peers.EXACT] else words)


if __name__ == "__main__":
    sys.exit(main())
