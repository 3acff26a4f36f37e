"""The dimension key: one letter for one meaning, in every annotation and every suffix.

| letter | dimension                              |
|--------|----------------------------------------|
| B      | batch                                  |
| T      | queries (positions that look)          |
| S      | keys (positions that are looked at)    |
| H      | query heads                            |
| K      | key-value heads (H is a multiple of K) |
| D      | head dimension                         |
| M      | model width                            |
| F      | feed-forward width                     |
| V      | vocabulary                             |
| L      | environment steps                      |
| N      | trajectories in a chain                |
| R      | ring size                              |
| O      | observation dimension                  |
| A      | action dimension                       |
| P      | physics-state dimension (nq + nv)      |

Public functions annotate with jaxtyping (`Float[Array, "B T H D"]`); inside a function names carry the
letters as a suffix (`logits_BHTS`).
"""

from jaxtyping import Array, Bool, Float, Float32, Float64, Int, Int32, PRNGKeyArray, PyTree, Shaped, UInt32

__all__ = [
    "Array",
    "Bool",
    "Float",
    "Float32",
    "Float64",
    "Int",
    "Int32",
    "PRNGKeyArray",
    "PyTree",
    "Shaped",
    "UInt32",
]
