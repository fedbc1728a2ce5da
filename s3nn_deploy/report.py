"""What commands print: tables for people, dictionaries with the same figures for machines. Computes nothing new."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from s3nn_deploy.certificate import Finding
from s3nn_deploy.errors import DeployError
from s3nn_deploy.intnet import Dense, IntNet, Population, reach, signed_bits, worst_case
from s3nn_deploy.pricing import Bill
from s3nn_deploy.proof import PopulationProof
from s3nn_deploy.simulation import Simulation
from s3nn_deploy.verification import Result


def table(*columns: str, title: str | None = None) -> Table:
    """An empty table; columns whose title starts with '>' are aligned to the right."""
    made = Table(title=title, box=None, pad_edge=False, title_justify="left", header_style="bold", title_style="bold")
    for column in columns:
        made.add_column(
            column.lstrip(">"),
            justify="right" if column.startswith(">") else "left",
            overflow="fold",
            no_wrap=column not in ("synapses", "summary"),
        )
    return made


def synapses(population: Population) -> str:
    """The projections of a population in one short line."""
    parts = []
    for projection in population.projections:
        s = projection.synapses
        if isinstance(s, Dense):
            parts.append(f"dense <- {projection.source}")
            continue
        kernel, stride, padding, dilation = (
            "x".join(map(str, sorted(set(pair), reverse=True) if pair[0] == pair[1] else pair))
            for pair in (s.weight.shape[2:], s.stride, s.padding, s.dilation)
        )
        extras = [
            f"s{stride}" if s.stride != (1, 1) else "",
            f"p{padding}" if s.padding != (0, 0) else "",
            f"d{dilation}" if s.dilation != (1, 1) else "",
            f"g{s.groups}" if s.groups > 1 else "",
        ]
        parts.append(" ".join(filter(None, [f"conv {kernel}", *extras])) + f" <- {projection.source}")
    return " + ".join(parts)


def describe(net: IntNet) -> dict[str, Any]:
    """The network's populations as plain data: shapes, wiring, fan-in, widths, thresholds."""
    rows = []
    for p in net.populations:
        low, high = reach(net, p)
        weights = [j.synapses.weight for j in p.projections]
        row: dict[str, Any] = {
            "name": p.name,
            "shape": list(p.shape),
            "neurons": p.size,
            "synapses": synapses(p),
            "fan_in": sum(int(np.prod(w.shape[1:])) for w in weights),
            "weights": sum(w.size for w in weights),
            "weight_bits": max(signed_bits(int(w.min()), int(w.max())) for w in weights),
            "potential": [int(low.min()), int(high.max())],
            "accumulator_bits": signed_bits(int(low.min()), int(high.max())),
            "worst_case": worst_case(net, p),
        }
        if p.threshold is not None:
            row["threshold"] = [int(p.threshold.min()), int(p.threshold.max())]
            row["constant_channels"] = int(((p.threshold <= low) | (p.threshold > high)).sum())
        else:
            row["bias"] = [int(p.bias.min()), int(p.bias.max())]  # type: ignore[union-attr]
        rows.append(row)
    return {
        "input": {"shape": list(net.input.shape), "bits": net.input.bits},
        "classes": list(net.classes),
        "digest": net.digest,
        "populations": rows,
        "provenance": dict(net.provenance),
    }


def describe_table(net: IntNet) -> Table:
    """`describe` for people."""
    made = table(
        "population", "shape", "synapses", ">fan-in", ">weights", ">w bits", ">u range", ">acc bits", ">threshold"
    )
    for row in describe(net)["populations"]:
        last = "readout" if "bias" in row else _span(*row["threshold"])
        made.add_row(
            row["name"],
            "x".join(map(str, row["shape"])),
            row["synapses"],
            f"{row['fan_in']:,}",
            f"{row['weights']:,}",
            str(row["weight_bits"]),
            _span(*row["potential"]),
            str(row["accumulator_bits"]),
            last,
        )
    return made


def _span(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,} .. {high:,}"


