import sys

import pytest

from ring_rl.lm.key_words import key_words, wonderwords_list


def test_the_small_lists_are_128_plain_words_each():
    words = key_words("small")
    assert len(words.adjectives) == len(set(words.adjectives)) == 128
    assert len(words.nouns) == len(set(words.nouns)) == 128
    assert not set(words.adjectives) & set(words.nouns)
    assert all(word.isascii() and word.islower() and word.isalpha() for word in (*words.adjectives, *words.nouns))
    assert words.pairs == 128 * 128


def test_wonderwords_lists_hold_single_words_once():
    pytest.importorskip("wonderwords", reason="brings the words")
    words = key_words("wonderwords")
    for each in (words.adjectives, words.nouns, wonderwords_list("verb")):
        assert len(each) == len(set(each)) > 900
        assert not any(set(word) & set(" \n") or not word for word in each)
    assert words.pairs > 6_000_000


def test_missing_words_say_what_to_do(monkeypatch):
    wonderwords_list.cache_clear()
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    monkeypatch.setitem(sys.modules, "wonderwords.assets", None)
    with pytest.raises(ImportError, match="pip install wonderwords, or choose words=small"):
        wonderwords_list("noun")
    wonderwords_list.cache_clear()
