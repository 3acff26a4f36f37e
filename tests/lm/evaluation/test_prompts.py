import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.lm.evaluation.prompts import Prompter, TemplateConfig
from ring_rl.lm.tasks.sample import Sample
from ring_rl.lm.tokenizer.byte_tokenizer import ByteTokenizer

PLAIN = TemplateConfig(text="{prompt}", begin_with_bos=False)
CHAT = TemplateConfig(text="USER: {prompt}\nASSISTANT:\n", begin_with_bos=True)
BYTES = ByteTokenizer()


def sample(prompt="What is it?", prefix="It is", completion=" 12345", answers=("12345",)):
    return Sample(
        task="needle",
        prompt=prompt,
        answer_prefix=prefix,
        completion=completion,
        answers=answers,
        length=1,
        depth=None,
        details={},
    )


def answer_text(row, number=0):
    return BYTES.decode(row.targets[row.answer_ids == number])


def test_prompt_and_answer_are_one_text():
    prompter = Prompter(BYTES, PLAIN)
    assert BYTES.decode(prompter.prompt(sample())) == "What is it?It is"
    row = prompter.answered(sample())
    assert BYTES.decode(row.tokens) == "What is it?It is 12345"
    assert answer_text(row) == "12345"


def test_a_template_stands_between_prompt_and_answer():
    prompter = Prompter(BYTES, CHAT)
    asked = sample(prefix="", completion=" a1, b22", answers=("a1", "b22"))
    ids = prompter.prompt(asked)
    assert ids[0] == BYTES.bos_id
    assert BYTES.decode(ids) == "USER: What is it?\nASSISTANT:\n"
    row = prompter.answered(asked)
    # After a line's end no blank is wanted.
    assert BYTES.decode(row.tokens) == "USER: What is it?\nASSISTANT:\na1, b22"
    assert [answer_text(row, number) for number in (0, 1)] == ["a1", "b22"]
    assert prompter.template_tokens == len(ids) - len("What is it?")


@given(prompt=st.text(min_size=1, max_size=20), answer=st.from_regex(r"[0-9]{1,8}", fullmatch=True))
def test_the_answered_row_begins_with_the_prompt(prompt, answer):
    for template in (PLAIN, CHAT):
        prompter = Prompter(BYTES, template)
        asked = sample(prompt=prompt, completion=f" {answer}", answers=(answer,))
        start, row = prompter.prompt(asked), prompter.answered(asked)
        assert np.array_equal(row.tokens[: len(start)], start)
        assert answer_text(row) == answer


def test_a_template_without_a_place_for_the_prompt_is_refused():
    for text in ("no place", "{prompt} twice {prompt}"):
        with pytest.raises(ValueError, match=r"holds \{prompt\} once"):
            TemplateConfig(text=text, begin_with_bos=False)
