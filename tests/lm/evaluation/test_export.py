import json

from ring_rl.lm.evaluation.export import harness_results
from ring_rl.lm.evaluation.scores import by_length


def test_metrics_are_named_by_length_under_the_harness_own_task_names(record):
    records = [
        record(task=task, length=length, mode=mode, index=index, score=float(index == 0))
        for task in ("niah_single_1", "vt", "line_retrieval")
        for length in (4096, 8192)
        for mode in ("generated", "teacher_forced")
        for index in range(2)
    ]
    exported = harness_results(by_length(records), model_name="m", seed=3, settings={"a": 1}, commit="abc")
    results = exported["results"]
    assert set(results) == {
        f"{name}{suffix}"
        for name in ("niah_single_1", "ruler_vt", "line_retrieval")
        for suffix in ("", "_teacher_forced")
    }
    assert results["ruler_vt"]["4096,none"] == results["ruler_vt"]["8192,none"] == 0.5
    assert exported["n-samples"]["niah_single_1"] == {"4096": 2, "8192": 2}
    assert json.loads(json.dumps(exported)) == exported
