"""Which targets are learned of a row that asks and answers."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from ring_rl.lm.token_batch import TokenBatch

__all__ = ["LossOn", "weighted"]

LossOn = Literal["answers", "everywhere"]


def weighted(row: TokenBatch, loss_on: LossOn) -> TokenBatch:
    """A row whose weights are those of its answers, with these weights or with 1 for every target."""
    if loss_on == "answers":
        return row
    return dataclasses.replace(row, weights=(row.targets >= 0).astype(np.float32))
