"""The rooms of the house and which way its doors open."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
TOP_LEVEL = {"ring_rl", "conf", "datasets", "experiments", "tests", "pyproject.toml", "README.md"}
BESIDE = {"Makefile", "LICENSE", "CITATION.cff", "constraints.txt", "RESULTS.md"}


def tracked_files():
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("the top level is checked from git's list of files, and this is no git checkout")
    return [Path(line) for line in listed.stdout.splitlines()]


def test_top_level_is_the_fixed_one():
    names = {path.parts[0] for path in tracked_files()}
    assert names >= TOP_LEVEL
    assert {name for name in names if not name.startswith(".")} <= TOP_LEVEL | BESIDE


@pytest.mark.parametrize("folder", ["datasets", "experiments", "tests", "conf"])
def test_only_the_library_is_a_package(folder):
    """A package called `datasets` would shadow Hugging Face's."""
    assert not list((REPOSITORY / folder).rglob("__init__.py"))


def test_imports_point_one_way():
    run = subprocess.run(
        [Path(sys.executable).with_name("lint-imports")], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout


def test_import_contracts_can_fail(tmp_path):
    """The contracts see a kernel that reaches up into the library."""
    package = tmp_path / "ring_rl"
    for room in ("kernels", "nn", "training", "agent"):
        (package / room).mkdir(parents=True)
        (package / room / "__init__.py").touch()
    for name in ("__init__", "atomic_file", "config", "typing", "hydra_config"):
        (package / f"{name}.py").touch()
    (package / "kernels" / "bad.py").write_text("import ring_rl.agent\n")
    (tmp_path / "pyproject.toml").write_text((REPOSITORY / "pyproject.toml").read_text())
    run = subprocess.run(
        [Path(sys.executable).with_name("lint-imports")],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "ring_rl.kernels.bad -> ring_rl.agent" in run.stdout


@pytest.mark.parametrize("module", ["ring_rl", "ring_rl.kernels", "ring_rl.nn.transformer", "ring_rl.agent.model"])
def test_importing_starts_nothing(module):
    """No backend is started and no simulator loaded by an import."""
    code = (
        f"import sys, {module}\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
        "assert not {'mujoco', 'dm_control', 'gymnasium'} & set(sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
