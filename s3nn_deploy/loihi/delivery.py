"""What a person with access to the chip is handed: files, golden samples, a picture, and a note that says everything."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s3nn_deploy import __version__, formats, golden
from s3nn_deploy.errors import DeployError
from s3nn_deploy.files import read_npz, sha256, write_npz, write_text
from s3nn_deploy.formats import lava, netx
from s3nn_deploy.intnet import Dense, IntNet
from s3nn_deploy.loihi import cost as costs
from s3nn_deploy.loihi import drawing, mapping
from s3nn_deploy.loihi.fit import Fit, place
from s3nn_deploy.loihi.plan import GRADED, Plan
from s3nn_deploy.targets import LIMITS, Target
from s3nn_deploy.trace import Trace

GOLDEN = 10
"""Samples whose spikes and readouts are delivered."""

BUILDER = Path(__file__).parent.parent / "backends" / "lava_builder.py"
"""The runner: Lava's processes from a .lava file, without this package."""


@dataclass(frozen=True, eq=False)
class Delivery:
    """What was made.

    Attributes:
        path: the file that the target's own tools load: netx where the network is a chain, else the .lava file.
        files: all files, the path first, each with a word about it.
        notes: what the simulation has but the chip may not.
    """

    path: Path
    files: dict[Path, str]
    plan: Plan
    fit: Fit
    cost: costs.Cost
    notes: tuple[str, ...]


def generation(target: Target) -> int:
    """Which Loihi a target is: the first has no graded spikes."""
    return 2 if "message_bits" in target.limits else 1


def deliver(
    net: IntNet,
    target: Target,
    out: str | Path,
    x: NDArray[Any],
    *,
    encoding: str = "auto",
    rate_hz: float | None = None,
) -> Delivery:
    """Map `net`, check that it fits, and write everything beside `out`, each file read back and compared.

    Args:
        out: where the netx file goes; the others have its stem.
        x: samples: the first ten become the golden ones, all are counted.
        encoding: as for `mapping.make`.
        rate_hz: inferences per second, to add static power.

    Raises:
        DeployError: the network cannot be mapped, a population does not fit a core (its name, the figure, the limit,
            what would make it fit), or the place cannot be written.
    """
    from s3nn_deploy.backends import run

    out, which = Path(out), generation(target)
    plan, lowered = mapping.make(net, encoding, which), lava.lower(net, encoding, which)
    fit = place(plan, target)
    if fit.unplaced:
        raise DeployError(
            f"target {target.name!r}", "does not hold the network. " + " ".join(map(str, fit.unplaced)).rstrip(".")
        )
    bill = costs.cost(plan, fit, target, costs.spikes(plan, net, x), len(x), rate_hz)
    files: dict[Path, str] = {}
    whole, about = _netx(net, plan)
    if whole:
        file = formats.export(net, out.with_suffix(".net"), "netx")
        files[file] = "the network as lava.lib.dl.netx loads it"
    file = formats.export(net, out.with_suffix(".lava"), "lava", encoding=encoding, generation=which)
    files[file] = "the network as lava_builder.py builds it from Lava's processes"
    runner = write_text(out.with_name(BUILDER.name), BUILDER.read_text(encoding="utf-8"))
    files[runner] = "the runner: lava-nc and NumPy, nothing else"
    trace = run(net, x[:GOLDEN], "emulator")
    files[_golden(lowered, x[:GOLDEN], trace, file)] = "golden samples: inputs, every spike, readouts"
    picture = out.with_suffix(f".{target.name}.svg")
    files[write_text(picture, drawing.svg(fit))] = "cores and chips"
    notes = tuple(dict.fromkeys([*mapping.notes(plan, lowered), *about]))
    path = next(iter(files))
    made = Delivery(path, files, plan, fit, bill, notes)
    note = out.with_suffix(f".{target.name}.md")
    write_text(note, "\n".join(_note(made, net, target, trace)) + "\n")
    return Delivery(path, {**files, note: "this delivery in words"}, plan, fit, bill, notes)


