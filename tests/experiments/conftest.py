"""Entry points called in this process, with a small made-up data set in ExoRL's layout."""

import functools
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from ring_rl.agent.episodes.exorl import write_episode
from ring_rl.agent.episodes.trajectory import Trajectory

REPOSITORY = Path(__file__).parents[2]

# Small enough that a run is mostly compilation.
SMALL = [
    "agent.transformer.layers=1",
    "agent.transformer.width=16",
    "agent.transformer.head_dim=4",
    "agent.transformer.feed_forward_width=16",
    "agent.chain.trajectories=2",
]
BRIEF = [
    "batch.batch_size=2",
    "loop.steps=6",
    "loop.log_every=1",
    "loop.checkpoint_every=2",
    "optimizer.warmup_steps=1",
    "wandb.mode=disabled",
]


def held_noise_episode(generator, steps=1000, hold=4):
    """An episode with cartpole's dimensions whose actions are held; nobody simulated it."""
    actions = np.repeat(generator.uniform(-1, 1, size=(steps // hold, 1)), hold, axis=0)
    return Trajectory(
        observations=generator.normal(size=(steps + 1, 5)).astype(np.float32),
        actions=actions.astype(np.float32),
        rewards=(generator.uniform(0, 1) * generator.uniform(0, 1, size=steps)).astype(np.float32),
        discounts=np.ones(steps, np.float32),
        physics=generator.normal(size=(steps + 1, 4)),
    )


@pytest.fixture(scope="session")
def data_root(tmp_path_factory):
    """`data.root` of a data set of 12 episodes."""
    root = tmp_path_factory.mktemp("exorl")
    buffer = root / "cartpole" / "policy_search_cartpole_swingup" / "buffer"
    buffer.mkdir(parents=True)
    (buffer.parent / "collection.json").write_text('{"settings": {"task": "cartpole_swingup"}}')
    generator = np.random.default_rng(0)
    for index in range(12):
        write_episode(buffer, index, held_noise_episode(generator))
    return root


@pytest.fixture(scope="session")
def load_script():
    """`load_script("train_agent")`: the script as a module, each once."""

    @functools.cache
    def load(name):
        spec = importlib.util.spec_from_file_location(name, REPOSITORY / "experiments" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def call_script(load_script):
    """`call_script("train_agent", *overrides)`: the script's main function on a composed configuration."""

    def call(name, *overrides, config_name=None):
        script = load_script(name)
        with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
            cfg = compose(config_name or name, overrides=list(overrides))
        script.main.__wrapped__(cfg)

    return call


@pytest.fixture(scope="session")
def train_options(data_root):
    """Overrides that train a small agent for a few steps."""

    def options(run_dir, *, small=True):
        return [f"run_dir={run_dir}", f"data.root={data_root}", *(SMALL if small else []), *BRIEF]

    return options


@pytest.fixture(scope="session")
def train(call_script, train_options):
    """Trains a small agent; more overrides win."""

    def call(run_dir, *overrides, small=True):
        call_script("train_agent", *train_options(run_dir, small=small), *overrides)

    return call


@pytest.fixture
def refused(capsys):
    """Calls a function that must end with exit code 1 and returns its one line of complaint."""

    def call(function, *arguments, **options):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            function(*arguments, **options)
        assert exit_info.value.code == 1
        lines = capsys.readouterr().err.strip().splitlines()
        complaints = [line for line in lines if line.startswith("error: ")]
        assert len(complaints) == 1, lines
        return complaints[0]

    return call
