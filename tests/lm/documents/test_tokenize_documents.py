"""Documents become tokens: in memory and through a cache, after an interruption, and never another corpus' tokens."""

import json
import os

import numpy as np
import pytest

from ring_rl.lm.documents import tokenize_documents as module
from ring_rl.lm.documents.document import CodeSpan, Document, TextSpan
from ring_rl.lm.documents.modality import KIND_TEXT, KIND_UNWEIGHTED, MixedVocabulary, ModalityConfig
from ring_rl.lm.documents.tokenize_documents import DocumentTokens, tokenize_documents
from ring_rl.lm.tokenizer.byte_tokenizer import ByteTokenizer

BYTES = ByteTokenizer()


class Texts:
    """Documents given as texts; counts how often each is read."""

    def __init__(self, *texts, stop_at=None):
        self._texts, self._stop_at = texts, stop_at
        self.read = []
        self.fingerprint = "|".join(texts)

    def __len__(self):
        return len(self._texts)

    def name(self, index):
        return f"text {index}"

    def document(self, index):
        if index == self._stop_at:
            raise KeyboardInterrupt
        self.read.append(index)
        return Document(self.name(index), (TextSpan(self._texts[index], weighted=True),))


def document_tokens(*, begin_token=False, end_token=False, modalities=(), tokenizer=BYTES):
    vocabulary = MixedVocabulary(text_size=258, text_loss_weight=1.0, modalities=modalities)
    return DocumentTokens(tokenizer=tokenizer, vocabulary=vocabulary, begin_token=begin_token, end_token=end_token)


def contents(tokenized):
    return [tokenized.tokens(i, 0, int(tokenized.lengths[i])).tolist() for i in range(len(tokenized))]


def test_spans_get_their_kinds_and_markers_stand_around_them():
    vision = ModalityConfig(name="vision", codes=4, loss_weight=0.5)
    film = CodeSpan("vision", (np.array([2], np.int32),), weighted=True)
    document = Document("a", (TextSpan("?", weighted=False), film, TextSpan("!", weighted=True)))
    tokens = document_tokens(begin_token=True, end_token=True, modalities=(vision,))(document)
    assert tokens.tokens.tolist() == [256, ord("?"), 262, 260, 264, ord("!"), 257]
    assert tokens.kinds.tolist() == [KIND_UNWEIGHTED, KIND_UNWEIGHTED, 2, 2, 2, KIND_TEXT, KIND_TEXT]


def test_any_stretch_of_any_document():
    source = Texts("abc", "", "defg")
    tokenized = tokenize_documents(source, document_tokens(), cache=None, progress=False)
    assert tokenized.lengths.tolist() == [3, 0, 4]
    assert tokenized.names == ("text 0", "text 1", "text 2")
    assert BYTES.decode(tokenized.tokens(2, 1, 3)) == "ef"
    assert BYTES.decode(tokenized.tokens(0, 2, 9)) == "c"  # never into the next one
    assert tokenized.tokens(1, 0, 5).tolist() == []
    # But for the first, which nothing predicts.
    assert tokenized.kind_counts(2).tolist() == [0, 3]


@pytest.mark.parametrize("part_tokens", [1, 5, 1000])
def test_a_cache_holds_the_same_and_is_made_once(tmp_path, monkeypatch, part_tokens):
    monkeypatch.setattr(module, "_PART_TOKENS", part_tokens)
    texts = ("abc", "", "defg", "h" * 7)
    plain = tokenize_documents(Texts(*texts), document_tokens(), cache=None, progress=False)
    made = tokenize_documents(Texts(*texts), document_tokens(), cache=tmp_path / "cache", progress=False)
    again_source = Texts(*texts)
    again = tokenize_documents(again_source, document_tokens(), cache=tmp_path / "cache", progress=False)
    assert again_source.read == []
    for tokenized in (made, again):
        assert contents(tokenized) == contents(plain)
        assert tokenized.names == plain.names
        assert [tokenized.kind_counts(i).tolist() for i in range(4)] == [
            plain.kind_counts(i).tolist() for i in range(4)
        ]
        assert [tokenized.kinds(i, 0, 9).tolist() for i in range(4)] == [
            plain.kinds(i, 0, 9).tolist() for i in range(4)
        ]


