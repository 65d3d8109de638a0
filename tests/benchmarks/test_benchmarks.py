"""Benchmarks run, at sizes whose speed means nothing."""

import json
import sys

import pytest
from benchmarks import feature_cache, fusion_embedding, load, open_samples, quantized_answers
from hf import FUSED, LLAMA, clip_tower, fused_model, llama
from omegaconf import OmegaConf
from PIL import Image
from support import open_gates
from tokenizers import Tokenizer, models, pre_tokenizers

from torchfuse import load_pretrained
from torchfuse.checkpoint.artifact.trained import save_trained

WORDS = "<pad> <bos> <eos> <unk> which digit is it ? even or odd one two three four".split()


def test_fusion_embedding(capsys):
    sizes = ["--vocab", "97", "--width", "5", "--batch", "2", "--length", "11", "--rounds", "3"]
    ratios = fusion_embedding.main(sizes)
    assert len(ratios) == 4
    printed = capsys.readouterr().out
    assert "tables 97 + 8 x 5, fp32" in printed
    assert printed.count("times as fast") == 4
    assert printed.count("torchtune  ") == 4


@pytest.mark.long  # the tower has its real size
def test_feature_cache(capsys):
    found = feature_cache.main(["--layers", "1", "--batch", "1", "--rounds", "1", "--words", "6"])
    [encoder], [cache] = found.values()
    assert cache[3] == pytest.approx(encoder[3], rel=1e-5)
    assert "cache / encoder" in capsys.readouterr().out


@pytest.mark.long  # each implementation loads in a process of its own
@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")
def test_load(capsys, tmp_path):
    sizes = ["--width", "64", "--layers", "6", "--vocab", "101", "--shard", "100KB", "--rounds", "1"]
    ratios = load.main([*sizes, "--layouts", "shards", "--folder", str(tmp_path)])
    assert len(ratios) == 2
    printed = capsys.readouterr().out
    assert "6 layers, width 64, vocabulary 101: fp32 in the files, loaded as bf16" in printed
    assert f"shards: {len(list((tmp_path / 'shards').glob('*.safetensors')))} of together" in printed
    assert printed.count("\ntransformers  ") == 1
    assert printed.count(", peak ") == 2


@pytest.fixture
def run(tmp_path):
    """The folder of a finetuning run, of a model that was not trained."""
    numbers = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 48}
    # With weights as large as in other tests any rounding error grows from layer to layer.
    llama(tmp_path / "llama", **numbers, initializer_range=0.05)
    clip_tower(tmp_path / "clip")
    preprocessor = {
        "size": 12,
        "crop_size": 12,
        "image_mean": [0.3, 0.4, 0.5],
        "image_std": [0.2, 0.3, 0.4],
    }
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "llama" / "tokenizer.json"))
    for level in (40, 90, 200):
        Image.new("L", (12, 12), level).save(tmp_path / f"{level}.png")
    questions = [
        {"question": "<image> which digit is it ?", "answer": "one", "images": ["40.png"], "kind": "a"},
        {"question": "<image> or <image> ?", "answer": "two", "images": ["90.png", "200.png"]},
        {"question": "is it even or odd ?", "answer": "three four", "kind": "text"},
    ]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, questions)))
    sizes = FUSED | {"arch": "cross_attention", "embed_dim": 48, "fusion_vocab_size": 1}
    pretrained = {"decoder": str(tmp_path / "llama"), "encoder": str(tmp_path / "clip")}
    transform = {
        "_component_": "torchfuse.data.questions.QuestionTransform",
        "tokenizer": pretrained["decoder"],
        "image_transform": pretrained["encoder"],
        "image_token": LLAMA["vocab_size"],
        "features_per_image": 9,
    }
    config = {
        "model": {"_component_": "torchfuse.models.builders.llama_clip", **sizes},
        "pretrained": pretrained,
        "transform": transform,
        "data": {"test": str(tmp_path / "test.jsonl")},
    }
    folder = tmp_path / "run"
    folder.mkdir()
    OmegaConf.save(config, folder / "config.yaml")
    model = open_gates(fused_model(**sizes))
    load_pretrained(model, **pretrained)
    save_trained(model, folder / "fusion")
    return folder


def test_quantized_answers(capsys, run):
    found = quantized_answers.main(["--run", str(run), "--batch-size", "2"])
    assert found.keys() == {"fp32", "bf16"}
    for compared in found.values():
        assert 0 < compared.moved < 0.02
        assert 0 < compared.moved_answers < 0.02
        assert compared.same in (0, 1 / 3, 2 / 3, 1)
    printed = capsys.readouterr().out
    assert "int8_weight_only of decoder\n3 samples of " in printed
    assert "weights quantized: 22, " in printed
    assert printed.count("within 2%") == 2


def test_quantized_answers_of_some_questions_and_another_scheme(capsys, run):
    options = ["--dtypes", "fp32", "--limit", "1", "--scheme", "float8_weight_only"]
    found = quantized_answers.main(["--run", str(run), *options, "--parts", "decoder", "encoder"])
    assert list(found) == ["fp32"]
    assert found["fp32"].moved > 0.003  # three bits of mantissa
    printed = capsys.readouterr().out
    assert "float8_weight_only of decoder, encoder\n1 samples of " in printed


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")
def test_open_samples(capsys, tmp_path):
    open_samples.main(["--rows", "53", "--read", "7", "--folder", str(tmp_path)])
    assert capsys.readouterr().out.count(" 53 rows  open ") == 3
