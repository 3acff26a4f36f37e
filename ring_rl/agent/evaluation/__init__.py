"""Agents in their environments: rollouts, scores, and comparisons under one protocol."""
