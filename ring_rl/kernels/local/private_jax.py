"""The one place that knows private names of jax: its cuDNN attention, whose public face hides what a ring needs.

`jax.nn.dot_product_attention` casts log_sum_exp to the dtype of q and drops its gradient, and cannot differentiate from
a global output; the primitives below it can. They may change in any release, so they are looked up when they are
needed, and whatever is missing or takes other arguments than it used to is reported before it is called.
"""

import dataclasses
import importlib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

# The oldest and the newest release whose source was read; 0.10.2 is the one that was run.
KNOWN_VERSIONS = ("0.10.0", "0.12.0.1")

_MODULE = "jax._src.cudnn.fused_attention_stablehlo"
_COMMON = (
    "query",
    "key",
    "value",
    "bias",
    "q_seqlen",
    "kv_seqlen",
    "q_offsets",
    "kv_offsets",
    "page_table_k",
    "page_table_v",
)
_SETTINGS = ("scale", "seed", "dropout_rate", "variadic_args", "mask_type", "layout", "sliding_window_length")
_SIGNATURES = {
    "_dot_product_attention_fwd_impl": (*_COMMON, *_SETTINGS, "is_training"),
    "_dot_product_attention_bwd_impl": (*_COMMON, "activation", "fwd_output", "grad_output", *_SETTINGS),
    "check_compute_capability": ("capability",),
    "check_cudnn_version": (),
}
# A function of scores, which our attention has no use for.
_SCORE_MOD = ("score_mod", "score_mod_args")
_NAMES = ("_dot_product_attention_fwd_p_wrapper", "_dot_product_attention_bwd_p_wrapper", "AttentionLayout", "MaskType")


class UnsupportedJaxError(ImportError):
    """The installed jax lacks a private name, or has changed it."""


@dataclasses.dataclass(frozen=True)
class CudnnAttention:
    """jax's cuDNN attention, as far as a local block uses it.

    Attributes:
        forward: Binds the forward primitive.
        backward: Binds the backward primitive.
        no_mask: Mask type: everything is visible.
        causal: Mask type: key s is visible to query t if s <= t.
        heads_before_tokens: Layout [batch, heads, tokens, head_dim].
        capability_at_least: Whether the GPU's compute capability is at least that ("9.0"); False without CUDA.
        cudnn_version: Version of the cuDNN at hand; raises RuntimeError where there is none.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    no_mask: Any
    causal: Any
    heads_before_tokens: int
    capability_at_least: Callable[[str], bool]
    cudnn_version: Callable[[], int]


def cudnn_attention(module_name: str = _MODULE) -> CudnnAttention:
    """jax's cuDNN attention.

    Raises:
        UnsupportedJaxError: The installed jax has it not, or not as it was in the known versions.
    """
    try:
        module = importlib.import_module(module_name)
    except ImportError:
        raise _unsupported(f"has no {module_name}") from None
    for name in (*_NAMES, *_SIGNATURES):
        if not hasattr(module, name):
            raise _unsupported(f"has no {module_name}.{name}")
    options: dict[str, Any] = {}
    for name, expected in _SIGNATURES.items():
        found = tuple(inspect.signature(getattr(module, name)).parameters)
        if "score_mod" in found:  # since 0.12
            options = {"score_mod": None}
        if tuple(parameter for parameter in found if parameter not in _SCORE_MOD) != expected:
            raise _unsupported(f"{name} takes ({', '.join(found)}) where ({', '.join(expected)}) was expected")
    try:
        no_mask, causal = module.MaskType.NO_MASK, module.MaskType.CAUSAL
        layout = module.AttentionLayout.BNTH.value
    except AttributeError as error:
        raise _unsupported(str(error)) from None
    return CudnnAttention(
        forward=partial(module._dot_product_attention_fwd_p_wrapper.bind, **options),
        backward=partial(module._dot_product_attention_bwd_p_wrapper.bind, **options),
        no_mask=no_mask,
        causal=causal,
        heads_before_tokens=layout,
        capability_at_least=module.check_compute_capability,
        cudnn_version=module.check_cudnn_version,
    )


def _unsupported(what: str) -> UnsupportedJaxError:
    first, last = KNOWN_VERSIONS
    return UnsupportedJaxError(
        f"jax {jax.__version__} {what}; its private cuDNN attention is known to work from {first} to {last}: "
        'install one of these, or choose local="xla"'
    )
