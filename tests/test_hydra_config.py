from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from ring_rl.hydra_config import resolve


def test_interpolations_are_resolved_to_plain_containers():
    config = OmegaConf.create({"width": 8, "model": {"width": "${width}", "sizes": [1, 2]}})
    resolved = resolve(config)
    assert resolved == {"width": 8, "model": {"width": 8, "sizes": [1, 2]}}
    assert type(resolved["model"]) is dict
    assert type(resolved["model"]["sizes"]) is list


def test_a_mandatory_value_is_named_with_its_remedy():
    config = OmegaConf.create({"data": {"path": "???"}})
    with pytest.raises(ValueError, match=r"'data\.path' has no value; give one on the command line: data\.path="):
        resolve(config)


def test_a_dangling_interpolation_is_named():
    config = OmegaConf.create({"model": {"width": "${nowhere}"}})
    with pytest.raises(ValueError, match="nowhere") as caught:
        resolve(config)
    assert "\n" not in str(caught.value)
