import json

import chats
import pytest
import torch
from chats import CHATML, IMAGE, SPECIAL, save
from support import tiny_decoder
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors
from torchtune.data import Message as TorchtuneMessage
from torchtune.datasets import PackedDataset
from torchtune.datasets._sft import SFTTransform
from transformers import AutoTokenizer, LlamaTokenizer

from torchfuse import fuse
from torchfuse.data.images import ImageTransform, TiledImageTransform
from torchfuse.data.questions import QuestionDataset, QuestionTransform
from torchfuse.data.samples import Media, Message, Sample
from torchfuse.data.tokenizer import TextTokenizer
from torchfuse.data.transform import SampleTransform
from torchfuse.errors import CheckpointError, ConfigError, DataError

BOS, EOS = SPECIAL.index("<bos>"), SPECIAL.index("<eos>")


def transform_for(folder, **options):
    given = {"image_token": IMAGE, "features_per_image": 1, "image_transform": ImageTransform(8)}
    return SampleTransform(folder, **given | options)


@pytest.fixture
def picture(tmp_path):
    return Media(chats.save_image(tmp_path / "a.png"))


def test_saved_truncation_and_padding_do_not_apply(tmp_path):
    """As in transformers, where a call asks for them."""
    tokenizer = chats.byte_level()
    expected = tokenizer.encode("Describe the image", add_special_tokens=False).ids
    save(tmp_path, tokenizer)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=29, pad_id=7)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(tokenizer.encode("Describe the image").ids) == 29
    assert TextTokenizer(tmp_path).encode("Describe the image") == expected
    assert AutoTokenizer.from_pretrained(tmp_path)("Describe the image")["input_ids"] == expected


def legacy():
    """A prefix by the normalizer, as of Llama 2: in front of each text between special tokens."""
    tokenizer = chats.metaspace()
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    return tokenizer


@pytest.mark.parametrize(
    "build",
    [chats.byte_level, chats.metaspace, lambda: chats.metaspace("always"), legacy],
    ids=["byte_level", "metaspace", "metaspace_always", "legacy"],
)
def test_texts_between_images_are_encoded_as_the_whole_text(tmp_path, build, picture):
    reference = save(tmp_path, build())
    if build is chats.metaspace:
        reference = LlamaTokenizer.from_pretrained(tmp_path)
    image = Message("user", ["Which animal", picture, "is this", picture, " two\n"])
    whole = "Which animal<image>is this<image> two\n"
    transform = transform_for(tmp_path)
    assert transform.template.name == "plain"
    assert transform.prompt([image]) == reference(whole)["input_ids"]
    later = [Message("user", ["cat"]), Message("assistant", ["seven"]), image]
    turn = transform.next_turn(later)
    if build is chats.metaspace:  # no prefix in the middle of a text
        assert turn == reference("cat<image>" + whole)["input_ids"][-len(turn) :]
    assert transform.prompt(later)[-len(turn) :] == turn


@pytest.mark.parametrize("option", [None, True, False])
@pytest.mark.parametrize("post_processor", [None, "none", "bos"])
def test_bos_is_where_transformers_puts_it(tmp_path, option, post_processor):
    tokenizer = chats.byte_level()
    if post_processor == "bos":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
        )
    save(tmp_path, tokenizer)
    if post_processor is None:
        content = json.loads((tmp_path / "tokenizer.json").read_text())
        (tmp_path / "tokenizer.json").write_text(json.dumps(content | {"post_processor": None}))
    file = tmp_path / "tokenizer_config.json"
    options = json.loads(file.read_text())
    file.write_text(json.dumps(options | ({} if option is None else {"add_bos_token": option})))
    ids = AutoTokenizer.from_pretrained(tmp_path)("cat")["input_ids"]
    expected = [BOS] if ids[0] == BOS else []
    cat = [*transform_for(tmp_path).tokenizer.encode("cat")]
    assert transform_for(tmp_path).prompt([Message("user", ["cat"])]) == expected + cat
    writes = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(writes + "{% generation %}{% endgeneration %}")
    assert transform_for(tmp_path).prompt([Message("user", ["cat"])]) == [BOS, *cat]
    (tmp_path / "processor_config.json").write_text("{}")
    assert transform_for(tmp_path).prompt([Message("user", ["cat"])]) == [BOS, *cat]


