"""Verification: what is proved for every input, then every backend against PyTorch (or the reference), `==`.

Run are the given inputs and generated ones through the whole network, and each population by itself with source values
that put its membrane potentials exactly at its thresholds and just below them (see `stimuli`).
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s3nn_deploy import backends as engines
from s3nn_deploy import formats, lava_env
from s3nn_deploy.backends import BACKENDS
from s3nn_deploy.errors import DeployError, suggestion
from s3nn_deploy.files import existing, read_npz, sha256, write_npz
from s3nn_deploy.intnet import INPUT, Conv2d, IntNet
from s3nn_deploy.proof import Proof, prove
from s3nn_deploy.stimuli import (
    BUDGET,
    Coverage,
    Injection,
    Isolated,
    injection,
    isolated,
    membrane_potential,
    stimuli,
    synaptic_operations,
)
from s3nn_deploy.trace import Trace, checked_input, join

MISMATCH = "s3nn-deploy-mismatch/1"

KEPT = 1000
"""Inputs that the evidence of a difference holds at most, the differing one last."""

FIRST = 256
"""Inputs made for a population that only reads the network's input, which the whole network is given too, at most."""

SIMULATORS = ("lava", "netx")
"""Backends that take some 50 ms or more for each input, so that they are given the first ones only."""

AT_MOST = 192
"""Inputs that they are given of one population by itself at most."""

PATIENCE = 4_000_000_000
"""Synapses that they simulate of a whole network in all, about; but each input that the caller gave."""

LEAST = 8
"""Inputs of a whole network that they are given in any case."""

SIMULATED = 20_000_000
"""Synapses of all neurons above which those backends are left out unless they are asked for by name."""

CHUNK = 64 << 20
"""About how many bytes of values PyTorch is given a batch for."""

SLOW = 1 << 20
"""Convolution weights above which the reference, which loops over them, is left out unless it is asked for by name."""


@dataclass(frozen=True)
class Difference:
    """The first value in which a backend differs.

    Attributes:
        population: a population's name; the readout's for its integers.
        isolated: whether the population was run by itself, on source values made for it.
        sample: index of the input.
        neuron: index in the population's shape: (channel, row, column) or (channel,).
        potential, threshold: the exact membrane potential there and the neuron's threshold (None at the readout).
        expected, got: PyTorch's (or the reference's) value and the backend's.
    """

    backend: str
    population: str
    isolated: bool
    sample: int
    neuron: tuple[int, ...]
    potential: int
    threshold: int | None
    expected: int
    got: int

    def __str__(self) -> str:
        axes = ("channel", "row", "column") if len(self.neuron) == 3 else ("neuron",)
        where = ", ".join(f"{axis} {n}" for axis, n in zip(axes, self.neuron, strict=True))
        alone = " by itself" if self.isolated else ""
        compared = f", threshold {self.threshold}" if self.threshold is not None else ""
        return (
            f"{self.backend} differs at sample {self.sample}, population {self.population!r}{alone}, {where}: "
            f"got {self.got}, expected {self.expected} (membrane potential {self.potential}{compared})"
        )


@dataclass(frozen=True)
class File:
    """An exported file that was read back and compared with the network.

    Attributes:
        name: as given, or as `export` names it.
        given: whether the caller named it; else it was exported for this verification.
        difference: where it does not hold the network; empty if it does.
    """

    name: str
    format: str
    sha256: str
    given: bool
    difference: str = ""


