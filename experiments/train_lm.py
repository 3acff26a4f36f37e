"""Trains a language model, new or pretrained, in stages; conf/train_lm.yaml documents every key."""

import dataclasses
from pathlib import Path

import hydra
from omegaconf import DictConfig

from ring_rl.config import exit_on_bad_input, from_mapping, to_mapping
from ring_rl.hydra_config import resolve, run_entry_point
from ring_rl.lm.stages import StageConfig, make_stages
from ring_rl.lm.start import StartConfig, start_from
from ring_rl.lm.training_data import TrainingDataConfig, data_places, open_training_data, vocabulary_size
from ring_rl.lm.training_task import LANGUAGE_MAY_DIFFER, LossConfig
from ring_rl.training.distributed import DistributedConfig, is_main_process, joined
from ring_rl.training.input import InputConfig
from ring_rl.training.loop import LoopIntervals
from ring_rl.training.mesh import MeshConfig, describe_mesh, request_virtual_devices
from ring_rl.training.metrics import WandbConfig
from ring_rl.training.optimizer import OptimizerConfig
from ring_rl.training.parallel_config import LaidOutParallelConfig, make_parallel
from ring_rl.training.run import MAY_DIFFER
from ring_rl.training.staged_run import StagedRunConfig, run_stages


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainLmConfig:
    """Everything one training run is made of."""

    label: str
    seed: int
    run_dir: Path
    dry_run: bool
    device_memory_gib: float | None
    profile: bool
    virtual_devices: int
    model: StartConfig
    training_data: TrainingDataConfig
    stages: dict[str, StageConfig]
    loss: LossConfig
    optimizer: OptimizerConfig
    input: InputConfig
    mesh: MeshConfig
    parallel: LaidOutParallelConfig
    distributed: DistributedConfig
    loop: LoopIntervals
    wandb: WandbConfig


def train_lm(config: TrainLmConfig, resolved: dict) -> None:
    """Trains all stages, from the last checkpoint if the run folder has one."""
    request_virtual_devices(config.virtual_devices)
    parallel = make_parallel(config.mesh, config.parallel, layout=config.parallel.layout)
    start = start_from(
        config.model,
        parallel=parallel,
        vocabulary_size=lambda tokenizer: vocabulary_size(config.training_data, tokenizer),
    )
    stages = make_stages(
        config.stages,
        start.config,
        open_training_data(config.training_data, start.tokenizer, progress=is_main_process()),
        start.tokenizer,
        optimizer=config.optimizer,
        loss=config.loss,
        parallel=parallel,
        seed=config.seed,
        extra={
            "label": config.label,
            "seed": config.seed,
            "training_data": to_mapping(config.training_data),
            "model": to_mapping(config.model),
        },
    )
    finished = run_stages(
        stages,
        StagedRunConfig(
            run_dir=config.run_dir,
            seed=config.seed,
            dry_run=config.dry_run,
            device_memory_gib=config.device_memory_gib,
            loop=config.loop,
            input=config.input,
            wandb=config.wandb,
        ),
        resolved=resolved,
        may_differ=(
            *MAY_DIFFER,
            *LANGUAGE_MAY_DIFFER,
            *data_places(config.training_data, path="training_data"),
            *(f"stages.{name}.accumulation_steps" for name in config.stages),
        ),
        headline=f"{config.label}: {describe_mesh(parallel.mesh)}, {config.parallel.layout} layout",
        initial_parameters=start.parameters,
    )
    if finished is not None and is_main_process():
        tokens = sum(stage.tokens for stage in finished.stages)
        print(
            f"label={config.label} seed={config.seed} steps={finished.steps} parameters={finished.parameters} "
            f"tokens={tokens} ring_size={parallel.ring_size} "
            f"collective_permutes={finished.compiled['collective_permutes']} seconds={finished.seconds:.1f}"
        )


@hydra.main(config_path="../conf", config_name="train_lm", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Turns the composed configuration into a run."""
    with exit_on_bad_input():
        resolved = resolve(cfg)
        config = from_mapping(TrainLmConfig, resolved)
        with joined(config.distributed):
            train_lm(config, resolved)


if __name__ == "__main__":
    run_entry_point(main)
