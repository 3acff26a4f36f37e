"""What the card says a reader can type, works."""

import re
import warnings
from pathlib import Path

import pytest

pytest.importorskip("minari", reason="Minari data sets need minari")

from ring_rl.agent.episodes.minari_read import MinariDataConfig, MinariSet

REPOSITORY = Path(__file__).parents[2]
CARD = (REPOSITORY / "datasets" / "minari" / "README.md").read_text()


def test_the_cards_code_records_a_set_that_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    (code,) = re.findall(r"```python\n(.*?)```", CARD, re.DOTALL)
    assert "range(40)" in code
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of all that a card leaves out
        exec(code.replace("range(40)", "range(2)"), {})  # the card is part of this repository
    (dataset_id,) = re.findall(r"data\.dataset_id=(pendulum/\S+)", CARD)
    opened = MinariSet(MinariDataConfig(name="minari", dataset_id=dataset_id, download=False, max_episodes=None))
    assert f"task={opened.task} " in CARD
    episodes = opened.episodes(progress=False)
    assert [each.length for each in episodes.trajectories] == [200, 200]
    assert episodes.returns.max() < 0


def test_the_files_that_the_card_names_exist():
    names = re.findall(r"(?:python |`)((?:experiments|datasets|conf)/\S+?\.(?:py|yaml))", CARD)
    assert len(names) >= 4
    assert [name for name in names if not (REPOSITORY / name).is_file()] == []
