import pytest

from ring_rl.lm.evaluation.scores import by_answer_depth, by_cell, by_length, effective_length, mean_over_tasks


def test_cells_lengths_and_modes_are_kept_apart(record):
    records = [
        record(mode=mode, length=length, depth=depth, index=index, score=float(index < right))
        for mode, length, depth, right in (
            ("generated", 64, 0.0, 1),
            ("generated", 64, 1.0, 3),
            ("generated", 128, 0.0, 4),
            ("teacher_forced", 64, 0.0, 0),
        )
        for index in range(4)
    ]
    cells = {(each.mode, each.length, each.depth): each.score.value for each in by_cell(records)}
    assert cells == {
        ("generated", 64, 0.0): 0.25,
        ("generated", 64, 1.0): 0.75,
        ("generated", 128, 0.0): 1.0,
        ("teacher_forced", 64, 0.0): 0.0,
    }
    lengths = {(each.mode, each.length): (each.score.value, each.score.count) for each in by_length(records)}
    assert lengths == {("generated", 64): (0.5, 8), ("generated", 128): (1.0, 4), ("teacher_forced", 64): (0.0, 4)}


def test_tokens_items_and_chance_are_means(record):
    (score,) = by_cell(
        [record(index=0, tokens=10, items=2, chance=0.5), record(index=1, tokens=20, items=4, chance=0.25)]
    )
    assert (score.tokens, score.items, score.chance) == (15, 3, 0.375)
    (score,) = by_cell([record(items=None)])
    assert score.items is None


def test_depths_fall_into_bins_and_the_end_into_the_last(record):
    depths = [0.0, 0.24, 0.25, 0.99, 1.0, None]
    records = [record(index=index, answer_depth=depth, score=1.0) for index, depth in enumerate(depths)]
    binned = {each.depth: each.score.count for each in by_answer_depth(records, bins=4)}
    assert binned == {0.125: 2, 0.375: 1, 0.875: 2}


def test_effective_length_is_the_longest_that_reaches_the_threshold(record):
    scores = {
        ("vt", 4096): 1,
        ("cwe", 4096): 0.8,
        ("vt", 8192): 0.9,
        ("cwe", 8192): 0.8,
        ("vt", 16384): 0,
        ("cwe", 16384): 1,
    }
    lengths = by_length([record(task=task, length=length, score=score) for (task, length), score in scores.items()])
    means = mean_over_tasks(lengths)["generated"]
    assert means == pytest.approx({4096: 0.9, 8192: 0.85, 16384: 0.5})
    assert effective_length(means, threshold=0.856) == 4096
    assert effective_length(means, threshold=0.85) == 8192
    assert effective_length(means, threshold=0.95) is None


def test_a_mean_over_other_tasks_is_refused(record):
    lengths = by_length([record(task="vt"), record(task="cwe"), record(task="vt", length=8192)])
    with pytest.raises(ValueError, match="no generated score of cwe at 8192"):
        mean_over_tasks(lengths)
