"""What every implementation in the kernel benchmark shares: its inputs, its clock, its check and its protocol.

Each implementation runs in a process of its own, so that none sees another's flags, threads or memory. The process
stays alive and compiles a case once. It reads one JSON object a line and answers with one a line:

    (start)                                        {"platform": "cpu", "device": ..., "versions": {...}}
    {"command": "prepare", "case": {...}}          {"temporary_bytes": ..., "local": ..., "errors": {"out": ..., ...}}
    {"command": "measure", "name": ..., "at_least": ...}  {"forward": seconds, "forward_backward": seconds}
    {"command": "gemm", "size": ..., "dtype": ..., "at_least": ...}          {"flops_per_second": ...}

What goes wrong is answered by {"error": one line}, and the process lives on.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

# Tokens at the end of the sequence whose dk and dv are checked: no query outside of them sees them.
LAST_TOKENS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One line of the benchmark's table, with every number in it; causal attention of `batch` sequences.

    Attributes:
        name: The name of the case.
        platform: "cpu" or "gpu".
        strategy: How shards meet, for implementations that have a choice.
        layout: Which tokens a device holds.
        local: The block or backend that computes one device's share.
        ring_size: Devices in the ring.
        ulysses_size: Devices that share the heads within each place of the ring.
        block_size: Edge of a tile of scores, for implementations that ask for one.
        batch: B.
        tokens: T, over all devices.
        heads: H; there are as many key-value heads.
        head_dim: D.
        dtype: "float32" or "bfloat16".
        window: How many tokens back a query sees, itself included, or None.
        document_lengths: Lengths of the packed documents, or None.
        seed: Of the inputs.
    """

    name: str
    platform: str
    strategy: str | None
    layout: str | None
    local: str | None
    ring_size: int
    ulysses_size: int
    block_size: int | None
    batch: int
    tokens: int
    heads: int
    head_dim: int
    dtype: str
    window: int | None
    document_lengths: tuple[int, ...] | None
    seed: int


class Inputs(NamedTuple):
    """Arrays [B, T, H, D] in natural order of the tokens, of the case's dtype."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    d_out: np.ndarray


class Results(NamedTuple):
    """Arrays [B, T, H, D] in natural order of the tokens."""

    out: np.ndarray
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray


class Prepared(NamedTuple):
    """A compiled case.

    Attributes:
        forward: Starts one forward pass.
        forward_backward: Starts one forward and backward pass.
        wait: Returns when what either of them gave is computed.
        results: Computes everything once.
        temporary_bytes: What a device needs besides arguments and results, by the compiler's own count, or None.
        local: The local block or backend that serves.
    """

    forward: Callable[[], Any]
    forward_backward: Callable[[], Any]
    wait: Callable[[Any], Any]
    results: Callable[[], Results]
    temporary_bytes: int | None
    local: str | None


def make_inputs(case: Case) -> Inputs:
    """The same numbers in every process: standard normal, rounded to the case's dtype."""
    generator = np.random.default_rng(case.seed)
    shape = (case.batch, case.tokens, case.heads, case.head_dim)
    dtype = np.dtype(ml_dtypes.bfloat16 if case.dtype == "bfloat16" else case.dtype)
    return Inputs(*(generator.standard_normal(shape, dtype=np.float32).astype(dtype) for _ in range(4)))


def segment_ids(case: Case) -> np.ndarray | None:
    """The document of every token, [B, T]."""
    if case.document_lengths is None:
        return None
    ids = np.repeat(np.arange(len(case.document_lengths), dtype=np.int32), case.document_lengths)
    return np.broadcast_to(ids, (case.batch, case.tokens))


