"""Artifacts: the tensors that were trained, with a description of the model and its base."""
