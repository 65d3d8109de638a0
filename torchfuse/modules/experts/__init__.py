"""Layers with weights of their own for each modality."""
