from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from ring_rl.config import from_mapping
from ring_rl.hydra_config import resolve
from ring_rl.lm.tokenizer.byte_tokenizer import ByteTokenizer
from ring_rl.lm.training_data import MixtureConfig, data_places, open_training_data, vocabulary_size

CONF = Path(__file__).parents[2] / "conf"


@pytest.fixture
def mixture(tmp_path):
    """Half records of lines, half made-up films with a vocabulary of codes, as the configuration files have them."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(
            overrides=[
                "+training_data=mixture",
                "documents@training_data.parts.documents.data.documents=made_up_vision",
                "training_data.parts.documents.data.documents.source.documents=20",
                "training_data.parts.lines.data.words=small",
                "training_data.parts.lines.data.fewest_lines=2",
            ]
        )
    return from_mapping(MixtureConfig, resolve(cfg)["training_data"])


def test_a_mixture_brings_rows_of_all_its_parts_in_one_vocabulary(mixture):
    tokenizer = ByteTokenizer()
    size = vocabulary_size(mixture, tokenizer)
    assert size > tokenizer.vocabulary_size
    data = open_training_data(mixture, tokenizer, progress=False)
    assert data.row_length(length=2048, lines=None) == 2048
    rows = data.rows(length=2048, lines=None, short_share=0.5, seed=(1, 0))
    drawn = [rows.row(index) for index in range(20)]
    asked = [row.answer_ids.max() >= 0 for row in drawn]
    assert 3 < sum(asked) < 17
    for row, has_questions in zip(drawn, asked, strict=True):
        assert row.tokens.shape == row.segment_ids.shape == (2048,)
        assert (row.tokens.max() < tokenizer.vocabulary_size) == has_questions
        assert row.tokens.max() < size
    again = open_training_data(mixture, tokenizer, progress=False)
    again = again.rows(length=2048, lines=None, short_share=0.5, seed=(1, 0))
    np.testing.assert_array_equal(again.row(7).tokens, drawn[7].tokens)
    other_stage = data.rows(length=2048, lines=None, short_share=0.5, seed=(1, 1))
    assert any((other_stage.row(index).tokens != drawn[index].tokens).any() for index in range(3))


def test_documents_and_mixtures_are_measured_in_tokens(mixture):
    data = open_training_data(mixture, ByteTokenizer(), progress=False)
    with pytest.raises(ValueError, match="the parts of a mixture share a length in tokens, got lines=8"):
        data.row_length(length=None, lines=8)
    documents = open_training_data(mixture.parts["documents"].data, ByteTokenizer(), progress=False)
    with pytest.raises(ValueError, match="documents have no lines to count, got lines=8"):
        documents.row_length(length=None, lines=8)
    with pytest.raises(ValueError, match=r"documents are as long as they are, got short_share=0\.5"):
        documents.rows(length=64, lines=None, short_share=0.5, seed=(0,))


def test_what_says_where_data_lie_is_named(mixture):
    below = "training_data.parts.documents.data.documents"
    assert data_places(mixture, path="training_data") == (f"{below}.token_cache", f"{below}.source.root")