def simulation(net: IntNet, sim: Simulation, bill: Bill | None, twins: Mapping[str, Bill]) -> dict[str, Any]:
    """A simulation as plain data; counts and energies are means per inference."""
    n = len(sim.predictions)
    rows = []
    for p in net.populations:
        row: dict[str, Any] = {"name": p.name, "neurons": p.size}
        if p.spiking:
            row["rate"] = sim.rate(p.name)
        if sim.counts is not None:
            row["counts"] = {kind: count / n for kind, count in sim.counts.populations[p.name].items()}
        if bill is not None:
            row["energy_nj"] = float(bill.per_population[p.name])
        rows.append(row)
    made: dict[str, Any] = {
        "backend": sim.backend,
        "samples": n,
        "populations": rows,
        "predictions": sim.predictions.tolist(),
    }
    if sim.correct is not None:
        made |= {"correct": sim.correct, "accuracy": sim.correct / n}
    if bill is not None:
        made["bill"] = asdict(bill)
        made["twins_nj"] = {name: twin.total for name, twin in twins.items()}
    for found in sim.machines:
        refused = isinstance(found, DeployError)
        made["machine"] = None if isinstance(found, DeployError) else found.plain()
        made["machine_refusal"] = str(found) if refused else None
    return made


def simulation_table(net: IntNet, sim: Simulation, bill: Bill | None) -> Table:
    """A simulation per population, for people: means per inference."""
    n = len(sim.predictions)
    made = table(
        "population",
        ">neurons",
        ">rate",
        *([] if sim.counts is None else [">synops", ">non-zero", ">MACs", ">dense MACs"]),
        *([] if bill is None else [">energy nJ"]),
        title=f"Per inference (mean of {n:,} samples, {sim.backend})",
    )
    kinds = ("synops", "synops_nonzero", "macs", "dense_macs")
    for p in net.populations:
        cells = [] if sim.counts is None else [f"{sim.counts.populations[p.name][kind] / n:,.1f}" for kind in kinds]
        cells += [] if bill is None else [f"{float(bill.per_population[p.name]):,.3f}"]
        made.add_row(p.name, f"{p.size:,}", f"{sim.rate(p.name):.1%}" if p.spiking else "-", *cells)
    if sim.counts is not None:
        cells = [f"{sim.counts.mean(kind):,.1f}" for kind in kinds]
        cells += [] if bill is None else [f"{float(sum(bill.per_population.values())):,.3f}"]
        made.add_row("total", f"{sum(p.size for p in net.populations):,}", "", *cells, style="bold")
    return made


def simulation_sentences(sim: Simulation, bill: Bill | None, twins: Mapping[str, Bill], what: str) -> Iterator[str]:
    """What a simulation comes to; `what` is a word about its inputs."""
    n = len(sim.predictions)
    if bill is not None:
        yield from bill_sentences(bill)
        if twins:
            spent = ", ".join(f"{name} {twin.total:,.1f} nJ" for name, twin in twins.items())
            yield f"Twins without spikes, same target, no static power: {spent}; this network {bill.total:,.1f} nJ."
    for found in sim.machines:
        if isinstance(found, DeployError):
            yield f"Machine: {found}"
            continue
        plain = found.plain()
        cycles, time = plain["cycles"], plain["microseconds"]
        yield (
            f"Machine: {plain['cores']} cores of {plain['elements']} elements at {plain['clock_mhz']} MHz: "
            f"{cycles['mean']:,.0f} cycles ({cycles['min']:,} to {cycles['max']:,}), {time['mean']:,.2f} us an inference; "
            f"at most {plain['queue_peak']:,} of {plain['queue_capacity']:,} events wait in a queue. More: --json."
        )
    if sim.correct is not None:
        yield f"Accuracy: {sim.correct / n:.2%} ({sim.correct} of {n}, {what})."
    else:
        yield f"Predictions of the first samples ({what}): {sim.predictions[:16].tolist()}"


def bill_table(bill: Bill) -> Table:
    """The terms of a bill, each with its origin."""
    made = table(
        "event",
        ">per inference",
        ">pJ each",
        ">nJ",
        "evidence",
        "source",
        title=f"Energy per inference on {bill.target}",
    )
    for number, line in enumerate(bill.lines, 1):
        least = {"min": ">= ", "max": "<= "}.get(line.bound, "")
        made.add_row(
            line.event,
            f"{line.count:,.1f}",
            f"{least}{line.pj:,.4g}",
            f"{line.nj:,.3f}",
            f"{line.evidence}, {line.scope}",
            f"({number})",
        )
    for event, count in bill.unpriced.items():
        made.add_row(event, f"{count:,.1f}", "-", "-", "unpublished, not zero", "")
    return made


