"""Simulation of many samples in batches, on all cores or on many machines: predictions, firing rates, exact counts.

Batches are independent and everything kept of them adds up, so the result depends neither on the size of the batches nor
on who computed them. Memory grows by some 30 bytes a sample; the samples may be a file that is mapped into memory.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s3nn_deploy import cluster, machine
from s3nn_deploy.backends import BACKENDS, run
from s3nn_deploy.counts import Totals, narrow
from s3nn_deploy.errors import DeployError
from s3nn_deploy.intnet import IntNet, from_plain, to_plain
from s3nn_deploy.machine import Machine
from s3nn_deploy.trace import valid_samples

BATCH = 256
"""Most samples that are computed at a time."""

OURS = ("emulator", "reference")
"""Engines that compute in this process, on one core each; the others see to their own threads and processes."""


@dataclass(frozen=True, eq=False)
class Simulation:
    """What a simulation gives.

    Attributes:
        backend: what ran; engines in the order of their first batch.
        predictions: the class of each sample, unsigned integers [N].
        fired: for each spiking population, in how many samples each neuron fired: int64 [*shape].
        counts: of all samples, where the backend counts.
        machines: for each machine that was asked for its figures, or why the network does not run on it.
        correct: how many predictions equal the labels, where there are labels.
        each: where it was asked for, of each sample every count, and every figure of the first machine: arrays [N] by
            "counts/POPULATION/KIND" and "machine/POPULATION/FIGURE".
    """

    backend: str
    predictions: NDArray[np.unsignedinteger[Any]]
    fired: Mapping[str, NDArray[np.int64]]
    counts: Totals | None
    machines: tuple[machine.Summary | DeployError, ...]
    correct: int | None
    each: Mapping[str, NDArray[np.unsignedinteger[Any]]] = field(default_factory=dict)

    def rate(self, population: str) -> float:
        """The share of a population's neurons that fired, over all samples."""
        fired = self.fired[population]
        return int(fired.sum()) / (fired.size * len(self.predictions))


