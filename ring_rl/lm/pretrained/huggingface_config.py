"""A LLaMA's `config.json`, as transformers 4 and 5 write it, as a model's configuration; and back.

    config.json                                   LanguageModelConfig
    vocab_size                                    vocabulary_size
    tie_word_embeddings                           tied_embedding
    initializer_range                             embedding_scale
    max_position_embeddings                       trained_positions
    num_hidden_layers, hidden_size                transformer.layers, width
    num_attention_heads, num_key_value_heads      query_heads, key_value_heads
    head_dim, intermediate_size, rms_norm_eps     head_dim, feed_forward_width, norm_epsilon
    rope_theta, rope_scaling (4)                  rotary_base, rotary_scaling
    rope_parameters (5)                           both of them

What a key means where it is absent is what transformers takes it for. What changes the function and has no
counterpart here is refused by name.
"""

from collections.abc import Mapping
from typing import Any

from ring_rl.config import from_mapping, to_mapping
from ring_rl.lm.model import LanguageModelConfig
from ring_rl.lm.pretrained.overrides import ModelOverrides
from ring_rl.lm.pretrained.rotary_parameters import rope_scaling, rotary_scaling
from ring_rl.nn.transformer_config import ComputeDtype

_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)
# What each must be, and what transformers takes it for where it is absent.
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}


def language_model_config(
    mapping: Mapping[str, Any], *, where: str, compute_dtype: ComputeDtype, overrides: ModelOverrides
) -> LanguageModelConfig:
    """The configuration of the model that a `config.json` describes.

    Args:
        mapping: Its content.
        where: Its path, for messages.
        compute_dtype: Of activations and matrix products here.
        overrides: What it does not say, and what shall be different.

    Raises:
        ValueError: It is not a LLaMA, a size is missing or impossible, or it asks for what this model does not do.
    """
    _check_architecture(mapping, where)
    missing = [key for key in _SIZES if mapping.get(key) is None]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}; it is not the whole configuration of a LLaMA")
    wrong = [f"{key}={mapping[key]!r}" for key in _SIZES if type(mapping[key]) is not int or mapping[key] < 1]
    if wrong:
        raise ValueError(f"{where} has {', '.join(wrong)}, which must be whole numbers of at least 1")
    width, query_heads = mapping["hidden_size"], mapping["num_attention_heads"]
    head_dim = mapping.get("head_dim")
    if head_dim is None:
        if width % query_heads:
            raise ValueError(f"{where}: hidden_size={width} is no multiple of num_attention_heads={query_heads}")
        head_dim = width // query_heads
    base, scaling = rotary_scaling(mapping, where=where)
    config = {
        "name": "language",
        "vocabulary_size": mapping["vocab_size"],
        "tied_embedding": _or_default(mapping, "tie_word_embeddings", False),
        "embedding_scale": _or_default(mapping, "initializer_range", 0.02),
        "trained_positions": mapping["max_position_embeddings"],
        "transformer": {
            "layers": mapping["num_hidden_layers"],
            "width": width,
            "query_heads": query_heads,
            "key_value_heads": _or_default(mapping, "num_key_value_heads", query_heads),
            "head_dim": head_dim,
            "norm_epsilon": _or_default(mapping, "rms_norm_eps", 1e-6),
            "feed_forward": "swiglu",
            "feed_forward_width": mapping["intermediate_size"],
            "feed_forward_chunks": overrides.feed_forward_chunks,
            "rotary_base": base,
            "rotary_fraction": 1.0,
            "rotary_scaling": scaling,
            "no_position_layers": [],
            "retrieval": None,
            "attention_window": None,
            "attention_block_size": overrides.attention_block_size,
            "saved_activations": overrides.saved_activations,
            "compute_dtype": compute_dtype,
        },
    }
    try:
        return overrides.apply(from_mapping(LanguageModelConfig, config), compute_dtype=compute_dtype)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def config_json(config: LanguageModelConfig, *, dtype: str) -> dict[str, Any]:
    """The `config.json` of a model: transformers 4 reads the rotary keys at its top, 5 those in `rope_parameters`.

    Raises:
        ValueError: The model does what a LLaMA of transformers does not; all of it is named. Or it was not trained, and
            there is no length that it could be said to read.
    """
    if config.trained_positions < 1:
        raise ValueError(
            "a config.json says how many positions a model was trained for, and this one has trained_positions=0; "
            "train it, or give it a configuration with that number"
        )
    transformer = config.transformer
    unlike = {
        "feed_forward": (transformer.feed_forward, "swiglu"),
        "rotary_fraction": (transformer.rotary_fraction, 1.0),
        "no_position_layers": (list(transformer.no_position_layers), []),
        "retrieval": (transformer.retrieval, None),
        "attention_window": (transformer.attention_window, None),
    }
    differing = [f"{key}={value}" for key, (value, llama) in unlike.items() if value != llama]
    if differing:
        raise ValueError(
            f"Hugging Face's LLaMA cannot express this model's transformer.{', transformer.'.join(differing)}; "
            "only plain LLaMA blocks (conf/transformer/llama_*.yaml) can be exported"
        )
    scaling = rope_scaling(to_mapping(transformer)["rotary_scaling"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocabulary_size,
        "hidden_size": transformer.width,
        "num_hidden_layers": transformer.layers,
        "num_attention_heads": transformer.query_heads,
        "num_key_value_heads": transformer.key_value_heads,
        "head_dim": transformer.head_dim,
        "intermediate_size": transformer.feed_forward_width,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": config.trained_positions,
        "rms_norm_eps": transformer.norm_epsilon,
        "initializer_range": config.embedding_scale,
        "tie_word_embeddings": config.tied_embedding,
        "rope_theta": transformer.rotary_base,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": transformer.rotary_base, **(scaling or {"rope_type": "default"})},
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def _check_architecture(mapping: Mapping[str, Any], where: str) -> None:
    architectures = mapping.get("architectures") or ["LlamaForCausalLM"]
    if mapping.get("model_type") != "llama" or "LlamaForCausalLM" not in architectures:
        raise ValueError(
            f"{where} describes a model of type {mapping.get('model_type')!r} ({', '.join(map(str, architectures))}); "
            "only LLaMA's architecture (model_type llama, LlamaForCausalLM) can be loaded"
        )
    refused = [
        f"{key}={mapping[key]!r}" for key, value in _FIXED.items() if mapping.get(key, value) not in (value, None)
    ]
    if refused:
        fixed = ", ".join(f"{key}={value}" for key, value in _FIXED.items())
        raise ValueError(f"{where} asks for {', '.join(refused)}, which is not supported; supported is {fixed}")


def _or_default(mapping: Mapping[str, Any], key: str, default: Any) -> Any:
    return default if mapping.get(key) is None else mapping[key]
