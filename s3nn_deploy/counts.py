"""Exact counts of the events of a run, per population and sample. Counts are facts; `pricing` has the opinions."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

KINDS = {
    "synops": "synaptic operations: spike x programmed synapse, exact at borders, synapses of weight zero included",
    "synops_nonzero": "the synaptic operations whose weight is not zero",
    "macs": "multiply-accumulates: non-zero input value x programmed synapse (multi-bit input only)",
    "macs_nonzero": "the multiply-accumulates whose weight is not zero",
    "dense_macs": "what a dense accelerator would do: every synapse of every neuron, borders exact",
    "spikes": "spikes fired",
    "messages": "spikes times the populations that they go to: one core each; a placement on more cores sends more",
    "neuron_updates": "threshold comparisons or readouts: every neuron once",
    "weight_bits": "bits of weight memory read: one stored weight for each synaptic operation or multiply-accumulate",
    "membrane_reads": "membrane potentials read: one for each synaptic operation or multiply-accumulate, one for each update",
    "membrane_writes": "membrane potentials written: one for each synaptic operation or multiply-accumulate",
}
"""Every kind of event, in the order of reports."""


class Rows(Mapping[str, Mapping[str, NDArray[np.int64]]]):
    """The rows of an array [populations, kinds, N] by their names, made when one is first asked for."""

    def __init__(self, populations: tuple[str, ...], counts: NDArray[np.int64]) -> None:
        self._populations, self._counts = populations, counts

    @cached_property
    def _rows(self) -> dict[str, dict[str, NDArray[np.int64]]]:
        named = zip(self._populations, self._counts, strict=True)
        return {population: dict(zip(KINDS, counts, strict=True)) for population, counts in named}

    def __getitem__(self, population: str) -> Mapping[str, NDArray[np.int64]]:
        return self._rows[population]

    def __iter__(self) -> Iterator[str]:
        return iter(self._populations)

    def __len__(self) -> int:
        return len(self._populations)


@dataclass(frozen=True, eq=False)
class Counts:
    """`events[population][kind]` is an int64 array [N], one exact count a sample; kinds as in `KINDS`."""

    events: Mapping[str, Mapping[str, NDArray[np.int64]]]

    def __len__(self) -> int:
        """The number of samples."""
        return len(next(iter(next(iter(self.events.values())).values())))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Counts) and {
            p: {k: v.tolist() for k, v in kinds.items()} for p, kinds in self.events.items()
        } == {p: {k: v.tolist() for k, v in kinds.items()} for p, kinds in other.events.items()}

    __hash__ = None  # type: ignore[assignment]

    def total(self, kind: str) -> NDArray[np.int64]:
        """The count of one kind over all populations, [N]."""
        return np.sum([kinds[kind] for kinds in self.events.values()], axis=0, dtype=np.int64)

    @property
    def totals(self) -> "Totals":
        """What stays of the counts when there are many samples."""
        kinds = next(iter(self.events.values()))
        return Totals(
            {p: {kind: int(row.sum()) for kind, row in found.items()} for p, found in self.events.items()},
            {kind: narrow(self.total(kind)) for kind in kinds},
        )


@dataclass(frozen=True, eq=False)
class Totals:
    """Exact counts of many samples, in some 30 bytes a sample whatever the network.

    Attributes:
        populations: `populations[population][kind]` is the count over all samples.
        samples: `samples[kind]` is the count of each sample over all populations: [N], unsigned, as narrow as the counts allow.
    """

    populations: Mapping[str, Mapping[str, int]]
    samples: Mapping[str, NDArray[np.unsignedinteger[Any]]]

    def __len__(self) -> int:
        """The number of samples."""
        return len(next(iter(self.samples.values())))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Totals)
            and self.populations == other.populations
            and {k: v.tolist() for k, v in self.samples.items()} == {k: v.tolist() for k, v in other.samples.items()}
        )

    __hash__ = None  # type: ignore[assignment]

    def mean(self, kind: str) -> float:
        """The mean count of an inference."""
        return sum(kinds[kind] for kinds in self.populations.values()) / len(self)


def narrow(counts: NDArray[np.int64]) -> NDArray[np.unsignedinteger[Any]]:
    """Counts in the narrowest unsigned type that holds them."""
    return counts.astype(np.min_scalar_type(int(counts.max(initial=0))))


def join(parts: Sequence[Counts]) -> Counts:
    """The counts of all samples, from the counts of consecutive batches."""
    first = parts[0].events
    return Counts(
        {p: {k: np.concatenate([part.events[p][k] for part in parts]) for k in kinds} for p, kinds in first.items()}
    )