def simulate(
    net: IntNet,
    x: Any,
    labels: NDArray[np.int64] | None = None,
    backend: str = "emulator",
    *,
    file: Path | None = None,
    engine: str = "auto",
    machines: Sequence[Machine] = (),
    batch: int | None = None,
    jobs: int = 1,
    scheduler: str | None = None,
    each: bool = False,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Simulation:
    """Run `net` on integers `x` [N, *input shape] in batches; equal for every `batch`, `jobs` and `scheduler`.

    Args:
        x: an array, or a `numpy.memmap`, which is never copied whole.
        labels: int64 [N], to count correct predictions.
        file, engine: as for `backends.run`.
        machines: accelerators whose figures are wanted.
        batch: samples at a time; default at most `BATCH`.
        jobs: threads of this process, for the engines `OURS`.
        scheduler: the address of a Dask scheduler whose workers compute instead.
        each: keep the counts of each sample and population: kinds * populations numbers a sample.
        progress: called with (samples done, samples in all).

    Raises:
        DeployError: no samples, as `backends.run`, or as `cluster.workers`.
    """
    x = valid_samples(net.input, x)
    if not len(x):
        raise DeployError("samples", expected="at least one", got="none")
    if scheduler is not None and backend not in OURS:
        raise DeployError(f"backend {backend!r}", "runs on this machine only", hint=f"Choose {' or '.join(OURS)}.")
    placed = [_placed(net, each) for each in machines]
    placements = tuple(p if isinstance(p, machine.Placement) else None for p in placed)
    kept: dict[int, tuple[Any, ...]] = {}
    names: dict[int, str] = {}
    whole, done = None, 0
    with _pool(jobs if backend in OURS else 1, scheduler) as pool:
        size = batch or max(1, min(BATCH, -(-len(x) // pool.cores())))
        held = pool.hold(from_plain, *_packed(net)) if scheduler is not None else net
        told = progress if backend in BACKENDS and BACKENDS[backend].steps else None

        def tasks() -> Iterator[tuple[Any, ...]]:
            for start in range(0, len(x), size):
                some = x[start : start + size]
                steps = None if told is None else partial(_advance, told, start, len(some), len(x))
                yield _run, held, some, backend, file, engine, placements, each, steps

        for number, part in cluster.in_turn(pool, tasks()):
            kept[number], names[number] = (part.predictions, dict(part.samples), dict(part.each)), part.backend
            whole = part if whole is None else _together(whole, part)
            done += len(part.predictions)
            progress(done, len(x))
    assert whole is not None
    ordered = [kept[number] for number in sorted(kept)]
    predictions = np.concatenate([found for found, *_ in ordered])
    samples, each_sample = (_concatenated([rows[at] for rows in ordered]) for at in (1, 2))
    return Simulation(
        ", then ".join(dict.fromkeys(names[number] for number in sorted(names))),
        predictions,
        whole.fired,
        Totals(whole.populations, samples) if samples else None,
        tuple(map(_outcome, placed, whole.machines)),
        None if labels is None else int((predictions == labels).sum()),
        each_sample,
    )


@dataclass(frozen=True, eq=False)
class _Part:
    """What is kept of one batch: `predictions`, `samples` and `each` of each of its samples, the rest of all together."""

    backend: str
    predictions: NDArray[np.unsignedinteger[Any]]
    samples: Mapping[str, NDArray[np.unsignedinteger[Any]]]
    populations: Mapping[str, Mapping[str, int]]
    fired: Mapping[str, NDArray[np.int64]]
    machines: tuple[machine.Summary | None, ...]
    each: Mapping[str, NDArray[np.unsignedinteger[Any]]]


def _concatenated(parts: Sequence[dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """The rows of all parts, which are emptied on the way."""
    return {kind: np.concatenate([part.pop(kind) for part in parts]) for kind in list(parts[0])}


def _together(a: _Part, b: _Part) -> _Part:
    """Of two batches what is kept of all of their samples together."""
    fired = {name: neurons + b.fired[name] for name, neurons in a.fired.items()}
    populations = {
        name: {kind: n + b.populations[name][kind] for kind, n in kinds.items()}
        for name, kinds in a.populations.items()
    }
    machines = tuple(
        None if m is None or n is None else machine.join([m, n]) for m, n in zip(a.machines, b.machines, strict=True)
    )
    return replace(a, populations=populations, fired=fired, machines=machines)


def _run(
    net: IntNet,
    x: NDArray[Any],
    backend: str,
    file: Path | None,
    engine: str,
    placements: tuple[machine.Placement | None, ...],
    each: bool,
    steps: Callable[[int, int], None] | None,
) -> _Part:
    """One batch, in a thread or on a worker."""
    trace = run(net, x, backend, file, *([steps] if steps is not None else []), engine=engine)
    totals = Totals({}, {}) if trace.counts is None else trace.counts.totals
    figures = [None if p is None else machine.figures(net, p, x, trace.spikes) for p in placements]
    events = {"counts": trace.counts.events} if each and trace.counts is not None else {}
    if each and figures and figures[0] is not None:
        events["machine"] = figures[0].events
    return _Part(
        trace.backend,
        trace.predictions.astype(np.min_scalar_type(net.readout.size)),
        totals.samples,
        totals.populations,
        {name: spikes.sum(axis=0, dtype=np.int64) for name, spikes in trace.spikes.items()},
        tuple(None if found is None else found.summary for found in figures),
        {
            f"{of}/{p}/{kind}": narrow(row)
            for of, ps in events.items()
            for p, ks in ps.items()
            for kind, row in ks.items()
        },
    )


def _pool(jobs: int, scheduler: str | None) -> AbstractContextManager[cluster.Pool]:
    return cluster.threads(jobs) if scheduler is None else cluster.workers(scheduler)


def _packed(net: IntNet) -> tuple[Any, ...]:
    """A network to send: its integers as narrow as they allow."""
    meta, arrays = to_plain(net)
    return meta, {
        name: a.astype(np.result_type(*(np.min_scalar_type(int(v)) for v in (a.min(), a.max()))))
        if a.dtype.kind == "i" and a.size
        else a
        for name, a in arrays.items()
    }


def _placed(net: IntNet, of: Machine) -> machine.Placement | DeployError:
    try:
        return machine.place(net, of)
    except DeployError as error:
        return error


def _outcome(placed: machine.Placement | DeployError, figures: machine.Summary | None) -> machine.Summary | DeployError:
    if isinstance(placed, DeployError):
        return placed
    assert figures is not None
    try:
        return machine.check_queues(figures)
    except DeployError as error:
        return error


def _advance(progress: Callable[[int, int], None], start: int, part: int, total: int, steps: int, of: int) -> None:
    """Time steps of a part of the samples as a count of samples."""
    progress(start + part * steps // of, total)
