"""Whether a run on disk is the one that a list of overrides asks for now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

from ring_rl.training.saved_runs import dotted

__all__ = ["differing_settings"]


def differing_settings(
    saved: Mapping[str, Any], overrides: Sequence[str], given: Mapping[str, Any], *, may_differ: Sequence[str]
) -> list[str]:
    """One line a setting in which a run differs from what is wanted: `"loop.steps: saved 700, wanted 1400"`.

    Args:
        saved: The run's resolved configuration, keys dotted.
        overrides: As on the command line that would start it; of two for one key the later counts. A choice of a whole
            file (`agent=td3_bc`) stands for values that it does not name, so it is not compared.
        given: What the command line gives besides.
        may_differ: Dotted paths, of whole subtrees too, that may change when a run goes on.
    """
    wanted: dict[str, Any] = {}
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key = override.key_or_group
        if override.package is None and ("." in key or key in saved):
            wanted |= dotted({key: override.value()})
    wanted |= given
    return [
        f"{key}: saved {saved.get(key)}, wanted {value}"
        for key, value in wanted.items()
        if saved.get(key) != value and not any(key == path or key.startswith(f"{path}.") for path in may_differ)
    ]
