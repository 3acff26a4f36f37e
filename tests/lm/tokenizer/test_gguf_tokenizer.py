import numpy as np
import pytest

from ring_rl.lm.tokenizer.gguf_tokenizer import tokenizer_from_gguf

gguf = pytest.importorskip("gguf", reason="needs ring_rl[lm]")
pytest.importorskip("tokenizers", reason="needs ring_rl[lm]")

TEXTS = [
    "Hello, world! It's 12345 + 6 = 12351.",
    "  def f(x):\n\treturn x  \n\n\n",
    "line torpid-kid: REGISTER_CONTENT is <24169>\n",
    "<|im_start|>user\nnaïve 日本語 👍🏽<|im_end|>",
    "'LL 'll we've  many   blanks   ",
]
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


def test_smollm2_is_split_as_transformers_splits_it(smollm2_gguf):
    transformers = pytest.importorskip("transformers", reason="the other side of the comparison")
    ours = tokenizer_from_gguf(smollm2_gguf)
    theirs = transformers.AutoTokenizer.from_pretrained(str(smollm2_gguf.parent), gguf_file=smollm2_gguf.name)
    for text in TEXTS:
        assert ours.encode(text).tolist() == theirs(text, add_special_tokens=False).input_ids, text
        assert ours.decode(ours.encode(text)) == text.replace("<|im_start|>", "").replace("<|im_end|>", "")
    assert ours.vocabulary_size == 49152


def test_smollm2_isolates_every_numeral(smollm2_gguf):
    # As its own tokenizer.json says and llama.cpp does; transformers' reading of the GGUF merges " ½" over the blank.
    tokenizer = tokenizer_from_gguf(smollm2_gguf)
    assert [tokenizer.decode([token]) for token in tokenizer.encode(" ½ 12")] == [" ", "½", " ", "1", "2"]
