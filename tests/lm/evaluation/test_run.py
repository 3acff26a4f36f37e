"""An evaluation asks every sample once, also after it was cut off, and its records say what the model did."""

import numpy as np
import pytest

from ring_rl.lm.evaluation.cells import SampleRecord
from ring_rl.lm.evaluation.line_retrieval import LineRetrieval, LineRetrievalConfig
from ring_rl.lm.evaluation.prompts import Prompter, TemplateConfig
from ring_rl.lm.evaluation.run import Questioner, QuestionsConfig, evaluate, missing_samples
from ring_rl.lm.evaluation.sample_log import SampleLog
from ring_rl.lm.key_words import key_words
from ring_rl.lm.tokenizer.compact_tokenizer import compact_tokenizer
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.training.mesh import MeshConfig, make_mesh

TOKENIZER = compact_tokenizer(key_words("small"))
PROMPTER = Prompter(TOKENIZER, TemplateConfig(text="{prompt}", begin_with_bos=False))
SAMPLES = 5


@pytest.fixture(scope="module")
def suite():
    config = LineRetrievalConfig(
        name="line_retrieval",
        form="compact",
        unit="lines",
        lengths=(2, 4),
        depths=None,
        samples=SAMPLES,
        seed=0,
        words="small",
        index_kind="words",
        answer_start="none",
        max_new_tokens=20,
    )
    return LineRetrieval(config, PROMPTER)


@pytest.fixture(scope="module")
def questioner(tiny_language_model):
    mesh = make_mesh(MeshConfig(dp=1, fsdp=1, tp=1, sp=1))
    return Questioner(
        tiny_language_model(vocabulary_size=TOKENIZER.vocabulary_size),
        PROMPTER,
        parallel=SequenceParallel(mesh=mesh, layout="contiguous"),
        questions=QuestionsConfig(modes=("teacher_forced", "generated"), batch_tokens=96, chunk_size=16),
    )


def opened(folder):
    return SampleLog(folder, record_type=SampleRecord, key=lambda record: record.key, identity={})


@pytest.fixture(scope="module")
def records(suite, questioner, tmp_path_factory):
    """Of an evaluation that was cut off once."""
    folder, answered = tmp_path_factory.mktemp("evaluation"), []

    def cut_off(what, count):
        answered.append(count)
        if sum(answered) >= 7:
            raise KeyboardInterrupt

    with opened(folder) as log, pytest.raises(KeyboardInterrupt):
        evaluate(questioner, suite, log, on_samples=cut_off)
    again = []
    with opened(folder) as log:
        before = dict(log.records)
        assert len(before) == sum(answered)
        evaluate(questioner, suite, log, on_samples=lambda what, count: again.append(count))
        assert sum(again) == 2 * 2 * SAMPLES - len(before)
        assert missing_samples(suite, log, questioner.questions.modes) == {}
        assert {key: log.records[key] for key in before} == before
        return dict(log.records)


def test_every_sample_is_asked_once_in_each_mode(suite, records):
    wanted = {
        cell.key(mode, index)
        for cell in suite.cells()
        for mode in ("teacher_forced", "generated")
        for index in range(SAMPLES)
    }
    assert set(records) == wanted


def test_records_say_what_was_asked_and_what_came(suite, records):
    for cell in suite.cells():
        for index in range(SAMPLES):
            sample = suite.sample(cell, index)
            forced, written = (records[cell.key(mode, index)] for mode in ("teacher_forced", "generated"))
            for record in (forced, written):
                assert record.answers == sample.answers
                assert record.items == cell.length
                assert record.answer_depth == sample.depth
                assert record.tokens == 9 * cell.length + 4
                assert record.chance == 1 / cell.length
            assert forced.negative_log_likelihood > 0
            assert written.negative_log_likelihood is None
            # Up to the first digit that is wrong both have read the same.
            said = [each.output.split() for each in (forced, written)]
            right = forced.answers[0].split()
            agree = next((place for place in range(5) if said[0][place] != right[place]), 4)
            assert said[0][: agree + 1] == said[1][: agree + 1]
            assert forced.score == written.score == float(said[0] == right)


def test_a_model_that_knows_the_answers_scores_one(suite, questioner, monkeypatch):
    """The scores above are all but surely 0; here the answers are put into the model's mouth."""
    import ring_rl.lm.evaluation.run as run

    real = run.teacher_forced

    def knowing(*arguments, **options):
        return [
            type(each)(each.targets, each.targets, each.answer_ids, np.zeros_like(each.log_probabilities))
            for each in real(*arguments, **options)
        ]

    monkeypatch.setattr(run, "teacher_forced", knowing)
    (verdict,) = questioner.teacher_forced([suite.sample(suite.cells()[0], 0)], batch_size=2)
    assert (verdict.score, verdict.negative_log_likelihood) == (1.0, 0.0)


def test_bad_questions_are_refused():
    with pytest.raises(ValueError, match="at least one mode, and each once"):
        QuestionsConfig(modes=(), batch_tokens=1, chunk_size=1)
    with pytest.raises(ValueError, match="batch_tokens must be at least 1, got 0"):
        QuestionsConfig(modes=("generated",), batch_tokens=0, chunk_size=1)
