"""Tables 2 and 4 and figure 5 of Ring Attention, arXiv:2310.01889, for any hardware and model, by formula."""

import dataclasses
import math

from ring_rl.kernels.cost import AttentionShape, attention_flops, transformer_flops
from ring_rl.kernels.cost_paper import dataset_flops_ratio, minimal_block, minimal_sequence
from ring_rl.kernels.hardware import HARDWARE
from ring_rl.kernels.mask import CAUSAL
from ring_rl.kernels.overlap import minimal_share
from ring_rl.nn.transformer_config import TransformerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrintedOverlap:
    """A row of table 2, in thousands of tokens."""

    block: float
    sequence: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class OverlapConfig:
    """Which devices, and what the paper leaves out."""

    hardware: tuple[str, ...]
    query_heads: int
    grouped_key_value_heads: int
    element_bytes: int
    visible_fraction: float
    printed: dict[str, PrintedOverlap]

    def __post_init__(self) -> None:
        for name in (*self.hardware, *self.printed):
            if name not in HARDWARE:
                raise ValueError(f"unknown hardware {name!r}; choose of {', '.join(HARDWARE)}")
            if math.isinf(HARDWARE[name].bytes_per_second):
                raise ValueError(f"transfers of {name!r} are free: there is no smallest block; leave it out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSetConfig:
    """Figure 5."""

    reference_tokens: int
    multiples: tuple[int, ...]
    widths: dict[str, int]
    printed: dict[str, tuple[float, ...]]

    def __post_init__(self) -> None:
        for model, ratios in self.printed.items():
            if model not in self.widths or len(ratios) != len(self.multiples):
                raise ValueError(
                    f"data_set.printed.{model} needs a width and {len(self.multiples)} ratios, one a multiple, "
                    f"got {len(ratios)}"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrowthRow:
    """A row of table 4."""

    model: str
    hardware: str
    blockwise_tokens: int
    ring_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrowthConfig:
    """Table 4."""

    vocabulary: int
    rows: tuple[GrowthRow, ...]
    models: dict[str, TransformerConfig]

    def __post_init__(self) -> None:
        for row in self.rows:
            if row.model not in self.models:
                raise ValueError(f"growth.rows names {row.model!r}; choose of {', '.join(self.models)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overlap:
    """Tokens a device from which on transfers hide.

    Attributes:
        hardware: Its name.
        teraflops: Of bfloat16 products a second.
        gigabytes_per_second: Over all links, one way.
        links: That this is spread over.
        block: The paper's F / B.
        sequence: The paper's 6 F / B.
        printed_block: In the paper; None where it has no such row.
        printed_sequence: As before.
        one_link: As `block`, over the one link that leads to the next device.
        training: As `one_link`, in backward of a causal zigzag ring.
        grouped: As `training`, with fewer key-value heads than query heads.
    """

    hardware: str
    teraflops: float
    gigabytes_per_second: float
    links: int
    block: float
    sequence: float
    printed_block: float | None
    printed_sequence: float | None
    one_link: float
    training: float
    grouped: float


def overlap_rows(config: OverlapConfig) -> list[Overlap]:
    """Table 2 and what the paper leaves out."""
    rows = []
    for name in config.hardware:
        hardware, printed = HARDWARE[name], config.printed.get(name)

        def share(*, key_value_heads: int, visible_fraction: float, backward: bool, hardware=hardware) -> float:
            return minimal_share(
                hardware,
                query_heads=config.query_heads,
                key_value_heads=key_value_heads,
                element_bytes=config.element_bytes,
                visible_fraction=visible_fraction,
                backward=backward,
            )

        causal = {"visible_fraction": config.visible_fraction, "backward": True}
        rows.append(
            Overlap(
                hardware=name,
                teraflops=hardware.flops_per_second / 1e12,
                gigabytes_per_second=hardware.bytes_per_second / 1e9,
                links=hardware.links,
                block=minimal_block(hardware),
                sequence=minimal_sequence(hardware),
                printed_block=1e3 * printed.block if printed else None,
                printed_sequence=1e3 * printed.sequence if printed else None,
                one_link=share(key_value_heads=config.query_heads, visible_fraction=1.0, backward=False),
                training=share(key_value_heads=config.query_heads, **causal),
                grouped=share(key_value_heads=config.grouped_key_value_heads, **causal),
            )
        )
    return rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlopsRatio:
    """A cell of figure 5; `printed` is None where it has none."""

    model: str
    width: int
    tokens: int
    ratio: float
    printed: float | None


def flops_ratios(config: DataSetConfig) -> list[FlopsRatio]:
    """Figure 5, cell by cell."""
    return [
        FlopsRatio(
            model=model,
            width=width,
            tokens=multiple * config.reference_tokens,
            ratio=dataset_flops_ratio(
                model_width=width,
                tokens=multiple * config.reference_tokens,
                reference_tokens=config.reference_tokens,
            ),
            printed=config.printed[model][i] if model in config.printed else None,
        )
        for model, width in config.widths.items()
        for i, multiple in enumerate(config.multiples)
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Growth:
    """What the contexts of a row of table 4 cost.

    Attributes:
        model: Its name.
        hardware: In the paper.
        blockwise_tokens: Context of blockwise attention.
        ring_tokens: Context of ring attention.
        ratio: Operations a token at the longer one over the shorter one, by appendix D: no mask, no vocabulary, a
            feed-forward of two matrices, attention's backward twice its forward.
        causal_ratio: The same as `transformer_flops` counts them: causal, the model's own matrices, the vocabulary.
        blockwise_attention: Share of attention in the operations at the shorter one, causal.
        ring_attention: At the longer one.
    """

    model: str
    hardware: str
    blockwise_tokens: int
    ring_tokens: int
    ratio: float
    causal_ratio: float
    blockwise_attention: float
    ring_attention: float


def growth_rows(config: GrowthConfig) -> list[Growth]:
    """The contexts of table 4 with the operations that they ask for."""
    rows = []
    for row in config.rows:
        model = config.models[row.model]
        whole, attention = zip(
            *(causal_flops(model, tokens, config.vocabulary) for tokens in (row.blockwise_tokens, row.ring_tokens)),
            strict=True,
        )
        rows.append(
            Growth(
                **dataclasses.asdict(row),
                ratio=dataset_flops_ratio(
                    model_width=model.width, tokens=row.ring_tokens, reference_tokens=row.blockwise_tokens
                ),
                causal_ratio=whole[1] / row.ring_tokens / (whole[0] / row.blockwise_tokens),
                blockwise_attention=attention[0] / whole[0],
                ring_attention=attention[1] / whole[1],
            )
        )
    return rows


def causal_flops(model: TransformerConfig, tokens: int, vocabulary: int) -> tuple[int, int]:
    """Operations of a training step over one sequence, without recomputation: of all, and of attention alone."""
    shape = AttentionShape(
        batch=1,
        tokens=tokens,
        query_heads=model.query_heads,
        key_value_heads=model.key_value_heads,
        head_dim=model.head_dim,
        element_bytes=2,
    )
    whole = transformer_flops(
        shape,
        mask=CAUSAL,
        layers=model.layers,
        model_width=model.width,
        feed_forward_width=model.feed_forward_width,
        feed_forward_products=3 if model.feed_forward == "swiglu" else 2,
        vocabulary=vocabulary,
    )
    return whole.total, model.layers * attention_flops(shape, mask=CAUSAL).total
