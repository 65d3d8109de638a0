import torch
from support import TinyEncoder, inputs, open_gates, tiny_decoder

from torchfuse import fuse
from torchfuse.params import quantized_dtype

# The largest relative error: int8 has 256 steps a row, float8 3 bits of mantissa, nf4 16 values.
SCHEMES = {"int8_weight_only": 0.02, "int8_dynamic": 0.02, "float8_weight_only": 0.06, "nf4": 0.3}
LINEARS_PER_LAYER = 7


def make(*, dtype=torch.float32, named=False, seed=0, **options):
    """Two layers wide enough for NF4; keys and values of half the width are too small for it."""
    decoder = tiny_decoder(
        seed,
        num_layers=2,
        vocab_size=131,
        embed_dim=128,
        num_heads=4,
        num_kv_heads=2,
        intermediate_dim=256,
    )
    encoder = {"eye": TinyEncoder(), "ear": TinyEncoder()} if named else TinyEncoder()
    torch.manual_seed(5)
    model = fuse(decoder, encoder, every=2, fusion_vocab_size=3, fusion_head=True, **options)
    return open_gates(model).to(dtype).eval()


def small(**options):
    return open_gates(fuse(tiny_decoder(), TinyEncoder(), every=2, **options)).eval()


def given(dtype=torch.float32):
    return {"encoder_input": {"x": inputs()["x"].to(dtype)}}


def distance(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def quantized_names(model):
    return {name for name, p in model.named_parameters() if quantized_dtype(p)}
