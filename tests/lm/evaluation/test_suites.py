"""Suites draw the samples that their cells say, the same ones every time, and within the tokens asked for."""

import dataclasses

import pytest

from ring_rl.lm.evaluation.line_retrieval import LineRetrievalConfig
from ring_rl.lm.evaluation.needles import MultiNeedleConfig, SingleNeedleConfig
from ring_rl.lm.evaluation.prompts import Prompter, TemplateConfig
from ring_rl.lm.evaluation.ruler import RulerConfig
from ring_rl.lm.evaluation.suites import make_suite
from ring_rl.lm.key_words import key_words
from ring_rl.lm.tokenizer.byte_tokenizer import ByteTokenizer
from ring_rl.lm.tokenizer.compact_tokenizer import compact_tokenizer

PLAIN = TemplateConfig(text="{prompt}", begin_with_bos=False)
CHAT = TemplateConfig(text="USER: {prompt} ASSISTANT:", begin_with_bos=True)
LINES = LineRetrievalConfig(
    name="line_retrieval",
    form="compact",
    unit="tokens",
    lengths=(90, 180),
    depths=None,
    samples=3,
    seed=0,
    words="small",
    index_kind="words",
    answer_start="none",
    max_new_tokens=20,
)
NEEDLE = SingleNeedleConfig(
    name="needle",
    lengths=(1200, 2400),
    depths=(0.0, 0.5, 1.0),
    samples=2,
    seed=0,
    style="easycontext",
    distractors=0,
    haystack=None,
    max_new_tokens=16,
)
MULTI = MultiNeedleConfig(
    name="multi_needle",
    lengths=(2400,),
    samples=2,
    seed=0,
    needles=4,
    retrieved=2,
    haystack=None,
    max_new_tokens=32,
)
RULER = RulerConfig(name="ruler", tasks=("niah_multikey_3", "fwe"), lengths=(2600,), samples=2, seed=0)

CONFIGS = {
    "compact": LINES,
    "longeval": dataclasses.replace(LINES, form="longeval", lengths=(2000, 4000)),
    "needle": NEEDLE,
    "multi_needle": MULTI,
    "ruler": RULER,
}


@pytest.fixture(scope="module", params=CONFIGS)
def suite_and_prompter(request):
    tokenizer = compact_tokenizer(key_words("small")) if request.param == "compact" else ByteTokenizer()
    prompter = Prompter(tokenizer, PLAIN if request.param == "compact" else CHAT)
    return make_suite(CONFIGS[request.param], prompter), prompter


def test_samples_are_the_same_whenever_they_are_asked_for_and_no_two_alike(suite_and_prompter):
    suite, _ = suite_and_prompter
    drawn = {(cell, index): suite.sample(cell, index) for cell in suite.cells() for index in range(suite.samples)}
    for (cell, index), sample in reversed(drawn.items()):
        assert suite.sample(cell, index) == sample
    prompts = [sample.prompt for sample in drawn.values()]
    assert len(set(prompts)) == len(prompts)


def test_prompt_and_answer_fill_the_length_and_do_not_exceed_it(suite_and_prompter):
    suite, prompter = suite_and_prompter
    for cell in suite.cells():
        for index in range(suite.samples):
            sample = suite.sample(cell, index)
            tokens = len(prompter.prompt(sample)) + suite.max_new_tokens(cell)
            assert tokens <= cell.length
            assert tokens >= 0.85 * cell.length
            assert len(prompter.answered(sample).tokens) <= cell.length
            assert 0 <= suite.chance(sample) < 1
            assert suite.items(sample) is None or suite.items(sample) >= 1


def test_lines_are_counted_where_lengths_are_lines():
    config = dataclasses.replace(LINES, unit="lines", lengths=(7,))
    suite = make_suite(config, Prompter(compact_tokenizer(key_words("small")), PLAIN))
    (cell,) = suite.cells()
    sample = suite.sample(cell, 0)
    assert sample.prompt.count("LINE") == suite.items(sample) == 7
    assert suite.chance(sample) == 1 / 7


def test_depths_put_the_answer_where_they_say():
    needle = make_suite(NEEDLE, Prompter(ByteTokenizer(), PLAIN))
    for cell in needle.cells():
        assert needle.sample(cell, 0).depth == pytest.approx(cell.depth, abs=0.25)
    lines = make_suite(
        dataclasses.replace(LINES, depths=(0.0, 1.0)), Prompter(compact_tokenizer(key_words("small")), PLAIN)
    )
    assert [lines.sample(cell, 0).depth for cell in lines.cells()] == [0.0, 1.0, 0.0, 1.0]


def test_what_is_no_grid_is_refused():
    with pytest.raises(ValueError, match=r"lengths must be positive and ascend, got \[180, 90\]"):
        dataclasses.replace(LINES, lengths=(180, 90))
    with pytest.raises(ValueError, match=r"depths must lie in \[0, 1\] and ascend"):
        dataclasses.replace(NEEDLE, depths=(0.0, 1.5))
    with pytest.raises(ValueError, match="samples must be at least 1"):
        dataclasses.replace(MULTI, samples=0)
    with pytest.raises(ValueError, match="each once"):
        dataclasses.replace(RULER, tasks=("vt", "vt"))
    suite = make_suite(dataclasses.replace(CONFIGS["longeval"], lengths=(100,)), Prompter(ByteTokenizer(), PLAIN))
    with pytest.raises(ValueError, match="100 tokens hold no line besides header"):
        suite.sample(suite.cells()[0], 0)
