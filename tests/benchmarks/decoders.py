"""The models of the decoding benchmark, on the same weights, and how each generates."""

from __future__ import annotations

import torch

from torchfuse import from_pretrained, generate

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SMALL_TOWER = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "image_size": 112}
SIZES = {
    "tiny": {"width": 48, "heads": 6, "kv": 2, "hidden": 96, "layers": 2, "every": 2, "vocab": 97},
    "27M": {"width": 512, "heads": 8, "kv": 4, "hidden": 1376, "layers": 5, "every": 5, "vocab": 8192},
    "200M": {"width": 1024, "heads": 16, "kv": 8, "hidden": 2816, "layers": 12, "every": 6, "vocab": 16384},
    "165M": {"width": 512, "heads": 8, "kv": 2, "hidden": 1792, "layers": 8, "every": 4, "vocab": 128256},
    "1B": {"width": 2048, "heads": 32, "kv": 8, "hidden": 8192, "layers": 16, "every": 4, "vocab": 128256},
    "11B": {"width": 4096, "heads": 32, "kv": 8, "hidden": 14336, "layers": 32, "every": 4, "vocab": 128256},
}  # fmt: skip


def mllama_config(size, max_tiles):
    """Return transformers' configuration; ``layers`` are those of the language model alone."""
    from transformers import MllamaConfig

    shape = SIZES[size]
    fused = shape["layers"] // shape["every"]
    # transformers counts cross-attention layers as layers, in front of those that they feed.
    crossing = [index * (shape["every"] + 1) + shape["every"] - 1 for index in range(fused)]
    text = {
        "vocab_size": shape["vocab"],
        "hidden_size": shape["width"],
        "intermediate_size": shape["hidden"],
        "num_hidden_layers": shape["layers"] + fused,
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv"],
        "cross_attention_layers": crossing,
        "max_position_embeddings": 131_072,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    vision = {"max_num_tiles": max_tiles}
    if size != "11B":
        vision |= SMALL_TOWER | {
            "num_global_layers": 1,
            "attention_heads": 4,
            "patch_size": 14,
            "intermediate_layers_indices": [1, 3],
            "vision_output_dim": 3 * SMALL_TOWER["hidden_size"],
            "supported_aspect_ratios": [[1, tiles] for tiles in range(1, max_tiles + 1)],
        }
    return MllamaConfig(text_config=text, vision_config=vision, image_token_index=shape["vocab"])


def build(options, size, dtype, folder):
    """The three models, on the same weights."""
    from transformers import MllamaForConditionalGeneration

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(options.device):
            hf_model = MllamaForConditionalGeneration(mllama_config(size, max(options.tiles))).eval()
        for name, parameter in hf_model.named_parameters():
            if name.endswith("gate") or "gate_" in name.rpartition(".")[2]:
                parameter.data.fill_(0.5)  # otherwise images would change nothing
        hf_model.save_pretrained(folder)
        model = from_pretrained(folder, dtype=dtype, device=options.device).eval()
        torchtune_model = build_torchtune(
            SIZES[size], model, max_seq_len=options.prompt + options.new, device=options.device
        )
    finally:
        torch.set_default_dtype(before)
    return hf_model, torchtune_model, model


def build_torchtune(shape, model, *, max_seq_len, device):
    """Return torchtune's model with the weights of ``model``, around the same tower."""
    from torchtune.models.llama3_2_vision import llama3_2_vision_decoder
    from torchtune.modules import model_fusion

    table = model.tok_embeddings
    with torch.device("meta"):
        decoder = llama3_2_vision_decoder(
            vocab_size=shape["vocab"],
            num_layers=shape["layers"],
            fusion_interval=shape["every"],
            num_special_tokens=table.fusion_embedding.num_embeddings,
            num_heads=shape["heads"],
            num_kv_heads=shape["kv"],
            embed_dim=shape["width"],
            max_seq_len=max_seq_len,
            encoder_max_seq_len=1,
            intermediate_dim=shape["hidden"],
        )
    decoder.load_state_dict(model.decoder.state_dict(), strict=True, assign=True)
    for layer in decoder.layers:
        if hasattr(layer, "fusion_layer"):  # its builder leaves these two at 1e-6
            layer.fusion_layer.ca_norm.eps = layer.fusion_layer.mlp_norm.eps = 1e-5
    fill_rope(decoder, device)
    return model_fusion.DeepFusionModel(decoder, model.encoder).eval()


def fill_rope(decoder, device):
    """Compute the rotary tables of a torchtune decoder, which are in no state dict."""
    for layer in decoder.layers:
        rope = getattr(getattr(layer, "layer", layer).attn, "pos_embeddings", None)
        if rope is not None:
            rope.to_empty(device=device)
            with torch.device(device):
                rope.rope_init()


def make_prompt(options, size, dtype, rows, tiles):
    """Text and one image for each row, as transformers' processor would make them."""
    generator = torch.Generator().manual_seed(1)
    shape = SIZES[size]
    tokens = torch.randint(3, shape["vocab"], (rows, options.prompt), generator=generator)
    # The image comes first: transformers lets text in front of it attend to it (its issue 39379).
    tokens[:, 0], tokens[:, 1] = shape["vocab"], 1
    edge = 560 if size == "11B" else SMALL_TOWER["image_size"]
    pixels = torch.randn(rows, 1, tiles, 3, edge, edge, generator=generator).to(dtype)
    crossing = torch.ones(rows, options.prompt, 1, tiles, dtype=torch.long)
    device = options.device
    return tokens.to(device), pixels.to(device), crossing.to(device)


class Transformers:
    """transformers' ``generate``."""

    def __init__(self, model, cache):
        self.model, self.cache = model, cache
        self.name = f"transformers {cache}"

    def __call__(self, prompt, new):
        tokens, pixels, crossing = prompt
        rows, tiles = pixels.shape[0], pixels.shape[2]
        answer = self.model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            pixel_values=pixels,
            aspect_ratio_ids=torch.full((rows, 1), tiles, device=tokens.device),
            aspect_ratio_mask=torch.ones(rows, 1, tiles, dtype=torch.long, device=tokens.device),
            cross_attention_mask=crossing,
            do_sample=False,
            min_new_tokens=new,
            max_new_tokens=new,
            cache_implementation=self.cache,
        )
        return answer[:, tokens.shape[1] :]


