"""Architectures: one file each, named as it is registered, and what they share."""
