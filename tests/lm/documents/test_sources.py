"""Text, JSON lines, Parquet and Python sources: what is read, in which order, and what is refused."""

import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.lm.documents.document import Document, PartOfDocuments, TextSpan, documents_in_order
from ring_rl.lm.documents.json_lines import JsonLines, JsonLinesConfig
from ring_rl.lm.documents.parquet import Parquet, ParquetConfig
from ring_rl.lm.documents.python_sources import PythonSources, PythonSourcesConfig
from ring_rl.lm.documents.text_folder import TextFolder, TextFolderConfig


class Numbers:
    """So many documents that hold their own number."""

    fingerprint = "numbers"

    def __init__(self, count):
        self._count = count

    def __len__(self):
        return self._count

    def name(self, index):
        return f"number {index}"

    def document(self, index):
        return Document(self.name(index), (TextSpan(str(index), weighted=True),))


def text_folder(root, *patterns):
    return TextFolder(TextFolderConfig(name="text_folder", root=root, patterns=patterns or ("**/*.txt",)))


def json_lines(root, *, text_field="text", prompt_field=None, spans_field=None):
    return JsonLines(
        JsonLinesConfig(
            name="json_lines",
            root=root,
            patterns=("*.jsonl",),
            text_field=text_field,
            prompt_field=prompt_field,
            spans_field=spans_field,
        )
    )


def parquet(root, *, text_field="text", prompt_field=None):
    return Parquet(
        ParquetConfig(
            name="parquet", root=root, patterns=("*.parquet",), text_field=text_field, prompt_field=prompt_field
        )
    )


def python_sources(root, *, exclude=(), minimum_bytes=0):
    return PythonSources(
        PythonSourcesConfig(name="python_sources", root=root, exclude=exclude, minimum_bytes=minimum_bytes)
    )


def part_of(source, part, *, share=0.0, names=()):
    return PartOfDocuments(source, part=part, held_out_share=share, held_out_names=names)


def texts(source):
    return [document.text for document in documents_in_order(source, seed=None, start=0)]


def test_reading_goes_on_in_the_seeds_order_where_it_ended():
    source = Numbers(20)
    whole = [document.name for document in documents_in_order(source, seed=3, start=0)]
    assert sorted(whole) == sorted(source.name(i) for i in range(20))
    assert [document.name for document in documents_in_order(source, seed=3, start=7)] == whole[7:]
    assert [document.name for document in documents_in_order(source, seed=4, start=0)] != whole


def test_every_document_is_in_one_part_and_stays_there_when_others_come():
    parts = {
        count: {part: set(texts(part_of(Numbers(count), part, share=0.25))) for part in ("training", "held_out")}
        for count in (200, 400)
    }
    for of_count, count in ((parts[200], 200), (parts[400], 400)):
        assert of_count["training"] | of_count["held_out"] == {str(i) for i in range(count)}
        assert not of_count["training"] & of_count["held_out"]
        assert 0.15 < len(of_count["held_out"]) / count < 0.35
    assert parts[200]["held_out"] < parts[400]["held_out"]


def test_an_empty_part_is_refused():
    with pytest.raises(ValueError, match="leaves none of 3 documents"):
        part_of(Numbers(3), "held_out", share=0.0)
    with pytest.raises(ValueError, match="held_out_names holds number 7, but there is no such document"):
        part_of(Numbers(3), "held_out", names=("number 7",))


def test_documents_may_be_held_out_by_name():
    names = ("number 2", "number 5")
    assert texts(part_of(Numbers(6), "held_out", names=names)) == ["2", "5"]
    assert texts(part_of(Numbers(6), "training", names=names)) == ["0", "1", "3", "4"]
    assert texts(part_of(Numbers(6), "all", names=names)) == [str(i) for i in range(6)]
    prints = {part_of(Numbers(6), part, names=names).fingerprint for part in ("all", "training", "held_out")}
    assert len(prints) == 3


