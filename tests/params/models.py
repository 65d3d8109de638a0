"""Fused models with parts to choose from."""

from support import TinyEncoder, tiny_decoder

from torchfuse import fuse
from torchfuse.params import partition


def model_of(**options):
    return fuse(tiny_decoder(), TinyEncoder(), every=2, fusion_vocab_size=2, **options)


def named_model():
    return fuse(tiny_decoder(), {"eye": TinyEncoder(), "ear": TinyEncoder()}, every=3)


def trains(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def names(model, *parts):
    groups = partition(model)
    return {name for part in parts for name in groups[part]}
