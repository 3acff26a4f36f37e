import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from ring_rl.nn.parallel import SequenceParallel


def test_axes_that_a_mesh_lacks_count_as_one_device():
    mesh = Mesh(np.array(jax.devices()[:2]), ("sp",), axis_types=(AxisType.Auto,))
    parallel = SequenceParallel(mesh=mesh, layout="zigzag")
    parallel.check(3, 4)
    assert (parallel.ring_size, parallel.tensor_devices, parallel.size("fsdp")) == (2, 1, 1)
    assert parallel.local().token_spec == PartitionSpec((), ("sp",))
    alone = SequenceParallel(mesh=Mesh(np.array(jax.devices()[:1]), ("dp",)), layout="zigzag").local()
    assert (alone.sequence_axes, alone.tensor_axis, alone.weight_axes) == ((), None, ())


def test_a_hybrid_sees_the_sequence_axis_as_two(transformers):
    parallel = transformers.parallel(1, 1, 2, 4, strategy="hybrid", ulysses_size=2)
    local = parallel.local()
    assert (parallel.sequence_devices, parallel.ring_size) == (4, 2)
    assert dict(local.mesh.shape) == {"dp": 1, "fsdp": 1, "tp": 2, "sp_ring": 2, "sp_ulysses": 2}
    assert local.sequence_axes == ("sp_ring", "sp_ulysses")
    assert list(local.mesh.devices.flat) == list(parallel.mesh.devices.flat)


def test_what_a_mesh_cannot_share_is_refused_with_the_remedy(transformers):
    wide = transformers.parallel(2, 2, 2, 1)
    with pytest.raises(ValueError, match=r"batch of 3 sequences is not divisible by dp=2 x fsdp=2; use a multiple of"):
        wide.check(3, 8)
    with pytest.raises(ValueError, match=r"key_value_heads=3 cannot be shared by tp=2; choose a multiple of 2"):
        wide.check_heads(query_heads=6, key_value_heads=3)
    with pytest.raises(ValueError, match=r"feed_forward_width=5 cannot be shared by tp=2; use a multiple of 2"):
        wide.check_divides("feed_forward_width", 5)
    ring = transformers.parallel(1, 1, 1, 4)
    with pytest.raises(ValueError, match=r"sequence length 20 is not divisible .* zigzag ring of size 4; pad to 24"):
        ring.check(1, 20)


def test_ulysses_asks_for_heads_that_its_devices_divide(transformers):
    heads = {"query_heads": 4, "key_value_heads": 2}
    transformers.parallel(1, 1, 1, 4, strategy="ulysses").check_heads(**heads)
    with pytest.raises(ValueError, match="2 query heads cannot be shared by the 4 devices"):
        transformers.parallel(1, 1, 2, 4, strategy="ulysses").check_heads(**heads)
    transformers.parallel(1, 1, 2, 4, strategy="hybrid", ulysses_size=2).check_heads(**heads)
    with pytest.raises(ValueError, match="2 query heads cannot be shared by the 4 devices"):
        transformers.parallel(1, 1, 2, 4, strategy="hybrid", ulysses_size=4).check_heads(**heads)


def test_options_that_mean_nothing_are_refused(transformers):
    with pytest.raises(ValueError, match=r"unknown strategy 'tree'; choose one of auto, ring"):
        transformers.parallel(1, 1, 1, 2, strategy="tree")
    with pytest.raises(ValueError, match=r"strategy='dense' needs each sequence whole .* got sp=2; set it to 1"):
        transformers.parallel(1, 1, 1, 2, strategy="dense")
    with pytest.raises(ValueError, match=r"ulysses_size=2 means nothing to strategy='ring'; set it to 1"):
        transformers.parallel(1, 1, 1, 2, ulysses_size=2)
    with pytest.raises(ValueError, match=r"ulysses_size=3 does not divide sp=4; choose a divisor"):
        transformers.parallel(1, 1, 1, 4, strategy="hybrid", ulysses_size=3)
    with pytest.raises(ValueError, match=r"ulysses_size=2\D.*pad the sequence to a multiple of 8"):
        transformers.parallel(1, 1, 1, 4, strategy="hybrid", ulysses_size=2, layout="contiguous").check(1, 6)
