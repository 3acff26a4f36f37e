"""How fast devices compute and how fast they talk: the two numbers that decide whether a transfer hides."""

import dataclasses
import math
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
    """One device of a machine, at its peak. Put measured figures in its place where you have them.

    Attributes:
        name: What it is called here.
        flops_per_second: Dense matrix products in bfloat16 with float32 sums.
        memory_bytes: High-bandwidth memory.
        bytes_per_second: What it sends to other devices over all of its links together, one way.
        links: Links that this is spread over. A transfer to one neighbour takes one of them: a torus of two
            dimensions has 4, of three 6; 8 GPUs joined each to each have 7; behind a switch the whole bandwidth goes
            anywhere, which counts as 1.
        source: Where the figures are from.
    """

    name: str
    flops_per_second: float
    memory_bytes: float
    bytes_per_second: float
    links: int
    source: str

    def __post_init__(self) -> None:
        for field in ("flops_per_second", "memory_bytes", "bytes_per_second"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} of {self.name} must be positive, got {getattr(self, field)}")
        if self.links < 1:
            raise ValueError(f"{self.name} needs at least 1 link, got {self.links}")

    @property
    def neighbour_bytes_per_second(self) -> float:
        """What reaches one neighbour, as in a ring."""
        return self.bytes_per_second / self.links


# Nothing is known of it, or its devices share one memory: transfers are free, so that a ring hides whatever its block.
VIRTUAL_CPU = Hardware(
    name="virtual CPU",
    flops_per_second=1e11,
    memory_bytes=16e9,
    bytes_per_second=math.inf,
    links=1,
    source="nominal, no data sheet: a transfer between virtual devices is a copy within one memory, counted as free",
)

_PAPER = "table 2 of arXiv:2310.01889; links: "
_SWITCH = "one switch"
_NDR = "; one 400 Gb/s port (InfiniBand NDR) a GPU, as in {}"
_HARDWARE = (
    Hardware(
        name="A100 NVLink",
        flops_per_second=312e12,
        memory_bytes=80e9,
        bytes_per_second=300e9,
        links=1,
        source=_PAPER + _SWITCH,
    ),
    Hardware(
        name="A100 InfiniBand",
        flops_per_second=312e12,
        memory_bytes=80e9,
        bytes_per_second=12.5e9,
        links=1,
        source=_PAPER + _SWITCH,
    ),
    Hardware(
        name="H100 NVLink",
        flops_per_second=989e12,
        memory_bytes=80e9,
        bytes_per_second=450e9,
        links=1,
        source="NVIDIA H100 data sheet, SXM: bf16 without sparsity; NVLink 900 GB/s counts both ways",
    ),
    Hardware(
        name="H200 NVLink",
        flops_per_second=989e12,
        memory_bytes=141e9,
        bytes_per_second=450e9,
        links=1,
        source="NVIDIA H200 data sheet, SXM: bf16 without sparsity; NVLink 900 GB/s counts both ways",
    ),
    Hardware(
        name="B200 NVLink",
        flops_per_second=2250e12,
        memory_bytes=180e9,
        bytes_per_second=900e9,
        links=1,
        source="NVIDIA HGX B200 data sheet: bf16 without sparsity; NVLink 1.8 TB/s counts both ways; memory: DGX B200 "
        "user guide, 1440 GB of 8 GPUs",
    ),
    Hardware(
        name="H100 InfiniBand",
        flops_per_second=989e12,
        memory_bytes=80e9,
        bytes_per_second=50e9,
        links=1,
        source="NVIDIA H100 data sheet, SXM: bf16 without sparsity" + _NDR.format("DGX H100"),
    ),
    Hardware(
        name="H200 InfiniBand",
        flops_per_second=989e12,
        memory_bytes=141e9,
        bytes_per_second=50e9,
        links=1,
        source="NVIDIA H200 data sheet, SXM: bf16 without sparsity" + _NDR.format("DGX H200"),
    ),
    Hardware(
        name="B200 InfiniBand",
        flops_per_second=2250e12,
        memory_bytes=180e9,
        bytes_per_second=50e9,
        links=1,
        source="NVIDIA HGX B200 data sheet: bf16 without sparsity; memory: DGX B200 user guide, 1440 GB of 8 GPUs"
        + _NDR.format("DGX B200"),
    ),
    Hardware(
        name="MI300X",
        flops_per_second=1307.4e12,
        memory_bytes=192e9,
        bytes_per_second=448e9,
        links=7,
        source="AMD Instinct MI300X data sheet: bf16 without sparsity; 7 Infinity Fabric links to the other 7 GPUs of "
        "a node, 128 GB/s each, which counts both ways",
    ),
    Hardware(
        name="TPU v3",
        flops_per_second=123e12,
        memory_bytes=16e9,
        bytes_per_second=112e9,
        links=4,
        source=_PAPER + "2D torus; the memory is that of one of a chip's two cores",
    ),
    Hardware(
        name="TPU v4",
        flops_per_second=275e12,
        memory_bytes=32e9,
        bytes_per_second=268e9,
        links=6,
        source=_PAPER + "3D torus",
    ),
    Hardware(
        name="TPU v5e",
        flops_per_second=196e12,
        memory_bytes=16e9,
        bytes_per_second=186e9,
        links=4,
        source=_PAPER + "2D torus; Google Cloud documentation has 197 TFLOP/s, and 400 GB/s both ways",
    ),
    Hardware(
        name="TPU v5p",
        flops_per_second=459e12,
        memory_bytes=95e9,
        bytes_per_second=600e9,
        links=6,
        source="Google Cloud documentation of TPU v5p: 1200 GB/s a chip counts both ways; 3D torus",
    ),
    Hardware(
        name="TPU v6e",
        flops_per_second=918e12,
        memory_bytes=32e9,
        bytes_per_second=400e9,
        links=4,
        source="Google Cloud documentation of TPU v6e: 800 GB/s a chip counts both ways; 2D torus, 4 ports",
    ),
    VIRTUAL_CPU,
)
HARDWARE: Mapping[str, Hardware] = {hardware.name: hardware for hardware in _HARDWARE}

# What jax calls them. TPUs are matched whole: "TPU v4 lite" is another chip than "TPU v4".
_TPU_KINDS = {
    "tpu v3": "TPU v3",
    "tpu v4": "TPU v4",
    "tpu v5 lite": "TPU v5e",
    "tpu v5e": "TPU v5e",
    "tpu v5": "TPU v5p",
    "tpu v5p": "TPU v5p",
    "tpu v6 lite": "TPU v6e",
    "tpu v6e": "TPU v6e",
}
_GPU_WORDS = {
    "a100": "A100 NVLink",
    "h100": "H100 NVLink",
    "h200": "H200 NVLink",
    "b200": "B200 NVLink",
    "mi300x": "MI300X",
}


def hardware_for(device_kind: str) -> Hardware:
    """The entry of `HARDWARE` for what jax reports as a device's `device_kind`, such as "NVIDIA H100 80GB HBM3".

    NVIDIA's are taken to be joined by NVLink; that they are not, or that a card is not of the SXM form, a kind does
    not say: pass your own `Hardware` then. GH200 and GB200 count as the H200 and B200 in them. CPUs and kinds without
    an entry give `VIRTUAL_CPU`, on which a ring always hides its transfers: where nothing is known, what needs least
    memory is chosen.
    """
    kind = device_kind.casefold().strip()
    if kind in _TPU_KINDS:
        return HARDWARE[_TPU_KINDS[kind]]
    return next((HARDWARE[name] for word, name in _GPU_WORDS.items() if word in kind), VIRTUAL_CPU)
