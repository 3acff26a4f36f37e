from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import ring_rl
from ring_rl.training.checkpoint import BestCheckpoints, Checkpointer, load_for_evaluation
from ring_rl.training.mesh import MeshConfig, make_mesh
from ring_rl.training.state import TrainState, create_state

MODEL_CONFIG = {"layers": 2, "width": 8, "rotary": {"base": 10000.0}}
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


class Mlp(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, *, width: int = 8):
        self.layers = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(width, 1, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        for layer in self.layers:
            inputs = nnx.tanh(layer(inputs))
        return self.head(inputs)


def make_state(*, seed: int = 0, sp: int = 8, optimizer=OPTIMIZER, width: int = 8) -> TrainState:
    mesh = make_mesh(MeshConfig(dp=1, fsdp=1, tp=1, sp=sp))
    return create_state(lambda rngs: Mlp(rngs, width=width), optimizer, seed=seed, mesh=mesh)[1]


def at_step(state: TrainState, step: int) -> TrainState:
    return dataclasses.replace(state, step=jax.device_put(jnp.int32(step), state.step.sharding))


def open_checkpointer(folder: pathlib.Path, *, keep: int = 2, model_config: dict = MODEL_CONFIG) -> Checkpointer:
    return Checkpointer(folder, keep=keep, model_config=model_config, extra={"token_layout": "rsa"})


def assert_same(actual: TrainState, expected: TrainState) -> None:
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(actual), jax.device_get(expected))


@pytest.mark.parametrize("optimizer", [OPTIMIZER, optax.sgd(1.0)], ids=["adamw", "without_state"])
def test_state_comes_back_on_another_mesh(tmp_path, optimizer):
    state = at_step(make_state(optimizer=optimizer, sp=8), 7)
    with open_checkpointer(tmp_path) as checkpointer:
        assert checkpointer.save(state)
    like = make_state(optimizer=optimizer, seed=1, sp=2)
    with open_checkpointer(tmp_path) as checkpointer:
        restored, metadata = checkpointer.restore_latest(like)
    assert_same(restored, state)
    for leaf, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
        assert leaf.sharding == expected.sharding
        assert leaf.dtype == expected.dtype
    assert metadata.step == 7
    assert metadata.model_config == MODEL_CONFIG
    assert metadata.extra == {"token_layout": "rsa"}
    assert metadata.ring_rl_version == ring_rl.__version__


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    advance = jax.jit(
        lambda state: dataclasses.replace(state, parameters=jax.tree.map(lambda x: x + 1, state.parameters)),
        donate_argnums=0,
    )
    state = at_step(make_state(width=256), 1)
    expected = jax.device_get(state)
    with open_checkpointer(tmp_path) as checkpointer:
        checkpointer.save(state)
        for _ in range(5):
            state = advance(state)
        jax.block_until_ready(state)
        restored, _ = checkpointer.restore_latest(state)
    assert_same(restored, expected)


def test_only_the_last_few_are_kept(tmp_path):
    state = make_state(sp=1)
    with open_checkpointer(tmp_path, keep=2) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(at_step(state, step))
        checkpointer.wait()
        assert checkpointer.latest_step() == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


def test_a_checkpoint_is_never_overwritten(tmp_path):
    first, second = make_state(seed=0, sp=1), make_state(seed=1, sp=1)
    with open_checkpointer(tmp_path) as checkpointer:
        assert checkpointer.save(first)
        assert not checkpointer.save(second)
        assert_same(checkpointer.restore_latest(second)[0], first)


