import pytest
from prompt_settings import images, sample

from torchfuse.data import Media, Message, Sample
from torchfuse.errors import ConfigError
from torchfuse.tasks import Prediction
from torchfuse.tasks.evaluation import (
    AnswerLoss,
    Score,
    draw_predictions,
    group_problems,
    group_scores,
    metric_problems,
    sample_group,
    score_predictions,
    score_table,
)


def made(text="which?", answer="cat", media=(), origin="", **metadata):
    return Sample([Message("user", [*media, text]), Message("assistant", [answer])], metadata, origin)


def test_groups():
    clip, picture = Media(data=b"0", modality="video"), Media(data=b"1")
    both = made(media=[clip, picture, clip], kind="k", source="coco", level=3, origin="a/b.json, row 1")
    text = made(origin="a, b/c.jsonl, line 7")
    assert [sample_group(both, by) for by in ("kind", "source", "modality", "level")] == [
        "k",
        "coco",
        "image+video",
        "3",
    ]
    assert [sample_group(text, by) for by in ("kind", "source", "modality", "level")] == [
        "question",
        "a, b/c.jsonl",
        "text",
        "(none)",
    ]
    assert sample_group(made(), "source") == "(none)"


def test_groups_that_cannot_be():
    samples = [made(topic="all", level=1), made(level=None)]
    assert group_problems(samples, "kind") == group_problems(samples, "level") == []
    assert group_problems(samples, "modality") == []
    assert group_problems(samples, "tpic") == [
        "by must be a field of the samples, got 'tpic', which none has; there are kind, source, "
        "modality, level, topic"
    ]
    assert group_problems(samples, "topic") == [
        "topic 'all' means the samples of every topic; choose another name in the file"
    ]


def test_means_of_groups():
    samples = [made(kind="a"), made(kind="b"), made(kind="a")]
    texts = ["cat", "a cat", "dog"]
    losses = [AnswerLoss(6.0, 2, True), AnswerLoss(5.0, 1, False), AnswerLoss(4.0, 8, False)]
    predictions = [Prediction(each, text) for each, text in zip(samples, texts, strict=True)]
    scores = score_predictions(predictions, ["exact_match", "contained", "loss"], losses)
    assert scores["loss"] == [Score(3.0, 2), Score(5.0, 1), Score(0.5, 8)]
    assert group_scores(samples, scores, "kind") == {
        "a": {"samples": 2, "exact_match": 0.5, "contained": 0.5, "loss": 1.0},  # of tokens
        "b": {"samples": 1, "exact_match": 0, "contained": 1, "loss": 5.0},
        "all": {"samples": 3, "exact_match": 1 / 3, "contained": 2 / 3, "loss": 15 / 11},
    }


def test_a_table_without_titles_is_as_wide_as_its_rows():
    means = {
        "a long name": {"samples": 2, "exact_match": 0.5},
        "all": {"samples": 2, "exact_match": 0.5},
    }
    assert score_table(means, by=None).splitlines() == [
        "a long name   50.0%  of 2",
        "all           50.0%  of 2",
    ]
    assert score_table(means, by="modality").splitlines()[0] == "modality     exact_match"


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        ([], "metrics: no metric is given; there are"),
        (["anls", "bleu"], "metrics: there is no metric 'bleu'; there are exact_match, contained, "),
        (["loss", "loss"], "metrics: 'loss' is given twice; there are"),
    ],
)
def test_metrics_that_there_are_not(names, problem):
    assert metric_problems(names)[0].startswith(problem)
    with pytest.raises(ConfigError, match=f"^{problem}"):
        score_predictions([], names)


def test_losses_are_computed_elsewhere():
    with pytest.raises(ConfigError, match="'loss' needs losses, the result of answer_losses"):
        score_predictions([], ["loss"])


@pytest.mark.parametrize("num_each", [1, 6])
@pytest.mark.parametrize("texts", [["cat"] * 5, ["dog", "cat", "$x_2$", "猫 \\frac", ""]], ids=str)
def test_the_picture_takes_any_sample(tmp_path, num_each, texts):
    a, b, c = images(tmp_path).values()
    samples = [
        sample("<image> a very long question " * 1 + "of many words " * 20, (a,), "cat"),
        sample("which?", answer="cat"),
        sample("<image> $which_one <image> <image>", (a, b, c), "cat"),
        made(media=[Media(data=b"0", modality="video")]),
        made(answers=["cat"] * 3 + ["dog"]),
    ]
    predictions = [Prediction(each, text) for each, text in zip(samples, texts, strict=True)]
    scores = [score.value for score in score_predictions(predictions, ["vqa_accuracy"])["vqa_accuracy"]]
    path = tmp_path / "predictions.png"
    draw_predictions(path, predictions, scores, num_each=num_each, title="$of_the")
    assert path.read_bytes().startswith(b"\x89PNG")
