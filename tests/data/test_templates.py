import copy
import json
import pickle
import random
import re
from itertools import pairwise

import chats
import pytest
from chats import (
    CHATML,
    IMAGE,
    LLAMA3,
    LLAVA,
    SPECIAL,
    TEMPLATES,
    UNTAGGED,
    VICUNA,
    as_strings,
    conversations,
    save,
)

from torchfuse.data.encoder_items import UNNAMED, Items
from torchfuse.data.images import ImageTransform
from torchfuse.data.samples import ROLES, Media, Message, Sample
from torchfuse.data.templates import ChatTemplate
from torchfuse.data.tokenizer.text import _any_of
from torchfuse.data.transform import SampleTransform
from torchfuse.errors import CheckpointError, ConfigError, DataError


def transform_for(folder, **options):
    given = {"image_token": IMAGE, "features_per_image": 1, "image_transform": ImageTransform(8)}
    return SampleTransform(folder, **given | options)


def encoded(transform, messages):
    return transform._encode(Sample(messages), [Items(UNNAMED, 1)] * len(Sample(messages).media))


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


SPELLED = [
    "<eos>",
    "a<|eot_id|>b",
    "<image> <|im_start|>",
    "<|im_end|>\n<|im_start|>assistant\n",
    "</s>",
]


@pytest.mark.parametrize("name", [*TEMPLATES])
def test_spelled_special_tokens_are_text(tmp_path, tokenizer, name):
    save(tmp_path, tokenizer, TEMPLATES[name])
    transform = transform_for(tmp_path)
    special = set(range(len(SPECIAL)))

    def structure(texts):
        turns = [Message(("user", "assistant")[i % 2], [text]) for i, text in enumerate(texts)]
        sample = encoded(transform, [Message("system", [texts[0]]), *turns])
        return [token for token in sample["tokens"] if token in special], sample

    plain, _ = structure(["word"] * 4)
    for spelled in SPELLED:
        tokens, sample = structure([spelled] * 4)
        assert tokens == plain
        learned = [label for label in sample["labels"] if label != -100]
        answers = transform.decode(learned), transform.decode(learned[learned.index(learned[-1]) + 1 :])
        # A token that begins before the answer is learned too.
        assert all(answer.strip().endswith(spelled.strip()) for answer in answers)


@pytest.mark.parametrize("name", [*TEMPLATES])
def test_pieces_of_special_tokens_never_become_one(tmp_path, tokenizer, name):
    save(tmp_path, tokenizer, TEMPLATES[name])
    transform, source = transform_for(tmp_path), random.Random(3)
    pieces = [*SPECIAL, *"< > </ <| |> im eos _start _end s> ima ge> eot_id a".split(), " ", "\ufdd0"]

    def special(*texts):
        roles = (*ROLES, *ROLES[1:])
        first, *others = (Message(role, [text]) for role, text in zip(roles, texts, strict=True))
        image = Message("user", ["<ima", Media(chats.Path("a.png")), "ge>"])
        tokens = encoded(transform, [first, image, *others])["tokens"]
        return [token for token in tokens if token < len(SPECIAL)]

    expected = special(*["a"] * 5)
    for _ in range(60):
        texts = ["".join(source.choices(pieces, k=source.randint(1, 7))) for _ in range(5)]
        assert special(*texts) == expected, texts


def test_the_longest_special_token_is_found_first():
    source = random.Random(5)
    for _ in range(200):
        texts = {"".join(source.choices("<|a.>", k=source.randint(1, 4))) for _ in range(7)}
        longest_first = "|".join(map(re.escape, sorted(texts, key=len, reverse=True)))
        given = "".join(source.choices("<|a.>b", k=40))
        assert re.findall(_any_of(texts), given) == re.findall(longest_first, given)


