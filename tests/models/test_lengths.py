import re

import pytest

from torchfuse.models.lengths import check_lengths
from torchfuse.modules.adapters import build_adapter


def pool(**options):
    return build_adapter("avgpool", 3, 5, window=2, **options)


def test_features_and_text_are_counted():
    assert check_lengths(max_seq_len=56, text_len=20, num_tokens=9, num_frames=4) == 56
    assert (
        check_lengths(max_seq_len=29, text_len=20, num_tokens=81, adapter=pool(), in_sequence=False)
        == 20
    )
    pooled = {"num_tokens": 81, "num_frames": 4, "adapter": pool(grid=9)}
    assert check_lengths(max_seq_len=120, text_len=20, **pooled) == 20 + 4 * 25
    named = {"num_tokens": {"eye": 9, "ear": 7}, "num_frames": {"eye": 4, "ear": 1}}
    assert check_lengths(max_seq_len=64, text_len=20, **named) == 20 + 36 + 7
    both = {"num_tokens": {"eye": 9, "ear": 7}, "adapter": {"eye": pool(), "ear": None}}
    assert check_lengths(max_seq_len=64, text_len=20, **both) == 20 + 4 + 7
    assert check_lengths(max_seq_len=20, text_len=20, num_tokens=None) is None
    assert check_lengths(max_seq_len=20, text_len=20, num_tokens=None, in_sequence=False) == 20


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (
            {"num_tokens": 81, "num_frames": 4, "adapter": pool(grid=9)},
            "max_seq_len 64 is shorter than 4 frames x 25 tokens (81 before the adapter) + 20 text tokens "
            "= 120. Raise max_seq_len, shorten the text, or use fewer frames or an adapter that pools.",
        ),
        (
            {"num_tokens": {"eye": 25, "ear": None}, "num_frames": {"eye": 2, "ear": 1}},
            "max_seq_len 64 is shorter than 2 frames x 25 tokens of 'eye' + the features of 'ear', however "
            "many, + 20 text tokens = 70 and more.",
        ),
        (
            {"num_tokens": 9, "text_len": 65, "in_sequence": False},
            "max_seq_len 64 is shorter than 65 text tokens = 65. Raise max_seq_len or shorten the text.",
        ),
        (
            {"num_tokens": 45},
            "max_seq_len 64 is shorter than 1 frame x 45 tokens + 20 text tokens = 65.",
        ),
        (
            {"num_tokens": 0, "num_frames": 0, "text_len": -1, "max_seq_len": 0},
            "Lengths: max_seq_len=0 must be at least 1; text_len=-1 must be at least 0; num_tokens=0 must "
            "be at least 1; num_frames=0 must be at least 1.",
        ),
        ({"num_tokens": {"eye": 0}}, "num_tokens of 'eye'=0 must be at least 1"),
        (
            {"num_tokens": 9, "num_frames": 4, "adapter": pool()},
            "makes 4 tokens of a frame's 9, but 9 of the 36 of 4 frames, not 16: it takes the clip as one",
        ),
        (
            {"num_tokens": 10, "num_frames": 3, "adapter": pool(grid=3)},
            "3 frames x 10 tokens do not fit the adapter. avgpool: 10 tokens are no frames of 3 x 3",
        ),
        (
            {"num_tokens": {"eye": 9}, "num_frames": {"ear": 2}},
            "num_frames must have the names of the encoders, eye; got ear",
        ),
        (
            {"num_tokens": 9, "num_frames": {"ear": 2}},
            "num_frames must have the names of the encoders, encoder; got ear",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_every_number_is_named(given, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)):
        check_lengths(**{"max_seq_len": 64, "text_len": 20} | given)
