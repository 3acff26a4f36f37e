"""Which tensor of a Hugging Face LLaMA is which parameter of `LanguageModel`.

Ours stack the layers, [layers, in, out]; theirs are one tensor a layer, [out, in]. Rotary positions turn the two halves
of a head in both, so nothing is reordered.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from ring_rl.lm.pretrained.placed import ParameterPath
from ring_rl.lm.pretrained.tensor_source import TensorSource
from ring_rl.typing import Float32

# A checkpoint may hold them, and they say nothing: rotary frequencies, which the configuration gives.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a parameter lies in a Hugging Face checkpoint.

    Attributes:
        tensor: Its name; "{layer}" stands for the index of the layer.
        transposed: Whether it is stored [out, in] where the parameter is [in, out].
    """

    tensor: str
    transposed: bool

    @property
    def stacked(self) -> bool:
        """Whether every layer has a tensor of its own."""
        return "{layer}" in self.tensor

    def tensors(self, layers: int) -> list[str]:
        """The names of all tensors of the parameter."""
        return [self.tensor.format(layer=layer) for layer in range(layers)] if self.stacked else [self.tensor]

    def tensor_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of one tensor, for a parameter of this shape."""
        own = shape[1:] if self.stacked else shape
        return own[::-1] if self.transposed else own


_BLOCK = {
    "attention_norm.scale": Placement("model.layers.{layer}.input_layernorm.weight", False),
    "attention.query.kernel": Placement("model.layers.{layer}.self_attn.q_proj.weight", True),
    "attention.key.kernel": Placement("model.layers.{layer}.self_attn.k_proj.weight", True),
    "attention.value.kernel": Placement("model.layers.{layer}.self_attn.v_proj.weight", True),
    "attention.out.kernel": Placement("model.layers.{layer}.self_attn.o_proj.weight", True),
    "feed_forward_norm.scale": Placement("model.layers.{layer}.post_attention_layernorm.weight", False),
    "feed_forward_gate.kernel": Placement("model.layers.{layer}.mlp.gate_proj.weight", True),
    "feed_forward_in.kernel": Placement("model.layers.{layer}.mlp.up_proj.weight", True),
    "feed_forward_out.kernel": Placement("model.layers.{layer}.mlp.down_proj.weight", True),
}
PLACEMENTS: Mapping[ParameterPath, Placement] = {
    ("vocabulary", "embedding"): Placement("model.embed_tokens.weight", False),
    ("vocabulary", "head"): Placement("lm_head.weight", True),
    ("transformer", "final_norm", "scale"): Placement("model.norm.weight", False),
    **{("transformer", "blocks", *path.split(".")): placement for path, placement in _BLOCK.items()},
}


def check_tensors(source: TensorSource, shapes: Mapping[ParameterPath, tuple[int, ...]]) -> None:
    """Raises ValueError unless a checkpoint holds what these parameters need, and nothing else.

    All that is missing, of another shape, or left over stands in one message.
    """
    present = source.shapes
    wanted = {
        name: PLACEMENTS[path].tensor_shape(shape)
        for path, shape in shapes.items()
        for name in PLACEMENTS[path].tensors(shape[0])
    }
    missing = sorted(wanted.keys() - present.keys())
    unlike = [
        f"{name} is {list(present[name])}, the configuration says {list(shape)}"
        for name, shape in wanted.items()
        if name in present and present[name] != shape
    ]
    # With a tied head transformers does not read what a checkpoint may hold under its name.
    ignored = () if ("vocabulary", "head") in shapes else ("lm_head.weight",)
    unused = sorted(
        name for name in present.keys() - wanted.keys() if name not in ignored and not name.endswith(_IGNORED_SUFFIXES)
    )
    problems = [
        f"{len(names)} {what}: {_listed(names)}"
        for what, names in (("missing", missing), ("of another shape", unlike), ("not part of a LLaMA", unused))
        if names
    ]
    if problems:
        raise ValueError(
            f"the tensors in {source.description} do not fit the model ({'; '.join(problems)}); check that weights and "
            "configuration belong together"
        )


def read_parameter(
    source: TensorSource, path: ParameterPath, shape: tuple[int, ...], index: tuple[slice, ...]
) -> Float32[np.ndarray, "..."]:
    """A part of a parameter of this shape, read from no more of the checkpoint than that part is.

    `index` has a start and a stop for every dimension.
    """
    placement = PLACEMENTS[path]
    own = index[1:] if placement.stacked else index
    stored = own[::-1] if placement.transposed else own

    def read(tensor: str) -> np.ndarray:
        values = source.read(tensor, stored)
        return values.T if placement.transposed else values

    if not placement.stacked:
        return np.ascontiguousarray(read(placement.tensor))
    part = np.empty([each.stop - each.start for each in index], np.float32)
    for row, layer in enumerate(range(index[0].start, index[0].stop)):
        part[row] = read(placement.tensor.format(layer=layer))
    return part


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