def test_a_text_of_several_parts_spells_no_special_token(tmp_path, tokenizer):
    save(tmp_path, tokenizer, CHATML)
    transform = transform_for(tmp_path)
    parts, whole = (
        encoded(transform, [Message("user", content), Message("assistant", ["seven"])])
        for content in (["<|im_", "end|>"], ["<|im_end|>"])
    )
    assert parts == whole


@pytest.mark.parametrize("name", ["llama3", "vicuna"])
def test_named_templates_are_those_of_models(tmp_path, tokenizer, name):
    reference = save(tmp_path, tokenizer, TEMPLATES[name], add_bos_token=False)
    reference.eos_token = "</s>"
    reference.save_pretrained(tmp_path)
    for messages in conversations(30):
        assert encoded(transform_for(tmp_path, template=name), messages) == encoded(
            transform_for(tmp_path), messages
        )


def test_chatml_adds_no_system_text(tmp_path, tokenizer):
    save(tmp_path, tokenizer, CHATML)
    for messages in conversations(30):
        given = [Message("system", ["You are a helpful assistant."])] * (messages[0].role == "user")
        named = encoded(transform_for(tmp_path, template="chatml"), given + messages)
        assert named == encoded(transform_for(tmp_path), messages)


@pytest.mark.parametrize("processor", [False, True])
def test_templates_of_image_models_write_images_themselves(tmp_path, processor):
    """A processor adds BOS where its template does not, a tokenizer leaves it to its template."""
    reference = save(tmp_path, chats.metaspace(), LLAVA)
    if processor:
        (tmp_path / "processor_config.json").write_text("{}")
    transform = transform_for(tmp_path)
    for messages in conversations(30):
        parts = [
            {
                "role": message.role,
                "content": [
                    {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
                    for part in message.content
                    if part != "" or len(message.content) == 1
                ],
            }
            for message in messages
        ]
        text = reference.apply_chat_template(parts, tokenize=False)
        ids = reference(text, add_special_tokens=processor)["input_ids"]
        assert encoded(transform, messages)["tokens"] == ids


def test_contents_that_a_template_tests(tmp_path):
    thoughts = CHATML.replace(
        "{{- message.content + '<|im_end|>' }}",
        "{{- message.content.split('</think>')[-1].lstrip('\n') + '<|im_end|>' }}",
    )
    reference = save(tmp_path, chats.byte_level(), thoughts)
    messages = [Message("user", ["two"]), Message("assistant", ["<think>a cat</think>\n\nseven"])]
    expected = reference.apply_chat_template(as_strings(messages), return_dict=False)
    assert encoded(transform_for(tmp_path), messages)["tokens"] == expected


def test_variables_that_a_template_tests(tmp_path):
    """As in Llama 3.1, which defines tools as none, and tests whether they are."""
    tools = (
        "{% if tools is not none %}{{ tools | tojson }}{% endif %}{% if documents %}x{% endif %}"
        + LLAMA3
    )
    reference = save(tmp_path, chats.byte_level(), tools)
    messages = [Message("user", ["two"]), Message("assistant", ["seven"])]
    expected = reference.apply_chat_template(as_strings(messages), return_dict=False)
    assert encoded(transform_for(tmp_path), messages)["tokens"] == expected


def test_control_tokens_that_are_not_listed_as_special(tmp_path):
    tokenizer = chats.byte_level()
    content = json.loads(tokenizer.to_str())
    content["added_tokens"][SPECIAL.index("<|im_start|>")]["special"] = False
    reference = save(tmp_path, chats.Tokenizer.from_str(json.dumps(content)), CHATML)
    transform, control = transform_for(tmp_path), SPECIAL.index("<|im_start|>")
    messages = [Message("user", ["<|im_start|>"]), Message("assistant", ["<|im_start|>"])]
    tokens = encoded(transform, messages)["tokens"]
    assert tokens.count(control) == 3 + 1  # a model may be trained to write it
    assert transform.decode([control]) == reference.decode([control]) == "<|im_start|>"


def test_weights_of_messages(tmp_path):
    save(tmp_path, chats.byte_level(), UNTAGGED["chatml"])
    transform = transform_for(tmp_path)
    turns = [Message("user", ["two"]), Message("assistant", ["seven"])]

    def weighted(first, second):
        last = [Message("user", ["and"]), Message("assistant", ["eight"], second)]
        return encoded(transform, [turns[0], Message("assistant", ["seven"], first), *last])

    both, last, none = weighted(1, 1), weighted(0, 1), weighted(0.5, 0)
    assert both["tokens"] == last["tokens"] == none["tokens"]
    first = [a if a != b else -100 for a, b in zip(both["labels"], last["labels"], strict=True)]
    assert transform.decode([label for label in first if label != -100]) == "seven"
    assert "loss_weights" not in both | last
    assert none["labels"] == first
    assert none["loss_weights"] == [0.5 * (label != -100) for label in first]
    with pytest.raises(
        DataError, match=r"b\.json, row 3 has nothing to learn: all its answers are empty"
    ):
        transform(Sample([turns[0], Message("assistant", ["seven"], 0)], origin="b.json, row 3"))


@pytest.mark.parametrize("name", [*TEMPLATES])
def test_later_turns_follow_what_caches_hold(tmp_path, tokenizer, name):
    save(tmp_path, tokenizer, TEMPLATES[name])
    transform, long = transform_for(tmp_path, layout="placeholder", features_per_image=3), 0
    for messages in conversations(30):
        asked = [i for i, message in enumerate(messages) if message.role == "user"]
        held = transform.prompt(messages[: asked[0] + 1])
        for question, following in pairwise(asked):
            known = encoded(transform, messages[: question + 2])
            held = known["tokens"][: last_learned(known)]
            turn = transform.next_turn(messages[: following + 1])
            assert held + turn == transform.prompt(messages[: following + 1])
            cut = transform.next_turn(messages[: following + 1], ended=False)
            assert cut == [held[-1], *turn]
            long += 1
    assert long > 10


def last_learned(sample):
    return max(i for i, label in enumerate(sample["labels"]) if label != -100) + 1


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (
            UNTAGGED["chatml"].split("{%- if add_generation_prompt")[0],
            "chat_template.jinja does not show which tokens are an answer: it has no {% generation %} block",
        ),
        (
            "{% for m in messages %}{{ m.role }}{% endfor %}",
            "does not write the text of a user's message",
        ),
        ("{% for m in messages %}{{ m.role }}", "is no Jinja template: Unexpected end of template"),
    ],
    ids=["no generation prompt", "no text", "no template"],
)
def test_templates_that_are_refused_at_the_start(tmp_path, template, problem):
    save(tmp_path, chats.byte_level(), template)
    with pytest.raises(ConfigError, match=re.escape(problem)):
        transform_for(tmp_path)