@dataclass(frozen=True)
class Check:
    """One engine's comparison with the baseline.

    Attributes:
        samples, injected: inputs of the whole network, and of single populations.
        compared, differing: values (spikes and readout integers).
        left_out: populations that it could not run by themselves, with the reason.
        evidence: the file that holds the first difference.
    """

    backend: str
    what: str
    samples: int = 0
    injected: int = 0
    compared: int = 0
    differing: int = 0
    first_difference: Difference | None = None
    evidence: Path | None = None
    seconds: float = 0.0
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """The outcome of `verify`.

    Attributes:
        proof: what holds for every input.
        baseline: what the backends were compared with: "pytorch", or "reference" for a bare integer network.
        checks: one per backend that was run; before them the baseline's own, at the membrane potentials solved for.
        not_run: backends that were not, with the reason.
        files: exported files, read back and compared.
        coverage: how each spiking population's thresholds were met.
        samples, injected: inputs of the whole network, and of single populations.
        digest: of the integer network.
    """

    proof: Proof
    baseline: str
    checks: tuple[Check, ...]
    not_run: Mapping[str, str]
    files: tuple[File, ...]
    coverage: Mapping[str, Coverage]
    samples: int
    injected: int
    digest: str

    @property
    def equal(self) -> bool:
        """Whether the proof holds, every file holds the network, and no value differs."""
        return (
            self.proof.holds
            and not any(file.difference for file in self.files)
            and not any(check.differing for check in self.checks)
        )

    @property
    def first_difference(self) -> Difference | None:
        return next((check.first_difference for check in self.checks if check.first_difference), None)


@dataclass(frozen=True, eq=False)
class _Subject:
    """What is verified: the integer network, with PyTorch's program if there is one, and its exported files by format."""

    net: IntNet
    converted: Any
    stem: str
    files: Mapping[str, Path]


@dataclass(frozen=True, eq=False)
class _Run:
    """One network, inputs for it, the first `given` of them the caller's, and what it should give: the whole network, or one
    population by itself."""

    net: IntNet
    x: NDArray[Any]
    want: Mapping[str, NDArray[Any]]
    alone: Isolated | None = None
    injection: Injection | None = None
    given: int = 0


