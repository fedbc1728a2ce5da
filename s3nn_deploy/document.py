"""The report of a network on a target as plain data: one run, its counts, its bill, and what is needed to repeat it."""

import hashlib
import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from s3nn_deploy import __version__
from s3nn_deploy.counts import Totals
from s3nn_deploy.errors import DeployError
from s3nn_deploy.files import existing, sha256
from s3nn_deploy.intnet import IntNet
from s3nn_deploy.machine import Machine, Summary
from s3nn_deploy.pricing import Bill, by_sample, price, twins
from s3nn_deploy.report import describe
from s3nn_deploy.simulation import BATCH, simulate
from s3nn_deploy.targets import Target, check_limits

if TYPE_CHECKING:
    from s3nn_deploy.conversion import Conversion

SCHEMA = "s3nn-deploy-report/1"
"""Changes when a reader of the old schema would misunderstand the new one."""

BINS = 20
"""Bars of a histogram."""


def gather(
    path: Path,
    target: Target,
    x: Any,
    labels: NDArray[np.int64] | None,
    data: str,
    *,
    rate_hz: float | None = None,
    command: str = "",
    jobs: int = 1,
    scheduler: str | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """Run the network in `path` on integers `x` [N, *input shape] and return the report as plain data (`SCHEMA`).

    Energies are nanojoules, counts are means per inference, rates are shares of neurons.

    Args:
        labels: int64 [N], or None.
        data: a word about `x`.
        rate_hz: inferences per second, to add static power.
        command: the line that repeats this report.
        jobs, scheduler: as for `simulation.simulate`.
        progress: called with (samples done, samples in all), counted once for each engine.

    Raises:
        DeployError: as `model.load`, `simulation.simulate` and `pricing.price`.
    """
    from s3nn_deploy.model import load, load_model

    converted = load_model(path) if path.suffix == ".pt" else None
    net = load(path) if converted is None else converted.net
    x = np.asarray(x)
    engines = ["emulator", "reference", *(["pytorch"] if converted is not None else [])]

    def advance(engine: str, done: int, total: int) -> None:
        progress(engines.index(engine) * total + done, len(engines) * total)

    run = partial(simulate, net, x, labels, jobs=jobs, scheduler=scheduler)
    made = run(machines=machines(target), progress=partial(advance, "emulator"))
    found: dict[str, NDArray[Any]] = {
        "reference": run(backend="reference", progress=partial(advance, "reference")).predictions,
        "emulator": made.predictions,
    }
    if converted is not None:
        found = {"pytorch": _by_pytorch(converted, x, partial(advance, "pytorch")), **found}
    counts = made.counts
    assert counts is not None
    bill = price(counts, target, rate_hz)
    return {
        "schema": SCHEMA,
        "model": {"file": path.name, "sha256": sha256(path), "network": net.digest, "input": _input(net)},
        "target": {
            "name": target.name,
            "summary": target.summary,
            "prices": digest(repr((target.events, target.static))),
            "limits": _limits(net, target),
        },
        "data": {
            "what": data,
            "samples": len(x),
            "labels": labels is not None,
            "sha256": digest_array(x, net.input.dtype),
        },
        "accuracy": {
            name: {
                "correct": None if labels is None else int((row == labels).sum()),
                "equal_to_emulator": int((row == made.predictions).sum()),
            }
            for name, row in found.items()
        },
        "populations": _populations(net, counts, bill, made.fired),
        "totals": {kind: counts.mean(kind) for kind in counts.samples},
        "machine": outcome(made.machines[0]) if made.machines else None,
        "bill": asdict(bill),
        "twins_nj": {name: twin.total for name, twin in twins(net, counts, target).items()},
        "energy_histogram": _histogram(by_sample(counts, target, bill)),
        "rate_histogram": _rates(made.fired, len(x)),
        "command": command,
        "versions": {
            "s3nn-deploy": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("numpy", "torch")},
        },
    }


def machines(target: Target) -> tuple[Machine, ...]:
    """The machine that `target` describes, or none."""
    return () if target.machine is None else (target.machine,)


def outcome(found: Summary | DeployError) -> dict[str, Any]:
    """A machine's figures as plain data; only `refused` where the network does not run on it."""
    return {"refused": str(found)} if isinstance(found, DeployError) else found.plain()


def _by_pytorch(converted: "Conversion", x: NDArray[Any], progress: Callable[[int, int], None]) -> NDArray[np.int64]:
    from s3nn_deploy.backends.pytorch import run

    made = []
    for start in range(0, len(x), BATCH):
        made.append(run(converted, x[start : start + BATCH]).predictions)
        progress(min(start + BATCH, len(x)), len(x))
    return np.concatenate(made)


