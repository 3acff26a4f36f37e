"""Writes a language model as Hugging Face's transformers loads it.

conf/export_lm.yaml documents every key.
"""

import dataclasses
from pathlib import Path

import hydra
from omegaconf import DictConfig

from ring_rl.config import exit_on_bad_input, from_mapping
from ring_rl.hydra_config import resolve, run_entry_point
from ring_rl.lm.load_model import ModelSource, load_model
from ring_rl.lm.pretrained.safetensors_out import StoredType, check_export, save_pretrained
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.training.mesh import MeshConfig, make_mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What goes where."""

    model: ModelSource
    output: Path
    dtype: StoredType
    shard_bytes: int
    with_tokenizer: bool


def export(config: ExportConfig) -> None:
    """Loads, writes, says what is there."""
    check_export(config.output)
    mesh = make_mesh(MeshConfig(dp=1, fsdp=1, tp=1, sp=1))
    loaded = load_model(config.model, SequenceParallel(mesh=mesh, layout="contiguous"))
    tokenizer = loaded.tokenizer if config.with_tokenizer else None
    save_pretrained(
        loaded.model, config.output, tokenizer=tokenizer, dtype=config.dtype, shard_bytes=config.shard_bytes
    )
    files = sorted(path.name for path in config.output.iterdir())
    print(f"{config.output}: {', '.join(files)}")


@hydra.main(config_path="../conf", config_name="export_lm", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Turns the composed configuration into an export."""
    with exit_on_bad_input():
        export(from_mapping(ExportConfig, resolve(cfg)))


if __name__ == "__main__":
    run_entry_point(main)
