"""Checkpoints: written in the background, committed atomically, restored on any mesh.

A checkpoint is written under a temporary name and renamed when it is whole, so a killed process leaves either
all of it or nothing that counts. Where several processes train together they all save and restore, each its own
shards, to one folder that they share; the JSON is written by the first of them. The layout on disk is that of
`ring_rl.training.checkpoint_format`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp

import ring_rl
from ring_rl.config import describe_differences
from ring_rl.training.checkpoint_format import (
    FORMAT_VERSION,
    BestCheckpoints,
    CheckpointMetadata,
    best_step,
    load_for_evaluation,
    opened_reader,
    read_metadata,
    saved_tree,
    whole_steps,
)
from ring_rl.training.disk_full import EchoSilencer, means_no_space
from ring_rl.training.distributed import on_main_process
from ring_rl.training.named_arrays import (
    abstract_arrays,
    described_arrays,
    named_arrays,
    with_arrays,
)
from ring_rl.training.state import TrainState
from ring_rl.typing import PyTree

__all__ = ["BestCheckpoints", "CheckpointMetadata", "Checkpointer", "load_for_evaluation"]


class Checkpointer:
    """Saves and restores `TrainState`s in one folder, asynchronously, keeping the last few.

    Use it as a context manager, or call `close`: both wait for the save under way. One process writes to a
    folder at a time; `run_directory` sees to that with a lock.

    Args:
        folder: holds one folder a checkpoint; created when missing.
        keep: how many of the newest stay; an older one is deleted only after a newer one is whole.
        best: keep the best ones as well.
        model_config: the plain mapping that the model is built from; restoring under another one is refused.
        may_differ: dotted paths of it that may be others on restoring, because the parameters mean the same.
        extra: plain JSON that every checkpoint carries.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        keep: int,
        model_config: Mapping[str, Any],
        extra: Mapping[str, Any] | None = None,
        best: BestCheckpoints | None = None,
        may_differ: tuple[str, ...] = (),
    ):
        if keep < 1:
            raise ValueError(f"at least 1 checkpoint must be kept, got {keep}")
        self.folder = pathlib.Path(folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._model_config = _through_json(model_config, "model_config")
        self._extra = _through_json(extra or {}, "extra")
        self._best = best
        self._may_differ = may_differ
        self._silencer = EchoSilencer()
        policies = ocp.checkpoint_managers
        preserve = policies.LatestN(keep)
        if best is not None:
            # Those without metrics have a score too: were they exempt, they would never be deleted.
            ranked = policies.BestN(get_metric_fn=best.score, n=best.keep, keep_checkpoints_without_metrics=False)
            preserve = policies.AnyPreservationPolicy([preserve, ranked])
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preserve,
                # Only where a best one is asked for does Orbax write the metrics.
                best_fn=None if best is None else best.score,
                # What a killed process left half written goes away when the folder is opened again.
                cleanup_tmp_directories=True,
            ),
        )
        self._silencer.start()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def latest_step(self) -> int | None:
        """The newest step that lies whole on disk, or None; all processes ask, and get the same answer."""
        return on_main_process("latest_step", lambda: max(whole_steps(self.folder), default=None))

    def best_step(self) -> int | None:
        """The step of the best checkpoint that is whole on disk, or None; all processes get the same answer."""
        best = self._best
        if best is None:
            return None
        return on_main_process("best_step", lambda: best_step(self.folder, best.metric, best.mode))

    def save(
        self,
        state: TrainState,
        *,
        input_state: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        recent_losses: Sequence[float] = (),
    ) -> bool:
        """Copy the state off the devices and write it in the background; the state may be donated after.

        Args:
            state: all processes pass theirs.
            input_state: plain JSON, the same in all processes; see `CheckpointMetadata`.
            metrics: of this step, to find the best checkpoint by.
            recent_losses: see `CheckpointMetadata`.

        Returns:
            False when a checkpoint of this step exists already: it stays as it is.

        Raises:
            OSError: no space left, for this save or for the one before it, which ran in the background.
        """
        self.wait()
        step = int(state.step)
        # What another process sees of a shared disk may lag behind.
        if on_main_process("saved_already", lambda: step in whole_steps(self.folder)):
            return False
        metadata = CheckpointMetadata(
            format_version=FORMAT_VERSION,
            ring_rl_version=ring_rl.__version__,
            step=step,
            model_config=self._model_config,
            extra=self._extra,
            input_state=None if input_state is None else _through_json(input_state, "input_state"),
            recent_losses=list(recent_losses),
            best=None if self._best is None else {"metric": self._best.metric, "mode": self._best.mode},
        )
        items = _items(state)
        finite = {name: float(value) for name, value in (metrics or {}).items() if math.isfinite(value)}
        with self._explained_errors():
            return self._manager.save(
                step,
                metrics=finite,
                args=ocp.args.Composite(
                    parameters=ocp.args.PyTreeSave(items["parameters"]),
                    training=ocp.args.PyTreeSave(items["training"]),
                    metadata=ocp.args.JsonSave(dataclasses.asdict(metadata)),
                ),
            )

    def wait(self) -> None:
        """Return once the save under way, if any, is whole on disk.

        Raises:
            OSError: it failed because no space is left; the earlier checkpoints are intact.
        """
        with self._explained_errors():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Wait for the save under way and release the folder."""
        try:
            self.wait()
        finally:
            with self._explained_errors():
                self._manager.close()
        # Not in the finally: writes that a failed save left behind may still end after this.
        self._silencer.stop()

    def restore_latest(self, like: TrainState) -> tuple[TrainState, CheckpointMetadata]:
        """The newest whole checkpoint, with the structure, types and shardings of `like`.

        The mesh and the number of processes that wrote it do not matter: every array is laid out as its
        counterpart in `like`. All processes call this.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: it belongs to another model (the differing keys or shapes are listed), was written in
                another format (of format 1 only the parameters can be read), or cannot be read.
        """
        self.wait()
        step = self.latest_step()
        if step is None:
            raise FileNotFoundError(f"no checkpoint in {self.folder}; train first, or name a run that has saved one")
        checkpoint = self.folder / str(step)
        metadata = read_metadata(checkpoint, formats=(FORMAT_VERSION,))
        differences = describe_differences(metadata.model_config, self._model_config, ignore=self._may_differ)
        if differences:
            raise ValueError(
                f"the checkpoint {checkpoint} holds another model: {'; '.join(differences)}; "
                f"build the model as it was saved, or choose another run folder"
            )
        wanted = abstract_arrays(_items(like))
        with opened_reader(checkpoint) as reader:
            saved = described_arrays({item: saved_tree(reader, checkpoint, item) for item in wanted})
        differences = describe_differences(saved, described_arrays(wanted))
        if differences:
            shown = "; ".join(differences[:4]) + ("; ..." if len(differences) > 4 else "")
            raise ValueError(
                f"{len(differences)} arrays of the checkpoint {checkpoint} do not fit: {shown}; "
                f"build the model and the optimizer as they were saved, or choose another run folder"
            )
        with opened_reader(checkpoint) as reader:
            restored = reader.restore(
                checkpoint,
                args=ocp.args.Composite(**{item: _restore_as(tree) for item, tree in wanted.items()}),
            )
        training = with_arrays(_training_part(like), restored["training"])
        parameters = with_arrays(like.parameters, restored["parameters"])
        return TrainState(training["step"], parameters, training["optimizer"]), metadata

    @contextlib.contextmanager
    def _explained_errors(self) -> Iterator[None]:
        """A full disk, however deep in the writer it was met, becomes one OSError that says what is left."""
        try:
            yield
        except Exception as error:
            if not means_no_space(error):
                raise
            # This process's own view: the others may not have met the error.
            latest = max(whole_steps(self.folder), default=None)
            left = "none was saved before" if latest is None else f"that of step {latest} is intact"
            raise OSError(
                errno.ENOSPC,
                f"no space left to save a checkpoint ({left}); free some space and start again to resume",
                str(self.folder),
            ) from error


def _through_json(mapping: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The mapping as a checkpoint will give it back: a tuple must not differ from the list it becomes."""
    try:
        return json.loads(json.dumps(dict(mapping)))
    except TypeError as error:
        raise ValueError(f"a checkpoint's {what} must be plain JSON: {error}; use to_mapping") from None


def _items(state: TrainState) -> dict[str, dict[str, Any]]:
    return {"parameters": named_arrays(state.parameters), "training": named_arrays(_training_part(state))}


def _training_part(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "optimizer": state.optimizer_state}


def _restore_as(tree: PyTree[jax.ShapeDtypeStruct]) -> ocp.args.PyTreeRestore:
    return ocp.args.PyTreeRestore(tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree))
