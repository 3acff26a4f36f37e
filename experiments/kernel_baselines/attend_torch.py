"""torch's scaled_dot_product_attention on one device, all cores, as the kernel benchmark runs it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from benchmark_worker import Case, Inputs, Prepared, Results, available_cores, serve

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def prepare(case: Case, inputs: Inputs) -> Prepared:
    """Places q, k and v as torch wants them, [B, H, T, D]."""
    if case.window is not None or case.document_lengths is not None:
        raise ValueError("torch's attention is measured under a causal mask only; choose mask: causal")
    q, k, v, d_out = (
        torch.from_numpy(x.astype(np.float32)).to(device(), DTYPES[case.dtype]).transpose(1, 2).contiguous()
        for x in inputs
    )

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    def forward_backward() -> tuple[torch.Tensor, ...]:
        a, b, c = (x.detach().requires_grad_() for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(a, b, c, is_causal=True)
        return out, *torch.autograd.grad(out, (a, b, c), d_out)

    def results() -> Results:
        return Results(*(x.detach().transpose(1, 2).float().cpu().numpy() for x in forward_backward()))

    return Prepared(forward, forward_backward, wait, results, temporary_bytes=None, local=None)


def gemm(size: int, dtype: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """A product of two square matrices, whose speed is the most that attention can hope for."""
    generator = torch.Generator(device()).manual_seed(0)
    a, b = torch.randn(2, size, size, generator=generator, device=device()).to(DTYPES[dtype])
    return lambda: a @ b, wait


def wait(_: Any) -> None:
    """A call on a CPU has finished when it returns."""
    if device() == "cuda":
        torch.cuda.synchronize()


def device() -> str:
    """The GPU where torch sees one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    """Serves on as many threads as there are cores."""
    torch.set_num_threads(available_cores())
    platform = "gpu" if device() == "cuda" else "cpu"
    serve(
        hello={"platform": platform, "device": platform, "versions": {"torch": torch.__version__}},
        prepare=prepare,
        gemm=gemm,
        in_flight=8 if platform == "gpu" else 1,
    )


if __name__ == "__main__":
    main()
