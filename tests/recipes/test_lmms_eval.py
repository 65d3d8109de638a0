"""lmms-eval on a finetuning run; needs the extra ``eval``."""

import importlib.util
import json
import random

import pytest
import torch
import yaml
from answered_run import evaluated, lines
from PIL import Image

from torchfuse.data import Message, Sample, read_samples
from torchfuse.tasks import anls, answer_losses, user_message, vqa_accuracy
from torchfuse.tasks.runs import load_run

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="needs the extra eval"),
    pytest.mark.filterwarnings("ignore"),  # its own, and those of what it imports
]
UTILS = """
from PIL import Image

def doc_to_visual(doc):
    return [Image.open(path) for path in doc["images"]]
"""


@pytest.fixture(scope="module")
def task(answered):
    """A task of lmms-eval in a folder of its own, on a file that the recipe reads too."""
    folder = answered / "tasks"
    folder.mkdir()
    records = []
    for number, sample in enumerate(
        read_samples(answered / "second.json", image_root=answered / "pictures")
    ):
        if len(sample.messages) == 2 and sample.answer.split() == sample.answer.strip().split(" "):
            tags = "".join("<image>" for _ in sample.images)
            images = [str(image) for image in sample.images]
            record = {"question": f"{tags}\nNumber {number}?", "answer": sample.answer.strip()}
            records.append(record | {"images": images})
    (folder / "test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "utils.py").write_text(UTILS)
    config = {
        "task": "numbers",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "test.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"max_new_tokens": 7, "until": []},
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True}
            for name in ("exact_match", "anls")
        ],
    }
    text = yaml.safe_dump(config) + "doc_to_visual: !function utils.doc_to_visual\n"
    (folder / "numbers.yaml").write_text(text)
    return folder


@pytest.fixture
def model(answered, monkeypatch):
    """The run through lmms-eval's registry."""
    from lmms_eval.models import get_model

    monkeypatch.chdir(answered)
    return get_model("torchfuse").create_from_arg_string(
        f"run={answered / 'run'},dtype=fp32", {"batch_size": 3, "device": "cpu", "max_batch_size": None}
    )


def test_a_task_of_local_files_has_the_score_of_the_recipe(answered, task, monkeypatch, tmp_path):
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    metrics = ["exact_match", "anls"]
    evaluated(
        answered, questions=str(task / "test.jsonl"), metrics=metrics, output_dir="same", num_shown=0
    )
    expected = json.loads((answered / "same" / "results.json").read_text())["results"]["kind"]["all"]
    assert 0 < expected["exact_match"] < 1
    with torch.random.fork_rng():
        found = simple_evaluate(
            model="torchfuse",
            model_args=f"run={answered / 'run'}",
            batch_size=4,
            device="cpu",
            tasks=["numbers"],
            task_manager=TaskManager(include_path=str(task), include_defaults=False),
            bootstrap_iters=0,
        )
    for name in metrics:
        assert found["results"]["numbers"][f"{name},none"] == pytest.approx(expected[name])
    texts = [each["filtered_resps"][0] for each in found["samples"]["numbers"]]
    assert [t.split() for t in texts] == [each["text"].split() for each in lines(answered / "same")]


def instance(kind, *arguments):
    from lmms_eval.api.instance import Instance

    return Instance(kind, arguments, idx=0, metadata={"task": "t", "doc_id": 0, "repeats": 1})


def visuals_of(document):
    return document["visuals"]


def give(model, documents):
    model.task_dict["t"] = {"test": documents}


def test_continuations_have_the_mean_loss_of_answers(answered, model):
    paths = [answered / "pictures" / "3.png", answered / "noise.png"]
    noise = torch.randint(256, (13, 17, 3), generator=torch.Generator().manual_seed(3))
    Image.fromarray(noise.to(torch.uint8).numpy()).save(paths[1])
    documents = [
        {"visuals": [Image.open(paths[0])], "images": paths[:1]},
        {"visuals": None, "images": []},
        {"visuals": [[Image.open(path)] for path in paths], "images": paths},
        {"visuals": [str(paths[1])], "images": paths[1:]},
    ]
    give(model, documents)
    requests, samples = [], []
    for number, document in enumerate(documents):
        for answer in ("It is 3.", "No"):
            target = f" {answer}" if number % 2 else lambda _, answer=answer: f" {answer}"
            requests.append(instance("loglikelihood", "Which?", target, visuals_of, number, "t", "test"))
            question = user_message("Which?", document["images"])
            samples.append(Sample([question, Message("assistant", [answer])]))
    expected = answer_losses(*load_run("run", device="cpu", dtype="fp32"), samples, batch_size=1)
    found = model.loglikelihood(requests)
    assert [loss for loss, _ in found] == pytest.approx([each.mean for each in expected], rel=1e-5)
    assert [greedy for _, greedy in found] == [each.is_greedy for each in expected]
    assert len({round(loss, 4) for loss, _ in found[1::2]}) == len(documents)  # visuals count


