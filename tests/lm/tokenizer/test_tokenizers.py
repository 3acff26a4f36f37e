"""What holds for every tokenizer."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.lm.tokenizer.byte_tokenizer import ByteTokenizer
from ring_rl.lm.tokenizer.huggingface import HuggingFaceTokenizer
from ring_rl.lm.tokenizer.load import tokenizer_from_mapping
from ring_rl.lm.tokenizer.protocol import Tokenizer, written_text
from ring_rl.lm.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer
from ring_rl.lm.tokenizer.word_tokenizer import WordTokenizer

TEXTS = [
    "",
    "the line of the river is 12345",
    "  leading, trailing  and   many blanks  ",
    "lines\n\nand\ttabs\r\n",
    "naïve 日本語 👍🏽 e\u0301 ½ ²",
    "7",
]


@pytest.fixture(scope="session")
def any_text_tokenizers(small_bpe, small_sentencepiece) -> dict[str, Tokenizer]:
    return {
        "bytes": ByteTokenizer(),
        "huggingface": HuggingFaceTokenizer(small_bpe, bos_id=0, eos_id=1),
        "sentencepiece": SentencePieceTokenizer(small_sentencepiece),
    }


@pytest.mark.parametrize("name", ["bytes", "huggingface", "sentencepiece"])
class TestAnyText:
    @pytest.mark.parametrize("text", TEXTS)
    def test_decoding_gives_the_text_again(self, any_text_tokenizers, name, text):
        tokenizer = any_text_tokenizers[name]
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert ids.ndim == 1
        assert tokenizer.decode(ids) == text
        assert tokenizer.bos_id not in ids
        assert tokenizer.eos_id not in ids

    @given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0▁"), max_size=40))
    def test_so_does_any_text(self, any_text_tokenizers, name, text):
        tokenizer = any_text_tokenizers[name]
        assert tokenizer.decode(tokenizer.encode(text)) == text

    @given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0▁"), max_size=40))
    def test_spans_cover_the_text_in_order(self, any_text_tokenizers, name, text):
        tokenizer = any_text_tokenizers[name]
        ids, spans = tokenizer.encode_with_spans(text)
        np.testing.assert_array_equal(ids, tokenizer.encode(text))
        assert spans.shape == (len(ids), 2)
        assert (spans[:, 0] <= spans[:, 1]).all()
        assert (np.diff(spans[:, 0]) >= 0).all()
        covered = {place for begin, end in spans.tolist() for place in range(begin, end)}
        assert covered == set(range(len(text)))

    def test_the_span_of_a_word_holds_its_tokens(self, any_text_tokenizers, name):
        tokenizer = any_text_tokenizers[name]
        text = "日本 the line 12345 here"
        begin = text.index("12345")
        ids, spans = tokenizer.encode_with_spans(text)
        inside = (spans[:, 0] < begin + 5) & (spans[:, 1] > begin)
        assert tokenizer.decode(ids[inside]).strip() == "12345"

    def test_a_checkpoint_keeps_all_of_it(self, any_text_tokenizers, name):
        tokenizer = any_text_tokenizers[name]
        again = tokenizer_from_mapping(json.loads(json.dumps(tokenizer.to_mapping())))
        assert type(again) is type(tokenizer)
        assert (again.vocabulary_size, again.bos_id, again.eos_id) == (
            tokenizer.vocabulary_size,
            tokenizer.bos_id,
            tokenizer.eos_id,
        )
        for text in TEXTS:
            np.testing.assert_array_equal(again.encode(text), tokenizer.encode(text))

    @pytest.mark.parametrize("outside", [-1, "vocabulary_size"])
    def test_ids_outside_the_vocabulary_are_refused(self, any_text_tokenizers, name, outside):
        tokenizer = any_text_tokenizers[name]
        token_id = tokenizer.vocabulary_size if outside == "vocabulary_size" else outside
        with pytest.raises(ValueError, match=rf"token id {token_id} is not in \[0, {tokenizer.vocabulary_size}\)"):
            tokenizer.decode([2, token_id])

    def test_special_tokens_are_not_written(self, any_text_tokenizers, name):
        tokenizer = any_text_tokenizers[name]
        ids = [tokenizer.bos_id, *tokenizer.encode("line"), tokenizer.eos_id]
        assert tokenizer.decode(ids) == "line"
        assert max(tokenizer.bos_id, tokenizer.eos_id) < tokenizer.vocabulary_size


def test_bytes_that_form_no_character_are_shown_as_such():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("é")
    assert len(ids) == 2
    assert tokenizer.decode(ids[:1]) == "\ufffd"


def test_what_a_model_wrote_beside_text_is_left_out():
    """Of 300 rows of an embedding 258 are bytes; the others are codes, or nothing at all."""
    ids = np.array([104, 258, 105, 299], np.int32)
    assert written_text(ids, ByteTokenizer()) == "hi"
    with pytest.raises(ValueError, match=r"token id 258 is not in \[0, 258\)"):
        ByteTokenizer().decode(ids)


def test_a_file_that_asks_for_truncation_or_padding_gets_neither(small_bpe):
    tokenizer = HuggingFaceTokenizer(small_bpe, bos_id=None, eos_id=None)
    assert json.loads(small_bpe)["truncation"]
    assert json.loads(small_bpe)["padding"]
    text = "a line there, " * 50
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("a")) == 1


def test_special_tokens_in_a_text_are_one_id_each(small_bpe):
    tokenizer = HuggingFaceTokenizer(small_bpe, bos_id=0, eos_id=1)
    assert tokenizer.encode("<s>a")[0] == 0


class TestWords:
    def test_an_id_is_a_place_in_the_list(self):
        tokenizer = WordTokenizer(["LINE", "red", "fox", "IS", "4"])
        np.testing.assert_array_equal(tokenizer.encode("LINE red fox IS 4\nLINE  fox"), [0, 1, 2, 3, 4, 0, 2])
        assert tokenizer.decode([0, 2, 4]) == "LINE fox 4"
        assert (tokenizer.vocabulary_size, tokenizer.bos_id, tokenizer.eos_id) == (5, None, None)

    @given(ids=st.lists(st.integers(0, 4), max_size=12))
    def test_ids_survive_their_text(self, ids):
        tokenizer = WordTokenizer(["LINE", "red", "fox", "IS", "4"])
        np.testing.assert_array_equal(tokenizer.encode(tokenizer.decode(ids)), ids)

    def test_spans_are_the_words(self):
        text = " red\nfox "
        _, spans = WordTokenizer(["red", "fox"]).encode_with_spans(text)
        assert [text[begin:end] for begin, end in spans] == ["red", "fox"]

    def test_a_checkpoint_keeps_the_words(self):
        mapping = json.loads(json.dumps(WordTokenizer(["b", "a"]).to_mapping()))
        assert tokenizer_from_mapping(mapping).decode([1, 0]) == "a b"

    def test_unknown_words_are_named(self):
        with pytest.raises(ValueError, match="the word 'wolf' is not among the 2 of this tokenizer"):
            WordTokenizer(["red", "fox"]).encode("red wolf")

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ([], "at least one"),
            (["a", "b", "a"], "'a' stands twice"),
            (["a", "b c"], "'b c' is no word"),
            ([""], "no word"),
        ],
    )
    def test_bad_vocabularies_are_refused(self, words, message):
        with pytest.raises(ValueError, match=message):
            WordTokenizer(words)
