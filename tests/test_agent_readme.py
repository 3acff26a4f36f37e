"""What the agents' page says can be typed, can be, and what it lists is there."""

import re
import shlex
from pathlib import Path
from typing import get_args

import pytest
import yaml
from hydra import compose, initialize_config_dir

from ring_rl.agent import hindsight, tokens
from ring_rl.agent.action_heads import ActionHeadConfig

REPOSITORY = Path(__file__).parents[1]
PAGE = REPOSITORY / "ring_rl" / "agent" / "README.md"
TEXT = PAGE.read_text()
CONFIGS = {
    "collect": "collect",
    "train_agent": "train_agent",
    "evaluate_agent": "evaluate_agent",
    "reproduce_agent": "reproduce_agent",
    "relabel": "relabel",
    "random_returns": "random_returns",
    "compare_explorers": "compare_explorers",
    "convert": "convert",
    "bench_reader": "bench_reader",
    "attention_memory": "attention_memory",
}


def commands():
    """(script, overrides) of every command on the page that calls one of our scripts."""
    for line in re.findall(r"python ((?:datasets|experiments)/[^`\n]*)", TEXT):
        script, *overrides = shlex.split(line.rstrip(").:"), comments=True)
        yield Path(script), overrides


def test_commands_compose():
    found = list(commands())
    assert {"collect", "train_agent", "evaluate_agent", "reproduce_agent"} <= {script.stem for script, _ in found}
    for script, overrides in found:
        assert (REPOSITORY / script).exists(), script
        with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
            compose(CONFIGS[script.stem], overrides=overrides)


def row(key):
    """The choices that the table of variations lists for a key."""
    (choices,) = re.findall(rf"^\| `{re.escape(key)}`.*?\| (.*) \|$", TEXT, re.MULTILINE)
    return set(re.findall(r"`([\w]+)`", choices))


@pytest.mark.parametrize(
    ("key", "allowed"),
    [
        ("token_layout", set(get_args(tokens.TokenLayout))),
        ("time_embedding", set(get_args(tokens.TimeEmbedding))),
        ("chain.sampling", set(get_args(hindsight.Sampling))),
        ("chain.loss_on", set(get_args(hindsight.LossOn))),
        ("action_head", {get_args(each.__annotations__["name"])[0] for each in get_args(ActionHeadConfig)}),
        ("transformer@agent.transformer", {path.stem for path in (REPOSITORY / "conf/transformer").glob("*.yaml")}),
    ],
)
def test_the_choices_it_lists_are_the_ones_there_are(key, allowed):
    assert row(key) == allowed


def test_agents_presets_and_ways_to_attend_are_listed():
    first_cells = re.findall(r"^\| (`.*?) \|", TEXT, re.MULTILINE)
    listed = {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}
    presets = {path.stem for path in (REPOSITORY / "conf/preset").glob("*.yaml")}
    agents = {path.stem for path in (REPOSITORY / "conf/agent").glob("*.yaml")}
    assert presets <= listed
    assert agents <= listed
    for path in (REPOSITORY / "conf/attention").glob("*.yaml"):
        assert f"`{path.stem}`" in TEXT or f"attention={path.stem}" in TEXT
    configuration = yaml.safe_load((REPOSITORY / "conf/agent/agentic_transformer.yaml").read_text())
    for key in set(configuration["chain"]) - {"rank_temperature", "random_length"}:
        assert f"`chain.{key}`" in TEXT
