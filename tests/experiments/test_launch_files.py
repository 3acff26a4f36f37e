"""The launch files, run against stand-ins for a cluster's commands; what they would start is composed."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

from ring_rl.config import from_mapping
from ring_rl.hydra_config import resolve

REPOSITORY = Path(__file__).parents[2]
LAUNCH_FILES = REPOSITORY / "experiments" / "launch_files"
SCRIPTS = ("slurm.sbatch", "tpu_pod.sh")


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """`cluster(script, *arguments, **environment)` runs a script; the stand-ins write down how they are called."""

    def stand_in(name, exit_code):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@" >> {tmp_path}/calls\nexit {exit_code}\n')
        path.chmod(0o755)

    def run(script, *arguments, exit_code=0, **environment):
        for name in ("srun", "gcloud"):
            stand_in(name, exit_code)
        stand_in("scontrol", 0)
        finished = subprocess.run(
            ["bash", LAUNCH_FILES / script, *arguments],
            env={"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", **environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        calls = tmp_path / "calls"
        called = calls.read_text().splitlines() if calls.exists() else []
        calls.unlink(missing_ok=True)
        return finished, called

    return run


@pytest.fixture
def composed(load_script):
    """The configuration that these overrides of experiments/train_agent.py make."""

    def build(overrides):
        with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
            resolved = resolve(compose("train_agent", overrides=overrides))
        resolved.pop("experiment", None)
        return from_mapping(load_script("train_agent").TrainAgentConfig, resolved)

    return build


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_parse_and_shellcheck_finds_nothing(script):
    subprocess.run(["bash", "-n", LAUNCH_FILES / script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", LAUNCH_FILES / script], check=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_in_a_header_composes(script, composed):
    """The examples that people copy."""
    header = [line for line in (LAUNCH_FILES / script).read_text().splitlines() if line.startswith("#  ")]
    examples = [re.findall(r"\S+=\S+", line.split("#", 1)[1]) for line in header if "export" not in line]
    examples = [[each for each in example if not each.startswith("--")] for example in examples]
    assert any(examples)
    for example in examples:
        composed(example)


SLURM = {"SLURM_SUBMIT_DIR": str(REPOSITORY), "SLURM_JOB_ID": "7"}


def test_slurm_starts_one_process_a_node_with_the_overrides_as_they_are(cluster, composed):
    finished, called = cluster(
        "slurm.sbatch", "seed=3", "agent.hidden_widths=[8, 8]", "agent=behaviour_cloning", **SLURM
    )
    assert finished.returncode == 0, finished.stderr
    assert called[:4] == ["srun", "--kill-on-bad-exit=0", ".venv/bin/python", "experiments/train_agent.py"]
    config = composed(called[4:])
    assert config.distributed.mode == "auto"
    assert config.distributed.local_devices == "all"
    assert config.seed == 3
    assert "scontrol" not in called


@pytest.mark.parametrize("exit_code", [130, 143])
def test_slurm_requeues_a_run_that_was_told_to_stop(cluster, exit_code):
    finished, called = cluster("slurm.sbatch", exit_code=exit_code, **SLURM)
    assert finished.returncode == exit_code
    assert called[-3:] == ["scontrol", "requeue", "7"]


@pytest.mark.parametrize(("exit_code", "restarts"), [(1, "0"), (137, "0"), (130, "100")])
def test_slurm_does_not_requeue_errors_nor_without_end(cluster, exit_code, restarts):
    finished, called = cluster("slurm.sbatch", exit_code=exit_code, SLURM_RESTART_COUNT=restarts, **SLURM)
    assert finished.returncode == exit_code
    assert "scontrol" not in called


def test_slurm_asks_to_be_told_before_the_time_limit():
    options = re.findall(r"^#SBATCH (\S+)$", (LAUNCH_FILES / "slurm.sbatch").read_text(), re.MULTILINE)
    # Without B: the signal goes to the processes, not to the script.
    assert {"--signal=TERM@120", "--requeue", "--ntasks-per-node=1"} <= set(options)


TPU = {"TPU": "slice", "ZONE": "zone"}


def test_tpu_hosts_get_the_overrides_through_their_shell(cluster, composed):
    overrides = ["run_dir=/shared/a b", "agent=behaviour_cloning", "agent.hidden_widths=[8, 8]", "wandb.name=${task}"]
    finished, called = cluster("tpu_pod.sh", "run", *overrides, **TPU)
    assert finished.returncode == 0, finished.stderr
    assert called[:7] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "slice", "--zone=zone"]
    assert called[7] == "--worker=all"
    words = shlex.split(called[8].removeprefix("--command="))
    assert words[:6] == ["cd", "ring_rl", "&&", "exec", ".venv/bin/python", "experiments/train_agent.py"]
    assert words[7:] == overrides
    config = composed(words[6:])
    assert config.distributed.mode == "auto"
    assert config.wandb.name == "cartpole_swingup"


@pytest.mark.parametrize("action", ["setup", "stop"])
def test_what_tpu_hosts_are_told_is_a_script(cluster, action):
    finished, called = cluster("tpu_pod.sh", action, REPOSITORY="https://example.org/a b", **TPU)
    assert finished.returncode == 0, finished.stderr
    told = called[8].removeprefix("--command=")
    subprocess.run(["bash", "-n", "-c", told], check=True)
    assert ("git clone" in told) == (action == "setup")


@pytest.mark.parametrize(
    ("arguments", "environment", "complaint"),
    [
        ([], TPU, "error: unknown action ''; it is one of setup, run, stop"),
        (["go"], TPU, "error: unknown action 'go'"),
        (["run", "seed=1"], TPU, "error: no run_dir; give run_dir="),
        (["run", "run_dir=x"], {"TPU": "slice"}, "error: TPU and ZONE are not set"),
        (["setup"], TPU, "error: REPOSITORY is not set"),
    ],
)
def test_tpu_pod_refuses_in_one_line(cluster, arguments, environment, complaint):
    finished, called = cluster("tpu_pod.sh", *arguments, **environment)
    assert finished.returncode == 1
    assert finished.stderr.startswith(complaint)
    assert finished.stderr.count("\n") == 1
    assert called == []


def test_kubernetes_job_has_what_jax_recognises_it_by(composed):
    """jax/_src/clusters/k8s_cluster.py: an indexed Job whose subdomain is a headless service that selects its pods."""
    parts = {part["kind"]: part for part in yaml.safe_load_all((LAUNCH_FILES / "kubernetes.yaml").read_text())}
    job, service, role = parts["Job"], parts["Service"], parts["Role"]
    pod = job["spec"]["template"]["spec"]
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["completions"] == job["spec"]["parallelism"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    allowed = {(resource, verb) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]}
    assert allowed >= {("pods", "list"), ("services", "list"), ("jobs", "get")}
    [subject] = parts["RoleBinding"]["subjects"]
    assert subject["name"] == pod["serviceAccountName"] == parts["ServiceAccount"]["metadata"]["name"]
    assert parts["RoleBinding"]["roleRef"]["name"] == role["metadata"]["name"]
    # A policy for failed pods needs pods that are not started again in place.
    assert pod["restartPolicy"] == "Never"
    [container] = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    program, script, *overrides = container["command"]
    assert (program, script) == ("python", "experiments/train_agent.py")
    config = composed(overrides)
    assert config.distributed.mode == "auto"
    assert str(config.run_dir).startswith("/shared/")
    assert str(config.data.root).startswith("/shared/")
