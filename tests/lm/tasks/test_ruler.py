import itertools
import re
from collections import Counter

import numpy as np
import pytest

from ring_rl.lm.tasks.ruler import RulerSource
from ring_rl.lm.tasks.ruler_tasks import RULER_TASKS
from ring_rl.lm.tasks.scorers import score
from ring_rl.lm.tokenizer.byte_tokenizer import ByteTokenizer

pytest.importorskip("wonderwords", reason="brings RULER's words")

BYTES = ByteTokenizer()
LENGTHS = {
    "niah_single_1": 3000,
    "niah_multikey_2": 3000,
    "niah_multikey_3": 3000,
    "vt": 5000,
    "cwe": 9000,
    "fwe": 3000,
}
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


class WordCounter:
    """Counts words, so that thousands of them are made and counted quickly; it decodes nothing."""

    vocabulary_size = 1
    bos_id = None
    eos_id = None

    def encode(self, text):
        return np.zeros(len(text.split()), np.int32)


@pytest.fixture(scope="module")
def sources() -> dict[str, RulerSource]:
    return {task: RulerSource(task, length=length, room=100, tokenizer=BYTES) for task, length in LENGTHS.items()}


def draw(sources, task, seed=0, **options):
    return sources[task].sample(np.random.default_rng(seed), **options)


@pytest.mark.parametrize("task", LENGTHS)
class TestEveryTask:
    def test_the_context_fills_the_length(self, sources, task):
        source = sources[task]
        samples = [draw(sources, task, seed) for seed in range(8)]
        tokens = [len(BYTES.encode(sample.prompt + sample.answer_prefix)) for sample in samples]
        assert max(tokens) <= LENGTHS[task] - 100
        assert min(tokens) > 0.85 * (LENGTHS[task] - 100)
        # The very next size would not have fitted when the size was searched for.
        bigger = RULER_TASKS[task].draw(np.random.default_rng(0), source.size + 1, LENGTHS[task], None)
        assert len(BYTES.encode(bigger.prompt + bigger.answer_prefix)) > LENGTHS[task] - 100

    def test_the_completion_is_right_and_nothing_else_is(self, sources, task):
        sample = draw(sources, task)
        assert score(sample, sample.completion) == 1.0
        assert score(sample, "I cannot find it.") == 0.0
        assert len(set(sample.answers)) == len(sample.answers)

    def test_generators_decide(self, sources, task):
        assert draw(sources, task, 5) == draw(sources, task, 5)
        assert draw(sources, task, 5).answers != draw(sources, task, 6).answers

    def test_lengths_that_hold_nothing_are_refused(self, sources, task):
        with pytest.raises(ValueError, match=rf"the smallest context of {task} takes \d+ tokens, 100 are left"):
            RulerSource(task, length=200, room=100, tokenizer=BYTES)


class TestNeedles:
    def test_single_1_is_a_needle_in_noise(self, sources):
        sample = draw(sources, "niah_single_1")
        kind, key, value = "number", sample.details["key"], sample.answers[0]
        lines = sample.prompt.split("\n")
        assert lines[0] == (
            f"A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you "
            f"about the {kind} afterwards."
        )
        assert lines[-1] == f"What is the special magic {kind} for {key} mentioned in the provided text?"
        assert Counter(lines[1:-1]) == {
            NOISE: sample.details["sentences"],
            f"One of the special magic numbers for {key} is: {value}.": 1,
        }
        assert sample.answer_prefix == f" The special magic {kind} for {key} mentioned in the provided text is"
        assert re.fullmatch(r"[1-9]\d{6}", value)

    @pytest.mark.parametrize(
        ("task", "kind", "key", "value"),
        [
            ("niah_multikey_2", "numbers", r"[\w'-]+", r"[1-9]\d{6}"),
            ("niah_multikey_3", "uuids", r"[\da-f]{8}(?:-[\da-f]{4}){3}-[\da-f]{12}", r"[\da-f]{8}-[\da-f-]{27}"),
        ],
    )
    def test_multikeys_are_needles_among_needles(self, sources, task, kind, key, value):
        sample = draw(sources, task)
        lines = sample.prompt.split("\n")[1:-1]
        pattern = re.compile(rf"One of the special magic {kind} for ({key}) is: ({value})\.")
        found = [match.groups() for line in lines if (match := pattern.fullmatch(line))]
        assert len(found) == len(lines) == sample.details["sentences"] + 1
        # No key twice: the question has one answer.
        assert len(dict(found)) == len({value for _, value in found}) == len(found)
        assert dict(found)[sample.details["key"]] == sample.answers[0]
        assert f"for {sample.details['key']} mentioned" in sample.prompt.split("\n")[-1]

    @pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
    def test_depth_places_the_needle(self, sources, depth):
        sample = draw(sources, "niah_single_1", depth=depth)
        lines = sample.prompt.split("\n")[1:-1]
        assert lines.index(next(line for line in lines if line != NOISE)) == round(depth * (len(lines) - 1))
        assert sample.depth == pytest.approx(depth, abs=0.5 / (len(lines) - 1))

    def test_without_a_depth_it_is_anywhere(self, sources):
        depths = [draw(sources, "niah_single_1", seed).depth for seed in range(200)]
        assert min(depths) < 0.05
        assert max(depths) > 0.9
        assert 0.4 < np.mean(depths) < 0.6

    @pytest.mark.parametrize(("task", "depth"), [("vt", 0.5), ("niah_single_1", 1.5)])
    def test_other_depths_are_refused(self, sources, task, depth):
        with pytest.raises(ValueError, match="goes with RULER's needles"):
            draw(sources, task, depth=depth)


