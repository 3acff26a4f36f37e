"""A language model whose weights come from somewhere, each part of them read for the devices that hold it."""

from collections import defaultdict
from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from flax import nnx
from jax.sharding import Sharding
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from ring_rl.lm.model import LanguageModel, LanguageModelConfig
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.training.distributed import is_main_process
from ring_rl.training.mesh import with_shardings
from ring_rl.training.sharding import parameter_shardings
from ring_rl.typing import Array, Float, Float32

ParameterPath = tuple[str, ...]
Index = tuple[slice, ...]
# (parameter, its whole shape, a part of it) -> that part.
ReadParameter = Callable[[ParameterPath, tuple[int, ...], Index], Float32[np.ndarray, "..."]]


def parameter_shapes(config: LanguageModelConfig) -> dict[ParameterPath, tuple[int, ...]]:
    """The shape of every parameter of a model that is not made."""
    flat = nnx.to_flat_state(nnx.state(_abstract(config), nnx.Param))
    return {_names(path): tuple(parameter.get_value().shape) for path, parameter in flat}


def abstract_model(
    config: LanguageModelConfig, parallel: SequenceParallel
) -> tuple[nnx.GraphDef[LanguageModel], nnx.State]:
    """The model's definition, and its parameters with shape, type and sharding in place of numbers.

    Raises:
        ValueError: The mesh cannot share the parameters.
    """
    graphdef, parameters = nnx.split(_abstract(config))
    shardings = parameter_shardings(parallel.mesh, parameters, weight_axes=parallel.weight_axes)
    return graphdef, with_shardings(parameters, shardings)


def placed_model(config: LanguageModelConfig, parallel: SequenceParallel, read: ReadParameter) -> LanguageModel:
    """The model, with its parameters on the mesh, sharded as training shards them.

    A part that several devices hold is read once. In host memory there is one part at a time: with fsdp or tp a
    fraction of one parameter.

    Args:
        config: Of the model.
        parallel: The mesh.
        read: Gives any part of any parameter.

    Raises:
        ValueError: The mesh cannot share the parameters, or what `read` raises.
    """
    graphdef, abstract = abstract_model(config, parallel)
    flat = [(path, parameter, parameter.get_value()) for path, parameter in nnx.to_flat_state(abstract)]
    with transfer_progress() as progress:
        bar = progress.add_task("loading weights", total=sum(4 * array.size for _, _, array in flat))
        loaded = []
        for path, parameter, array in flat:
            read_part = partial(read, _names(path), array.shape)
            loaded.append((path, parameter.replace(_on_devices(array.shape, array.sharding, read_part))))
            progress.advance(bar, 4 * array.size)
    return nnx.merge(graphdef, nnx.from_flat_state(loaded))


def transfer_progress() -> Progress:
    """A bar of bytes with the time left, on the terminal of the main process."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    visible = is_main_process() and console.is_terminal
    return Progress(*columns, console=console, transient=True, disable=not visible)


def _on_devices(
    shape: tuple[int, ...], sharding: Sharding, read: Callable[[Index], Float32[np.ndarray, "..."]]
) -> Float[Array, "..."]:
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        holders[tuple(each.indices(length)[:2] for each, length in zip(index, shape, strict=True))].append(device)
    arrays = []
    for index, devices in holders.items():
        part = read(tuple(slice(*each) for each in index))
        arrays += [jax.device_put(part, device) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _abstract(config: LanguageModelConfig) -> LanguageModel:
    return nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))


def _names(path: tuple[object, ...]) -> ParameterPath:
    return tuple(map(str, path))