# Phi-3 writes an end of the text behind the last turn, others end no turn but the last.
ENDS = {
    "of the text": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}[{{ m.content + '<|im_end|>' }}]"
        "{{ '\n' }}{% endfor %}"
        "{{ '<|im_start|>assistant\n' if add_generation_prompt else eos_token }}"
    ),
    "of the last turn": (
        "{% for m in messages %}{{ '\\n' + m.role + ':' }}[{{ ' ' + m.content + "
        "(eos_token if loop.last and m.role == 'assistant' else '') }}]{% endfor %}"
        "{% if add_generation_prompt %}{{ '\\nassistant:' }}{% endif %}"
    ),
}


@pytest.mark.parametrize("end", [*ENDS])
def test_ends_that_are_not_those_of_every_turn(tmp_path, tokenizer, end):
    if_assistant = "{% if m.role == 'assistant' %}{% generation %}", "{% endgeneration %}{% else %}"
    answer = re.search(r"\[({{.*})\]", ENDS[end])[1]
    tagged = f"{if_assistant[0]}{answer}{if_assistant[1]}{answer}{{% endif %}}"
    reference = save(tmp_path / "tagged", tokenizer, ENDS[end].replace(f"[{answer}]", tagged))
    save(tmp_path, tokenizer, ENDS[end].replace(f"[{answer}]", answer))
    transform = transform_for(tmp_path)
    for messages in conversations(30):
        expected = reference.apply_chat_template(
            as_strings(messages), return_dict=True, return_assistant_tokens_mask=True
        )
        sample = encoded(transform, messages)
        assert sample["tokens"] == expected["input_ids"]
        assert [label != -100 for label in sample["labels"]] == [*map(bool, expected["assistant_masks"])]


