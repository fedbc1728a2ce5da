"""What holds for every input: sums are exact, and PyTorch's float decisions are those of the integer thresholds.

For a population whose spikes come from a float chain (scale, bias, batch norm, compare) behind an integer sum u:

1. No partial sum can exceed 2^24 (2^53 for float64) in magnitude, so floats sum the integers exactly, in any order.
2. Every step of the chain is affine, so the real chain is monotone in u.
3. At the ends of the reachable range and at theta - 1 and theta the chain is farther from the compare's threshold than
   floats can err. The distance is affine and the error's bound convex in u on each side, so that holds for every u
   between, and every float evaluation, in whatever order and on whatever processor, decides like `u >= theta`.
4. Besides, PyTorch itself evaluates the chain at every reachable u where these are not too many.

It is assumed that floats are IEEE 754, that sums of products are computed as such (no Winograd transform, no TF32), and
that batch norm takes at most `thresholds.ROUNDINGS` roundings a term.
"""

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from s3nn_deploy.intnet import EXACT_FLOAT32, IntNet, Population, reach, worst_case

if TYPE_CHECKING:
    from s3nn_deploy.conversion import Conversion
    from s3nn_deploy.lowering import Draft
    from s3nn_deploy.program import Program
    from s3nn_deploy.thresholds import Step

EVERY = 1 << 25
"""Values of u, over all channels of a population, up to which PyTorch evaluates every one; beyond, those nearest to theta."""

BATCH = 1 << 22
"""How many it is given at once."""

ASSUMED = (
    "floats follow IEEE 754, rounding to nearest",
    "convolutions and dense layers sum products of weights and inputs, in any order (no Winograd transform, no TF32)",
    "batch norm takes at most the roundings per term that thresholds.ROUNDINGS states",
)


@dataclass(frozen=True)
class PopulationProof:
    """What is proved of one population; sequences are per channel.

    Attributes:
        kind: "threshold", "or" (pooling of spikes), or "readout".
        low, high: the range of u that no input leaves.
        theta: the integer thresholds; the readout's biases.
        worst_case: the largest magnitude of any partial sum, to be below `limit`; None without a float program.
        direction: whether the float chain rises (1) or falls (-1) with PyTorch's u, or is constant (0).
        distance: from the switching point to the nearest of theta - 1 and theta that can occur, in units of u.
        error: how far floats can err there, in units of u.
        hardened: channels whose switching point was within float error of an integer in the module as it was given.
        evaluated, reachable: values of u that PyTorch's own chain was run on, and that there are.
        failures: what does not hold.
    """

    name: str
    kind: str
    low: tuple[int, ...]
    high: tuple[int, ...]
    theta: tuple[int, ...]
    worst_case: int
    limit: int | None
    direction: tuple[int, ...] = ()
    distance: tuple[float | None, ...] = ()
    error: tuple[float | None, ...] = ()
    hardened: tuple[int, ...] = ()
    evaluated: int = 0
    reachable: int = 0
    failures: tuple[str, ...] = ()

    @property
    def margin(self) -> float | None:
        """The smallest distance, in units of u."""
        return min((d for d in self.distance if d is not None), default=None)

    @property
    def safety(self) -> float | None:
        """The smallest ratio of a distance to the error there; None where no channel has both."""
        pairs = zip(self.distance, self.error, strict=True)
        return min((d / e for d, e in pairs if d is not None and e), default=None)


@dataclass(frozen=True)
class Proof:
    """The proof for a whole network.

    Attributes:
        dtype: the float type of the PyTorch program; None for a bare integer network, of which only ranges are stated.
        populations: one proof each, in order.
    """

    dtype: str | None
    populations: tuple[PopulationProof, ...]

    @property
    def failures(self) -> tuple[str, ...]:
        return tuple(f"population {p.name!r}: {failure}" for p in self.populations for failure in p.failures)

    @property
    def holds(self) -> bool:
        return not self.failures


def prove(net: IntNet, converted: "Conversion | None" = None) -> Proof:
    """Prove that the PyTorch program of `converted` decides as `net` does, from its parameters, for every input.

    Without `converted` only the ranges are stated. A step that fails is in the result's `failures`; nothing is raised.
    """
    proofs = [_range(net, population) for population in net.populations]
    if converted is None:
        return Proof(None, tuple(proofs))
    from s3nn_deploy.conversion import float_chains
    from s3nn_deploy.program import program_dtype

    program = converted.program
    drafts, chains, unit = float_chains(program)
    limit = EXACT_FLOAT32 if unit == Fraction(1, 1 << 24) else 1 << 53
    dtype = str(program_dtype(program)).removeprefix("torch.")
    if [d.name for d in drafts] != [p.name for p in net.populations] or net.input != program.input:
        lost = replace(proofs[0], failures=("the program has other populations, or another input",))
        return Proof(dtype, (lost, *proofs[1:]))
    for index, (population, draft, chain) in enumerate(zip(net.populations, drafts, chains, strict=True)):
        bounded = replace(proofs[index], limit=limit, worst_case=_worst_case(net, population, draft.offset))
        proofs[index] = _population(bounded, population, draft, chain, unit, program)
    return Proof(dtype, tuple(proofs))


