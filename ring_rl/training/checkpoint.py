"""Checkpoints: written in the background, committed atomically, restored on any mesh.

Layout of one checkpoint, `<folder>/<step>/`:

    parameters   the model's arrays, nested dicts by parameter name
    training     the step and the optimizer's arrays, nested dicts by position
    metadata     JSON: format_version, ring_rl_version, step, model_config, extra

A checkpoint is written under a temporary name and renamed when it is whole, so a killed process leaves either
all of it or nothing that counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

import ring_rl
from ring_rl.config import describe_differences
from ring_rl.training.disk_full import EchoSilencer, means_no_space
from ring_rl.training.named_arrays import (
    abstract_arrays,
    described_arrays,
    named_arrays,
    with_arrays,
    with_integer_keys,
)
from ring_rl.training.state import TrainState
from ring_rl.typing import PyTree

__all__ = ["CheckpointMetadata", "Checkpointer", "load_for_evaluation"]

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class CheckpointMetadata:
    """What stands beside the arrays.

    Attributes:
        format_version: of this module's layout.
        ring_rl_version: of the library that wrote the checkpoint.
        step: optimizer steps taken.
        model_config: the plain mapping that the model was built from.
        extra: what the task wants to find again (normalisation constants, token layout); plain JSON.
    """

    format_version: int
    ring_rl_version: str
    step: int
    model_config: dict[str, Any]
    extra: dict[str, Any]


class Checkpointer:
    """Saves and restores `TrainState`s in one folder, asynchronously, keeping the last few.

    Use it as a context manager, or call `close`: both wait for the save under way. One process writes to a
    folder at a time; `run_directory` sees to that with a lock.

    Args:
        folder: holds one folder a checkpoint; created when missing.
        keep: how many checkpoints stay; an older one is deleted only after a newer one is whole.
        model_config: the plain mapping that the model is built from; restoring under another one is refused.
        extra: plain JSON that every checkpoint carries.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        keep: int,
        model_config: Mapping[str, Any],
        extra: Mapping[str, Any] | None = None,
    ):
        if keep < 1:
            raise ValueError(f"at least 1 checkpoint must be kept, got {keep}")
        self.folder = pathlib.Path(folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._model_config = _through_json(model_config, "model_config")
        self._extra = _through_json(extra or {}, "extra")
        self._silencer = EchoSilencer()
        self._manager = ocp.CheckpointManager(
            self.folder,
            # What a killed process left half written goes away when the folder is opened again.
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
        )
        self._silencer.start()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def latest_step(self) -> int | None:
        """The newest step that lies whole on disk, or None."""
        return max(_whole_steps(self.folder), default=None)

    def save(self, state: TrainState) -> bool:
        """Copy the state off the devices and write it in the background; the state may be donated after.

        Returns:
            False when a checkpoint of this step exists already: it stays as it is.

        Raises:
            OSError: no space left, for this save or for the one before it, which ran in the background.
        """
        self.wait()
        step = int(state.step)
        if step in _whole_steps(self.folder):
            return False
        metadata = CheckpointMetadata(FORMAT_VERSION, ring_rl.__version__, step, self._model_config, self._extra)
        items = _items(state)
        with self._explained_errors():
            return self._manager.save(
                step,
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

        The mesh that wrote it does not matter: every array is laid out as its counterpart in `like`.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: it belongs to another model (the differing keys or shapes are listed), was written in
                another format, or cannot be read.
        """
        self.wait()
        step = self.latest_step()
        if step is None:
            raise FileNotFoundError(f"no checkpoint in {self.folder}; train first, or name a run that has saved one")
        checkpoint = self.folder / str(step)
        metadata = _read_metadata(checkpoint)
        differences = describe_differences(metadata.model_config, self._model_config)
        if differences:
            raise ValueError(
                f"the checkpoint {checkpoint} holds another model: {'; '.join(differences)}; "
                f"build the model as it was saved, or choose another run folder"
            )
        wanted = abstract_arrays(_items(like))
        with _reader(checkpoint) as reader:
            saved = described_arrays({item: _saved_tree(reader, checkpoint, item) for item in wanted})
        differences = describe_differences(saved, described_arrays(wanted))
        if differences:
            shown = "; ".join(differences[:4]) + ("; ..." if len(differences) > 4 else "")
            raise ValueError(
                f"{len(differences)} arrays of the checkpoint {checkpoint} do not fit: {shown}; "
                f"build the model and the optimizer as they were saved, or choose another run folder"
            )
        with _reader(checkpoint) as reader:
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
            latest = self.latest_step()
            left = "none was saved before" if latest is None else f"that of step {latest} is intact"
            raise OSError(
                errno.ENOSPC,
                f"no space left to save a checkpoint ({left}); free some space and start again to resume",
                str(self.folder),
            ) from error


def load_for_evaluation(
    folder: pathlib.Path, *, step: int | None = None
) -> tuple[CheckpointMetadata, PyTree[np.ndarray]]:
    """Read a checkpoint's metadata and parameters as numpy arrays, without knowing how it was trained.

    It needs neither the mesh nor the devices nor the optimizer of the training run, and changes nothing in
    the folder, so it may run beside a training that still writes there.

    Args:
        folder: a run's checkpoint folder.
        step: which checkpoint; the newest when None.

    Returns:
        The metadata, and nested dicts of arrays by parameter name, as `nnx.replace_by_pure_dict` takes them.

    Raises:
        FileNotFoundError: there is no such folder, or no such checkpoint in it.
        ValueError: the checkpoint was written in another format, or cannot be read.
    """
    folder = pathlib.Path(folder).absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"no checkpoint folder {folder}; train first, or name the folder of a run")
    steps = _whole_steps(folder)
    if not steps:
        raise FileNotFoundError(f"no checkpoint in {folder}; train first, or name a run that has saved one")
    step = steps[-1] if step is None else step
    if step not in steps:
        present = ", ".join(map(str, steps))
        raise FileNotFoundError(f"no checkpoint of step {step} in {folder}; choose one of {present}")
    checkpoint = folder / str(step)
    metadata = _read_metadata(checkpoint)
    with _reader(checkpoint) as reader:
        tree = _saved_tree(reader, checkpoint, "parameters")
        # Without a type asked for, the arrays would come back on the devices that they were saved from.
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        restored = reader.restore(
            checkpoint, args=ocp.args.Composite(parameters=ocp.args.PyTreeRestore(restore_args=as_numpy))
        )
    return metadata, with_integer_keys(restored["parameters"])


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


def _whole_steps(folder: pathlib.Path) -> list[int]:
    """Steps in ascending order, read from the disk and not from what this process believes."""
    return sorted(ocp.path.step.checkpoint_steps(folder))


def _read_metadata(checkpoint: pathlib.Path) -> CheckpointMetadata:
    with _reader(checkpoint) as reader:
        mapping = reader.restore(checkpoint, args=ocp.args.Composite(metadata=ocp.args.JsonRestore()))["metadata"]
    version = mapping.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"the checkpoint {checkpoint} has format {version}, this ring_rl reads {FORMAT_VERSION}; "
            f"use ring_rl {mapping.get('ring_rl_version')}, which wrote it"
        )
    return CheckpointMetadata(**mapping)


def _saved_tree(reader: ocp.Checkpointer, checkpoint: pathlib.Path, item: str) -> PyTree[Any]:
    """Shapes and types of an item's arrays, as nested dicts."""
    items = reader.metadata(checkpoint).item_metadata
    if items is None or items[item] is None:
        raise ValueError(f"it holds no {item}")
    return items[item].tree


@contextlib.contextmanager
def _reader(checkpoint: pathlib.Path) -> Iterator[ocp.Checkpointer]:
    """A reader of whole checkpoints; whatever it trips over becomes one line that names the checkpoint."""
    handler = ocp.CompositeCheckpointHandler(
        parameters=ocp.PyTreeCheckpointHandler(),
        training=ocp.PyTreeCheckpointHandler(),
        metadata=ocp.JsonCheckpointHandler(),
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
