import numpy as np
import pytest

from ring_rl.lm.tokenizer.gguf_tokenizer import tokenizer_from_gguf

gguf = pytest.importorskip("gguf", reason="needs ring_rl[lm]")
pytest.importorskip("tokenizers", reason="needs ring_rl[lm]")

# What transformers 4.57.6 reads with the tokenizer that it builds from SmolLM2's GGUF (`gguf_file=`), a minute's work.
# fmt: off
OF_TRANSFORMERS = {
    "Hello, world! It's 12345 + 6 = 12351.": [
        19556, 28, 905, 17, 657, 506, 216, 33, 34, 35, 36, 37, 1232, 216, 38, 446, 216, 33, 34, 35, 37, 33, 30,
    ],
    "  def f(x):\n\treturn x  \n\n\n": [216, 753, 275, 24, 104, 727, 198, 197, 5406, 1792, 256, 16506],
    "line torpid-kid: REGISTER_CONTENT is <24169>\n": [
        1311, 10060, 2603, 29, 44678, 42, 44942, 2721, 8978, 79, 30942, 6213, 314, 2067, 34, 36, 33, 38, 41, 46, 198,
    ],
    "<|im_start|>user\nnaïve 日本語 👍🏽<|im_end|>": [
        1, 4093, 198, 3546, 46494, 17097, 241, 115, 40993, 179, 120, 248, 15107, 235, 231, 10813, 233, 138, 2,
    ],
    "'LL 'll we've  many   blanks   ": [23, 16421, 637, 764, 392, 3543, 216, 800, 256, 45843, 333],
}
# fmt: on
LETTERS = [*"abcdefghijklmnopqrstuvwxyz0123456789.,!", "Ġ", "Ċ"]


def write(path, *, cut="smollm", kind="gpt2", extra=("ab", "Ġa", "12"), merges=("a b", "Ġ a", "1 2"), types=None):
    """A GGUF file that holds a tokenizer and nothing else."""
    tokens = ["<s>", "</s>", *LETTERS, *extra]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    if cut is not None:
        writer.add_tokenizer_pre(cut)
    writer.add_token_list(tokens)
    writer.add_token_types(types or [3, 3, *[1] * (len(tokens) - 2)])
    writer.add_token_merges(list(merges))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_the_name_of_a_cut_says_what_may_merge(tmp_path):
    pieces = lambda cut: [  # noqa: E731
        tokenizer.decode([token])
        for tokenizer in [tokenizer_from_gguf(write(tmp_path / f"{cut}.gguf", cut=cut))]
        for token in tokenizer.encode("ab a 12")
    ]
    assert pieces("gpt-2") == ["ab", " a", " ", "12"]
    # Digits stand alone in SmolLM2's, and merges across them never happen.
    assert pieces("smollm") == ["ab", " a", " ", "1", "2"]
    assert pieces("llama-bpe") == ["ab", " a", " ", "12"]


def test_llama_3_takes_a_token_whole_that_no_merge_leads_to(tmp_path):
    whole = 2 + len(LETTERS)
    given = {"extra": ("abc", "ab"), "merges": ("a b",)}
    of = lambda cut: tokenizer_from_gguf(write(tmp_path / f"{cut}.gguf", cut=cut, **given)).encode("abc")  # noqa: E731
    np.testing.assert_array_equal(of("llama-bpe"), [whole])
    np.testing.assert_array_equal(of("gpt-2"), [whole + 1, 2 + LETTERS.index("c")])


def test_beginnings_ends_and_special_tokens(tmp_path):
    tokenizer = tokenizer_from_gguf(write(tmp_path / "model.gguf"))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.vocabulary_size == 2 + len(LETTERS) + 3
    np.testing.assert_array_equal(tokenizer.encode("<s>ab</s>"), [0, 2 + len(LETTERS), 1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "llama"}, "of the kind 'llama'; only byte-level BPE"),
        ({"cut": "deepseek-llm"}, "cuts its text as 'deepseek-llm', which is not known here"),
        ({"cut": None}, "cuts its text as None"),
    ],
)
def test_other_kinds_are_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        tokenizer_from_gguf(write(tmp_path / "model.gguf", **changes))


@pytest.mark.parametrize("text", OF_TRANSFORMERS)
def test_smollm2_is_split_as_transformers_splits_it(smollm2, text):
    assert smollm2.encode(text).tolist() == OF_TRANSFORMERS[text]
    assert smollm2.decode(OF_TRANSFORMERS[text]) == text.replace("<|im_start|>", "").replace("<|im_end|>", "")


def test_smollm2_says_how_its_answers_end(smollm2):
    assert smollm2.vocabulary_size == 49152
    assert smollm2.encode("<|im_end|>").tolist() == [smollm2.eos_id]


def test_smollm2_isolates_every_numeral(smollm2):
    # As its own tokenizer.json says and llama.cpp does; transformers' reading of the GGUF merges " ½" over the blank.
    assert [smollm2.decode([token]) for token in smollm2.encode(" ½ 12")] == [" ", "½", " ", "1", "2"]