def _range(net: IntNet, population: Population) -> PopulationProof:
    low, high = reach(net, population)
    theta = population.bias if population.threshold is None else population.threshold
    assert theta is not None
    kind = "threshold" if population.spiking else "readout"
    return PopulationProof(
        population.name,
        kind,
        tuple(low.tolist()),
        tuple(high.tolist()),
        tuple(theta.tolist()),
        worst_case(net, population),
        None,
        hardened=_hardened(net, population.name),
        reachable=int((high - low + 1).sum()) if population.spiking else 0,
    )


def _hardened(net: IntNet, name: str) -> tuple[int, ...]:
    """What the conversion recorded; a file may hold anything there."""
    recorded = net.provenance.get("hardened")
    channels = recorded.get(name) if isinstance(recorded, Mapping) else None
    return tuple(c for c in channels if isinstance(c, int)) if isinstance(channels, list) else ()


def _worst_case(net: IntNet, population: Population, offset: NDArray[np.int64]) -> int:
    return worst_case(net, replace(population, threshold=None, bias=offset))


def _population(
    proof: PopulationProof,
    population: Population,
    draft: "Draft",
    chains: "list[tuple[Step, ...]]",
    unit: Fraction,
    program: "Program",
) -> PopulationProof:
    failures = []
    assert proof.limit is not None
    if proof.worst_case >= proof.limit:
        failures.append(f"sums can reach {proof.worst_case:,}, and floats are exact below {proof.limit:,} only")
    sign = _signs(population, draft)
    if sign is None:
        return replace(proof, failures=(*failures, "its shape, wiring or weights are not the program's"))
    if draft.pool:
        ones = all(np.all(p.synapses.weight == 1) for p in population.projections)
        alike = ones and population.threshold is not None and bool(np.all(population.threshold == 1))
        return replace(proof, kind="or", failures=(*failures, *([] if alike else ["it is no OR of spikes"])))
    if draft.spike is None:
        return replace(proof, failures=(*failures, *_readout(population, draft, chains)))
    channels = [_channel(proof, draft, c, int(sign[c]), steps, unit) for c, steps in enumerate(chains)]
    failures += [f"channel {c}: {failure}" for c, channel in enumerate(channels) for failure in channel.failures]
    evaluated, wrong = _evaluate(proof, draft, sign, program)
    return replace(
        proof,
        direction=tuple(channel.direction for channel in channels),
        distance=tuple(channel.distance for channel in channels),
        error=tuple(channel.error for channel in channels),
        evaluated=evaluated,
        failures=(*failures, *wrong),
    )


def _signs(population: Population, draft: "Draft") -> NDArray[np.int64] | None:
    """Per channel whether the network has the program's weights (1) or their negatives (-1); None if neither, anywhere."""
    if (population.shape, population.spiking) != (draft.shape, draft.spike is not None or draft.pool):
        return None
    if len(population.projections) != len(draft.projections):
        return None
    same = opposite = np.ones(population.channels, np.bool_)
    for mine, theirs in zip(population.projections, draft.projections, strict=True):
        a, b = mine.synapses, theirs.synapses
        if mine.source != theirs.source or type(a) is not type(b) or a.weight.shape != b.weight.shape:
            return None
        if any(getattr(a, key) != value for key, value in vars(b).items() if key != "weight"):
            return None
        rows, others = (w.reshape(population.channels, -1).astype(np.int64) for w in (a.weight, b.weight))
        same, opposite = same & (rows == others).all(1), opposite & (rows == -others).all(1)
    if not np.all(same | opposite) or (draft.spike is None and not np.all(same)):
        return None
    return np.where(same, 1, -1)


@dataclass(frozen=True)
class _Channel:
    direction: int
    distance: float | None
    error: float | None
    failures: tuple[str, ...]


