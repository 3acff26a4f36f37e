"""What backward finds saved of a layer, by name: memory against recomputation."""

from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from ring_rl.kernels.strategies.sharded import SAVED_NAMES as ATTENTION_NAMES
from ring_rl.typing import Array

SavedActivations = Literal["all", "products", "attention", "none", "offload"]
HOST_MEMORY = "pinned_host"
_LAYER_INPUT = "layer_input"


def rematerialised(layer: Callable[..., Any], saved_activations: SavedActivations) -> Callable[..., Any]:
    """`layer(x, ...)`, which keeps for backward only what the policy names.

    all         whatever backward reads: nothing is done twice
    products    the layer's input, and the results of all matrix products and of attention: only elementwise work is
                done twice, and weights are gathered twice
    attention   the layer's input, and attention's output and log-sum-exp: the ring does not run again
    none        the layer's input
    offload     what "attention" keeps, in the host's memory: it travels there while forward goes on, and back
                while backward does
    """
    if saved_activations == "all":
        return layer
    policies = jax.checkpoint_policies
    attention = policies.save_only_these_names(*ATTENTION_NAMES)
    if saved_activations == "products":
        policy = policies.save_from_both_policies(policies.dots_saveable, attention)
    elif saved_activations == "attention":
        policy = attention
    elif saved_activations == "offload":
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[_LAYER_INPUT, *ATTENTION_NAMES],
            offload_src="device",
            offload_dst=HOST_MEMORY,
        )
    else:
        policy = policies.nothing_saveable
    # A scan's body keeps what is computed twice apart by itself.
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)


def named_input(x: Array) -> Array:
    """A layer's input, under the name that "offload" knows; call it first thing in the layer."""
    return checkpoint_name(x, _LAYER_INPUT)


def check_saved_activations(saved_activations: SavedActivations, mesh: Mesh) -> None:
    """Raises ValueError unless the devices of `mesh` can keep what the policy names where it says."""
    if saved_activations != "offload":
        return
    device = mesh.devices.flat[0]
    kinds = sorted({memory.kind for memory in device.addressable_memories()})
    if HOST_MEMORY not in kinds:
        raise ValueError(
            f"saved_activations=offload needs a device that reaches {HOST_MEMORY} memory, and {device.platform} "
            f"reaches {', '.join(kinds)}; use saved_activations=attention or none"
        )
