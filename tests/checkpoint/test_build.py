import json

import pytest
import torch
from hf import clip_tower, edit, llama, llava, mllama, rename
from safetensors.torch import load_file, save_file

from torchfuse import from_pretrained, fuse, get_fusion_params, save_pretrained
from torchfuse.models.strategies.cross_attention import DeepFusionModel


@pytest.fixture
def folders(tmp_path):
    llama(tmp_path / "llama")
    clip_tower(tmp_path / "clip")
    return {"decoder": tmp_path / "llama", "encoder": tmp_path / "clip"}


def refused(*complaints, **given):
    path = given.pop("path", None)
    with pytest.raises(ValueError) as info:
        from_pretrained(*([] if path is None else [path]), **given)
    for complaint in complaints:
        assert complaint in str(info.value), info.value


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"attention_bias": True}, "attention_bias=True is not supported, only False"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"hidden_act": "relu"}, "hidden_act='relu' is not supported, only 'silu'"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            "rope type 'yarn' is not supported",
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 0.5,
                }
            },
            "partial_rotary_factor=0.5 is not supported",
        ),
        ({"model_type": "mistral"}, "model_type 'mistral' is not supported, only llama"),
        ({"num_hidden_layers": 10**9}, "has 1000000000 layers, but there are only"),
        ({"num_hidden_layers": 4}, "missing: layers.3.attn.q_proj.weight"),
        ({"num_hidden_layers": 2}, "unexpected: model.layers.2.input_layernorm.weight"),
        ({"hidden_size": 36}, "shape: model.embed_tokens.weight is [37, 24]"),
        (
            {"hidden_size": 2**50},
            "hidden_size must be a whole number of at least 1, got 1125899906842624",
        ),
        ({"num_attention_heads": 5}, "num_attention_heads=5 must divide hidden_size=24"),
        ({"num_key_value_heads": 4}, "num_key_value_heads=4 must divide num_attention_heads=6"),
        ({"head_dim": 5}, "head_dim=5 must be even"),
        ({"vocab_size": "many", "rms_norm_eps": -1.0}, "vocab_size must be a whole number"),
        (
            {"vocab_size": "many", "rms_norm_eps": -1.0},
            "rms_norm_eps must be a number above 0, got -1.0",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_decoder_that_cannot_be_built_is_refused_by_name(folders, changes, complaint):
    edit(folders["decoder"], **changes)
    refused(complaint, str(folders["decoder"]), **folders, every=2)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"num_channels": 1}, "num_channels=1 is not supported, only 3"),
        ({"hidden_act": "relu"}, "hidden_act must be one of quick_gelu, gelu, got 'relu'"),
        ({"patch_size": 5}, "patch_size=5 must divide image_size=12"),
        ({"model_type": "perceptron"}, "transformers has no model_type 'perceptron'"),
        ({"model_type": None}, "model_type None"),
    ],
    ids=str,
)
def test_a_tower_that_cannot_be_built_is_refused_by_name(folders, changes, complaint):
    edit(folders["encoder"], **changes)
    refused(complaint, **folders)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"arch": "telepathy"}, "Unknown architecture 'telepathy'"),
        ({"every": 7}, "every=7 fuses no layer"),
        ({"adapter": "mlp_9layer"}, "Unknown adapter 'mlp_9layer'"),
        ({"placement": "prefix"}, "architecture 'cross_attention': unknown option 'placement'"),
        ({"feature_layer": 9}, "feature_layer=9 must lie between -4 and 3"),
        ({"prepare": print, "intermediate_layers": [1]}, "intermediate_layers, prepare cannot be given"),
        ({"decoder": None}, "needs the directory of a whole model, or decoder= and encoder="),
        ({"path": "x"}, "needs the directory of a whole model, or decoder= and encoder="),
    ],
    ids=lambda value: str(value)[:40],
)
def test_options_that_do_not_fit_are_named(folders, options, complaint):
    refused(complaint, **{**folders, **options})


def test_problems_of_all_directories_are_one_error(folders):
    rename(folders["decoder"], lambda key: key.replace("norm.weight", "norm.gain"))
    rename(folders["encoder"], lambda key: key.replace("class_embedding", "cls"))
    refused("missing: norm.scale", "unexpected: embeddings.cls", **folders, every=3)


def test_options_reach_their_parts(folders):
    model = from_pretrained(
        **folders,
        every=3,
        max_seq_len=17,
        feature_layer=1,
        keep_cls=True,
        decoder_trainable=True,
        encoder_trainable=True,
        fusion_trainable=False,
    )
    assert isinstance(model, DeepFusionModel)
    assert model.max_seq_len == 17
    assert model.decoder.layers[0].attn.pos_embeddings.cache.shape[0] == 17
    assert model.encoder.num_hidden == 1
    assert model.encoder.num_tokens == 10
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        n
        for n, _ in model.named_parameters()
        if n.startswith(("decoder.", "encoder.")) and "fusion" not in n
    ]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64], ids=str)
