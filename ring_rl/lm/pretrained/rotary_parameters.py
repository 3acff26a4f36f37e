"""The rotary keys of a `config.json`: linear (position interpolation), llama3 and YaRN; anything else is refused."""

import math
from collections.abc import Mapping
from typing import Any

# By kind: their key -> (our key, what transformers takes it for where it is absent; `...` where it must be there).
_KEYS: dict[str, dict[str, tuple[str, Any]]] = {
    "linear": {"factor": ("factor", ...)},
    "llama3": {
        "factor": ("factor", ...),
        "low_freq_factor": ("low_frequency_factor", ...),
        "high_freq_factor": ("high_frequency_factor", ...),
        "original_max_position_embeddings": ("original_positions", None),
    },
    "yarn": {
        "factor": ("factor", ...),
        "original_max_position_embeddings": ("original_positions", None),
        "beta_fast": ("beta_fast", 32.0),
        "beta_slow": ("beta_slow", 1.0),
        "attention_factor": ("attention_factor", None),
    },
}
_NAMES = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def rotary_scaling(mapping: Mapping[str, Any], *, where: str) -> tuple[float, dict[str, Any] | None]:
    """The rotary base and, as a plain mapping, the scaling of a `config.json`.

    Raises:
        ValueError: The scaling is of another kind, lacks a key or has one that is not known.
    """
    saved = dict(mapping.get("rope_parameters") or mapping.get("rope_scaling") or {})
    base = saved.get("rope_theta") or mapping.get("rope_theta") or 10000.0
    if saved.get("partial_rotary_factor") not in (None, 1.0):
        raise ValueError(
            f"{where} turns a share of {saved['partial_rotary_factor']} of each head (partial_rotary_factor), which "
            "transformers' LLaMA does not do either; it is another architecture"
        )
    kind = saved.get("rope_type") or saved.get("type") or "default"
    if kind == "default":
        return base, None
    if kind not in _KEYS:
        raise ValueError(
            f"{where} scales rotary positions by {kind!r}, which is not supported; supported are default, "
            f"{', '.join(_KEYS)}"
        )
    # null is as good as absent.
    saved = {key: value for key, value in saved.items() if value is not None}
    scaling = {ours: saved.get(theirs, default) for theirs, (ours, default) in _KEYS[kind].items()}
    lacking = [theirs for theirs, (ours, _) in _KEYS[kind].items() if scaling[ours] is ...]
    if lacking:
        raise ValueError(f"{where}: rotary scaling {kind!r} lacks {', '.join(lacking)}")
    known = {*_KEYS[kind], *_NAMES}
    if kind == "yarn":
        known |= {"mscale", "mscale_all_dim", "truncate"}
        scaling["attention_factor"] = _attention_factor(saved)
        if saved.get("truncate", True) is not True:
            raise ValueError(f"{where}: rotary scaling 'yarn' with truncate=false is not supported")
    if unknown := sorted(saved.keys() - known):
        raise ValueError(f"{where}: rotary scaling {kind!r} has {', '.join(unknown)}, which is not supported")
    if "original_positions" in scaling and scaling["original_positions"] is None:
        scaling["original_positions"] = mapping["max_position_embeddings"]
    return base, {"name": kind, **scaling}


def rope_scaling(scaling: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The inverse: what transformers 4 calls `rope_scaling`."""
    if scaling is None:
        return None
    values = {theirs: scaling[ours] for theirs, (ours, _) in _KEYS[scaling["name"]].items()}
    return {"rope_type": scaling["name"], **{key: value for key, value in values.items() if value is not None}}


def _attention_factor(saved: Mapping[str, Any]) -> float | None:
    """What cos and sin are multiplied by under YaRN; None is its default, 0.1 ln(factor) + 1.

    DeepSeek's variant gives it as the quotient of two such terms.
    """
    mscale, mscale_all_dim = saved.get("mscale"), saved.get("mscale_all_dim")
    if "attention_factor" in saved or not (mscale and mscale_all_dim):
        return saved.get("attention_factor")
    grown = math.log(max(saved["factor"], 1.0))
    return (0.1 * mscale * grown + 1.0) / (0.1 * mscale_all_dim * grown + 1.0)
