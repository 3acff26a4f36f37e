"""A small training with everything a real one has; `python toy_run.py <run> <steps> <seconds a batch>`."""

from __future__ import annotations

import pathlib
import sys
import time

import jax
import numpy as np
from flax import nnx

from ring_rl.training.checkpoint import Checkpointer
from ring_rl.training.loop import LoopConfig, train
from ring_rl.training.mesh import MeshConfig, make_mesh, shard_batch
from ring_rl.training.metrics import JsonlWriter
from ring_rl.training.optimizer import OptimizerConfig, learning_rate_at, make_optimizer
from ring_rl.training.run_directory import open_run_directory
from ring_rl.training.state import TrainState, create_state
from ring_rl.training.step import Loss, make_train_step

OPTIMIZER = OptimizerConfig(
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


def run(folder: pathlib.Path, *, steps: int = 30, seconds: float = 0.0) -> tuple[TrainState, int]:
    """The final state, and the step that training began at."""
    mesh = make_mesh(MeshConfig(dp=2, fsdp=1, tp=1, sp=4))
    optimizer = make_optimizer(OPTIMIZER, total_steps=steps)
    graphdef, state = create_state(Mlp, optimizer, seed=0, mesh=mesh)

    def batch_at(step: int) -> dict:
        time.sleep(seconds)
        inputs = np.random.default_rng(step).normal(size=(4, 8, 3)).astype(np.float32)
        return shard_batch(mesh, {"inputs": inputs, "targets": inputs.sum(-1)})

    step_function = make_train_step(
        noisy_squared_error,
        graphdef,
        optimizer,
        mesh,
        seed=0,
        learning_rate=lambda step: learning_rate_at(OPTIMIZER, step, steps),
    )
    config = LoopConfig(steps=steps, log_every=1, checkpoint_every=5, keep_checkpoints=2, evaluate_every=None)
    with (
        open_run_directory(folder, {"steps": steps}) as directory,
        Checkpointer(directory.checkpoints, keep=2, model_config={"width": 16}) as checkpointer,
    ):
        if checkpointer.latest_step() is not None:
            state, _ = checkpointer.restore_latest(state)
        start = int(state.step)
        writer = JsonlWriter(directory.metrics, resume_step=start)
        state = train(
            state=state,
            step_function=step_function,
            batch_at=batch_at,
            config=config,
            checkpointer=checkpointer,
            writers=[writer],
            progress=False,
        )
        writer.close()
    return state, start


if __name__ == "__main__":
    run(pathlib.Path(sys.argv[1]), steps=int(sys.argv[2]), seconds=float(sys.argv[3]))
