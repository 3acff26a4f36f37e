"""ring_rl's own attention, as the kernel benchmark runs it."""

import logging
from functools import partial
from typing import cast

from benchmark_worker import Case, Inputs, Prepared, serve
from jax_worker import calls_in_flight, gemm, hello
from jax_worker import prepare as prepare_in_jax

from ring_rl.kernels import Layout, Mask, attention, permutation
from ring_rl.kernels.local.block import LocalName


def prepare(case: Case, inputs: Inputs) -> Prepared:
    """Compiles `ring_rl.kernels.attention` with the strategy, layout and block of the case."""
    if case.strategy == "hybrid":
        axes, axis_name = {"ring": case.ring_size, "ulysses": case.ulysses_size}, ("ring", "ulysses")
    elif case.strategy == "ulysses":
        axes, axis_name = {"ulysses": case.ulysses_size}, "ulysses"
    elif case.strategy in ("blockwise", "dense"):
        axes, axis_name = {}, None
    else:
        axes, axis_name = {"ring": case.ring_size}, "ring"
    layout = cast(Layout, case.layout)
    call = partial(
        attention,
        mask=Mask(causal=True, window=case.window),
        axis_name=axis_name,
        layout=layout,
        strategy=case.strategy or "auto",
        local=cast(LocalName, case.local),
        block_size=case.block_size,
    )
    chosen = _ChosenBlocks()
    prepared = prepare_in_jax(
        case,
        inputs,
        lambda q, k, v, ids: call(q, k, v, segment_ids=ids).out,
        axes=axes,
        # In a hybrid the layout is that of the ring.
        order=permutation(case.tokens, ring_size=axes.get("ring", case.ulysses_size), layout=layout),
        check_vma=True,
    )
    return prepared._replace(local=chosen.names() or case.local)


class _ChosenBlocks(logging.Handler):
    """Listens for which local blocks `local="auto"` becomes."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._names: list[str] = []
        self._logger = logging.getLogger("ring_rl.kernels.local.select")
        self._logger.setLevel(logging.INFO)
        self._logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps the name, which is the first argument of the message."""
        if isinstance(record.args, tuple) and record.args:
            self._names.append(str(record.args[0]))

    def names(self) -> str:
        """All that were chosen so far; stops listening."""
        self._logger.removeHandler(self)
        return " + ".join(sorted(set(self._names)))


if __name__ == "__main__":
    serve(hello=hello("ring_rl"), prepare=prepare, gemm=gemm, in_flight=calls_in_flight())
