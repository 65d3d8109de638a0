"""The generate recipe on tiny models: prompts, answers, files, chat, and what is refused before a model is loaded."""

import io
import json
import re
import shutil
import sys
from pathlib import Path

import hf
import pytest
import torch
import yaml
from prompt_settings import images, tokenizer
from support import open_gates
from torchfuse.recipes import generate

from torchfuse import load_pretrained
from torchfuse.checkpoint.artifact.trained import save_trained
from torchfuse.data import read_samples
from torchfuse.data.images import ImageTransform
from torchfuse.data.templates import text_template
from torchfuse.generation.sampling import Sampling
from torchfuse.tasks import runs
from torchfuse.tasks.conversation import Conversation
from torchfuse.tasks.prompt_settings import PromptSettings
from torchfuse.tasks.prompts import user_message

TRANSFORM = {
    "_component_": "torchfuse.data.questions.QuestionTransform",
    "tokenizer": "words",
    "image_transform": "processor",
    "image_token": 37,
    "features_per_image": 9,
}
PROMPTS = [
    {"question": "w4 <image> w5 <image>", "images": ["images/a.png", "images/b.png"]},
    {
        "system": "w6 w7",
        "turns": [
            {"question": "w4 <image>", "images": ["images/a.png"]},
            {"question": "w8"},
            {"question": "w9 <image>", "images": ["images/c.png"]},
        ],
    },
    {"question": "w10 w11"},
]
ROWS = [
    {"question": "w4 <image> w5 <image>", "images": ["images/a.png", "images/b.png"]},
    {"question": "w10 w11 w12", "kind": "text"},
    {"question": "<image> w4", "images": ["images/c.png"], "answer": "w5"},
    {"question": "w6"},
    {"question": "w7 <image>", "images": ["images/a.png"]},
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder with a finetuning run, checkpoints of whole models, images and prompts."""
    folder = tmp_path_factory.mktemp("generate")
    (folder / "images").mkdir()
    images(folder / "images", 12)
    tokenizer(folder / "words")
    tokenizer(folder / "llava_words", special=["w35", "w36"])
    llama = hf.llama(folder / "llama")
    with torch.no_grad():  # special tokens are never the likeliest, so that answers are words alone
        llama.lm_head.weight[:4] = llama.lm_head.weight[4:].mean(dim=0)
    llama.save_pretrained(folder / "llama")
    hf.clip_tower(folder / "clip")
    hf.llava(folder / "llava")
    hf.mllama(folder / "mllama")
    (folder / "processor").mkdir()
    shape = {"height": 12, "width": 12}
    image_transform = ImageTransform(12)
    settings = {"crop_size": shape, "size": shape}
    settings |= {"image_mean": image_transform.mean, "image_std": image_transform.std}
    (folder / "processor" / "preprocessor_config.json").write_text(json.dumps(settings))
    torch.manual_seed(3)
    model = open_gates(hf.fused_model(fusion_vocab_size=1))
    load_pretrained(model, decoder=folder / "llama", encoder=folder / "clip")
    with torch.no_grad():
        for parameter in model.adapter.parameters():
            parameter.mul_(30)
    save_trained(model, folder / "run" / "fusion")
    config = {
        "model": {
            "_component_": "torchfuse.models.builders.llama_clip",
            **hf.FUSED,
            "fusion_vocab_size": 1,
        },
        "pretrained": {"decoder": "llama", "encoder": "clip"},
        "transform": TRANSFORM,
    }
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "prompts.yaml").write_text(yaml.safe_dump(PROMPTS))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


@pytest.fixture
def folder(checkpoints, monkeypatch):
    monkeypatch.chdir(checkpoints)
    yield checkpoints
    for path in checkpoints.glob("answers*"):
        path.unlink()


@pytest.fixture
def start(folder, monkeypatch, capsys):
    def start(*flags, typed=None, **config):
        given = {"run": "run", "prompts": "prompts.yaml", "sampling": {"max_new_tokens": 5}} | config
        given = {key: value for key, value in given.items() if value is not None}
        (folder / "config.yaml").write_text(yaml.safe_dump(given))
        monkeypatch.setattr(sys, "argv", ["generate", "--config", "config.yaml", *flags])
        monkeypatch.setattr(sys, "path", [*sys.path])
        if typed is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        generate.main()
        return capsys.readouterr().out

    return start


@pytest.fixture
def refused(start, capsys, monkeypatch):
    """The error message of a run that ends with exit code 1, unless ``load`` before a model is loaded."""

    def never(*_, **__):
        pytest.fail("a model was loaded")

    def refused(*flags, load=False, **config):
        if not load:
            monkeypatch.setattr(runs, "build_model", never)
            monkeypatch.setattr(runs, "from_pretrained", never)
        with pytest.raises(SystemExit, match="^1$"):
            start(*flags, **config)
        printed = capsys.readouterr()
        assert "tokens for" not in printed.out
        assert printed.err.startswith("error: ")
        return printed.err

    return refused


def records(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def questions_and_answers(printed):
    return re.findall(r"^(w?\S.*?)(?:  \[.*\])?\n    (.*)$", printed, re.MULTILINE)


def expected(prompts, **options):
    """The answers of ``Conversation``, prompt by prompt."""
    model, transform = runs.load_run("run", device="cpu", dtype="fp32")
    given = {"max_new_tokens": 5, "sampling": Sampling(temperature=0)} | options
    settings = PromptSettings(transform, **given)
    answers = []
    with Conversation(model.eval(), settings, max_tokens=61, max_images=3) as conversation:
        for index, prompt in enumerate(prompts):
            conversation.reset(prompt.get("system"), index=index)
            turns = prompt.get("turns", [prompt])
            questions = [user_message(turn["question"], turn.get("images", ())) for turn in turns]
            answers.append([conversation.ask(question) for question in questions])
    return answers


def test_prompts_are_answered_as_they_appear_and_written(folder, start):
    printed = start(output="answers.jsonl")
    answers = expected(PROMPTS)
    written = records("answers.jsonl")
    assert written == [
        {**PROMPTS[0], "answer": answers[0][0]},
        {
            "system": "w6 w7",
            "turns": [
                {"question": turn["question"], "images": turn.get("images", []), "answer": answer}
                for turn, answer in zip(PROMPTS[1]["turns"], answers[1], strict=True)
            ],
        },
        {"question": "w10 w11", "images": [], "answer": answers[2][0]},
    ]
    flat = [answer for prompt in answers for answer in prompt]
    assert [answer for _, answer in questions_and_answers(printed)] == flat
    assert len(set(flat)) > 1
    assert "w4 <image> w5 <image>  [a.png, b.png]\n    " in printed
    assert "\nw6 w7\nw4 <image>  [a.png]\n" in printed
    assert "wrote 3 answers to answers.jsonl" in printed
    assert re.search(
        r"\n\d+ tokens for 5 prompts in \d+\.\d\d s on cpu\n  images:    4 encoded in", printed
    )
    for phase in ("prefill", "decoding", "memory"):
        assert f"\n  {phase}: " in printed


def test_answers_are_streamed_token_by_token(start, monkeypatch):
    pieces = []
    monkeypatch.setattr(generate, "_print_piece", pieces.append)
    start(prompts="prompts.yaml", output="answers.jsonl")
    answers = [a for record in records("answers.jsonl") for a in record.get("turns", [record])]
    assert "".join(pieces) == "".join(answer["answer"] for answer in answers)
    assert len(pieces) == sum(len(answer["answer"].split()) for answer in answers)


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_a_file_of_questions_in_batches(folder, start, temperature):
    sampling = {"max_new_tokens": 7, "temperature": temperature, "top_k": 23}
    (folder / "elsewhere").mkdir(exist_ok=True)
    for size in (1, 2, 50):
        options = {"prompts": "rows.jsonl", "batch_size": size, "sampling": sampling, "seed": 3}
        printed = start(output=f"elsewhere/answers{size}.jsonl", **options)
        assert "tokens for 5 prompts in" in printed
        assert "    w" not in printed  # batches do not stream
    one = records("elsewhere/answers1.jsonl")
    assert one == records("elsewhere/answers2.jsonl") == records("elsewhere/answers50.jsonl")
    chosen = {"sampling": Sampling(temperature, 23), "max_new_tokens": 7, "seed": 3}
    assert [[record["answer"]] for record in one] == expected(ROWS, **chosen)
    assert [record["question"] for record in one] == [row["question"] for row in ROWS]
    assert [set(record) for record in one] == [{"question", "images", "answer"}] * 5
    again = read_samples("elsewhere/answers1.jsonl")  # it is a file of samples itself
    assert [len(each.images) for each in again] == [2, 0, 1, 0, 1]


def test_any_file_of_samples(folder, start):
    """The conversation up to its last answer is the prompt, as in one that is generated turn by turn."""
    image = folder / "images" / "a.png"
    turns = PROMPTS[1]["turns"][:2]
    [answers] = expected([{"system": "w6 w7", "turns": turns}])
    given = [{"role": "system", "content": "w6 w7"}]
    given.append({"role": "user", "content": turns[0]["question"]})
    given.append({"role": "assistant", "content": answers[0]})
    given.append({"role": "user", "content": turns[1]["question"]})
    record = {"messages": [*given, {"role": "assistant", "content": "w5"}], "images": ["a.png"]}
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table.from_pylist(
        [record | {"images": [{"bytes": image.read_bytes(), "path": "a.png"}]}]
    )
    parquet.write_table(table, folder / "answers_p.parquet")
    (folder / "answers_p.json").write_text(json.dumps([record]))
    for file, name in (("answers_p.json", "images/a.png"), ("answers_p.parquet", "a.png")):
        start(prompts=file, image_root="images", output="answers.jsonl")
        assert records("answers.jsonl") == [
            {"question": "w8", "images": [name], "messages": given, "answer": answers[1]}
        ]


def test_a_batch_without_output_is_printed_in_order(start):
    printed = start(prompts="rows.jsonl", batch_size=2)
    assert [question for question, _ in questions_and_answers(printed)] == [
        row["question"] for row in ROWS
    ]
    assert [[answer] for _, answer in questions_and_answers(printed)] == expected(ROWS)


@pytest.mark.parametrize(
    ("flags", "config"), [(["--chat"], {}), ([], {"chat": True, "prompts": None})], ids=["flag", "key"]
)
def test_chat(start, flags, config):
    typed = "/image images/a.png\nw4 <image>\nw8\n/image images/none.png\n/reset\nw10 w11\n/quit\nw4\n"
    printed = start(*flags, typed=typed, **config)
    lines = printed.splitlines()
    answers = expected(
        [{"turns": [{"question": "w4 <image>", "images": ["images/a.png"]}, {"question": "w8"}]}]
    )
    assert lines[0] == generate.HELP
    assert lines[1] == "[a.png comes with the next question]"
    assert lines[2:4] == answers[0]
    assert "[The image images/none.png cannot be opened" in lines[4]
    assert lines[5:7] == ["[a new conversation]", expected([PROMPTS[2]])[0][0]]
    assert " tokens for 3 prompts in" in lines[8]
    assert "1 encoded in" in lines[9]


def test_chat_ends_with_its_input_and_reports_turns_that_do_not_fit(start):
    typed = f"{'w4 ' * 12}\n{'w5 ' * 12}\nw8\n"
    printed = start("--chat", typed=typed, max_tokens=24).splitlines()
    assert "[This turn does not fit any more: 13 tokens and an answer of up to 5" in printed[2]
    turns = [{"question": ("w4 " * 12).strip()}, {"question": "w8"}]
    assert [printed[1], printed[3]] == expected([{"turns": turns}])[0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"run": None}, "Configuration key 'run' (or 'model'): missing, and must be given."),
        ({"model": "llava"}, "give run=run or model=llava, not both"),
        ({"transform": TRANSFORM}, "give transform with model only; a run has its own"),
        ({"run": None, "model": "none", "transform": TRANSFORM}, "model: none is not a directory"),
        ({"run": "none"}, "none/config.yaml cannot be read"),
        ({"prompts": None}, "give prompts, a YAML file or a file of samples, or --chat"),
        ({"chat": True, "output": "answers.jsonl"}, "output is for prompts, not for a chat"),
        ({"batch_size": 0, "max_images": -1}, "batch_size=0 must be at least 1; max_images=-1 must be"),
        ({"sampling": {"top_p": 1.5}}, "sampling.top_p must lie in (0, 1], got 1.5"),
        ({"sampling": {"temperature": -1.0, "top_k": 0}}, "got -1.0; sampling.top_k must be at least 1"),
        (
            {"sampling": {"repetition_penalty": 0}},
            "sampling.repetition_penalty must be above 0, got 0.0",
        ),
        ({"sampling": {"max_new_tokens": 0}}, "sampling.max_new_tokens=0 must be at least 1"),
        ({"sampling": {"stop_tokens": [3, -5]}}, "sampling.stop_tokens [-5] are no ids"),
        ({"sampling": {"stop_tokens": ["x"]}}, "Configuration key 'sampling.stop_tokens'"),
        (
            {"template": {"questio": "{text}"}},
            "template: unknown option 'questio'; it takes system, que",
        ),
        ({"template": "alpaca"}, "template must be one of chatml, llama3, plain, vicuna, or a .jinja"),
        ({"template": {"question": "USER:"}}, "template.question must hold {text} once and no <image>"),
        ({"quantization": "int3"}, "quantization must be null or one of int8_weight_only, int8_dynamic"),
        ({"quantization_parts": ["adapter"]}, "quantization_parts must be decoder, encoder or"),
        ({"device": "toaster"}, "device 'toaster' is not a device"),
        ({"dtype": "fp16"}, "dtype must be one of fp32, bf16, got 'fp16'"),
        ({"output": "none/answers.jsonl"}, "output=none/answers.jsonl must be a file in a directory"),
        ({"output": "images"}, "output=images must be a file in a directory"),
        ({"output": "prompts.yaml"}, "output=prompts.yaml is the file of the prompts"),
        ({"prompts": "none.yaml"}, "none.yaml cannot be read"),
        ({"prompts": "none.jsonl"}, "none.jsonl cannot be read"),
        ({"streaming": True}, "Configuration key 'streaming': unknown"),
    ],
    ids=str,
)
def test_configurations_that_are_refused_before_a_model_is_loaded(refused, config, message):
    assert message in refused(**config)


def test_all_problems_of_a_configuration_are_one_error(refused):
    error = refused(batch_size=0, quantization="int3", output="images", sampling={"top_k": 0})
    assert len(error.splitlines()) == 1
    for part in ("batch_size=0", "got 'int3'", "output=images", "sampling.top_k"):
        assert part in error


def test_an_unknown_flag_is_refused(refused):
    assert "Override --chatty" in refused("--chatty")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.yaml", "- question: <image>\n  images: [images/none.png]\n", "prompt 1: The image "),
        ("p.yaml", "- {turns: [{question: w4}], sytem: w5}\n", "prompt 1: unknown key sytem"),
        ("p.yaml", f"- question: {'w4 ' * 99}\n- question: w4\n", None),
        ("p.jsonl", '{"question": "w4"}\n{"quest": "w4"}\n{"question": \n', "p.jsonl has 2 problems:"),
        (
            "p.jsonl",
            '{"question": "<image> w4"}\n',
            "p.jsonl, line 1: the conversation has <image> 1 times",
        ),
    ],
    ids=["image", "key", "length", "lines", "marker"],
)
def test_problems_of_prompts_leave_the_output_as_it_was(folder, refused, name, text, message):
    (folder / name).write_text(text)
    (folder / "answers.jsonl").write_text("mine")
    error = refused(load=message is None, prompts=name, output="answers.jsonl")
    message = message or "w4 w4 w is 100 tokens long, and max_seq_len is 61."
    assert message in error
    assert (folder / "answers.jsonl").read_text() == "mine"


def test_a_conversation_that_does_not_fit_is_an_error_before_anything_is_generated(
    folder, refused, monkeypatch
):
    monkeypatch.setattr(Conversation, "ask", lambda *_, **__: pytest.fail("a question was asked"))
    turns = [{"question": "w4 " * 11, "images": ["images/a.png"]}] * 4
    (folder / "p.yaml").write_text(yaml.safe_dump([PROMPTS[0], {"turns": turns}]))
    error = refused(load=True, prompts="p.yaml")
    # begin, four markers, 44 words and the end of three answers; four answers of five tokens
    assert "prompt 2: 52 tokens in 4 turns, and an answer of up to 5 to each are 72, and 61 fit" in error


def test_stop_tokens_outside_the_vocabulary_are_refused(refused):
    error = refused(load=True, sampling={"stop_tokens": [40]})
    assert "stop_tokens [40] must lie in [0, 37), what the head scores" in error


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            ["decoder", "encoder.none"],
            "quantize: no part 'encoder.none'; the model has decoder, encoder",
        ),
        (["encoder"], "encoder has no layer that nf4 can quantize"),
    ],
    ids=["part", "shapes"],
)
def test_parts_that_cannot_be_quantized_are_an_error_of_the_configuration(refused, parts, message):
    error = refused(load=True, quantization="nf4", quantization_parts=parts)
    assert "error: quantization=nf4: " in error
    assert message in error


def test_a_transform_of_another_model_is_refused(refused):
    wrong = TRANSFORM | {"features_per_image": 10, "image_token": 35, "tokenizer": "llava_words"}
    error = refused(load=True, run=None, model="llava", transform=wrong)
    assert "image_token must" not in error
    assert "in this model features replace (36,)" in error
    assert "features_per_image is 10, but 'encoder' makes 9 of an image" in error


def test_quantized(start):
    printed = start(quantization="int8_weight_only")
    assert len(questions_and_answers(printed)) == 5
    (before, after, number) = re.search(
        r"only: ([\d,]+) bytes before, ([\d,]+) after; .*ed: (\d+),", printed
    ).groups()
    assert int(number) == 3 * 7 + 1  # seven matrices a layer, and the head
    assert int(after.replace(",", "")) < 0.4 * int(before.replace(",", ""))
    both = start(quantization="int8_weight_only", quantization_parts=["decoder", "encoder"])
    assert int(re.search(r"weights quantized: (\d+),", both).group(1)) > 22


TEMPLATE = (
    "{% for message in messages %}{{ 'w20 ' + message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ ' w21 ' }}{% endfor %}"
    "{% if add_generation_prompt %}w20 {% endif %}"
)


def test_a_template_of_the_directory_a_file_or_two_texts(folder, start):
    """A directory with tokenizer, processor and template needs no transform."""
    whole = folder / "whole"
    shutil.copytree(folder / "llava", whole, dirs_exist_ok=True)
    shutil.copy(folder / "processor" / "preprocessor_config.json", whole)
    config = json.loads((whole / "config.json").read_text())
    tokenizer(whole, special=["w36"])
    (whole / "config.json").write_text(json.dumps(config | {"bos_token_id": 1, "eos_token_id": 2}))
    (whole / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "t.jinja").write_text(TEMPLATE)
    answers = []
    for template in (None, "t.jinja", {"question": "w20 {text} w21 w20 "}, "plain"):
        start(run=None, model="whole", prompts="rows.jsonl", output="answers.jsonl", template=template)
        answers.append([record["answer"] for record in records("answers.jsonl")])
    assert answers[0] == answers[1] != answers[3]
    _, made = runs.read_model("whole")("cpu", "fp32")
    rows = list(read_samples("rows.jsonl"))
    assert made.prompt(rows[3].messages) == [20, 6, 21, 20]
    texts = text_template(question="w20 {text} w21 w20 ")
    assert made.with_template(texts).prompt(rows[3].messages) == [1, 20, 6, 21, 20]
    _, named = runs.read_model("whole", {"template": "plain", "max_seq_len": 11})("cpu", "fp32")
    assert (named.template.name, named.max_seq_len, named.image_token) == ("plain", 11, 36)


def test_llava_answers_equal_those_of_transformers(folder, start):
    transformers = pytest.importorskip("transformers")
    words = {"tokenizer": "llava_words", "image_token": 36}
    transform = TRANSFORM | words | {"layout": "placeholder"}
    options = {"run": None, "model": "llava", "transform": transform}
    start(**options, prompts="rows.jsonl", output="answers.jsonl", batch_size=3)
    reference = transformers.LlavaForConditionalGeneration.from_pretrained("llava").eval()
    answers = [record["answer"] for record in records("answers.jsonl")]
    _, made = runs.read_model("llava", transform)("cpu", "fp32")
    for each, answer in zip(read_samples("rows.jsonl"), answers, strict=True):
        sample = made(each, with_answer=False)
        tokens = torch.tensor([sample["tokens"]])
        pixels = {"pixel_values": sample["images"]} if len(sample["images"]) else {}
        got = reference.generate(
            input_ids=tokens, **pixels, max_new_tokens=5, do_sample=False, eos_token_id=2, pad_token_id=0,
            suppress_tokens=[36],
        )  # fmt: skip
        assert answer == made.decode(got[0, tokens.shape[1] :].tolist())


def test_mllama_answers_equal_those_of_transformers_with_each_image_as_one_tile(
    folder, start, monkeypatch
):
    transformers = pytest.importorskip("transformers")
    transform = TRANSFORM | {"features_per_image": 10, "scope": "group"}
    rows = [{"question": "<image> w4 w5", "images": ["images/a.png"]}, {"question": "w6 w7"}]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    start(run=None, model="mllama", transform=transform, prompts="p.jsonl", output="answers.jsonl")
    reference = transformers.MllamaForConditionalGeneration.from_pretrained("mllama").eval()
    _, made = runs.read_model("mllama", transform)("cpu", "fp32")
    answers = [record["answer"] for record in records("answers.jsonl")]
    for each, answer in zip(read_samples("p.jsonl"), answers, strict=True):
        sample = made(each, with_answer=False)
        tokens, given = torch.tensor([sample["tokens"]]), {}
        if len(sample["images"]):
            tiles = torch.zeros(1, 1, 4, 3, 12, 12)
            tiles[0, 0, 0] = sample["images"][0]
            mask = torch.zeros(*tokens.shape, 1, 4)
            mask[:, 1:, :, 0] = 1  # from the image's marker on
            given = {
                "pixel_values": tiles,
                "aspect_ratio_ids": torch.tensor([[1]]),
                "aspect_ratio_mask": torch.tensor([[[1, 0, 0, 0]]]),
                "cross_attention_mask": mask,
            }
            hf.drop_attention_without_images(monkeypatch, mask[:, :, 0, 0])
        got = reference.generate(
            input_ids=tokens, **given, max_new_tokens=5, do_sample=False, eos_token_id=2, pad_token_id=0
        )
        assert answer == made.decode(got[0, tokens.shape[1] :].tolist())
    assert len(set(answers)) == 2
