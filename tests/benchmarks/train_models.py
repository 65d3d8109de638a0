"""The models of the training benchmark, on the same weights, their batches, and how each computes a loss."""

from __future__ import annotations

import math

import torch
from torch import nn

from torchfuse import from_pretrained, get_fusion_params
from torchfuse.checkpoint.formats.llava import Llava
from torchfuse.checkpoint.formats.mllama import Mllama
from torchfuse.data import image_mask, pack, padded_collate_images
from torchfuse.training import linear_next_token_loss, next_token_loss

if __package__:
    from .decoders import DTYPES, SIZES, SMALL_TOWER, build_torchtune, fill_rope, mllama_config
else:
    from decoders import DTYPES, SIZES, SMALL_TOWER, build_torchtune, fill_rope, mllama_config

ARCHS = {"cross_attention": Mllama, "joint_decoder": Llava}
CHUNKS = 8  # of logits, in torchtune's recipes
_PATCH = SMALL_TOWER.get("patch_size", 14)
_SIDE = {"1B": 336}  # of images; 112 for other sizes


# --- weights -------------------------------------------------------------------------------------


def hf_model(options, arch):
    """Return a random model of transformers: Mllama or LLaVA."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        MllamaForConditionalGeneration,
    )

    config, shape, side = mllama_config(options.size, 1), SIZES[options.size], image_side(options)
    if arch == "cross_attention":
        config.vision_config.image_size = side
        return MllamaForConditionalGeneration(config)
    text = config.text_config.to_dict()
    for name in ("cross_attention_layers", "model_type"):
        del text[name]
    text = LlamaConfig(**text | {"num_hidden_layers": shape["layers"]})
    tower = CLIPVisionConfig(
        **SMALL_TOWER | {"image_size": side}, num_attention_heads=4, patch_size=_PATCH
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=text,
            vision_config=tower,
            image_token_index=image_token(options, arch),
            tie_word_embeddings=False,
        )
    )


def save(options, arch, folder):
    """Write a checkpoint whose gates are open."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[options.dtype])
    try:
        with torch.device(options.device):
            model = hf_model(options, arch)
    finally:
        torch.set_default_dtype(before)
    for name, parameter in model.named_parameters():
        if name.endswith("gate") or "gate_" in name.rpartition(".")[2]:
            parameter.data.fill_(0.5)
    model.save_pretrained(folder)


# --- batches -------------------------------------------------------------------------------------


def image_side(options):
    return _SIDE.get(options.size, SMALL_TOWER["image_size"])


