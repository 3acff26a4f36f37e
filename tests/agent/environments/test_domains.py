import itertools
import re
from pathlib import Path

import pytest

from ring_rl.agent.environments.domains import DOMAINS, parse_task, task_names

CARD = Path(__file__).parents[3] / "datasets" / "exorl" / "README.md"


def test_every_name_is_its_domain_and_task():
    names = task_names()
    assert len(set(names)) == len(names) == 20
    assert ["_".join(parse_task(name)) for name in names] == list(names)
    assert parse_task("point_mass_maze_reach_top_left") == ("point_mass_maze", "reach_top_left")


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("walker_wlak", "unknown task 'walker_wlak'; did you mean 'walker_walk'?"),
        ("jaco", "unknown task 'jaco'; .*known are cartpole_balance"),
        ("walker_reach_top_left", "unknown task 'walker_reach_top_left'"),
    ],
)
def test_an_unknown_task_is_refused_with_the_nearest(name, complaint):
    with pytest.raises(ValueError, match=complaint):
        parse_task(name)


def test_the_card_shows_these_sizes_and_tasks():
    """Curly brackets stand for all their combinations, as in a shell."""
    rows = re.findall(
        r"^\| (\w+) +\| (\d+) +\| (\d+) +\| (\d+) +\| (\d+) +\| ([a-z].*?) +\|$", CARD.read_text(), re.MULTILINE
    )
    shown = {domain: (*map(int, sizes), expand(tasks)) for domain, *sizes, tasks in rows}
    assert shown == {
        domain: (spec.observation_dim, spec.action_dim, spec.physics_dim, spec.episode_steps, set(spec.tasks))
        for domain, spec in DOMAINS.items()
    }


def expand(tasks):
    parts = [part.split(",") for part in re.split(r"[{}]", tasks)] if "{" in tasks else None
    return {"".join(each) for each in itertools.product(*parts)} if parts else set(tasks.split(", "))
