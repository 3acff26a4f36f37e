"""What is chosen here about a model that was configured elsewhere."""

import dataclasses

from ring_rl.lm.model import LanguageModelConfig
from ring_rl.nn.rotary_scaling import RotaryScaling
from ring_rl.nn.saved_activations import SavedActivations
from ring_rl.nn.transformer_config import ComputeDtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOverrides:
    """What a saved model is computed with here.

    Attributes:
        feed_forward_chunks: As in `TransformerConfig`; this and the two below change memory, no result.
        attention_block_size: As in `TransformerConfig`.
        saved_activations: As in `TransformerConfig`.
        rotary_base: Another base of the rotary frequencies than the saved one, to go on at longer contexts; None
            leaves it.
        rotary_scaling: Another scaling of them; None leaves what was saved, which may be none.
    """

    feed_forward_chunks: int
    attention_block_size: int
    saved_activations: SavedActivations
    rotary_base: float | None
    rotary_scaling: RotaryScaling | None

    def apply(self, config: LanguageModelConfig, *, compute_dtype: ComputeDtype) -> LanguageModelConfig:
        """The configuration with these choices in place of its own."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        changes = {name: value for name, value in fields.items() if value is not None}
        transformer = dataclasses.replace(config.transformer, compute_dtype=compute_dtype, **changes)
        return dataclasses.replace(config, transformer=transformer)
