import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

pytest.importorskip("dm_control", reason="collecting needs the simulator: pip install 'ring_rl[simulator]'")

from ring_rl.agent.episodes.relabel_cache import RelabelConfig
from ring_rl.agent.exploration.collection import CollectionConfig, collect
from ring_rl.agent.exploration.comparison import ComparisonConfig, compare_explorers
from ring_rl.agent.exploration.coverage import CoverageConfig
from ring_rl.agent.exploration.explorers import NoiseConfig, UniformConfig
from ring_rl.config import from_mapping
from ring_rl.hydra_config import resolve

pytestmark = pytest.mark.simulator
REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Uniform actions, and none at all: a pole that hangs and swings a little."""
    root = tmp_path_factory.mktemp("data")
    still = NoiseConfig("noise", 50, 8, "ornstein_uhlenbeck", 0.1, 0.0, 4.0, 64.0, 0.0)
    for name, explorer in {"uniform": UniformConfig("uniform", 50, 8), "still": still}.items():
        collect(CollectionConfig("cartpole_swingup", explorer, 8, 0, root, name, 1, 0.0), progress=False)
    return root


def comparison(root, output, **changes):
    config = ComparisonConfig(
        domain="cartpole",
        algorithms=("uniform", "still"),
        root=root,
        episodes=None,
        stride=4,
        coverage=CoverageConfig(2, 500, 2, 10, 100, 3),
        relabel=RelabelConfig(threads=1, verify_episodes=1, tolerance=1e-6),
        seed=0,
        output=output,
        overwrite=False,
    )
    return replace(config, **changes)


def test_it_writes_what_it_found(root, tmp_path):
    output = tmp_path / "out"
    compared = compare_explorers(comparison(root, output), progress=False)
    figures = compared.figures()
    assert figures["uniform_cells"] > figures["still_cells"]
    assert figures["uniform_entropy"] > figures["still_entropy"]
    assert json.loads((output / "summary.json").read_text())["figures"] == pytest.approx(figures)
    with (output / "coverage.csv").open() as file:
        cells = [int(row["occupied_cells"]) for row in csv.DictReader(file) if row["set"] == "uniform"]
    assert np.mean(cells) == figures["uniform_cells"]
    with (output / "returns.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if (row["set"], row["task"]) == ("still", "cartpole_balance")]
    assert len(rows) == 8
    assert float(rows[3]["return"]) == pytest.approx(compared.returns["still"]["cartpole_balance"][3], rel=1e-4)
    assert "| cartpole_swingup_sparse | still | 8 |" in (output / "table.md").read_text()
    for picture in ("coverage.png", "returns.png", "still/returns.png"):
        assert (output / picture).read_bytes().startswith(b"\x89PNG")
    assert (output / "uniform" / "card.md").exists()
    assert str(root) not in (output / "summary.json").read_text()


def test_results_are_not_overwritten_unasked(root, tmp_path):
    (tmp_path / "table.md").write_text("mine")
    with pytest.raises(FileExistsError, match=r"table\.md already"):
        compare_explorers(comparison(root, tmp_path), progress=False)
    assert (tmp_path / "table.md").read_text() == "mine"


def test_a_missing_set_says_how_to_collect_it(root, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"collect\.py task=cartpole_balance explorer=rnd algorithm=rnd"):
        compare_explorers(comparison(root, tmp_path, algorithms=("uniform", "rnd")), progress=False)
    with pytest.raises(ValueError, match="holds 8 episodes, fewer than 9; set episodes=8"):
        compare_explorers(comparison(root, tmp_path, episodes=9), progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"domain": "moon"}, "unknown domain 'moon'"),
        ({"algorithms": ("uniform",)}, "at least two sets"),
        ({"algorithms": ("uniform", "uniform")}, "none twice"),
        ({"episodes": 1}, "episodes must be at least 2 or null"),
        ({"stride": 0}, "stride must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_bad_settings_are_refused(root, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        comparison(root, tmp_path, **changes)


def test_the_configuration_is_whole():
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        config = from_mapping(ComparisonConfig, resolve(compose("compare_explorers", overrides=["domain=walker"])))
    assert config.output == Path("experiments/results/exploration/walker")


@pytest.mark.parametrize("domain", ["cartpole", "cheetah", "jaco", "walker"])
def test_rnd_covers_more_than_uniform_actions_in_the_results(domain):
    """Of the committed results: the least of rnd's resamples exceeds the greatest of uniform's, by both figures."""
    with (REPOSITORY / "experiments" / "results" / "exploration" / domain / "coverage.csv").open() as file:
        rows = list(csv.DictReader(file))
    for figure in ("occupied_cells", "particle_entropy"):
        least = min(float(row[figure]) for row in rows if row["set"] == "rnd")
        assert least > max(float(row[figure]) for row in rows if row["set"] == "uniform")