def save_with(folder, tokenizer, template, flags):
    """Save a tokenizer with flags of some added tokens."""
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:
        token |= flags.get(token["content"], {})
    return save(folder, chats.Tokenizer.from_str(json.dumps(content)), template)


def test_a_header_that_strips_whitespace_is_not_learned(tmp_path, tokenizer):
    """Tokens of Phi-3 take the whitespace behind them."""
    template = UNTAGGED["chatml"].replace("<|im_start|>assistant", "<|start_header_id|>")
    save_with(tmp_path, tokenizer, template, {"<|start_header_id|>": {"rstrip": True}})
    transform = transform_for(tmp_path)
    header, end = SPECIAL.index("<|start_header_id|>"), SPECIAL.index("<|im_end|>")
    for answer in ("seven", "  seven", "\n\nseven", "", " "):
        messages = [Message("user", ["two"]), Message("assistant", [answer])]
        sample = encoded(transform, messages * 2)
        assert sample["tokens"].count(header) == 2
        assert sample["labels"].count(header) == 0
        assert sample["labels"].count(end) == 2


@pytest.mark.parametrize("flag", ["single_word", "normalized"])
def test_special_tokens_are_found_whatever_their_flags(tmp_path, tokenizer, flag):
    tokenizer.normalizer = chats.normalizers.Prepend("_")
    save_with(tmp_path, tokenizer, LLAMA3, {token: {flag: True} for token in SPECIAL})
    messages = [Message("user", ["two"]), Message("assistant", ["a<|eot_id|>"])]
    sample = encoded(transform_for(tmp_path), messages)
    header = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    special = [SPECIAL[token] for token in sample["tokens"] if token < len(SPECIAL)]
    assert special == ["<bos>", *header, *header]


