"""The command line: parses and prints, computes nothing. Data goes to stdout, progress and errors to stderr."""

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from s3nn_deploy import __version__
from s3nn_deploy.errors import DeployError

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from s3nn_deploy.intnet import IntNet
    from s3nn_deploy.targets import Target


class _Commands(click.Group):
    """Commands in the order of the work, and one way to end on an error: a sentence on stderr and exit code 2."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DeployError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(2)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="s3nn-deploy")
def main() -> None:
    """Single-step spiking neural networks from PyTorch to neuromorphic hardware, with proof that nothing changed.

    \b
    Try it:  s3nn-deploy demo
    By hand: s3nn-deploy train digits-conv
             s3nn-deploy export model.pt --target loihi
             s3nn-deploy simulate model.pt
             s3nn-deploy verify model.pt

    Exit codes: 0 done, 1 a backend differs, 2 a usage error or something that cannot be done.
    """


def _console(*, err: bool = False) -> "Console":
    from rich.console import Console

    console = Console(stderr=err, highlight=False)
    return console if console.is_terminal else Console(stderr=err, highlight=False, width=140)


def _emit(plain: Any) -> None:
    click.echo(json.dumps(plain, indent=2))


@contextmanager
def _progress(label: str) -> Iterator[Any]:
    """A progress bar on stderr, if that is a terminal; yields a function (done, total, text)."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    console = _console(err=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None, text="")

        def advance(done: int, total: int, text: str | None = None) -> None:
            bar.update(task, completed=done, total=total)
            if text is not None:
                bar.update(task, text=text)

        yield advance


@main.command()
@click.argument("name", required=False)
@click.option("--out", type=click.Path(path_type=Path), help="Copy the trained checkpoint of NAME there.")
@click.option("--json", "as_json", is_flag=True, help="Print plain data.")
def models(name: str | None, out: Path | None, as_json: bool) -> None:
    """List the shipped recipes and trained checkpoints, show one, or copy its checkpoint.

    \b
    Example: s3nn-deploy models digits-conv
             s3nn-deploy models mnist-lenet --out model.pt
    """
    from s3nn_deploy import recipes
    from s3nn_deploy.files import builtin, replacing, sha256
    from s3nn_deploy.report import table

    folder = builtin("models")
    if out is not None:
        shipped = [n for n in recipes.names() if (folder / f"{n}.pt").is_file()]
        there = f"There are {', '.join(shipped)}."
        if name is None:
            raise DeployError("models --out", expected="the NAME of a checkpoint", got="none", hint=there)
        if name not in shipped:
            hint = f"{there} Or train it: s3nn-deploy train {recipes.load(name).name}"
            raise DeployError(f"recipe {name!r}", "has no trained checkpoint", hint=hint)
        with replacing(out) as temporary:
            temporary.write_bytes((folder / f"{name}.pt").read_bytes())
        digest = sha256(out)
        if as_json:
            return _emit({"model": str(out), "sha256": digest})
        return click.echo(f"{out}: {name} as trained, SHA-256 {digest[:12]}... Next: s3nn-deploy verify {out}")
    if name:
        recipe = recipes.load(name)
        if as_json:
            return _emit(recipe.plain())
        return click.echo(
            (folder / f"{name}.toml").read_text(encoding="utf-8")
            if name in recipes.names()
            else Path(name).read_text(encoding="utf-8")
        )
    found = {n: (recipes.load(n), (folder / f"{n}.pt").is_file()) for n in recipes.names()}
    if as_json:
        return _emit(
            [
                {"name": n, "summary": r.summary, "data": r.data, "checkpoint": trained, "measured": dict(r.measured)}
                for n, (r, trained) in found.items()
            ]
        )
    rows = table("recipe", "data", "checkpoint", "measured", "summary")
    for n, (recipe, trained) in found.items():
        accuracy = recipe.measured.get("accuracy")
        measured = "-" if accuracy is None else f"{accuracy:.2%}"
        rows.add_row(n, recipe.data, "shipped" if trained else "-", measured, recipe.summary)
    _console().print(rows)


@main.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print plain data.")
def targets(name: str | None, as_json: bool) -> None:
    """List the shipped targets, or show one: limits and prices with their sources.

    \b
    Example: s3nn-deploy targets loihi
    """
    from s3nn_deploy import targets as shipped
    from s3nn_deploy.files import builtin
    from s3nn_deploy.report import table

    if name and not as_json:
        shipped.load(name)
        path = builtin("targets") / f"{name}.toml" if name in shipped.names() else Path(name)
        return click.echo(path.read_text(encoding="utf-8"))
    found = [shipped.load(n) for n in ([name] if name else shipped.names())]
    if as_json:
        return _emit(
            [
                {
                    "name": t.name,
                    "summary": t.summary,
                    "takes": t.takes,
                    "priced": [k for k, p in t.events.items() if p.pj is not None],
                    "limits": {key: limit.max for key, limit in t.limits.items()},
                }
                for t in found
            ]
        )
    rows = table("target", "takes", "prices", "summary")
    for target in found:
        priced = sum(price.pj is not None for price in target.events.values())
        rows.add_row(target.name, target.takes or "-", str(priced) if priced else "none", target.summary)
    _console().print(rows)


