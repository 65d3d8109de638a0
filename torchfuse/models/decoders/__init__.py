"""Decoders out of torchtune's parts, one file a family."""
