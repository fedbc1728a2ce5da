"""The fast backend: an exact engine chosen for the work at hand, and an exact count of every event.

Three engines (`ENGINES`) fill in the spikes, one counter reads them; all give the same integers. A layer that an engine
cannot express, or that fails its check when it is prepared, is run by the NumPy engine, and the trace says so.
"""

import sys
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s3nn_deploy.engines import blas, counting
from s3nn_deploy.engines.layers import Layer, Step, apply, channels_first, channels_last, layers
from s3nn_deploy.errors import DeployError, suggestion
from s3nn_deploy.formats import npz
from s3nn_deploy.intnet import INPUT, IntNet
from s3nn_deploy.trace import Trace, checked_input

ENGINES = {
    "numpy": ("s3nn_deploy.engines.blas", "numpy"),
    "numba": ("s3nn_deploy.engines.events", "numba"),
    "onednn": ("s3nn_deploy.engines.onednn", "torch"),
}
"""The module of each engine and the package that it needs. numpy: BLAS on floats; numba: spikes as events (extra
`fast`); onednn: oneDNN's 8-bit integer kernels, through PyTorch."""

FEW = 4
"""Samples at a time up to which events beat the dense kernels (docs/speed.md)."""

START = {"numba": 10.0, "onednn": 2.0}
"""Seconds that an engine takes to start in a fresh process: numba compiles, PyTorch and the compiled counter load
(docs/speed.md)."""

TOGETHER = 2e-3
"""Seconds of work that are worth sharing among cores, each with samples of its own."""

PART, LEAST = 8 << 20, 32
"""Bytes of spikes that are made at a time, so that they are still in a cache when they are counted; samples at least."""

LAYER_SECONDS, MACS_PER_SECOND = 40e-6, 60e9
"""What the NumPy engine takes: for a layer of one call, and for multiply-accumulates; on two cores (docs/speed.md)."""


NOTHING = np.empty(0, dtype=np.uint8)


def run(net: IntNet, x: Any, file: Path | None = None, engine: str = "auto") -> Trace:
    """Run `net`, or the network in `file` (.npz), on `x`, integers [N, *input shape]; the trace has exact counts.

    Args:
        engine: a name in `ENGINES`, or auto: NumPy, until its work on this network in this process would have paid for
            the start of a faster engine that is installed. The trace's `backend` names it.

    Raises:
        DeployError: `x` has another shape, dtype or range than the network's input, `file` is not a valid network, or
            the engine is unknown or cannot run here.
    """
    net = net if file is None else npz.read(file)
    x = checked_input(net, x)
    prepared = _prepare(net)
    chosen = _choose(prepared, len(x)) if engine == "auto" else engine
    return forward(net, x, chosen)