def verify(
    model: Any,
    x: Any = None,
    backends: Sequence[str] | None = None,
    *,
    exports: Sequence[str | Path] = (),
    budget: int = BUDGET,
    evidence: str | Path | None = None,
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> Result:
    """Prove what can be proved of `model`, then run it on every backend and compare each spike and each readout, `==`.

    The baseline is PyTorch's run of a `.pt`; for other files and an `IntNet` it is the int64 reference. A backend that
    takes a file is given the exported one, which has been read back and compared first. Besides `x`, generated inputs
    are run (`stimuli`), and each population by itself on inputs that put it at its thresholds (`injection`).

    Args:
        model: a path to any file that `load` takes, or an `IntNet`.
        x: integers [N, *input shape] to be run as well.
        backends: names in `BACKENDS`. By default all that can run the network; the others, and for large networks
            the slow reference and Lava, are in the result's `not_run`. Lava is given `x` and, of what is generated for
            a large network, only the first inputs: see each check's `samples`.
        exports: files that were exported from the model: they are compared with it, and their backends run them.
        budget: synaptic operations that each backend may spend on one population by itself, about; 0 leaves that out.
        evidence: a folder in which a differing backend leaves `mismatch-<backend>.npz` (see `replay`).
        progress: called with (steps done, steps in all, what is being done).

    Raises:
        DeployError: an unknown backend, a file that cannot be loaded, or a network that a backend named here cannot run.
    """
    subject = _subject(model, exports)
    names, not_run = _chosen(subject, backends)
    steps = 1 + (1 + len(names)) * (1 + (len(subject.net.populations) if budget else 0))
    progress(0, steps, "proof")
    proof = prove(subject.net, subject.converted)
    runs = _runs(subject, x, budget)
    return _compared(subject, proof, runs, names, not_run, backends is not None, evidence, progress, steps)


def replay(
    model: Any,
    mismatch: str | Path,
    backends: Sequence[str] | None = None,
    *,
    exports: Sequence[str | Path] = (),
    evidence: str | Path | None = None,
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> Result:
    """Run again what a `mismatch-<backend>.npz` holds, on the backend that differed or on those named, and compare.

    Raises:
        DeployError: as `verify`, or no such file, or one of another network.
    """
    meta, arrays = read_npz(mismatch, MISMATCH)
    subject = _subject(model, exports)
    name = meta.get("isolated")
    known = {p.name for p in subject.net.populations}
    if "input" not in arrays or meta.get("network") != subject.net.digest or (name is not None and name not in known):
        hint = "Verify the model that it was left by."
        raise DeployError(str(mismatch), "is evidence about another network", hint=hint)
    names, not_run = _chosen(subject, [str(meta["backend"])] if backends is None else backends)
    proof = prove(subject.net, subject.converted)
    alone = None if name is None else isolated(subject.net, subject.net[name])
    run = (
        _whole(subject, arrays["input"], len(arrays["input"]))
        if alone is None
        else _alone(subject, alone, arrays["input"], None)
    )
    steps = 2 + len(names)
    return _compared(subject, proof, iter([run]), names, not_run, True, evidence, progress, steps)


def _subject(model: Any, exports: Sequence[str | Path]) -> _Subject:
    if isinstance(model, IntNet):
        return _Subject(model, None, "net", _by_format(exports))
    path = existing(model)
    if path.suffix != ".pt":
        return _Subject(formats.read(path), None, path.stem, _by_format([path, *exports]))
    from s3nn_deploy.model import load_model

    converted = load_model(path)
    return _Subject(converted.net, converted, path.stem, _by_format(exports))


def _by_format(exports: Sequence[str | Path]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in map(existing, exports):
        format = next((name for name, f in formats.FORMATS.items() if f.suffix == path.suffix), None)
        if format is None or format in files:
            suffixes = ", ".join(f.suffix for f in formats.FORMATS.values())
            raise DeployError(str(path), expected=f"one exported file of each kind: {suffixes}", got=repr(path.suffix))
        files[format] = path
    return files


def _chosen(subject: _Subject, backends: Sequence[str] | None) -> tuple[list[str], dict[str, str]]:
    """The backends to run, and those that are left out for a reason known beforehand."""
    for name in backends or ():
        if name not in BACKENDS:
            raise DeployError(f"backend {name!r}", "is not known", hint=suggestion(name, list(BACKENDS)))
    if backends is not None:
        if not backends:
            raise DeployError("backends", expected="at least one", got="none", hint=f"Known: {', '.join(BACKENDS)}.")
        return list(dict.fromkeys(backends)), {}
    not_run = {}
    wires = [j.synapses for p in subject.net.populations for j in p.projections]
    loops = sum(s.weight.size for s in wires if isinstance(s, Conv2d))
    if subject.converted is not None and loops > SLOW:
        not_run["reference"] = f"loops over {loops:,} convolution weights; name it to have it run"
    if synapses(subject.net) > SIMULATED:
        reason = (
            f"simulates {synapses(subject.net):,} synapses an inference, which takes minutes; name it to have it run"
        )
        not_run |= dict.fromkeys(SIMULATORS, reason)
    else:
        try:
            lava_env.find()
        except DeployError as error:
            not_run |= dict.fromkeys(SIMULATORS, str(error))
    return [name for name in BACKENDS if name not in not_run], not_run


# What is run, and what it should give.


def _runs(subject: _Subject, x: Any, budget: int) -> Iterator[_Run]:
    net = subject.net
    inputs = [stimuli(net)] if x is None else [checked_input(net, x), stimuli(net)]
    alone = [isolated(net, population) for population in net.populations] if budget else []
    first = {a.population: injection(a, budget) for a in alone if a is not None and list(a.places) == [INPUT]}
    every = np.concatenate([*inputs, *(made.x[:FIRST] for made in first.values())])
    yield _whole(subject, every, 0 if x is None else len(inputs[0]))
    for a in alone:
        if a is not None:
            made = first.pop(a.population, None) or injection(a, budget)
            yield _alone(subject, a, made.x, made)


def _whole(subject: _Subject, x: NDArray[Any], given: int) -> _Run:
    net = subject.net
    if subject.converted is None:
        trace = engines.run(net, x, "reference")
    else:
        from s3nn_deploy.backends import pytorch

        batch = max(1, CHUNK // (4 * sum(p.size for p in net.populations)))
        parts = range(0, max(1, len(x)), batch)
        trace = join([pytorch.run(subject.converted, x[first : first + batch]) for first in parts])
    return _Run(net, x, _values(net, trace), given=given)


def _alone(subject: _Subject, alone: Isolated, x: NDArray[Any], made: Injection | None) -> _Run:
    if subject.converted is None:
        want = _values(alone.net, engines.run(alone.net, x, "reference"))[alone.population]
    else:
        from s3nn_deploy.backends import pytorch

        sources = alone.sources(checked_input(alone.net, x))
        size = 4 * sum(int(np.prod(shape)) for shape in (*alone.shapes.values(), alone.net[alone.population].shape))
        parts = range(0, max(1, len(x)), batch := max(1, CHUNK // size))
        cut = ({name: v[first : first + batch] for name, v in sources.items()} for first in parts)
        want = np.concatenate([pytorch.run_population(subject.converted, alone.population, part) for part in cut])
        want = want.reshape(len(x), *alone.net[alone.population].shape)
    return _Run(alone.net, x, {alone.population: want}, alone, made)


def _values(net: IntNet, trace: Trace) -> dict[str, NDArray[Any]]:
    """Every population's spikes, and the readout's integers, [N, *shape]."""
    values = {p.name: trace.spikes[p.name] if p.spiking else trace.readout for p in net.populations}
    return {name: array.reshape(len(trace), *net[name].shape) for name, array in values.items()}


# Comparing.


def _compared(
    subject: _Subject,
    proof: Proof,
    runs: Iterator[_Run],
    names: list[str],
    not_run: dict[str, str],
    insist: bool,
    evidence: str | Path | None,
    progress: Callable[[int, int, str], None],
    steps: int,
) -> Result:
    """Run everything on every backend. `insist`: a backend that cannot run the network is an error, not left out."""
    baseline = "reference" if subject.converted is None else "pytorch"
    checks = {name: Check(name, BACKENDS[name].summary) for name in names}
    solved = Check(baseline, "at the membrane potentials that were solved for")
    coverage: dict[str, Coverage] = {}
    seen: dict[str, NDArray[np.bool_]] = {}
    step, samples, injected, files = 1, 0, 0, _given(subject)
    progress(step, steps, f"inputs, and {baseline}")
    with TemporaryDirectory(prefix="s3nn-verify-") as folder:
        for run in runs:
            what = "the network" if run.alone is None else f"{run.alone.population} by itself"
            step += 1
            samples, injected = (
                (samples + len(run.x), injected) if run.alone is None else (samples, injected + len(run.x))
            )
            for name, sides in _sides(run).items():
                seen[name] = seen.get(name, False) | sides
            if run.injection is not None and run.net[run.alone.population].spiking:  # type: ignore[union-attr]
                coverage[run.alone.population] = run.injection.coverage  # type: ignore[union-attr]
                solved = _at_points(solved, run)
            for name in list(checks):
                progress(step, steps, f"{what}: {name}")
                step += 1
                clock = time.perf_counter()
                try:
                    file = _file(subject, run, name, files, Path(folder))
                except DeployError as error:  # the format cannot hold it; an engine that fails is another matter
                    if run.alone is not None:
                        left_out = {**checks[name].left_out, run.alone.population: str(error)}
                        checks[name] = replace(checks[name], left_out=left_out)
                    elif insist:
                        raise
                    else:
                        not_run[name] = str(error)
                        del checks[name]
                    continue
                part = _part(run) if name in SIMULATORS else run
                tell = partial(_advance, progress, step - 1, steps, f"{what}: {name}")
                trace = engines.run(part.net, part.x, name, file, tell)
                check = _check(checks[name], subject, part, trace, evidence)
                checks[name] = replace(check, seconds=check.seconds + time.perf_counter() - clock)
            progress(step, steps, f"inputs, and {baseline}")
    if not checks:
        raise DeployError("backends", "none could run the network", got="; ".join(not_run.values()))
    covered = {
        name: replace(coverage.get(name, Coverage(len(sides), undecided=len(sides))), both=int(sides.all(1).sum()))
        for name, sides in seen.items()
    }
    done = (*([solved] if solved.compared else []), *checks.values())
    exported = tuple(files.values())
    return Result(proof, baseline, done, not_run, exported, covered, samples, injected, subject.net.digest)


def _advance(
    progress: Callable[[int, int, str], None], step: int, steps: int, what: str, time_steps: int, of: int
) -> None:
    progress(step, steps, f"{what}, time step {time_steps:,} of {of:,}")


def _given(subject: _Subject) -> dict[str, File]:
    """The files that the caller named, compared with the network, by format."""
    return {
        format: File(path.name, format, sha256(path), True, file_difference(subject.net, path, format))
        for format, path in subject.files.items()
    }


def file_difference(net: IntNet, path: Path, format: str) -> str:
    """Where an exported file does not hold `net` (as any variant of the format would), in words; empty if it does.

    Raises:
        DeployError: the file cannot be read, or the format cannot hold the network.
    """
    module = formats.FORMATS[format].load()
    found = module.read(path)
    difference = where_different(module.lower(net), found)
    profiles = getattr(module, "PROFILES", ())
    for profile, merged in ((p, m) for p in profiles for m in (False, True)):
        if not difference:
            break
        with suppress(DeployError):
            difference = difference if module.lower(net, profile, merged) != found else ""
    return difference


def _file(subject: _Subject, run: _Run, backend: str, files: dict[str, File], folder: Path) -> Path | None:
    """The file that a backend is to run: the one that was given, or else a new export, read back and compared."""
    format = BACKENDS[backend].takes
    if format is None:
        return None
    if run.alone is None and format in subject.files:
        if files[format].difference:
            hint = "Export the model again."
            raise DeployError(str(subject.files[format]), files[format].difference, hint=hint)
        return subject.files[format]
    suffix = formats.FORMATS[format].suffix
    path = formats.export(run.net, folder / f"net{suffix}", format)
    if run.alone is None:
        files[format] = File(f"{subject.stem}{suffix}", format, sha256(path), False)
    return path


def where_different(want: IntNet, got: IntNet) -> str:
    """The first thing in which two networks differ, in words; empty if they are equal."""
    if want == got:
        return ""
    if (want.input, [p.name for p in want.populations]) != (got.input, [p.name for p in got.populations]):
        return "has another input or other populations"
    for a, b in zip(want.populations, got.populations, strict=True):
        at = f"population {a.name!r}"
        wiring, other = (
            [(j.source, {**vars(j.synapses), "weight": j.synapses.weight.shape}) for j in p.projections] for p in (a, b)
        )
        if a.shape != b.shape or a.spiking != b.spiking or wiring != other:
            return f"has {at} with another shape or wiring"
        arrays = [
            (f"weight of projection {k}", i.synapses.weight, j.synapses.weight)
            for k, (i, j) in enumerate(zip(a.projections, b.projections, strict=True))
        ]
        arrays += [(kind, getattr(a, kind), getattr(b, kind)) for kind in ("threshold", "bias", "scale")]
        for kind, expected, found in arrays:
            if expected is not None and (wrong := np.argwhere(expected != found)).size:
                index = tuple(wrong[0].tolist())
                return f"has {at}, {kind} {list(index)}: {found[index]}, expected {expected[index]}"
    return "differs in the types of its arrays"


def _part(run: _Run) -> _Run:
    """The first inputs, as many as a simulator is given."""
    most = AT_MOST if run.alone is not None else max(run.given, LEAST, PATIENCE // synapses(run.net))
    return replace(run, x=run.x[:most], want={name: values[:most] for name, values in run.want.items()})


def synapses(net: IntNet) -> int:
    """Synapses of all neurons: what an inference takes where every neuron fires."""
    return sum(map(synaptic_operations, net.populations))


def _sides(run: _Run) -> dict[str, NDArray[np.bool_]]:
    """For each spiking population whether each channel fired somewhere, and was silent somewhere: [channels, 2]."""
    sides = {}
    for name, values in run.want.items():
        if run.net[name].spiking:
            by_channel = np.moveaxis(values, 1, 0).reshape(values.shape[1], -1)
            sides[name] = np.stack([by_channel.any(1), ~by_channel.all(1)], 1)
    return sides


def _at_points(check: Check, run: _Run) -> Check:
    """`check` of the baseline, with its spikes at the potentials that were solved for compared with their thresholds."""
    assert run.alone is not None
    assert run.injection is not None
    name, points = run.alone.population, run.injection.points
    theta = run.net[name].threshold
    assert theta is not None
    wrong = [p for p in points if bool(run.want[name][(p.sample, *p.neuron)]) != (p.u >= int(theta[p.neuron[0]]))]
    first = check.first_difference
    if wrong and first is None:
        p, limit = wrong[0], int(theta[wrong[0].neuron[0]])
        first = Difference(check.backend, name, True, p.sample, p.neuron, p.u, limit, p.u >= limit, p.u < limit)
    compared, differing = check.compared + len(points), check.differing + len(wrong)
    return replace(
        check, compared=compared, differing=differing, first_difference=first, injected=check.injected + len(run.x)
    )


def _check(check: Check, subject: _Subject, run: _Run, got: Trace, evidence: str | Path | None) -> Check:
    """`check` with one more run compared, population by population in topological order."""
    if len(got) != len(run.x) or any(got.spikes[p.name].shape[1:] != p.shape for p in run.net.spiking):
        raise DeployError(f"backend {check.backend!r}", "gives arrays of other shapes", hint="It is defective.")
    found = _values(run.net, got)
    compared, differing, first, left = check.compared, check.differing, check.first_difference, check.evidence
    for name, want in run.want.items():
        different = want != found[name]
        compared, differing = compared + different.size, differing + int(different.sum())
        if first is None and different.any():
            sample, *neuron = np.argwhere(different)[0].tolist()
            first = _difference(check.backend, subject, run, name, sample, tuple(neuron), want, found[name])
            if evidence is not None:
                left = _leave(Path(evidence) / f"mismatch-{check.backend}.npz", first, subject, run, found)
    check = replace(check, compared=compared, differing=differing, first_difference=first, evidence=left)
    if run.alone is None:
        return replace(check, samples=check.samples + len(run.x))
    return replace(check, injected=check.injected + len(run.x))


def _difference(
    backend: str,
    subject: _Subject,
    run: _Run,
    name: str,
    sample: int,
    neuron: tuple[int, ...],
    want: NDArray[Any],
    got: NDArray[Any],
) -> Difference:
    population = subject.net[name]
    if run.alone is None:
        signals = {INPUT: run.x[sample], **{source: values[sample] for source, values in run.want.items()}}
    else:
        signals = {source: values[0] for source, values in run.alone.sources(run.x[sample : sample + 1]).items()}
    potential = membrane_potential(subject.net, name, neuron, signals)
    threshold = None if population.threshold is None else int(population.threshold[neuron[0]])
    at = (sample, *neuron)
    return Difference(
        backend, name, run.alone is not None, sample, neuron, potential, threshold, int(want[at]), int(got[at])
    )


def _leave(path: Path, first: Difference, subject: _Subject, run: _Run, found: Mapping[str, NDArray[Any]]) -> Path:
    """Write the inputs up to the first that differs, and what was expected and got for that one."""
    start = max(0, first.sample + 1 - KEPT)
    meta = {
        "schema": MISMATCH,
        "backend": first.backend,
        "network": subject.net.digest,
        "isolated": None if run.alone is None else run.alone.population,
        "difference": str(first),
        "first_sample": start,
    }
    arrays = {"input": run.x[start : first.sample + 1]}
    for name, want in run.want.items():
        arrays |= {f"expected/{name}": want[first.sample], f"got/{name}": found[name][first.sample]}
    return write_npz(path, meta, arrays)
