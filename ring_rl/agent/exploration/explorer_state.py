"""What an explorer has learnt, in one file beside its episodes: found whole or not at all."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ring_rl.atomic_file import atomic_file

__all__ = ["load_explorer_state", "save_explorer_state"]


def save_explorer_state(path: Path, state: Mapping[str, Any], *, batch: int, episode: int) -> None:
    """Writes nested dicts of arrays, in place of what `path` held.

    Args:
        state: Of `Explorer.state`.
        batch: That comes next.
        episode: The first index that it is recorded under.
    """
    with atomic_file(path, overwrite=True) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **dict(_flat(state, "state")), batch=batch, episode=episode)


def load_explorer_state(path: Path) -> tuple[dict[str, Any], int, int]:
    """The inverse of `save_explorer_state`: the state, and the batch and the episode that come next.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file that `save_explorer_state` wrote.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            flat = dict(arrays)
        batch, episode = int(flat.pop("batch")), int(flat.pop("episode"))
    except (ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} holds no explorer's state ({error}); remove it, and the episodes are played again from the first"
        ) from None
    nested: dict[str, Any] = {}
    for name, array in flat.items():
        _, *parents, last = name.split("/")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = array
    return nested, batch, episode


def _flat(nested: Mapping[str, Any], prefix: str) -> list[tuple[str, np.ndarray]]:
    leaves = []
    for name, value in nested.items():
        path = f"{prefix}/{name}"
        leaves += _flat(value, path) if isinstance(value, Mapping) else [(path, np.asarray(value))]
    return leaves