UNFIT = "the netx file is for the simulation only; on the chip use the .lava file"


def _netx(net: IntNet, plan: Plan) -> tuple[bool, list[str]]:
    """Whether there is a netx file, and what to know about that."""
    try:
        found = [f"netx file, {note}" for note in netx.hardware_notes(net)]
    except DeployError as error:
        return False, [f"no netx file: {error}"]
    why = [f"{name}'s biases exceed 13 bits" for name in netx.beyond_hardware(net)]
    if plan.encoding not in ("spikes", "graded"):
        why.append("it takes graded input")
    return True, [*([f"{UNFIT}: {', '.join(why)}"] if why else []), *found]


def _golden(net: IntNet, x: NDArray[Any], trace: Trace, file: Path) -> Path:
    """Golden vectors of a .lava file, as `golden` lays them out, of these samples."""
    path = golden.place(file)
    arrays = {"input": np.asarray(x), "output": trace.readout}
    arrays |= {f"spikes/{name}": spikes for name, spikes in trace.spikes.items()}
    meta = {"schema": golden.SCHEMA, "file": file.name, "sha256": sha256(file), "network": net.digest}
    write_npz(path, meta, arrays)
    back = read_npz(path, golden.SCHEMA)[1]
    if back.keys() != arrays.keys() or any(not np.array_equal(back[name], a) for name, a in arrays.items()):
        raise DeployError(str(path), "does not read back as what was written", hint="Export again.")
    return path


def plain(made: Delivery) -> dict[str, Any]:
    """A delivery for Loihi as plain data."""
    return {
        "path": str(made.path),
        "format": "netx" if made.path.suffix == ".net" else "lava",
        "bytes": made.path.stat().st_size,
        "sha256": sha256(made.path),
        "files": {str(path): what for path, what in made.files.items()},
        "encoding": made.plan.encoding,
        "latency": made.plan.latency,
        "passes": {step.name: list(step.lines) for step in made.plan.passes},
        "cores": len(made.fit.cores),
        "chips": made.fit.chips,
        "utilisation": [made.fit.utilisation(core) for core in made.fit.cores],
        "binding": {name: made.fit.binding(name) for name in made.fit.tiles},
        "cost": asdict(made.cost),
        "notes": list(made.notes),
    }


# The note


def _note(made: Delivery, net: IntNet, target: Target, trace: Trace) -> Iterator[str]:
    plan, stem = made.plan, made.path.stem
    yield f"# {stem} for {target.name}"
    yield ""
    yield f"{target.summary}. Written by s3nn-deploy {__version__}; network {net.digest[:16]}, {len(net.populations)} populations."
    yield "Nothing here has run on the chip. What Lava's fixed-point simulation can show is shown; the rest is listed at the end."
    yield ""
    yield "| file | what | SHA-256 |"
    yield "|---|---|---|"
    for path, what in made.files.items():
        yield f"| {path.name} | {what} | `{sha256(path)[:16]}...` |"
    yield ""
    yield "## The mapping, pass by pass"
    yield ""
    for number, step in enumerate(plan.passes, 1):
        yield f"{number}. **{step.name}**"
        yield from (f"   - {line}" for line in step.lines)
    yield ""
    yield "| group | role | neurons | depth | neuron | vth | bias mantissas | sums x |"
    yield "|---|---|---|---|---|---|---|---|"
    for g in plan.groups:
        bias = "-" if g.bias is None else f"{g.bias.min()} .. {g.bias.max()}, exponent {g.bias_exp}"
        yield f"| {g.name} | {g.role} | {g.size:,} | {g.depth} | {g.neuron} | {g.vth:,} | {bias} | {g.scale} |"
    yield ""
    yield from _loading(made, net, generation(target))
    yield from _samples(net, stem, trace)
    yield from _cores(made)
    yield from _price(made)
    yield "## What the simulator cannot check"
    yield ""
    yield from (f"- {line}" for line in assumptions(made))


def _loading(made: Delivery, net: IntNet, which: int) -> Iterator[str]:
    plan, last, as_netx, stem = made.plan, made.plan.readout, _as_netx(made), made.path.stem
    chip, config = ("N2A2", "Loihi1HwCfg") if which == 1 else ("N3B3", "Loihi2HwCfg")
    of_images = "PyToN3ConvAdapter" if which == 2 else "PyToNxAdapter"
    bits = max(source.message_bits for source in plan.sources)
    yield "## Loading it on the chip"
    yield ""
    yield "Needed: membership of Intel's research community, and its wheels `lava-loihi` and `nxcore` beside `lava-nc`. The calls"
    yield "of `embedded_io` are as public users of these wheels write them; they could not be run here, the rest was."
    yield ""
    yield "```python"
    yield "import numpy as np"
    yield "from lava.magma.core.run_conditions import RunSteps"
    yield f"from lava.magma.core.run_configs import {config}"
    yield "from lava.proc import embedded_io as eio"
    yield "from lava.proc.io import sink, source"
    yield "from lava.utils import loihi"
    yield "from lava.lib.dl import netx" if as_netx else "import lava_builder"
    yield ""
    yield f"loihi.use_slurm_host(loihi_gen=loihi.ChipGeneration.{chip})"
    yield f'golden = np.load("{stem}.lava.golden.npz")'
    yield 'x, want = golden["input"], golden["output"]'
    yield f"T, latency, late = len(x), {plan.latency}, 4  # adapters may add so many steps"
    yield ""
    if as_netx:
        flat = isinstance(plan.connections[0].wires, Dense)
        adapter, shown = ("PyToNxAdapter", "x.reshape(T, -1).T") if flat else (of_images, "x.T")
        yield f'net = netx.hdf5.Network(net_config="{stem}.net", input_message_bits={bits})'
        yield f"into = source.RingBuffer(data={shown}.astype(int))  # (W, H, C, T) or (N, T)"
        yield f"adapter = eio.spike.{adapter}(shape=net.inp.shape, num_message_bits={bits})"
        yield "into.s_out.connect(adapter.inp)"
        yield "adapter.out.connect(net.inp)"
        yield "neurons = net.layers[-1].neuron"
    else:
        yield f'plan, arrays = lava_builder.load("{stem}.lava")'
        yield "feeds, by_host = lava_builder.injected(plan, arrays, x)"
        yield "built, inputs = lava_builder.build(plan, arrays)"
        yield "for name, lag, wires, flat in inputs:"
        yield "    data = np.concatenate([0 * feeds[name][:1]] * lag + [feeds[name]])"
        yield "    into = source.RingBuffer(data=data.T.astype(int))  # (W, H, C, T) or (N, T)"
        yield f"    make = eio.spike.PyToNxAdapter if flat else eio.spike.{of_images}"
        yield f"    adapter = make(shape=into.s_out.shape, num_message_bits={bits})"
        yield "    into.s_out.connect(adapter.inp)"
        yield "    lava_builder.connect(adapter.out, wires, flat)"
        yield f'neurons = built["{last.name}"]'
    yield "result = sink.RingBuffer(shape=neurons.s_out.shape, buffer=T + latency + late)"
    if last.neuron == GRADED and not as_netx:
        yield "back = eio.spike.NxToPyAdapter(shape=neurons.s_out.shape, num_message_bits=24)"
        yield "neurons.s_out.connect(back.inp)  # the message is the sum"
    else:
        yield "back = eio.state.Read(shape=neurons.s_out.shape)"
        yield "back.connect_var(neurons.v)  # the membrane potential"
    yield "back.out.connect(result.a_in)"
    yield f"neurons.run(condition=RunSteps(num_steps=T + latency + late), run_cfg={config}())"
    yield "raw = result.data.get().T  # [steps, *shape]"
    yield "neurons.stop()"
    yield ""
    unit = (2 if as_netx else last.scale) * (64 if as_netx or last.neuron != GRADED else 1)
    integers = f"seen / {unit}" if as_netx else "lava_builder.readout(plan, arrays, seen)"
    yield "for shift in range(late + 1):"
    yield "    seen = raw[latency + shift :][:T]"
    yield f"    right = ({integers}).reshape(want.shape) == want"
    yield '    print(f"{shift} more steps: {right.all(1).sum()} of {T} golden samples")  # one line says that all are'
    yield "```"
    yield ""
    host = "; then the host adds the readout's `host_bias`" if last.host_bias is not None and not as_netx else ""
    yield f"- Readout: the value divided by {unit} is the network's integer{host or ', bias included'}; {_winner(net)}"
    yield f"- Latency: {plan.latency} steps. Sample k = 0, 1, ... shown at step k + 1 is read after step k + {1 + plan.latency}."
    yield f"- Pipeline fill: the first {plan.latency} outputs belong to no sample, for biases fire neurons before data arrive."
    yield "- Input adapters add a step or two: the golden samples tell how many, as above."
    if which == 1:
        yield "- Which adapter Loihi 1 has for images is in no public source; `PyToN3ConvAdapter` is Loihi 2's."
    if plan.host:
        yield f"- The host computes {', '.join(p.name for p in plan.host)}: `lava_builder.injected` does, in int64."
    yield ""


