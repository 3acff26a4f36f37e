"""Results in the layout that lm-evaluation-harness writes, so that both can be laid side by side.

There a RULER task's metrics are named by the length: `results["niah_single_1"]["4096,none"]`. Tasks of ours that the
harness does not have keep their own names. Only generated answers are exported under the harness's names, as it scores
nothing else; teacher-forced ones are exported as `<task>_teacher_forced`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ring_rl.lm.evaluation.scores import CellScore

__all__ = ["HARNESS_NAMES", "harness_results"]

# Our names of RULER's tasks, and the harness's.
HARNESS_NAMES: Mapping[str, str] = {
    "niah_single_1": "niah_single_1",
    "niah_multikey_2": "niah_multikey_2",
    "niah_multikey_3": "niah_multikey_3",
    "vt": "ruler_vt",
    "cwe": "ruler_cwe",
    "fwe": "ruler_fwe",
}
# The harness's name of an unfiltered metric ends so.
_UNFILTERED = ",none"


def harness_results(
    scores: Sequence[CellScore], *, model_name: str, seed: int, settings: Mapping[str, Any], commit: str | None
) -> dict[str, Any]:
    """What a results file of the harness holds, as far as it is comparable.

    Args:
        scores: Of `by_length`.
        model_name: What was evaluated.
        seed: Of the samples.
        settings: Of the evaluation, as plain JSON.
        commit: Of this repository.
    """
    results: dict[str, dict[str, Any]] = {}
    counts: dict[str, dict[str, int]] = {}
    for each in scores:
        name = HARNESS_NAMES.get(each.task, each.task)
        if each.mode == "teacher_forced":
            name += "_teacher_forced"
        metrics = results.setdefault(name, {"alias": name})
        metrics[f"{each.length}{_UNFILTERED}"] = each.score.value
        # The interval in place of a standard error, which means little where all answers are right.
        metrics[f"{each.length}_wilson_95{_UNFILTERED}"] = [each.score.low, each.score.high]
        counts.setdefault(name, {})[str(each.length)] = each.score.count
    return {
        "results": results,
        "n-samples": counts,
        "higher_is_better": {name: {str(length): True for length in of_task} for name, of_task in counts.items()},
        "config": {"model": "ring_rl", "model_args": model_name, "seed": seed, "settings": dict(settings)},
        "git_hash": commit,
    }