def bill_sentences(bill: Bill) -> Iterator[str]:
    """What a bill comes to, and what it leaves out."""
    spread = bill.distribution
    over = f"over {bill.samples} samples: p5 {spread.p5:,.2f}, p95 {spread.p95:,.2f}, min {spread.min:,.2f}, max {spread.max:,.2f} nJ"
    if not bill.lines:
        yield f"No energy: nothing is priced on {bill.target}; the counts stand for themselves."
    elif bill.total is None or bill.bound == "min":
        yield f"At least {bill.at_least:,.2f} nJ per inference on {bill.target} ({over})."
    else:
        yield f"{bill.total:,.2f} nJ per inference on {bill.target} ({over})."
    if bill.unpriced:
        yield f"Not priced: {', '.join(f'{n:,.1f} {event}' for event, n in bill.unpriced.items())}."
        yield from (f"{event}: {why}." for event, why in bill.reasons.items())
    for number, line in enumerate(bill.lines, 1):
        yield f"({number}) {line.source}."
    if bill.not_modelled:
        yield f"Not in the bill: {'; '.join(bill.not_modelled)}."


def populations_table(plain: Mapping[str, Any]) -> Table:
    """The populations of a `document`, for people."""
    unpriced = plain["bill"]["unpriced"]
    made = table(
        "population",
        ">neurons",
        ">rate",
        ">never fire",
        ">synops",
        ">MACs",
        ">priced part nJ" if unpriced else ">energy nJ",
        title=f"{plain['model']['file']} on {plain['target']['name']}, means per inference",
    )
    for p in plain["populations"]:
        made.add_row(
            escape(p["name"]),
            f"{p['neurons']:,}",
            f"{p['rate']:.1%}" if "rate" in p else "-",
            f"{p['silent']:,}" if "silent" in p else "-",
            f"{p['counts']['synops']:,.1f}",
            f"{p['counts']['macs']:,.1f}",
            f"{p['energy_nj']:,.3f}" if plain["bill"]["lines"] else "-",
        )
    return made


def comparison_table(plain: Mapping[str, Any]) -> Table:
    """Two compared documents, for people."""
    names = [escape(f"{side['model']['file']} on {side['target']}") for side in (plain["a"], plain["b"])]
    made = table("figure", ">A", ">B", ">B - A", ">B / A", title=f"A: {names[0]}; B: {names[1]}")
    for row in plain["rows"]:
        cells = ["-" if row[key] is None else f"{row[key]:,.4g}" for key in ("a", "b", "difference", "ratio")]
        made.add_row(row["figure"], *cells)
    return made