def test_without_a_checkpoint_the_folder_is_named(tmp_path):
    with (
        open_checkpointer(tmp_path) as checkpointer,
        pytest.raises(FileNotFoundError, match=re.escape(f"no checkpoint in {tmp_path}; train first")),
    ):
        checkpointer.restore_latest(make_state(sp=1))
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        load_for_evaluation(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint folder"):
        load_for_evaluation(tmp_path / "absent")


def test_another_model_is_refused_key_by_key(tmp_path):
    with open_checkpointer(tmp_path) as checkpointer:
        checkpointer.save(make_state(sp=1))
    other = {**MODEL_CONFIG, "layers": 4, "rotary": {"base": 5e5}}
    message = "layers: saved 2, wanted 4; rotary.base: saved 10000.0, wanted 500000.0; build the model as it was"
    with (
        open_checkpointer(tmp_path, model_config=other) as checkpointer,
        pytest.raises(ValueError, match=re.escape(message)),
    ):
        checkpointer.restore_latest(make_state(sp=1))


def test_what_may_differ_of_the_model_does_not_keep_it_from_going_on(tmp_path):
    state = make_state(sp=1)
    with open_checkpointer(tmp_path) as checkpointer:
        checkpointer.save(state)
    other = {**MODEL_CONFIG, "rotary": {"base": 5e5}}
    with Checkpointer(tmp_path, keep=2, model_config=other, may_differ=("rotary.base",)) as checkpointer:
        assert_same(checkpointer.restore_latest(make_state(sp=1, seed=1))[0], state)


def test_what_a_killed_process_left_is_ignored_and_cleared(tmp_path):
    with open_checkpointer(tmp_path) as checkpointer:
        checkpointer.save(at_step(make_state(sp=1), 3))
    half_written = tmp_path / "9.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "3", half_written)
    assert load_for_evaluation(tmp_path)[0].step == 3
    assert half_written.exists(), "reading changed the folder"
    with open_checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() == 3
        checkpointer.save(at_step(make_state(sp=1), 4))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]


def test_a_tuple_is_the_list_that_it_becomes(tmp_path):
    config = {**MODEL_CONFIG, "axes": ("dp", "sp")}
    with open_checkpointer(tmp_path, model_config=config) as checkpointer:
        checkpointer.save(make_state(sp=1))
        assert checkpointer.restore_latest(make_state(sp=1))[1].model_config["axes"] == ["dp", "sp"]
    with pytest.raises(ValueError, match="model_config must be plain JSON"):
        open_checkpointer(tmp_path, model_config={"dtype": jnp.float32})


def test_other_shapes_and_another_optimizer_are_refused_by_name(tmp_path):
    with open_checkpointer(tmp_path) as checkpointer:
        checkpointer.save(make_state(sp=1))
        message = "parameters.head.kernel: saved 'float32[8, 1]', wanted 'float32[4, 1]'"
        with pytest.raises(ValueError, match=re.escape(message)):
            checkpointer.restore_latest(make_state(sp=1, width=4))
        with pytest.raises(ValueError, match=r"training\.optimizer\.1\.0\.count: saved 'int32\[\]', not wanted"):
            checkpointer.restore_latest(make_state(sp=1, optimizer=optax.sgd(1.0)))


def test_evaluation_reads_numpy_parameters(tmp_path):
    state = make_state()
    with open_checkpointer(tmp_path) as checkpointer:
        checkpointer.save(at_step(state, 3))
        checkpointer.save(at_step(make_state(seed=1), 5))
    metadata, parameters = load_for_evaluation(tmp_path, step=3)
    assert metadata.step == 3
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(parameters))
    model = Mlp(nnx.Rngs(9))
    graphdef, target = nnx.split(model, nnx.Param)
    nnx.replace_by_pure_dict(target, parameters)
    inputs = jnp.ones((1, 8), jnp.float32)
    expected = nnx.merge(graphdef, jax.device_get(state.parameters))(inputs)
    np.testing.assert_array_equal(nnx.merge(graphdef, target)(inputs), expected)
    assert load_for_evaluation(tmp_path)[0].step == 5
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 4 in .*; choose one of 3, 5"):
        load_for_evaluation(tmp_path, step=4)