def test_a_tokenizer_without_a_model_names_its_ends(tmp_path):
    save(tmp_path, chats.byte_level())
    (tmp_path / "config.json").unlink()
    tokenizer = TextTokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (
        BOS,
        (EOS,),
        SPECIAL.index("<pad>"),
    )
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(
        CheckpointError, match="must configure eos_token_id, an id or a list of ids, got None"
    ):
        TextTokenizer(tmp_path)


@pytest.mark.parametrize("name", [*chats.TOKENIZERS])
def test_texts_that_spell_special_tokens(tmp_path, name, picture):
    save(tmp_path, chats.TOKENIZERS[name]())
    transform = transform_for(tmp_path)
    texts = ["<eos>", "a<image>b <image>", "</s><bos>"]
    for text in texts:
        ids = transform.tokenizer.encode(text)
        assert not {*range(len(SPECIAL))} & {*ids}
        assert transform.decode(ids).strip() == text
    sample = transform(Sample([Message("user", [texts[1], picture]), Message("assistant", [texts[0]])]))
    assert sample["tokens"].count(IMAGE) == 1
    assert sample["tokens"].count(EOS) == 1
    assert transform.decode([i for i in sample["labels"] if i != -100]).strip() == texts[0]


def test_special_tokens_keep_their_flags(tmp_path):
    """Such as those that take the whitespace beside them."""
    tokenizer = chats.byte_level()
    tokenizer.add_special_tokens([AddedToken("<|end|>", rstrip=True, lstrip=True)])
    ends = (
        "{% for m in messages %}{{ m.content }} <|end|>\n{% endfor %}{% generation %}{% endgeneration %}"
    )
    reference = save(tmp_path, tokenizer, ends)
    messages = [Message("user", ["two "]), Message("assistant", [" seven"])]
    expected = reference.apply_chat_template(chats.as_strings(messages), return_dict=False)
    assert transform_for(tmp_path).prompt(messages) == expected


def test_the_template_plain_is_that_of_questions(tmp_path, picture):
    save(tmp_path, chats.byte_level())
    messages = [Message("user", [picture, " which digit ?"]), Message("assistant", ["seven"])]
    options = {"image_token": IMAGE, "features_per_image": 2, "image_transform": ImageTransform(8)}
    options |= {"layout": "placeholder"}
    encode = TextTokenizer(tmp_path).encode
    expected = [IMAGE, IMAGE, *encode(" which digit ?"), *encode("seven"), EOS]
    of_question = QuestionTransform(tmp_path, **options)
    sample = Sample(messages)
    for transform in (of_question, SampleTransform(tmp_path, **options)):
        result = transform(sample)
        assert result["tokens"] == expected
        assert (
            result["labels"]
            == [-100] * (len(expected) - len(encode("seven")) - 1)
            + expected[-len(encode("seven")) - 1 :]
        )
        assert transform.length(sample) == len(expected)


def test_tiles_of_each_image(tmp_path, picture):
    save(tmp_path, chats.byte_level(), CHATML)
    wide = Media(chats.save_image(tmp_path / "wide.png", 16))
    chats.Image.new("RGB", (32, 8)).save(wide.path)
    images = TiledImageTransform(8, max_tiles=4)
    options = {"features_per_image": 3, "image_transform": images}
    sample = Sample([Message("user", [picture, "two", wide, "cat"]), Message("assistant", ["seven"])])
    for layout, marks in (("placeholder", 15), ("marker", 2), ("prefix", 0)):
        token = None if layout == "prefix" else IMAGE
        transform = transform_for(tmp_path, layout=layout, image_token=token, scope="all", **options)
        result = transform(sample)
        assert [each.num_items for each in result["images"]] == [1, 4]
        assert result["tokens"].count(IMAGE) == marks
        mask = result["encoder_mask"]
        assert mask.shape == (len(result["tokens"]), 15)
        seen = mask.sum(dim=1).unique().tolist()
        assert seen == ([15] if layout == "prefix" else [0, 3, 15])
        assert transform.length(sample) == len(result["tokens"]) + 15 * (layout == "prefix")


class Encoder(torch.nn.Module):
    num_tokens = 5

    def forward(self, images):
        return images.flatten(2)[..., :5].flatten(1).reshape(len(images), -1, 5)


ARCHITECTURES = {
    "marker": {"arch": "cross_attention", "every": 2, "fusion_vocab_size": 1},
    "placeholder": {"arch": "joint_decoder", "encoder_token": IMAGE},
    "prefix": {"arch": "joint_decoder"},
}


def model_for(layout, **options):
    decoder = tiny_decoder(max_seq_len=61, vocab_size=431)
    return fuse(decoder, Encoder(), encoder_dim=5, **ARCHITECTURES[layout] | options)


