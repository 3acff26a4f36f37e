"""What a checkpoint is on disk, and reading it without the training that wrote it.

Layout of one checkpoint, `<folder>/<step>/`:

    parameters   the model's arrays, nested dicts by parameter name
    training     the step and the optimizer's arrays, nested dicts by position
    metadata     JSON: the fields of `CheckpointMetadata`
    metrics      JSON: the metrics of that step, where the best checkpoints are kept too
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from ring_rl.training.named_arrays import with_integer_keys
from ring_rl.typing import PyTree

__all__ = [
    "FORMAT_VERSION",
    "BestCheckpoints",
    "CheckpointMetadata",
    "best_step",
    "load_arrays",
    "load_for_evaluation",
    "opened_reader",
    "read_metadata",
    "saved_tree",
    "whole_steps",
]

FORMAT_VERSION = 2
# Parameters are stored alike in both; a run goes on from the present format only.
_FORMATS_WITH_PARAMETERS = (1, 2)


@dataclasses.dataclass(frozen=True)
class CheckpointMetadata:
    """What stands beside the arrays.

    Attributes:
        format_version: of this module's layout.
        ring_rl_version: of the library that wrote the checkpoint.
        step: optimizer steps taken.
        model_config: the plain mapping that the model was built from.
        extra: what the task wants to find again (normalisation constants, token layout); plain JSON.
        input_state: of the `BatchStream`, for its next batch to be the one that was not trained on yet; plain
            JSON, the same for any mesh and number of processes. None where none was given.
        recent_losses: what the check for an exploding loss has seen last.
        best: `{"metric": ..., "mode": ...}` by which the best checkpoints are kept; None keeps none for that.
    """

    format_version: int
    ring_rl_version: str
    step: int
    model_config: dict[str, Any]
    extra: dict[str, Any]
    input_state: dict[str, Any] | None
    recent_losses: list[float]
    best: dict[str, str] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestCheckpoints:
    """Keep checkpoints for being good, whatever their age.

    Attributes:
        metric: its name among the metrics given to `save`. A checkpoint that comes without it, or with a value
            that is not finite, counts as worse than any other.
        mode: whether the least or the greatest value is the best; of equal ones the newest is.
        keep: how many.
    """

    metric: str
    mode: Literal["min", "max"]
    keep: int

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"at least 1 best checkpoint must be kept, got {self.keep}")

    def score(self, metrics: Mapping[str, float]) -> float:
        """The greater the better; minus infinity for none."""
        return _score(metrics, self.metric, self.mode)


def load_for_evaluation(
    folder: pathlib.Path, *, step: int | Literal["best"] | None = None
) -> tuple[CheckpointMetadata, PyTree[np.ndarray]]:
    """Read a checkpoint's metadata and parameters as numpy arrays, without knowing how it was trained.

    It needs neither the mesh nor the devices nor the optimizer of the training run, and changes nothing in
    the folder, so it may run beside a training that still writes there.

    Args:
        folder: a run's checkpoint folder.
        step: which checkpoint; the newest when None. "best" takes the best of those on disk by the metric that
            the newest was saved with.

    Returns:
        The metadata, and nested dicts of arrays by parameter name, as `nnx.replace_by_pure_dict` takes them.

    Raises:
        FileNotFoundError: there is no such folder, no such checkpoint in it, or none with a value of the metric.
        ValueError: the checkpoint was written in another format, cannot be read, or the best is asked for and
            the run kept none.
    """
    folder = pathlib.Path(folder).absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"no checkpoint folder {folder}; train first, or name the folder of a run")
    steps = whole_steps(folder)
    if not steps:
        raise FileNotFoundError(f"no checkpoint in {folder}; train first, or name a run that has saved one")
    if step == "best":
        step = _best_by_own_account(folder, steps[-1])
    step = steps[-1] if step is None else step
    if step not in steps:
        present = ", ".join(map(str, steps))
        raise FileNotFoundError(f"no checkpoint of step {step} in {folder}; choose one of {present}")
    checkpoint = folder / str(step)
    metadata = read_metadata(checkpoint, formats=_FORMATS_WITH_PARAMETERS)
    with opened_reader(checkpoint) as reader:
        parameters = _read_arrays(reader, checkpoint, "parameters")["parameters"]
    return metadata, with_integer_keys(parameters)


def load_arrays(folder: pathlib.Path, *, step: int) -> PyTree[np.ndarray]:
    """Every array of a checkpoint as numpy arrays, the optimizer's too, in nested dicts: to compare two runs.

    Raises:
        ValueError: the checkpoint cannot be read.
    """
    checkpoint = pathlib.Path(folder).absolute() / str(step)
    with opened_reader(checkpoint) as reader:
        return _read_arrays(reader, checkpoint, "parameters", "training")


def whole_steps(folder: pathlib.Path) -> list[int]:
    """Steps in ascending order, read from the disk and not from what this process believes."""
    return sorted(ocp.path.step.checkpoint_steps(folder))


def _score(metrics: Mapping[str, float], metric: str, mode: str) -> float:
    value = metrics.get(metric)
    if value is None or not math.isfinite(value):
        return -math.inf
    return value if mode == "max" else -value


def best_step(folder: pathlib.Path, metric: str, mode: str) -> int | None:
    """The whole checkpoint with the best value of the metric; None where none has one."""
    scores = {step: _score(_read_metrics(folder / str(step)), metric, mode) for step in whole_steps(folder)}
    best = max(scores, key=lambda step: (scores[step], step), default=None)
    return None if best is None or scores[best] == -math.inf else best


def _best_by_own_account(folder: pathlib.Path, newest: int) -> int:
    """The best checkpoint by the metric that the newest one names."""
    best = read_metadata(folder / str(newest), formats=_FORMATS_WITH_PARAMETERS).best
    if best is None:
        raise ValueError(f"the run of {folder} kept no best checkpoint; train with best_metric, or choose a step")
    step = best_step(folder, best["metric"], best["mode"])
    if step is None:
        raise FileNotFoundError(f"no checkpoint in {folder} has a value of {best['metric']}; choose a step")
    return step


def _read_metrics(checkpoint: pathlib.Path) -> dict[str, float]:
    # None were asked for, or a killed process was about to delete this checkpoint.
    if not (checkpoint / "metrics" / "metrics").exists():
        return {}
    # The handler alone: a reader would wait for the other processes, which may see other checkpoints yet.
    return dict(ocp.JsonCheckpointHandler(filename="metrics").restore(epath.Path(checkpoint / "metrics")))


def read_metadata(checkpoint: pathlib.Path, *, formats: tuple[int, ...]) -> CheckpointMetadata:
    """What stands beside the arrays; ValueError for a format that is not one of these."""
    with opened_reader(checkpoint) as reader:
        mapping = reader.restore(checkpoint, args=ocp.args.Composite(metadata=ocp.args.JsonRestore()))["metadata"]
    version = mapping.get("format_version")
    if version not in formats:
        raise ValueError(
            f"the checkpoint {checkpoint} has format {version}, this ring_rl goes on from {FORMAT_VERSION}; "
            f"use ring_rl {mapping.get('ring_rl_version')}, which wrote it, or train in another run folder"
        )
    added_in_2 = {"input_state": None, "recent_losses": [], "best": None}
    return CheckpointMetadata(**(added_in_2 | mapping))


def _read_arrays(reader: ocp.Checkpointer, checkpoint: pathlib.Path, *items: str) -> dict[str, PyTree[np.ndarray]]:
    as_numpy = {}
    for item in items:
        tree = saved_tree(reader, checkpoint, item)
        # Without a type asked for, the arrays would come back on the devices that they were saved from.
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        as_numpy[item] = ocp.args.PyTreeRestore(restore_args=restore_args)
    restored = reader.restore(checkpoint, args=ocp.args.Composite(**as_numpy))
    return {item: restored[item] for item in items}


def saved_tree(reader: ocp.Checkpointer, checkpoint: pathlib.Path, item: str) -> PyTree[Any]:
    """Shapes and types of an item's arrays, as nested dicts."""
    items = reader.metadata(checkpoint).item_metadata
    if items is None or items[item] is None:
        raise ValueError(f"it holds no {item}")
    return items[item].tree


@contextlib.contextmanager
def opened_reader(checkpoint: pathlib.Path) -> Iterator[ocp.Checkpointer]:
    """A reader of whole checkpoints; whatever it trips over becomes one line that names the checkpoint."""
    handler = ocp.CompositeCheckpointHandler(
        parameters=ocp.PyTreeCheckpointHandler(),
        training=ocp.PyTreeCheckpointHandler(),
        metadata=ocp.JsonCheckpointHandler(),
        # Not read through it, but Orbax warns of items that it knows no handler for.
        metrics=ocp.JsonCheckpointHandler(filename="metrics"),
    )
    try:
        with ocp.Checkpointer(handler) as reader:
            yield reader
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(
            f"the checkpoint {checkpoint} cannot be read ({reason}); "
            f"move that folder away to fall back on an earlier one"
        ) from error