def test_an_interrupted_cache_goes_on_after_its_last_whole_part(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PART_TOKENS", 4)
    texts = ("ab", "cd", "efgh", "ij", "kl")
    with pytest.raises(KeyboardInterrupt):
        tokenize_documents(Texts(*texts, stop_at=4), document_tokens(), cache=tmp_path, progress=False)
    source = Texts(*texts)
    tokenized = tokenize_documents(source, document_tokens(), cache=tmp_path, progress=False)
    assert source.read == [3, 4]
    assert [BYTES.decode(ids) for ids in contents(tokenized)] == list(texts)


def test_the_cache_of_other_documents_or_another_tokenization_is_refused(tmp_path):
    tokenize_documents(Texts("ab"), document_tokens(), cache=tmp_path, progress=False)
    with pytest.raises(ValueError, match="holds the tokens of other documents"):
        tokenize_documents(Texts("abc"), document_tokens(), cache=tmp_path, progress=False)
    with pytest.raises(ValueError, match="or of another tokenizer"):
        tokenize_documents(Texts("ab"), document_tokens(end_token=True), cache=tmp_path, progress=False)
    kept = tokenize_documents(Texts("ab"), document_tokens(), cache=tmp_path, progress=False)
    assert BYTES.decode(kept.tokens(0, 0, 9)) == "ab"


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.txt already; name an empty folder"):
        tokenize_documents(Texts("ab"), document_tokens(), cache=tmp_path, progress=False)
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_what_another_process_is_writing_there_is_no_hindrance(tmp_path):
    (tmp_path / ".settings.abc.json").write_text("{")
    tokenized = tokenize_documents(Texts("ab"), document_tokens(), cache=tmp_path, progress=False)
    assert contents(tokenized) == [[ord("a"), ord("b")]]


def test_a_damaged_cache_is_said_to_be_so(tmp_path):
    tokenize_documents(Texts("abcd"), document_tokens(), cache=tmp_path, progress=False)
    listed = json.loads((tmp_path / "documents_00000.json").read_text())
    (tmp_path / "documents_00000.json").write_text(json.dumps(listed | {"lengths": [5]}))
    with pytest.raises(ValueError, match="is damaged in part 0"):
        tokenize_documents(Texts("abcd"), document_tokens(), cache=tmp_path, progress=False)


def test_ids_beyond_two_bytes_survive():
    class Wide(ByteTokenizer):
        vocabulary_size = 100_000

        def encode(self, text, /):
            return super().encode(text) + 99_000

    vocabulary = MixedVocabulary(text_size=100_000, text_loss_weight=1.0, modalities=())
    how = DocumentTokens(tokenizer=Wide(), vocabulary=vocabulary, begin_token=False, end_token=False)
    tokenized = tokenize_documents(Texts("a"), how, cache=None, progress=False)
    assert contents(tokenized) == [[99_000 + ord("a")]]


def test_what_the_tokenizer_lacks_is_named():
    class Bare(ByteTokenizer):
        bos_id = eos_id = None

    with pytest.raises(ValueError, match=r"no end token; set documents\.end_token=false"):
        document_tokens(end_token=True, tokenizer=Bare())
    with pytest.raises(ValueError, match="counts 5 ids of text, the tokenizer 258"):
        DocumentTokens(
            tokenizer=BYTES,
            vocabulary=MixedVocabulary(text_size=5, text_loss_weight=1.0, modalities=()),
            begin_token=False,
            end_token=False,
        )
    film = CodeSpan("vision", (np.array([0], np.int32),), weighted=True)
    with pytest.raises(ValueError, match="film 3: there is no modality 'vision'"):
        document_tokens()(Document("film 3", (film,)))
