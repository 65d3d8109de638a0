"""Small stand-ins for the checkpoints and data that the configurations of true size name.

They have the architecture, the kind of tokenizer and the image processor of the published ones, and the names
of their folders, so that a configuration runs with few overrides in the folder that they are made in.
"""

from __future__ import annotations

import json

import hf
import torch
from own_data import ROWS, VOCAB, picture, save_tokenizer, turns
from transformers import (
    CLIPImageProcessor,
    MllamaImageProcessor,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

SIDE = 12
TEXT = {"vocab_size": VOCAB, "max_position_embeddings": 257, "num_hidden_layers": 5}
TEXT |= {"bos_token_id": None, "eos_token_id": 257, "pad_token_id": 258}
IMAGE_TOKEN = VOCAB  # the first id behind the vocabulary
# Keys that belong to the true size.
SHRINK = [
    "device=cpu",
    "train.max_steps=2",
    "train.batch_size=2",
    "train.gradient_accumulation_steps=1",
    "data.max_seq_len=120",
    "data.num_workers=0",
]


def shrink(name):
    """The overrides with which a configuration of true size runs on the stand-ins."""
    if name.startswith("llama3_2_vision_11b") or name.endswith("cross_attention"):
        return SHRINK
    return [*SHRINK, "model.fusion_vocab_size=1", f"model.encoder_token={IMAGE_TOKEN}"]


def make_folder(folder):
    """Write ``checkpoints`` and ``datasets`` into a folder."""
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(parents=True)
    for name, tied in (
        ("Llama-3.1-8B-Instruct", False),
        ("Llama-3.2-1B-Instruct", True),
        ("SmolLM2-135M-Instruct", True),
    ):
        hf.llama(checkpoints / name, **TEXT, tie_word_embeddings=tied)
        save_tokenizer(checkpoints / name)
    side = {"height": SIDE, "width": SIDE}
    clip = checkpoints / "clip-vit-large-patch14-336"
    hf.clip_tower(clip)
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=side).save_pretrained(clip)
    siglip = checkpoints / "siglip2-base-patch16-224"
    torch.manual_seed(43)
    SiglipVisionModel(SiglipVisionConfig(**hf.VISION)).save_pretrained(siglip)
    SiglipImageProcessor(size=side).save_pretrained(siglip)
    vision = checkpoints / "Llama-3.2-11B-Vision-Instruct"
    # 24 x 2048 values are blocks of NF4.
    hf.mllama(vision, text={**TEXT, "bos_token_id": 256, "intermediate_size": 2048})
    save_tokenizer(vision)
    MllamaImageProcessor(size=side, max_image_tiles=4).save_pretrained(vision)
    _write_samples(folder / "datasets")
    return folder


def _write_samples(datasets):
    pretrain, instruct = datasets / "LLaVA-Pretrain", datasets / "LLaVA-Instruct-150K"
    images = [pretrain / "images", datasets / "coco" / "train2017"]
    for folder in (pretrain, instruct, *images):
        folder.mkdir(parents=True)
    for number in range(ROWS + 1):
        for folder in images:
            picture(number).save(folder / f"{number}.png")
    captions, conversations = [], []
    for number in range(ROWS):
        caption = [
            {"from": "human", "value": "<image>\n"},
            {"from": "gpt", "value": f"Number {number}."},
        ]
        captions.append({"id": str(number), "image": f"{number}.png", "conversations": caption})
        messages = [{"from": role, "value": text} for role, text in turns(number) if number % 4 != 1]
        if messages:
            image = {} if number % 4 == 2 else {"image": f"{number}.png"}
            conversations.append({"id": str(number), **image, "conversations": messages})
    (pretrain / "blip_laion_cc_sbu_558k.json").write_text(json.dumps(captions))
    (instruct / "llava_instruct_150k.json").write_text(json.dumps(conversations))
