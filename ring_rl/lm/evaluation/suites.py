"""Suites by what a configuration calls them."""

from __future__ import annotations

from ring_rl.lm.evaluation.line_retrieval import LineRetrieval, LineRetrievalConfig
from ring_rl.lm.evaluation.needles import MultiNeedleConfig, Needles, SingleNeedleConfig
from ring_rl.lm.evaluation.prompts import Prompter
from ring_rl.lm.evaluation.ruler import Ruler, RulerConfig
from ring_rl.lm.evaluation.suite import Suite

__all__ = ["MAY_GROW", "SuiteConfig", "make_suite"]

SuiteConfig = LineRetrievalConfig | SingleNeedleConfig | MultiNeedleConfig | RulerConfig

# What says which samples are asked, and nothing about any of them: an evaluation may go on with more of them.
MAY_GROW = ("suite.lengths", "suite.depths", "suite.samples", "suite.tasks", "suite.rules")


def make_suite(config: SuiteConfig, prompter: Prompter) -> Suite:
    """The suite for one model's tokenizer and template.

    Raises:
        FileNotFoundError, ImportError, ValueError: What it is made of is not there.
    """
    match config:
        case LineRetrievalConfig():
            return LineRetrieval(config, prompter)
        case SingleNeedleConfig() | MultiNeedleConfig():
            return Needles(config, prompter)
        case RulerConfig():
            return Ruler(config, prompter)
