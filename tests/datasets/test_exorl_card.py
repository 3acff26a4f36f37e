"""The card says what the code does."""

import re
from pathlib import Path

from ring_rl.agent.episodes.exorl import DOMAINS

FOLDER = Path(__file__).parents[2] / "datasets" / "exorl"


def test_the_table_of_domains_is_the_codes():
    number = r" +\| (\d+)"
    row = re.compile(rf"^\| (\w+){number * 4} +\|([^\d|]*)\|$", re.MULTILINE)
    rows = row.findall((FOLDER / "README.md").read_text())
    card = {name: (*map(int, numbers), tuple(re.findall(r"\w+", tasks))) for name, *numbers, tasks in rows}
    code = {
        name: (spec.observation_dim, spec.action_dim, spec.physics_dim, spec.episode_steps, spec.tasks)
        for name, spec in DOMAINS.items()
    }
    assert card == code


def test_the_scripts_are_scripts_and_no_package():
    assert not list(FOLDER.parent.rglob("__init__.py"))
    card = (FOLDER / "README.md").read_text()
    for script in ("collect.py", "fetch.py"):
        assert f"python datasets/exorl/{script}" in card
        assert (FOLDER / script).is_file()
