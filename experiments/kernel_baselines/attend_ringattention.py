"""The package `ringattention` 0.1.2, as the kernel benchmark runs it.

It was written for older versions of JAX and asks for `jax.lib.xla_bridge` when it is imported.
"""

import types

import jax
import jax.extend.backend
import jax.lib
import jax.numpy as jnp
from benchmark_worker import Case, Inputs, Prepared, serve
from jax_worker import calls_in_flight, gemm, hello
from jax_worker import prepare as prepare_in_jax


def prepare(case: Case, inputs: Inputs) -> Prepared:
    """Compiles its ring, contiguous, with tiles of `block_size` and logits in float32, as its own models call it."""
    jax.lib.__dict__["xla_bridge"] = types.SimpleNamespace(get_backend=jax.extend.backend.get_backend)
    from ringattention import ringattention  # pyright: ignore[reportMissingImports]

    if case.window is not None or case.document_lengths is not None:
        raise ValueError("ringattention is measured under a causal mask only; choose mask: causal")

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, _: jax.Array | None) -> jax.Array:
        return ringattention(
            q,
            k,
            v,
            None,  # attn_bias
            None,  # segment_ids
            axis_name="ring",
            float32_logits=True,
            cache_idx=None,
            blockwise_kwargs={
                "causal_block_size": 1,
                "deterministic": True,
                "dropout_rng": None,
                "attn_pdrop": 0.0,
                "query_chunk_size": case.block_size,
                "key_chunk_size": case.block_size,
                "policy": jax.checkpoint_policies.nothing_saveable,
                "dtype": jnp.float32,
                "precision": None,
                "prevent_cse": True,
            },
        )

    return prepare_in_jax(case, inputs, attend, axes={"ring": case.ring_size}, order=None, check_vma=False)


if __name__ == "__main__":
    serve(hello=hello("ringattention"), prepare=prepare, gemm=gemm, in_flight=calls_in_flight())
