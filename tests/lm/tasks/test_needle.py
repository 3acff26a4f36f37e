import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.lm.tasks.haystack import Haystack, insert_all, place_after, place_before, python_reference, read_haystack
from ring_rl.lm.tasks.needle import CITIES, draw_needle, draw_needles
from ring_rl.lm.tasks.scorers import score
from ring_rl.lm.tokenizer.byte_tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
SENTENCES = "".join(f"Sentence number {number} says café. " for number in range(40))


class JoinedCostsMore(ByteTokenizer):
    """Takes seven tokens more for a whole prompt than for its parts, as tokenizers of words may."""

    def encode(self, text):
        ids = super().encode(text)
        return np.concatenate([ids, ids[:7]]) if "<book>" in text and "</book>" in text and len(text) > 600 else ids


@pytest.fixture(scope="module")
def haystack() -> Haystack:
    return Haystack(SENTENCES, BYTES)


class TestHaystacks:
    @given(start=st.integers(0, 39), tokens=st.integers(0, 4000))
    def test_an_excerpt_has_as_many_tokens_and_goes_round(self, haystack, start, tokens):
        begin = SENTENCES.index(f"Sentence number {start} ")
        excerpt = haystack.excerpt(begin, tokens)
        # A character of two bytes may be left out at the end, never cut.
        assert tokens - 1 <= len(BYTES.encode(excerpt)) <= tokens
        assert (SENTENCES * 4)[begin:].startswith(excerpt)

    def test_it_begins_at_any_sentence(self, haystack):
        starts = {haystack.draw_start(np.random.default_rng(seed)) for seed in range(600)}
        ends = {0, *(match.end() for match in re.finditer(r"\.(?= S)", SENTENCES))}
        assert starts == ends

    @given(depth=st.floats(0, 1))
    def test_places_are_ends_of_sentences(self, depth):
        ends = [0, *(match.end() for match in re.finditer(r"\.", SENTENCES)), len(SENTENCES)]
        wanted = int(depth * len(SENTENCES))
        assert place_before(SENTENCES, depth) == max(end for end in ends if end <= wanted)
        assert place_after(SENTENCES, depth) == min(end for end in ends if end >= wanted)

    @pytest.mark.parametrize("place", [place_before, place_after])
    def test_the_ends_of_the_text_are_reached(self, place):
        assert place(SENTENCES, 0.0) == 0
        assert place(SENTENCES, 1.0) == len(SENTENCES)

    def test_pieces_go_where_they_were_meant_to(self):
        assert insert_all("abcd", [(4, "Z"), (1, "X"), (1, "Y"), (0, "W")]) == "WaXYbcdZ"

    def test_files_are_read_in_the_order_of_their_names(self, tmp_path):
        (tmp_path / "b.txt").write_text("second")
        (tmp_path / "a.txt").write_text("first")
        (tmp_path / "c.md").write_text("other")
        assert read_haystack(tmp_path) == "first\n\nsecond"
        assert read_haystack(tmp_path / "b.txt") == "second"

    def test_bad_files_are_one_line(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no haystack at"):
            read_haystack(tmp_path / "none.txt")
        with pytest.raises(ValueError, match=r"holds no text in \.txt files"):
            read_haystack(tmp_path)
        (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
        with pytest.raises(ValueError, match="is not UTF-8 text"):
            read_haystack(tmp_path)
        with pytest.raises(ValueError, match="this one is empty"):
            Haystack(" \n", BYTES)

    def test_pythons_reference_is_a_long_text_without_needles(self):
        text = python_reference()
        assert len(text) > 300_000
        assert "special magic" not in text
        assert text == python_reference()


class TestOneNeedle:
    @given(
        seed=st.integers(0, 999),
        length=st.integers(500, 4000),
        depth=st.floats(0, 1),
        style=st.sampled_from(["easycontext", "lwm"]),
    )
    def test_it_is_whole_and_the_length_is_kept(self, haystack, seed, length, depth, style):
        sample = draw_needle(
            np.random.default_rng(seed),
            haystack=haystack,
            length=length,
            room=10,
            style=style,
            depth=depth,
            distractors=0,
        )
        (number,) = sample.answers
        assert re.fullmatch(r"[1-9]\d{6}", number)
        city = sample.details["city"]
        end = "." if style == "easycontext" else ""
        assert f"\nThe special magic {city} number is: {number}{end}\n" in sample.prompt
        assert sample.prompt.count(number) == 1
        tokens = len(BYTES.encode(sample.prompt + sample.answer_prefix))
        # Cutting inside "é" leaves a token, cutting what two passes counted twice a few more.
        assert length - 10 - 4 <= tokens <= length - 10
        assert score(sample, sample.completion) == 1.0

    def test_texts_that_take_more_tokens_than_their_parts_are_shortened(self):
        sample = draw_needle(
            np.random.default_rng(0),
            haystack=Haystack(SENTENCES, JoinedCostsMore()),
            length=2000,
            room=10,
            style="easycontext",
            depth=0.5,
            distractors=0,
        )
        tokens = len(JoinedCostsMore().encode(sample.prompt + sample.answer_prefix))
        assert 1990 - 4 <= tokens <= 1990
        assert tokens == len(BYTES.encode(sample.prompt + sample.answer_prefix)) + 7

    @pytest.mark.parametrize("style", ["easycontext", "lwm"])
    @pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
    def test_depth_is_the_share_of_text_before_it(self, haystack, style, depth):
        sample = draw_needle(
            np.random.default_rng(0),
            haystack=haystack,
            length=3000,
            room=0,
            style=style,
            depth=depth,
            distractors=0,
        )
        begin = {"easycontext": "<book>", "lwm": "USER: "}[style]
        end = {"easycontext": "</book>", "lwm": " What is the special"}[style]
        before, after = re.split(r"\nThe special magic [\w ]+ number is: \d+\.?\n", sample.prompt)
        before, after = before.split(begin)[1], after.split(end)[0]
        assert sample.depth == len(before) / (len(before) + len(after))
        sentence = 35 / 2500
        low, high = (depth, depth + sentence) if style == "easycontext" else (depth - sentence, depth)
        assert max(low, 0) <= sample.depth <= min(high, 1)

    def test_easycontexts_text(self, haystack):
        sample = draw_needle(
            np.random.default_rng(0),
            haystack=haystack,
            length=900,
            room=0,
            style="easycontext",
            depth=0.0,
            distractors=6,
        )
        assert sample.prompt.startswith(
            f"This is a very long story book: <book>\nThe special magic Singapore number is: {sample.answers[0]}.\n"
        )
        assert (sample.prompt + sample.answer_prefix).endswith(
            "</book>.\n Based on the content of the book, Question: What is the special magic Singapore number? "
            "Answer: The special magic Singapore number is:"
        )
        numbers = dict(re.findall(r"\nThe special magic ([\w ]+) number is: (\d{7})\.\n", sample.prompt))
        assert set(numbers) == {"Singapore", "New York", "London", "Paris", "Tokyo", "Beijing", "Berlin"}
        assert len(set(numbers.values())) == 7

    def test_lwms_text(self, haystack):
        sample = draw_needle(
            np.random.default_rng(0), haystack=haystack, length=900, room=0, style="lwm", depth=1.0, distractors=0
        )
        city = sample.details["city"]
        assert sample.prompt.startswith("You are a helpful assistant. USER: ")
        assert sample.prompt.endswith(
            f"\nThe special magic {city} number is: {sample.answers[0]}\n"
            f" What is the special magic {city} number? Don't give information outside the document or repeat your "
            "findings. Keep your response short and direct. ASSISTANT: "
        )

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"depth": 1.1}, r"must lie in \[0, 1\], got 1\.1"),
            ({"distractors": 7}, "between 0 and 6 distractors, got 7"),
            ({"style": "lwm", "distractors": 1}, "between 0 and 0 distractors, got 1"),
            ({"length": 200}, "hold no text besides 1 needles and the question, which take"),
        ],
    )
    def test_impossible_ones_are_refused(self, haystack, changes, message):
        asked = {"length": 900, "room": 0, "style": "easycontext", "depth": 0.5, "distractors": 0} | changes
        with pytest.raises(ValueError, match=message):
            draw_needle(np.random.default_rng(0), haystack=haystack, **asked)

    def test_a_haystack_with_needles_of_its_own_is_refused(self):
        haystack = Haystack("The special magic Rome number is: 12.\n" * 50, BYTES)
        with pytest.raises(ValueError, match="the haystack itself holds 'The special magic'"):
            draw_needle(
                np.random.default_rng(0),
                haystack=haystack,
                length=900,
                room=0,
                style="lwm",
                depth=0.5,
                distractors=0,
            )


