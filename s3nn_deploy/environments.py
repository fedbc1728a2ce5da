"""Python environments in which other people's simulators run: built once by a `setup` command, found again by every run.

They pin what others must not be pinned to, so they never share an interpreter with this package.
"""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from s3nn_deploy.errors import DeployError


@dataclass(frozen=True)
class Environment:
    """One such environment.

    Attributes:
        name: what messages call it; in lower case the beginning of its folder's name.
        purpose: what is not installed where it is missing.
        installs: one call of pip after the other: its options, and the requirements.
        check: a script and its arguments; imports what a run needs and prints a line with the versions.
        variable: the environment variable that names another interpreter that has all of it.
        command: what builds it.
        download_mb, disk_mb, peak_mb: about; the last one must be free.
        bulk: folders in site-packages that nothing here reads.
        oldest, newest: Pythons that it was tried with.
    """

    name: str
    purpose: str
    installs: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    check: tuple[str, ...]
    variable: str
    command: str
    download_mb: int
    disk_mb: int
    peak_mb: int
    bulk: tuple[str, ...] = ()
    oldest: tuple[int, int] = (3, 11)
    newest: tuple[int, int] = (3, 13)


def folder(environment: Environment) -> Path:
    """Where `setup` builds the environment; another set of versions has another folder."""
    from platformdirs import user_cache_path

    requirements = tuple(requirements for _, requirements in environment.installs)
    versions = hashlib.sha256(repr(requirements).encode()).hexdigest()[:8]
    return user_cache_path("s3nn-deploy") / f"{environment.name.lower().replace(' ', '-')}-{versions}"


def find(environment: Environment) -> Path:
    """The interpreter: what the environment's variable names, or what `setup` built. Needs no network.

    Raises:
        DeployError: there is none; the hint says how to get it.
    """
    hint = f"Run: {environment.command}"
    if named := os.environ.get(environment.variable):
        if not os.access(named, os.X_OK) or Path(named).is_dir():
            raise DeployError(
                environment.variable,
                expected=f"a Python interpreter that has {environment.name}",
                got=named,
                hint=f"Correct or unset the variable. {hint}",
            )
        return Path(named).absolute()
    place = folder(environment)
    if not _built(place):
        raise DeployError(environment.name, f"{environment.purpose} is not installed", hint=hint)
    return _python(place)


def setup(environment: Environment, python: str | None = None, progress: Callable[[str], object] = print) -> Path:
    """Build the environment, unless it is there, and return its interpreter.

    An environment counts as built by a marker that is written last, after a check in it; one that was interrupted is
    built anew. A second `setup` at the same time waits for the first.

    Args:
        python: the interpreter to build on (by default the one that runs this).
        progress: is told what happens, a line at a time.

    Raises:
        DeployError: no suitable Python, not enough space, no network, or packages that do not install.
    """
    place, name = folder(environment), environment.name
    with _locked(place.with_name(f"{place.name}.lock"), name, progress):
        if _built(place):
            progress(f"{name} is ready: {_python(place)}")
            return _python(place)
        base = python or sys.executable
        _check_python(base, environment)
        if (free := shutil.disk_usage(place.parent).free >> 20) < environment.peak_mb:
            raise DeployError(
                str(place),
                expected=f"{environment.peak_mb} MB of free disk space",
                got=f"{free} MB",
                hint="Free some space, or set XDG_CACHE_HOME to a place that has it.",
            )
        sizes = f"about {environment.download_mb} MB to download, {environment.disk_mb} MB on disk"
        progress(f"Installing {name} into {place}: {sizes}.")
        shutil.rmtree(place, ignore_errors=True)
        _call([base, "-m", "venv", str(place)], place, name, progress)
        inside = str(_python(place))
        for options, requirements in environment.installs:
            pip = [inside, "-I", "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *options]
            _call([*pip, *requirements], place, name, progress)
        for packages in place.glob("lib/python3*/site-packages"):
            for bulk in (packages / name for name in environment.bulk):
                if packages.resolve() in bulk.resolve().parents:  # never outside, whatever the names are
                    shutil.rmtree(bulk, ignore_errors=True)
        versions = _call([inside, "-I", *environment.check], place, name, progress).strip().splitlines()[-1]
        _marker(place).write_text(versions + "\n", encoding="utf-8")
        progress(f"{name} is ready: {inside}")
    return _python(place)


def _python(place: Path) -> Path:
    return place / "bin" / "python"


def _marker(place: Path) -> Path:
    return place / ".complete"


def _built(place: Path) -> bool:
    return _marker(place).is_file() and os.access(_python(place), os.X_OK)


def _check_python(python: str, environment: Environment) -> None:
    code = "import json, sys; print(json.dumps(sys.version_info[:2]))"
    try:
        version = tuple(
            json.loads(subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True).stdout)
        )
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise DeployError(
            f"Python {python!r}", f"does not run: {error}", hint="Name another one with --python."
        ) from error
    if not environment.oldest <= version <= environment.newest:
        oldest, newest = (".".join(map(str, v)) for v in (environment.oldest, environment.newest))
        raise DeployError(
            f"Python {python!r}",
            expected=f"{oldest} to {newest}, which {environment.name} runs on",
            got=".".join(map(str, version)),
            hint="Name another one with --python.",
        )


def _call(command: list[str], place: Path, name: str, progress: Callable[[str], object]) -> str:
    progress("  " + " ".join(Path(word).name if word.startswith(str(place)) else word for word in command))
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    except OSError as error:
        raise DeployError(command[0], f"does not run: {error}", hint="Name another Python with --python.") from error
    if done.returncode:
        log = place.with_name(f"{place.name}.log")
        log.write_text(done.stdout, encoding="utf-8")
        last = (done.stdout.strip().splitlines() or ["no output"])[-1]
        raise DeployError(
            f"setup of {name}",
            f"{' '.join(command[1:5])} ... failed: {last}",
            hint=f"All that it said is in {log}. Check the network connection and this Python, and run the setup again.",
        )
    return done.stdout


@contextlib.contextmanager
def _locked(path: Path, name: str, progress: Callable[[str], object]) -> Iterator[None]:
    try:
        import fcntl
    except ImportError as error:
        raise DeployError(name, "runs on Linux and macOS only", hint="Use WSL on Windows, or the emulator.") from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("a")
    except OSError as error:
        raise DeployError(
            str(path), f"cannot be written: {error}", hint="Set XDG_CACHE_HOME to a place that can."
        ) from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("Another setup is running; waiting for it.")
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield
