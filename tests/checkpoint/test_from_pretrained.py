import pytest
import torch
from hf import clip_tower, edit, llama, llava, rename

from torchfuse import from_pretrained
from torchfuse.models import DeepFusionModel


def refused(*problems, **arguments):
    with pytest.raises(ValueError) as info:
        from_pretrained(**arguments)
    assert [problem for problem in problems if problem not in str(info.value)] == [], info.value


def rope(**values):
    return {"rope_parameters": {"rope_theta": 1e4, **values}}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"attention_bias": True}, "attention_bias=True is not supported, only False"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"hidden_act": "relu"}, "hidden_act='relu' is not supported, only 'silu'"),
        (rope(rope_type="yarn", factor=2.0), "rope type 'yarn' is not supported"),
        (rope(rope_type="llama3"), "rope: factor is missing"),
        (
            rope(rope_type="default", partial_rotary_factor=0.5),
            "partial_rotary_factor=0.5 is not supported",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": None},
            "rope type 'linear' is not supported",
        ),
        (
            {"rope_scaling": {"factor": 2.0}, "rope_parameters": None},
            "rope_parameters or rope_scaling: factor=2.0 is not supported for type 'default'",
        ),
        ({"rope_scaling": [2]}, "rope_parameters and rope_scaling must be sections"),
        ({"model_type": "mistral"}, "model_type 'mistral' is not supported, only llama"),
        ({"num_hidden_layers": 10**9}, "has 1000000000 layers, but there are only"),
        ({"num_hidden_layers": 4}, "missing: layers.3.attn.q_proj.weight"),
        ({"num_hidden_layers": 2}, "unexpected: model.layers.2.input_layernorm.weight"),
        ({"hidden_size": 36}, "shape: model.embed_tokens.weight is [37, 24]"),
        (
            {"hidden_size": 2**50},
            "hidden_size must be a whole number of at least 1, got 1125899906842624",
        ),
        ({"num_attention_heads": "6"}, "must be a whole number of at least 1, got '6'"),
        ({"num_attention_heads": 5}, "num_attention_heads=5 must divide hidden_size=24"),
        ({"num_key_value_heads": 4}, "num_key_value_heads=4 must divide num_attention_heads=6"),
        ({"head_dim": 5}, "head_dim=5 must be even"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_decoder_settings_that_are_not_supported(folders, changes, problem):
    edit(folders["decoder"], **changes)
    refused(problem, str(folders["decoder"]), **folders, every=2)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"num_channels": 1}, "num_channels=1 is not supported, only 3"),
        ({"hidden_act": "relu"}, "hidden_act must be one of quick_gelu, gelu, got 'relu'"),
        ({"patch_size": 5}, "patch_size=5 must divide image_size=12"),
        ({"feature_layer": -5}, "clip: config.json: feature_layer=-5 must lie between -4 and 3"),
        ({"model_type": "perceptron"}, "transformers has no model_type 'perceptron'"),
        ({"model_type": None}, "model_type None"),
    ],
    ids=str,
)
def test_encoder_settings_that_are_not_supported(folders, changes, problem):
    edit(folders["encoder"], **changes)
    refused(str(folders["encoder"]), problem, **folders)


def test_problems_of_all_directories_and_settings_are_one_error(folders):
    rename(folders["decoder"], lambda key: key.replace("norm.weight", "norm.gain"))
    rename(folders["encoder"], lambda key: key.replace("class_embedding", "cls"))
    refused("missing: norm.scale", "unexpected: embeddings.cls", **folders, every=3)
    edit(folders["decoder"], vocab_size="many", rms_norm_eps=-1.0)
    refused(
        "vocab_size must be a whole number of at least 1, got 'many'",
        "rms_norm_eps must be a number above 0, got -1.0",
        **folders,
    )


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"arch": "telepathy"}, "Unknown architecture 'telepathy'"),
        ({"every": 7}, "every=7 fuses no layer"),
        ({"adapter": "mlp_9layer"}, "Unknown adapter 'mlp_9layer'"),
        ({"placement": "prefix"}, "architecture 'cross_attention': unknown option 'placement'"),
        ({"feature_layer": 9}, "feature_layer=9 must lie between -4 and 3"),
        ({"feature_layer": {"eye": 1}}, "feature_layer names eye; the encoders are: one without a name"),
        ({"prepare": print, "intermediate_layers": [1]}, "intermediate_layers, prepare cannot be given"),
        ({"decoder": None}, "needs the directory of a whole model, or decoder= and encoder="),
        ({"path": "x"}, "needs the directory of a whole model, or decoder= and encoder="),
        (
            {"path": "x", "decoder": None},
            "needs the directory of a whole model, or decoder= and encoder=",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_arguments_that_do_not_fit(pretrained, arguments, problem):
    refused(problem, **{**pretrained, **arguments})


def test_arguments_that_do_not_fit_a_whole_model(tmp_path):
    llava(tmp_path)
    refused("every, arch cannot be given", path=tmp_path, every=2, arch="cross_attention")
    refused("feature_layer cannot be given", path=tmp_path, feature_layer=-1)
    refused(
        "intermediate_layers cannot be given: the format llava has no such setting",
        path=tmp_path,
        intermediate_layers=[1],
    )


def test_options_reach_their_parts(pretrained):
    model = from_pretrained(
        **pretrained,
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
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {
        name
        for name, _ in model.named_parameters()
        if name.startswith(("decoder.", "encoder.")) and "fusion" not in name
    }


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64], ids=str)
def test_dtype_is_the_checkpoints_unless_given(tmp_path, dtype):
    llama(tmp_path / "llama").half().save_pretrained(tmp_path / "llama")
    clip_tower(tmp_path / "clip")
    model = from_pretrained(decoder=tmp_path / "llama", encoder=tmp_path / "clip", every=2, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype or torch.float16}
    cache = model.decoder.layers[0].attn.pos_embeddings.cache
    assert cache.dtype == torch.float32  # rotary tables stay exact
