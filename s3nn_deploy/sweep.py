"""Sweeps: one network at several weight widths, on several targets and variants of them, in parallel and resumable.

A sweep is a list of points. Each finished point is one line of JSON in the results file; points whose line is there already
are not computed again. Points that differ in their target alone share one run of the network, since counts need no prices.
"""

import csv
import io
import itertools
import json
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s3nn_deploy import __version__, cluster, targets
from s3nn_deploy.document import digest, digest_array, outcome
from s3nn_deploy.errors import DeployError
from s3nn_deploy.files import write_text
from s3nn_deploy.intnet import INPUT, Conv2d, Dense, IntNet, Population, signed_bits
from s3nn_deploy.pricing import price
from s3nn_deploy.simulation import simulate

SCHEMA = "s3nn-deploy-sweep/1"


@dataclass(frozen=True)
class Point:
    """What one line of results is about.

    Attributes:
        bits: the width that the weights are quantised to again; None: as they are.
        target: a name or a path.
        changes: keys of the target's file, dotted, and their values as TOML text.
        key: names the network, inputs, width and target contents; two points of one key have the same result.
    """

    model: Path
    bits: int | None
    target: str
    changes: tuple[tuple[str, str], ...] = field(default=())
    key: str = ""

    def parts(self) -> tuple[str, ...]:
        """What names the point, the same number of texts for each point of a sweep."""
        width = "as it is" if self.bits is None else f"{self.bits} bits"
        changed = (f"{key.removeprefix('events.').removesuffix('.pj')} {value}" for key, value in self.changes)
        return (self.model.stem, width, Path(self.target).stem, *changed)


def points(
    models: Sequence[Path],
    bits: Sequence[int | None],
    names: Sequence[str],
    vary: Mapping[str, Sequence[str]],
    inputs: Callable[[Path], tuple[Any, ...]],
) -> list[Point]:
    """Every combination, each with its key; `vary` maps dotted keys of the target's file to their values.

    Raises:
        DeployError: a target that cannot be read, or a width that is not 2 to 8.
    """
    from s3nn_deploy.model import load

    for width in bits:
        if width is not None and not 2 <= width <= 8:
            raise DeployError("--bits", expected="2 to 8", got=str(width), hint="One bit needs training.")
    combinations = [tuple(zip(vary, values, strict=True)) for values in itertools.product(*vary.values())]
    made = []
    if not names:
        raise DeployError("--targets", expected="at least one target", got="none")
    for model in models:
        network, arrays = load(model).digest, inputs(model)
        if not len(arrays[0]):
            raise DeployError(f"samples for {model}", expected="at least one", got="none")
        about = digest("".join(digest_array(a) for a in arrays if a is not None))
        for width, name, changes in itertools.product(bits, names, combinations):
            target = repr(targets.load(name, dict(changes)))
            key = digest("\n".join([SCHEMA, __version__, network, about, str(width), target]))
            made.append(Point(model, width, name, changes, key))
    return made