def sampled_errors(case: Case, inputs: Inputs, results: Results) -> dict[str, float]:
    """max |result - exact| / max |exact| over some tokens, exact in float64 from the formula alone.

    out and dq: 8 tokens spread over the sequence and the last 8. dk and dv: the last 8, because under a causal mask
    only the last 8 queries see them. O(T H D) work.
    """
    T = case.tokens
    last = np.arange(max(T - LAST_TOKENS, 0), T)
    rows = np.union1d(np.linspace(0, T - 1, LAST_TOKENS, dtype=int), last)
    q, d_out = (x[:, rows].astype(np.float64) for x in (inputs.q, inputs.d_out))
    k, v = (x.astype(np.float64) for x in (inputs.k, inputs.v))
    positions = np.arange(T)
    shown = positions <= rows[:, None]
    if case.window is not None:
        shown &= rows[:, None] - positions < case.window
    ids = segment_ids(case)
    if ids is not None:
        shown &= ids[0] == ids[0, rows][:, None]

    scale = 1 / np.sqrt(case.head_dim)
    scores_BHTS = scale * np.einsum("bthd,bshd->bhts", q, k, optimize=True)
    scores_BHTS = np.where(shown, scores_BHTS, -np.inf)
    weights_BHTS = np.exp(scores_BHTS - scores_BHTS.max(axis=-1, keepdims=True))
    weights_BHTS /= weights_BHTS.sum(axis=-1, keepdims=True)
    out = np.einsum("bhts,bshd->bthd", weights_BHTS, v, optimize=True)
    d_weights_BHTS = np.einsum("bthd,bshd->bhts", d_out, v, optimize=True)
    delta_BHT = np.einsum("bthd,bthd->bht", out, d_out)
    d_scores_BHTS = weights_BHTS * (d_weights_BHTS - delta_BHT[..., None])
    exact = {
        "out": out,
        "dq": scale * np.einsum("bhts,bshd->bthd", d_scores_BHTS, k, optimize=True),
        "dk": scale * np.einsum("bhts,bthd->bshd", d_scores_BHTS[..., last], q, optimize=True),
        "dv": np.einsum("bhts,bthd->bshd", weights_BHTS[..., last], d_out, optimize=True),
    }
    found = {
        "out": results.out[:, rows],
        "dq": results.dq[:, rows],
        "dk": results.dk[:, last],
        "dv": results.dv[:, last],
    }
    return {
        name: float(np.max(np.abs(found[name].astype(np.float64) - exact[name])) / np.max(np.abs(exact[name])))
        for name in exact
    }


def seconds_per_call(call: Callable[[], Any], wait: Callable[[Any], Any], *, at_least: float, in_flight: int) -> float:
    """Median seconds of a call, measured for at least that long in all.

    `in_flight` calls are started before they are waited for, so that where a call lasts milliseconds the cost of
    starting it is hidden behind the one before, as in training.
    """
    seconds, begin = [], time.perf_counter()
    while not seconds or time.perf_counter() - begin < at_least:
        start = time.perf_counter()
        pending = call()
        for _ in range(in_flight - 1):
            pending = call()
        wait(pending)
        seconds.append((time.perf_counter() - start) / in_flight)
    return statistics.median(seconds)


def available_cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def serve(
    *,
    hello: dict[str, Any],
    prepare: Callable[[Case, Inputs], Prepared],
    gemm: Callable[[int, str], tuple[Callable[[], Any], Callable[[Any], Any]]] | None,
    in_flight: int,
) -> None:
    """Answers requests until stdin ends.

    Args:
        hello: The first line.
        prepare: Compiles a case on these inputs.
        gemm: Makes a product of two square matrices of that size and dtype: (start it, wait for it).
        in_flight: See `seconds_per_call`.
    """
    cases: dict[str, Prepared] = {}
    products: dict[tuple[int, str], tuple[Callable[[], Any], Callable[[Any], Any]]] = {}

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        clock = {"at_least": request.get("at_least", 0.0), "in_flight": in_flight}
        if request["command"] == "prepare":
            case = _case(request["case"])
            inputs = make_inputs(case)
            prepared = cases[case.name] = prepare(case, inputs)
            errors = sampled_errors(case, inputs, prepared.results())
            # The results have warmed up forward + backward.
            prepared.wait(prepared.forward())
            return {"temporary_bytes": prepared.temporary_bytes, "local": prepared.local, "errors": errors}
        if request["command"] == "measure":
            prepared = cases[request["name"]]
            return {
                "forward": seconds_per_call(prepared.forward, prepared.wait, **clock),
                "forward_backward": seconds_per_call(prepared.forward_backward, prepared.wait, **clock),
            }
        if request["command"] == "gemm" and gemm is not None:
            key = (request["size"], request["dtype"])
            if key not in products:
                products[key] = gemm(*key)
                products[key][1](products[key][0]())
            return {"flops_per_second": 2 * key[0] ** 3 / seconds_per_call(*products[key], **clock)}
        raise ValueError(f"unknown command {request['command']!r}")

    with _reserved_stdout() as send:
        send({**hello, "cores": available_cores()})
        for line in sys.stdin:
            try:
                send(answer(json.loads(line)))
            except Exception as error:
                send({"error": f"{type(error).__name__}: {error}".splitlines()[0]})


def _case(fields: dict[str, Any]) -> Case:
    lengths = fields["document_lengths"]
    return Case(**{**fields, "document_lengths": None if lengths is None else tuple(lengths)})


@contextlib.contextmanager
def _reserved_stdout() -> Iterator[Callable[[dict[str, Any]], None]]:
    """Gives a function that writes a line of JSON; all other output of the process goes to stderr meanwhile."""
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        yield lambda answer: print(json.dumps(answer), file=answers, flush=True)
