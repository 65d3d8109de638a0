import json

import pytest
import torch
from hf import LLAMA, clip_tower, llama, llava, shake
from ranks import run_on_ranks
from safetensors.torch import load_file
from support import TinyEncoder, same_state, state, text, tiny_decoder
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, LlavaForConditionalGeneration

from torchfuse import export, from_pretrained, fuse, load_pretrained, save_pretrained
from torchfuse.training.sharding import shard

IMAGE = LLAMA["vocab_size"] - 1
PATCHES = 9


@pytest.fixture
def folders(tmp_path):
    llama(tmp_path / "llama")
    clip_tower(tmp_path / "clip")
    return {"decoder": tmp_path / "llama", "encoder": tmp_path / "clip"}


def images(rows=2):
    return torch.randn(rows, 3, 12, 12, generator=torch.Generator().manual_seed(8))


def with_image(token, new=()):
    tokens = text(2, 29) % 30 + 1
    tokens[:, 3 : 3 + PATCHES] = token
    tokens[:, 20 : 20 + len(new)] = torch.tensor(new, dtype=torch.long)
    return tokens


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("head", [True, False], ids=["head", "no_head"])
def test_new_tokens_are_merged_into_the_tables(tmp_path, tied, head):
    llama(tmp_path / "llama", tie_word_embeddings=tied)
    clip_tower(tmp_path / "clip")
    model = from_pretrained(
        decoder=tmp_path / "llama",
        encoder=tmp_path / "clip",
        arch="joint_decoder",
        encoder_token=37,  # the first new token
        fusion_vocab_size=2,
        fusion_head=head,
    ).eval()
    shake(model)
    model.decoder.tok_embeddings.expand(3)
    if head and not tied:
        model.decoder.output.expand(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".fusion_" in name:
                parameter.normal_()
    export(model, tmp_path / "out", format="llava")
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    assert theirs.config.text_config.vocab_size == 37 + 2 + 3
    assert theirs.config.tie_word_embeddings is tied
    tokens = with_image(37, new=[38, 41, 40])
    with torch.no_grad():
        expected = theirs(input_ids=tokens, pixel_values=images()).logits
        logits = model(tokens, encoder_input={"images": images()})
    columns = 42 if head else 37
    assert logits.shape[-1] == columns
    torch.testing.assert_close(logits, expected[..., :columns], rtol=0, atol=1e-4)
    if not head and not tied:  # a row that nobody trained says what the others say on average
        mean = theirs.lm_head.weight[:37].mean(0)
        torch.testing.assert_close(theirs.lm_head.weight[37:], mean.expand(5, -1))
    again = from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        back = again(tokens, encoder_input={"images": images()})[..., :columns]
    torch.testing.assert_close(back, logits, rtol=0, atol=1e-5)


def test_an_image_token_outside_the_table_gets_a_row(folders, tmp_path):
    model = from_pretrained(**folders, arch="joint_decoder", encoder_token=39).eval()
    export(model, tmp_path / "out", format="llava")
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    assert theirs.config.text_config.vocab_size == 40
    tokens = with_image(39)
    with torch.no_grad():
        expected = theirs(input_ids=tokens, pixel_values=images()).logits[..., :37]
        logits = model(tokens, encoder_input={"images": images()})
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_shards_and_their_index(folders, tmp_path):
    model = from_pretrained(**folders, every=2)
    export(model, tmp_path / "out", format="torchfuse", max_shard_size=20_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert set(index["weight_map"]) == set(model.state_dict())
    held = {name: file.name for file in files for name in load_file(file)}
    assert held == index["weight_map"]
    bytes_of = {file.name: sum(t.nbytes for t in load_file(file).values()) for file in files}
    assert index["metadata"]["total_size"] == sum(bytes_of.values())
    assert all(
        size <= 20_000 or len(load_file(tmp_path / "out" / f)) == 1 for f, size in bytes_of.items()
    )
    assert same_state(state(model), from_pretrained(tmp_path / "out"))


def test_files_travel_along_and_a_checkpoint_is_replaced(folders, tmp_path):
    model = from_pretrained(**folders, every=2)
    beside = tmp_path / "tokenizer.json"
    beside.write_text("{}")
    save_pretrained(model, tmp_path / "out", files=[beside])
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    shake(model)
    save_pretrained(model, tmp_path / "out")
    assert same_state(state(model), from_pretrained(tmp_path / "out"))
    assert not (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("format_", "complaint"),
    [
        (
            "llava",
            "its architecture 'cross_attention': only 'joint_decoder' can be held. Formats that can",
        ),
        (
            "torchtune",
            "the adapter of 'encoder': torchtune has no adapters. Formats that can",
        ),
        (
            "gguf",
            "Unknown format 'gguf' for a fused model; there are llava, mllama, torchfuse, torchtune",
        ),
        ("llama", "Unknown format 'llama' for a fused model"),
    ],
)
def test_what_a_format_cannot_hold_is_named(folders, tmp_path, format_, complaint):
    model = from_pretrained(**folders, every=2)
    with pytest.raises(ValueError, match=complaint):
        export(model, tmp_path / "out", format=format_)
    assert not (tmp_path / "out").exists()


def test_parts_that_nothing_can_describe_are_named(folders, tmp_path):
    model = fuse(tiny_decoder(), TinyEncoder(), every=3, adapter=nn.Linear(11, 18))
    with pytest.raises(
        ValueError, match=r"encoder 'encoder': no format for a TinyEncoder.*the adapter of 'encoder'"
    ):
        save_pretrained(model, tmp_path / "out")


def test_a_quantized_or_empty_model_and_missing_files_are_named(folders, tmp_path):
    with torch.device("meta"):
        empty = fuse(tiny_decoder(), from_pretrained(**folders, every=2).encoder, every=3)
    with pytest.raises(ValueError, match=r"decoder\.layers\.0.* is on the meta device"):
        save_pretrained(empty, tmp_path / "out")
    model = from_pretrained(**folders, every=2)
    with pytest.raises(ValueError, match=r"the file .*nowhere\.json does not exist"):
        save_pretrained(model, tmp_path / "out", files=[tmp_path / "nowhere.json"])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"a file config\.json cannot be copied, the format has its own"
    ):
        save_pretrained(model, tmp_path / "out", files=[tmp_path / "config.json"])
    assert not (tmp_path / "out").exists()


def test_half_precision_goes_out_as_it_is(folders, tmp_path):
    model = from_pretrained(**folders, arch="joint_decoder", encoder_token=IMAGE, dtype=torch.bfloat16)
    export(model, tmp_path / "out", format="llava")
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    again = from_pretrained(tmp_path / "out")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert same_state(state(model), again)


def _sharded(rank, folder):
    whole = from_pretrained(folder / "llava").eval()
    model = from_pretrained(folder / "llava", prepare=shard, on_missing="participate").eval()
    parameters = list(model.parameters())
    assert all(isinstance(p, DTensor) for p in parameters)
    mine, total = sum(p.to_local().numel() for p in parameters), sum(p.numel() for p in parameters)
    assert 0.4 < mine / total < 0.6
    tokens, pixels = with_image(IMAGE), images()
    with torch.no_grad():
        expected = whole(tokens, encoder_input={"images": pixels})
        torch.testing.assert_close(
            model(tokens, encoder_input={"images": pixels}), expected, rtol=0, atol=1e-6
        )
    other = from_pretrained(folder / "llava", on_missing="participate")
    for parameter in other.parameters():
        parameter.data.zero_()
    shard(other)
    load_pretrained(other, folder / "llava")  # into a model that is sharded already
    for ours, theirs in zip(other.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours.full_tensor(), theirs)
    export(model, folder / "out", format="llava")
    torch.distributed.barrier()
    assert same_state(state(whole), from_pretrained(folder / "out"))


@pytest.mark.distributed
def test_a_sharded_model_comes_from_a_directory_and_goes_into_one(tmp_path):
    llava(tmp_path / "llava")
    run_on_ranks(_sharded, tmp_path)
