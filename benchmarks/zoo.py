"""The trained checkpoints in models/: trains recipes, verifies what they give, counts it, and writes it down.

    python -m benchmarks.zoo digits-mlp digits-conv digits-resnet
    python -m benchmarks.zoo mnist-lenet --data DIR --variant bits=4
    python -m benchmarks.zoo mnist-lenet --data DIR --trained runs/mnist-lenet.pt     # from `s3nn-deploy train`

For each recipe: models/NAME.pt and its certificate (every backend against PyTorch, real Lava included; kept where it holds), the
model card models/NAME.md, the recipe's [measured] table, and the table of all of them in docs/training.md. A --variant is
trained with the setting, unless runs/NAME-KEY=VALUE.pt is there, and goes into the table only. --twin trains the full-precision ReLU
twin by the same recipe, too, for comparison. Exit code 1 if a backend differs.
"""

import argparse
import json
import os
import sys
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import pages
from s3nn_deploy import certificate, data, recipes, targets, verification
from s3nn_deploy.backends import pytorch, run
from s3nn_deploy.counts import Counts, join
from s3nn_deploy.data import Dataset
from s3nn_deploy.errors import DeployError
from s3nn_deploy.files import replacing, sha256, write_text
from s3nn_deploy.intnet import IntNet
from s3nn_deploy.model import load_model
from s3nn_deploy.pricing import Bill, price
from s3nn_deploy.recipes import Recipe
from s3nn_deploy.report import synapses
from s3nn_deploy.train import classified, fit, train
from s3nn_deploy.twins import relu

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "models"
PAGE = ROOT / "docs" / "training.md"
BATCH = 500
LARGE = verification.SIMULATED


@dataclass(frozen=True, eq=False)
class Measured:
    """What all held-out samples gave; predictions and readouts of PyTorch and the emulator were equal on each."""

    net: IntNet
    correct: int
    total: int
    counts: Counts
    bill: Bill
    fired: dict[str, int]

    @property
    def firing(self) -> float:
        return sum(self.fired.values()) / (self.total * sum(p.size for p in self.net.spiking))

    @property
    def zeros(self) -> float:
        weights = [j.synapses.weight for p in self.net.populations for j in p.projections]
        return sum(int((w == 0).sum()) for w in weights) / sum(w.size for w in weights)

    def mean(self, kind: str) -> float:
        return float(self.counts.total(kind).mean())


def measure(model: Path, tested: Dataset) -> Measured:
    """Run every held-out sample in PyTorch and on the emulator.

    Raises:
        AssertionError: one readout differs.
    """
    converted = load_model(model)
    net, correct, parts, fired = converted.net, 0, [], dict.fromkeys((p.name for p in converted.net.spiking), 0)
    for start in range(0, len(tested.test_y), BATCH):
        x, y = (a[start : start + BATCH] for a in (tested.test_x, tested.test_y))
        trace, want = run(net, x), pytorch.run(converted, x)
        assert np.array_equal(trace.readout, want.readout), f"{model}: the emulator differs from PyTorch"
        correct += int((trace.predictions == y).sum())
        assert trace.counts is not None
        parts.append(trace.counts)
        for name, spikes in trace.spikes.items():
            fired[name] += int(spikes.sum())
    counts = join(parts)
    return Measured(net, correct, len(tested.test_y), counts, price(counts, targets.load("emulator")), fired)