def test_keywords_of_generation(answered, model):
    give(model, [{"visuals": None}] * 3)

    def answers(**options):
        request = ("Number 2?", options, visuals_of)
        return model.generate_until(
            [instance("generate_until", *request, number, "t", "test") for number in range(3)]
        )

    whole = answers(max_new_tokens=11)
    assert len(set(whole)) == 1
    short = answers(max_new_tokens=3)[0]
    assert whole[0].startswith(short.rstrip("\ufffd"))
    assert len(short) < len(whole[0])
    letter = whole[0][len(whole[0]) // 2]
    for until in (letter, ["", "not there", letter]):
        assert answers(max_new_tokens=11, until=until)[0] == whole[0].partition(letter)[0]
    assert answers(max_new_tokens=11, do_sample=False, temperature=2.0) == whole
    drawn = answers(max_new_tokens=11, do_sample=True, temperature=2.0)
    assert drawn == answers(max_new_tokens=11, temperature=2.0)
    assert len(set(drawn)) == 3
    assert answers()[0].startswith(whole[0].rstrip("\ufffd"))  # as much as fits max_seq_len


def test_what_cannot_be_answered_is_refused_by_name(answered, model):
    give(model, [{"visuals": [{"array": [0.0]}]}, {"visuals": None}])
    audio = ("Which?", {}, visuals_of, 0, "t", "test")
    with pytest.raises(ValueError, match="^t, test, document 0: a visual must be .*, got a dict"):
        model.generate_until([instance("generate_until", *audio)])
    tagged = ("<image> Which?", {}, visuals_of, 1, "t", "test")
    with pytest.raises(ValueError, match="^t, test, document 1: the conversation has <image> 1 times"):
        model.generate_until([instance("generate_until", *tagged)])
    for options, problem in (({"num_beams": 5}, "num_beams must be 1"), ({"top_p": 7}, "top_p must")):
        beams = ("Which?", options, visuals_of, 1, "t", "test")
        with pytest.raises(ValueError, match=f"^generation_kwargs: {problem}"):
            model.generate_until([instance("generate_until", *beams)])
    with pytest.raises(ValueError, match="does not implement generate_until_multi_round"):
        model.generate_until_multi_round([])
    with pytest.raises(ValueError, match="acc_mutual_info"):
        model.loglikelihood([instance("loglikelihood", "", "cat")])
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got 'auto'"):
        type(model)(str(answered / "run"), device="cpu", batch_size="auto")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"])
def test_images_of_any_mode(model, mode):
    from torchfuse.tasks.evaluation.lmms_eval_model import _media

    pixels = Image.new("RGB", (5, 3), (40, 90, 200)).convert("L" if mode in ("I;16", "F") else mode)
    media = _media(pixels.convert(mode))
    assert model.transform.media_input(media).num_items == 1


def test_metrics_are_those_of_lmms_eval():
    from lmms_eval.api.metrics import anls as reference_anls
    from lmms_eval.tasks.vqav2.utils import vqav2_process_results

    rng = random.Random(3)
    pool = "cat;a cat;Cat.;two;2;dog;the dog!;isnt;isn't;red/brown;red brown;1,000;U.S.;;none".split(";")
    for _ in range(500):
        answers = rng.choices(pool[: rng.randint(1, len(pool))], k=rng.randint(4, 10))
        text = rng.choice(pool)
        given = [{"answer": answer, "answer_id": number} for number, answer in enumerate(answers)]
        expected = vqav2_process_results({"question_id": 0, "answers": given}, [text])
        assert vqa_accuracy(text, answers) == pytest.approx(expected["exact_match"])
        assert anls(text, answers) == pytest.approx(reference_anls(answers, [text])["anls"])
