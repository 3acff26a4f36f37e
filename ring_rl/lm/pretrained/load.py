"""Pretrained LLaMAs from disk: a Hugging Face folder of safetensors, or a GGUF file."""

import dataclasses
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from flax import nnx

from ring_rl.lm.model import LanguageModel, LanguageModelConfig
from ring_rl.lm.pretrained.gguf_in import GGUFFile
from ring_rl.lm.pretrained.huggingface_config import language_model_config
from ring_rl.lm.pretrained.overrides import ModelOverrides
from ring_rl.lm.pretrained.parameter_names import check_tensors, read_parameter
from ring_rl.lm.pretrained.placed import abstract_model, parameter_shapes, placed_model
from ring_rl.lm.pretrained.safetensors_in import SafetensorsFolder
from ring_rl.lm.pretrained.tensor_source import TensorSource
from ring_rl.lm.tokenizer.load import FileTokenizerConfig, TokenizerConfig, load_tokenizer
from ring_rl.lm.tokenizer.protocol import Tokenizer
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.nn.transformer_config import ComputeDtype

CONFIG_FILE = "config.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
# Embeddings are padded to round sizes and for tokens to come; more rows than that without a token are a mistake.
_LARGEST_PADDING = 0.01


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model that is ready to be trained on, asked or exported.

    Attributes:
        model: Its parameters are float32, on the mesh it was loaded for; shapes only where no weights were asked for.
        config: What it was built from.
        tokenizer: Its own; None where it came with none.
        origin: Where it is from, plain JSON: the path, and what stands there about it.
    """

    model: LanguageModel
    config: LanguageModelConfig
    tokenizer: Tokenizer | None
    origin: Mapping[str, Any]

    def named_tokenizer(self) -> Tokenizer:
        """Its tokenizer, where it cannot do without.

        Raises:
            ValueError: it came with none.
        """
        if self.tokenizer is None:
            raise ValueError('the model came without a tokenizer; name one: "model.tokenizer={name: file, path: ...}"')
        return self.tokenizer


def load_pretrained(
    path: Path,
    *,
    parallel: SequenceParallel,
    compute_dtype: ComputeDtype,
    overrides: ModelOverrides,
    tokenizer: TokenizerConfig | None = None,
    weights: bool = True,
) -> LoadedModel:
    """A model of LLaMA's architecture.

    Whatever type the weights are stored in, they become float32. Everything about the model is checked before the
    first weight is read.

    Args:
        path: A folder with `config.json` and safetensors, or a `.gguf` file.
        parallel: The mesh; each of its devices gets the part of the weights that it holds in training.
        compute_dtype: Of activations and matrix products.
        overrides: What the files leave open, and what shall be different.
        tokenizer: Which to use instead of the model's own.
        weights: Whether they are read; otherwise shapes stand in their place, and all else is checked.

    Raises:
        FileNotFoundError: There is nothing at `path`, or a part of it is missing.
        ImportError: The library that reads these files is not installed.
        ValueError: It is no LLaMA, asks for what this model does not do, its tensors do not fit its configuration or
            its tokenizer does not fit its vocabulary.
    """
    with _opened(path) as source:
        mapping, where = _configuration(source, path)
        config = language_model_config(mapping, where=where, compute_dtype=compute_dtype, overrides=overrides)
        check_tensors(source, parameter_shapes(config))
        chosen = _tokenizer(source, path, tokenizer)
        check_tokenizer(chosen, config, where=str(path), other_codes=False)
        if weights:
            model = placed_model(config, parallel, partial(read_parameter, source))
        else:
            model = nnx.merge(*abstract_model(config, parallel))
    return LoadedModel(model, config, chosen, {"path": str(path)})


def check_tokenizer(tokenizer: Tokenizer | None, config: LanguageModelConfig, *, where: str, other_codes: bool) -> None:
    """Raises ValueError unless a tokenizer's ids are the rows of the model's embedding.

    A few rows more than ids are usual, as vocabularies are padded; with `other_codes` there may be any number more, for
    codes that are no text.
    """
    if tokenizer is None:
        return
    ids, rows = tokenizer.vocabulary_size, config.vocabulary_size
    if ids > rows:
        raise ValueError(
            f"the tokenizer of {where} has {ids} ids, but the model embeds {rows} tokens only; use the tokenizer that "
            "the model was trained with"
        )
    if rows - ids > _LARGEST_PADDING * rows and not other_codes:
        raise ValueError(
            f"the tokenizer of {where} has {ids} ids, but the model embeds {rows} tokens; use the tokenizer that the "
            "model was trained with"
        )


def _opened(path: Path) -> TensorSource:
    if path.suffix == ".gguf":
        return GGUFFile(path)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {path}; name a model's folder, or a .gguf file")
    if not (path / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{path} holds no {CONFIG_FILE}; name the folder that the model was downloaded to")
    return SafetensorsFolder(path)


def _configuration(source: TensorSource, path: Path) -> tuple[dict[str, Any], str]:
    if isinstance(source, GGUFFile):
        return source.config, str(path)
    file = path / CONFIG_FILE
    try:
        mapping = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no valid JSON ({error}); download it again") from None
    if not isinstance(mapping, dict):
        raise ValueError(f"{file} holds no mapping; download it again")
    return mapping, str(file)


def _tokenizer(source: TensorSource, path: Path, chosen: TokenizerConfig | None) -> Tokenizer | None:
    if chosen is not None:
        return load_tokenizer(chosen)
    if isinstance(source, GGUFFile):
        has_its_own = source.has_tokenizer
    else:
        has_its_own = any((path / name).is_file() for name in _TOKENIZER_FILES)
    return load_tokenizer(FileTokenizerConfig(name="file", path=path)) if has_its_own else None
