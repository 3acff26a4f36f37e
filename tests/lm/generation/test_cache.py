import pytest

from ring_rl.lm.generation.cache import cache_size


@pytest.mark.parametrize("devices", [1, 3, 8])
def test_caches_come_in_few_sizes_with_little_in_vain(devices):
    sizes = {tokens: cache_size(tokens, devices=devices) for tokens in range(1, 1 << 15, 37)}
    for tokens, (slots, slot_block) in sizes.items():
        assert slots % (devices * slot_block) == 0
        assert tokens <= slots <= max(1.25 * tokens, 128) + devices * slot_block
        # No device without a slot that is filled, once there is a token for each.
        assert tokens < 128 or tokens > (devices - 1) * slot_block
    assert len(set(sizes.values())) <= 32