@main.command()
@click.argument("recipe")
@click.option(
    "--data", type=click.Path(path_type=Path), help="Folder with the data set; default $S3NN_DATA. Digits needs none."
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("model.pt"), show_default=True, help="Where the model goes."
)
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change a key of the recipe; may be repeated."
)
@click.option("--resume", is_flag=True, help="Go on after an interruption, from <out>.resume.")
@click.option(
    "--finish", is_flag=True, help="Train no further: make the model of the last whole epoch in <out>.resume."
)
@click.option("--device", default="cpu", show_default=True, type=click.Choice(["cpu", "cuda"]), help="Where to train.")
@click.option("--tensorboard", type=click.Path(path_type=Path), help="Folder for TensorBoard's event files.")
@click.option("--json", "as_json", is_flag=True, help="Print plain data.")
def train(
    recipe: str,
    data: Path | None,
    out: Path,
    settings: tuple[str, ...],
    resume: bool,
    finish: bool,
    device: str,
    tensorboard: Path | None,
    as_json: bool,
) -> None:
    """Train a RECIPE (a name from `models`, or a .toml file), quantisation-aware, and write a hardened model.

    \b
    Example: s3nn-deploy train digits-conv --out model.pt --set epochs=10 --set bits=4
             s3nn-deploy train digits-conv --set synops_target=20000
             torchrun --nproc-per-node 2 -m s3nn_deploy.cli train digits-conv
    """
    from s3nn_deploy import data as datasets
    from s3nn_deploy import recipes

    chosen = recipes.load(recipe, settings)
    dataset = datasets.load(chosen.data, data)
    from s3nn_deploy import train as training

    advised: set[str] = set()
    epochs, terminal = chosen.epochs * (2 if chosen.distil else 1), _console(err=True).is_terminal

    def show(done: int, total: int, epoch: Any) -> None:
        if epoch is None:
            return advance(done, total, None)
        for advice in epoch.advice:
            if (layer := advice.partition(":")[0]) not in advised:
                advised.add(layer)
                click.echo(f"epoch {epoch.epoch}, {advice}", err=True)
        rates = ", ".join(f"{name} {rate:.0%}" for name, rate in epoch.rates.items())
        text = f"epoch {epoch.epoch}{' of the twin' * epoch.twin}  loss {epoch.loss:.3f}  accuracy {epoch.accuracy:.1%}"
        advance(done, total, f"{text}  firing {rates}" if rates else text)
        if not terminal:
            left = epoch.seconds * epochs * (total - done) / total
            click.echo(f"{text}  firing {rates or '-'}  about {left / 60:.0f} min left", err=True)

    with _progress(f"Training {chosen.name}") as advance:
        made = training.train(
            chosen, dataset, out, resume=resume, finish=finish, device=device, tensorboard=tensorboard, report=show
        )
    if not made.first:
        return
    if as_json:
        return _emit(
            {
                "model": str(made.path),
                "metrics": str(made.metrics),
                "correct": made.correct,
                "total": made.total,
                "accuracy": made.accuracy,
                "seconds": made.seconds,
                "sha256": made.sha256,
            }
        )
    click.echo(
        f"{made.path}: {made.accuracy:.2%} of {made.total} held-out samples ({made.correct} correct), trained in {made.seconds:.0f} s."
    )
    click.echo(f"Metrics: {made.metrics}. Next: s3nn-deploy verify {made.path}")


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print plain data.")
def inspect(file: Path, as_json: bool) -> None:
    """Show a network's populations: shapes, fan-in, weight and accumulator widths, thresholds. Any format we write.

    \b
    Example: s3nn-deploy inspect model.pt
    """
    from s3nn_deploy.model import load
    from s3nn_deploy.report import describe, describe_table

    net = load(file)
    if as_json:
        return _emit(describe(net))
    click.echo(
        f"{file}: input {'x'.join(map(str, net.input.shape))} of {net.input.bits} bits, {len(net.populations)} populations, "
        f"{sum(p.size for p in net.populations):,} neurons, digest {net.digest[:12]}"
    )
    _console().print(describe_table(net))


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--target", required=True, help="A name from `targets`, or a path to your own .toml.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Where the export goes; default MODEL with the format's suffix."
)
@click.option("--profile", help="NIR: whom it is for: if (default), cubalif, threshold, rockpool or archive.")
@click.option(
    "--merge-skips", is_flag=True, help="NIR: make a residual network a chain, for readers that have no joins."
)
@click.option("--expose-spikes", is_flag=True, help="ONNX: every population's spikes are outputs too.")
@click.option("--qonnx", is_flag=True, help="ONNX: with QONNX's Quant nodes, for its tools instead of ONNX Runtime.")
@click.option(
    "--input-encoding",
    type=click.Choice(["auto", "graded", "host", "planes", "thermometer"]),
    default="auto",
    show_default=True,
    help="Loihi: how pixels reach the chip; auto takes graded spikes where chip and sums allow, else the host's help.",
)
@click.option("--rate", type=float, help="Loihi: inferences per second, to add static power to the bill.")
@click.option("--explain", is_flag=True, help="Loihi: print the mapping pass by pass.")
@click.option("--json", "as_json", is_flag=True, help="Print plain data.")
def export(
    model: Path,
    target: str,
    out: Path | None,
    profile: str | None,
    merge_skips: bool,
    expose_spikes: bool,
    qonnx: bool,
    input_encoding: str,
    rate: float | None,
    explain: bool,
    as_json: bool,
) -> None:
    """Export MODEL for a target, after checking the target's limits; the file is read back and compared before it appears.

    Beside NIR and ONNX files lie golden vectors (FILE.golden.npz): inputs, every population's spikes and the readout.
    For Loihi there are also a description for lava-nc, a runner, ten golden samples, a picture of the cores, and a note.

    \b
    Example: s3nn-deploy export model.pt --target loihi --out digits.net
             s3nn-deploy export model.pt --target nir --profile cubalif
    """
    from s3nn_deploy import formats, golden
    from s3nn_deploy import targets as shipped
    from s3nn_deploy.files import sha256
    from s3nn_deploy.model import load

    chosen = shipped.load(target)
    if chosen.takes is None:
        raise DeployError(
            f"target {target!r}",
            "only has prices; nothing here writes files for it",
            hint=f"Use it with `simulate --target {target}`, or export for one of: "
            f"{', '.join(n for n in shipped.names() if shipped.load(n).takes)}.",
        )
    options: dict[str, Any] = {
        name: value
        for name, value in (
            ("profile", profile),
            ("merge_skips", merge_skips),
            ("expose_spikes", expose_spikes),
            ("qonnx", qonnx),
        )
        if value
    }
    formats.check_options(chosen.takes, options)
    net = load(model)
    if chosen.takes == "netx":
        return _export_loihi(net, chosen, out or model.with_suffix(".net"), input_encoding, rate, explain, as_json)
    shipped.check_limits(net, chosen)
    path = out or model.with_suffix(formats.FORMATS[chosen.takes].suffix)
    formats.export(net, path, chosen.takes, **options)
    notes = formats.notes(net, chosen.takes, **options)
    vectors = golden.write(formats.read(path), path) if chosen.takes in ("nir", "onnx") else None
    if as_json:
        return _emit(
            {
                "path": str(path),
                "format": chosen.takes,
                "bytes": path.stat().st_size,
                "sha256": sha256(path),
                "golden": None if vectors is None else str(vectors),
                "notes": notes,
            }
        )
    click.echo(f"{path}: {formats.FORMATS[chosen.takes].summary}, {path.stat().st_size:,} bytes, read back and equal.")
    if vectors is not None:
        click.echo(f"{vectors}: golden vectors.")
    for note in notes:
        click.echo(f"note: {note}")


