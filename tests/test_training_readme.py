"""What the training engine's page says can be typed, can be, and what it lists is there."""

import dataclasses
import json
import re
import shlex
import textwrap
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import optax
import pytest
from hydra import compose, initialize_config_dir

from ring_rl.training import optimizer
from ring_rl.training.dry_run import DryRun
from ring_rl.training.stage import TrainingStage
from ring_rl.training.task import TrainingTask

REPOSITORY = Path(__file__).parents[1]
PAGE = REPOSITORY / "ring_rl" / "training" / "README.md"
TEXT = PAGE.read_text()
CONFIGS = {"train_agent": "train_agent", "collect": "collect_runs"}


def section(title):
    """The page from this heading to the next one of its level."""
    return re.findall(rf"^## {title}$(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)[0]


def commands():
    """(script, its words) of each line in a code block that calls one of our scripts by Python."""
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["python"] and Path(words[1]).stem in CONFIGS:
                yield Path(words[1]).stem, words[2:]


def test_files_in_tables_and_commands_exist():
    for name in re.findall(r"(?:experiments|conf)/[\w/]+\.(?:py|sh|yaml|sbatch)", TEXT):
        assert (REPOSITORY / name).exists(), name
    for name in re.findall(r"`(tests/[\w/]+\.py)`", TEXT):
        assert (REPOSITORY / name).exists(), name
    for name in re.findall(r"^\| `(\w+\.yaml)` \|", section("Sweeps"), re.MULTILINE):
        assert (REPOSITORY / "conf" / "sweep" / name).exists(), name


def test_commands_compose():
    assert {script for script, _ in commands()} == set(CONFIGS)
    for script, words in commands():
        # The first value of each that a grid lists; a launcher belongs to Hydra's own part.
        overrides = [re.sub(r"=([^\[{,]*),.*", r"=\1", word) for word in words if word != "-m"]
        overrides = [word.replace("<", "").replace(">", "") for word in overrides]
        if any(word.startswith("hydra/launcher=") for word in overrides):
            pytest.importorskip("submitit", reason="launchers need the extra `cluster`")
        with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
            compose(CONFIGS[script], overrides=overrides, return_hydra_config=True)


def test_the_map_holds_every_room():
    rooms = [name for line in section("The rooms").splitlines() if line[:1] == "|" for name in line.split("`")]
    listed = sorted(name for name in rooms if name.endswith(".py"))
    there = sorted(path.name for path in PAGE.parent.glob("*.py") if path.name != "__init__.py")
    assert listed == there
    below = section("The rooms").split("Below it")[1]
    for name in re.findall(r"`(\w+\.py)`", below):
        assert (REPOSITORY / "ring_rl" / "nn" / name).exists(), name


def test_a_task_is_described_in_full():
    title, *listed = re.findall(r"^\| `(\w+)` \|", section("A task"), re.MULTILINE)
    assert title == TrainingTask.__name__
    assert listed == [field.name for field in dataclasses.fields(TrainingTask)]


def test_a_stage_is_described_in_full():
    rows = re.findall(r"^\| (`.+?) \|", section("Stages"), re.MULTILINE)
    title, *listed = re.findall(r"`(\w+)`", " ".join(rows))
    assert title == TrainingStage.__name__
    assert listed == [field.name for field in dataclasses.fields(TrainingStage)]


def test_the_dry_run_ends_as_it_does_today():
    (shown,) = re.findall(r"^parameters=.*$", section("Dry run"), re.MULTILINE)
    names = {"mesh": "", "available_source": "", "compiler_message": None}
    integers = {field.name: 1 for field in dataclasses.fields(DryRun) if field.name not in names}
    pattern = r"(\w+)=\S+"
    assert re.findall(pattern, shown) == re.findall(pattern, DryRun(**integers, **names).summary())


def test_metrics_of_a_run_are_explained():
    explained = set(re.findall(r"`([\w/]+)`", section("Metrics")))
    record = (REPOSITORY / "experiments/results/demo/agentic_transformer.metrics.jsonl").read_text().splitlines()[-1]
    # That run is older than the prefix of what is about the machine.
    named = {name for name in json.loads(record) if f"performance/{name}" not in explained}
    assert named - {"step"} <= explained
    module = (PAGE.parent / "throughput.py").read_text()
    assert set(re.findall(r"^    (performance/\w+)", module, re.MULTILINE)) <= explained


def test_the_optimizer_of_the_page_works():
    (source,) = re.findall(r" *```python\n(.*?)```", section("Optimizers"), re.DOTALL)
    names = dict(vars(optimizer))
    exec(textwrap.dedent(source), names)
    config = names["MomentumConfig"](
        name="momentum",
        decay=0.9,
        learning_rate=0.1,
        weight_decay=0.0,
        warmup_steps=0,
        schedule="constant",
        final_learning_rate_fraction=1.0,
        gradient_clip_norm=None,
    )
    rule = optimizer.make_optimizer(config, total_steps=2)
    parameters: Any = {"kernel": jnp.array([1.0, -2.0])}
    state = rule.init(parameters)
    for expected in (0.9, 0.9 - 0.1 * (0.9 + 0.9)):
        updates, state = rule.update(parameters, state, parameters)
        parameters = optax.apply_updates(parameters, updates)
        assert jnp.allclose(parameters["kernel"], expected * jnp.array([1.0, -2.0]))
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\)"):
        dataclasses.replace(config, decay=1.0)
