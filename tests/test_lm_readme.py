"""What the language models' page says can be typed, can be, and what it lists is there."""

import re
import shlex
from pathlib import Path
from typing import get_args, get_type_hints

import jax
import numpy as np
import pytest
from flax import nnx
from hydra import compose, initialize_config_dir

from ring_rl.config import from_mapping
from ring_rl.hydra_config import resolve
from ring_rl.lm.model import LanguageModel
from ring_rl.lm.tokenizer.load import TokenizerConfig
from ring_rl.nn.transformer import TransformerConfig
from small_models import small_language_model

REPOSITORY = Path(__file__).parents[1]
ROOM = REPOSITORY / "ring_rl" / "lm"
CONF = REPOSITORY / "conf"
TEXT = (ROOM / "README.md").read_text()


def commands():
    """(script, overrides) of every command on the page that calls one of our scripts."""
    for line in re.findall(r"python (experiments/[^`\n]*)", TEXT):
        script, *overrides = shlex.split(line.rstrip(".:"), comments=True)
        yield Path(script), overrides


def composed(name, overrides):
    """The configuration of a script, whose file may lie in a folder of its own."""
    folder = CONF if (CONF / f"{name}.yaml").exists() else CONF / name
    with initialize_config_dir(str(folder), version_base="1.3"):
        return compose(name, overrides=overrides)


def names(group):
    return {path.stem for path in (CONF / group).glob("*.yaml")}


def test_commands_compose():
    found = list(commands())
    assert {"train_lm", "evaluate_lm", "generate", "reproduce_lm"} <= {script.stem for script, _ in found}
    for script, overrides in found:
        assert (REPOSITORY / script).exists(), script
        # Resolved, so that a value that must be given is given.
        resolve(composed(script.stem, overrides))


@pytest.mark.parametrize("group", ["suite", "stages", "training_data"])
def test_the_choices_that_its_tables_list_are_the_ones_there_are(group):
    (table,) = re.findall(rf"^\| `{group}=` \|.*?(?=\n\n)", TEXT, re.MULTILINE | re.DOTALL)
    cells = [row.split(" | ")[0] for row in table.splitlines()[2:]]
    assert {name for cell in cells for name in re.findall(r"`(\w+)`", cell)} == names(group)


def test_what_else_it_names_is_there():
    for each in get_args(TokenizerConfig):
        (name,) = get_args(get_type_hints(each)["name"])
        assert f"| `{name}` |" in TEXT, name
    for group in ("documents", "experiment/lm", "template", "reproduce_lm/preset"):
        for name in names(group) - {"packed"}:
            assert re.search(rf"\b{name}\b", TEXT), (group, name)
    for name in re.findall(r"\| `([a-z_.]+)`.*\|$", TEXT, re.MULTILINE):
        if name.startswith(("rotary", "retrieval.")):
            assert name.split(".")[0] in TransformerConfig.__annotations__, name
    (table,) = re.findall(r"^\| `conf/transformer/` \|.*?(?=\n\n)", TEXT, re.MULTILINE | re.DOTALL)
    sizes = {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row)}
    # The others are the agents'.
    assert sizes == names("transformer") - {"tiny", "base", "100m", "350m"}


def test_links_lead_somewhere_and_every_section_is_in_the_contents():
    headings = re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)
    anchors = {heading.lower().replace(" ", "-") for heading in headings}
    for target, heading in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", TEXT):
        if target and not target.startswith("http"):
            assert (ROOM / target).exists(), target
        if heading and not target:
            assert heading in anchors, heading
    contents = TEXT[: TEXT.index("\n## ")]
    for title in re.findall(r"^## (.*)$", TEXT, re.MULTILINE):
        assert f"(#{title.lower().replace(' ', '-')})" in contents, title


def test_the_example_of_generation_runs():
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        size = resolve(compose("transformer/llama_tiny"))["transformer"]
    small = {"layers": 1, "width": 16, "query_heads": 2, "key_value_heads": 1, "head_dim": 8, "feed_forward_width": 16}
    config = small_language_model(
        vocabulary_size=32,
        tied_embedding=True,
        embedding_scale=0.5,
        trained_positions=0,
        transformer=from_mapping(TransformerConfig, size | small),
    )
    scope = {"model": LanguageModel(config, rngs=nnx.Rngs(0))}
    exec(code, scope)  # the page is part of this repository
    assert [len(tokens) for tokens in scope["texts"].tokens] == [16, 16]
    assert all(np.isfinite(numbers).all() for numbers in scope["texts"].log_probabilities)
    assert len(jax.devices()) == 8
