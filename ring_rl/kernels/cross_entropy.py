"""Blockwise cross-entropy: the logits of a few tokens at a time, never [tokens, V].

Gradients are computed while the logits exist, in the forward pass of a differentiated call: three products of
tokens x M x V in all, where recomputing the logits in backward would take four. Between forward and backward that
keeps the gradient of `hidden`, in place of `hidden` itself, and float32 gradients of `head` and `bias`, which
backward needs anyway; as the loss is where forward ends and backward begins, the peak is the same.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ring_rl.kernels.accumulate import float32_einsum
from ring_rl.kernels.feedforward import check_chunks
from ring_rl.kernels.varying import vary_alike
from ring_rl.typing import Array, Bool, Float, Float32, Int, Shaped


class CrossEntropySums(NamedTuple):
    """Sums over tokens, so that sums over devices and batches are sums over all tokens.

    Attributes:
        loss_sum: Σ weight (-log p(target) + z_loss log_sum_exp²); the only field besides `weight_sum` that carries
            gradients.
        weight_sum: Σ weight.
        correct_sum: Σ weight [target is the first of the most likely tokens].
        z_loss_sum: The part of `loss_sum` that is due to z_loss; (loss_sum - z_loss_sum) / weight_sum is the mean
            negative log-likelihood, whose exponential is the perplexity.
    """

    loss_sum: Float32[Array, ""]
    weight_sum: Float32[Array, ""]
    correct_sum: Float32[Array, ""]
    z_loss_sum: Float32[Array, ""]

    def mean(self) -> Float32[Array, ""]:
        """loss_sum / weight_sum, the loss to minimise; 0 where nothing has weight.

        The mean over all tokens only once the sums are over all tokens: a mean of means weighs devices, not tokens.
        """
        weighted = self.weight_sum != 0
        return jnp.where(weighted, self.loss_sum / jnp.where(weighted, self.weight_sum, 1.0), 0.0)


def blockwise_cross_entropy(
    hidden: Float[Array, "B T M"] | Float[Array, "T M"],
    head: Float[Array, "M V"],
    targets: Int[Array, "B T"] | Int[Array, " T"],
    *,
    chunks: int,
    weights: Shaped[Array, "B T"] | Shaped[Array, " T"] | None = None,
    bias: Float[Array, " V"] | None = None,
    soft_cap: float | None = None,
    z_loss: float = 0.0,
    axis_name: str | tuple[str, ...] | None = None,
) -> CrossEntropySums:
    """The cross-entropy of softmax(hidden head + bias) and `targets`, computed in `chunks` steps.

        logits      = hidden head + bias, then soft_cap tanh(logits / soft_cap) if there is a cap
        log_sum_exp = log Σ_v exp(logits_v)
        loss        = Σ weight (log_sum_exp - logits_target + z_loss log_sum_exp²)

    Logits, log-sum-exp and all sums are float32, whatever the inputs are. Exact gradients in `hidden`, `head`, `bias`
    and `weights`; none of second order.

    A token is ignored (its target, its hidden state, even one that is not a number) if its weight is 0 or its target
    not in [0, V): padding needs no valid target. The gradient in an ignored token's weight is zero too.

    A step takes every chunks-th token, as `blockwise_feedforward` does: tokens sharded over a ring keep all devices
    busy at every step and do not move, if T / chunks is a multiple of the ring size. Under plain jit the compiler sums
    the gradient of `head` over devices, at worst once a step; inside `jax.shard_map` it is summed once.

    Cost: 2 B T M V FLOPs, 6 B T M V with gradients; memory of about three times B T V / chunks float32.

    Args:
        chunks: Number of steps; divides T (inside `jax.shard_map`, this device's T).
        weights: What each token counts; None is 1 for all. Booleans are a mask.
        bias: Added to the logits.
        soft_cap: Bound of a logit's magnitude, or None.
        z_loss: Weight of log_sum_exp², which keeps the softmax's normaliser near 1 (arXiv:2204.02311).
        axis_name: Mesh axis, or axes, over which to sum; None: the sums are over the tokens given. Gradients of the
            summed loss are those of all tokens if `jax.shard_map` checks replication, as it does unless told not to.

    Raises:
        ValueError: Shapes that do not fit one another; `chunks` does not divide T; a negative z_loss or soft_cap.
    """
    return blockwise_cross_entropy_and_hits(
        hidden,
        head,
        targets,
        chunks=chunks,
        weights=weights,
        bias=bias,
        soft_cap=soft_cap,
        z_loss=z_loss,
        axis_name=axis_name,
    )[0]


def blockwise_cross_entropy_and_hits(
    hidden: Float[Array, "B T M"] | Float[Array, "T M"],
    head: Float[Array, "M V"],
    targets: Int[Array, "B T"] | Int[Array, " T"],
    *,
    chunks: int,
    weights: Shaped[Array, "B T"] | Shaped[Array, " T"] | None = None,
    bias: Float[Array, " V"] | None = None,
    soft_cap: float | None = None,
    z_loss: float = 0.0,
    axis_name: str | tuple[str, ...] | None = None,
) -> tuple[CrossEntropySums, Bool[Array, "B T"] | Bool[Array, " T"]]:
    """`blockwise_cross_entropy`, and for each token whether it is not ignored and its target is the most likely one."""
    _check(hidden, head, targets, weights, bias)
    loss = _Loss(chunks, soft_cap, z_loss, jnp.result_type(hidden, head))
    alone = hidden.ndim == 2
    if alone:
        hidden, targets = hidden[None], targets[None]
        weights = None if weights is None else weights[None]
    check_chunks(hidden.shape[1], chunks=chunks, of="cross-entropy")
    weights_BT = jnp.ones(targets.shape, jnp.float32) if weights is None else weights.astype(jnp.float32)
    # Select even where the weight is 0 already: the gradient in an ignored token's weight is then 0 too.
    seen_BT = (targets >= 0) & (targets < head.shape[1]) & (weights_BT != 0)
    weights_BT = jnp.where(seen_BT, weights_BT, 0.0)
    # Float32 from here on, so that gradients are summed over devices in it; the products see the dtype given.
    head = head.astype(jnp.float32)
    bias = jnp.zeros(head.shape[1]) if bias is None else bias.astype(jnp.float32)
    loss_sum, correct_sum, z_loss_sum, hits_BT = _sums(loss, *vary_alike(hidden, head, bias, weights_BT, targets))
    sums = CrossEntropySums(
        loss_sum=loss_sum,
        weight_sum=jnp.sum(weights_BT),
        correct_sum=lax.stop_gradient(correct_sum),
        z_loss_sum=lax.stop_gradient(z_loss_sum),
    )
    if axis_name is not None:
        sums = CrossEntropySums(*(lax.psum(x, axis_name) for x in vary_alike(*sums)))
    return sums, hits_BT[0] if alone else hits_BT


@dataclasses.dataclass(frozen=True)
class _Loss:
    """What is known when the program is compiled."""

    chunks: int
    soft_cap: float | None
    z_loss: float
    dtype: jnp.dtype

    def __post_init__(self) -> None:
        if self.soft_cap is not None and not self.soft_cap > 0:
            raise ValueError(f"soft_cap must be positive, got {self.soft_cap}; None is no cap")
        if not self.z_loss >= 0:
            raise ValueError(f"z_loss must not be negative, got {self.z_loss}")


class _Tokens(NamedTuple):
    hidden: Float[Array, "B T M"]
    weights: Float32[Array, "B T"]
    targets: Int[Array, "B T"]

    def strided(self, chunks: int) -> "_Tokens":
        """Leading axis: the steps, each of every chunks-th token."""
        cut = lambda x: jnp.moveaxis(x.reshape(x.shape[0], -1, chunks, *x.shape[2:]), 2, 0)  # noqa: E731
        return _Tokens(*map(cut, self))


def _in_order(x_nBc: Shaped[Array, "n B c ..."]) -> Shaped[Array, "B T ..."]:
    """The inverse of `_Tokens.strided`."""
    x_Bcn = jnp.moveaxis(x_nBc, 0, 2)
    return x_Bcn.reshape(x_Bcn.shape[0], -1, *x_Bcn.shape[3:])


class _Step(NamedTuple):
    """Sums of one step, each token's loss, and what the gradient is made of."""

    sums: tuple[Array, Array, Array]
    token_loss: Float32[Array, "B c"]
    hits: Bool[Array, "B c"]
    logits: Float32[Array, "B c V"]
    probabilities: Float32[Array, "B c V"]
    is_target: Array
    log_sum_exp: Float32[Array, "B c"]


def _step(loss: _Loss, head: Array, bias: Array, tokens: _Tokens) -> _Step:
    V = head.shape[1]
    logits_BcV = float32_einsum("bcm,mv->bcv", tokens.hidden.astype(loss.dtype), head) + bias
    if loss.soft_cap is not None:
        logits_BcV = loss.soft_cap * jnp.tanh(logits_BcV / loss.soft_cap)
    maximum_Bc1 = jnp.max(logits_BcV, axis=-1, keepdims=True)
    unnormalised_BcV = jnp.exp(logits_BcV - maximum_Bc1)
    sum_Bc1 = jnp.sum(unnormalised_BcV, axis=-1, keepdims=True)
    log_sum_exp_Bc = (maximum_Bc1 + jnp.log(sum_Bc1))[..., 0]
    token_V = lax.iota(jnp.int32, V)
    # Comparing with every token, not indexing: it fuses with the sum, and runs where V is sharded too.
    is_target_BcV = token_V == tokens.targets[..., None]
    target_logit_Bc = jnp.sum(jnp.where(is_target_BcV, logits_BcV, 0.0), axis=-1)
    best_Bc = jnp.min(jnp.where(logits_BcV == maximum_Bc1, token_V, V), axis=-1)
    seen_Bc = tokens.weights != 0
    z_loss_Bc = jnp.where(seen_Bc, loss.z_loss * log_sum_exp_Bc**2, 0.0)
    token_loss_Bc = jnp.where(seen_Bc, log_sum_exp_Bc - target_logit_Bc, 0.0) + z_loss_Bc
    total = lambda x_Bc: jnp.sum(tokens.weights * x_Bc)  # noqa: E731
    hits_Bc = (best_Bc == tokens.targets) & seen_Bc
    sums = total(token_loss_Bc), total(hits_Bc), total(z_loss_Bc)
    return _Step(sums, token_loss_Bc, hits_Bc, logits_BcV, unnormalised_BcV / sum_Bc1, is_target_BcV, log_sum_exp_Bc)


def _d_logits(loss: _Loss, step: _Step, weights_Bc: Array) -> Float32[Array, "B c V"]:
    """Gradient of the step's loss in hidden head + bias."""
    of_log_sum_exp_Bc = 1.0 + 2.0 * loss.z_loss * step.log_sum_exp
    d_logits_BcV = weights_Bc[..., None] * (of_log_sum_exp_Bc[..., None] * step.probabilities - step.is_target)
    return d_logits_BcV if loss.soft_cap is None else d_logits_BcV * (1.0 - (step.logits / loss.soft_cap) ** 2)


def _without_ignored(tokens: _Tokens) -> _Tokens:
    """Zeros for the hidden states of ignored tokens: zero weights alone would let infinities through."""
    return tokens._replace(hidden=jnp.where((tokens.weights != 0)[..., None], tokens.hidden, 0))


def _sums_alone(
    loss: _Loss, hidden: Array, head: Array, bias: Array, weights: Array, targets: Array
) -> tuple[Array, Array, Array, Array]:
    """(loss_sum, correct_sum, z_loss_sum) over the tokens given, and which targets are hit."""
    head = head.astype(loss.dtype)

    def accumulate(sums, tokens):
        step = _step(loss, head, bias, _without_ignored(tokens))
        return jax.tree.map(jnp.add, sums, step.sums), step.hits

    zero = vary_alike(jnp.float32(0), weights)[0]
    tokens = _Tokens(hidden, weights, targets).strided(loss.chunks)
    sums, hits_nBc = lax.scan(accumulate, (zero, zero, zero), tokens)
    return *sums, _in_order(hits_nBc)


def _sums_forward(loss: _Loss, hidden: Array, head: Array, bias: Array, weights: Array, targets: Array):
    """The sums, and the gradients of the first of them in hidden, head, bias and weights."""
    head = head.astype(loss.dtype)

    def accumulate(carry, tokens):
        sums, d_head, d_bias = carry
        tokens = _without_ignored(tokens)
        step = _step(loss, head, bias, tokens)
        d_logits_BcV = _d_logits(loss, step, tokens.weights)
        d_bias = d_bias + jnp.sum(d_logits_BcV, axis=(0, 1))
        d_logits_BcV = d_logits_BcV.astype(loss.dtype)
        d_head = d_head + float32_einsum("bcm,bcv->mv", tokens.hidden.astype(loss.dtype), d_logits_BcV)
        d_hidden_BcM = float32_einsum("bcv,mv->bcm", d_logits_BcV, head).astype(hidden.dtype)
        return (jax.tree.map(jnp.add, sums, step.sums), d_head, d_bias), (d_hidden_BcM, step.token_loss, step.hits)

    zero, d_head, d_bias, _ = vary_alike(jnp.float32(0), jnp.zeros(head.shape), jnp.zeros(bias.shape), weights)
    (sums, d_head, d_bias), (d_hidden_nBcM, token_loss_nBc, hits_nBc) = lax.scan(
        accumulate,
        ((zero, zero, zero), d_head, d_bias),
        _Tokens(hidden, weights, targets).strided(loss.chunks),
    )
    gradients = _in_order(d_hidden_nBcM), d_head, d_bias, _in_order(token_loss_nBc)
    return (*sums, _in_order(hits_nBc)), gradients


def _sums_backward(loss: _Loss, gradients: tuple[Array, ...], cotangents: tuple[Array, ...]):
    del loss
    scaled = lambda x: (cotangents[0] * x.astype(jnp.float32)).astype(x.dtype)  # noqa: E731
    return *map(scaled, gradients), None


_sums = jax.custom_vjp(_sums_alone, nondiff_argnums=(0,))
_sums.defvjp(_sums_forward, _sums_backward)


def _check(hidden: Array, head: Array, targets: Array, weights: Array | None, bias: Array | None) -> None:
    """Raises ValueError unless the shapes fit."""
    if hidden.ndim not in (2, 3) or head.ndim != 2 or hidden.shape[-1] != head.shape[0]:
        raise ValueError(
            f"hidden {hidden.shape} and head {head.shape} do not fit; they are [batch, tokens, width] or "
            "[tokens, width], and [width, vocabulary] (pass the transpose of an embedding table)"
        )
    for name, x in (("targets", targets), ("weights", weights)):
        if x is not None and x.shape != hidden.shape[:-1]:
            raise ValueError(f"{name} {x.shape} must be one a token, {hidden.shape[:-1]}")
    if bias is not None and bias.shape != head.shape[1:]:
        raise ValueError(f"bias {bias.shape} must be one a token of the vocabulary, {head.shape[1:]}")
