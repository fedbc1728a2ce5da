"""The study: surrogates, twins of other neurons, weight widths, and accuracy against energy; several seeds each.

    python -m benchmarks.study --write             # scikit-learn's digits, embedded; --write: into docs/training.md
    python -m benchmarks.study --set cifar10 --groups neurons --data DIR

Each result is one line of JSON in --folder, so that an interrupted study goes on where it stopped. A row of the tables is the
mean of its seeds (least to most). Every run of a kind has the same data, schedule and number of updates: settings were not
tuned for any of them, and small networks trained briefly say how arms compare, not how far they go.

Energy is one inference's on the target `emulator` (45 nm, docs/accelerator.md): the spiking networks' from the emulator's
counts of held-out samples, the ReLU and binary twins' as dense accelerators of the same target, for which every synapse counts, the
LIF twin's from its spikes, its first layer computed once and its potentials written back at each time step.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import pages
from s3nn_deploy import data, page, recipes, targets, twins
from s3nn_deploy.activity import observing
from s3nn_deploy.backends import run
from s3nn_deploy.capture import capture
from s3nn_deploy.conversion import conversion
from s3nn_deploy.counts import KINDS, Counts
from s3nn_deploy.data import Dataset
from s3nn_deploy.files import write_text
from s3nn_deploy.intnet import INPUT, IntNet, signed_bits
from s3nn_deploy.machine import synapses
from s3nn_deploy.nn import Spike
from s3nn_deploy.pricing import price
from s3nn_deploy.recipes import Recipe
from s3nn_deploy.surrogate import SURROGATES
from s3nn_deploy.train import fit

ROOT = Path(__file__).resolve().parent.parent
PAGE, PLOT = ROOT / "docs" / "training.md", ROOT / "docs" / "study.svg"

STEPS = 4
"""Time steps of the LIF twin."""


@dataclass(frozen=True)
class Setting:
    """A data set, how many of its training images are used, for how long, and the two networks that are trained."""

    data: str
    images: int
    tested: int
    epochs: int
    nets: dict[str, list[dict[str, int]]]


WIDE = {"kernel": 3, "padding": 1}
IMAGES = {
    "plain": [
        {"conv": 16, "stride": 2, **WIDE}, {"conv": 32, "stride": 2, **WIDE}, {"conv": 64, **WIDE}, {"pool": 2},
    ],
    "residual": [{"conv": 16, "stride": 2, **WIDE}, {"block": 16}, {"block": 32, "stride": 2}],
}  # fmt: skip
SETTINGS = {
    "digits": Setting("digits", 1437, 360, 15, {
        "plain": [{"conv": 16, **WIDE}, {"pool": 2}, {"conv": 32, **WIDE}, {"pool": 2}],
        "residual": [{"conv": 16, **WIDE}, {"block": 16}, {"block": 32, "stride": 2}],
    }),
    "mnist": Setting("mnist", 5_000, 10_000, 6, IMAGES),
    "cifar10": Setting("cifar10", 5_000, 5_000, 6, IMAGES),
}  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One thing that is trained: a network, its neuron, its surrogate and width, and how it is pressed to fire less.

    Attributes:
        neuron: "s3nn", or a twin: "relu", "binary", "lif".
        width: factor on the channels.
        sparse: synaptic operations to train down to, as a share of what comes without; 1: no pressure.
    """

    net: str
    neuron: str = "s3nn"
    surrogate: str = "s2nn"
    bits: int = 8
    width: float = 1.0
    sparse: float = 1.0


NEURONS = ("s3nn", "relu", "binary", "lif")
WIDTHS = (0.5, 1.0, 2.0)
GROUPS = {
    "surrogates": [Arm(net, surrogate=name) for name in SURROGATES for net in ("plain", "residual")],
    "neurons": [Arm(net, neuron) for neuron in NEURONS for net in ("plain", "residual")],
    "bits": [Arm("plain", bits=bits) for bits in (8, 4, 3, 2, 1)],
    "energy": [
        *(Arm("plain", width=width, sparse=sparse) for width in WIDTHS for sparse in (1.0, 0.5, 0.25)),
        *(Arm("plain", neuron, width=width) for neuron in NEURONS[1:] for width in (0.5, 1.0)),
    ],
}
"""What each table and the plot show."""