def _export_loihi(
    net: "IntNet", target: "Target", out: Path, encoding: str, rate: float | None, explain: bool, as_json: bool
) -> None:
    from s3nn_deploy.files import sha256
    from s3nn_deploy.loihi import delivery
    from s3nn_deploy.stimuli import stimuli

    try:
        x = _samples(net, None, None, 100)[0]
    except DeployError as error:
        click.echo(f"note: {error} Golden samples are generated inputs.", err=True)
        x = stimuli(net, 64)
    made = delivery.deliver(net, target, out, x, encoding=encoding, rate_hz=rate)
    if as_json:
        return _emit(delivery.plain(made))
    size, digest = made.path.stat().st_size, sha256(made.path)[:12]
    click.echo(f"{made.path}: {made.files[made.path]}, {size:,} bytes, SHA-256 {digest}..., read back and equal.")
    for path, what in list(made.files.items())[1:]:
        click.echo(f"{path}: {what}.")
    if explain:
        for step in made.plan.passes:
            click.echo(f"{step.name}: " + "; ".join(step.lines))
    used, chips = len(made.fit.cores), made.fit.chips
    click.echo(f"Input: {made.plan.passes[1].lines[0]} ({made.plan.passes[1].lines[1]}).")
    click.echo(
        f"Fits: {used} core{'s' if used > 1 else ''} on {chips} chip{'s' if chips > 1 else ''}; latency {made.plan.latency} steps."
    )
    for sentence in delivery.cost_sentences(made.cost):
        click.echo(sentence)
    for note in made.notes:
        click.echo(f"note: {note}")


