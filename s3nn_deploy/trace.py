"""What a run of a network gives: the spikes of every population, and the readout."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from s3nn_deploy.errors import DeployError
from s3nn_deploy.intnet import Input, IntNet

if TYPE_CHECKING:
    from s3nn_deploy.counts import Counts


@dataclass(frozen=True, eq=False)
class Trace:
    """The outcome of one run over N samples; every backend gives the same one.

    Attributes:
        spikes: for each spiking population a bool array [N, *shape].
        readout: int64 [N, classes], the integers `u + bias` (a readout of more axes is flattened in C order).
        scale: float64 [classes]; `scale * readout` is what the trained network outputs.
        backend: which engine produced it.
        counts: exact event counts, where the engine takes them (the emulator does).
    """

    spikes: Mapping[str, NDArray[np.bool_]]
    readout: NDArray[np.int64]
    scale: NDArray[np.float64]
    backend: str
    counts: "Counts | None" = None

    def __len__(self) -> int:
        return len(self.readout)

    @property
    def predictions(self) -> NDArray[np.int64]:
        """The class of each sample, [N]: the largest scaled readout, the first one among equals."""
        if np.all(self.scale == self.scale[0]):
            return self.readout.argmax(1)
        return (self.readout * self.scale).argmax(1)


def join(traces: list[Trace]) -> Trace:
    """One trace of all samples, from traces of consecutive batches."""
    first = traces[0]
    counts = None
    if first.counts is not None:
        from s3nn_deploy.counts import join as join_counts

        counts = join_counts([t.counts for t in traces if t.counts is not None])
    spikes = {name: np.concatenate([t.spikes[name] for t in traces]) for name in first.spikes}
    return Trace(spikes, np.concatenate([t.readout for t in traces]), first.scale, first.backend, counts)


def checked_input(net: IntNet, x: Any) -> NDArray[np.unsignedinteger[Any]]:
    """`x` as uint8 or uint16 [N, *input shape], if it is integers within the input's range.

    Raises:
        DeployError: another shape, a dtype that is not integer or bool, a value outside 0 .. 2^bits - 1.
    """
    return checked_samples(net.input, x)


def checked_samples(spec: Input, x: Any) -> NDArray[np.unsignedinteger[Any]]:
    """See `checked_input`, for a bare `Input`."""
    return valid_samples(spec, x).astype(spec.dtype, copy=False)


def valid_samples(spec: Input, x: Any) -> NDArray[Any]:
    """As `checked_samples`, in the type that they have: a file that is mapped into memory is read and not copied."""
    array = np.asarray(x)
    if array.shape[1:] != spec.shape or array.ndim != len(spec.shape) + 1:
        hint = "Add a leading axis for the samples." if array.shape == spec.shape else ""
        raise DeployError(
            "input", expected=f"shape [N, {', '.join(map(str, spec.shape))}]", got=str(list(array.shape)), hint=hint
        )
    if array.dtype.kind not in "iub":
        raise DeployError(
            "input",
            expected=f"integers 0..{spec.maximum} (uint8)",
            got=str(array.dtype),
            hint="Give the integers themselves, not normalised values.",
        )
    if array.size and (int(array.min()) < 0 or int(array.max()) > spec.maximum):
        raise DeployError(
            "input", expected=f"values 0..{spec.maximum} ({spec.bits} bits)", got=f"{array.min()}..{array.max()}"
        )
    return array
