"""The scripts and cards of documents: what they print and write can be read again, and what cards name is there."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from ring_rl.lm.documents.json_lines import JsonLines, JsonLinesConfig
from ring_rl.lm.documents.load import DocumentsConfig
from ring_rl.lm.documents.made_up_vision import MadeUpVision, MadeUpVisionConfig

REPOSITORY = Path(__file__).parents[2]
CARDS = {
    name: (REPOSITORY / "datasets" / name / "README.md").read_text()
    for name in ("python_sources", "text_folder", "made_up_vision")
}


def call(script, config_name, *overrides):
    spec = importlib.util.spec_from_file_location(script.replace("/", "_"), REPOSITORY / "datasets" / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        cfg = compose(config_name, overrides=list(overrides))
    module.main.__wrapped__(cfg)


def test_a_corpus_is_counted(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("x" * 9)
    (tmp_path / "b.txt").write_text("y" * 5)
    source = ["documents=text_folder", f"documents.source.root={tmp_path}"]
    call("text_folder/describe", "describe_documents", *source, "row_length=8")
    printed = capsys.readouterr().out
    # 8 tokens and 4 that are read.
    expected = "documents=2 tokens=14 median=7 p90=8 longest=9 rows=2 row_length=8 padding_share=0.2500"
    assert printed.strip().splitlines()[-1] == expected
    assert "a.txt" in printed


def test_films_are_written_as_they_are_read(tmp_path, capsys):
    output = tmp_path / "data" / "films.jsonl"
    options = [f"output={output}", "documents.source.documents=5", "documents.source.frames=2"]
    call("made_up_vision/write", "write_documents", *options)
    assert capsys.readouterr().out.strip().endswith(f"documents=5 output={output}")
    films = MadeUpVision(
        MadeUpVisionConfig(
            name="made_up_vision", documents=5, modality="vision", codes=64, frames=2, codes_per_frame=16, seed=0
        )
    )
    written = JsonLines(
        JsonLinesConfig(
            name="json_lines",
            root=output,
            patterns=(),
            text_field=None,
            prompt_field=None,
            spans_field="spans",
        )
    )
    assert len(written) == 5
    for index in range(5):
        for again, span in zip(written.document(index).spans, films.document(index).spans, strict=True):
            assert type(again) is type(span)
            assert again.weighted == span.weighted
            if hasattr(span, "frames"):
                assert again.modality == span.modality
                np.testing.assert_array_equal(np.stack(again.frames), np.stack(span.frames))
            else:
                assert again == span
    # As the card says that codes of one's own are read.
    options_of_codes = [
        "documents=json_lines",
        f"documents.source.root={output}",
        "documents.source.text_field=null",
        "documents.source.spans_field=spans",
        "documents.modalities=[{name: vision, codes: 64, loss_weight: 1.0}]",
    ]
    call("text_folder/describe", "describe_documents", *options_of_codes, "row_length=128")
    last = capsys.readouterr().out.strip().splitlines()[-1]
    # Two frames of 16 codes with three markers, and a line each.
    lines = sum(len(films.document(index).text) for index in range(5))
    assert last.startswith(f"documents=5 tokens={5 * 35 + lines} ")
    with pytest.raises(SystemExit):
        call("made_up_vision/write", "write_documents", *options)
    assert "films.jsonl already" in capsys.readouterr().err


@pytest.mark.parametrize("name", CARDS)
def test_what_a_card_names_is_there(name):
    card = CARDS[name]
    scripts = re.findall(r"python ((?:experiments|datasets)/\S+\.py)", card)
    links = re.findall(r"\]\((\.\.?/[^)#]+)\)", card)
    assert scripts
    assert links
    missing = [path for path in scripts if not (REPOSITORY / path).is_file()]
    missing += [path for path in links if not (REPOSITORY / "datasets" / name / path).exists()]
    assert missing == []


@pytest.mark.parametrize("name", CARDS)
def test_every_key_that_a_card_names_exists(name):
    keys = set(re.findall(r"`?documents\.(\w+)", CARDS[name]))
    assert keys <= {"source", *DocumentsConfig.__dataclass_fields__}
