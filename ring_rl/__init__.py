"""Exact long-context transformers in JAX: agents that read whole lifetimes, language models that find one line."""

__version__ = "0.1.0"
