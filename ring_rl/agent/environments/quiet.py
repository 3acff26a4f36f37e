"""Silence for warnings that nobody here can act on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["without_simulator_warnings"]


@contextmanager
def without_simulator_warnings() -> Iterator[None]:
    """Hides what dm_control logs below an error: attributes in its own models, an arm's posture that it tries again."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
