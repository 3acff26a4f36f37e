"""A model out of a training run's checkpoint, laid out for whatever mesh it is wanted on."""

from pathlib import Path
from typing import Literal

import orbax.checkpoint as ocp
from flax import nnx

from ring_rl.config import describe_differences, from_mapping
from ring_rl.lm.model import LanguageModelConfig
from ring_rl.lm.pretrained.load import LoadedModel, check_tokenizer
from ring_rl.lm.pretrained.overrides import ModelOverrides
from ring_rl.lm.pretrained.placed import abstract_model
from ring_rl.lm.tokenizer.load import TokenizerConfig, load_tokenizer, tokenizer_from_mapping
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.nn.transformer_config import ComputeDtype
from ring_rl.training.checkpoint_format import (
    FORMAT_VERSION,
    best_step,
    opened_reader,
    read_metadata,
    saved_tree,
    whole_steps,
)
from ring_rl.training.named_arrays import described_arrays, named_arrays, with_arrays

CHECKPOINTS = "checkpoints"


def load_run(
    run_dir: Path,
    *,
    step: int | Literal["best"] | None,
    parallel: SequenceParallel,
    compute_dtype: ComputeDtype | None,
    overrides: ModelOverrides,
    tokenizer: TokenizerConfig | None = None,
    weights: bool = True,
) -> LoadedModel:
    """A language model as a run of `experiments/train_lm.py` saved it; every device reads the part that it holds.

    Args:
        run_dir: The run's folder, which may still be trained in.
        step: Which checkpoint; None is the newest, "best" the best one that the run kept.
        parallel: The mesh, which need not be that of the training.
        compute_dtype: Of activations and matrix products; None is as trained.
        overrides: What is computed otherwise than in training.
        tokenizer: Which to use instead of the one that the checkpoint holds.
        weights: Whether they are read; otherwise shapes stand in their place, and all else is checked.

    Raises:
        FileNotFoundError: There is no such run or checkpoint.
        ValueError: The checkpoint is of another kind of model or cannot be read, or its tokenizer does not fit.
    """
    checkpoint = _checkpoint(run_dir, step)
    metadata = read_metadata(checkpoint, formats=(FORMAT_VERSION,))
    kind = metadata.model_config.get("name")
    if kind != "language":
        raise ValueError(f"the run {run_dir} trained a model of the kind {kind!r}, not a language model; name another")
    saved = from_mapping(LanguageModelConfig, metadata.model_config, path=f"{checkpoint}: model_config")
    config = overrides.apply(saved, compute_dtype=compute_dtype or saved.transformer.compute_dtype)
    mapping = metadata.extra.get("tokenizer")
    chosen = None if mapping is None else tokenizer_from_mapping(mapping)
    if tokenizer is not None:
        chosen = load_tokenizer(tokenizer)
    check_tokenizer(chosen, config, where=str(run_dir), other_codes=True)
    details = {key: value for key, value in metadata.extra.items() if key != "tokenizer"}
    model = _restored(checkpoint, config, parallel, weights=weights)
    return LoadedModel(model, config, chosen, {"path": str(run_dir), "step": metadata.step, **details})


def _checkpoint(run_dir: Path, step: int | Literal["best"] | None) -> Path:
    folder = run_dir.absolute() / CHECKPOINTS
    steps = whole_steps(folder) if folder.is_dir() else []
    if not steps:
        raise FileNotFoundError(f"no checkpoint below {run_dir}; train first, or name a run that has saved one")
    if step == "best":
        kept = read_metadata(folder / str(steps[-1]), formats=(FORMAT_VERSION,)).best
        step = None if kept is None else best_step(folder, kept["metric"], kept["mode"])
        if step is None:
            raise FileNotFoundError(f"the run {run_dir} kept no best checkpoint; choose a step of {_listed(steps)}")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise FileNotFoundError(f"no checkpoint of step {step} in {run_dir}; choose one of {_listed(steps)}")
    return folder / str(step)


def _restored(checkpoint: Path, config: LanguageModelConfig, parallel: SequenceParallel, *, weights: bool):
    graphdef, abstract = abstract_model(config, parallel)
    wanted = named_arrays(abstract)
    with opened_reader(checkpoint) as reader:
        saved = saved_tree(reader, checkpoint, "parameters")
    differences = describe_differences(described_arrays(saved), described_arrays(wanted))
    if differences:
        shown = "; ".join(differences[:4]) + ("; ..." if len(differences) > 4 else "")
        raise ValueError(f"{len(differences)} arrays of the checkpoint {checkpoint} do not fit its own model: {shown}")
    if not weights:
        return nnx.merge(graphdef, abstract)
    restore = ocp.args.PyTreeRestore(wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted))
    with opened_reader(checkpoint) as reader:
        arrays = reader.restore(checkpoint, args=ocp.args.Composite(parameters=restore))["parameters"]
    return nnx.merge(graphdef, with_arrays(abstract, arrays))


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps))
