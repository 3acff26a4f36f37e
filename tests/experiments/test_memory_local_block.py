"""Compiled memory stands for machines that are not here: it must not depend on what this one's attention is."""

import pytest
from hydra import compose, initialize_config_dir

MEMORY = ("memory_by_ring_size", "memory_by_option", "attention_memory", "lm_memory")


@pytest.mark.parametrize("name", MEMORY)
def test_the_block_is_named_and_is_what_is_compiled(name, pytestconfig, call_script, refused, tmp_path):
    with initialize_config_dir(str(pytestconfig.rootpath / "conf"), version_base="1.3"):
        assert compose(name).local_block == "xla"
    # A CPU refuses the TPU's block when the step is traced, so the key has come that far.
    complaint = refused(call_script, name, f"output={tmp_path}", "local_block=pallas_tpu")
    assert "local attention block 'pallas_tpu' cannot serve: it needs a TPU" in complaint
    assert list(tmp_path.iterdir()) == []
