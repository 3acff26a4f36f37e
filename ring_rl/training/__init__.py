"""Mesh, optimizer, step, loop, checkpoint and metrics; knows no task."""
