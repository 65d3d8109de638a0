import chats
import pytest
from chats import IMAGE, TEMPLATES, UNTAGGED, as_strings, conversations, save

from torchfuse.data.images import ImageTransform
from torchfuse.data.samples import Sample
from torchfuse.data.transform import SampleTransform


def transform_for(folder, **options):
    given = {"image_token": IMAGE, "features_per_image": 1, "image_transform": ImageTransform(8)}
    return SampleTransform(folder, **given | options)


def encoded(transform, messages):
    return transform._encode(Sample(messages), [1] * len(Sample(messages).media))


@pytest.fixture(scope="module", params=[*chats.TOKENIZERS])
def tokenizer(request):
    return chats.TOKENIZERS[request.param]()


def check_conversations(tmp_path, tokenizer, name, number):
    reference = save(tmp_path, tokenizer, TEMPLATES[name])
    tagged = transform_for(tmp_path)
    save(tmp_path / "untagged", tokenizer, UNTAGGED[name])
    assert "generation %}" not in UNTAGGED[name]
    untagged = transform_for(tmp_path / "untagged")
    for messages in conversations(number):
        expected = reference.apply_chat_template(
            as_strings(messages), return_dict=True, return_assistant_tokens_mask=True
        )
        ids = expected["input_ids"]
        labels = [
            token if learned and token != IMAGE else -100
            for token, learned in zip(ids, expected["assistant_masks"], strict=True)
        ]
        assert encoded(tagged, messages) == {"tokens": ids, "labels": labels}, messages
        assert encoded(untagged, messages) == {"tokens": ids, "labels": labels}, messages
        prompt = reference.apply_chat_template(
            as_strings(messages[:-1]), add_generation_prompt=True, return_dict=False
        )
        assert tagged.prompt(messages[:-1]) == prompt


@pytest.mark.parametrize("name", [*TEMPLATES])
def test_tokens_and_learned_positions_are_those_of_transformers(tmp_path, tokenizer, name):
    check_conversations(tmp_path, tokenizer, name, 40)


@pytest.mark.long
@pytest.mark.parametrize("name", [*TEMPLATES])
def test_500_conversations(tmp_path, tokenizer, name):
    check_conversations(tmp_path, tokenizer, name, 500)
