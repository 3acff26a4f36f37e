"""All-gather: exact, and one transfer each way."""

from collections import Counter

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from ring_rl.kernels import CAUSAL
from ring_rl.kernels.local.xla import XlaBlock

COLLECTIVES = ("all_gather", "reduce_scatter", "ppermute", "all_to_all")


# Every example is a compilation of its own: few of them, and none spent on finding a smaller one.
@settings(max_examples=3, phases=[Phase.generate])
@given(data=st.data())
def test_equals_dense_float64(data, cases):
    data.draw(cases("all_gather")).check()


def test_virtual_ring(case):
    """Differentiated from outside its vmap, where neither gather nor scatter knows the axis."""
    case(strategy="all_gather", axes=(3,), layout="zigzag", virtual=True, batch=1, local=XlaBlock(block_size=5)).check()


def test_gathers_once_forward_and_once_backward(case, equations):
    gather = case(strategy="all_gather", axes=(4,), layout="zigzag", mask=CAUSAL, local=XlaBlock(block_size=24))

    def collectives(*, backward):
        jaxpr = gather.jaxpr(backward=backward)
        return Counter({name: n for name, n in _counted(jaxpr, equations).items() if name in COLLECTIVES})

    assert collectives(backward=False) == {"all_gather": 1}
    assert collectives(backward=True) == {"all_gather": 2, "reduce_scatter": 1}


def _counted(jaxpr, equations) -> Counter:
    counts = Counter()
    for equation, times in equations(jaxpr):
        counts[equation.primitive.name] += times
    return counts
