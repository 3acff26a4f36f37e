"""Text and codes as ids of one vocabulary."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.lm.documents.document import CodeSpan
from ring_rl.lm.documents.modality import KIND_TEXT, MixedVocabulary, ModalityConfig, TokenSpan


def vocabulary(*, text_size=10):
    return MixedVocabulary(
        text_size=text_size,
        text_loss_weight=1.0,
        modalities=(
            ModalityConfig(name="vision", codes=4, loss_weight=0.5),
            ModalityConfig(name="sound", codes=2, loss_weight=0.0),
        ),
    )


def span(modality, *frames):
    return CodeSpan(modality, tuple(np.array(frame, np.int32) for frame in frames), weighted=True)


def test_codes_come_after_the_text_and_their_markers_after_them():
    ids = vocabulary()
    assert ids.size == 10 + (4 + 3) + (2 + 3)
    assert ids.tokens(span("vision", [0, 3], [1])).tolist() == [14, 10, 13, 15, 11, 16]
    assert ids.tokens(span("sound", [1])).tolist() == [19, 18, 21]


def test_kinds_have_the_weights_of_their_modalities():
    ids = vocabulary()
    assert ids.weights.tolist() == [0.0, 1.0, 0.5, 0.0]
    assert ids.weights[ids.kind("vision")] == 0.5
    assert ids.weights[KIND_TEXT] == 1.0


codes = st.sampled_from([("vision", 4), ("sound", 2)]).flatmap(
    lambda kind: st.lists(st.lists(st.integers(0, kind[1] - 1), max_size=4), min_size=1, max_size=3).map(
        lambda frames: span(kind[0], *frames)
    )
)
text = st.lists(st.integers(0, 9), min_size=1, max_size=5).map(lambda ids: TokenSpan(np.array(ids, np.int32)))


def comparable(spans):
    return [
        part.tokens.tolist() if isinstance(part, TokenSpan) else (part.modality, [f.tolist() for f in part.frames])
        for part in spans
    ]


@given(st.lists(st.one_of(codes, text), max_size=6), st.integers(0, 3))
def test_spans_are_found_again(spans, cut):
    ids = vocabulary()
    pieces = [part.tokens if isinstance(part, TokenSpan) else ids.tokens(part) for part in spans]
    tokens = np.concatenate([np.zeros(0, np.int32), *pieces])
    joined = []  # neighbouring stretches of text are one
    for part in comparable(spans):
        if joined and isinstance(part, list) and isinstance(joined[-1], list):
            joined[-1] = joined[-1] + part
        else:
            joined.append(part)
    assert comparable(ids.spans(tokens)) == joined
    # Whoever generates may stop anywhere: what came before is still found.
    shorter = ids.spans(tokens[: max(len(tokens) - cut, 0)])
    assert comparable(shorter)[:-1] == joined[: max(len(shorter) - 1, 0)]


@pytest.mark.parametrize(
    ("tokens", "complaint"),
    [
        ([1, 11], "no vision has begun"),
        ([14, 3], "stands within vision"),
        ([14, 17], "stands within vision"),
        ([22], r"ids must be in \[0, 22\)"),
    ],
)
def test_markers_and_codes_out_of_place_are_refused(tokens, complaint):
    with pytest.raises(ValueError, match=complaint):
        vocabulary().spans(np.array(tokens))


def test_bad_spans_and_vocabularies_are_refused():
    ids = vocabulary()
    with pytest.raises(ValueError, match=r"no modality 'smell'.*vision, sound there"):
        ids.tokens(span("smell", [0]))
    with pytest.raises(ValueError, match="vision has the codes 0 to 3, got 1 to 4"):
        ids.tokens(span("vision", [1, 4]))
    with pytest.raises(ValueError, match="at least one frame"):
        ids.tokens(span("vision"))
    with pytest.raises(ValueError, match="names of their own"):
        MixedVocabulary(text_size=3, text_loss_weight=1.0, modalities=ids.modalities * 2)
    with pytest.raises(ValueError, match="must not be negative"):
        ModalityConfig(name="vision", codes=1, loss_weight=-1.0)
