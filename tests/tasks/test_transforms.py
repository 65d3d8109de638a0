"""The transform of a run follows from the sections of its configuration and its model."""

import json

import hf
import pytest
from prompt_settings import give_tokenizer, tokenizer

from torchfuse import from_pretrained
from torchfuse.data import ImageTransform, Message, QuestionTransform
from torchfuse.data.images import GridImageTransform
from torchfuse.errors import ConfigError
from torchfuse.tasks.transforms import make_transform

PER_IMAGE = 9  # patches of 4 in an image of 12, without the class token


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Directories of a decoder with its tokenizer, of an encoder with its processor, of a tokenizer alone."""
    root = tmp_path_factory.mktemp("parts")
    hf.llama(root / "llama")
    give_tokenizer(root / "llama")
    hf.clip_tower(root / "clip")
    side, mean = {"height": 12, "width": 12}, ImageTransform(12).mean
    sizes = {"size": side, "crop_size": side, "image_mean": mean, "image_std": [0.25, 0.5, 0.75]}
    (root / "clip" / "preprocessor_config.json").write_text(json.dumps(sizes))
    tokenizer(root / "words")
    return {name: str(root / name) for name in ("llama", "clip", "words")}


@pytest.fixture(scope="module")
def model(folders):
    fused = {"arch": "joint_decoder", "encoder_token": 37, "feature_layer": -2, "keep_cls": False}
    return from_pretrained(decoder=folders["llama"], encoder=folders["clip"], max_seq_len=53, **fused)


def sections(folders, where, **data):
    named = {"decoder": folders["llama"], "encoder": folders["clip"]}
    component = (
        "torchfuse.from_pretrained" if where == "model" else "torchfuse.models.builders.llama_clip"
    )
    model = {"_component_": component, **(named if where == "model" else {})}
    return {"model": model, "pretrained": named if where == "pretrained" else {}, "data": data}


@pytest.mark.parametrize("where", ["model", "pretrained"])
def test_what_the_model_determines_need_not_be_given(folders, model, where):
    made = make_transform(model, sections(folders, where))
    assert (made.layout, made.image_token, made.features_per_image) == ("placeholder", 37, PER_IMAGE)
    assert (made.max_seq_len, made.image_transform.std) == (53, [0.25, 0.5, 0.75])
    assert made.template.name == "plain"
    assert made.tokenizer.encode("w4") == [4]


def test_what_is_given_is_used(folders, model):
    grid = {"_component_": "torchfuse.data.GridImageTransform", "size": 12, "resolutions": [[12, 24]]}
    given = {"tokenizer": folders["words"], "image_transform": grid, "template": "vicuna"}
    made = make_transform(model, sections(folders, "model", **given, max_seq_len=31))
    assert isinstance(made.image_transform, GridImageTransform)
    assert (made.template.name, made.max_seq_len) == ("vicuna", 31)
    component = {"_component_": "torchfuse.data.questions.QuestionTransform", "image_token": 37}
    component |= {"tokenizer": folders["words"], "image_transform": folders["clip"]}
    component |= {"features_per_image": PER_IMAGE, "layout": "placeholder"}
    old = make_transform(model, {"transform": component})
    assert isinstance(old, QuestionTransform)
    assert old.prompt([Message("user", ["w4"])]) == [1, 4]


def test_a_number_that_is_not_the_models_is_refused(folders, model):
    with pytest.raises(
        ValueError, match=r"image_token is 7, and the model's is 37; features_per_image is 5"
    ):
        make_transform(model, sections(folders, "model", image_token=7, features_per_image=5))


def test_a_directory_that_nothing_names_is_asked_for(folders, model):
    with pytest.raises(ValueError, match=r"'data\.tokenizer': missing, and must be given where neither"):
        make_transform(model, sections(folders, ""))
    with pytest.raises(ValueError, match=r"'run, data\.image_transform': missing, and must be given"):
        make_transform(model, sections(folders, "", tokenizer=folders["words"]), where="run, ")


@pytest.mark.parametrize("length", ["4k", 0, 2.5, True])
def test_a_length_that_is_no_count_is_refused(folders, model, length):
    with pytest.raises(ConfigError, match=r"data\.max_seq_len=.*: expected an integer above 0"):
        make_transform(model, sections(folders, "model", max_seq_len=length))