def test_text_files_come_in_the_order_of_their_paths_as_they_are(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.txt").write_bytes("ünder\r\nlines".encode())
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "a.md").write_text("another kind")
    source = text_folder(tmp_path)
    assert [source.name(i) for i in range(len(source))] == ["a.txt", "b/one.txt"]
    assert texts(source) == ["first", "ünder\r\nlines"]
    assert texts(text_folder(tmp_path / "a.md")) == ["another kind"]


def test_a_changed_file_has_another_fingerprint(tmp_path):
    (tmp_path / "a.txt").write_text("first")
    before = text_folder(tmp_path).fingerprint
    assert text_folder(tmp_path).fingerprint == before
    (tmp_path / "a.txt").write_text("first, and more")
    assert text_folder(tmp_path).fingerprint != before


def test_files_that_are_not_there_or_not_text_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not there"):
        text_folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no file like \*\*/\*\.txt"):
        text_folder(tmp_path)
    (tmp_path / "bad.txt").write_bytes(b"good until here \xff")
    with pytest.raises(ValueError, match=r"bad\.txt is not UTF-8 at byte 16"):
        text_folder(tmp_path).document(0)


@given(st.lists(st.text(max_size=20), min_size=1, max_size=10), st.booleans())
def test_json_lines_give_back_what_was_written(tmp_path_factory, written, last_line_ends):
    folder = tmp_path_factory.mktemp("json_lines")
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in written]
    # Blank lines between them are no documents.
    content = "\n \n".join(lines) + ("\n" if last_line_ends else "")
    (folder / "a.jsonl").write_bytes(content.encode("utf-8", "surrogatepass"))
    (folder / "b.jsonl").write_text('{"text": "the last"}\n')
    source = json_lines(folder)
    assert texts(source) == [*written, "the last"]
    assert source.name(len(source) - 1) == "b.jsonl:1"


def test_a_prompt_comes_first_and_carries_no_loss(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "why?", "answer": "so"}\n')
    (document,) = documents_in_order(
        json_lines(tmp_path, text_field="answer", prompt_field="question"), seed=None, start=0
    )
    assert document.spans == (TextSpan("why?", weighted=False), TextSpan("so", weighted=True))


def test_spans_may_hold_codes(tmp_path):
    spans = [{"text": "a film", "weighted": False}, {"modality": "vision", "frames": [[1, 2], [3]]}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"spans": spans}) + "\n")
    text, film = json_lines(tmp_path, text_field=None, spans_field="spans").document(0).spans
    assert text == TextSpan("a film", weighted=False)
    assert (film.modality, film.weighted) == ("vision", True)
    assert [frame.tolist() for frame in film.frames] == [[1, 2], [3]]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{not json", "is no JSON"),
        ("[1]", "must be a JSON object"),
        ('{"body": "x"}', "no field 'text'; the fields there are body"),
        ('{"text": 3}', "field 'text' must be text, got int"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, complaint):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"a\.jsonl, document 2 \(byte 17\).*{complaint}"):
        json_lines(tmp_path).document(1)


@pytest.mark.parametrize(
    ("span", "complaint"),
    [
        ({"text": "x", "frames": [[1]]}, "needs the key text, or modality and frames"),
        ({"modality": "vision", "frames": [1]}, "frames must be a list of lists"),
        ({"modality": "vision", "frames": [[1.5]]}, "codes must be whole numbers"),
        ({"text": "x", "weighted": 1}, "weighted must be true or false"),
    ],
)
def test_a_bad_span_is_named(tmp_path, span, complaint):
    (tmp_path / "a.jsonl").write_text(json.dumps({"spans": [{"text": "good"}, span]}) + "\n")
    with pytest.raises(ValueError, match=rf"document 1 .*spans\[1\].*{complaint}"):
        json_lines(tmp_path, text_field=None, spans_field="spans").document(0)


