"""Speed of every engine and of other tools on the same networks, interleaved, as ratios to PyTorch in float32.

    python -m benchmarks.speed                       # three networks, batches of 1, 64 and 256
    python -m benchmarks.speed --nets lenet --batches 1
    python -m benchmarks.speed --counting            # what counting adds, call by call
    python -m benchmarks.speed --curve               # cost against the share of neurons that fire
    python -m benchmarks.speed --clock cpu --threads 1   # on a machine that others use, too

Everything timed is compared with `==` first. Tools that are not installed are left out; `make bench` installs them apart.
A round runs each of them once. A sample of wall-clock time during which other processes used more than 6 % of a processor
is dropped; the medians of the others are printed. With --clock cpu, processor time is taken instead, which others disturb
less. A few percent are less than what rounds differ by: for what counting adds, calls with and without it take turns. Writes the
tables and the curve of docs/speed.md, between its markers.
"""

import argparse
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import pages, qdq, speed_nets
from s3nn_deploy.backends import emulator, reference
from s3nn_deploy.errors import DeployError
from s3nn_deploy.files import write_text
from s3nn_deploy.formats import npz
from s3nn_deploy.intnet import INPUT, Dense, IntNet

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE, CURVE = DOCS / "speed.md", DOCS / "speed.svg"
QUIET = 0.06
"""Of a processor: what others may use during a sample."""
SECONDS = 0.25
"""Least length of a sample; the kernel counts processor time in hundredths of a second."""
TURNS = 8.0
"""Seconds of calls with and without counting, in turns, for an engine, a network and a batch."""
PAUSE = 0.2
"""Seconds between samples: the threads of the tool before, BLAS's above all, wait busily for a while."""
BASE = "PyTorch float32"
FIRING = (0.01, 0.02, 0.05, 0.1, 0.15, 0.3, 0.5)
ENGINES = {"NumPy engine": "numpy", "numba engine": "numba", "oneDNN engine": "onednn"}
UNCOUNTED = ", not counting"

Runner = Callable[[np.ndarray], np.ndarray]


