"""Many samples: the same result from any batches, threads and machines, in memory that hardly grows with their number."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import ZOO, random_net, samples
from test_machine import ROOMY, Memory

from s3nn_deploy import cli, cluster, formats, machine, targets
from s3nn_deploy.backends import emulator
from s3nn_deploy.errors import DeployError
from s3nn_deploy.formats import npz
from s3nn_deploy.intnet import IntNet
from s3nn_deploy.simulation import Simulation, simulate


def plain(made: Simulation) -> dict[str, Any]:
    """Everything that a simulation says, to compare with ==."""
    found = {field.name: getattr(made, field.name) for field in fields(made)}
    return found | {
        "predictions": made.predictions.tolist(),
        "fired": {name: neurons.tolist() for name, neurons in made.fired.items()},
        "each": {name: row.tolist() for name, row in made.each.items()},
        "machines": [str(m) if isinstance(m, DeployError) else m.plain() for m in made.machines],
    }


def machines() -> list[Any]:
    """One that fits, one whose queue overflows, one whose accumulator could."""
    return [ROOMY, replace(ROOMY, spikes=Memory(32, 32)), replace(ROOMY, accumulator_bits=4)]


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, 40), st.integers(1, 5), st.integers(1, 60))
def test_a_simulation_depends_neither_on_batches_nor_on_threads_nor_on_order(
    seed: int, batch: int, jobs: int, n: int
) -> None:
    net = random_net(seed, max_side=5)
    x = samples(net, n, seed)
    labels = np.arange(n) % net.readout.size
    whole = simulate(net, x, labels, machines=machines(), batch=n, each=True)
    assert plain(simulate(net, x, labels, machines=machines(), batch=batch, jobs=jobs, each=True)) == plain(whole)
    order = np.random.default_rng(seed).permutation(n)
    turned = simulate(net, x[order], labels[order], machines=machines(), batch=batch, jobs=jobs)
    assert turned.predictions.tolist() == whole.predictions[order].tolist()
    assert whole.counts is not None
    assert turned.counts is not None
    assert turned.counts.populations == whole.counts.populations
    assert {k: v.tolist() for k, v in turned.counts.samples.items()} == {
        k: v[order].tolist() for k, v in whole.counts.samples.items()
    }
    assert plain(turned)["machines"] == plain(whole)["machines"]
    assert plain(turned)["fired"] == plain(whole)["fired"]


def test_each_sample_is_counted_by_population_and_written(tmp_path: Path) -> None:
    net = ZOO["residual"]
    x = samples(net, 21)
    npz.write(net, tmp_path / "net.npz")
    np.save(tmp_path / "x.npy", x)
    arguments = ["simulate", str(tmp_path / "net.npz"), "--input", str(tmp_path / "x.npy"), "--each"]
    done = CliRunner().invoke(cli.main, [*arguments, str(tmp_path / "each.npz")])
    assert done.exit_code == 0, done.output
    trace = emulator.run(net, x)
    assert trace.counts is not None
    events = {f"counts/{p}/{kind}": row for p, kinds in trace.counts.events.items() for kind, row in kinds.items()}
    target = targets.load("emulator")
    assert target.machine is not None
    figures = machine.figures(net, machine.place(net, target.machine), x, trace.spikes).events
    events |= {f"machine/{p}/{kind}": row for p, kinds in figures.items() for kind, row in kinds.items()}
    with np.load(tmp_path / "each.npz") as found:
        assert set(found.files) == {"predictions", *events}
        assert found["predictions"].tolist() == trace.predictions.tolist()
        assert all(found[name].tolist() == row.tolist() for name, row in events.items())
    assert simulate(net, x).each == {}


@pytest.mark.parametrize("name", ["lenet", "residual"])
def test_a_simulation_is_one_run_of_the_engine_summed_up(name: str) -> None:
    net = ZOO[name]
    x = samples(net, 33)
    made, trace = simulate(net, x, batch=7, jobs=2), emulator.run(net, x)
    assert trace.counts is not None
    assert made.counts == trace.counts.totals
    assert made.predictions.tolist() == trace.predictions.tolist()
    assert made.backend == trace.backend
    for population, spikes in trace.spikes.items():
        assert made.fired[population].tolist() == spikes.sum(0).tolist()
        assert made.rate(population) == spikes.sum() / spikes.size


def test_totals_too_wide_for_64_bits_would_not_wrap() -> None:
    counts = emulator.run(ZOO["lenet"], samples(ZOO["lenet"], 3)).counts
    assert counts is not None
    totals = counts.totals
    assert all(isinstance(n, int) for kinds in totals.populations.values() for n in kinds.values())
    for kind, row in totals.samples.items():
        assert row.dtype.kind == "u"
        assert row.tolist() == counts.total(kind).tolist()


def test_memory_grows_by_a_few_bytes_a_sample(tmp_path: Path) -> None:
    net = ZOO["lenet"]

    def peak(n: int) -> int:
        np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.uint8, (n, *net.input.shape)).flush()
        x = np.load(tmp_path / "x.npy", mmap_mode="r")
        tracemalloc.start()
        try:
            simulate(net, x, machines=[ROOMY])
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(64)
    few, many = peak(4096), peak(16384)
    assert many - few < 40 * (16384 - 4096)


def test_wide_samples_in_a_file_are_not_copied_whole(tmp_path: Path) -> None:
    net = ZOO["lenet"]
    x = samples(net, 2400)
    np.save(tmp_path / "x.npy", x.astype(np.int64))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    tracemalloc.start()
    try:
        made = simulate(net, mapped, batch=16)
        assert tracemalloc.get_traced_memory()[1] < mapped.nbytes / 2
    finally:
        tracemalloc.stop()
    assert plain(made) == plain(simulate(net, x))


def test_what_is_not_samples_is_refused_before_anything_runs(tmp_path: Path) -> None:
    net = ZOO["lenet"]
    x = samples(net, 700)
    x[699].flat[0] = net.input.maximum
    with pytest.raises(DeployError, match="at least one"):
        simulate(net, x[:0])
    wrong = x.astype(np.int64)
    wrong[699].flat[0] = net.input.maximum + 1
    for batch in (1, 700):
        with pytest.raises(DeployError, match=rf"got 0\.\.{net.input.maximum + 1}"):
            simulate(net, wrong, batch=batch, progress=lambda *_: pytest.fail("ran"))


def test_an_error_of_one_batch_is_the_error_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    from s3nn_deploy import simulation

    net, x = ZOO["mlp"], samples(ZOO["mlp"], 40)
    run = simulation.run

    def failing(net: IntNet, x: Any, *more: Any, **options: Any) -> Any:
        if len(x) == 8:
            raise DeployError("the last batch", "is short")
        return run(net, x, *more)

    monkeypatch.setattr(simulation, "run", failing)
    with pytest.raises(DeployError, match="the last batch"):
        simulate(net, x, batch=16, jobs=3)


def test_an_error_says_the_same_after_a_journey() -> None:
    import pickle

    error = DeployError("population 'p'", "is wrong", expected="this", got="that", hint="Do so.")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.where, again.hint) == (str(error), error.where, error.hint)


def test_engines_of_one_thread_each_do_not_fight() -> None:
    from threadpoolctl import threadpool_info

    before = {pool["filepath"]: pool["num_threads"] for pool in threadpool_info()}
    with cluster.threads(2) as pool:
        inside = pool.executor.submit(threadpool_info).result()
    assert {pool["num_threads"] for pool in inside if pool["user_api"] == "blas"} == {1}
    assert {pool["filepath"]: pool["num_threads"] for pool in threadpool_info()} == before


def test_under_way_are_two_tasks_a_core_at_most() -> None:
    made, release = 0, threading.Event()

    def tasks() -> Iterator[tuple[Any, ...]]:
        nonlocal made
        for _ in range(50):
            made += 1
            yield (release.wait,)

    with cluster.threads(2) as pool:
        threading.Timer(0.2, lambda: (seen.append(made), release.set())).start()
        seen: list[int] = []
        assert sorted(number for number, _ in cluster.in_turn(pool, tasks())) == list(range(50))
    assert seen[0] <= 5


# Dask: a scheduler and two workers, each a process of its own.

needs_dask = pytest.mark.skipif(
    importlib.util.find_spec("distributed") is None, reason="distributed is not installed: pip install '.[cluster]'"
)

SLOW = """
import sys, time
sys.path[:0] = {path!r}
from s3nn_deploy import simulation
def slow(*arguments, run=simulation.run, **options):
    time.sleep(0.02)
    open({folder!r} + "/" + {name!r}, "a").write("x")
    return run(*arguments)