def _samples(
    net: "IntNet", data: Path | None, input_file: Path | None, samples: int | None
) -> "tuple[np.ndarray, np.ndarray | None, str]":
    """The inputs, their labels if known, and a word about them."""
    import numpy as np

    from s3nn_deploy import data as datasets
    from s3nn_deploy.files import existing
    from s3nn_deploy.stimuli import stimuli

    if input_file is not None:
        try:
            x = np.load(existing(input_file), allow_pickle=False, mmap_mode="r")
        except (ValueError, OSError, EOFError) as error:
            raise DeployError(
                str(input_file),
                f"is not a readable .npy array ({error})",
                hint="Save uint8 [N, C, H, W] with numpy.save.",
            ) from error
        if not isinstance(x, np.ndarray):
            raise DeployError(
                str(input_file),
                expected="one .npy array",
                got="an .npz archive",
                hint="Save uint8 [N, C, H, W] with numpy.save.",
            )
        return x[:samples], None, str(input_file)
    name = net.provenance.get("data")
    if not isinstance(name, str):
        return stimuli(net, samples or 64), None, "generated inputs"
    dataset = datasets.load(name, data).quantised(min(net.input.bits, 8))
    return dataset.test_x[:samples], dataset.test_y[:samples], f"{name}, held out"


@main.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--compare",
    type=click.Choice([">", ">="]),
    help="How that tool's neurons decide where v equals v_threshold: snnTorch and Norse '>', SpikingJelly and sinabs '>='.",
)
@click.option("--bits", type=int, help="The input holds integers 0 .. 2^BITS - 1; default what the file says, else 1.")
@click.option("--dt", type=float, help="That tool's time step in seconds; default 1e-4.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Where the network goes; default FILE with the suffix .npz."
)
@click.option("--json", "as_json", is_flag=True, help="Print plain data.")
def import_(
    file: Path, compare: str | None, bits: int | None, dt: float | None, out: Path | None, as_json: bool
) -> None:
    """Read another tool's NIR FILE, saying what NIR leaves open, and write the integer network that it is.

    It must be one: one step, integer weights, neurons at full leak or IF. Every other command takes what is written.

    \b
    Example: s3nn-deploy import theirs.nir --compare ">" --bits 8 --out net.npz
             s3nn-deploy export net.npz --target loihi
    """
    from s3nn_deploy import formats

    given = {"compare": compare, "bits": bits, "dt": dt}
    if file.suffix != ".nir":
        raise DeployError(
            str(file), expected="a .nir file", got=repr(file.suffix), hint="Other formats are taken as they are."
        )
    net = formats.read(file, **{name: value for name, value in given.items() if value is not None})
    path = formats.export(net, out or file.with_suffix(".npz"), "emulator")
    if as_json:
        return _emit({"path": str(path), "digest": net.digest, "populations": len(net.populations)})
    shape = "x".join(map(str, net.input.shape))
    click.echo(
        f"{path}: input {shape} of {net.input.bits} bits, {len(net.populations)} populations, digest {net.digest[:12]}, "
        f"read back and equal. Next: s3nn-deploy inspect {path}"
    )