# -- one run


def trained(arm: Arm, seed: int, setting: Setting, folder: Path, without: float) -> dict[str, Any]:
    """Train an arm and measure it; `without` is the arm's mean synaptic operations without pressure, where it is pressed."""
    dataset = _some(setting.data, setting.images, setting.tested)
    layers = tuple(
        {k: max(1, round(v * arm.width)) if k in ("conv", "block") else v for k, v in layer.items()}
        for layer in setting.nets[arm.net]
    )
    table = {
        "summary": "study", "data": setting.data, "layers": list(layers), "bits": arm.bits, "surrogate": arm.surrogate,
        "epochs": setting.epochs, "learning_rate": 4e-3, "weight_decay": 1e-3, "seed": seed,
        "input_bits": 4 if setting.data == "digits" else 8, "flip": setting.data == "cifar10", "shift": 1,
        "synops_target": round(without * arm.sparse) if arm.sparse < 1 else 0,
    }  # fmt: skip
    recipe = recipes.parse("study", table, "study")
    shape, classes = dataset.train_x.shape[1:], len(dataset.classes)
    torch.manual_seed(seed)
    spiking = recipes.build(recipe, shape, classes)
    module = {"s3nn": lambda m: m, "relu": twins.relu, "binary": twins.binary, "lif": _lif}[arm.neuron](spiking)
    clock, out = time.perf_counter(), folder / f"run-{os.getpid()}"
    fit(module, recipe, dataset, out)
    seconds = time.perf_counter() - clock
    for suffix in (".resume", ".metrics.jsonl"):
        out.with_name(out.name + suffix).unlink()
    tested = dataset.quantised(recipe.input_bits)
    dense = {"relu": partial(_dense, floats=True), "binary": partial(_dense, floats=False)}
    found = {"s3nn": _spiking, "lif": _over_time, **dense}[arm.neuron](module, recipe, tested, spiking)
    return {**asdict(arm), "seed": seed, "total": len(tested.test_y), "seconds": round(seconds, 1), **found}


def _lif(module: torch.nn.Module) -> torch.nn.Module:
    return twins.lif(module, STEPS)


@cache
def _some(name: str, images: int, tested: int) -> Dataset:
    """The same part of a data set every time."""
    whole = data.load(name)
    draw = np.random.default_rng(0)
    train, test = (draw.permutation(len(y))[:n] for y, n in ((whole.train_y, images), (whole.test_y, tested)))
    return replace(
        whole,
        train_x=whole.train_x[train],
        train_y=whole.train_y[train],
        test_x=whole.test_x[test],
        test_y=whole.test_y[test],
    )


def _spiking(module: torch.nn.Module, recipe: Recipe, tested: Dataset, _: Any) -> dict[str, Any]:
    """Accuracy, operations and energy of the hardened integer network, by the emulator."""
    net = conversion(capture(module, tested.test_x.shape[1:], recipe.input_bits)).net
    correct, fired, parts = 0, 0, []
    for x, y in _batches(tested):
        trace = run(net, x)
        correct += int((trace.predictions == y).sum())
        fired += sum(int(spikes.sum()) for spikes in trace.spikes.values())
        parts.append(trace.counts)
    totals = _total(parts)
    neurons = sum(p.size for p in net.spiking)
    firing = fired / (neurons * len(tested.test_y))
    return {"correct": correct, "firing": firing, **_figures(totals, len(tested.test_y))}