def test_evaluation_needs_no_device_of_the_training_and_writes_nothing(tmp_path):
    best = BestCheckpoints(metric="loss", mode="min", keep=1)
    with Checkpointer(tmp_path, keep=1, model_config={}, best=best) as checkpointer:
        checkpointer.save(make_state(sp=8), metrics={"loss": 1.0})
    before = sorted(path for path in tmp_path.rglob("*"))
    source = (
        "import sys, jax, pathlib; from ring_rl.training.checkpoint import load_for_evaluation\n"
        "assert jax.device_count() == 1\n"
        "metadata, parameters = load_for_evaluation(pathlib.Path(sys.argv[1]))\n"
        "print(parameters['layers'][1]['kernel'].shape)"
    )
    result = subprocess.run(
        [sys.executable, "-c", source, str(tmp_path)],
        env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert (result.stdout, result.stderr) == ("(8, 8)\n", "")
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_a_damaged_checkpoint_is_named_with_a_remedy(tmp_path):
    with open_checkpointer(tmp_path) as checkpointer:
        checkpointer.save(at_step(make_state(sp=1), 4))
    shutil.rmtree(tmp_path / "4" / "training")
    with (
        open_checkpointer(tmp_path) as checkpointer,
        pytest.raises(ValueError, match=r"/4 cannot be read .*; move that folder away to fall back") as caught,
    ):
        checkpointer.restore_latest(make_state(sp=1))
    assert "\n" not in str(caught.value)


def rewrite_metadata(checkpoint: pathlib.Path, change) -> None:
    file = checkpoint / "metadata" / "metadata"
    mapping = json.loads(file.read_text())
    change(mapping)
    file.write_text(json.dumps(mapping))


def test_another_format_is_refused(tmp_path):
    with open_checkpointer(tmp_path) as checkpointer:
        checkpointer.save(make_state(sp=1))
    rewrite_metadata(tmp_path / "0", lambda mapping: mapping.update(format_version=99))
    with pytest.raises(ValueError, match="has format 99, this ring_rl goes on from 2; use ring_rl"):
        load_for_evaluation(tmp_path)


def test_the_first_format_can_be_evaluated_and_not_gone_on_from(tmp_path):
    state = make_state(sp=1)
    with open_checkpointer(tmp_path) as checkpointer:
        checkpointer.save(state)

    def age(mapping: dict) -> None:
        mapping["format_version"] = 1
        for name in ("input_state", "recent_losses", "best"):
            del mapping[name]

    rewrite_metadata(tmp_path / "0", age)
    metadata, parameters = load_for_evaluation(tmp_path)
    assert metadata.model_config == MODEL_CONFIG
    np.testing.assert_array_equal(parameters["head"]["kernel"], state.parameters["head"]["kernel"].get_value())
    with (
        open_checkpointer(tmp_path) as checkpointer,
        pytest.raises(ValueError, match="has format 1, this ring_rl goes on from 2"),
    ):
        checkpointer.restore_latest(state)


def test_the_input_state_comes_back(tmp_path):
    with open_checkpointer(tmp_path) as checkpointer:
        checkpointer.save(make_state(sp=1), input_state={"next_step": 3, "epochs": (1, 2)}, recent_losses=[0.1, 0.7])
        metadata = checkpointer.restore_latest(make_state(sp=1))[1]
        assert metadata.input_state == {"next_step": 3, "epochs": [1, 2]}
        assert metadata.recent_losses == [0.1, 0.7]
        with pytest.raises(ValueError, match="input_state must be plain JSON"):
            checkpointer.save(at_step(make_state(sp=1), 1), input_state={"key": jnp.ones(2)})


def test_arrays_are_laid_out_as_asked_for_whatever_wrote_them(tmp_path):
    """One array cut in 8, another whole on each device; they come back cut in 2 another way, and the reverse."""
    values = {"cut": jnp.arange(64.0).reshape(8, 8), "whole": jnp.arange(8, dtype=jnp.bfloat16)}

    def placed(mesh_size: int, specs: dict[str, PartitionSpec]) -> TrainState:
        mesh = make_mesh(MeshConfig(dp=1, fsdp=mesh_size, tp=1, sp=1))
        arrays = {name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in values.items()}
        return TrainState(jax.device_put(jnp.int32(1), NamedSharding(mesh, PartitionSpec())), arrays, {})

    saved = placed(8, {"cut": PartitionSpec("fsdp"), "whole": PartitionSpec()})
    like = placed(2, {"cut": PartitionSpec(None, "fsdp"), "whole": PartitionSpec("fsdp")})
    with open_checkpointer(tmp_path) as checkpointer:
        checkpointer.save(saved)
        restored, _ = checkpointer.restore_latest(jax.tree.map(jnp.zeros_like, like))
    assert_same(restored, saved)
    for name in values:
        assert restored.parameters[name].sharding == like.parameters[name].sharding
        assert restored.parameters[name].dtype == values[name].dtype
    assert [shard.data.shape for shard in restored.parameters["cut"].addressable_shards] == [(8, 4)] * 2


@given(
    losses=st.lists(st.sampled_from([1.0, 2.0, 3.0, float("nan"), None]), min_size=1, max_size=6),
    mode=st.sampled_from(["min", "max"]),
    keep=st.integers(1, 2),
    keep_best=st.integers(1, 2),
)
@settings(max_examples=8)
def test_the_newest_and_the_best_stay(tmp_path_factory, losses, mode, keep, keep_best):
    folder = tmp_path_factory.mktemp("checkpoints")
    best = BestCheckpoints(metric="loss", mode=mode, keep=keep_best)
    state = jax.device_put(TrainState(jnp.int32(0), {"x": jnp.zeros(2)}, {}), jax.devices()[0])
    sign = -1 if mode == "min" else 1
    ranked = []
    for step, loss in enumerate(losses, start=1):
        # Opened again for every save, as by a run that is interrupted again and again.
        with Checkpointer(folder, keep=keep, model_config={}, best=best) as checkpointer:
            checkpointer.save(at_step(state, step), metrics={} if loss is None else {"loss": loss, "other": 0.0})
            checkpointer.wait()
            if loss is not None and np.isfinite(loss):
                ranked = sorted([*ranked, (sign * loss, step)])
            expected = {step for _, step in ranked[-keep_best:]} | set(range(max(step - keep, 0) + 1, step + 1))
            present = {int(path.name) for path in folder.iterdir()}
            # Where too few have the metric, others may stay in their place.
            assert expected <= present
            assert len(present) <= keep + keep_best
            if len(ranked) >= keep_best:
                assert present == expected
            assert checkpointer.best_step() == (ranked[-1][1] if ranked else None)
    if ranked:
        assert load_for_evaluation(folder, step="best")[0].step == ranked[-1][1]
    else:
        with pytest.raises(FileNotFoundError, match=r"no checkpoint in .* has a value of loss; choose a step"):
            load_for_evaluation(folder, step="best")


def test_the_best_of_a_run_that_kept_none_is_refused(tmp_path):
    with open_checkpointer(tmp_path) as checkpointer:
        checkpointer.save(make_state(sp=1), metrics={"loss": 1.0})
        assert checkpointer.best_step() is None
    with pytest.raises(ValueError, match="kept no best checkpoint; train with best_metric, or choose a step"):
        load_for_evaluation(tmp_path, step="best")


SAVE_IN_A_LOOP = """
import dataclasses, pathlib, sys
import jax, jax.numpy as jnp, optax
from flax import nnx
from ring_rl.training.checkpoint import Checkpointer
from ring_rl.training.state import TrainState

with Checkpointer(pathlib.Path(sys.argv[1]), keep=2, model_config={}) as checkpointer:
    step = (checkpointer.latest_step() or 0) + 1
    while True:
        arrays = {str(index): jnp.full((64, 64), float(step)) for index in range(40)}
        checkpointer.save(TrainState(jnp.int32(step), arrays, {}))
        print(step, flush=True)
        step += 1
"""


def test_a_save_cut_short_by_sigkill_never_counts(tmp_path):
    half_written = 0
    for delay in (0.0, 0.02):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_IN_A_LOOP, str(tmp_path)],
            env={**os.environ, "XLA_FLAGS": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout is not None
        for _ in range(3):
            assert process.stdout.readline(), "the saving process died"
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        half_written += sum("tmp" in path.name for path in tmp_path.iterdir())
        metadata, arrays = load_for_evaluation(tmp_path)
        assert all(np.all(array == metadata.step) for array in arrays.values())
    # Killed right after `save` returned, while the background thread was writing.
    assert half_written > 0
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.device_put(TrainState(jnp.int32(0), {str(i): jnp.zeros((64, 64)) for i in range(40)}, {}), sharding)
    with Checkpointer(tmp_path, keep=2, model_config={}) as checkpointer:
        restored, metadata = checkpointer.restore_latest(like)
        assert int(restored.step) == metadata.step >= 4
        assert checkpointer.save(at_step(restored, metadata.step + 1))
    assert not [path for path in tmp_path.iterdir() if "tmp" in path.name]


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, size: str) -> Iterator[None]:
    """A real file system of that size, where this process may mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = shutil.which("mount") and subprocess.run(command, capture_output=True).returncode == 0
    if not mounted:
        pytest.skip("mounting a small tmpfs needs root; the test with injected faults covers the same error")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill_until_it_fails(folder: pathlib.Path, state: TrainState) -> tuple[OSError, int]:
    """The error of the first save that does not fit, and the step of the last one that did."""

    def fill() -> None:
        with open_checkpointer(folder, keep=99) as checkpointer:
            for step in range(99):
                checkpointer.save(at_step(state, step))
                checkpointer.wait()

    with pytest.raises(OSError, match="no space left") as caught:
        fill()
    saved = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    return caught.value, saved[-1]


def test_a_full_disk_leaves_the_earlier_checkpoints_intact(tmp_path):
    with small_disk(tmp_path / "disk", "3m"):
        folder = tmp_path / "disk" / "checkpoints"
        state = make_state(sp=1, width=160)
        error, last = fill_until_it_fails(folder, state)
        assert error.errno == errno.ENOSPC
        assert error.filename == str(folder)
        assert f"that of step {last} is intact" in str(error)
        assert "\n" not in str(error)
        with open_checkpointer(folder) as checkpointer:
            assert_same(checkpointer.restore_latest(state)[0], at_step(state, last))


UNTIL_THE_DISK_IS_FULL = """
import dataclasses, pathlib, sys
import jax.numpy as jnp
from ring_rl.config import exit_on_bad_input
from ring_rl.training.checkpoint import Checkpointer
from ring_rl.training.state import TrainState

