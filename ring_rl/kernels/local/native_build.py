"""Compiles the C++ of `native/` for the processor at hand, once, and hands it to XLA.

The result lies in the user's cache, under a name that its sources, the compiler, the processor and jaxlib make: another
machine that shares the cache, or a new version of anything, gets a library of its own.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path

import jax

_log = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("native")
FORWARD, BACKWARD = "ring_rl_attention_forward", "ring_rl_attention_backward"
COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-shared")
# Clang has one or the other, by processor.
_FOR_THIS_PROCESSOR = ("-march=native", "-mcpu=native")
_TIME_LIMIT_SECONDS = 300.0


class NativeBuildError(Exception):
    """The C++ block cannot be had on this machine; the message says why, in one phrase."""


@functools.cache
def register() -> None:
    """Makes FORWARD and BACKWARD callable through `jax.ffi.ffi_call`. Compiles for about 5 s the first time.

    Raises:
        NativeBuildError: There is no compiler, or it failed.
    """
    path = build()
    try:
        library = ctypes.CDLL(str(path))
        handlers = {name: jax.ffi.pycapsule(getattr(library, name)) for name in (FORWARD, BACKWARD)}
    except (OSError, AttributeError) as error:
        raise NativeBuildError(f"{path} cannot be loaded ({error}); delete it to have it built again") from None
    for name, handler in handlers.items():
        jax.ffi.register_ffi_target(name, handler, platform="cpu")


def build() -> Path:
    """The library, compiled unless that has been done before.

    Raises:
        NativeBuildError: As above.
    """
    compiler = find_compiler()
    target, macros = _target(compiler)
    parts = [*_FLAGS, target, macros, metadata.version("jaxlib"), _run([*compiler, "--version"])]
    parts += [path.read_text(encoding="utf-8") for path in sorted(SOURCES.iterdir()) if path.suffix in (".cc", ".h")]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    path = cache_folder() / f"attention-{key}.so"
    if not path.exists():
        _compile(compiler, target, path)
    return path


def cache_folder() -> Path:
    """Where libraries are kept: `ring_rl` in $XDG_CACHE_HOME, by default ~/.cache."""
    chosen = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(chosen) if chosen else Path.home() / ".cache") / "ring_rl"
    except RuntimeError as error:
        raise NativeBuildError(f"there is no folder for compiled code ({error}); set XDG_CACHE_HOME") from None


def find_compiler() -> list[str]:
    """The command: $CXX, which may be of several words, or else the first of COMPILERS that is there.

    Raises:
        NativeBuildError: There is none.
    """
    asked = os.environ.get("CXX", "")
    try:
        commands = [shlex.split(asked)] if asked.strip() else [[name] for name in COMPILERS]
    except ValueError as error:
        raise NativeBuildError(f"CXX={asked!r} is no command: {error}") from None
    for name, *words in commands:
        if found := shutil.which(name):
            return [found, *words]
    raise NativeBuildError(f"it needs a C++ compiler, and there is no {asked or ' or '.join(COMPILERS)} here")


def _target(compiler: list[str]) -> tuple[str, str]:
    """The flag that means this processor, and the macros that it defines: what the processor can do."""
    for flag in _FOR_THIS_PROCESSOR:
        try:
            return flag, _run([*compiler, flag, "-dM", "-E", "-x", "c++", os.devnull])
        except NativeBuildError:
            continue
    raise NativeBuildError(f"{shlex.join(compiler)} knows neither {' nor '.join(_FOR_THIS_PROCESSOR)}")


def _compile(compiler: list[str], target: str, path: Path) -> None:
    _log.info("compiling attention for this processor into %s, once", path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            partial = Path(folder) / path.name
            headers = ("-isystem", jax.ffi.include_dir())
            _run([*compiler, *_FLAGS, target, *headers, str(SOURCES / "handlers.cc"), "-o", str(partial)])
            # Other processes may be building it too; whoever comes last wins, and all are alike.
            partial.replace(path)
    except OSError as error:
        raise NativeBuildError(f"compiled code cannot be kept in {path.parent}: {error}") from None


def _run(command: list[str]) -> str:
    """What the command prints.

    Raises:
        NativeBuildError: It failed.
    """
    try:
        result = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            # Complaints in English, so that they can be told from the lines around them.
            env={**os.environ, "LC_ALL": "C"},
            timeout=_TIME_LIMIT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeBuildError(f"{command[0]} did not run: {error}") from None
    if result.returncode != 0:
        said = [line.strip() for line in result.stderr.splitlines() if line.strip()]
        said.append(f"exit status {result.returncode}")
        raise NativeBuildError(f"{command[0]} failed: {next((line for line in said if 'error' in line), said[0])}")
    return result.stdout