def _winner(net: IntNet) -> str:
    """How a readout becomes a class."""
    if np.all(net.scale == net.scale[0]):
        return "the largest wins."
    factors = ", ".join(f"{factor:.17g}" for factor in net.scale)
    return f"times its class's scale, the largest wins. Scales: {factors}."


def _as_netx(made: Delivery) -> bool:
    """Whether the note tells to load the netx file: there is one, and the chip takes its input and its biases."""
    return made.path.suffix == ".net" and not any(line.startswith(UNFIT) for line in made.notes)


def _samples(net: IntNet, stem: str, trace: Trace) -> Iterator[str]:
    yield f"## {len(trace)} golden samples"
    yield ""
    yield f"`{stem}.lava.golden.npz` holds inputs, every spike of every population and the readouts, as the trained network has them."
    yield f"`python lava_builder.py {stem}.lava {stem}.lava.golden.npz` compares them in simulation, ==."
    yield "Do the same with what the chip gives."
    yield ""
    yield "| sample | class | readout |"
    yield "|---|---|---|"
    for index, (row, chosen) in enumerate(zip(trace.readout, trace.predictions, strict=True)):
        name = net.classes[chosen] if net.classes else str(chosen)
        shown = ", ".join(str(v) for v in row[:16]) + (", ..." if len(row) > 16 else "")
        yield f"| {index} | {name} | {shown} |"
    yield ""


def _cores(made: Delivery) -> Iterator[str]:
    fit = made.fit
    picture = next(path for path in made.files if path.suffix == ".svg")
    yield "## Cores"
    yield ""
    chips = f"{fit.chips} chip{'s' if fit.chips > 1 else ''} of {fit.per_chip}"
    yield f"{len(fit.cores)} cores on {chips}, by our own partition; the vendor's compiler may find another."
    yield ""
    yield f"![cores]({picture.name})"
    yield ""
    yield "| group | cores | tile (channels x rows x columns) | fullest resource |"
    yield "|---|---|---|---|"
    for name, size in fit.tiles.items():
        key, share = fit.binding(name)
        yield f"| {name} | {len(fit.on(name))} | {' x '.join(map(str, size))} | {share:.0%} of {LIMITS[key]} |"
    yield ""
    yield "| core | " + " | ".join(LIMITS[key] for key in fit.limits) + " |"
    yield "|---|" + "---|" * len(fit.limits)
    for core in sorted(fit.cores, key=lambda c: -max(fit.utilisation(c).values()))[:16]:
        yield f"| {core.number} | " + " | ".join(f"{share:.0%}" for share in fit.utilisation(core).values()) + " |"
    if len(fit.cores) > 16:
        yield f"| ... {len(fit.cores) - 16} more, less full | " + " | " * len(fit.limits)
    yield ""


