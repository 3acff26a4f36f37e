"""The script that writes a model for transformers."""

from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from safetensors.numpy import load_file

from ring_rl.config import from_mapping
from ring_rl.hydra_config import resolve

TINY_LLAMA = Path(__file__).parents[1] / "lm" / "pretrained" / "tiny_llama"


@pytest.fixture
def config_of(load_script, pytestconfig, tmp_path):
    def compose_with(*overrides):
        given = ["model=huggingface", f"model.path={TINY_LLAMA}", f"output={tmp_path / 'out'}", *overrides]
        with initialize_config_dir(str(pytestconfig.rootpath / "conf"), version_base="1.3"):
            composed = compose("export_lm", overrides=given)
        return from_mapping(load_script("export_lm").ExportConfig, resolve(composed))

    return compose_with


def test_a_model_is_written_in_the_type_that_is_asked_for(config_of, load_script, tmp_path, capsys):
    load_script("export_lm").export(config_of("dtype=float16"))
    assert capsys.readouterr().out.strip().endswith("out: config.json, model.safetensors")
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, values in load_file(TINY_LLAMA / "model.safetensors").items():
        np.testing.assert_array_equal(written[name], values.astype(np.float16))


def test_what_is_there_is_refused_before_anything_is_read(config_of, load_script, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not overwritten"):
        load_script("export_lm").export(config_of("model.path=nowhere"))