def test_an_image_in_a_template_that_writes_other_text_with_images(tmp_path):
    """As in Llama 3.2, whose system message is left out of conversations with images."""
    template = (
        "{% set ns = namespace(images=false) %}{% for m in messages %}{% for c in m.content %}"
        "{% if c.type == 'image' %}{% set ns.images = true %}{% endif %}{% endfor %}{% endfor %}"
        "{% if not ns.images %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.content is string %}"
        "{{ m.content }}{% else %}{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }}"
        "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    reference = save(tmp_path, chats.byte_level(), template)
    for media in ([], [Media(chats.Path("a.png"))]):
        messages = [Message("user", [*media, "two"]), Message("assistant", ["seven"])]
        parts = [*({"type": "image"} for _ in media), {"type": "text", "text": "two"}]
        given = [{"role": "user", "content": parts}, {"role": "assistant", "content": "seven"}]
        expected = reference.apply_chat_template(given, return_dict=False)
        assert encoded(transform_for(tmp_path), messages)["tokens"] == expected


def test_a_block_that_goes_on_after_the_end_of_a_turn(tmp_path):
    """As in SmolLM3: whitespace behind the token that stops generation is not generated."""
    block = "{{- message.content + '<|im_end|>\n' }}\n        {%- endgeneration %}"
    template = re.sub(
        r"\{\{- message.content \+ '<\|im_end\|>' }}\s*{%- endgeneration %}\s*{{- '\\n' }}",
        lambda _: block,
        CHATML,
    )
    assert block in template
    save(tmp_path, chats.byte_level(), template)
    transform, end = transform_for(tmp_path), SPECIAL.index("<|im_end|>")
    assert transform.stop_tokens[0] == end
    turns = [Message("user", ["two"]), Message("assistant", ["seven"]), Message("user", ["and"])]
    known = encoded(transform, turns[:2])["tokens"]
    held = known[: len(known) - known[::-1].index(end)]
    assert held + transform.next_turn(turns) == transform.prompt(turns)


def test_earlier_turns_that_change(tmp_path):
    """As in Qwen3, which leaves thoughts out of all answers but the last."""
    changing = (
        "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}{{ m.content if loop.last or m.role == 'user' "
        "else 'older' }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% endif %}"
    )
    save(tmp_path, chats.byte_level(), changing)
    transform = transform_for(tmp_path)
    turns = [Message("user", ["two"]), Message("assistant", ["seven"])]
    assert encoded(transform, turns)
    with pytest.raises(ConfigError, match=r"row 5: .* writes messages otherwise once others follow"):
        transform(Sample(turns * 2, origin="row 5"))
    with pytest.raises(ConfigError, match="writes earlier turns otherwise once another follows"):
        transform.next_turn([*turns, turns[0]])


def test_conversations_that_a_template_refuses(tmp_path):
    strict = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('no system text') }}{% endif %}" + LLAMA3
    )
    save(tmp_path, chats.byte_level(), strict)
    sample = Sample(
        [Message("system", ["two"]), Message("user", ["a"]), Message("assistant", ["a"])], origin="row 5"
    )
    with pytest.raises(
        DataError, match="row 5: the template .* refuses the conversation: no system text"
    ):
        transform_for(tmp_path)(sample)


def test_sources_of_templates(tmp_path):
    (tmp_path / "own.jinja").write_text(
        "{{ '[' + messages[0].content }}{{ ']' if add_generation_prompt }}"
    )
    save(tmp_path, chats.byte_level(), LLAMA3)
    assert ChatTemplate.load(None, tmp_path).source == LLAMA3
    assert ChatTemplate.load("vicuna", tmp_path).name == "vicuna"
    (tmp_path / "chat_template.jinja").unlink()
    assert ChatTemplate.load(None, tmp_path).name == "plain"
    options = json.loads((tmp_path / "tokenizer_config.json").read_text())
    several = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": LLAMA3}]
    for given in (CHATML, several):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(options | {"chat_template": given}))
        assert ChatTemplate.load(None, tmp_path).source == CHATML
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": VICUNA}))
    assert ChatTemplate.load(None, tmp_path).source == VICUNA  # the processor's
    (tmp_path / "chat_template.json").unlink()
    for given, error, problem in (
        (several[1:], ConfigError, "chat_template has templates of the names tool_use, and none is"),
        ([CHATML], ConfigError, "names None, and none is the default"),
        (7, CheckpointError, "chat_template must be a template, or a list of named ones, got 7"),
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(options | {"chat_template": given}))
        with pytest.raises(error, match=problem):
            ChatTemplate.load(None, tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text(CHATML)
    with pytest.raises(ConfigError, match="additional_chat_templates has templates of the names rag"):
        ChatTemplate.load(None, tmp_path)
    with pytest.raises(
        ConfigError, match="template must be one of chatml, llama3, plain, vicuna, or a .jinja"
    ):
        ChatTemplate.load("vikuna", tmp_path)


def test_a_transform_is_copied_and_pickled(tmp_path):
    save(tmp_path, chats.metaspace(), CHATML)
    chats.save_image(tmp_path / "a.png")
    transform = transform_for(tmp_path, cache_images=3)
    sample = Sample(
        [Message("user", [Media(tmp_path / "a.png"), "<eos>"]), Message("assistant", ["seven"])]
    )
    expected = transform(sample)
    for other in (pickle.loads(pickle.dumps(transform)), copy.deepcopy(transform)):
        assert other(sample)["labels"] == expected["labels"]
        assert other._cache is not transform._cache
