"""Exact attention over a sequence that is sharded over devices; imports jax and numpy only."""