def feature_mask(crossing, features):
    """``[b, s, n]`` from ``[b, s, images, tiles]``."""
    return crossing.bool().flatten(2).repeat_interleave(features // crossing.shape[3], dim=2)


def images_of(prompt):
    _, pixels, _ = prompt
    shape = torch.tensor([[[1, pixels.shape[2]]]], device=pixels.device).expand(pixels.shape[0], 1, 2)
    return {"images": pixels, "aspect_ratio": shape}


class Torchtune:
    """The loop of torchtune's recipe for multimodal generation: caches, causal masks, a token a step."""

    name = "torchtune cached"

    def __init__(self, model):
        self.model = model

    @torch.inference_mode()
    def __call__(self, prompt, new):
        from torchtune.modules.common_utils import delete_kv_caches

        tokens, pixels, crossing = prompt
        model, length = self.model, tokens.shape[1]
        total = length + new
        embeds = model.encoder(**images_of(prompt))
        with tokens.device:
            model.setup_caches(
                tokens.shape[0],
                pixels.dtype,
                encoder_max_seq_len=embeds.shape[1],
                decoder_max_seq_len=total,
            )
            causal = torch.ones(total, total, dtype=torch.bool).tril()[None]
            positions = torch.arange(total)[None]
        mask = feature_mask(crossing, embeds.shape[1])
        logits = model.decoder(
            tokens,
            mask=causal[:, :length].expand(tokens.shape[0], -1, -1),
            encoder_input=embeds,
            encoder_mask=mask,
            input_pos=positions[:, :length],
        )
        answer = [logits[:, -1:].argmax(-1)]
        for position in range(length, total - 1):
            logits = model.decoder(
                answer[-1],
                mask=causal[:, position, None].expand(tokens.shape[0], -1, -1),
                encoder_mask=mask[:, -1:],
                input_pos=positions[:, position, None],
            )
            answer.append(logits[:, -1:].argmax(-1))
        delete_kv_caches(model)
        return torch.cat(answer, dim=1)


class Torchfuse:
    """``torchfuse.generate``."""

    def __init__(self, model, name, *, compile=False):
        self.model, self.name, self.compile = model, name, compile

    def __call__(self, prompt, new):
        tokens, _, crossing = prompt
        embeds = self.model.encode(images_of(prompt))
        sequence = generate(
            self.model,
            tokens,
            encoder_embeds=embeds,
            encoder_mask=feature_mask(crossing, embeds.shape[1]),
            max_new_tokens=new,
            temperature=0,
            compile=self.compile,
        )
        return sequence[:, tokens.shape[1] :]