def _spread(command: Any) -> Any:
    """Options that say where samples are computed."""
    jobs = click.option(
        "--jobs",
        type=click.IntRange(min=1),
        help="Processors to use; default all. The result is the same for any number.",
    )
    scheduler = click.option(
        "--scheduler", help="Compute on the workers of this Dask scheduler instead, tcp://host:8786 (extra: cluster)."
    )
    return jobs(scheduler(command))


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--backend", default="emulator", show_default=True, help="emulator, reference, onnx or lava.")
@click.option(
    "--engine",
    type=click.Choice(["auto", "numpy", "numba", "onednn"]),
    default="auto",
    show_default=True,
    help="What computes for the emulator; all give the same integers, auto takes the fastest for the work.",
)
@click.option("--target", default="emulator", show_default=True, help="Whose prices the emulator's counts get.")
@click.option("--data", type=click.Path(path_type=Path), help="Folder with the model's data set; default $S3NN_DATA.")
@click.option(
    "--input",
    "input_file",
    type=click.Path(path_type=Path),
    help="A .npy with integers [N, *input shape] instead; it may be larger than memory.",
)
@click.option("--samples", type=click.IntRange(min=1), help="How many samples; default all that are held out.")
@click.option("--rate", type=float, help="Inferences per second, to add the target's static power.")
@_spread
@click.option(
    "--each",
    type=click.Path(path_type=Path),
    help="Write to this .npz, of each sample: prediction, every count by population, and every figure of the target's machine.",
)
@click.option("--json", "as_json", is_flag=True, help="Print plain data.")
def simulate(
    file: Path,
    backend: str,
    engine: str,
    target: str,
    data: Path | None,
    input_file: Path | None,
    samples: int | None,
    rate: float | None,
    jobs: int | None,
    scheduler: str | None,
    each: Path | None,
    as_json: bool,
) -> None:
    """Run a network on held-out data or your own: predictions, synaptic operations and energy per inference.

    \b
    Example: s3nn-deploy simulate model.pt --target loihi --samples 100
             s3nn-deploy simulate model.pt --input many.npy --scheduler tcp://10.0.0.1:8786
             s3nn-deploy simulate model.pt --input images.npy --engine onednn --each counts.npz
    """
    import numpy as np

    from s3nn_deploy import pricing, report
    from s3nn_deploy import targets as shipped
    from s3nn_deploy.cluster import processors
    from s3nn_deploy.document import machines
    from s3nn_deploy.files import replacing
    from s3nn_deploy.model import load
    from s3nn_deploy.simulation import simulate as run

    chosen = shipped.load(target)
    net = load(file)
    x, labels, what = _samples(net, data, input_file, samples)
    with _progress(f"Simulating on {backend}") as advance:
        made = run(
            net,
            x,
            labels,
            backend,
            file=file if _takes(backend, file) else None,
            machines=machines(chosen),
            jobs=jobs or processors(),
            scheduler=scheduler,
            engine=engine,
            each=each is not None,
            progress=advance,
        )
    if each is not None:
        with replacing(each) as temporary, temporary.open("wb") as stream:
            arrays: dict[str, Any] = {"predictions": made.predictions, **made.each}
            np.savez(stream, **arrays)
    bill, twins = None, {}
    if made.counts is not None:
        bill = pricing.price(made.counts, chosen, rate)
        twins = pricing.twins(net, made.counts, chosen)
    if as_json:
        return _emit({"file": str(file), "data": what, **report.simulation(net, made, bill, twins)})
    console = _console()
    console.print(report.simulation_table(net, made, bill))
    if bill is not None:
        console.print()
        console.print(report.bill_table(bill))
    for sentence in report.simulation_sentences(made, bill, twins, what):
        click.echo(sentence)


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("others", type=click.Path(path_type=Path), nargs=-1)
@click.option("--target", default="emulator", show_default=True, help="Whose prices and limits; a name or a .toml.")
@click.option("--data", type=click.Path(path_type=Path), help="Folder with the model's data set; default $S3NN_DATA.")
@click.option(
    "--input", "input_file", type=click.Path(path_type=Path), help="A .npy with integers [N, *input shape] instead."
)
@click.option("--samples", type=click.IntRange(min=1), help="How many samples; default all that are held out.")
@click.option("--rate", type=float, help="Inferences per second, to add the target's static power.")
@_spread
@click.option("--html", type=click.Path(path_type=Path), help="Write a page that needs no network.")
@click.option("--json", "as_json", is_flag=True, help="Print plain data, which `compare` reads.")
def report(
    model: Path,
    others: tuple[Path, ...],
    target: str,
    data: Path | None,
    input_file: Path | None,
    samples: int | None,
    rate: float | None,
    jobs: int | None,
    scheduler: str | None,
    html: Path | None,
    as_json: bool,
) -> None:
    """Report what MODEL does and costs on a target: accuracy, energy with its sources, and how to repeat it.

    OTHERS are further models, for the plot of accuracy against energy.

    \b
    Example: s3nn-deploy report model.pt --target loihi --html report.html
             s3nn-deploy report model.pt small.pt large.pt --html report.html
    """
    from functools import partial

    from s3nn_deploy import document
    from s3nn_deploy import targets as shipped
    from s3nn_deploy.cluster import processors
    from s3nn_deploy.files import write_text
    from s3nn_deploy.model import load
    from s3nn_deploy.report import populations_table

    chosen, made = shipped.load(target), []
    given: list[str] = ["--target", target]
    for option, value in (("--data", data), ("--input", input_file), ("--samples", samples), ("--rate", rate)):
        given += [option, str(value)] if value is not None else []
    command = shlex.join(["s3nn-deploy", "report", *map(str, (model, *others)), *given])
    for path in (model, *others):
        net = load(path)
        x, labels, what = _samples(net, data, input_file, samples)
        with _progress(f"Running {path.name}") as advance:
            run = partial(document.gather, jobs=jobs or processors(), scheduler=scheduler, progress=advance)
            made.append(run(path, chosen, x, labels, what, rate_hz=rate, command=command))
    if html is not None:
        from s3nn_deploy import page

        fit, picture = _fit(load(model), chosen)
        write_text(html, page.report(made[0], made[1:], picture, fit))
        click.echo(f"Page: {html}", err=as_json)
    if as_json:
        return _emit(made[0] if len(made) == 1 else {**made[0], "others": made[1:]})
    console = _console()
    console.print(populations_table(made[0]))
    for sentence in (document.verdict(made[0]), *filter(None, [made[0]["target"]["limits"]])):
        click.echo(sentence)
    if html is None:
        click.echo("Next: the same with --html report.html, or with --json for `compare`.")


def _fit(net: "IntNet", target: "Target") -> tuple[str, str]:
    """A sentence about a network on a Loihi chip, and a picture; nothing for other targets."""
    if target.takes != "netx":
        return "", ""
    from s3nn_deploy.loihi import delivery, drawing, mapping
    from s3nn_deploy.loihi.fit import place

    try:
        fit = place(mapping.make(net, "auto", delivery.generation(target)), target)
    except DeployError as error:
        return f"The network cannot be mapped: {error}", ""
    if fit.unplaced:
        return "Does not fit: " + " ".join(map(str, fit.unplaced)), ""
    chips = f"{fit.chips} chip{'s' if fit.chips > 1 else ''}"
    return (
        f"Fits on {len(fit.cores)} cores of {chips}; each core is filled as far as its fullest resource is.",
        drawing.svg(fit),
    )


