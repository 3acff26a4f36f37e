"""Matrix products that sum in float32 whatever their operands are."""

import jax
import jax.numpy as jnp

from ring_rl.typing import Array


def float32_einsum(equation: str, a: Array, b: Array) -> Array:
    """einsum(equation, a, b) with float32 sums and a float32 result: bf16 row sums lose terms at long S.

    On a CPU, half-precision operands are widened first: XLA's CPU backend has no product of two bfloat16
    arrays into float32 for every operand order, and computes in float32 anyway.
    """
    if a.dtype == b.dtype == jnp.float32:
        return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)

    def widened(a: Array, b: Array) -> Array:
        return jnp.einsum(equation, a.astype(jnp.float32), b.astype(jnp.float32))

    def native(a: Array, b: Array) -> Array:
        return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)

    return jax.lax.platform_dependent(a, b, cpu=widened, default=native)
