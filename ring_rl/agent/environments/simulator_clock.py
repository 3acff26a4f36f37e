"""The simulator's own stopwatch, stopped: a physics step reads the clock some thirty times, which small models feel.

Needs the simulator: `pip install 'ring_rl[simulator]'`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mujoco

__all__ = ["without_clock"]


@contextlib.contextmanager
def without_clock() -> Iterator[None]:
    """Leaves `mjData.timer` as it is in all simulations meanwhile; nothing else changes. A seventh of cheetah's time.

    Through C, because a Python callback, even None, puts the default clock back. Where the simulator's library is not
    to be found, the clock stays.
    """
    clock = _clock()
    if clock is None or clock.value is None:
        yield
        return
    before = clock.value
    clock.value = None
    try:
        yield
    finally:
        clock.value = before


@functools.cache
def _clock() -> Any:
    """The global `mjcb_time` of the library that the package has loaded, or None."""
    folder = Path(mujoco.__file__).parent
    names = ("libmujoco.so*", "libmujoco*.dylib", "mujoco.dll")
    for path in (path for name in names for path in sorted(folder.glob(name))):
        with contextlib.suppress(OSError, ValueError):
            return ctypes.c_void_p.in_dll(ctypes.CDLL(str(path)), "mjcb_time")
    return None