def digest(content: str | bytes) -> str:
    """The SHA-256 of a text or of bytes, in hexadecimal."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def digest_array(x: NDArray[Any], dtype: Any = None) -> str:
    """The SHA-256 of an array's values in C order, as `dtype`, a part at a time: it may be larger than memory."""
    made = hashlib.sha256()
    for start in range(0, len(x), BATCH):
        made.update(np.asarray(x[start : start + BATCH], dtype).tobytes())
    return made.hexdigest()


def _input(net: IntNet) -> dict[str, Any]:
    return {"shape": list(net.input.shape), "bits": net.input.bits}


def _limits(net: IntNet, target: Target) -> str:
    """An empty text, or the first limit that the network exceeds."""
    try:
        check_limits(net, target)
    except DeployError as error:
        return str(error)
    return ""


def _populations(
    net: IntNet, counts: Totals, bill: Bill, fired: Mapping[str, NDArray[np.int64]]
) -> list[dict[str, Any]]:
    n, rows = len(counts), []
    keys = ("name", "shape", "neurons", "synapses", "fan_in", "weights", "weight_bits", "accumulator_bits")
    for plain in describe(net)["populations"]:
        name, kinds = plain["name"], counts.populations[plain["name"]]
        row = {key: plain[key] for key in keys}
        row["weight_memory_bits"] = row["weights"] * row["weight_bits"]
        row["counts"] = {kind: count / n for kind, count in kinds.items()}
        row["energy_nj"] = float(bill.per_population[name])
        row["energy_by_kind_nj"] = {
            line.event: row["counts"][line.event] * line.pj / 1000 for line in bill.lines if line.event in kinds
        }
        if name in fired:
            row["rate"] = int(fired[name].sum()) / (n * row["neurons"])
            row["silent"] = int((fired[name] == 0).sum())
            row["always"] = int((fired[name] == n).sum())
        rows.append(row)
    return rows


def _histogram(values: NDArray[np.float64]) -> dict[str, list[float]]:
    low, high = float(values.min()), float(values.max())
    span = (high - low) or abs(high) or 1.0
    found, edges = np.histogram(values, BINS, (low, high) if high > low else (low - span / 2, low + span / 2))
    return {"edges": edges.tolist(), "counts": found.tolist()}


def _rates(fired: Mapping[str, NDArray[np.int64]], samples: int) -> dict[str, list[float]]:
    """How many neurons fire in which share of the samples."""
    every = np.concatenate([a.ravel() for a in fired.values()]) if fired else np.zeros(0, np.int64)
    found, edges = np.histogram(every / samples, BINS, (0, 1))
    return {"edges": edges.tolist(), "counts": found.tolist()}


def read(path: str | Path) -> dict[str, Any]:
    """A report as `report --json` printed it.

    Raises:
        DeployError: no such file, not JSON, or not a report of this schema.
    """
    path = existing(path)
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        found = plain.get("schema") if isinstance(plain, dict) else type(plain).__name__
        if found == SCHEMA:
            summary(plain)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise DeployError(
            str(path),
            f"is not a readable report ({type(error).__name__}: {error})",
            hint="Write it anew with `report --json`.",
        ) from error
    if found != SCHEMA:
        hint = "Write it with `s3nn-deploy report MODEL --json > FILE`."
        raise DeployError(str(path), "is not a report", expected=f"schema {SCHEMA!r}", got=repr(found), hint=hint)
    return plain


def summary(plain: Mapping[str, Any]) -> dict[str, float | None]:
    """The figures of a report that two reports are compared in; None where there is none."""
    bill, samples = plain["bill"], int(plain["data"]["samples"])
    correct = plain["accuracy"]["emulator"]["correct"]
    rates = [(p["rate"], p["neurons"]) for p in plain["populations"] if "rate" in p]
    fired, neurons = sum(float(r) * n for r, n in rates), sum(n for _, n in rates)
    timed = plain.get("machine") or {}
    return {
        "accuracy": None if correct is None else correct / samples,
        "synaptic operations": float(plain["totals"]["synops"]),
        "of them non-zero": float(plain["totals"]["synops_nonzero"]),
        "multiply-accumulates": float(plain["totals"]["macs"]),
        "dense multiply-accumulates": float(plain["totals"]["dense_macs"]),
        "spikes": float(plain["totals"]["spikes"]),
        "firing rate": fired / neurons if neurons else None,
        "neurons": float(sum(p["neurons"] for p in plain["populations"])),
        "cycles": timed.get("cycles", {}).get("mean"),
        "microseconds": timed.get("microseconds", {}).get("mean"),
        "weight memory, bits": float(sum(p["weight_memory_bits"] for p in plain["populations"])),
        "energy, nJ": None if bill["unpriced"] or not bill["lines"] else float(bill["at_least"]),
        "priced part of the energy, nJ": float(bill["at_least"]) if bill["unpriced"] and bill["lines"] else None,
    }


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Two reports side by side: rows of figures with difference and ratio, and why some have none.

    Energies are set against each other only where both bills are complete and rest on the same prices.
    """
    notes, energy = [], ""
    if (a["target"]["name"], a["target"]["prices"]) != (b["target"]["name"], b["target"]["prices"]):
        names = [str(side["target"]["name"]) for side in (a, b)]
        other = "other prices" if names[0] == names[1] else f"the prices of {names[0]} and {names[1]}"
        energy = (
            f"The energies rest on {other}: their difference would say nothing about the networks, so none is given."
        )
    elif a["bill"]["unpriced"] or b["bill"]["unpriced"]:
        energy = "A bill has terms that nobody priced: what is known of the energies is no total, so they have no difference."
    elif a["bill"]["rate_hz"] != b["bill"]["rate_hz"]:
        energy = "Static power is spread over different rates: the energies have no difference."
    notes += [energy] if energy else []
    if least := [name for name, side in (("A", a), ("B", b)) if side["bill"]["bound"] == "min"]:
        notes.append(f"The prices of {' and '.join(least)} are minimums: the energy is at least what is shown.")
    if a["data"]["sha256"] != b["data"]["sha256"]:
        notes.append(
            f"The inputs differ ({a['data']['what']}, {a['data']['samples']}; {b['data']['what']}, {b['data']['samples']}): "
            "accuracy, rates and counts differ for that reason too."
        )
    if a["model"]["network"] == b["model"]["network"]:
        notes.append("Both are the same network.")
    left, right, rows = summary(a), summary(b), []
    for name in left:
        x, y = left[name], right[name]
        if x is None and y is None:
            continue
        bare = x is None or y is None or (energy and "energy" in name)
        rows.append(
            {
                "figure": name,
                "a": x,
                "b": y,
                "difference": None if bare else y - x,  # type: ignore[operator]
                "ratio": None if bare or not x else y / x,  # type: ignore[operator]
            }
        )
    return {
        "schema": "s3nn-deploy-comparison/1",
        "a": {"model": a["model"], "target": a["target"]["name"], "data": a["data"]},
        "b": {"model": b["model"], "target": b["target"]["name"], "data": b["data"]},
        "rows": rows,
        "notes": notes,
    }


def verdict(plain: Mapping[str, Any]) -> str:
    """The report in a sentence or two."""
    bill, samples, found = plain["bill"], plain["data"]["samples"], plain["accuracy"]
    correct = found["emulator"]["correct"]
    right = "" if correct is None else f"{correct / samples:.2%} of {samples:,} samples right; "
    spread = f"p5 {figure(bill['distribution']['p5'])} to p95 {figure(bill['distribution']['p95'])}"
    if not bill["lines"]:
        energy = f"{figure(plain['totals']['synops'])} synaptic operations per inference; {bill['target']} has no published price"
    else:
        least = "at least " if bill["total"] is None or bill["bound"] == "min" else ""
        energy = f"{least}{figure(bill['at_least'])} nJ per inference on {bill['target']} ({spread})"
    missing = (
        f"; {', '.join(map(kind_name, bill['unpriced']))} not priced" if bill["unpriced"] and bill["lines"] else ""
    )
    names = [ENGINES[name] for name, row in found.items()]
    same = all(row["equal_to_emulator"] == samples for row in found.values())
    agree = "give the same prediction for every sample" if same else "DO NOT give the same predictions"
    joined = ", ".join(names[:-1]) + f" and {names[-1]}"
    timed = plain["machine"] or {}
    time = f"; {figure(timed['microseconds']['mean'])} µs at {timed['clock_mhz']} MHz" if "cycles" in timed else ""
    text = f"{right}{energy}{time}{missing}. "
    return text[0].upper() + text[1:] + joined[0].upper() + joined[1:] + f" {agree}."


ENGINES = {"pytorch": "PyTorch in floats", "reference": "the integer network", "emulator": "the emulator"}


def kind_name(kind: str) -> str:
    """A kind of event as people call it."""
    return {"synops": "synaptic operations", "macs": "multiply-accumulates"}.get(kind, kind.replace("_", " "))


def figure(value: float) -> str:
    """A number with about four significant digits and thousands apart."""
    size = abs(value)
    decimals = 0 if size >= 1000 or value == int(value) else 1 if size >= 100 else 2 if size >= 1 else 4
    return f"{value:,.{decimals}f}"