def _channel(
    proof: PopulationProof, draft: "Draft", c: int, sign: int, steps: "tuple[Step, ...]", unit: Fraction
) -> _Channel:
    """One channel: u is the network's sum (the weights times `sign`), the chain begins at the program's sum + offset."""
    from s3nn_deploy.thresholds import Add, BatchNorm, Mul, Slack, evaluate

    assert draft.spike is not None
    if not all(isinstance(step, Add | Mul | BatchNorm | Slack) for step in steps):
        return _Channel(0, None, None, ("a step of its float chain is not known to be affine",))
    low, high, theta, offset = proof.low[c], proof.high[c], proof.theta[c], int(draft.offset[c])
    level, strict = Fraction(draft.spike.attributes["threshold"]), bool(draft.spike.attributes["strict"])
    failures: list[str] = []
    values: dict[int, Fraction] = {}
    near: list[tuple[Fraction, Fraction]] = []
    for u in sorted({u for u in (low, theta - 1, theta, high) if low <= u <= high}):
        value, error = evaluate(steps, Fraction(sign * u + offset), unit)
        values[u] = value
        fires = value > level or (value == level and not strict)
        if fires != (u >= theta):
            failures.append(f"u = {u} {'fires' if fires else 'is silent'} in PyTorch, and the threshold is {theta}")
        elif abs(value - level) <= error and error != 0:
            failures.append(f"floats may decide u = {u} either way: {float(abs(value - level)):.3g} from the threshold")
        if u in (theta - 1, theta):
            near.append((abs(value - level), error))
    slope = (values[high] - values[low]) / max(1, high - low)
    if slope < 0:
        failures.append("its float chain falls where the network's potential rises")
    if not near or slope == 0:
        return _Channel(0 if slope == 0 else sign, None, None, tuple(failures))
    distance, error = min(near, key=lambda pair: pair[0] - pair[1])
    return _Channel(sign, _finite(distance / abs(slope)), _finite(error / abs(slope)), tuple(failures))


def _finite(x: Fraction) -> float:
    return float(min(x, Fraction(sys.float_info.max)))


def _readout(population: Population, draft: "Draft", chains: "list[tuple[Step, ...]]") -> Iterator[str]:
    from s3nn_deploy.thresholds import Mul

    assert population.bias is not None
    assert population.scale is not None
    if not np.array_equal(population.bias, draft.offset):
        yield "its biases are not the program's"
    for c, steps in enumerate(chains):
        factors = [step.value for step in steps if isinstance(step, Mul)]
        if len(factors) < len(steps) or min(factors, default=1) <= 0:
            yield f"channel {c}: its output is not the integer readout times a positive number"
        elif not math.isclose(float(math.prod(factors)), float(population.scale[c]), rel_tol=2.0**-40):
            yield f"channel {c}: its scale is not the program's"


def _evaluate(
    proof: PopulationProof, draft: "Draft", sign: NDArray[np.int64], program: "Program"
) -> tuple[int, list[str]]:
    """How many u PyTorch's own chain was run on, in two memory layouts, and where it decides otherwise.

    None of them where branches are scaled before they are joined: the chain is then not a function of u alone.
    """
    import torch

    from s3nn_deploy.program import KINDS, program_dtype

    assert draft.spike is not None
    ops = [op for op in (*draft.chain, draft.spike) if op.kind != "slack"]
    if any(op.kind == "slack" and not op.inputs for op in draft.chain):
        return 0, []
    low, high, theta = (np.array(values) for values in (proof.low, proof.high, proof.theta))
    half = max(1, EVERY // (2 * len(low))) if proof.reachable > EVERY else int((high - low).max()) + 1
    first, last = np.clip(theta - half, low, high), np.clip(theta + half, low, high)
    shape = (len(low), *[1] * (len(draft.shape) - 1))

    def constant(op: Any, key: str) -> Any:
        whole = program.constant(op, key)
        if op.kind == "batch_norm":
            return whole
        return torch.broadcast_to(whole, (1, *op.shape))[0].reshape(len(low), -1)[:, 0].reshape(shape)

    constants = [{key: constant(op, key) for key in op.constants} for op in ops]
    failures: list[str] = []
    longest = int((last - first).max()) + 1
    step = max(1, BATCH // len(low))
    for start in range(0, longest, step):
        u = np.minimum(first + np.arange(start, min(start + step, longest))[:, None], last)
        sums = torch.from_numpy((sign * u + draft.offset) / draft.tap.unit).to(program_dtype(program))
        column = sums if len(shape) == 1 else sums.T[None, :, :, None].contiguous()
        layouts = [column] if len(shape) == 1 else [column, column.to(memory_format=torch.channels_last)]
        for x in layouts:
            with torch.no_grad():
                for op, given in zip(ops, constants, strict=True):
                    x = KINDS[op.kind](x, **given, **op.attributes)
            spikes = x.numpy() if len(shape) == 1 else x[0, :, :, 0].T.numpy()
            if (wrong := np.argwhere((spikes == 1) != (u >= theta))).size:
                row, c = wrong[0].tolist()
                failures.append(
                    f"channel {c}: PyTorch itself decides u = {u[row, c]} otherwise than threshold {theta[c]}"
                )
                return int((last - first + 1).sum()), failures
    return int((last - first + 1).sum()), failures
