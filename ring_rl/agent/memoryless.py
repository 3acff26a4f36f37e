"""What agents share that act on one observation: a memory of nothing."""

from flax import nnx

from ring_rl.agent.chain_batch import ChainBatch
from ring_rl.typing import Array, Float, PRNGKeyArray, Shaped

__all__ = ["MemorylessAgent"]


class MemorylessAgent(nnx.Module):
    """The acting half of an agent without a context; subclasses say what to do in one state, by `decide`."""

    def decide(self, observations: Float[Array, "B O"], keys: Shaped[PRNGKeyArray, " B"] | None) -> Float[Array, "B A"]:
        """The action of each row; with keys, where there is something to draw, a draw."""
        raise NotImplementedError

    @property
    def context_trajectories(self) -> int:
        """One: there is no context to carry over."""
        return 1

    def begin(self, *, batch: int) -> tuple[()]:
        """No memory."""
        del batch
        return ()

    def act(
        self, memory: tuple[()], now: ChainBatch, keys: Shaped[PRNGKeyArray, " B"] | None = None
    ) -> tuple[Float[Array, "B A"], tuple[()]]:
        """The action of one step, T = 1."""
        return self.decide(now.observations[:, 0], keys), memory

    def observe(self, memory: tuple[()], now: ChainBatch) -> tuple[()]:
        """Remembers nothing."""
        del now
        return memory

    def observe_and_act(
        self, memory: tuple[()], past: ChainBatch, now: ChainBatch, keys: Shaped[PRNGKeyArray, " B"] | None = None
    ) -> tuple[Float[Array, "B A"], tuple[()]]:
        """`act`; there is nothing to remember."""
        del past
        return self.act(memory, now, keys)
