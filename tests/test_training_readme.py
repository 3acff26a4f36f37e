"""What the training engine's page says can be typed, can be."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

REPOSITORY = Path(__file__).parents[1]
PAGE = REPOSITORY / "ring_rl" / "training" / "README.md"
TEXT = PAGE.read_text()
CONFIGS = {"train_agent": "train_agent", "collect": "collect_runs"}


def commands():
    """(script, its words) of each line in a code block that calls one of our scripts by Python."""
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["python"] and Path(words[1]).stem in CONFIGS:
                yield Path(words[1]).stem, words[2:]


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        if not target.startswith("http"):
            assert (PAGE.parent / target).exists(), target


def test_files_in_tables_and_commands_exist():
    for name in re.findall(r"(?:experiments|conf)/[\w/]+\.(?:py|sh|yaml|sbatch)", TEXT):
        assert (REPOSITORY / name).exists(), name
    for name in re.findall(r"^\| `(\w+\.yaml)` \|", TEXT, re.MULTILINE):
        assert (REPOSITORY / "conf" / "sweep" / name).exists(), name


def test_commands_compose():
    assert {script for script, _ in commands()} == set(CONFIGS)
    for script, words in commands():
        # The first value of each that a grid lists; a launcher belongs to Hydra's own part.
        overrides = [re.sub(r"=([^\[,]*),.*", r"=\1", word) for word in words if word != "-m"]
        overrides = [word.replace("<", "").replace(">", "") for word in overrides]
        if any(word.startswith("hydra/launcher=") for word in overrides):
            pytest.importorskip("submitit", reason="launchers need the extra `cluster`")
        with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
            compose(CONFIGS[script], overrides=overrides, return_hydra_config=True)