def card(recipe: Recipe, model: Path, found: Measured, certified: dict[str, Any], facts: dict[str, Any]) -> str:
    """The model card, Markdown; `certified` is the certificate."""
    synops, spread = found.counts.total("synops"), found.bill.distribution
    checks = certified["run"]["backends"]
    ran = ", ".join(dict.fromkeys(check["backend"] for check in checks if check["samples"]))
    compared, differing = (sum(check[key] for check in checks) for key in ("compared", "differing"))
    hashes = {
        "SHA-256 of the file": sha256(model),
        "digest of the integer network": found.net.digest,
        "digest of the certificate": certified["digest"],
    }
    lines = [
        f"# {recipe.name}",
        "",
        f"{recipe.summary}. Written by `python -m benchmarks.zoo {recipe.name}`.",
        "",
        "| | |",
        "|---|---|",
        f"| data | {recipe.data}, {found.total:,} held-out samples, {recipe.input_bits}-bit pixels |",
        f"| accuracy in PyTorch | {found.correct / found.total:.2%} ({found.correct:,}) |",
        "| accuracy on the emulator | the same: all readouts are equal |",
        f"| synaptic operations per inference | mean {synops.mean():,.0f} ({synops.min():,} to {synops.max():,}) |",
        f"| multiply-accumulates of the first layer | mean {found.mean('macs'):,.0f}; a dense network would do "
        f"{found.mean('dense_macs'):,.0f} in all |",
        f"| neurons that fire | {found.firing:.1%} |",
        f"| weights that are zero | {found.zeros:.1%} |",
        f"| energy per inference, target `emulator` | mean {spread.mean:,.0f} nJ (5% to 95%: {spread.p5:,.0f} to "
        f"{spread.p95:,.0f}), {found.bill.evidence} prices; `s3nn-deploy targets emulator` has their sources |",
        f"| verified | {ran}: {compared:,} values, {differing} different |",
        f"| trained by | `{facts['command']}`, on {facts['hardware']} |",
        *(f"| {what} | `{value}` |" for what, value in hashes.items()),
        "",
        f"`s3nn-deploy verify --certificate models/{certificate.place(model).name}` checks what the certificate says of the file.",
        "",
        "| population | neurons | fan-in | fires | synaptic operations |",
        "|---|---|---|---|---|",
    ]
    for population in found.net.populations:
        events = found.counts.events[population.name]
        rate = f"{found.fired[population.name] / (found.total * population.size):.1%}" if population.spiking else "-"
        operations = (events["synops"] + events["macs"]).mean()
        lines.append(
            f"| {population.name} | {population.size:,} | {synapses(population)} | {rate} | {operations:,.0f} |"
        )
    return "\n".join([*lines, ""])


def facts_of(found: Measured, command: str) -> dict[str, Any]:
    """The recipe's [measured] table."""
    made = found.net.provenance
    version, device = made["torch"].partition("+")[0], made.get("device", "cpu")
    recipe, where = made["recipe"], f"one {device}, PyTorch {version}"
    if device == "cpu":
        where = f"a virtual machine with {os.cpu_count()} cores, {certificate.processor()}, PyTorch {version} for CPU"
    if (epochs := made.get("epochs", recipe["epochs"])) < recipe["epochs"]:
        where += f", stopped after {epochs} of {recipe['epochs']} epochs"
    twin = {"twin": round(made["twin_correct"] / found.total, 4)} if "twin_correct" in made else {}
    return {
        "accuracy": round(found.correct / found.total, 4),
        "correct": found.correct,
        "total": found.total,
        "firing": round(found.firing, 4),
        "synops": round(found.mean("synops")),
        "nj": round(found.bill.distribution.mean),
        "command": command if device == "cpu" else f"{command} --device cuda",
        "hardware": where,
        **twin,
    }


def write_measured(name: str, key: str, facts: dict[str, Any]) -> None:
    """Put `facts` into the recipe's file as its table `key`, in the place of what was there."""
    path = MODELS / f"{name}.toml"
    text = path.read_text(encoding="utf-8")
    tables = {"measured": dict(tomllib.loads(text).get("measured", {}))}
    variants = tables["measured"].pop("variants", [])
    if key == "measured":
        tables["measured"] = facts
    else:
        variants = [*(v for v in variants if v["setting"] != key), {"setting": key, **facts}]
    head = text.partition("\n[measured]")[0].rstrip("\n")
    body = "".join(f"{k} = {json.dumps(v)}\n" for k, v in tables["measured"].items())
    more = "".join(
        "\n[[measured.variants]]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in v.items()) for v in variants
    )
    write_text(path, f"{head}\n\n[measured]\n{body}{more}")
    recipes.load(name)


