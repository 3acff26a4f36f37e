"""Reinforcement learning on long trajectories."""