def _price(made: Delivery) -> Iterator[str]:
    bill = made.cost
    yield "## Energy and time"
    yield ""
    yield f"Per inference, mean of {bill.samples} samples. Counts are exact but where they say estimated; prices are the sources'."
    yield ""
    yield "| event | per inference | pJ each | nJ | evidence | source |"
    yield "|---|---|---|---|---|---|"
    for line in bill.lines:
        least = {"min": "at least ", "max": "at most "}.get(line.bound, "")
        pj, nj = ("-", "-") if line.pj is None or line.nj is None else (f"{least}{line.pj:g}", f"{line.nj:,.3f}")
        yield f"| {costs.EVENTS[line.event]} | {line.count:,.1f} | {pj} | {nj} | {line.evidence} | {line.source} |"
    yield ""
    yield from (f"- {line}" for line in cost_sentences(bill))
    yield from (f"- For comparison, measured: {reference}." for reference in bill.references)
    yield from (f"- Not in the bill: {term}." for term in bill.not_modelled)
    yield ""


def cost_sentences(bill: costs.Cost) -> Iterator[str]:
    """What the bill comes to."""
    if bill.at_least is None:
        yield "No energy: nothing is priced on this chip; the counts stand for themselves."
    else:
        yield f"At least {bill.at_least:,.2f} nJ per inference for the priced events."
    if bill.static_nj is not None:
        yield f"Static: {bill.static_nj:,.1f} nJ more at {bill.rate_hz:g} inferences per second ({bill.static_source})."
    elif bill.rate_hz is not None:
        yield "Static: nobody published this chip's static power by itself."
    if bill.step_ns is not None and bill.latency_ns is not None:
        yield (
            f"Estimated: {bill.step_ns / 1000:,.2f} us a step, bound by core {bill.busiest}, which is {1e9 / bill.step_ns:,.0f} "
            f"inferences per second with a latency of {bill.latency_ns / 1000:,.2f} us, if input and output keep up."
        )


def assumptions(made: Delivery) -> Iterator[str]:
    """What must hold on the chip and no simulation shows; what holds for this network only first."""
    plan = made.plan
    yield from (f"{note.rstrip('.')}." for note in made.notes)
    yield (
        "vDecay = 4096 (dv) forgets the potential at each step, in Lava and brian2-loihi. nengo-loihi clips at 4095: then 1/4096 of "
        "it would stay, and this file is not exact; a `reset_interval` of 1 would mend it, if the chip takes that."
    )
    yield "iDecay = 4096 (du = 4095) forgets the current: Lava's LIF adds one to du, as Loihi 1 does."
    if any(isinstance(c.wires, Dense) and c.weight_exp for c in plan.connections):
        yield "Dense weights are stored doubled with exponent -1 (digits and always-on neurons with up to 7), in the 4 bits that Loihi has."
    if any(g.bias_exp == 7 for g in plan.groups):
        yield "Bias exponent 7, the largest of 3 bits, where sums are doubled."
    if any(g.role == "always-on" for g in plan.groups):
        yield "Always-on neurons fire from the first step on."
    if any(s.message_bits for s in plan.sources):
        yield "Graded input of 8 bits is multiplied by convolution and dense weights alike; 8-bit payloads go through the input adapter."
    yield "Mixed-sign weights are even and in -256..254; Lava's convolution does not check that, we do."
    yield "The partition onto cores is ours; Intel's compiler makes its own, and its axon and group formats are not public."
    yield "Lava is archived, and `lava-loihi` was last seen with lava-nc 0.8; whether the community still hands it out is not known."
