"""Small stand-ins for the checkpoints and data that the configurations of true size name.

They have the architecture, the kind of tokenizer and the image processor of the published ones, and the names
of their folders, so that a configuration runs with few overrides in the folder that they are made in.
"""

from __future__ import annotations

import json

import hf
import torch
from own_data import ROWS, VOCAB, picture, save_tokenizer, turns
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
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
# Llama 3.1: 128,000 tokens of text, and the first of 256 special tokens.
LLAMA3_TEXT = 128_000
LLAMA3_SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
]
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>"
    "\n\n{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
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
    if name.startswith(("llava", "llama3_2_vision_11b")) or name.endswith("cross_attention"):
        return SHRINK
    return [*SHRINK, "model.fusion_vocab_size=1", f"model.encoder_token={IMAGE_TOKEN}"]


def make_folder(folder):
    """Write ``checkpoints`` and ``datasets`` into a folder."""
    make_llava_folder(folder)
    checkpoints = folder / "checkpoints"
    for name in ("Llama-3.2-1B-Instruct", "SmolLM2-135M-Instruct"):
        hf.llama(checkpoints / name, **TEXT, tie_word_embeddings=True)
        save_tokenizer(checkpoints / name)
    side = {"height": SIDE, "width": SIDE}
    siglip = checkpoints / "siglip2-base-patch16-224"
    torch.manual_seed(43)
    SiglipVisionModel(SiglipVisionConfig(**hf.VISION)).save_pretrained(siglip)
    SiglipImageProcessor(size=side).save_pretrained(siglip)
    vision = checkpoints / "Llama-3.2-11B-Vision-Instruct"
    # 24 x 2048 values are blocks of NF4.
    hf.mllama(vision, text={**TEXT, "bos_token_id": 256, "intermediate_size": 2048})
    save_tokenizer(vision)
    MllamaImageProcessor(size=side, max_image_tiles=4).save_pretrained(vision)
    return folder


def make_llava_folder(folder):
    """Write what the configurations of LLaVA name; the special tokens of Llama have their true ids."""
    llama, clip = (
        folder / "checkpoints" / name for name in ("Llama-3.1-8B-Instruct", "clip-vit-large-patch14-336")
    )
    llama.parent.mkdir(parents=True)
    ids = {"bos_token_id": LLAMA3_TEXT, "eos_token_id": LLAMA3_TEXT + 9, "pad_token_id": None}
    hf.llama(llama, **TEXT | ids | {"vocab_size": LLAMA3_TEXT + 256})
    _save_llama3_tokenizer(llama)
    hf.clip_tower(clip)
    side = {"height": SIDE, "width": SIDE}
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=side).save_pretrained(clip)
    _write_samples(folder / "datasets")
    return folder


def _save_llama3_tokenizer(folder):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    unused = [f"unused {token}" for token in range(len(alphabet), LLAMA3_TEXT)]
    bytes_ = Tokenizer(models.BPE({text: i for i, text in enumerate(alphabet + unused)}, []))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    bytes_.add_special_tokens(LLAMA3_SPECIAL)
    bytes_.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    config |= {"chat_template": LLAMA3_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


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