def folded(net: IntNet, neuron: Callable[[], Any] | None = None, channels_last: bool = False) -> Runner:
    """`net` as a user of PyTorch writes it, in float32: `neuron()` makes the function that fires where its input exceeds
    0.5, one for each population; without it, a comparison with the threshold."""
    import torch
    from torch.nn import functional as f

    layers = []
    for p in net.populations:
        offset = p.bias if p.threshold is None else -p.threshold.astype(np.int64) + 1
        bias = torch.tensor(offset, dtype=torch.float32)
        weights = [torch.tensor(j.synapses.weight, dtype=torch.float32) for j in p.projections]
        if channels_last:
            weights = [w.contiguous(memory_format=torch.channels_last) if w.ndim == 4 else w for w in weights]
        layers.append((p, weights, bias, neuron() if neuron and p.spiking else None))

    def run(x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            signals = {INPUT: torch.from_numpy(x).float()}
            if channels_last and x.ndim == 4:
                signals[INPUT] = signals[INPUT].contiguous(memory_format=torch.channels_last)
            for p, weights, bias, fire in layers:
                if p.name.startswith("pool"):
                    signals[p.name] = f.max_pool2d(signals[p.projections[0].source], weights[0].shape[2:])
                    continue
                u = None
                for j, weight in zip(p.projections, weights, strict=True):
                    source = signals[j.source]
                    if isinstance(j.synapses, Dense):
                        part = f.linear(source.flatten(1), weight, bias if u is None else None)
                    elif j.synapses.groups > 1:
                        part = source * weight.view(1, -1, 1, 1)
                    else:
                        part = f.conv2d(
                            source, weight, bias if u is None else None, j.synapses.stride, j.synapses.padding
                        )
                    u = part if u is None else u + part
                if p.spiking:
                    u = (u > 0.5).float() if fire is None else fire(u)
                signals[p.name] = u
            return signals[net.readout.name].numpy().astype(np.int64)

    return run


def _snntorch() -> Callable[[], Any]:
    import snntorch

    def neuron() -> Any:
        lif = snntorch.Leaky(beta=0.9, threshold=0.5, reset_mechanism="none")
        return lambda u: lif(u, lif.reset_mem())[0]

    return neuron


def _spikingjelly() -> Callable[[], Any]:
    from spikingjelly.activation_based.neuron import IFNode

    def neuron() -> Any:
        node = IFNode(v_threshold=0.5).eval()

        def fire(u: Any) -> Any:
            node.reset()
            return node(u)

        return fire

    return neuron


def _sinabs() -> Callable[[], Any]:
    from sinabs.activation import SingleSpike
    from sinabs.layers import IAF

    def neuron() -> Any:
        layer = IAF(spike_threshold=0.5, spike_fn=SingleSpike, record_states=False)

        def fire(u: Any) -> Any:
            layer.zero_grad()
            layer.reset_states()
            return layer(u.unsqueeze(1)).squeeze(1)

        return fire

    return neuron


def _norse() -> Callable[[], Any]:
    import torch
    from norse.torch import IAFCell, IAFParameters

    def neuron() -> Any:
        cell = IAFCell(IAFParameters(v_th=torch.tensor(0.5)))
        return lambda u: cell(u)[0]

    return neuron


PEERS = {
    "snnTorch": ("snntorch", _snntorch),
    "SpikingJelly": ("spikingjelly", _spikingjelly),
    "sinabs": ("sinabs", _sinabs),
    "Norse": ("norse", _norse),
}


def onnx_runtime(model: bytes, threads: int) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    (readout,) = (output.name for output in session.get_outputs())
    return lambda x: session.run([readout], {INPUT: x})[0]


def exported(net: IntNet) -> bytes:
    """Our ONNX export."""
    from s3nn_deploy.formats import onnx

    with tempfile.TemporaryDirectory() as folder:
        return onnx.write(net, Path(folder) / "net.onnx").read_bytes()


def engine(net: IntNet, name: str, counted: bool) -> Runner:
    return lambda x: emulator.forward(net, x, name, counted=counted).readout


def runners(net: IntNet, threads: int) -> Iterator[tuple[str, Runner]]:
    """What can run here: our engines with and without counting, PyTorch and ONNX Runtime twice, peers."""
    for label, kind in ENGINES.items():
        yield label, engine(net, kind, True)
        yield label + UNCOUNTED, engine(net, kind, False)
    yield BASE, folded(net)
    yield "PyTorch float32, channels last", folded(net, channels_last=True)
    yield "ONNX Runtime float32", onnx_runtime(exported(net), threads)
    yield "ONNX Runtime QDQ", onnx_runtime(qdq.model(net), threads)
    for label, (_, make) in PEERS.items():
        with suppress(ImportError):
            yield label, folded(net, make())


def checked(made: Iterator[tuple[str, Runner]], net: IntNet, x: np.ndarray) -> dict[str, Runner]:
    """Those that give the integers of the network for every sample; the others are named on stderr."""
    want = emulator.forward(net, x, "numpy").readout
    if not np.array_equal(reference.run(net, x[:4]).readout, want[:4]):
        raise SystemExit("the NumPy engine differs from the reference")
    exact = {}
    for label, run in made:
        try:
            got = run(x)
        except (DeployError, ImportError) as error:
            print(f"{label} left out: {error}", file=sys.stderr)
            continue
        if np.array_equal(got, want):
            exact[label] = run
        else:
            wrong = int((got != want).any(1).sum())
            print(f"{label} left out: {wrong} of {len(x)} samples differ from the integers", file=sys.stderr)
    return exact


def busy() -> float:
    """Seconds that all processors have been busy since the machine started, and those taken from it."""
    user, nice, system, _, _, irq, soft, steal, *_ = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def own() -> float:
    """Processor seconds of this process and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def sample(run: Runner, x: np.ndarray, repeat: int, clock: str) -> tuple[float, float]:
    """Seconds for a call, and the share of a processor that others used meanwhile."""
    others, mine, start = busy(), own(), time.perf_counter()
    for _ in range(repeat):
        run(x)
    wall, used = time.perf_counter() - start, own() - mine
    return (wall if clock == "wall" else used) / repeat, max(0.0, busy() - others - used) / wall


def measure(made: dict[str, Runner], x: np.ndarray, rounds: int, clock: str) -> dict[str, tuple[float, float, int]]:
    """For each runner the median of its seconds, its interquartile range over it, and how many samples were quiet."""
    order = np.random.default_rng(0)
    repeat, taken = {}, {label: [] for label in made}
    for label, run in made.items():
        run(x)
        start = time.perf_counter()
        run(x)
        repeat[label] = max(1, int(SECONDS / (time.perf_counter() - start)))
    for number in range(rounds):
        for label in order.permutation(list(made)):
            time.sleep(PAUSE)
            made[label](x)
            taken[label].append(sample(made[label], x, repeat[label], clock))
        if sys.stderr.isatty():
            print(f"\r  round {number + 1} of {rounds}", end="", file=sys.stderr)
    found = {}
    for label, samples in taken.items():
        quiet = [seconds for seconds, others in samples if others <= QUIET]
        kept = sorted(quiet if clock == "wall" and len(quiet) >= 3 else [seconds for seconds, _ in samples])
        low, high = kept[len(kept) // 4], kept[-1 - len(kept) // 4]
        found[label] = statistics.median(kept), (high - low) / statistics.median(kept), len(quiet)
    return found


def counting(nets: list[str], threads: int, batches: list[int]) -> str:
    """What counting adds to each engine: calls in the order without, with, with, without, of which the medians are compared."""
    lines = [f"| | | {' | '.join(f'at {batch}' for batch in batches)} |", "|---|---|" + "---:|" * len(batches)]
    for name in nets:
        net = speed_nets.build(name)
        for label, kind in ENGINES.items():
            print(f"{name}, {label}", file=sys.stderr)
            cells = []
            for batch in batches:
                x = speed_nets.inputs(net.input, batch)
                if emulator.forward(net, x, kind).counts != emulator.forward(net, x, "numpy").counts:
                    raise SystemExit(f"the {label} counts differently")
                taken: dict[bool, list[float]] = {False: [], True: []}
                start = time.perf_counter()
                while time.perf_counter() - start < TURNS or len(taken[True]) < 12:
                    for counted in (False, True, True, False):
                        begin = time.perf_counter()
                        emulator.forward(net, x, kind, counted=counted)
                        taken[counted].append(time.perf_counter() - begin)
                without, with_ = (np.quantile(taken[counted][2:], [0.25, 0.5]) for counted in (False, True))
                low, median = with_ / without - 1
                cells.append(f"{median:+.1%} ({low:+.1%})")
            lines.append(f"| {name} | {label} | {' | '.join(cells)} |")
    note = f"Time that counting adds to the median of calls, and to their lower quartile. {threads} threads, wall-clock time,"
    return "\n".join([*lines, "", f"{note} {TURNS:.0f} seconds of calls each, in turns without, with, with, without."])


def lava_sentence(net: IntNet, few: int = 8, many: int = 1032) -> str:
    """What Lava's fixed-point simulation takes for an image more, in wall-clock time; it runs in processes of its own."""
    from s3nn_deploy.backends import lava

    x, seconds = speed_nets.inputs(net.input, many), {}
    try:
        for samples in (few, many, few, many):
            start = time.perf_counter()
            got = lava.run(net, x[:samples]).readout
            seconds[samples] = min(time.perf_counter() - start, seconds.get(samples, np.inf))
            if not np.array_equal(got, emulator.forward(net, x[:samples], "numpy").readout):
                return " Lava's integers differ."
    except DeployError as error:
        return f" Lava did not run: {error}"
    rate = (many - few) / (seconds[many] - seconds[few])
    return f" Lava simulates {rate:,.0f} images/s (wall-clock), after a start of {seconds[few]:.0f} s."


def set_threads(threads: int) -> None:
    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(threads)
    threadpool_limits(threads)
    with suppress(ImportError):
        import numba

        numba.set_num_threads(threads)


def machine() -> str:
    """The processor, its instruction sets that matter here, and what runs on it."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*: (.*)", text)
    flags = set(re.search(r"flags\s*: (.*)", text)[1].split()) if "flags" in text else set()
    have = [n for n in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8") if n in flags]
    versions = []
    for package in ("numpy", "torch", "numba", "onnxruntime", *(package for package, _ in PEERS.values())):
        with suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    return (
        f"{model[1].strip() if model else platform.processor()} ({', '.join(have) or 'no AVX2'}); {', '.join(versions)}"
    )


def memory(path: Path, batch: int) -> dict[str, str]:
    """Peak resident MiB of a process that does nothing but run `batch` samples, for each engine and PyTorch."""
    return {label: alone(label, path, batch)[0] for label in (*ENGINES, BASE)}


def alone(label: str, path: Path, batch: int, **environment: str) -> tuple[str, str]:
    """Peak resident MiB and processor seconds of a process that does nothing but run `batch` samples."""
    command = [sys.executable, "-m", "benchmarks.speed", "--peak", label, str(path), str(batch)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return (f"{int(run.stdout) / 1024:.0f}", f"{seconds:.1f}") if run.returncode == 0 else ("-", "-")


def start() -> str:
    """What a short command pays for each engine."""
    lines = ["| | processor seconds | MiB |", "|---|---:|---:|"]
    with tempfile.TemporaryDirectory() as folder:
        path = npz.write(speed_nets.build("lenet"), Path(folder) / "net.npz")
        for label in (*ENGINES, BASE):
            used, seconds = min((alone(label, path, 1) for _ in range(3)), key=lambda row: float(row[1]))
            lines.append(f"| {label} | {seconds} | {used} |")
        used, seconds = alone("numba engine", path, 1, NUMBA_CACHE_DIR=folder)
        lines.append(f"| numba engine, compiling for the first time | {seconds} | {used} |")
    return "\n".join([*lines, "", "A fresh process, one image of `lenet`, imports included."])


def peak(label: str, path: Path, batch: int) -> int:
    net = npz.read(path)
    run = folded(net) if label == BASE else engine(net, ENGINES[label], True)
    run(speed_nets.inputs(net.input, batch))
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+)", status)[1])


def table(name: str, batches: list[int], rounds: int, clock: str, threads: int) -> str:
    """The section of one network: a row for each tool, images a second and ratios, and how it was measured."""
    net = speed_nets.build(name)
    cells: dict[str, dict[int, str]] = {}
    quiet, spread = [], []
    for batch in batches:
        print(f"{name}, batch {batch}", file=sys.stderr)
        x = speed_nets.inputs(net.input, batch)
        made = measure(checked(runners(net, threads), net, x), x, rounds, clock)
        base = made[BASE][0]
        for label, (seconds, range_, calm) in made.items():
            cells.setdefault(label, {})[batch] = f"{batch / seconds:,.0f} | {base / seconds:.2f}"
            print(f"  {label}: {batch / seconds:,.0f} images/s, {base / seconds:.2f} x", file=sys.stderr)
            quiet.append(calm)
            spread.append(range_)
    firing = float(np.mean([s.mean() for s in emulator.forward(net, x, "numpy").spikes.values()]))
    with tempfile.TemporaryDirectory() as folder:
        used = memory(npz.write(net, Path(folder) / "net.npz"), batches[-1])
    head = " | ".join(f"images/s at {b} | x" for b in batches)
    lines = [f"| | {head} | MiB |", "|---|" + "---:|" * (2 * len(batches) + 1)]
    lines += [
        f"| {label} | {' | '.join(row.get(b, '- | -') for b in batches)} | {used.get(label, '-')} |"
        for label, row in cells.items()
    ]
    macs = sum(p.size * j.synapses.weight[0].size for p in net.populations for j in p.projections)
    times = "wall-clock time" if clock == "wall" else "processor time"
    note = (
        f"{macs / 1e6:.2f} M multiply-accumulates an image, {firing:.0%} of the neurons fire. {threads} thread"
        f"{'s' if threads > 1 else ''}, {times}, median of {rounds} interleaved rounds; "
        + (f"of each tool's samples at least {min(quiet)} were quiet; " if clock == "wall" else "")
        + f"interquartile range {statistics.median(spread):.0%} of the median ({max(spread):.0%} at most). "
        f"MiB: peak of a process of its own, batch {batches[-1]}."
        + (lava_sentence(net) if name == "mlp" else "")
    )
    return "\n".join([f"### {name}: {speed_nets.NETS[name][0].__doc__}", "", *lines, "", note])


def curve(rounds: int, clock: str, threads: int, batch: int = 16) -> str:
    """Time against firing, as a table; the plot goes into `CURVE`."""
    rows: dict[str, list[float]] = {}
    rates, operations = [], []
    for firing in FIRING:
        print(f"resnet18, {firing:.0%} firing", file=sys.stderr)
        net = speed_nets.build("resnet18", firing)
        x = speed_nets.inputs(net.input, batch)
        trace = emulator.forward(net, x, "numpy")
        made = {label: engine(net, kind, True) for label, kind in ENGINES.items()} | {BASE: folded(net)}
        for label, (seconds, _, _) in measure(checked(iter(made.items()), net, x), x, rounds, clock).items():
            rows.setdefault(label, []).append(1e3 * seconds / batch)
        rates.append(float(np.mean([s.mean() for n, s in trace.spikes.items() if n != "pool"])))
        operations.append(float(trace.counts.total("synops").mean()))
    write_text(CURVE, plot(rates, rows))
    lines = [f"| firing | synaptic operations | {' | '.join(rows)} |", "|---:|---:|" + "---:|" * len(rows)]
    for index, (rate, synops) in enumerate(zip(rates, operations, strict=True)):
        lines.append(f"| {rate:.1%} | {synops / 1e6:.1f} M | {' | '.join(f'{v[index]:.2f}' for v in rows.values())} |")
    times = "wall-clock" if clock == "wall" else "processor"
    note = f"Milliseconds of {times} time an image, batch {batch}, {threads} thread{'s' if threads > 1 else ''}."
    return "\n".join(["![Time against the share of neurons that fire](speed.svg)", "", *lines, "", note])


def plot(rates: list[float], rows: dict[str, list[float]]) -> str:
    """Lines over logarithmic axes."""
    left, right, top, floor = 50.0, 470.0, 16.0, 250.0
    values = [v for row in rows.values() for v in row]
    xs, ys = (np.log10([min(a), max(a)]) for a in (rates, values))

    def at(rate: float, value: float) -> tuple[float, float]:
        across, up = (np.log10(rate) - xs[0]) / (xs[1] - xs[0]), (np.log10(value) - ys[0]) / (ys[1] - ys[0])
        return left + across * (right - left), floor - up * (floor - top)

    style = "text{font:12px sans-serif;fill:#555}path{fill:none;stroke-width:2}line{stroke:#ccc}"
    style += "@media(prefers-color-scheme:dark){text{fill:#bbb}line{stroke:#444}}"
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 600 290"><style>{style}</style>']
    for rate in rates:
        x, _ = at(rate, values[0])
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{floor}"/>')
        parts.append(f'<text x="{x:.1f}" y="{floor + 16}" text-anchor="middle">{rate:.0%}</text>')
    for value in (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100):
        if min(values) <= value <= max(values):
            _, y = at(rates[0], value)
            parts.append(f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g} ms</text>')
    for (label, row), colour in zip(rows.items(), ("#3b7dd8", "#d9730d", "#2e9e5b", "#8a5cc9"), strict=True):
        points = " L".join(f"{x:.1f} {y:.1f}" for x, y in (at(r, v) for r, v in zip(rates, row, strict=True)))
        _, y = at(rates[-1], row[-1])
        parts.append(f'<path d="M{points}" stroke="{colour}"/>')
        parts.append(f'<text x="{right + 6}" y="{y + 4:.1f}" style="fill:{colour}">{label}</text>')
    parts.append(
        f'<text x="{(left + right) / 2}" y="{floor + 34}" text-anchor="middle">share of neurons that fire</text>'
    )
    return "".join([*parts, "</svg>\n"])


def put(section: str, text: str) -> None:
    pages.put(PAGE, f"speed {section}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="*", default=list(speed_nets.NETS), choices=list(speed_nets.NETS))
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 64, 256])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--counting", action="store_true", help="what counting adds instead of the tables")
    parser.add_argument("--curve", action="store_true", help="cost against firing instead of the tables")
    parser.add_argument("--start", action="store_true", help="what starting costs instead of the tables")
    parser.add_argument("--dry", action="store_true", help="print, and leave docs/speed.md as it is")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak:
        print(peak(given.peak[0], Path(given.peak[1]), int(given.peak[2])))
        return
    set_threads(given.threads)
    how = (given.rounds, given.clock, given.threads)
    made: dict[str, Callable[[], str]] = {n: partial(table, n, given.batches, *how) for n in given.nets}
    others = {
        "counting": partial(counting, given.nets, given.threads, given.batches),
        "curve": partial(curve, *how),
        "start": start,
    }
    made = {section: compute for section, compute in others.items() if getattr(given, section)} or made
    for section, compute in {"machine": machine, **made}.items():
        text = compute()
        print(text, flush=True)
        if not given.dry:
            put(section, text)


if __name__ == "__main__":
    main()