def num_features(options, arch):
    """Features of an image; Mllama's tower keeps a class token."""
    return (image_side(options) // _PATCH) ** 2 + (arch == "cross_attention")


def image_token(options, arch):
    """The id of an image: behind the vocabulary's for Mllama, its last for LLaVA."""
    return SIZES[options.size]["vocab"] - (arch == "joint_decoder")


def sample(options, arch, text, supervised, generator):
    """An image and then text, of which the last part is supervised: an answer."""
    features, token = num_features(options, arch), image_token(options, arch)
    markers = features if arch == "joint_decoder" else 1
    tokens = torch.randint(1, SIZES[options.size]["vocab"] - 1, (markers + text,), generator=generator)
    tokens[:markers] = token
    labels = tokens.clone()
    labels[: len(tokens) - max(1, round(supervised * text))] = -100
    side = image_side(options)
    shape = (1, 1, 3, side, side) if arch == "cross_attention" else (1, 3, side, side)
    mask = image_mask(
        tokens[None], token, features_per_image=features, num_images=1, markers_per_image=markers
    )
    images = torch.randn(shape, generator=generator)
    return {"tokens": tokens, "labels": labels, "images": images, "encoder_mask": mask[0]}


def samples(options, arch, kind):
    """The samples of a batch: of one length, ``kind`` per cent supervised; or as long as visual questions.

    These are as long as LLaVA's conversations: log-normal, median 60 tokens, 95th percentile 400; half
    of the text is supervised.
    """
    generator = torch.Generator().manual_seed(1)
    if isinstance(kind, int):
        text = options.length - (num_features(options, arch) if arch == "joint_decoder" else 1)
        return [sample(options, arch, text, kind / 100, generator) for _ in range(options.rows)]
    deviation = math.log(400 / 60) / 1.645
    normal = torch.randn(options.rows, generator=generator)
    lengths = (60 * (deviation * normal).exp()).clamp(8, options.length).long().tolist()
    return [sample(options, arch, length, 0.5, generator) for length in lengths]


def make_batch(options, arch, kind):
    """A batch ``kind``: a number of per cent, "padded" or "packed"; and its number of real tokens."""
    rows = samples(options, arch, kind)
    real = sum(len(row["tokens"]) for row in rows)
    if kind == "packed":
        layout = "placeholder" if arch == "joint_decoder" else "marker"
        longest = options.length + num_features(options, arch)
        rows = list(pack(rows, longest, layout=layout))
    return to_device(padded_collate_images(rows), options), real


def to_device(value, options):
    if isinstance(value, dict):
        return {key: to_device(each, options) for key, each in value.items()}
    return value.to(options.device, DTYPES[options.dtype] if value.is_floating_point() else None)


# --- implementations -----------------------------------------------------------------------------


class Torchfuse:
    """``linear_next_token_loss``, as the recipes have it."""

    def __init__(self, options, arch, folder):
        self.model = from_pretrained(folder, dtype=DTYPES[options.dtype], device=options.device)
        self.source_names = {name: (name, None) for name, _ in self.model.named_parameters()}
        self.fusion = fusion_names(self.model)

    def loss(self, batch):
        total, count = linear_next_token_loss(self.model, **batch)
        return total / count


class TorchfuseLogits(Torchfuse):
    """``next_token_loss`` of the logits of all positions."""

    def loss(self, batch):
        call = {key: value for key, value in batch.items() if key != "labels"}
        total, count = next_token_loss(self.model(**call), batch["labels"])
        return total / count


class Projected(nn.Module):
    """A tower and its adapter, as torchtune's ``EarlyFusionModel`` takes them."""

    def __init__(self, encoder, adapter):
        super().__init__()
        self.encoder, self.adapter = encoder, adapter

    def forward(self, images):
        return self.adapter(self.encoder(images))


class Torchtune:
    """torchtune's fused model around the same tower, with the loss of its recipes in chunks of logits."""

    def __init__(self, options, arch, folder):
        from torchtune.modules.loss import CEWithChunkedOutputLoss

        fused = from_pretrained(folder, dtype=DTYPES[options.dtype], device=options.device)
        self.fusion, self.arch = fusion_names(fused), arch
        names = {name: (name, None) for name, _ in fused.named_parameters()}
        if arch == "cross_attention":
            longest = max(options.length, 2048)
            self.model = build_torchtune(
                SIZES[options.size], fused, max_seq_len=longest, device=options.device
            )
        else:
            self.model = build_early_fusion(options, fused)
            renamed = {"encoder.": "encoders.image.encoder.", "adapter.": "encoders.image.adapter."}
            renamed |= {"decoder.tok_embeddings.": "tok_embeddings."}
            for name in names:
                for prefix, new in renamed.items():
                    if name.startswith(prefix):
                        names[name] = new + name.removeprefix(prefix), None
        self.source_names = names
        self.model.set_num_output_chunks(CHUNKS)
        self.cross_entropy = CEWithChunkedOutputLoss(CHUNKS)

    def loss(self, batch):
        inputs = batch["encoder_input"]
        if self.arch == "cross_attention":
            ratio = torch.ones_like(inputs["images"][:, :, 0, 0, 0, :2], dtype=torch.long)
            inputs = {**inputs, "aspect_ratio": ratio}
            logits = self.model(
                batch["tokens"], encoder_input=inputs, encoder_mask=batch["encoder_mask"]
            )
        else:
            logits = self.model(batch["tokens"], encoder_input={"image": inputs})
        labels = batch["labels"]
        shifted = torch.hstack((labels[:, 1:], torch.full_like(labels[:, :1], -100)))
        return self.cross_entropy(logits, shifted)


def build_early_fusion(options, fused):
    """Return torchtune's ``EarlyFusionModel`` with the weights of a LLaVA."""
    from torchtune.models.llama3_1 import llama3_1
    from torchtune.modules.model_fusion import EarlyFusionModel

    shape = SIZES[options.size]
    with torch.device("meta"):
        decoder = llama3_1(
            vocab_size=shape["vocab"],
            num_layers=shape["layers"],
            num_heads=shape["heads"],
            num_kv_heads=shape["kv"],
            embed_dim=shape["width"],
            max_seq_len=max(options.length, 2048),
            intermediate_dim=shape["hidden"],
        )
    decoder.load_state_dict(fused.decoder.state_dict(), strict=True, assign=True)
    fill_rope(decoder, options.device)
    token = image_token(options, "joint_decoder")
    encoders = {"image": Projected(fused.encoder, fused.adapter)}
    return EarlyFusionModel(decoder, encoders, {"image": token})


class Transformers:
    """transformers' model with ``labels=``."""

    def __init__(self, options, arch, folder):
        from transformers import LlavaForConditionalGeneration, MllamaForConditionalGeneration

        classes = {
            "cross_attention": MllamaForConditionalGeneration,
            "joint_decoder": LlavaForConditionalGeneration,
        }
        dtype = DTYPES[options.dtype]
        self.model = classes[arch].from_pretrained(folder, dtype=dtype).to(options.device)
        self.arch, self.num_features = arch, num_features(options, arch)
        spec = ARCHS[arch].from_config(self.model.config.to_dict())
        names = [name for name, _ in self.model.named_parameters()]
        self.source_names, _ = spec.key_table().to_targets(names)
        with torch.device("meta"):
            self.fusion = fusion_names(spec.build())

    def loss(self, batch):
        images, more = batch["encoder_input"]["images"], {}
        if self.arch == "cross_attention":
            more = {
                "cross_attention_mask": batch["encoder_mask"][:, :, :: self.num_features, None].long(),
                "aspect_ratio_ids": torch.ones_like(images[:, :, 0, 0, 0, 0], dtype=torch.long),
                "aspect_ratio_mask": torch.ones_like(images[:, :, :, 0, 0, 0], dtype=torch.long),
            }
        else:
            images = images.flatten(0, 1)
        call = {"input_ids": batch["tokens"], "labels": batch["labels"], "use_cache": False}
        return self.model(**call, pixel_values=images, **more).loss


IMPLEMENTATIONS = {
    "torchfuse": Torchfuse,
    "torchfuse, all logits": TorchfuseLogits,
    "torchtune": Torchtune,
    "transformers": Transformers,
}


def fusion_names(model):
    """What trains: fusion parameters, but for rows of the embedding, which are no tensor in transformers."""
    return {name for name in get_fusion_params(model) if "fusion_embedding" not in name}
