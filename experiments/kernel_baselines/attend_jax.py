"""`jax.nn.dot_product_attention` on one device, as the kernel benchmark runs it; `local` is its implementation."""

from typing import Literal, cast

import jax
from benchmark_worker import Case, Inputs, Prepared, serve
from jax_worker import calls_in_flight, gemm, hello
from jax_worker import prepare as prepare_in_jax


def prepare(case: Case, inputs: Inputs) -> Prepared:
    """Compiles it with a causal mask."""
    if case.window is not None or case.document_lengths is not None:
        raise ValueError("jax.nn.dot_product_attention is measured under a causal mask only; choose mask: causal")
    implementation = cast(Literal["xla", "cudnn"], case.local)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, _: jax.Array | None) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)

    return prepare_in_jax(case, inputs, attend, axes={}, order=None, check_vma=True)


if __name__ == "__main__":
    serve(hello=hello(), prepare=prepare, gemm=gemm, in_flight=calls_in_flight())