class TestVariableTracking:
    def test_the_chain_is_hidden_in_order_behind_a_worked_example(self, sources):
        sample = draw(sources, "vt")
        example, text = sample.prompt.split("\n\nMemorize and track")
        value = re.search(r"assigned the value (\d{5}) in the text above\.$", sample.prompt).group(1)
        chain = re.findall(r"^VAR .*$", text, re.MULTILINE)
        names = sample.answers
        assert chain == [
            f"VAR {names[0]} = {value}",
            *(f"VAR {new} = VAR {old} " for old, new in itertools.pairwise(names)),
        ]
        assert all(re.fullmatch("[A-Z]{5}", name) for name in names)
        assert len(names) == 5
        assert text.count(NOISE) == sample.details["sentences"]
        assert sample.answer_prefix == (
            " Answer: According to the chain(s) of variable assignment in the text above, 5 variables are assgined the "
            f"value {value}, they are: "
        )
        of_example = re.findall(r"^VAR ([A-Z]{3}) = ", example, re.MULTILINE)
        assert example.endswith("they are:  " + " ".join(of_example))
        assert len(of_example) == 5


class TestWords:
    @pytest.mark.parametrize(("length", "common", "uncommon"), [(2500, 6, 1), (9000, 30, 3)])
    def test_common_words_are_the_most_frequent(self, length, common, uncommon):
        sample = RulerSource("cwe", length=length, room=100, tokenizer=BYTES).sample(np.random.default_rng(0))
        text = sample.prompt.split("Memorize the ones that appear most often.\n")[2]
        listed = re.findall(r"(\d+)\. (\S+)", text.split("\nQuestion")[0])
        assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
        counts = Counter(word for _, word in listed)
        assert {word for word, count in counts.items() if count == common} == set(sample.answers)
        assert set(counts.values()) == {common, uncommon}
        assert len(sample.answers) == 10
        assert len(counts) == sample.details["words"]

    def test_running_out_of_words_is_said(self):
        with pytest.raises(ValueError, match=r"cwe has \d+ words, which fill \d+ of 999900 tokens"):
            RulerSource("cwe", length=1_000_000, room=100, tokenizer=WordCounter())

    @pytest.mark.parametrize("length", [700, 3000, 20000])
    def test_coded_words_fall_off_as_zeta(self, length):
        source = RulerSource("fwe", length=length, room=50, tokenizer=WordCounter())
        sample = source.sample(np.random.default_rng(0))
        text = sample.prompt.split("coded words. ")[1].split("\nQuestion")[0]
        counts = Counter(text.split())
        ranked = [word for word, _ in counts.most_common(5)]
        assert ranked[0] == "..."
        assert tuple(ranked[1:4]) == sample.answers
        assert counts[ranked[3]] > counts[ranked[4]]
        expected = sample.details["words"] * 6 / np.pi**2 / np.arange(1, 5) ** 2
        np.testing.assert_allclose([counts[word] for word in ranked[:4]], expected, rtol=0.1, atol=2)
        assert all(re.fullmatch("[a-z]{6}", word) for word in counts if word != "...")


def test_other_tasks_are_named():
    with pytest.raises(ValueError, match="RULER has no task 'qa_1' here; there are niah_single_1"):
        RulerSource("qa_1", length=1000, room=0, tokenizer=BYTES)