with exit_on_bad_input(), Checkpointer(pathlib.Path(sys.argv[1]), keep=99, model_config={}) as checkpointer:
    for step in range(99):
        arrays = {str(index): jnp.full((32, 32), float(step + index)) for index in range(60)}
        checkpointer.save(TrainState(jnp.int32(step), arrays, {}))
"""


def test_the_user_sees_a_full_disk_as_one_line(tmp_path):
    with small_disk(tmp_path / "disk", "600k"):
        command = [sys.executable, "-c", UNTIL_THE_DISK_IS_FULL, str(tmp_path / "disk")]
        environment = {**os.environ, "XLA_FLAGS": ""}
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("error: [Errno 28] no space left to save a checkpoint (")
    assert result.stderr.count("\n") == 1, result.stderr


def test_a_writer_that_reports_no_space_is_explained(tmp_path, monkeypatch):
    # The words of the array writer, which knows no errno.
    fault = ValueError("RESOURCE_EXHAUSTED: Failed to write 64 bytes: No space left on device [os_error_code='28']")
    with open_checkpointer(tmp_path) as checkpointer:
        checkpointer.save(at_step(make_state(sp=1), 1))
        checkpointer.wait()
        with monkeypatch.context() as patch:
            patch.setattr(checkpointer._manager, "save", lambda *_, **__: (_ for _ in ()).throw(fault))
            with pytest.raises(OSError, match=r"that of step 1 is intact\); free some space") as caught:
                checkpointer.save(at_step(make_state(sp=1), 2))
            assert caught.value.errno == errno.ENOSPC
            assert caught.value.filename == str(tmp_path)
            patch.setattr(checkpointer._manager, "save", lambda *_, **__: (_ for _ in ()).throw(KeyError("bug")))
            with pytest.raises(KeyError):
                checkpointer.save(at_step(make_state(sp=1), 2))