@pytest.mark.parametrize("layout", [*ARCHITECTURES])
def test_ids_features_and_lengths_are_the_models(tmp_path, layout, picture):
    save(tmp_path, chats.byte_level(), CHATML)
    model = model_for(layout)
    transform = SampleTransform.for_model(model, tmp_path, ImageTransform(8))
    expected = {
        "marker": model.tok_embeddings.vocab_size if layout == "marker" else 0,
        "placeholder": IMAGE,
        "prefix": None,
    }
    assert transform.image_token == expected[layout]
    assert (transform.layout, transform.features_per_image, transform.max_seq_len) == (layout, 5, 61)
    sample = [Message("user", [picture, "two"]), Message("assistant", ["seven " * 60])]
    with pytest.raises(
        DataError, match=r"b\.json, row 3 is \d+ tokens long with its answer, and max_seq_len is 61"
    ):
        transform(Sample(sample, origin="b.json, row 3"))
    with pytest.raises(DataError, match=r"b\.json, row 3 is \d+ tokens long"):
        transform.length(Sample(sample, origin="b.json, row 3"))


def test_options_that_do_not_fit_the_model_are_named(tmp_path):
    save(tmp_path, chats.byte_level())

    def make(name, fusion=None, **options):
        model = model_for(name, **(fusion or {}))
        return SampleTransform.for_model(model, tmp_path, ImageTransform(8), **options)

    with pytest.raises(
        ConfigError, match=f"image_token is 9, and the model's is {IMAGE}; features_per_image is 7, "
    ):
        make("placeholder", image_token=9, features_per_image=7)
    with pytest.raises(ConfigError, match="layout is 'marker', and the model's is 'prefix'"):
        make("prefix", layout="marker")
    with pytest.raises(
        ConfigError, match="the model has no token for images: fuse.*fusion_vocab_size=1"
    ):
        make("marker", {"fusion_vocab_size": 0})
    assert make("marker", {"fusion_vocab_size": 0}, image_token=IMAGE).image_token == IMAGE


@pytest.mark.parametrize("token", [SPECIAL.index("</s>") + 9, EOS, BOS])
def test_tokens_of_text_do_not_represent_images(tmp_path, token):
    save(tmp_path, chats.byte_level())
    with pytest.raises(ConfigError, match=f"image_token {token} is '.*' in .*, a token of text"):
        transform_for(tmp_path, image_token=token)


def test_torchtunes_calls(tmp_path, picture):
    """Those of its recipe ``generate``, of its datasets and of their packing."""
    save(tmp_path, chats.byte_level(), CHATML)
    transform, image = transform_for(tmp_path), chats.Image.open(picture.path)
    kick_off = [TorchtuneMessage("user", "two", masked=True), TorchtuneMessage("assistant", "")]
    expected = transform.prompt([Message("user", ["two"])])
    assert transform({"messages": kick_off}, inference=True)["tokens"] == expected
    parts = [{"type": "image", "content": image}, {"type": "text", "content": "two"}]
    messages = [
        TorchtuneMessage("user", parts, masked=True),
        TorchtuneMessage("assistant", "cat", masked=True),
        TorchtuneMessage("user", "two", masked=True),
        TorchtuneMessage("assistant", "seven"),
    ]
    row = SFTTransform(model_transform=transform)({"messages": messages})
    own = transform(
        Sample(
            [
                Message("user", [picture, "two"]),
                Message("assistant", ["cat"], 0),
                Message("user", ["two"]),
                Message("assistant", ["seven"]),
            ]
        )
    )
    assert row["tokens"] == own["tokens"]
    assert [*row["labels"]] == own["labels"]
    assert torch.equal(row["images"], own["images"])
    text = {"messages": [TorchtuneMessage("user", "two", masked=True), messages[-1]]}
    packed = PackedDataset([transform(text)] * 3, max_seq_len=61)
    assert len(packed) == 1 + (3 * len(transform(text)["tokens"]) > 61)
    with pytest.raises(
        DataError, match="Message 1: the role 'ipython' is none of system, user, assistant"
    ):
        transform({"messages": [TorchtuneMessage("ipython", "2")]}, inference=True)
    with pytest.raises(DataError, match="A sample must have messages, got text"):
        transform({"text": "two"})


def test_torchtunes_packing_of_questions_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"dataset\.packed=True: torchtune's recipes pack text only\. Set"
    ):
        QuestionDataset(None, tmp_path / "questions.jsonl", packed=True)
