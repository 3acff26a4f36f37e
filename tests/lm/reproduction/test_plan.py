"""What a figure's cells say of themselves, from their folders."""

import dataclasses
import json

import pytest

from ring_rl.lm.reproduction.plan import Measurement


def test_what_is_left_of_a_cell(preset, cells):
    cell = cells[0]
    assert cell.trained
    assert cell.unanswered("teacher_forced") == ()
    more = [
        Measurement(tokens=1024, samples=7),
        Measurement(tokens=2048, samples=6),
        Measurement(tokens=4096, samples=1),
    ]
    grown = dataclasses.replace(cell, lengths=tuple(more))
    assert grown.unanswered("teacher_forced") == tuple(more[1:])
    # Answers of an earlier checkpoint are none of this one's.
    stages = json.loads((cell.run_dir / "stages.json").read_text())
    stages["b"]["last_step"] = 20
    (cell.run_dir / "stages.json").write_text(json.dumps(stages))
    assert cell.unanswered("teacher_forced") == cell.lengths
    del stages["b"]
    (cell.run_dir / "stages.json").write_text(json.dumps(stages))
    assert not cell.trained


def test_settings_that_a_preset_names_are_compared(preset, cells):
    assert cells[0].differing_settings(preset) == []
    other = dataclasses.replace(preset, train=("loss.z_loss=0.1",))
    # The variant's own choice goes before that of all.
    assert cells[0].differing_settings(other) == []
    good = dataclasses.replace(
        preset.variants["good"],
        label="the best",
        train=("loss.z_loss=0.1", "+experiment=some"),
    )
    other = dataclasses.replace(preset, variants={**preset.variants, "good": good})
    assert cells[0].differing_settings(other) == [
        "loss.z_loss: saved 0.0, wanted 0.1",
        "label: saved the good, wanted the best",
    ]
    assert cells[2].differing_settings(other) == []
    # What may change when a run goes on makes it no other run: to move it away would throw a training away.
    free = ("mesh.sp=8", "virtual_devices=8", "wandb.mode=online", "loss.chunks=4", "loss.z_loss=0.0")
    assert cells[0].differing_settings(dataclasses.replace(preset, train=free)) == []


def test_presets_that_make_no_sense_are_refused(preset):
    with pytest.raises(ValueError, match="needs variants and seeds"):
        dataclasses.replace(preset, seeds=())
    with pytest.raises(ValueError, match="seeds must differ"):
        dataclasses.replace(preset, seeds=(1, 1))
    with pytest.raises(ValueError, match="unknown variant nobody; the preset has good, bad"):
        dataclasses.replace(preset, claims=(dataclasses.replace(preset.claims[0], variant="nobody"),))
    with pytest.raises(ValueError, match="a claim about good at 5 tokens, where it is not asked"):
        dataclasses.replace(preset, claims=(dataclasses.replace(preset.claims[0], tokens=5),))
    with pytest.raises(ValueError, match=r"lengths of the good must ascend.*got \[2048, 1024\]"):
        dataclasses.replace(preset.variants["good"], lengths=preset.variants["good"].lengths[::-1])
    with pytest.raises(ValueError, match="at least 1, got 0 and 5"):
        Measurement(tokens=0, samples=5)