@main.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--html", type=click.Path(path_type=Path), help="Write a page that needs no network.")
@click.option("--json", "as_json", is_flag=True, help="Print plain data.")
def compare(a: Path, b: Path, html: Path | None, as_json: bool) -> None:
    """Set two reports of `report --json` side by side: differences and ratios, where those mean something.

    \b
    Example: s3nn-deploy report model.pt --json > a.json
             s3nn-deploy compare a.json b.json --html compared.html
    """
    from s3nn_deploy import document
    from s3nn_deploy.files import write_text
    from s3nn_deploy.report import comparison_table

    made = document.compare(document.read(a), document.read(b))
    if html is not None:
        from s3nn_deploy import page

        write_text(html, page.comparison(made))
        click.echo(f"Page: {html}", err=as_json)
    if as_json:
        return _emit(made)
    _console().print(comparison_table(made))
    for note in made["notes"]:
        click.echo(note)


@main.command()
@click.argument("models", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--bits", help="Comma-separated weight widths, 2 to 8, to quantise to again, besides the model as it is.")
@click.option("--targets", "names", default="emulator", show_default=True, help="Comma-separated names or .toml files.")
@click.option(
    "--vary",
    multiple=True,
    metavar="KEY=VALUE,...",
    help="A key of the targets' files and its values, as machine.cores=1,2,4; may be repeated.",
)
@click.option("--data", type=click.Path(path_type=Path), help="Folder with the models' data set; default $S3NN_DATA.")
@click.option(
    "--input", "input_file", type=click.Path(path_type=Path), help="A .npy with integers [N, *input shape] instead."
)
@click.option("--samples", type=click.IntRange(min=1), help="How many samples; default all that are held out.")
@_spread
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("sweep.jsonl"),
    show_default=True,
    help="Results, a line each; what is there already is not computed again.",
)
@click.option("--csv", "csv_file", type=click.Path(path_type=Path), help="Write the table as CSV, too.")
@click.option("--svg", type=click.Path(path_type=Path), help="Write a Pareto plot, one for each target.")
@click.option("--json", "as_json", is_flag=True, help="Print plain data.")
def sweep(
    models: tuple[Path, ...],
    bits: str | None,
    names: str,
    vary: tuple[str, ...],
    data: Path | None,
    input_file: Path | None,
    samples: int | None,
    jobs: int | None,
    scheduler: str | None,
    out: Path,
    csv_file: Path | None,
    svg: Path | None,
    as_json: bool,
) -> None:
    """Evaluate MODELS at several weight widths, on several targets and variants of them: accuracy against energy.

    A killed sweep goes on when the same command is run again.

    \b
    Example: s3nn-deploy sweep model.pt --bits 6,4,3,2 --svg sweep.svg
             s3nn-deploy sweep model.pt --vary machine.cores=1,2,4 --vary machine.weights.bytes=8192,1048576
    """
    from s3nn_deploy import data as datasets
    from s3nn_deploy import sweep as sweeps
    from s3nn_deploy.cluster import processors
    from s3nn_deploy.files import write_text
    from s3nn_deploy.model import load
    from s3nn_deploy.report import sweep_table

    varied = {}
    for given in vary:
        key, _, values = given.partition("=")
        if not key or not values:
            raise DeployError(f"--vary {given!r}", expected="KEY=VALUE,VALUE,...")
        varied[key.strip()] = [value.strip() for value in values.split(",")]
    try:
        widths = [int(n) for n in bits.split(",")] if bits else []
    except ValueError as error:
        raise DeployError(f"--bits {bits!r}", expected="integers, comma-separated") from error

    def inputs(model: Path) -> tuple[Any, ...]:
        net = load(model)
        x, labels, _ = _samples(net, data, input_file, samples)
        name = net.provenance.get("data")
        if input_file is None and isinstance(name, str):
            return x, labels, datasets.load(name, data).quantised(min(net.input.bits, 8)).train_x[:256]
        return x, labels, x[:256]

    chosen = [name.strip() for name in names.split(",") if name.strip()]
    todo = sweeps.points(models, [None, *dict.fromkeys(widths)], chosen, varied, inputs)
    with _progress("Sweeping") as advance:
        rows = sweeps.sweep(todo, out, inputs, jobs=jobs or processors(), scheduler=scheduler, progress=advance)
    if csv_file is not None:
        write_text(csv_file, sweeps.to_csv(rows))
    if svg is not None:
        _plot_sweep(rows, svg)
    if as_json:
        return _emit(rows)
    _console().print(sweep_table(rows))
    for row in rows:
        if row["refused"]:
            click.echo(f"Refused: {row['label']}: {row['refused']}")
    if len(chosen) > 1:
        click.echo("Energies of different targets rest on different prices: compare rows of one target.")
    click.echo(f"Results: {', '.join(str(path) for path in (out, csv_file, svg) if path is not None)}")