def sweep(
    todo: Sequence[Point],
    out: Path,
    inputs: Callable[[Path], tuple[Any, ...]],
    *,
    jobs: int = 1,
    scheduler: str | None = None,
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> list[dict[str, Any]]:
    """Compute the points whose results are not in `out` yet, append each as it is finished, and return all, in order.

    Args:
        out: JSON lines; a line that a killed sweep left half-written is dropped.
        inputs: x, labels or None, and the calibration set, for a model.
        jobs: processes.
        scheduler: the address of a Dask scheduler whose workers compute instead.
        progress: called with (points done, points in all, a word on the last one).

    Raises:
        DeployError: `out` holds something else, or a worker died. What a point itself cannot do is its result (`refused`).
    """
    from s3nn_deploy.model import load

    done = read(out) if out.exists() else {}
    groups: dict[tuple[Path, int | None], list[Point]] = {}
    for point in {p.key: p for p in todo}.values():
        if point.key not in done:
            groups.setdefault((point.model, point.bits), []).append(point)
    write_text(out, "".join(json.dumps(row) + "\n" for row in done.values()))
    count = len(todo) - sum(map(len, groups.values()))
    progress(count, len(todo), f"{count} were there already" if count else "")
    if groups:
        order = list(groups.values())

        def tasks() -> Iterator[tuple[Any, ...]]:
            for group in order:
                model = group[0].model
                variants = [targets.load(point.target, dict(point.changes)) for point in group]
                x, labels, calibration = inputs(model)
                yield _run, load(model), group, variants, _Mapped.of(x) if scheduler is None else x, labels, calibration

        with _hands(min(jobs, len(groups)), scheduler) as pool, out.open("a", encoding="utf-8") as stream:
            for number, rows in cluster.in_turn(pool, tasks()):
                for row in rows:
                    done[row["key"]] = row
                    stream.write(json.dumps(row) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
                count += len(order[number])
                progress(count, len(todo), ", ".join(order[number][-1].parts()[:2]))
    return [{**done[p.key], **_names(p), "label": label} for p, label in zip(todo, labels(todo), strict=True)]


def _names(point: Point) -> dict[str, Any]:
    """What a point is called; two of the same contents have one result."""
    return {"model": point.model.name, "bits": point.bits, "target": point.target, "changes": dict(point.changes)}


def labels(todo: Sequence[Point]) -> list[str]:
    """A short name for each point: what it does not share with all others."""
    parts = [point.parts() for point in todo]
    differing = [column for column in range(len(parts[0])) if len({row[column] for row in parts}) > 1]
    return [", ".join(row[column] for column in differing) or row[0] for row in parts]


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The results in a file, by key; a last line without its end is left out.

    Raises:
        DeployError: a line that is no result of a sweep.
    """
    rows = {}
    text = path.read_bytes().decode("utf-8", errors="replace")
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            row = json.loads(line)
            if row["schema"] != SCHEMA:
                raise ValueError(f"schema {row['schema']!r}")
            rows[str(row["key"])] = row
        except (ValueError, KeyError, TypeError) as error:
            where = f"{path}, line {number}"
            raise DeployError(
                where, f"is not a result of a sweep ({error})", hint="Choose another file with --out."
            ) from error
    return rows


def _hands(jobs: int, scheduler: str | None) -> AbstractContextManager[cluster.Pool]:
    return cluster.processes(jobs) if scheduler is None else cluster.workers(scheduler)


@dataclass(frozen=True)
class _Mapped:
    """The first samples of a file, which another process of this machine maps, too: its contents do not travel."""

    path: str
    dtype: Any
    offset: int
    shape: tuple[int, ...]

    @classmethod
    def of(cls, x: Any) -> Any:
        """In place of an array that is mapped, in C order, from its first sample on; any other stays."""
        first = x.base if isinstance(getattr(x, "base", None), np.memmap) else x
        whole = isinstance(first, np.memmap) and isinstance(first.base, mmap.mmap) and x.flags.c_contiguous
        whole = whole and x.ctypes.data == first.ctypes.data and first.filename is not None
        return cls(str(first.filename), x.dtype, first.offset, x.shape) if whole else x

    def open(self) -> NDArray[Any]:
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)


def _run(
    given: IntNet,
    group: Sequence[Point],
    variants: Sequence[targets.Target],
    x: Any,
    labels: NDArray[np.int64] | None,
    calibration: Any,
) -> list[dict[str, Any]]:
    """The results of points that differ in their targets only; runs in a process of its own, or on a worker."""
    x = x.open() if isinstance(x, _Mapped) else x
    refusal, bits = "", group[0].bits
    made, net = None, given
    every = [target.machine for target in variants if target.machine is not None]
    try:
        if bits is not None:
            net = requantised(given, calibration, bits)
        made = simulate(net, x, labels, machines=every)
        before = simulate(given, x, labels).predictions if net is not given else made.predictions
    except DeployError as error:
        refusal = str(error)
    timings = iter(made.machines if made is not None else ())
    rows = []
    for point, target in zip(group, variants, strict=True):
        row: dict[str, Any] = {
            "schema": SCHEMA,
            "key": point.key,
            **_names(point),
            "samples": len(x),
            "refused": refusal,
        }
        if made is not None and made.counts is not None:
            timed = outcome(next(timings)) if target.machine is not None else {}
            row["refused"] = timed.get("refused", "")
            try:
                targets.check_limits(net, target)
            except DeployError as error:
                row["refused"] = str(error)
            bill = price(made.counts, target)
            row |= {
                "network": net.digest,
                "weight_bits": max(map(_width, net.populations)),
                "weight_memory_bits": sum(
                    _width(p) * j.synapses.weight.size for p in net.populations for j in p.projections
                ),
                "accuracy": None if made.correct is None else made.correct / len(x),
                "same_predictions": float((made.predictions == before).mean()),
                "synops": made.counts.mean("synops"),
                "macs": made.counts.mean("macs"),
                "cycles": timed["cycles"]["mean"] if "cycles" in timed else None,
                "microseconds": timed["microseconds"]["mean"] if "cycles" in timed else None,
                "queue_peak": timed["queue_peak"] if "cycles" in timed else None,
                "at_least_nj": bill.at_least if bill.lines else None,
                "unpriced": sorted(bill.unpriced),
                "bound": bill.bound,
            }
        rows.append(row)
    return rows


def _width(population: Population) -> int:
    weights = [j.synapses.weight for j in population.projections]
    return max(signed_bits(int(w.min()), int(w.max())) for w in weights)


def requantised(net: IntNet, calibration: Any, bits: int) -> IntNet:
    """`net` with its weights quantised again, to `bits` bits; populations whose weights are no wider keep them.

    The network is written as a float module that decides as it does (its thresholds become batch norms, half-way between
    two integers), which `quantisation.quantise` takes as any other.

    Raises:
        DeployError: the module does not predict as the network does on the calibration set, or `quantise` refuses it.
    """
    if max(map(_width, net.populations)) <= bits:
        return net
    import torch

    from s3nn_deploy.conversion import convert
    from s3nn_deploy.quantisation import quantise

    module = _module(net, bits)
    with torch.no_grad():
        found = module(torch.as_tensor(np.asarray(calibration), dtype=torch.float32)).argmax(1).numpy()
    if not np.array_equal(found, simulate(net, calibration).predictions):
        hint = "Sweep several models, each trained at its width, instead of --bits."
        raise DeployError(
            "network", "its float twin does not predict as it does, so quantising it again means nothing", hint=hint
        )
    return convert(quantise(module, calibration, bits), net.input.shape, net.input.bits)


def _module(net: IntNet, bits: int) -> Any:
    """The network as a module: the same sums, a batch norm for each threshold; weights wider than `bits` are floats."""
    import torch

    from s3nn_deploy.nn import Spike
    from s3nn_deploy.quantisation import integer_layer

    synapses, norms = torch.nn.ModuleDict(), torch.nn.ModuleDict()
    scale = net.scale if len(set(net.scale.tolist())) > 1 else np.ones(len(net.scale))

    def layer(s: Dense | Conv2d, bias: NDArray[Any] | None, factor: NDArray[Any], keep: bool) -> torch.nn.Module:
        weight = torch.tensor(s.weight * factor.reshape(-1, *[1] * (s.weight.ndim - 1)), dtype=torch.float32)
        if isinstance(s, Dense):
            made: torch.nn.Linear | torch.nn.Conv2d = torch.nn.Linear(
                weight.shape[1], weight.shape[0], bias=bias is not None
            )
        else:
            into = weight.shape[1] * s.groups
            made = torch.nn.Conv2d(
                into,
                weight.shape[0],
                (weight.shape[2], weight.shape[3]),
                s.stride,
                s.padding,
                s.dilation,
                s.groups,
                bias is not None,
            )
        with torch.no_grad():
            made.weight.copy_(weight)
            if bias is not None and made.bias is not None:
                made.bias.copy_(torch.tensor(bias * factor, dtype=torch.float32))
        return integer_layer(made, weight, 8, torch.ones(1)) if keep else made

    for index, p in enumerate(net.populations):
        if _pool(p) is not None:
            continue
        factor = np.ones(p.channels) if p.spiking else scale.reshape(p.channels, -1)[:, 0]
        keep = _width(p) <= bits and bool((factor == 1).all())
        for number, projection in enumerate(p.projections):
            bias = p.bias if number == 0 else None
            synapses[f"p{index}_{number}"] = layer(projection.synapses, bias, factor, keep)
        if p.threshold is not None:
            norm = torch.nn.BatchNorm2d(p.channels) if len(p.shape) == 3 else torch.nn.BatchNorm1d(p.channels)
            norm.running_mean = torch.tensor(p.threshold - 0.5, dtype=torch.float32)
            with torch.no_grad():
                norm.bias.fill_(1)
            norms[f"p{index}"] = norm

    class Twin(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.synapses, self.norms, self.spike = synapses, norms, Spike()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            values = {INPUT: x}
            for index, p in enumerate(net.populations):
                if (c := _pool(p)) is not None:
                    value = values[p.projections[0].source]
                    values[p.name] = torch.nn.functional.max_pool2d(
                        value, c.weight.shape[2:], c.stride, c.padding, c.dilation
                    )
                    continue
                parts = []
                for number, projection in enumerate(p.projections):
                    value = values[projection.source]
                    value = value.flatten(1) if isinstance(projection.synapses, Dense) and value.ndim > 2 else value
                    parts.append(self.synapses[f"p{index}_{number}"](value))
                total = parts[0]
                for part in parts[1:]:
                    total = total + part
                values[p.name] = self.spike(self.norms[f"p{index}"](total)) if p.spiking else total
            last = values[net.populations[-1].name]
            return last.flatten(1) if last.ndim > 2 else last

    return Twin().eval()


def _pool(p: Population) -> Conv2d | None:
    """The synapses of a population that is an OR of spikes, as max pooling is; else None."""
    s = p.projections[0].synapses
    if p.threshold is None or len(p.projections) > 1 or not isinstance(s, Conv2d) or p.projections[0].source == INPUT:
        return None
    ones = s.groups == p.channels and s.weight.shape[:2] == (p.channels, 1) and bool((s.weight == 1).all())
    fits = all(2 * pad <= size for pad, size in zip(s.padding, s.weight.shape[2:], strict=True))
    return s if ones and fits and bool((p.threshold == 1).all()) else None


def quality(row: Mapping[str, Any]) -> float | None:
    """Accuracy, or without labels the share of predictions that are those of the model as it was given."""
    value = row.get("accuracy") if row.get("accuracy") is not None else row.get("same_predictions")
    return None if value is None else float(value)


def comparable(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, float]]:
    """The points (label, nJ, quality) of a plot: those that no limit refuses and that have an energy, and none of which
    leaves out what another has priced."""
    with_energy = [row for row in rows if not row["refused"] and row.get("at_least_nj") is not None]
    always = set.intersection(*(set(row["unpriced"]) for row in with_energy)) if with_energy else set()
    return [
        (str(row["label"]), float(row["at_least_nj"]), share)
        for row in with_energy
        if set(row["unpriced"]) == always and (share := quality(row)) is not None
    ]


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The results as CSV, a column a figure."""
    keys = list(dict.fromkeys(key for row in rows for key in row if key not in ("schema", "changes", "unpriced")))
    changes = list(dict.fromkeys(key for row in rows for key in row["changes"]))
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*keys, *changes, "unpriced"])
    for row in rows:
        cells = [row.get(key) for key in keys] + [row["changes"].get(key) for key in changes]
        writer.writerow([*cells, " ".join(row.get("unpriced", ()))])
    return stream.getvalue()