def forward(net: IntNet, x: NDArray[np.unsignedinteger[Any]], engine: str, *, counted: bool = True) -> Trace:
    """Run `net` on `x`, as `trace.checked_input` gives it, by one engine, on as many cores as BLAS may use.

    Raises:
        DeployError: the engine is unknown or cannot run here.
    """
    prepared = _prepare(net)
    engine = engine if len(x) else "numpy"  # no kernel takes a batch of none
    steps, name, add = _steps(net, engine)
    counter = prepared.counter
    sums = counting.sums(counter, len(x))
    block = prepared.room(len(x) * counter.bytes)
    libraries = _libraries(ENGINES[engine][1])
    cores = min((library.num_threads for library in libraries.select(user_api="blas").lib_controllers), default=1)
    # each core has samples of its own, so that all of the work is shared, and each core counts the spikes that it made
    share = engine != "numba" and 1 < cores <= len(x) // 2 and prepared.seconds(len(x)) > TOGETHER
    parts = -(-len(x) // max(LEAST, PART // counter.bytes)) or 1
    if share:
        parts = -(-parts // cores) * cores
    places = {
        layer.name: np.empty((len(x), *layer.grid), dtype=np.int64)
        if layer.threshold is None
        else counting.view(counter, layer.name, block).reshape(len(x), *layer.grid)
        for layer in prepared.layers
    }

    def compute(rows: slice) -> None:
        if share and engine == "onednn":
            import torch

            torch.get_num_threads()  # a new thread's first call would undo the limit
        with libraries.limit(limits=1 if share or cores == 1 else None, user_api="openmp"):  # a thread's own limit
            signals: dict[str, NDArray[Any]] = {
                INPUT: channels_last(x[rows]),
                **{name: place[rows] for name, place in places.items()},
            }
            if counted:
                shown = counting.view(counter, INPUT, block)[rows]
                np.not_equal(signals[INPUT].reshape(shown.shape), 0, out=shown.view(np.bool_))
            for layer, step in zip(prepared.layers, steps, strict=True):
                step(signals, signals[layer.name])
                if counted and share and layer.threshold is not None:  # while they are in a cache
                    add(counter, block, rows, sums, layer.name)
            if counted and share:
                add(counter, block, rows, sums, INPUT)
            elif counted:  # not between layers: there, the engines' threads would fall asleep
                add(counter, block, rows, sums)

    # BLAS's threads wait busily, on a processor that others need
    with libraries.limit(limits=1 if share or engine != "numpy" else None, user_api="blas"):
        edges = [len(x) * part // parts for part in range(parts + 1)]
        list((_hands(cores).map if share else map)(compute, map(slice, edges, edges[1:])))
        counts = counting.count(counter, sums) if counted else None
    spikes = {p.name: channels_first(places[p.name], p.shape).view(np.bool_) for p in net.spiking}
    readout = channels_first(places[net.readout.name], net.readout.shape).reshape(len(x), net.readout.size)
    return Trace(spikes, readout, net.scale, name, counts)


@lru_cache(maxsize=1)
def _hands(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "emulator")


@cache
def _libraries(package: str) -> Any:
    """What limits the threads of the libraries that are loaded once `package` is."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


@dataclass(frozen=True, eq=False)
class _Prepared:
    """What is kept of a network.

    Attributes:
        spent: the seconds of work that NumPy has been given, as `_choose` reckons.
        free: the memory of traces that are gone, for the next ones: its pages need not be made again.
    """

    layers: tuple[Layer, ...]
    counter: counting.Counter
    spent: list[float] = field(default_factory=lambda: [0.0])
    free: deque[NDArray[np.uint8]] = field(default_factory=lambda: deque(maxlen=2))

    def seconds(self, samples: int) -> float:
        """What the NumPy engine takes for so many samples."""
        return LAYER_SECONDS * len(self.layers) + samples * sum(a.macs for a in self.layers) / MACS_PER_SECOND

    def room(self, size: int) -> NDArray[np.uint8]:
        """So many bytes, which are free again once no array has a view of them."""
        memory = NOTHING
        with suppress(IndexError):
            memory = self.free.pop()
        if len(memory) < size:
            memory = np.empty(size, dtype=np.uint8)
        room = np.asarray(memory.data)  # what views of it refer to, and not to `memory`
        weakref.finalize(room, self.free.append, memory)
        return room[:size]


@lru_cache(maxsize=2)
def _prepare(net: IntNet) -> _Prepared:
    return _Prepared(layers(net), counting.counter(net))


@lru_cache(maxsize=4)
def _steps(net: IntNet, engine: str) -> tuple[tuple[Step, ...], str, Callable[..., None]]:
    """A step for each layer; the backend's name: the engine, and how many layers NumPy runs in its place; what counts."""
    if engine not in ENGINES:
        raise DeployError(f"engine {engine!r}", "is not known", hint=suggestion(engine, [*ENGINES, "auto"]))
    module, prepared = import_module(ENGINES[engine][0]), _prepare(net)
    if module is blas:
        return tuple(map(blas.prepare, prepared.layers)), "emulator (numpy)", counting.add
    steps, replaced = [], 0
    for layer in prepared.layers:
        exact, step = blas.prepare(layer), module.prepare(layer)
        if step is None or not _agree(layer, exact, step):
            step, replaced = exact, replaced + 1
        steps.append(step)
    others = f", numpy for {replaced} of {len(steps)} layers" if replaced else ""
    return tuple(steps), f"emulator ({engine}{others})", getattr(module, "add", counting.add)


def _agree(layer: Layer, exact: Step, step: Step) -> bool:
    """Whether a step gives the integers of the NumPy engine, which are exact by proof, on extreme and random signals."""
    rng = np.random.default_rng(0)
    signals = {}
    for source, (shape, maximum) in {a.source: (a.grid, a.maximum) for a in layer.afferents}.items():
        dtype = np.uint8 if maximum < 256 else np.uint16
        signal = np.empty((6, *shape), dtype=dtype)
        signal[0], signal[1] = 0, maximum
        signal[2:4] = rng.integers(0, maximum + 1, (2, *shape))
        signal[4:] = maximum * rng.integers(0, 2, (2, *shape))
        signals[source] = signal
    try:
        return np.array_equal(apply(layer, step, signals), apply(layer, exact, signals))
    except (RuntimeError, ValueError):  # a kernel refuses a shape when it runs, or makes another one
        return False


def _choose(prepared: _Prepared, samples: int) -> str:
    """The engine for `samples` more: what NumPy has done for this network is set against the start of another one."""
    prepared.spent[0] += prepared.seconds(samples)
    for engine in ("numba", "onednn") if samples <= FEW else ("onednn", "numba"):
        package = ENGINES[engine][1]
        start = START[engine] / (10 if package in sys.modules else 1)
        if prepared.spent[0] > start and find_spec(package) is not None:
            return engine
    return "numpy"