def _plot_sweep(rows: list[dict[str, Any]], path: Path) -> None:
    """One plot for each target, for the prices of two have no common axis."""
    from s3nn_deploy import page
    from s3nn_deploy.files import write_text
    from s3nn_deploy.sweep import comparable

    names = list(dict.fromkeys(row["target"] for row in rows))
    for name in names:
        here = [row for row in rows if row["target"] == name]
        points = comparable(here)
        place = path if len(names) == 1 else path.with_stem(f"{path.stem}-{Path(name).stem}")
        if not points:
            click.echo(f"note: no point has an energy on {name}: no plot.", err=True)
            continue
        part = " (priced part)" if any(row.get("unpriced") for row in here) else ""
        up = (
            "accuracy"
            if all(row.get("accuracy") is not None for row in here if not row["refused"])
            else "same predictions"
        )
        write_text(place, page.scatter(points, f"nJ per inference on {Path(name).stem}{part}", up, alone=True))


def _takes(backend: str, file: Path) -> bool:
    from s3nn_deploy.backends import BACKENDS
    from s3nn_deploy.formats import FORMATS

    takes = BACKENDS[backend].takes if backend in BACKENDS else None
    return takes is not None and FORMATS[takes].suffix == file.suffix


@main.command()
@click.argument("model", type=click.Path(path_type=Path), required=False)
@click.argument("exports", type=click.Path(path_type=Path), nargs=-1)
@click.option(
    "--backends", help="Comma-separated: reference, emulator, onnx, lava; default all that can run the network."
)
@click.option("--data", type=click.Path(path_type=Path), help="Folder with the model's data set; default $S3NN_DATA.")
@click.option(
    "--input",
    "input_file",
    type=click.Path(path_type=Path),
    help="A .npy with integers [N, *input shape] instead; or a mismatch-<backend>.npz, to run only that again.",
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="Samples of data, besides generated ones.",
)
@click.option(
    "--budget",
    type=click.FloatRange(min=0),
    default=10,
    show_default=True,
    help="1e9 synaptic operations for each population by itself on each backend; 0 leaves that out.",
)
@click.option(
    "--certificate",
    type=click.Path(path_type=Path),
    help="Check this certificate against MODEL and EXPORTS (default: as recorded, beside it); runs no backend.",
)
@click.option(
    "--certificate-out", type=click.Path(path_type=Path), help="Where it goes; default MODEL with .certificate.json."
)
@click.option("--json", "as_json", is_flag=True, help="Print plain data.")
def verify(
    model: Path | None,
    exports: tuple[Path, ...],
    backends: str | None,
    data: Path | None,
    input_file: Path | None,
    samples: int,
    budget: float,
    certificate: Path | None,
    certificate_out: Path | None,
    as_json: bool,
) -> None:
    """Prove that MODEL's integers are what PyTorch decides, then run every backend and compare, `==`; leave a certificate.

    Run are samples of the model's data, generated inputs, and each population by itself with inputs that put its membrane
    potentials exactly at its thresholds and just below. EXPORTS (model.onnx, ...) are compared with MODEL, and their
    backends run them. Exit code 1 if a proof fails or a value differs: then mismatch-<backend>.npz lies beside MODEL.

    \b
    Example: s3nn-deploy verify model.pt model.onnx --samples 1000
             s3nn-deploy verify --certificate model.certificate.json
    """
    from s3nn_deploy import report, verification

    if certificate is not None:
        return _check_certificate(certificate, model, exports, as_json)
    if model is None:
        raise DeployError("verify", expected="a MODEL", got="none", hint="Example: s3nn-deploy verify model.pt")
    names = [n.strip() for n in backends.split(",") if n.strip()] if backends else None
    folder = model.resolve().parent
    with _progress("Verifying") as advance:
        if input_file is not None and input_file.suffix == ".npz":
            made = verification.replay(model, input_file, names, exports=exports, progress=advance)
        else:
            x = _verified_samples(model, data, input_file, samples)
            made = verification.verify(
                model, x, names, exports=exports, budget=int(budget * 1e9), evidence=folder, progress=advance
            )
    if as_json:
        _emit(report.result(made))
    else:
        console = _console()
        console.print(report.proof_table(made))
        click.echo(report.proof_sentence(made) + "\n")
        console.print(report.result_table(made))
        if made.coverage:
            click.echo()
            console.print(report.coverage_table(made))
        for sentence in report.result_sentences(made):
            click.echo(sentence)
    if input_file is None or input_file.suffix != ".npz":
        from s3nn_deploy import certificate as certificates

        click.echo(f"Certificate: {certificates.write(made, model, certificate_out)}", err=as_json)
    for check in made.checks:
        if check.evidence is not None:
            given = " ".join(map(str, (model, *exports)))
            click.echo(
                f"Again: s3nn-deploy verify {given} --backends {check.backend} --input {check.evidence}", err=as_json
            )
    if not made.equal:
        sys.exit(1)


def _verified_samples(model: Path, data: Path | None, input_file: Path | None, samples: int) -> "np.ndarray | None":
    """Samples of the model's data or of a file; None where there are none, for the generated inputs need no data."""
    from s3nn_deploy.model import load

    net = load(model)
    if input_file is None and not isinstance(net.provenance.get("data"), str):
        return None
    try:
        return _samples(net, data, input_file, samples)[0]
    except DeployError as error:
        if input_file is not None or data is not None:
            raise
        click.echo(f"note: {error} Generated inputs only.", err=True)
        return None


