"""Artifacts that hold what fusion learned, and nothing else."""
