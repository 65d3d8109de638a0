"""Decoders built from torchtune's modules, one file per family."""
