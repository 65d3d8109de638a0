import pytest
import torch

from torchfuse.data.masks import causal_mask, image_mask, left_padding, positions
from torchfuse.errors import ConfigError, ModelError

IMG = 99


def by_hand(tokens, *, features, num_images, markers=1, scope="all", documents=None):
    """The definition, position by position."""
    rows = []
    for r, row in enumerate(tokens.tolist()):
        begun = []  # (position of the first marker, group)
        count = group = 0
        mask = torch.zeros(len(row), num_images * features, dtype=torch.bool)
        for t, token in enumerate(row):
            if token == IMG:
                if t == 0 or row[t - 1] != IMG:
                    group += 1
                if count % markers == 0:
                    begun.append((t, group))
                count += 1
            for i, (at, its_group) in enumerate(begun):
                seen = scope == "all" or (scope == "last" and i == len(begun) - 1)
                seen = seen or (scope == "group" and its_group == group)
                if documents is not None:
                    seen = seen and documents[r, t] == documents[r, at]
                if seen and i < num_images:
                    mask[t, i * features : (i + 1) * features] = True
        rows.append(mask)
    return torch.stack(rows)


@pytest.mark.parametrize("scope", ["all", "group", "last"])
@pytest.mark.parametrize("markers", [1, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_image_mask_is_its_definition(scope, markers, packed):
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(1, 9, (5, 29), generator=generator)
    for row in range(4):  # the last row has no image
        at = torch.randperm(7, generator=generator)[: row + 1] * 4
        for start in at.tolist():
            tokens[row, start : start + markers] = IMG
    tokens[3, :20] = IMG
    if markers == 3:
        tokens[3, 18:20] = 1
    documents = (torch.arange(29) // 10).expand(5, -1) if packed else None
    got = image_mask(
        tokens,
        IMG,
        features_per_image=2,
        num_images=6,
        markers_per_image=markers,
        scope=scope,
        document_ids=documents,
    )
    expected = by_hand(
        tokens, features=2, num_images=6, markers=markers, scope=scope, documents=documents
    )
    assert torch.equal(got, expected)
    assert expected.any()
    assert not got[4].any()


def test_no_room_for_images():
    assert image_mask(torch.tensor([[1, 2]]), IMG, features_per_image=3, num_images=0).shape == (1, 2, 0)


def test_bad_arguments():
    tokens = torch.tensor([[1, 2]])
    with pytest.raises(ConfigError, match='scope must be "all", "group" or "last", got \'own\''):
        image_mask(tokens, IMG, features_per_image=3, num_images=1, scope="own")
    with pytest.raises(ConfigError, match="features_per_image=0"):
        image_mask(tokens, IMG, features_per_image=0, num_images=1)
    with pytest.raises(ModelError, match="2 tokens do not fit into 1 slots"):
        causal_mask(torch.ones(1, 2, dtype=torch.bool), slots=1)


def test_causal_mask_by_definition():
    valid = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 1], [1, 1, 1, 1, 1]]).bool()
    documents = torch.tensor([[0] * 5, [0] * 5, [0, 0, 1, 1, 1]])
    got = causal_mask(valid, document_ids=documents, slots=7)
    assert got.shape == (3, 5, 7)
    for b in range(3):
        for q in range(5):
            for k in range(7):
                allowed = k <= q and k < 5 and valid[b, k] and documents[b, q] == documents[b, min(k, 4)]
                assert bool(got[b, q, k]) == bool(allowed or q == k)
    assert got.any(-1).all()


def test_padding_and_positions():
    tokens = torch.tensor([[0, 0, 5, 0, 7], [3, 0, 0, 0, 0]])
    valid = left_padding(tokens, 0)
    assert valid.int().tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert positions(valid).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
