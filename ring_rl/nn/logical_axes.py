"""What each dimension of a parameter is, so that a mesh can be chosen without knowing the model.

A parameter names its dimensions; which mesh axis shards which name is decided where a mesh is known. The names:

    width        the model's width M, sharded where parameters are (fsdp): gathered before use
    heads        query or key-value heads, flattened with the head dimension: tensor parallel
    hidden       the feed-forward's width F: tensor parallel
    vocabulary   V: tensor parallel
    None         never sharded, such as the layers of a stack

They are kept as flax NNX keeps them, in the variable's `out_sharding`, which `nnx.get_partition_spec` reads; nothing
is placed while a model is built, so none of this needs a mesh.
"""

from typing import Any, Literal

from flax import nnx

LogicalAxis = Literal["width", "heads", "hidden", "vocabulary"]


def named(*axes: LogicalAxis | None) -> dict[str, Any]:
    """Metadata of a parameter with these dimensions, for `kernel_metadata=` and the like of NNX layers."""
    # Eager sharding would ask for a mesh, and for mesh axes of these names, as soon as the parameter is made.
    return {"out_sharding": axes, "eager_sharding": False}


def logical_axes(parameter: nnx.Variable) -> tuple[str | None, ...]:
    """The names of a parameter's dimensions; None for each where it carries none."""
    names = parameter.get_metadata().get("out_sharding") or ()
    return tuple(names) + (None,) * (parameter.get_value().ndim - len(names))