if simulation.run.__name__ != "slow":  # it is read twice
    simulation.run = slow
"""


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("dask")
    file = folder / "scheduler.json"
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0"]
    process = start(*command, "--no-dashboard", "--scheduler-file", file, folder=folder)
    try:
        yield address(file, process)
    finally:
        process.kill()
        process.wait()


def start(*command: object, folder: Path) -> "subprocess.Popen[bytes]":
    env = {**os.environ, "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "3"}
    with (folder / "log").open("ab") as log:
        return subprocess.Popen([str(c) for c in command], cwd=folder, stdout=log, stderr=log, env=env)


def address(file: Path, process: "subprocess.Popen[bytes]") -> str:
    import time

    for _ in range(600):
        if file.is_file() and file.stat().st_size:
            return str(json.loads(file.read_text())["address"])
        assert process.poll() is None, "the scheduler ended early"
        time.sleep(0.05)
    raise AssertionError("no scheduler")


def worker(scheduler: str, folder: Path, name: str) -> "subprocess.Popen[bytes]":
    """A worker that takes its time for each batch, and writes a mark for each."""
    (folder / f"{name}.py").write_text(SLOW.format(path=sys.path, folder=str(folder), name=f"{name}.marks"))
    command = [sys.executable, "-m", "distributed.cli.dask_worker", scheduler, "--no-nanny", "--nthreads", 1]
    return start(*command, "--no-dashboard", "--preload", folder / f"{name}.py", "--name", name, folder=folder)


@needs_dask
def test_two_workers_of_which_one_is_killed_half_way_give_the_same_totals(scheduler: str, tmp_path: Path) -> None:
    from distributed import Client

    net = ZOO["residual"]
    x = samples(net, 200)
    want = simulate(net, x, machines=machines())
    hands = [worker(scheduler, tmp_path, name) for name in ("one", "two")]
    try:
        marks = tmp_path / "two.marks"
        with Client(scheduler, set_as_default=False) as client:  # both are there before the first batch
            client.wait_for_workers(2, timeout=60)
        killed: list[int] = []

        def progress(done: int, total: int) -> None:
            if not killed and done >= total // 2:
                assert marks.stat().st_size > 0, "the second worker had computed nothing yet"
                os.kill(hands[1].pid, signal.SIGKILL)
                hands[1].wait()
                killed.append(done)

        made = simulate(net, x, machines=machines(), batch=10, scheduler=scheduler, progress=progress)
        assert 100 <= killed[0] < 200
        assert plain(made) == plain(want)
        path = tmp_path / "net.npz"
        formats.export(net, path, "emulator")
        np.save(tmp_path / "x.npy", x)
        run = ["simulate", str(path), "--input", str(tmp_path / "x.npy"), "--json"]
        here, there = (CliRunner().invoke(cli.main, [*run, *more]) for more in ([], ["--scheduler", scheduler]))
        assert here.exit_code == there.exit_code == 0
        assert there.stdout == here.stdout
        sweep = ["sweep", str(path), "--input", str(tmp_path / "x.npy"), "--vary", "machine.cores=1,2", "--json"]
        here, there = (
            CliRunner().invoke(cli.main, [*sweep, "--out", str(tmp_path / name), *more])
            for name, more in (("here", []), ("there", ["--scheduler", scheduler]))
        )
        assert here.exit_code == there.exit_code == 0
        assert there.stdout == here.stdout
        with (
            pytest.raises(DeployError, match=r"target 'emulatr': is not known\. Did you mean"),
            cluster.workers(scheduler) as pool,
        ):
            list(cluster.in_turn(pool, [(targets.load, "emulatr")]))
    finally:
        for hand in hands:
            hand.kill()
            hand.wait()


@needs_dask
def test_a_scheduler_without_workers_is_refused(scheduler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "CONNECT", 1)
    with pytest.raises(DeployError, match=r"has no worker.*dask worker"):
        simulate(ZOO["mlp"], samples(ZOO["mlp"], 4), scheduler=scheduler)


@needs_dask
def test_a_worker_of_another_version_is_refused(
    scheduler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand = worker(scheduler, tmp_path, "one")
    try:
        monkeypatch.setattr(cluster, "__version__", "9.9")
        with pytest.raises(
            DeployError, match=r"expected s3nn-deploy 9\.9 everywhere, got .* on the scheduler, .* on tcp:"
        ):
            simulate(ZOO["mlp"], samples(ZOO["mlp"], 4), scheduler=scheduler)
    finally:
        hand.kill()
        hand.wait()


@needs_dask
@pytest.mark.parametrize("where", ["tcp://127.0.0.1:9", "nonsense", "what://127.0.0.1:9"])
def test_a_scheduler_that_does_not_answer_is_refused(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "CONNECT", 1)
    with pytest.raises(DeployError, match=rf"scheduler '{re.escape(where)}': does not answer"):
        simulate(ZOO["mlp"], samples(ZOO["mlp"], 4), scheduler=where)


def test_without_distributed_the_way_out_is_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(DeployError, match=r"pip install 's3nn-deploy\[cluster\]'"):
        simulate(ZOO["mlp"], samples(ZOO["mlp"], 4), scheduler="tcp://127.0.0.1:8786")


def test_engines_that_need_this_machine_refuse_a_scheduler() -> None:
    with pytest.raises(DeployError, match="runs on this machine only"):
        simulate(ZOO["mlp"], samples(ZOO["mlp"], 4), backend="onnx", scheduler="tcp://127.0.0.1:8786")
