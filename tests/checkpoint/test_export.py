import json

import pytest
import torch
from hf import LLAMA, shake
from safetensors.torch import load_file
from support import same_state, state, tiny_decoder
from transformers import AutoConfig

from torchfuse import export, from_pretrained, fuse, quantize, save_pretrained


def test_shards_and_their_index(pretrained, tmp_path):
    model = from_pretrained(**pretrained, every=2)
    export(model, tmp_path / "out", format="torchfuse", max_shard_size=20_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = {f.name: load_file(f) for f in sorted((tmp_path / "out").glob("*.safetensors"))}
    assert len(shards) > 2
    assert index["weight_map"] == {name: file for file, shard in shards.items() for name in shard}
    assert set(index["weight_map"]) == set(model.state_dict())
    sizes = {file: sum(t.nbytes for t in shard.values()) for file, shard in shards.items()}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert all(size <= 20_000 or len(shards[file]) == 1 for file, size in sizes.items())
    assert same_state(state(model), from_pretrained(tmp_path / "out"))


def test_tensors_that_share_memory_are_written_each(pretrained, tmp_path):
    model = from_pretrained(**pretrained, every=2)
    both = torch.randn(2, 24)
    norms = model.decoder.layers[0].sa_norm, model.decoder.layers[0].mlp_norm
    for norm, rows in zip(norms, both, strict=True):
        norm.scale = torch.nn.Parameter(rows)  # views of one storage
    save_pretrained(model, tmp_path / "out")
    assert same_state(state(model), from_pretrained(tmp_path / "out"))


def test_files_are_copied_and_a_checkpoint_is_replaced(pretrained, tmp_path):
    model = from_pretrained(**pretrained, every=2)
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    save_pretrained(model, tmp_path / "out", files=[tokenizer])
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    shake(model)
    save_pretrained(model, tmp_path / "out")
    assert same_state(state(model), from_pretrained(tmp_path / "out"))
    assert not (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("format_", "problem"),
    [
        (
            "llava",
            "its architecture 'cross_attention': only 'joint_decoder' can be held. Formats that can",
        ),
        ("torchtune", "the adapter of 'encoder': torchtune has no adapters. Formats that can"),
        (
            "gguf",
            "Unknown format 'gguf' for a fused model; there are llava, mllama, torchfuse, torchtune",
        ),
        ("llama", "Unknown format 'llama' for a fused model"),
    ],
)
def test_what_a_format_cannot_hold_is_named(pretrained, tmp_path, format_, problem):
    model = from_pretrained(**pretrained, every=2)
    with pytest.raises(ValueError, match=problem):
        export(model, tmp_path / "out", format=format_)
    with pytest.raises(ValueError, match="Unknown format 'llava' for a part; there are llama, clip, hf"):
        export(model.decoder, tmp_path / "out", format="llava")
    assert not (tmp_path / "out").exists()


def test_tensors_that_cannot_be_written_are_named(pretrained, tmp_path):
    with torch.device("meta"):
        empty = fuse(tiny_decoder(), from_pretrained(**pretrained, every=2).encoder, every=3)
    quantized = fuse(tiny_decoder(), from_pretrained(**pretrained, every=2).encoder, every=3)
    quantize(quantized, "int8_weight_only")
    for model, problem in ((empty, "is on the meta device"), (quantized, "is quantized")):
        with pytest.raises(ValueError, match=rf"decoder\.layers\.0\.attn\.q_proj\.weight {problem}"):
            save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_that_cannot_be_copied_are_named(pretrained, tmp_path):
    model = from_pretrained(**pretrained, every=2)
    config = tmp_path / "config.json"
    config.write_text("{}")
    with pytest.raises(
        ValueError,
        match=r"the file .*nowhere\.json does not exist.*config\.json cannot be copied, the format has its own",
    ):
        save_pretrained(model, tmp_path / "out", files=[tmp_path / "nowhere.json", config])
    assert not (tmp_path / "out").exists()


def test_half_precision_is_kept(pretrained, tmp_path):
    image = LLAMA["vocab_size"] - 1
    model = from_pretrained(
        **pretrained, arch="joint_decoder", encoder_token=image, dtype=torch.bfloat16
    )
    export(model, tmp_path / "out", format="llava")
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    again = from_pretrained(tmp_path / "out")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert same_state(state(model), again)
