"""What an entry point's `mesh` and `parallel` say is what its models run on, wherever it says the layout."""

import pytest

from ring_rl.config import from_mapping
from ring_rl.training.mesh import MeshConfig
from ring_rl.training.parallel_config import LaidOutParallelConfig, ParallelConfig, make_parallel

MESH = MeshConfig(dp=1, fsdp=2, tp=1, sp=4)
KEYS = {"strategy": "hybrid", "ulysses_size": 2, "weights_over_ring": False, "local_block": "xla", "heads_at_once": 3}


@pytest.mark.parametrize("layout", ["zigzag", "contiguous", "striped"])
def test_every_key_reaches_the_mesh(layout):
    around = make_parallel(MESH, from_mapping(ParallelConfig, KEYS), layout=layout)
    assert (around.size("fsdp"), around.size("sp"), around.ring_size) == (2, 4, 2)
    assert (around.layout, around.strategy, around.ulysses_size) == (layout, "hybrid", 2)
    assert around.weight_axes == ("fsdp",)
    assert (around.local().local_block, around.local().heads_at_once) == ("xla", 3)
    over_ring = from_mapping(ParallelConfig, KEYS | {"weights_over_ring": True})
    assert make_parallel(MESH, over_ring, layout=layout).weight_axes == ("fsdp", "sp")


def test_an_unknown_block_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"local_block.*native_cpu"):
        from_mapping(ParallelConfig, KEYS | {"local_block": "triton"})


def test_the_layout_is_a_key_only_where_nothing_else_says_it():
    laid_out = KEYS | {"layout": "striped"}
    assert from_mapping(LaidOutParallelConfig, laid_out).layout == "striped"
    with pytest.raises(ValueError, match="layout"):
        from_mapping(ParallelConfig, laid_out)
    with pytest.raises(ValueError, match="layout"):
        from_mapping(LaidOutParallelConfig, KEYS)
