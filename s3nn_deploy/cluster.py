"""Where work is done: threads of this process, processes, or the workers of a Dask scheduler. All are executors.

Dask's scheduler and workers need the same version of this package and no file: networks and samples travel. The scheduler gives the
tasks of a worker that died to another one. Whoever can reach a scheduler can run code on its workers: keep it private.
"""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from s3nn_deploy import __version__
from s3nn_deploy.errors import DeployError

CONNECT = 10
"""Seconds that a scheduler has to answer, and then its first worker."""

PATIENCE = 60
"""Seconds that a scheduler may be without any worker before what it was asked for is given up."""

REFRESH = 5
"""Seconds after which a scheduler is asked again how many workers it has."""


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Pool:
    """An executor and what it takes to keep it busy.

    Attributes:
        cores: how many tasks run at once, now: workers come and go.
        hold: puts `function(*arguments)` where the tasks are, once; what it returns is an argument of tasks.
        check: raises a DeployError when nobody is left to work.
    """

    executor: Executor
    cores: Callable[[], int]
    hold: Callable[..., Any]
    check: Callable[[], None]


@contextmanager
def threads(jobs: int) -> Iterator[Pool]:
    """Threads of this process; the libraries below get one each, for more would fight for the same cores.

    NumPy, BLAS and torch release the interpreter's lock, so threads are as good as processes, and copy nothing.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1), ThreadPoolExecutor(jobs) as executor:
        yield Pool(executor, lambda: jobs, lambda function, *arguments: function(*arguments), lambda: None)


@contextmanager
def processes(jobs: int) -> Iterator[Pool]:
    """Processes of this machine, which end with this one however it ends.

    Raises:
        DeployError: one of them ended early.
    """
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _start_process, (jobs,)) as executor:
        try:
            yield Pool(executor, lambda: jobs, lambda function, *arguments: function(*arguments), lambda: None)
        except BrokenExecutor as error:
            hint = "Run the same command again: what was finished is kept."
            raise DeployError("a process", f"ended early ({error})", hint=hint) from error


def _start_process(jobs: int) -> None:
    """Its share of the processors for the libraries below; and a process whose parent was killed would wait for ever."""
    os.environ["OMP_NUM_THREADS"] = str(max(1, processors() // jobs))  # read by BLAS and torch, which are loaded later

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def workers(scheduler: str) -> Iterator[Pool]:
    """The workers of the Dask scheduler at `scheduler` (tcp://host:port).

    Raises:
        DeployError: distributed is not installed, the scheduler does not answer, it has no worker, it or all its workers
            went away, or has another version of this package.
    """
    where = f"scheduler {scheduler!r}"
    try:
        from distributed import Client
    except ImportError as error:
        hint = "pip install 's3nn-deploy[cluster]'"
        raise DeployError(where, "Dask's distributed is not installed", hint=hint) from error
    try:
        client = Client(scheduler, timeout=CONNECT, set_as_default=False)
    except (OSError, ValueError, TypeError, AssertionError) as error:  # the last: its loop had no turn within 10 s
        hint = "Start one with `dask scheduler`, and `dask worker tcp://HOST:8786` on each machine."
        raise DeployError(where, f"does not answer ({error or type(error).__name__})", hint=hint) from error
    try:
        client.wait_for_workers(1, timeout=CONNECT)

        def installed() -> str:  # in here it travels whole, to where this package may be missing
            try:
                from s3nn_deploy import __version__ as version
            except ImportError:
                return "none"
            return version

        found = {"the scheduler": client.run_on_scheduler(installed), **client.run(installed)}
        if other := [f"{version} on {name}" for name, version in found.items() if version != __version__]:
            raise DeployError(where, expected=f"s3nn-deploy {__version__} everywhere", got=", ".join(other))

        def check() -> None:
            client.wait_for_workers(1, timeout=PATIENCE)

        asked, found_cores = 0.0, 1

        def cores() -> int:
            nonlocal asked, found_cores
            if time.monotonic() - asked > REFRESH:
                asked, found_cores = time.monotonic(), max(1, sum(client.nthreads().values()))
            return found_cores

        yield Pool(client.get_executor(), cores, client.submit, check)
    except DeployError:
        raise
    except TimeoutError as error:
        raise DeployError(where, "has no worker", hint=f"Start `dask worker {scheduler}` on each machine.") from error
    except Exception as error:  # Dask's errors have no other common class
        raise DeployError(where, f"did not compute the samples ({type(error).__name__}: {error})") from error
    finally:
        client.close()


def in_turn(pool: Pool, tasks: Iterable[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
    """(number of the task, its result) of `task[0](*task[1:])` for each of `tasks`, as they are done.

    At most two tasks a core are under way, so `tasks` may be a generator of more than memory holds.
    """
    running: dict[Future[Any], int] = {}

    def finished(most: int) -> Iterator[tuple[int, Any]]:
        while len(running) > most:
            done, _ = wait(running, timeout=PATIENCE, return_when=FIRST_COMPLETED)
            if not done:
                pool.check()
            for future in done:
                yield running.pop(future), future.result()

    try:
        for number, (function, *arguments) in enumerate(tasks):
            yield from finished(2 * pool.cores() - 1)
            running[pool.executor.submit(function, *arguments)] = number
        yield from finished(0)
    finally:
        for future in running:
            future.cancel()
