"""Bytes that a step of decoding reads, and bytes that a machine reads per second.

Decoding one token reads every weight of the decoder and every slot of the caches once, and computes
little with them, so the bytes read per second show how near decoding is to the limit of a machine.
"""

from __future__ import annotations

import time

import torch

from torchfuse.modules.fusion_layer import FusionLayer
from torchfuse.modules.kv_cache import EncoderKVCache
from torchfuse.naming import unwrap
from torchfuse.params import storage_nbytes


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def bytes_per_second(device, numel=1 << 28):
    """Return what the machine reads: the best of summing and of copying a gigabyte, of eight rounds."""
    source = torch.ones(numel, device=device)
    best = 0.0
    target = torch.empty_like(source)
    for _ in range(8):
        for work, moved in ((source.sum, 1), (lambda: target.copy_(source), 2)):
            synchronize(device)
            start = time.perf_counter()
            work()
            synchronize(device)
            best = max(best, moved * source.nbytes / (time.perf_counter() - start))
    return best


def step_bytes(model):
    """Return the bytes that one step of decoding reads, with the model's caches set up.

    That is the decoder's parameters as they are stored, fusion layers included, and keys and values of
    every slot of the caches. Not read are the embedding table, of which a step needs a row, unless the
    head is tied to it; projections to keys and values of features, once these are cached; layers for
    features where there are none; encoders and adapters. Without compilation quantized weights are
    dequantized at each step, which reads and writes more.
    """
    decoder = getattr(unwrap(model), "decoder", model)
    inner = unwrap(decoder)
    tied = getattr(inner.output, "tied_module", None) is not None
    unread = [] if tied else [inner.tok_embeddings]
    total = 0
    for module in decoder.modules():
        if isinstance(module, FusionLayer) and not _reads_features(module.fusion_layer):
            unread.append(module.fusion_layer)
        cache = getattr(module, "kv_cache", None)
        if isinstance(cache, EncoderKVCache):
            unread += [getattr(module, name, None) for name in ("k_proj", "v_proj", "k_norm")]
        if cache is not None and getattr(cache, "is_filled", True):
            total += cache.k_cache.nbytes + cache.v_cache.nbytes
    skipped = {id(p) for module in unread if module is not None for p in module.parameters()}
    return total + sum(storage_nbytes(p) for p in decoder.parameters() if id(p) not in skipped)


def _reads_features(layer):
    """Whether a layer's cache of features, if it has one, holds any."""
    return all(getattr(module, "is_filled", True) for module in layer.modules())
