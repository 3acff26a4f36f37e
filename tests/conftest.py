"""The whole suite runs on 8 virtual CPU devices, so that a ring of 8 is a real ring of 8."""

import gc
import os
from importlib.metadata import version

# Before the first import of jax: the backend reads both when it starts.
os.environ["JAX_PLATFORMS"] = "cpu"
_FLAGS = {
    "xla_force_host_platform_device_count": "8",
    # The tests compile many programs and run each for milliseconds: do not optimise what will not run for long.
    "xla_backend_optimization_level": "0",
}
if version("jax").startswith("0.10."):
    # Compiles in half the time; newer versions have no such flag, and end at one they don't know.
    _FLAGS["xla_cpu_use_fusion_emitters"] = "false"
for _flag, _value in _FLAGS.items():
    if _flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{_flag}={_value}".strip()
os.environ.setdefault("MPLBACKEND", "Agg")

import jax  # noqa: E402, after the environment that it reads
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# Derandomized: a red run is red again on the next machine; no deadline: the first example compiles.
settings.register_profile("ring_rl", deadline=None, max_examples=20, derandomize=True)
settings.load_profile("ring_rl")


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """What one file compiled no other runs: kept, thousands of programs make each garbage collection take seconds."""
    yield
    jax.clear_caches()
    gc.collect()
