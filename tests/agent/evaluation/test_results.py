import numpy as np
import pytest

from ring_rl.agent.evaluation.normalise import ReturnScale
from ring_rl.agent.evaluation.results import (
    RANDOM_POLICY,
    Result,
    read_returns,
    return_scale,
    table_rows,
    write_returns,
)
from ring_rl.agent.evaluation.rollout import reset_seeds
from ring_rl.training.tables import markdown_table


def result(label="agent", *, returns=((1.0, 3.0), (1.0, 3.0)), context="none", target=None, headline=True, seeds=(0,)):
    returns = np.array([returns] * len(seeds))
    return Result(label=label, context=context, target_fraction=target, headline=headline, seeds=seeds, returns=returns)


def test_table_holds_agents_and_data_raw_and_normalised():
    rows = table_rows([result()], np.array([0.0, 10.0, 20.0]), None)
    assert rows[1] == ["agent", "2 [2, 2]", "3 [3, 3]", "3 [3, 3]", "2 environment seeds"]
    assert rows[2] == ["data (3 episodes)", "10", "", "20", ""]
    assert rows[3][:2] == ["data, 75th percentile", "15"]
    assert markdown_table(rows).splitlines()[1] == "| --- | --- | --- | --- | --- |"

    rows = table_rows([result()], np.array([0.0, 10.0, 21.0]), ReturnScale(random=1.0, best=21.0))
    assert rows[0][4:7] == ["mean of episodes, normalised", "last episode, normalised", "best episode, normalised"]
    assert rows[1][1:7] == [
        "2 [2, 2]",
        "3 [3, 3]",
        "3 [3, 3]",
        "5.0 [5.0, 5.0]",
        "10.0 [10.0, 10.0]",
        "10.0 [10.0, 10.0]",
    ]
    assert rows[2] == ["data (3 episodes)", "10", "", "21", "46.7", "", "100.0", ""]
    assert len({len(row) for row in rows}) == 1


def test_targets_beside_the_headline_say_so_and_stand_below():
    results = [
        result(context="carried", target=0.7, headline=False),
        result(context="carried", target=0.85),
        result(context="cleared", target=0.85),
    ]
    names = [row[0] for row in table_rows(results, np.array([1.0, 2.0]), None)]
    assert names[1:4] == ["agent", "agent, context cleared", "agent, target 0.7 of best"]


def test_csv_brings_back_what_was_written(tmp_path):
    generator = np.random.default_rng(0)
    written = [
        Result(
            label=label,
            context=context,
            target_fraction=target,
            headline=target != 0.7,
            seeds=(3, 1),
            returns=generator.uniform(0, 1000, size=(2, 3, 4)),
        )
        for label, context, target in (
            ("one, with a comma", "carried", 0.85),
            ("one, with a comma", "cleared", 0.85),
            ("one, with a comma", "carried", 0.7),
            ("other", "none", None),
        )
    ]
    path = tmp_path / "returns.csv"
    write_returns(written, reset_seeds(rows=3, episodes=4, seed=2), path)
    for was, again in zip(written, read_returns(path), strict=True):
        assert (was.name, was.seeds, was.context, was.target_fraction) == (
            again.name,
            again.seeds,
            again.context,
            again.target_fraction,
        )
        np.testing.assert_allclose(again.returns, was.returns, rtol=1e-5)
    assert len(path.read_text().splitlines()) == 1 + 4 * 24
    assert "other,1,,1,none,2,3,200017," in path.read_text()

    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]))
    with pytest.raises(ValueError, match="lacks returns of other"):
        read_returns(path)
    path.write_text("\n".join([*lines, lines[-1]]))
    with pytest.raises(ValueError, match="row 2, episode 3 of other twice"):
        read_returns(path)


def test_files_of_before_targets_were_swept_are_read(tmp_path):
    path = tmp_path / "returns.csv"
    path.write_text(
        "agent,training_seed,row,episode,reset_seed,return\nfirst,0,0,0,0,1\nfirst,0,0,1,1,2\nfirst,0,1,0,2,3\n"
        'first,0,1,1,3,4\n"first, context cleared",0,0,0,0,5\n'
    )
    first, cleared = read_returns(path)
    assert (first.name, cleared.name) == ("first", "first, context cleared")
    assert first.returns.tolist() == [[[1, 2], [3, 4]]]


def test_the_scale_is_that_of_random_actions_and_of_the_data():
    data = np.array([5.0, 30.0])
    assert return_scale([result()], data) is None
    assert return_scale([result(), result(RANDOM_POLICY)], data) == ReturnScale(random=2.0, best=30.0)
    with pytest.raises(ValueError, match="not above the random policy's 2"):
        return_scale([result(RANDOM_POLICY)], np.array([1.0, 2.0]))


def test_every_seed_has_returns():
    with pytest.raises(
        ValueError, match=r"of 2 training seeds must be \[seeds, rows, episodes\], got shape \(1, 2, 2\)"
    ):
        Result(
            label="a", context="none", target_fraction=None, headline=True, seeds=(0, 1), returns=np.zeros((1, 2, 2))
        )
