"""Real Lava against the int64 reference: every spike of every population and every readout, one new sample a step, `==`.

    python -m benchmarks.lava_acceptance                                 # trained briefly on scikit-learn's digits, enlarged
    python -m benchmarks.lava_acceptance --data MNIST --images CIFAR     # trained briefly on the first images of these
    python -m benchmarks.lava_acceptance --only vgg --samples 1000
    python -m benchmarks.lava_acceptance --only --models mnist-mlp.pt    # models of your own, and nothing else

Four networks, with trained and with random 8-bit weights, as netx file where they are a chain and as .lava file in every
input encoding; then random networks of the tests' generator; then Intel's own ground truths (`lava_truths`), for which
lava-dl's wheel is fetched by pip. Each result is kept in --folder, so that an interrupted run goes on where it stopped;
the table of all that is kept there is written into docs/loihi.md. Exit code 1 if anything differs.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from nets import random_net, samples, with_thresholds

from benchmarks import pages
from s3nn_deploy import data, formats, lava_env, recipes, targets
from s3nn_deploy.backends import lava, run
from s3nn_deploy.data import Dataset
from s3nn_deploy.errors import DeployError
from s3nn_deploy.intnet import Input, IntNet
from s3nn_deploy.loihi import mapping
from s3nn_deploy.loihi.fit import place
from s3nn_deploy.trace import Trace

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "loihi.md"

CONV = {"kernel": 3, "padding": 1}
NETS: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "mlp": ((1, 28, 28), {"layers": [{"linear": 512, "bits": 4}, {"linear": 512}]}),
    "lenet": (
        (1, 28, 28),
        {"layers": [{"conv": 16, **CONV}, {"pool": 2}, {"conv": 32, **CONV}, {"pool": 2}, {"linear": 128}]},
    ),
    "vgg": (
        (3, 32, 32),
        {
            "layers": [
                {"conv": 32, **CONV}, {"conv": 32, **CONV}, {"pool": 2}, {"conv": 64, **CONV}, {"conv": 64, **CONV},
                {"pool": 2}, {"conv": 128, **CONV}, {"pool": 2}, {"linear": 256},
            ]
        },
    ),
    "residual": (
        (3, 32, 32),
        {"layers": [{"conv": 16, **CONV}, {"block": 16}, {"block": 32, "stride": 2}, {"block": 64, "stride": 2}]},
    ),
}  # fmt: skip
"""Input shape and recipe of each."""

BRIEF = {"epochs": 3, "input_bits": 4, "batch_size": 64, "learning_rate": 2e-3}
TRAIN = 4000
"""Images to train on, at most."""

RANDOM = range(700, 750)
"""Seeds of the random networks."""


@dataclass(frozen=True)
class Row:
    """One comparison: values are spikes of all populations and readout integers of all samples.

    Attributes:
        digest: of the network.
        file: "netx", or "lava" and its input encoding.
        cores: of each target, or why it is not placed.
    """

    net: str
    weights: str
    digest: str
    file: str
    populations: int
    neurons: int
    samples: int
    values: int
    different: int
    rate: float
    seconds: float
    cores: dict[str, int]


class Store:
    """The results in a folder, one line of JSON each; a result is never computed twice."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "results.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.is_file() else []
        self.rows = [json.loads(line) for line in lines]

    def has(self, **key: Any) -> bool:
        return any(all(row.get(k) == v for k, v in key.items()) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


# -- the networks


def pictures(shape: tuple[int, int, int], mnist: Path | None, images: Path | None) -> Dataset:
    """Images of that shape: MNIST or your own where a folder is given, else digits enlarged without interpolation."""
    if shape[0] == 1 and mnist is not None:
        found = data.load("mnist", mnist)
    elif shape[0] == 3 and images is not None:
        found = data.load("images", images)
    else:
        digits = data.load("digits")
        found = replace(digits, train_x=enlarged(digits.train_x, shape), test_x=enlarged(digits.test_x, shape))
    if found.train_x.shape[1:] != shape:
        raise DeployError(found.name, expected=f"images of shape {shape}", got=str(found.train_x.shape[1:]))
    some = np.random.default_rng(0).permutation(len(found.train_x))[:TRAIN]
    return replace(found, train_x=found.train_x[some], train_y=found.train_y[some])


def enlarged(x: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """8x8 digits on a canvas of `shape`; three channels are the image, its negative, and half of it."""
    times = shape[1] // 8
    x = x.repeat(times, 2).repeat(times, 3)
    edge = (shape[1] - x.shape[2]) // 2
    x = np.pad(x, ((0, 0), (0, 0), (edge, edge), (edge, edge)))
    return x if shape[0] == 1 else np.concatenate([x, 255 - x, x // 2], axis=1)


def trained(name: str, folder: Path, mnist: Path | None, images: Path | None) -> tuple[IntNet, np.ndarray, str]:
    """A network trained briefly, held-out samples in its input range, and where its data is from with its accuracy."""
    from s3nn_deploy.train import train

    shape, table = NETS[name]
    found = pictures(shape, mnist, images)
    model = folder / f"{name}-{found.name}.pt"
    if not model.is_file():
        recipe = recipes.parse(name, {"summary": name, "data": found.name, **BRIEF, **table}, f"network {name!r}")
        print(f"training {name} on {len(found.train_x)} images of {found.name}", file=sys.stderr, flush=True)
        train(recipe, found, model)
    from s3nn_deploy.model import load

    return shown(load(model), found)


def given(model: Path, mnist: Path | None) -> tuple[IntNet, np.ndarray, str]:
    """What `trained` returns, of a model that has been trained elsewhere, on what its provenance names."""
    from s3nn_deploy.model import load

    net = load(model)
    name = net.provenance["data"]
    return shown(net, data.load(name, mnist if name == "mnist" else None))


def shown(net: IntNet, found: Dataset) -> tuple[IntNet, np.ndarray, str]:
    """A trained network, held-out samples in its input range in another order, and a word about its training."""
    share = net.provenance["test_correct"] / net.provenance["test_total"]
    order = np.random.default_rng(1).permutation(len(found.test_x))
    x = found.quantised(net.input.bits).test_x[order]
    return net, x, f"trained ({net.provenance['data']}, {share:.1%})"


def randomised(net: IntNet, seed: int = 0) -> IntNet:
    """The same network with uniform 8-bit weights and thresholds on potentials that occur; OR pools stay."""
    rng = np.random.default_rng(seed)
    populations = []
    for p in net.populations:
        if all(np.all(j.synapses.weight == 1) for j in p.projections):
            populations.append(p)
            continue
        joins = tuple(
            replace(j, synapses=replace(j.synapses, weight=rng.integers(-128, 128, j.synapses.weight.shape)))
            for j in p.projections
        )
        given = {} if p.spiking else {"bias": rng.integers(-2000, 2000, p.channels)}
        populations.append(replace(p, projections=joins, **given))
    return with_thresholds(replace(net, populations=tuple(populations)), seed)


# -- comparing


def files(net: IntNet) -> Iterator[tuple[str, dict[str, str]]]:
    """The files that hold `net`: ("netx" or "lava <encoding>", options of the format)."""
    for kind, options in (("netx", {}), *(("lava", {"encoding": e}) for e in ("auto", *mapping.ENCODINGS))):
        try:
            formats.FORMATS[kind].load().lower(net, **options)
            if kind == "lava":
                chosen = mapping.make(net, **options).encoding
                options = {"encoding": chosen}
                yield f"lava {chosen}", options
            else:
                yield kind, options
        except DeployError:
            continue


def compare(net: IntNet, x: np.ndarray, want: Trace, kind: str, options: dict[str, str], folder: Path) -> tuple:
    """Values compared, values that differ, the share of neurons that fired, seconds in Lava."""
    suffix = kind.split()[0]
    file = formats.export(net, folder / f"now.{'net' if suffix == 'netx' else suffix}", suffix, **options)
    clock = time.perf_counter()
    got = lava.run(net, x, file)
    seconds = time.perf_counter() - clock
    pairs = [*((got.spikes[name], spikes) for name, spikes in want.spikes.items()), (got.readout, want.readout)]
    fired = sum(int(spikes.sum()) for spikes in want.spikes.values()) / sum(s.size for s in want.spikes.values())
    return sum(b.size for _, b in pairs), sum(int((a != b).sum()) for a, b in pairs), fired, seconds


def tried(net: IntNet, x: np.ndarray, name: str, weights: str, store: Store) -> None:
    """Every file of `net`, compared on `x`; what is in the store already is left."""
    want = cache(lambda: run(net, x, "reference"))
    done = set()
    for kind, options in files(net):
        key = {"net": name, "digest": net.digest[:16], "file": kind, "samples": len(x)}
        if kind in done or store.has(**key):
            continue
        done.add(kind)
        values, different, rate, seconds = compare(net, x, want(), kind, options, store.folder)
        neurons = sum(p.size for p in net.populations)
        row = Row(**key, weights=weights, populations=len(net.populations), neurons=neurons, values=values,
                  different=different, rate=round(rate, 4), seconds=round(seconds, 1), cores=cores(net))  # fmt: skip
        store.add(asdict(row))


def cores(net: IntNet) -> dict[str, int]:
    """How many cores the network takes on each chip; a chip that does not hold it is left out."""
    found = {}
    for name, generation in (("loihi", 1), ("loihi2", 2)):
        try:
            fit = place(mapping.make(net, "auto", generation), targets.load(name))
        except DeployError:
            continue
        if not fit.unplaced:
            found[name] = len(fit.cores)
    return found


# -- Intel's ground truths


def truths(store: Store) -> None:
    """Run `lava_truths` in Lava's interpreter, on what lava-dl's wheel ships with its tests."""
    place = store.folder / "lava-dl"
    inside = "tests/lava/lib/dl/netx/"
    if not (place / inside).is_dir():
        wheel = next((r for r in lava_env.LAVA if r.startswith("lava-dl")), "lava-dl")
        print(f"fetching the wheel of {wheel}, 68 MB", file=sys.stderr, flush=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
               "--ignore-requires-python", "--dest", str(place), wheel]  # fmt: skip
        subprocess.run(pip, check=True)
        with zipfile.ZipFile(next(place.glob("lava_dl-*.whl"))) as archive:
            for entry in archive.namelist():
                if entry.startswith(inside):
                    archive.extract(entry, place)
    script = Path(__file__).with_name("lava_truths.py")
    command = [str(lava_env.find()), "-I", str(script), str(place / inside)]
    clock = time.perf_counter()
    made = subprocess.run(command, stdout=subprocess.PIPE, text=True, start_new_session=True, timeout=3600)
    seconds = round(time.perf_counter() - clock, 1)
    lines = [json.loads(line) for line in made.stdout.splitlines() if line.startswith('{"truth"')]
    if not lines:
        raise DeployError(str(script), f"ended with status {made.returncode} and compared nothing")
    for line in lines:
        store.add({**line, "seconds": seconds})


# -- the page


def page(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The section between the markers."""
    drawn = [r for r in rows if r.get("net", "").startswith("random")]
    named = [r for r in rows if "net" in r and r not in drawn]
    names = [*NETS, *dict.fromkeys(r["net"] for r in named if r["net"] not in NETS)]
    yield (
        "| network | weights | file | neurons | firing | samples | values compared | different | seconds in Lava "
        "| cores on Loihi, Loihi 2 |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for r in sorted(named, key=lambda r: (names.index(r["net"]), r["weights"], r["file"] != "netx")):
        on = ", ".join(str(r["cores"].get(t, "-")) for t in ("loihi", "loihi2"))
        yield (
            f"| {r['net']} | {r['weights']} | {r['file']} | {r['neurons']:,} | {r['rate']:.0%} | {r['samples']:,} "
            f"| {r['values']:,} | {r['different']:,} | {r['seconds']:,} | {on} |"
        )
    for kind in dict.fromkeys(r["file"] for r in drawn):
        some = [r for r in drawn if r["file"] == kind]
        total = {k: sum(r[k] for r in some) for k in ("neurons", "samples", "values", "different", "seconds")}
        yield (
            f"| {len(some)} random ones | random | {kind} | {total['neurons']:,} | | {total['samples']:,} "
            f"| {total['values']:,} | {total['different']:,} | {total['seconds']:,.0f} | |"
        )
    if found := [r for r in rows if "truth" in r]:
        yield ""
        yield "Intel's own ground truths, which lava-dl 0.6.0 ships with its tests, in the environment that `setup loihi` builds:"
        yield ""
        yield "| ground truth | values compared | different |"
        yield "|---|---|---|"
        yield from (f"| {r['truth']} | {r['values']:,} | {r['different']:,} |" for r in found)


def write_page(rows: list[dict[str, Any]]) -> None:
    pages.put(PAGE, "lava_acceptance", "\n".join(page(rows)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100, help="of each network and file (default 100)")
    parser.add_argument("--data", type=Path, help="folder with MNIST's four files, for the 28x28 networks")
    parser.add_argument("--images", type=Path, help="folder with train/<class>/*.png of 32x32 pixels, for the others")
    parser.add_argument("--only", nargs="*", choices=[*NETS, "random", "truths"], help="some of it")
    parser.add_argument("--models", type=Path, nargs="+", default=[], help="trained model files (.pt) to try as well")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "lava-acceptance", help="models and results")
    options = parser.parse_args()
    store = Store(options.folder)
    chosen = [*NETS, "random", "truths"] if options.only is None else options.only
    os.environ.setdefault("S3NN_LAVA_TIMEOUT", "7200")
    for name in (n for n in NETS if n in chosen):
        net, x, word = trained(name, options.folder, options.data, options.images)
        tried(net, x[: options.samples], name, word, store)
        net = randomised(net)
        tried(net, samples(net, options.samples, 1), name, "random", store)
        if name == "mlp":  # whose sums over pixels of 4 bits and weights of 8 leave what a netx file can hold
            net = randomised(replace(net, input=Input(net.input.shape, 1)))
            tried(net, samples(net, options.samples, 1), name, "random, binary input", store)
    for model in options.models:
        net, x, word = given(model, options.data)
        tried(net, x[: options.samples], model.stem, word, store)
    if "random" in chosen:
        for seed in RANDOM:
            net = random_net(seed)
            tried(net, samples(net, options.samples, 1), f"random{seed}", "random", store)
    if "truths" in chosen and not store.has(truth="tinynet"):
        truths(store)
    write_page(store.rows)
    different = sum(row["different"] for row in store.rows)
    print(f"{len(store.rows)} comparisons, {sum(r['values'] for r in store.rows):,} values, {different:,} different")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
