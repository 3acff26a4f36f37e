"""Configurations of documents: what the YAML files compose to, opened, tokenized and packed."""

import dataclasses

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from ring_rl.config import from_mapping
from ring_rl.hydra_config import resolve
from ring_rl.kernels.layout import to_layout
from ring_rl.lm.documents.document import CodeSpan
from ring_rl.lm.documents.load import DocumentsConfig, mixed_vocabulary, open_source, packed_documents, read_tokens
from ring_rl.lm.documents.modality import TokenSpan
from ring_rl.lm.documents.packing import PackingConfig
from ring_rl.lm.tokenizer.byte_tokenizer import ByteTokenizer
from ring_rl.training.input import InputConfig, RowStream
from ring_rl.training.mesh import MeshConfig, make_mesh

BYTES = ByteTokenizer()


@pytest.fixture
def composed(pytestconfig):
    """`composed("text_folder", "source.root=...")`: the group as an entry point would have it."""

    def call(name, *overrides):
        overrides = [f"+documents={name}", *(f"documents.{each}" for each in overrides)]
        with initialize_config_dir(str(pytestconfig.rootpath / "conf"), version_base="1.3"):
            return from_mapping(DocumentsConfig, resolve(compose(overrides=overrides))["documents"])

    return call


def packed(config, *, row_length):
    documents = read_tokens(config, BYTES, progress=False)
    return packed_documents(documents, config, BYTES, row_length=row_length, seed=0)


def file_with(folder, name, content):
    (folder / name).write_text(content)
    return folder


def test_every_file_of_the_group_is_a_configuration(composed, tmp_path, pytestconfig):
    names = sorted(path.stem for path in (pytestconfig.rootpath / "conf/documents").glob("*.yaml"))
    assert names == ["json_lines", "made_up_vision", "packed", "parquet", "python_sources", "text_folder"]
    for name in names:
        if name != "packed":
            rooted = name in ("json_lines", "parquet", "text_folder")
            config = composed(name, *([f"source.root={tmp_path}"] if rooted else []))
            assert config.source.name == name


def test_films_and_lines_share_rows_and_count_alike(composed):
    config = composed("made_up_vision", "source.documents=7", "modalities.0.codes=8", "source.codes_per_frame=3")
    vocabulary = mixed_vocabulary(config, BYTES)
    assert vocabulary.size == 258 + 8 + 3
    rows = packed(config, row_length=64)
    every = [rows.row(i) for i in range(rows.rows_per_epoch)]
    assert sum(row.weights.sum() for row in every) == pytest.approx(7)
    # What is in a row is read back: a film and its line, either first, and the film obeys the line.
    for row in every:
        for segment in range(row.segment_ids.max() + 1):
            here = row.segment_ids == segment
            tokens = np.append(row.tokens[here], row.targets[here][-1])
            spans = vocabulary.spans(tokens)
            line = BYTES.decode(next(span for span in spans if isinstance(span, TokenSpan)).tokens)
            film = next(span for span in spans if isinstance(span, CodeSpan))
            _, start, _, step = line.split()
            expected = int(start) + int(step) * np.arange(4)[:, None] + np.arange(3)
            np.testing.assert_array_equal(np.stack(film.frames), expected % 8)
    assert {type(vocabulary.spans(row.tokens[row.segment_ids == 0])[0]) for row in every} == {CodeSpan, TokenSpan}


def test_rows_reach_the_devices_in_the_rings_layout(composed, tmp_path):
    file_with(tmp_path, "a.txt", "one two three")
    file_with(tmp_path, "b.txt", "four five")
    config = composed("text_folder", f"source.root={tmp_path}", "end_token=true")
    rows = packed(config, row_length=32)
    stream = RowStream(
        rows,
        batch_size=2,
        steps=1,
        mesh=make_mesh(MeshConfig(dp=2, fsdp=1, tp=1, sp=4)),
        layout="zigzag",
        ring_size=4,
        config=InputConfig(threads=1, prefetch_batches=1),
    )
    batch = next(stream)
    stream.close()
    for name in ("tokens", "targets", "weights", "positions", "segment_ids"):
        row = np.stack([getattr(rows.row(i), name) for i in range(2)])
        np.testing.assert_array_equal(getattr(batch, name), to_layout(row, axis=1, ring_size=4, layout="zigzag"))


def test_parts_share_the_corpus_between_them(composed, tmp_path):
    for number in range(40):
        file_with(tmp_path, f"{number}.txt", f"document {number}")
    read = {
        part: read_tokens(
            composed("text_folder", f"source.root={tmp_path}", f"part={part}", "held_out_share=0.5"),
            BYTES,
            progress=False,
        )
        for part in ("all", "training", "held_out")
    }
    assert sorted(read["training"].names + read["held_out"].names) == sorted(read["all"].names)
    assert min(len(read["training"]), len(read["held_out"])) > 10


def test_a_cache_serves_one_part_only(composed, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(9):
        file_with(corpus, f"{number}.txt", f"document {number}")
    options = (f"source.root={corpus}", f"token_cache={tmp_path}/cache", "held_out_share=0.5")
    made = read_tokens(composed("text_folder", *options, "part=training"), BYTES, progress=False)
    assert read_tokens(composed("text_folder", *options, "part=training"), BYTES, progress=False).names == made.names
    with pytest.raises(ValueError, match="holds the tokens of other documents"):
        read_tokens(composed("text_folder", *options, "part=held_out"), BYTES, progress=False)


def test_an_empty_corpus_is_refused(composed, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no file like \*\*/\*\.txt"):
        open_source(composed("text_folder", f"source.root={tmp_path}"))
    config = composed("json_lines", f"source.root={file_with(tmp_path, 'a.jsonl', '')}")
    with pytest.raises(ValueError, match=r"documents\.source=json_lines holds no document"):
        packed(config, row_length=8)
    file_with(tmp_path, "a.txt", "x")
    config = composed("text_folder", f"source.root={tmp_path}")
    with pytest.raises(ValueError, match="none of 1 documents has 2 tokens or more"):
        packed(config, row_length=8)


def test_a_bad_configuration_is_refused(composed):
    config = composed("python_sources")
    with pytest.raises(ValueError, match="open_rows must be at least 1"):
        dataclasses.replace(config.packing, open_rows=0)
    assert isinstance(config.packing, PackingConfig)
    with pytest.raises(ValueError, match=r"documents.*held_out_share|held_out_share must be in \[0, 1\]"):
        open_source(dataclasses.replace(config, held_out_share=1.5))