def _check_certificate(certificate: Path, model: Path | None, exports: tuple[Path, ...], as_json: bool) -> None:
    from dataclasses import asdict

    from s3nn_deploy import certificate as certificates
    from s3nn_deploy.report import certificate_table

    findings = certificates.check(certificate, model, exports)
    wrong = [finding.what for finding in findings if not finding.holds]
    if as_json:
        _emit({"holds": not wrong, "findings": [asdict(finding) for finding in findings]})
    else:
        _console().print(certificate_table(findings))
        click.echo(f"Does not hold: {', '.join(wrong)}." if wrong else "The certificate holds.")
    if wrong:
        sys.exit(1)


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--peers", "names", help="Comma-separated; default all that are known. Exit code 1 unless these are exact."
)
@click.option("--json", "as_json", is_flag=True, help="Print plain data.")
def conformance(file: Path, names: str | None, as_json: bool) -> None:
    """Run a NIR or QONNX FILE in other people's readers: which are exact, silently wrong or refuse, and the call to use.

    Each peer imports the file, runs one step on the golden vectors, and is compared in its output and, where they can be
    seen, in every population's spikes. `s3nn-deploy setup peers` installs them.

    \b
    Example: s3nn-deploy conformance net.nir --json
    """
    from s3nn_deploy import peers

    chosen = [n.strip() for n in names.split(",") if n.strip()] if names else None
    (verdicts,) = peers.conformance([file], chosen)
    if as_json:
        _emit(peers.report(file, verdicts))
    else:
        for verdict in verdicts:
            click.echo(f"{verdict.peer} {verdict.version}".rstrip() + f": {verdict.best.status}")
            for attempt in verdict.attempts:
                click.echo(f"  {attempt.status:14}  {attempt.call}".rstrip())
                if attempt.detail:
                    click.echo(f"  {'':14}  {attempt.detail}")
    if chosen and any(verdict.best.status != peers.EXACT for verdict in verdicts):
        sys.exit(1)


@main.group()
def setup() -> None:
    """Install what a backend needs and the package does not bring."""


@setup.command("loihi")
@click.option(
    "--python", "interpreter", type=click.Path(path_type=Path), help="The Python to build it with; default this one."
)
def setup_loihi(interpreter: Path | None) -> None:
    """Build the interpreter that Lava's Loihi simulation runs in, once; it is found again afterwards.

    \b
    Example: s3nn-deploy setup loihi
    """
    from s3nn_deploy import lava_env

    path = lava_env.setup(
        None if interpreter is None else str(interpreter), progress=lambda text: click.echo(text, err=True)
    )
    click.echo(f"Lava runs in {path}")


@setup.command("peers")
@click.option(
    "--python", "interpreter", type=click.Path(path_type=Path), help="The Python to build with; default this one."
)
def setup_peers(interpreter: Path | None) -> None:
    """Build the environments in which `conformance` runs other NIR and QONNX readers (3 GB, most of it PyTorch).

    \b
    Example: s3nn-deploy setup peers
    """
    from s3nn_deploy import peers

    paths = peers.setup(
        None if interpreter is None else str(interpreter), progress=lambda text: click.echo(text, err=True)
    )
    click.echo(f"The peers run in {' and '.join(map(str, paths))}")


@main.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("demo"),
    show_default=True,
    help="Where everything goes.",
)
@click.pass_context
def demo(ctx: click.Context, out: Path) -> None:
    """Train, export to every target, simulate and verify, on data that needs no download.

    \b
    Example: s3nn-deploy demo --out demo
    """
    from s3nn_deploy import lava_env

    model = out / "model.pt"

    def step(title: str, shown: str, command: click.Command, **arguments: Any) -> None:
        click.secho(f"\n{title}", bold=True)
        click.echo(f"$ s3nn-deploy {shown}")
        ctx.invoke(command, **arguments)

    try:
        lava_env.find()
    except DeployError:
        step("0. The interpreter for Lava, once", "setup loihi", setup_loihi, interpreter=None)
    step(
        "1. Train",
        f"train digits-conv --out {model}",
        train,
        recipe="digits-conv",
        out=model,
        settings=(),
        device="cpu",
    )
    click.secho("\n2. Export", bold=True)
    made = [model]
    for target, suffix in (("nir", ".nir"), ("onnx", ".onnx"), ("loihi", ".net"), ("emulator", ".npz")):
        made.append(model.with_suffix(suffix))
        click.echo(f"$ s3nn-deploy export {model} --target {target}")
        ctx.invoke(export, model=model, target=target)
    step("3. Simulate", f"simulate {model}", simulate, file=model, backend="emulator", target="emulator")
    step("4. Verify", f"verify {model}", verify, model=model, samples=100)
    click.secho("\n5. What lies where", bold=True)
    for path in (*made, model.with_name("model.pt.metrics.jsonl")):
        click.echo(f"  {path}  {path.stat().st_size:,} bytes")
    click.echo(f"Next: s3nn-deploy simulate {model} --target loihi")


if __name__ == "__main__":
    main()