def test_text_and_spans_exclude_one_another(tmp_path):
    with pytest.raises(ValueError, match="set one of text_field and spans_field"):
        json_lines(tmp_path, spans_field="spans")
    with pytest.raises(ValueError, match="prompt_field goes with text_field"):
        json_lines(tmp_path, text_field=None, spans_field="spans", prompt_field="prompt")


def test_parquet_rows_of_several_groups_and_files(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet files need pyarrow")
    import pyarrow.parquet as pq

    written = [f"text {i}" for i in range(7)]
    table = pyarrow.table({"text": written, "prompt": [f"{i}?" for i in range(7)], "other": list(range(7))})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    pq.write_table(table.slice(0, 1), tmp_path / "b.parquet")
    source = parquet(tmp_path)
    assert texts(source) == [*written, "text 0"]
    assert [source.name(i) for i in (0, 6, 7)] == ["a.parquet:1", "a.parquet:7", "b.parquet:1"]
    # In any order, too.
    generator = np.random.default_rng(0)
    assert all(source.document(i).text == f"text {i}" for i in generator.permutation(7).tolist())
    with_prompt = parquet(tmp_path, prompt_field="prompt").document(4)
    assert with_prompt.spans == (TextSpan("4?", weighted=False), TextSpan("text 4", weighted=True))


def test_bad_parquet_files_are_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet files need pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="no column 'body'; the columns there are text"):
        parquet(tmp_path, text_field="body")
    with pytest.raises(ValueError, match="row 2: field 'text' must be text, got NoneType"):
        parquet(tmp_path).document(1)
    (tmp_path / "b.parquet").write_text("not a table")
    with pytest.raises(ValueError, match=r"b\.parquet is no Parquet file"):
        parquet(tmp_path)


def test_python_modules_are_joined_by_package(tmp_path):
    (tmp_path / "letters" / "greek").mkdir(parents=True)
    (tmp_path / "letters" / "greek" / "alpha.py").write_text("a = 1\n")
    (tmp_path / "letters" / "__init__.py").write_text('"""Letters."""\n')
    (tmp_path / "letters" / "latin1.py").write_bytes("# -*- coding: latin-1 -*-\nname = 'é'\n".encode("latin-1"))
    (tmp_path / "letters" / "broken.py").write_bytes(b"name = '\xff'\n")
    (tmp_path / "alone.py").write_text("x = 2\n")
    (tmp_path / "site-packages" / "other").mkdir(parents=True)
    (tmp_path / "site-packages" / "other" / "one.py").write_text("y = 3\n")
    source = python_sources(tmp_path)
    assert [source.name(i) for i in range(len(source))] == ["alone", "letters"]
    assert source.document(0).text == "# alone.py\nx = 2\n"
    assert source.document(1).text == (
        '# letters/__init__.py\n"""Letters."""\n\n# letters/greek/alpha.py\na = 1\n\n'
        "# letters/latin1.py\n# -*- coding: latin-1 -*-\nname = 'é'\n"
    )
    assert len(python_sources(tmp_path, exclude=("letters",))) == 1
    with pytest.raises(FileNotFoundError, match="no Python package of 1000 bytes"):
        python_sources(tmp_path, minimum_bytes=1000)


def test_sources_that_changed_and_are_as_long_have_another_fingerprint(tmp_path):
    file = tmp_path / "one.py"
    file.write_text("x = 1\n")
    before = python_sources(tmp_path).fingerprint
    assert python_sources(tmp_path).fingerprint == before
    file.write_text("x = 2\n")
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 10**9))
    assert python_sources(tmp_path).fingerprint != before


def test_the_standard_library_has_documents_beyond_100_000_characters():
    source = python_sources(None, exclude=("test",), minimum_bytes=300_000)
    names = [source.name(i) for i in range(len(source))]
    assert "asyncio" in names
    text = source.document(names.index("asyncio")).text
    assert len(text) > 300_000
    assert "class BaseEventLoop" in text
