"""Simulation of many samples in batches: predictions, firing rates, exact counts; memory does not grow with the spikes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s3nn_deploy.backends import run
from s3nn_deploy.counts import Counts
from s3nn_deploy.counts import join as join_counts
from s3nn_deploy.intnet import IntNet
from s3nn_deploy.trace import Trace, checked_input


@dataclass(frozen=True, eq=False)
class Simulation:
    """What a simulation gives.

    Attributes:
        predictions: int64 [N].
        readout: int64 [N, classes].
        spikes: total spikes of each spiking population over all samples.
        counts: of every sample, where the backend counts.
        correct: how many predictions equal the labels, where there are labels.
    """

    backend: str
    predictions: NDArray[np.int64]
    readout: NDArray[np.int64]
    spikes: dict[str, int]
    counts: Counts | None
    correct: int | None

    def rate(self, net: IntNet, population: str) -> float:
        """The share of a population's neurons that fired, over all samples."""
        return self.spikes[population] / (net[population].size * len(self.predictions))


def simulate(
    net: IntNet,
    x: Any,
    labels: NDArray[np.int64] | None = None,
    backend: str = "emulator",
    *,
    file: Path | None = None,
    batch: int = 256,
    progress: Callable[[int, int], None] = lambda *_: None,
    observe: Callable[[NDArray[Any], Trace], None] = lambda *_: None,
) -> Simulation:
    """Run `net` on integers `x` [N, *input shape] in batches.

    Args:
        labels: int64 [N], to count correct predictions.
        file: as for `backends.run`.
        observe: called with each batch's inputs and its trace, in order.
        progress: called with (samples done, samples in all).

    Raises:
        DeployError: as `backends.run`.
    """
    x = checked_input(net, x)
    predictions, readouts, counts = [], [], []
    spikes = dict.fromkeys((p.name for p in net.spiking), 0)
    for start in range(0, len(x), batch):
        part = x[start : start + batch]
        trace = run(net, part, backend, file, partial(_advance, progress, start, len(part), len(x)))
        observe(part, trace)
        predictions.append(trace.predictions)
        readouts.append(trace.readout)
        for name, fired in trace.spikes.items():
            spikes[name] += int(fired.sum())
        if trace.counts is not None:
            counts.append(trace.counts)
        progress(min(start + batch, len(x)), len(x))
    predicted = np.concatenate(predictions)
    correct = None if labels is None else int((predicted == labels).sum())
    return Simulation(
        backend, predicted, np.concatenate(readouts), spikes, join_counts(counts) if counts else None, correct
    )


def _advance(progress: Callable[[int, int], None], start: int, part: int, total: int, steps: int, of: int) -> None:
    """Time steps of a part of the samples as a count of samples."""
    progress(start + part * steps // of, total)