def test_dtype_is_the_checkpoints_unless_given(tmp_path, dtype):
    llama(tmp_path / "llama").half().save_pretrained(tmp_path / "llama")
    clip_tower(tmp_path / "clip")
    model = from_pretrained(decoder=tmp_path / "llama", encoder=tmp_path / "clip", every=2, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype or torch.float16}
    cache = model.decoder.layers[0].attn.pos_embeddings.cache
    assert cache.dtype == torch.float32  # rotary tables stay exact


def test_a_whole_directory_says_itself_how_it_is_fused(tmp_path):
    llava(tmp_path)
    refused("every, arch cannot be given", path=tmp_path, every=2, arch="cross_attention")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"vision_feature_layer": [-2, -3]}, "vision_feature_layer must be a whole number"),
        ({"projector_hidden_act": "tanh"}, "projector_hidden_act must be one of gelu, silu, relu"),
        ({"vision_feature_select_strategy": "some"}, "must be one of default, full"),
        ({"text_config": {"model_type": "gemma"}}, "model_type 'gemma' is not supported, only llama"),
        ({"text_config": None}, "text_config is missing"),
        ({"model_type": "llava_next"}, "model_type 'llava_next'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_llava_that_cannot_be_built_is_refused_by_name(tmp_path, changes, complaint):
    llava(tmp_path)
    edit(tmp_path, **changes)
    refused(complaint, path=tmp_path)


@pytest.mark.parametrize(
    ("crossing", "complaint"),
    [
        ([1, 2], "cross_attention_layers=[1, 2] is not supported"),
        ([4], "cross_attention_layers=[4] is not supported"),
        ([], "cross_attention_layers=[] is not supported"),
        (["1"], "cross_attention_layers must be a list of whole numbers"),
    ],
    ids=str,
)
def test_cross_attention_layers_that_no_decoder_layer_follows(tmp_path, crossing, complaint):
    mllama(tmp_path)
    text = {"num_hidden_layers": 5, "cross_attention_layers": crossing, "hidden_size": 24}
    edit(tmp_path, text_config=text | {"num_attention_heads": 6, "num_key_value_heads": 2})
    refused(complaint, path=tmp_path)


def test_states_of_the_tower_may_be_chosen(tmp_path):
    mllama(tmp_path)
    one, other = from_pretrained(tmp_path), from_pretrained(tmp_path, intermediate_layers=[0, 1])
    given = {"images": torch.randn(1, 1, 1, 3, 12, 12)}
    assert not torch.equal(one.encoder(**given), other.encoder(**given))


def test_an_own_directory_that_was_tampered_with(folders, tmp_path):
    save_pretrained(from_pretrained(**folders, every=2), tmp_path / "own")
    file = tmp_path / "own" / "model.safetensors"
    tensors = load_file(file)
    save_file({n: t for n, t in tensors.items() if n != "adapter.linear_1.bias"}, file)
    refused("missing: adapter.linear_1.bias", path=tmp_path / "own")
    rename(
        tmp_path / "own", lambda key: key.replace("adapter.linear_1.weight", "adapter.linear_9.weight")
    )
    refused("unexpected: adapter.linear_9.weight", path=tmp_path / "own")
    edit(tmp_path / "own", arch="telepathy")
    refused("Unknown architecture 'telepathy'", path=tmp_path / "own")
    edit(tmp_path / "own", format=2)
    refused("format 2 is not supported, only 1", path=tmp_path / "own")


def test_an_own_directory_that_speaks_of_endless_layers(folders, tmp_path):
    save_pretrained(from_pretrained(**folders, every=2), tmp_path / "own")
    said = json.loads((tmp_path / "own" / "config.json").read_text())
    said["encoders"][""]["num_hidden_layers"] = 10**9
    edit(tmp_path / "own", encoders=said["encoders"])
    refused("has 1000000003 layers, but there are only", path=tmp_path / "own")


def test_metas_files_for_several_devices_are_refused(tmp_path):
    for number in range(2):
        torch.save({"text_model.norm.weight": torch.ones(3)}, tmp_path / f"consolidated.0{number}.pth")
    (tmp_path / "params.json").write_text("{}")
    refused("has 2 files, consolidated.00.pth and so on", path=tmp_path)


def test_a_whole_directory_without_anything_that_fusion_added(tmp_path):
    llama(tmp_path / "llama")
    clip_tower(tmp_path / "clip")
    parts = from_pretrained(decoder=tmp_path / "llama", encoder=tmp_path / "clip", every=3)
    decoder = from_pretrained(
        decoder=tmp_path / "llama", encoder=tmp_path / "clip", arch="joint_decoder", encoder_token=1
    ).decoder
    tower = parts.encoder
    tower.feature_dim = 24
    plain = fuse(decoder, tower, arch="joint_decoder", encoder_token=1, adapter=None)
    assert not get_fusion_params(plain)
    save_pretrained(plain, tmp_path / "plain")
    assert not any(p.requires_grad for p in from_pretrained(tmp_path / "plain").parameters())
