"""Exact counts of the events of a run, per population and sample. Counts are facts; `pricing` has the opinions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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


def join(parts: Sequence[Counts]) -> Counts:
    """The counts of all samples, from the counts of consecutive batches."""
    first = parts[0].events
    return Counts(
        {p: {k: np.concatenate([part.events[p][k] for part in parts]) for k in kinds} for p, kinds in first.items()}
    )
