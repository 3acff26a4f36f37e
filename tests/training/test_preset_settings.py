"""Which settings make a run on disk another one than a command line asks for."""

from ring_rl.training.preset_settings import differing_settings
from ring_rl.training.saved_runs import dotted

SAVED = dotted({"seed": 0, "model": {"layers": 2, "name": "new"}, "stages": {"a": {"steps": 5, "when": {"above": 1}}}})


def differences(*overrides, may_differ=(), **given):
    return differing_settings(SAVED, overrides, given, may_differ=may_differ)


def test_values_are_compared_and_choices_of_files_are_not():
    assert differences("model.layers=2", "+experiment=some", "model=other", "~stages.b", seed=0) == []
    assert differences("model.layers=3", "seed=1") == [
        "model.layers: saved 2, wanted 3",
        "seed: saved 0, wanted 1",
    ]
    assert differences("model.layers=3", "model.layers=2") == []
    assert differences("model.width=3") == ["model.width: saved None, wanted 3"]


def test_a_mapping_on_the_command_line_is_compared_key_by_key():
    assert differences("stages.a={steps: 5, when: {above: 1}}") == []
    assert differences("stages.a={steps: 5, when: {above: 2}}") == ["stages.a.when.above: saved 1, wanted 2"]


def test_what_may_change_when_a_run_goes_on_is_free():
    assert differences("model.layers=3", "model.name=old", may_differ=("model",)) == []
    assert differences("model.layers=3", may_differ=("model.lay",)) != []