class TestSeveralNeedles:
    @given(seed=st.integers(0, 999), needles=st.integers(1, 12), share=st.floats(0, 1), length=st.integers(1200, 4000))
    def test_all_of_them_are_there_once(self, haystack, seed, needles, share, length):
        retrieved = max(1, round(share * needles))
        sample = draw_needles(
            np.random.default_rng(seed),
            haystack=haystack,
            length=length,
            room=0,
            needles=needles,
            retrieved=retrieved,
        )
        hidden = re.findall(r"\nThe special magic ([\w ]+) number is: ([1-9]\d{6})\n", sample.prompt)
        assert len(hidden) == len(dict(hidden)) == needles
        assert [dict(hidden)[city] for city in sample.details["asked"]] == list(sample.answers)
        assert len(set(sample.answers)) == retrieved
        # As deep as they say: their order in the text is that of their depths.
        depth_of = dict(zip(sample.details["cities"], sample.details["depths"], strict=True))
        found = [depth_of[city] for city, _ in hidden]
        assert found == sorted(found)
        assert score(sample, sample.completion) == 1.0
        assert len(BYTES.encode(sample.prompt)) <= length

    def test_a_needle_at_the_end_survives_the_others(self, haystack):
        for seed in range(40):
            sample = draw_needles(
                np.random.default_rng(seed), haystack=haystack, length=1500, room=0, needles=20, retrieved=20
            )
            # Twenty needles take every one of the twenty depths, the end among them.
            assert max(sample.details["depths"]) == 1.0
            assert all(number in sample.prompt for number in sample.answers)

    @pytest.mark.parametrize(
        ("retrieved", "question"),
        [
            (1, r" What is the special magic number for [\w ]+\?"),
            (2, r" What are the special magic numbers for [\w ]+, and [\w ]+\?"),
            (3, r" What are the special magic numbers for [\w ]+, [\w ]+, and [\w ]+\?"),
        ],
    )
    def test_lwms_question(self, haystack, retrieved, question):
        sample = draw_needles(
            np.random.default_rng(0), haystack=haystack, length=1500, room=0, needles=3, retrieved=retrieved
        )
        assert re.search(question + r" Don't give information outside the document\. ASSISTANT: $", sample.prompt)

    def test_cities_stand_once_in_the_list(self):
        assert len(set(CITIES)) == len(CITIES) == 69

    @pytest.mark.parametrize(("needles", "retrieved"), [(2, 3), (0, 0), (3, 0), (70, 1)])
    def test_impossible_numbers_are_refused(self, haystack, needles, retrieved):
        with pytest.raises(ValueError, match=f"got {needles} needles and {retrieved} retrieved"):
            draw_needles(
                np.random.default_rng(0), haystack=haystack, length=1500, room=0, needles=needles, retrieved=retrieved
            )