def table() -> str:
    """All measured recipes and their variants, Markdown."""
    rows = [
        "| recipe | held-out accuracy | full-precision twin | firing | synaptic operations | nJ | trained by |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in recipes.names():
        measured = dict(recipes.load(name).measured)
        variants = measured.pop("variants", [])
        for facts in [measured, *variants]:
            if "synops" in facts:
                setting = f", {facts['setting']}" if "setting" in facts else ""
                twin = f"{facts['twin']:.2%}" if "twin" in facts else "-"
                rows.append(
                    f"| {name}{setting} | {facts['accuracy']:.2%} ({facts['correct']:,} of {facts['total']:,}) | {twin} "
                    f"| {facts['firing']:.1%} | {facts['synops']:,} | {facts['nj']:,} | `{facts['command']}` |"
                )
    return "\n".join(rows) + "\n"


def twin_accuracy(recipe: Recipe, dataset: Dataset, device: str) -> float:
    """The held-out accuracy of the recipe's network with float32 weights and ReLU, trained by the same recipe."""
    torch.manual_seed(recipe.seed)
    module = relu(recipes.build(recipe, dataset.train_x.shape[1:], len(dataset.classes)))
    out = Path("runs") / f"{recipe.name}-twin"
    out.parent.mkdir(exist_ok=True)
    fit(module, replace(recipe, distil=0.0, synops_target=0), dataset, out, _say(f"{recipe.name}, twin"), device)
    tested = dataset.quantised(recipe.input_bits)
    return classified(module, tested.test_x, tested.test_y, device) / len(tested.test_y)


def ship(name: str, folder: Path | None, trained: Path | None, variants: list[str], twin: bool, device: str) -> bool:
    """Train (or take), measure, verify and write down one recipe; whether all backends were equal."""
    recipe = recipes.load(name)
    dataset = data.load(recipe.data, folder)
    tested = dataset.quantised(recipe.input_bits)
    model = MODELS / f"{name}.pt"
    command = f"s3nn-deploy train {name}"
    if trained is not None:
        plain = {k: v for k, v in load_model(trained).net.provenance.get("recipe", {}).items() if k != "name"}
        by = recipes.parse(name, plain, str(trained))
        if replace(by, summary=recipe.summary, measured=recipe.measured) != recipe:
            sys.exit(f"{trained} was trained by another recipe than {name}")
        with replacing(model) as temporary:
            temporary.write_bytes(trained.read_bytes())
    elif not model.is_file():
        train(recipe, dataset, model, device=device, report=_say(name))
        model.with_name(f"{name}.pt.metrics.jsonl").unlink()
    found = measure(model, tested)
    place = certificate.place(model)
    if not place.is_file() or not all(finding.holds for finding in certificate.check(place, model)):
        few = 100 if verification.synapses(found.net) <= LARGE else 10
        verification.SLOW = verification.SIMULATED = sys.maxsize  # the reference and Lava run, however long they take
        certificate.write(verification.verify(model, tested.test_x[:few]), model)
    certified = json.loads(place.read_text(encoding="utf-8"))
    facts, equal = facts_of(found, command), certified["verdict"] == "equal"
    if "twin" not in facts and (twin or "twin" in recipe.measured):
        facts["twin"] = round(twin_accuracy(recipe, dataset, device), 4) if twin else recipe.measured["twin"]
    write_measured(name, "measured", facts)
    write_text(MODELS / f"{name}.md", card(recipe, model, found, certified, facts))
    print(f"{name}: {facts['accuracy']:.2%}, {facts['synops']:,} synops, equal: {equal}", flush=True)
    for setting in variants:
        out = Path("runs") / f"{name}-{setting}.pt"
        if not out.is_file():
            train(recipes.load(name, (setting,)), dataset, out, device=device, report=_say(f"{name}, {setting}"))
        variant = facts_of(measure(out, tested), f"{command} --set {setting}")
        write_measured(name, setting, variant)
        print(f"{name}, {setting}: {variant['accuracy']:.2%}", flush=True)
    return equal


def _say(name: str) -> Any:
    def say(done: int, total: int, epoch: Any) -> None:
        if epoch is not None:
            print(f"{name}: step {done} of {total}, {epoch.accuracy:.2%} in training", file=sys.stderr, flush=True)

    return say


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="recipes; none: only the table is written")
    parser.add_argument("--data", type=Path, help="folder of data sets; default $S3NN_DATA")
    parser.add_argument("--trained", type=Path, help="a model of that one recipe, instead of training it here")
    parser.add_argument(
        "--variant", action="append", default=[], metavar="KEY=VALUE", help="train this as well; may be repeated"
    )
    parser.add_argument("--twin", action="store_true", help="train the full-precision ReLU twin as well")
    parser.add_argument("--device", default="cpu", help="where it trains: cpu or cuda")
    options = parser.parse_args()
    if options.trained and len(options.names) != 1:
        parser.error("--trained goes with one recipe")
    how = options.data, options.trained, options.variant, options.twin, options.device
    try:
        equal = [ship(name, *how) for name in options.names]
    except DeployError as error:
        sys.exit(f"error: {error}")
    pages.put(PAGE, "zoo", table())
    sys.exit(0 if all(equal) else 1)


if __name__ == "__main__":
    main()