def _dense(
    module: torch.nn.Module, recipe: Recipe, tested: Dataset, spiking: torch.nn.Module, floats: bool
) -> dict[str, Any]:
    """Accuracy of a twin, and what a dense accelerator of its numbers spends: all synapses, whatever the input is."""
    net = conversion(capture(spiking, tested.test_x.shape[1:], recipe.input_bits)).net
    events = {p.name: _dense_events(net, p.name, floats) for p in net.populations}
    target = targets.load("emulator")
    if floats:
        assert target.float_macs is not None
        target = replace(target, events={**target.events, "macs": target.float_macs})
    return {"correct": _correct(module, tested), "firing": None, **_figures(Counts(events), 1, target)}


def _dense_events(net: IntNet, name: str, floats: bool) -> dict[str, Any]:
    """The events of one population of a dense twin, as `pricing.twins` has them: potentials stay in registers and are stored once.

    A binary twin's hidden synapses add or subtract, so they are priced as additions of 1-bit weights.
    """
    population = net[name]
    count = {kind: np.zeros(1, dtype=np.int64) for kind in KINDS}
    for projection in population.projections:
        n = synapses(net, projection)
        pixels = projection.source == INPUT
        multiplies = floats or pixels
        bits = 32 if floats else 8 if pixels or not population.spiking else 1
        count["macs" if multiplies else "synops"] += n
        count["weight_bits"] += n * bits
    for kind in ("neuron_updates", "membrane_reads", "membrane_writes"):
        count[kind] += population.size
    count["spikes"] += population.size * population.spiking
    return count


def _over_time(module: torch.nn.Module, recipe: Recipe, tested: Dataset, spiking: torch.nn.Module) -> dict[str, Any]:
    """Accuracy, operations and energy of the LIF twin, from the spikes of all time steps."""
    net = conversion(capture(spiking, tested.test_x.shape[1:], recipe.input_bits)).net
    neurons = sum(p.size for p in net.populations)
    spikes, handles = [0], []

    def fired(_m: Any, _i: Any, out: torch.Tensor) -> None:
        spikes[0] += int(out.detach().sum())

    for found in module.modules():
        if isinstance(found, Spike | torch.nn.MaxPool2d):
            handles.append(found.register_forward_hook(fired))
    samples, synops, weight_bits = len(tested.test_y), 0, 0
    correct = 0
    with observing(module) as activity:
        module.eval()
        for x, y in _batches(tested):
            activity.clear()
            logits = module(torch.from_numpy(x).float())  # with gradients: `observing` records synaptic operations then
            correct += int((logits.detach().argmax(1).numpy() == y).sum())
            for name, mean in activity.synops.items():
                pool = isinstance(module.get_submodule(name), torch.nn.MaxPool2d)
                operations = round(float(mean.detach()) * len(x))
                synops += operations
                weight_bits += operations * (signed_bits(1, 1) if pool else recipe.bits)
    for handle in handles:
        handle.remove()
    first = sum(synapses(net, j) for p in net.populations for j in p.projections if j.source == INPUT)
    driven = _nonzero(net, tested) if first else 0
    updates = STEPS * neurons * samples
    events = {kind: np.zeros(1, dtype=np.int64) for kind in KINDS} | {
        "synops": np.array([synops]),
        "macs": np.array([driven]),
        "weight_bits": np.array([weight_bits + 8 * driven]),
        "neuron_updates": np.array([updates]),
        "membrane_reads": np.array([synops + driven + updates]),
        "membrane_writes": np.array([synops + driven + updates]),
        "spikes": np.array([spikes[0]]),
    }
    firing = spikes[0] / (STEPS * sum(p.size for p in net.spiking) * samples)
    return {"correct": correct, "firing": firing, **_figures(Counts({"all": events}), samples)}


def _nonzero(net: IntNet, tested: Dataset) -> int:
    """The first layer's multiply-accumulates over all samples: its input is the same at every time step, so they are done once."""
    return sum(int(_counted(run(net, x).counts).total("macs").sum()) for x, _ in _batches(tested))


def _counted(counts: Counts | None) -> Counts:
    assert counts is not None
    return counts


