"""A mistake of the caller is one error message with exit code 1, and nothing is written."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from programs import DIGITS, run_program
from torchfuse.recipes import evaluate, finetune, generate

from torchfuse.errors import ConfigError
from torchfuse.tasks.runs import build_model, load_run

MODEL = "model (torchfuse.models.builders.digits): "
# Configurations had a section of this kind before the model determined what is in it.
OLD_TRANSFORM = {
    "_component_": "torchfuse.data.questions.QuestionTransform",
    "tokenizer": "demo/llama",
    "image_transform": "demo/clip",
    "image_token": 40,
    "features_per_image": 5,
    "scope": "all",
}
TRANSFORM = "transform (torchfuse.data.questions.QuestionTransform): "


@pytest.fixture
def demo(digits, tmp_path, monkeypatch):
    """A copy of the demo folder that a test may damage."""
    shutil.copytree(digits, tmp_path / "demo", ignore=shutil.ignore_patterns("run_*"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "demo"


@pytest.fixture
def intact(digits, monkeypatch):
    """The demo folder itself, for tests that damage nothing."""
    monkeypatch.chdir(digits.parent)


def modification_times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def error_of(recipe, config, capsys, *overrides):
    """What a recipe writes to stderr: one error message and no traceback."""
    if any(override.startswith("transform.") for override in overrides):
        overrides = [f"transform={json.dumps(OLD_TRANSFORM)}", *overrides]
    before = modification_times(Path.cwd())
    with pytest.raises(SystemExit) as ended:
        run_program(recipe, Path.cwd(), "--config", DIGITS / config, *overrides)
    assert ended.value.code == 1
    assert modification_times(Path.cwd()) == before
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, lines
    assert "Traceback" not in "".join(lines)
    return "\n".join(lines)


def break_line(demo):
    file = demo / "questions" / "train.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:5], '{"question": ', *lines[5:]]))


def break_image(demo):
    first = json.loads((demo / "questions" / "test.jsonl").read_text().splitlines()[0])
    record = first | {"question": "<image> which digit ?", "images": ["../images/broken.png"]}
    (demo / "images" / "broken.png").write_bytes(b"\x89PNG but not really")
    (demo / "questions" / "test.jsonl").write_text(json.dumps(record))


def lengthen(name):
    """Append a question of 200 words to a file."""

    def damage(demo):
        record = {"question": "which " * 200, "answer": "one"}
        with (demo / "questions" / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    return damage


@pytest.mark.parametrize(
    ("override", "damage", "message"),
    [
        ("learning_rate=1e-3", None, "Configuration key 'learning_rate': "),
        ("train.rate=1e-3", None, "Configuration key 'train.rate': "),
        ("train.epochs=many", None, "Configuration key 'train.epochs': "),
        ("model.evry=2", None, "unknown option 'evry'"),
        ("transform.tokeniser=x", None, "unknown option 'tokeniser'; it takes tokenizer"),
        (
            "model._component_=torchfuse.models.builders.digit",
            None,
            "no component 'torchfuse.models.builders.digit'",
        ),
        (
            "model.fusion_vocab_size=0",
            None,
            "the model has no token for images: fuse(..., fusion_vocab_size=1) adds one",
        ),
        ("model.every=9", None, "every=9 fuses no layer of this decoder, which has 4"),
        (
            "pretrained.decoder=demo/images",
            None,
            "demo/images is not a checkpoint: it has no config.json",
        ),
        ("pretrained.encoder=demo/nowhere", None, "demo/nowhere holds no image processor"),
        ("pretrained.encoder=demo/llama", None, "demo/llama holds no image processor"),
        ("data.train=demo/nowhere.jsonl", None, "demo/nowhere.jsonl cannot be read"),
        ("seed=7", break_line, "questions/train.jsonl, line 6: no JSON ("),
        ("seed=7", break_image, "broken.png is no image that can be opened"),
        ("data.max_seq_len=null", lengthen("test"), "max_seq_len is 128"),
        (
            "train.batch_size=999",
            None,
            "64 samples (64 rows) are too few for one step of 1 x 999 x 1 rows",
        ),
        ("output_dir=demo/prompt.yaml/run", None, "is not a directory that can be written to"),
        ("model.fusion_trainable=false", None, "No parameter trains: set model.fusion_trainable=true"),
        ("train.lr={decoder: 1.0}", None, "lr must name the parts that train, fusion; unknown: decoder"),
    ],
)
def test_finetune(demo, capsys, override, damage, message):
    if damage:
        damage(demo)
    assert message in error_of(finetune, "cross_attention.yaml", capsys, override)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("train=5", "Configuration key 'train': expected a section with lr, "),
        ("data=x", "Configuration key 'data': expected a section with train, test, limit, tokenizer, "),
        (
            "pretrained=x",
            "Configuration key 'pretrained': expected a section with decoder, encoder, path, got 'x'",
        ),
        ("pretrained.decoder=null", "Configuration key 'pretrained.decoder': "),
        ("train.epochs=many sed=7", "Configuration key 'sed': unknown; there are output_dir, model, "),
        ("~output_dir", "Configuration key 'output_dir': missing, and must be given."),
        ("seed", "Override seed: expected key=value, or ~key to remove a key."),
        ("model.every={a", "Override model.every={a: while parsing a flow mapping"),
        ("~seed.x", "Override ~seed.x: "),
        ("model.every=two", f"{MODEL}every must be an integer or null, got 'two'."),
        ("model.every=1.5", f"{MODEL}every must be an integer or null, got 1.5."),
        ("model.num_layers=2", f"{MODEL}num_layers is fixed here at 4 and cannot be given, got 2."),
        ("model.vocab_size=41", f"{MODEL}vocab_size is fixed here at 40 and cannot be given, got 41."),
        ("model.decoder=x", f"{MODEL}decoder is fixed here and cannot be given, got 'x'."),
        ("model.feature_layer=x", f"{MODEL}feature_layer must be an integer, got 'x'."),
        (
            "model.decoder_trainable=maybe",
            f"{MODEL}decoder_trainable must be true or false, got 'maybe'.",
        ),
        ("model.on_missing=stop", f"{MODEL}on_missing must be 'skip' or 'participate', got 'stop'."),
        (
            "model.hidden_dim=x",
            "architecture 'cross_attention': hidden_dim must be an integer or null, got 'x'.",
        ),
        (
            "model.every=two model.keep_cls=5 model.num_heads=2",
            f"{MODEL}every must be an integer or null, got 'two'; keep_cls must be true or false, got 5; "
            "num_heads is fixed here at 4 and cannot be given, got 2.",
        ),
        (
            "model._component_=torchfuse.models.builders",
            "model (torchfuse.models.builders) must be a function or class with a known signature, got <module",
        ),
        (
            "model._component_=builtins.dict",
            "model (builtins.dict) must be a function or class with a known signature, got <class 'dict'>.",
        ),
        ("model=null", "model must name its _component_, a dotted path; got None."),
        (
            "transform.features_per_image=five",
            f"{TRANSFORM}features_per_image must be an integer, got 'five'.",
        ),
        ("transform.image_token=x", f"{TRANSFORM}image_token must be an integer or null, got 'x'."),
        ("transform.max_seq_len=x", f"{TRANSFORM}max_seq_len must be an integer or null, got 'x'."),
        ("transform.cache_images=many", f"{TRANSFORM}cache_images must be an integer, got 'many'."),
        ("pretrained.encoder=5", "pretrained: encoder must be a string, a path, a mapping "),
        ("pretrained.encoder=[demo/clip]", "or null, got ['demo/clip']."),
        (
            "model._component_=argparse.Namespace",
            "model (argparse.Namespace) must return a Module, got ",
        ),
        ("transform.tokenizer=5", f"{TRANSFORM}tokenizer must be a string or a path, got 5."),
        (
            "transform.image_transform=5",
            f"{TRANSFORM}image_transform must be a string, a path or ImageTransform, got 5.",
        ),
    ],
)
def test_values_that_do_not_fit(intact, capsys, overrides, message):
    assert message in error_of(finetune, "cross_attention.yaml", capsys, *overrides.split())


@pytest.mark.parametrize("recipe", [finetune, generate, evaluate])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [1\n", "mine.yaml is no YAML: while parsing a flow sequence "),
        ("seed: 1\nseed: 2\n", "mine.yaml is no YAML: while constructing a mapping "),
        (
            "- seed\n",
            "mine.yaml must hold keys with values, got a list: --config takes the YAML of a recipe.",
        ),
        ("7: 1\n", "mine.yaml: a key must be a string, got 7."),
        ("config: x\n", "Configuration key 'config': unknown; there are "),
        ("", ": missing, and must be given."),
    ],
)
def test_files_that_are_no_configuration(intact, tmp_path, capsys, recipe, text, message):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    error = error_of(recipe, file, capsys)
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        (
            "pretrained",
            {"decodr": "x"},
            "pretrained: unknown option 'decodr'; it takes path, decoder, encoder, device.",
        ),
        ("pretrained", {"encoder": 5}, r"pretrained: encoder must be a string, .*, got 5\."),
        (
            "pretrained",
            {"encoder": ["demo/clip"]},
            r"pretrained: encoder must be .*, got \['demo/clip'\]\.",
        ),
        ("pretrained", {"encoder": {"a": 5}}, r"pretrained: encoder must be .*, got \{'a': 5\}\."),
        (
            "model",
            {"every": "two"},
            r"model \(.*digits\): every must be an integer or null, got 'two'\.",
        ),
        (
            "model",
            {"_component_": "argparse.Namespace"},
            r"model \(argparse\.Namespace\) must return a Module, got a Namespace\.",
        ),
        (
            "transform",
            {"tokenizer": 5},
            r"transform \(.*\): tokenizer must be a string or a path, got 5\.",
        ),
        (
            "transform",
            {"_component_": "argparse.Namespace"},
            r"transform \(argparse\.Namespace\) must return a SampleTransform, got a Namespace\.",
        ),
    ],
    ids=str,
)
def test_a_run_whose_configuration_was_edited(intact, tmp_path, section, change, message):
    config = yaml.safe_load((DIGITS / "cross_attention.yaml").read_text())
    config.setdefault("transform", OLD_TRANSFORM) if section == "transform" else None
    config[section] = config[section] | change
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match=rf"^{tmp_path}/config\.yaml, {message}"):
        load_run(tmp_path, device="cpu", dtype="fp32")


@pytest.mark.parametrize("encoder", [5, ["demo/clip"], {"encoder": 5}], ids=str)
def test_an_encoder_that_is_no_path(intact, encoder):
    model = {"_component_": "torchfuse.models.builders.digits"}
    pretrained = {"decoder": "demo/llama", "encoder": encoder}
    with pytest.raises(
        ConfigError, match="^pretrained: encoder must be a string, a path, a mapping .*, got "
    ):
        build_model(model, pretrained, device="cpu", dtype="fp32")


def test_sizes_below_one(intact):
    sizes = dict.fromkeys(
        "vocab_size num_layers num_heads num_kv_heads embed_dim max_seq_len intermediate_dim "
        "image_size patch_size vision_embed_dim vision_num_layers vision_num_heads".split(),
        8,
    )
    model = {
        "_component_": "torchfuse.models.builders.llama_clip",
        **sizes,
        "num_heads": 0,
        "embed_dim": -3,
    }
    with pytest.raises(ConfigError, match=r"sizes must be at least 1, got num_heads=0, embed_dim=-3\.$"):
        build_model(model, {}, device="cpu", dtype="fp32")


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("- question: '<image> which digit ?'\n  images: [images/none.png]\n", "prompt 1: The image "),
        ("- question: '<image> which digit ?'\n", "prompt 1: the conversation has <image> 1 times"),
        ("- questin: 'x'\n", "prompt 1: unknown field questin"),
        ("question: x\n", "must hold a list of prompts"),
        ("[", "is no YAML"),
        (None, "prompts.yaml cannot be read"),
    ],
)
def test_generate_prompts(demo, capsys, prompts, message):
    if prompts is not None:
        (demo / "prompts.yaml").write_text(prompts)
    override = "prompts=demo/prompts.yaml"
    assert message in error_of(generate, "generate.yaml", capsys, override)


@pytest.mark.parametrize("recipe", [generate, evaluate])
def test_folders_that_are_no_run(demo, capsys, recipe):
    config = f"{recipe.__name__.split('.')[-1]}.yaml"
    error = error_of(recipe, config, capsys, "run=demo/nowhere")
    assert "demo/nowhere/config.yaml cannot be read (No such file or directory)" in error
    for text, message in (
        ("model: 3\n", " lacks the section model."),
        ("- model\n", " must hold keys with values, got a list: every finetuning run writes one."),
        ("model: {\n", " is no YAML: while parsing a flow "),
        ("model: {}\nmodel: {}\n", " is no YAML: while constructing a mapping "),
    ):
        (demo / "config.yaml").write_text(text)
        error = error_of(recipe, config, capsys, "run=demo")
        assert f"demo/config.yaml{message}" in error


def test_a_configuration_that_is_missing(demo, capsys):
    hint = "--config takes the YAML of a recipe."
    error = error_of(finetune, "nowhere.yaml", capsys)
    assert f"nowhere.yaml cannot be read (No such file or directory): {hint}" in error
    error = error_of(finetune, demo / "clip", capsys)
    assert f"demo/clip cannot be read (Is a directory): {hint}" in error