def sweep_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The points of a sweep, for people."""
    made = table(
        "point",
        ">w bits",
        ">accuracy",
        ">same predictions",
        ">synops",
        ">weights KiB",
        ">cycles",
        ">µs",
        ">energy nJ",
        "",
    )
    for row in rows:
        if "network" not in row:
            made.add_row(escape(row["label"]), *["-"] * 8, "refused")
            continue
        energy = "-" if row["at_least_nj"] is None else f"{row['at_least_nj']:,.2f}"
        least = ">= " if energy != "-" and (row["unpriced"] or row["bound"] == "min") else ""
        made.add_row(
            escape(row["label"]),
            str(row["weight_bits"]),
            "-" if row["accuracy"] is None else f"{row['accuracy']:.2%}",
            f"{row['same_predictions']:.2%}",
            f"{row['synops']:,.1f}",
            f"{row['weight_memory_bits'] / 8192:,.1f}",
            "-" if row["cycles"] is None else f"{row['cycles']:,.0f}",
            "-" if row["microseconds"] is None else f"{row['microseconds']:,.2f}",
            f"{least}{energy}",
            "refused" if row["refused"] else "",
        )
    return made


def result(made: Result) -> dict[str, Any]:
    """A verification as plain data; the certificate has all of it."""
    first = made.first_difference
    return {
        "equal": made.equal,
        "proved": made.proof.holds,
        "failures": list(made.proof.failures),
        "baseline": made.baseline,
        "samples": made.samples,
        "injected": made.injected,
        "digest": made.digest,
        "checks": [
            {"backend": c.backend, "compared": c.compared, "differing": c.differing, "seconds": round(c.seconds, 3)}
            for c in made.checks
        ],
        "not_run": dict(made.not_run),
        "files": [asdict(file) for file in made.files],
        "first_difference": None if first is None else {**asdict(first), "neuron": list(first.neuron)},
        "coverage": {name: asdict(covered) for name, covered in made.coverage.items()},
    }


def proof_table(made: Result) -> Table:
    """What is proved of each population, for people."""
    dtype = made.proof.dtype
    title = f"Proved for every input ({dtype} sums and decisions)" if dtype else "Ranges for every input"
    rows = table(
        "population",
        "what",
        ">channels",
        ">u range",
        ">largest sum",
        ">margin",
        ">float error",
        ">u tried",
        "",
        title=title,
    )
    for p in made.proof.populations:
        bound = "" if p.limit is None else f" < {p.limit:,}" if p.worst_case < p.limit else f" >= {p.limit:,}"
        margin = "-" if p.margin is None else f"{p.margin:.3g}"
        error = "-" if p.safety is None or p.margin is None else f"1/{p.safety:,.3g}"
        tried = "-" if not p.evaluated else "all" if p.evaluated == p.reachable else f"{p.evaluated / p.reachable:.1%}"
        verdict = "[red]NOT PROVED[/]" if p.failures else "[green]proved[/]" if dtype else ""
        rows.add_row(
            p.name,
            _kind(p),
            str(len(p.theta)),
            _span(min(p.low), max(p.high)),
            f"{p.worst_case:,}{bound}",
            margin,
            error,
            tried,
            verdict,
        )
    return rows


def _kind(p: PopulationProof) -> str:
    if p.kind == "or":
        return "OR of spikes"
    if p.kind == "readout":
        return "linear readout"
    falling, constant = p.direction.count(-1), p.direction.count(0)
    parts = [f"{falling} falling" if falling else "", f"{constant} constant" if constant else ""]
    parts.append(f"{len(p.hardened)} hardened" if p.hardened else "")
    return ", ".join(["thresholds", *filter(None, parts)])


def proof_sentence(made: Result) -> str:
    """What the proof comes to."""
    if not made.proof.holds:
        more = f" ({len(made.proof.failures)} failures in all)" if len(made.proof.failures) > 1 else ""
        return f"NOT PROVED: {made.proof.failures[0]}{more}."
    if made.proof.dtype is None:
        return "No PyTorch program: nothing to prove about floats; the integer network is its own meaning."
    return (
        "Proved: no sum leaves what floats hold exactly, every decision is monotone in u, and no switching point is within"
        " float error of an integer; so PyTorch decides as the integer thresholds do, for every input."
    )


def result_table(made: Result) -> Table:
    """What was run, for people: one row a backend."""
    against = "PyTorch" if made.baseline == "pytorch" else "the int64 reference"
    title = f"Run against {against}: {made.samples:,} inputs, {made.injected:,} of single populations"
    rows = table("backend", "what", ">values compared", ">different", ">seconds", "", title=title)
    for c in made.checks:
        verdict = "[green]equal[/]" if c.differing == 0 else "[red]DIFFERENT[/]"
        rows.add_row(c.backend, c.what, f"{c.compared:,}", f"{c.differing:,}", f"{c.seconds:.2f}", verdict)
    return rows


def coverage_table(made: Result) -> Table:
    """How the thresholds of each population were met, for people: channels of how many where it is possible."""
    rows = table(
        "population",
        ">channels",
        ">fired and silent",
        ">u = theta",
        ">u = theta - 1",
        ">pinned",
        ">weights",
        ">undecided",
        title="Channels that the inputs tried",
    )
    for name, c in made.coverage.items():
        rows.add_row(
            name,
            str(c.channels),
            str(c.both),
            f"{c.at} of {c.at_reachable}",
            f"{c.below} of {c.below_reachable}",
            f"{c.pinned}",
            f"{c.weights_pinned:,} of {c.weights:,}",
            str(c.undecided or "-"),
        )
    return rows


def result_sentences(made: Result) -> Iterator[str]:
    """The verdict, what was not run, and where it differs."""
    for file in made.files:
        if file.difference:
            yield f"Different: {file.name} {file.difference}."
    for check in made.checks:
        if check.first_difference is not None:
            yield f"Different: {check.first_difference}."
        for name, reason in check.left_out.items():
            yield f"Left out on {check.backend}: population {name!r} by itself ({reason})"
    for name, reason in made.not_run.items():
        yield f"Not run: {name} ({reason.rstrip('.')})."
    if made.equal:
        names = ", ".join(dict.fromkeys(c.backend for c in made.checks if c.backend != made.baseline or c.samples))
        pinned, channels = (sum(getattr(c, key) for c in made.coverage.values()) for key in ("pinned", "channels"))
        yield (
            f"Equal: {names} {'give' if ', ' in names else 'gives'} every spike of every population and every readout"
            f" exactly as {made.baseline} does; "
            f"for {pinned} of {channels} channels any other threshold would have shown."
        )


def certificate_table(findings: list[Finding]) -> Table:
    """What checking a certificate found, for people."""
    rows = table("certified", "", "what is there now")
    for finding in findings:
        rows.add_row(finding.what, "[green]matches[/]" if finding.holds else "[red]DOES NOT MATCH[/]", finding.detail)
    return rows