def _batches(tested: Dataset, size: int = 500) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(tested.test_y), size):
        yield tested.test_x[start : start + size], tested.test_y[start : start + size]


def _correct(module: torch.nn.Module, tested: Dataset) -> int:
    module.eval()
    with torch.no_grad():
        return sum(int((module(torch.from_numpy(x).float()).argmax(1).numpy() == y).sum()) for x, y in _batches(tested))


def _total(parts: list[Any]) -> Counts:
    """Counts summed over all samples, as those of one."""
    first = parts[0].events
    return Counts(
        {p: {k: np.array([sum(int(c.events[p][k].sum()) for c in parts)]) for k in kinds} for p, kinds in first.items()}
    )


def _figures(counts: Counts, samples: int, target: Any = "emulator") -> dict[str, float]:
    bill = price(counts, target)
    assert bill.total is not None
    each = {kind: int(counts.total(kind)[0]) / samples for kind in ("synops", "macs")}
    return {**{kind: round(n, 1) for kind, n in each.items()}, "nj": bill.total / samples}


# -- all runs


def study(
    setting: Setting, groups: list[str], seeds: list[int], folder: Path, jobs: int
) -> dict[Arm, list[dict[str, Any]]]:
    """Every arm of the groups with every seed; what is in the folder already is not trained again."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    arms = list(dict.fromkeys(arm for group in groups for arm in GROUPS[group]))
    done = {(_arm(row), row["seed"]): row for row in rows}
    todo = [(arm, seed) for seed in seeds for arm in arms if (arm, seed) not in done]
    clock, count = time.perf_counter(), len(todo)
    free = [(arm, seed) for arm, seed in todo if arm.sparse == 1]
    pressed = [(arm, seed) for arm, seed in todo if arm.sparse < 1]  # after those that say how much comes without
    _some(setting.data, setting.images, setting.tested)  # read once, before the workers are forked
    with ProcessPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        finished = 0
        for part in (free, pressed):
            running = {}
            for arm, seed in part:
                without = done.get((replace(arm, sparse=1.0), seed), {}).get("synops", 0.0)
                running[pool.submit(trained, arm, seed, setting, folder, without)] = arm, seed
            for future in as_completed(running):
                row = done[running[future]] = future.result()
                with file.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(row) + "\n")
                finished += 1
                left = (time.perf_counter() - clock) / finished * (count - finished)
                print(
                    f"{finished}/{count} {label(running[future][0])}, seed {row['seed']}: "
                    f"{row['correct'] / row['total']:.2%}, about {left / 60:.0f} min left",
                    file=sys.stderr,
                    flush=True,
                )
    return {arm: [done[arm, seed] for seed in seeds] for arm in arms}


def _arm(row: dict[str, Any]) -> Arm:
    return Arm(**{key: row[key] for key in Arm.__dataclass_fields__})


# -- what it says


def label(arm: Arm) -> str:
    """An arm in a few words."""
    named = {"s3nn": "S3NN", "relu": "ReLU, float32", "binary": "binary", "lif": f"LIF, {STEPS} steps"}[arm.neuron]
    parts = [named] + [arm.net] * (arm.net != "plain") + [arm.surrogate] * (arm.surrogate != "s2nn")
    parts += [f"{arm.bits} bits"] * (arm.bits != 8) + [f"width {arm.width:g}"] * (arm.width != 1)
    return ", ".join([*parts, *[f"{arm.sparse:.0%} synops"] * (arm.sparse < 1)])


def short(arm: Arm) -> str:
    """An arm of the group `energy` beside its point in the plot: neuron, width, share of the operations."""
    return (
        label(arm)
        .replace(", width ", " x")
        .replace(" synops", "")
        .replace(f", {STEPS} steps", "")
        .replace(", float32", "")
    )


def spread(rows: list[dict[str, Any]]) -> str:
    shares = [row["correct"] / row["total"] for row in rows]
    return f"{sum(shares) / len(shares):.2%} ({min(shares):.2%} to {max(shares):.2%})"


def mean(rows: list[dict[str, Any]], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def firing(rows: list[dict[str, Any]]) -> str:
    return "-" if rows[0]["firing"] is None else f"{mean(rows, 'firing'):.1%}"


def tables(found: dict[Arm, list[dict[str, Any]]], groups: list[str], setting: Setting) -> str:
    """The study as Markdown."""
    made = []
    if "surrogates" in groups:
        made += ["| surrogate | plain | firing | residual | firing |", "|---|---|---|---|---|"]
        for name in SURROGATES:
            cells = [f(found[Arm(net, surrogate=name)]) for net in setting.nets for f in (spread, firing)]
            made.append(f"| `{name}` | " + " | ".join(cells) + " |")
        made.append("")
    if "neurons" in groups:
        made += ["| neuron | network | accuracy | firing | operations | nJ |", "|---|---|---|---|---|---|"]
        for arm in GROUPS["neurons"]:
            rows = found[arm]
            operations = mean(rows, "synops") + mean(rows, "macs")
            made.append(
                f"| {label(replace(arm, net='plain'))} | {arm.net} | {spread(rows)} | {firing(rows)} | {operations:,.0f} "
                f"| {mean(rows, 'nj'):,.0f} |"
            )
        made.append("")
    for group, heading in (("bits", "weights"), ("energy", "network")):
        if group not in groups:
            continue
        made += [f"| {heading} | accuracy | firing | operations | nJ |", "|---|---|---|---|---|"]
        for arm in GROUPS[group]:
            rows = found[arm]
            name = f"{arm.bits} bit{'s' * (arm.bits > 1)}" if group == "bits" else label(arm)
            operations = mean(rows, "synops") + mean(rows, "macs")
            made.append(f"| {name} | {spread(rows)} | {firing(rows)} | {operations:,.0f} | {mean(rows, 'nj'):,.0f} |")
        made.append("")
    return "\n".join(made)


def plot(found: dict[Arm, list[dict[str, Any]]]) -> str:
    """Accuracy against energy, the means of each arm of the group `energy`, as SVG."""
    points = [
        (short(arm), mean(rows, "nj"), mean(rows, "correct") / rows[0]["total"])
        for arm, rows in found.items()
        if arm in GROUPS["energy"]
    ]
    return page.scatter(points, "nJ per inference on emulator", "accuracy", alone=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", default="digits", choices=SETTINGS, help="data set and networks")
    parser.add_argument("--data", help="folder of data sets; default $S3NN_DATA")
    parser.add_argument("--groups", default=",".join(GROUPS), help="comma-separated")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    parser.add_argument("--folder", type=Path, help="results; default runs/study-<set>")
    parser.add_argument("--write", action="store_true", help="write the tables and the plot into docs/")
    parser.add_argument("--json", action="store_true", help="print plain data")
    options = parser.parse_args()
    groups = options.groups.split(",")
    if unknown := [name for name in groups if name not in GROUPS]:
        parser.error(f"unknown group {unknown[0]!r}; there are {', '.join(GROUPS)}")
    if options.data:
        os.environ["S3NN_DATA"] = options.data
    setting, seeds = SETTINGS[options.set], [int(n) for n in options.seeds.split(",")]
    found = study(setting, groups, seeds, options.folder or Path("runs") / f"study-{options.set}", options.jobs)
    if options.json:
        print(json.dumps([row for rows in found.values() for row in rows], indent=2))
        return
    text = (
        f"`python -m benchmarks.study --set {options.set}`: {setting.images:,} training images of {setting.data}, "
        f"{setting.epochs} epochs, {setting.tested:,} held-out images, mean of {len(seeds)} seeds (least to most); "
        f"PyTorch {torch.__version__}, one thread a run.\n\n{tables(found, groups, setting)}"
    )
    print(text)
    if options.write:
        pages.put(PAGE, f"study {options.set}", text)
        if "energy" in groups and options.set == "digits":
            write_text(PLOT, plot(found))


if __name__ == "__main__":
    main()
