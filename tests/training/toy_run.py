"""A small training with everything a real one has; `python toy_run.py <run> <steps> <seconds a batch>`."""

from __future__ import annotations

import contextlib
import pathlib
import sys
import time

import jax
import numpy as np
from flax import nnx

from ring_rl.config import exit_on_bad_input
from ring_rl.training.checkpoint import Checkpointer
from ring_rl.training.input import InputConfig, RowStream
from ring_rl.training.loop import LoopConfig, train
from ring_rl.training.mesh import MeshConfig, make_mesh
from ring_rl.training.metrics import JsonlWriter
from ring_rl.training.optimizer import AdamWConfig, learning_rate_at, make_optimizer
from ring_rl.training.run_directory import open_run_directory
from ring_rl.training.state import TrainState, create_state
from ring_rl.training.step import Loss, make_train_step

BATCH_SIZE = 4
OPTIMIZER = AdamWConfig(
    name="adamw",
    learning_rate=1e-2,
    weight_decay=0.1,
    beta1=0.9,
    beta2=0.95,
    warmup_steps=3,
    schedule="cosine",
    final_learning_rate_fraction=0.1,
    gradient_clip_norm=1.0,
)


class Mlp(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(3, 16, rngs=rngs)
        self.out = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, inputs_BTF: jax.Array) -> jax.Array:
        return self.out(nnx.tanh(self.hidden(inputs_BTF)))[..., 0]


def noisy_squared_error(model: Mlp, batch: dict, key: jax.Array) -> Loss:
    predicted_BT = model(batch["inputs"]) + 0.1 * jax.random.normal(key, batch["targets"].shape)
    error_BT = (predicted_BT - batch["targets"]) ** 2
    return Loss(error_BT.sum(), jax.numpy.float32(error_BT.size), {})


class Rows:
    """Row i of the data, drawn from a generator of its own; a batch takes `seconds` to make."""

    def __init__(self, seconds: float):
        self._seconds = seconds

    def row(self, index: int) -> dict[str, np.ndarray]:
        time.sleep(self._seconds / BATCH_SIZE)
        inputs = np.random.default_rng(index).normal(size=(8, 3)).astype(np.float32)
        return {"inputs": inputs, "targets": inputs.sum(-1)}


def run(folder: pathlib.Path, *, steps: int = 30, seconds: float = 0.0) -> tuple[TrainState, int]:
    """The final state, and the step that training began at."""
    mesh = make_mesh(MeshConfig(dp=2, fsdp=1, tp=1, sp=4))
    optimizer = make_optimizer(OPTIMIZER, total_steps=steps)
    graphdef, state = create_state(Mlp, optimizer, seed=0, mesh=mesh)
    step_function = make_train_step(
        noisy_squared_error,
        graphdef,
        optimizer,
        mesh,
        seed=0,
        learning_rate=lambda step: learning_rate_at(OPTIMIZER, step, steps),
    )
    config = LoopConfig(
        steps=steps,
        log_every=1,
        checkpoint_every=5,
        keep_checkpoints=2,
        best_metric="loss",
        best_mode="min",
        keep_best=1,
        evaluate_every=None,
        largest_loss_ratio=100.0,
        peak_flops_per_second=None,
        profile=None,
    )
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(open_run_directory(folder, {"steps": steps}))
        checkpointer = stack.enter_context(
            Checkpointer(
                directory.checkpoints,
                keep=config.keep_checkpoints,
                best=config.best_checkpoints,
                model_config={"width": 16},
            )
        )
        batches = RowStream(
            Rows(seconds),
            batch_size=BATCH_SIZE,
            steps=steps,
            mesh=mesh,
            layout="contiguous",
            ring_size=4,
            config=InputConfig(threads=1, prefetch_batches=2),
        )
        stack.callback(batches.close)
        recent_losses: list[float] = []
        if checkpointer.latest_step() is not None:
            state, metadata = checkpointer.restore_latest(state)
            recent_losses = metadata.recent_losses
            assert metadata.input_state is not None
            batches.restore(metadata.input_state)
        start = int(state.step)
        writer = JsonlWriter(directory.metrics, resume_step=start)
        stack.callback(writer.close)
        state = train(
            state=state,
            step_function=step_function,
            batches=batches,
            config=config,
            checkpointer=checkpointer,
            writers=[writer],
            run_folder=directory.path,
            recent_losses=recent_losses,
            progress=False,
        )
    return state, start


if __name__ == "__main__":
    with exit_on_bad_input():
        run(pathlib.Path(sys.argv[1]), steps=int(sys.argv[2]), seconds=float(sys.argv[3]))
