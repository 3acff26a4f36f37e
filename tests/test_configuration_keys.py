"""Hydra reads `stages=[a]` on the command line as a choice among conf/stages/, whatever key a file has of that name."""

from pathlib import Path

import pytest
import yaml

CONF = Path(__file__).parents[1] / "conf"
# hydra's own keys and choices live together.
GROUPS = {folder.name for folder in CONF.iterdir() if folder.is_dir()} - {"hydra"}


def shadowed(text: str, groups: set[str]) -> set[str]:
    """Keys that no command line can set: a folder has their name, and the file does not choose from it."""
    keys = dict(yaml.safe_load(text))
    chosen = {
        name.removeprefix("override ").strip().lstrip("/").split("@")[0]
        for entry in keys.pop("defaults", [])
        if isinstance(entry, dict)
        for name in entry
    }
    return {key for key in keys if key in groups} - chosen


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_key_of_an_entry_point_can_be_set_on_its_command_line(path):
    assert not shadowed(path.read_text(), GROUPS)


def test_a_key_with_the_name_of_a_group_is_found():
    text = "defaults:\n  - _self_\n  - data: rnd\nstages: [train]\nseed: 0\n"
    assert shadowed(text, {"stages", "data"}) == {"stages"}
