import json
import re

import numpy as np
import pytest

from ring_rl.config import from_mapping
from ring_rl.lm.key_words import key_words
from ring_rl.lm.tokenizer.byte_tokenizer import ByteTokenizer
from ring_rl.lm.tokenizer.compact_tokenizer import FIRST_DIGIT, compact_tokenizer
from ring_rl.lm.tokenizer.load import FileTokenizerConfig, TokenizerConfig, load_tokenizer, tokenizer_from_mapping
from ring_rl.lm.tokenizer.word_tokenizer import WordTokenizer


def from_file(path):
    return load_tokenizer(FileTokenizerConfig(name="file", path=path))


class TestConfigurations:
    def test_every_name_is_told_apart(self, tmp_path):
        from dataclasses import make_dataclass

        (tmp_path / "words.txt").write_text("red\nfox\n")
        holder = make_dataclass("Holder", [("tokenizer", TokenizerConfig)], frozen=True)

        def load(**mapping):
            return load_tokenizer(from_mapping(holder, {"tokenizer": mapping}).tokenizer)

        assert isinstance(load(name="bytes"), ByteTokenizer)
        words = load(name="words", path=str(tmp_path / "words.txt"))
        assert isinstance(words, WordTokenizer)
        assert words.words == ("red", "fox")
        lines = load(name="compact_lines", words="small")
        assert isinstance(lines, WordTokenizer)
        assert lines.words == compact_tokenizer(key_words("small")).words

    def test_digits_of_compact_lines_follow_each_other(self):
        tokenizer = compact_tokenizer(key_words("small"))
        np.testing.assert_array_equal(tokenizer.encode("0 1 9"), [FIRST_DIGIT, FIRST_DIGIT + 1, FIRST_DIGIT + 9])
        assert tokenizer.vocabulary_size == 3 + 10 + 128 + 128

    def test_a_missing_word_list_is_named(self, tmp_path):
        from ring_rl.lm.tokenizer.load import WordTokenizerConfig

        with pytest.raises(FileNotFoundError, match="there is no tokenizer at"):
            load_tokenizer(WordTokenizerConfig(name="words", path=tmp_path / "words.txt"))


class TestModelFolders:
    def test_a_folder_says_how_sequences_begin_and_end(self, tmp_path, small_bpe):
        (tmp_path / "tokenizer.json").write_text(small_bpe)
        assert (from_file(tmp_path).bos_id, from_file(tmp_path).eos_id) == (None, None)
        (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 5, "eos_token_id": [1, 7]}))
        assert (from_file(tmp_path).bos_id, from_file(tmp_path).eos_id) == (5, 1)
        # Names of tokens outrank ids: fine-tuned models often change the former only.
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps({"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"})
        )
        assert (from_file(tmp_path).bos_id, from_file(tmp_path).eos_id) == (0, 1)
        assert from_file(tmp_path / "tokenizer.json").bos_id == 0

    def test_a_json_of_another_name_has_no_neighbours(self, tmp_path, small_bpe):
        (tmp_path / "other.json").write_text(small_bpe)
        (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 5, "eos_token_id": 1}))
        assert from_file(tmp_path / "other.json").bos_id is None

    def test_sentencepiece_is_read_where_there_is_nothing_else(self, tmp_path, small_sentencepiece, small_bpe):
        (tmp_path / "tokenizer.model").write_bytes(small_sentencepiece)
        tokenizer = from_file(tmp_path)
        assert type(tokenizer).__name__ == "SentencePieceTokenizer"
        assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
        (tmp_path / "tokenizer.json").write_text(small_bpe)
        assert type(from_file(tmp_path)).__name__ == "HuggingFaceTokenizer"

    def test_text_never_becomes_a_control_token(self, small_sentencepiece, tmp_path):
        (tmp_path / "tokenizer.model").write_bytes(small_sentencepiece)
        tokenizer = from_file(tmp_path / "tokenizer.model")
        assert tokenizer.eos_id not in tokenizer.encode("</s>")
        assert tokenizer.decode(tokenizer.encode("</s>")) == "</s>"

    def test_an_id_beyond_the_vocabulary_is_refused(self, tmp_path, small_bpe):
        (tmp_path / "tokenizer.json").write_text(small_bpe)
        (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 5000}))
        with pytest.raises(ValueError, match=r"bos_id 5000 is not in \[0, "):
            from_file(tmp_path)


class TestBadFiles:
    def test_an_empty_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"holds neither tokenizer\.json nor tokenizer\.model"):
            from_file(tmp_path)

    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "model.gguf"])
    def test_no_file(self, tmp_path, name):
        with pytest.raises(FileNotFoundError, match=re.escape(name)):
            from_file(tmp_path / name)

    @pytest.mark.parametrize("content", [b"", b"{}", b"not a tokenizer", b"\x00\x01\x02"])
    @pytest.mark.parametrize("name", ["tokenizer.json", "other.json", "tokenizer.model", "model.gguf"])
    def test_damaged_files_are_one_line(self, tmp_path, name, content):
        pytest.importorskip("tokenizers", reason="needs ring_rl[lm]")
        pytest.importorskip("sentencepiece", reason="needs ring_rl[lm]")
        pytest.importorskip("gguf", reason="needs ring_rl[lm]")
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"no |cannot"):
            from_file(tmp_path / name)

    @pytest.mark.parametrize(
        ("mapping", "message"),
        [
            ({"name": "morse"}, "there is no tokenizer named 'morse'"),
            ({}, "lacks the key 'name'"),
            ({"name": "huggingface", "json": "{}"}, "lacks the key 'bos_id'"),
            ({"name": "sentencepiece", "model_base64": "%%%"}, "damaged"),
        ],
    )
    def test_mappings_that_are_none(self, mapping, message):
        with pytest.raises(ValueError, match=message):
            tokenizer_from_mapping(mapping)
