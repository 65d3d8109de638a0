import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchtune.modules.model_fusion import FusionEmbedding as TorchtuneFusionEmbedding

from torchfuse import FusionEmbedding, get_fusion_params
from torchfuse.errors import ConfigError, ModelError

OLD, NEW, DIM = 23, 5, 7


def reference(embedding):
    """One table of all rows, as nn.Embedding sees it."""
    return torch.cat([embedding.weight, embedding.fusion_embedding.weight])


@pytest.mark.parametrize("shape", [(), (3,), (2, 11), (2, 3, 5), (0,), (2, 0)])
def test_any_shape_of_ids(shape):
    embedding = FusionEmbedding(OLD, NEW, DIM)
    ids = torch.randint(0, OLD + NEW, shape)
    assert torch.equal(embedding(ids), F.embedding(ids, reference(embedding)))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_either_width(dtype):
    embedding = FusionEmbedding(OLD, NEW, DIM)
    ids = torch.arange(OLD + NEW, dtype=dtype)
    assert torch.equal(embedding(ids), reference(embedding))


def test_gradients_are_those_of_one_table():
    embedding = FusionEmbedding(OLD, NEW, DIM).double()
    ids = torch.tensor([[0, OLD, OLD, OLD + NEW - 1], [OLD - 1, 3, 3, OLD + 1]])
    weight = torch.randn(2, 4, DIM, dtype=torch.double)
    (embedding(ids) * weight).sum().backward()
    table = reference(embedding).detach().requires_grad_()
    (F.embedding(ids, table) * weight).sum().backward()
    got = torch.cat([embedding.weight.grad, embedding.fusion_embedding.weight.grad])
    torch.testing.assert_close(got, table.grad, rtol=0, atol=0)


def test_equals_torchtune_and_loads_its_checkpoint():
    torchtunes = TorchtuneFusionEmbedding(OLD, NEW, DIM)
    fused = FusionEmbedding(OLD, NEW, DIM)
    fused.load_state_dict(torchtunes.state_dict())
    ids = torch.randint(0, OLD + NEW, (3, 11))
    assert torch.equal(fused(ids), torchtunes(ids))
    torchtunes.load_state_dict(fused.state_dict())
    assert (fused.dim, fused.num_embeddings) == (torchtunes.dim, torchtunes.num_embeddings)
    assert fused.fusion_params() == torchtunes.fusion_params()
    assert fused.embedding.weight is fused.weight
    assert fused.embedding.num_embeddings == torchtunes.embedding.num_embeddings == OLD


def test_a_plain_checkpoint_fits_and_partial_ones_do_not_break():
    base = nn.Embedding(OLD, DIM)
    fused = FusionEmbedding(OLD, NEW, DIM)
    result = fused.load_state_dict(base.state_dict(), strict=False)
    assert result.missing_keys == ["fusion_embedding.weight"]
    assert torch.equal(fused.weight, base.weight)
    result = fused.load_state_dict({}, strict=False)
    assert result.missing_keys == ["weight", "fusion_embedding.weight"]


def test_from_pretrained_keeps_the_parameter_itself():
    base = nn.Embedding(OLD, DIM, padding_idx=3)
    base.weight.requires_grad_(False)
    fused = FusionEmbedding.from_pretrained(base, NEW)
    assert fused.weight is base.weight
    assert not fused.weight.requires_grad
    assert fused.fusion_embedding.weight.requires_grad
    assert fused.padding_idx == 3
    assert list(get_fusion_params(fused)) == ["fusion_embedding.weight"]
    ids = torch.arange(OLD)
    assert torch.equal(fused(ids), base(ids))


def test_init_of_new_rows():
    base = nn.Embedding(401, DIM)
    with torch.no_grad():
        base.weight.mul_(torch.arange(1.0, DIM + 1)).add_(torch.arange(DIM))
    mean, std = base.weight.mean(0), base.weight.std(0, correction=0)
    rows = FusionEmbedding.from_pretrained(base, NEW).fusion_embedding.weight
    torch.testing.assert_close(rows, mean.expand(NEW, -1))
    rows = FusionEmbedding.from_pretrained(base, 3001, init="normal").fusion_embedding.weight
    torch.testing.assert_close(rows.mean(0), mean, rtol=0.05, atol=0.2)
    torch.testing.assert_close(rows.std(0), std, rtol=0.06, atol=0)
    given = torch.randn(NEW, DIM)
    rows = FusionEmbedding.from_pretrained(base, NEW, init=given).fusion_embedding.weight
    assert torch.equal(rows, given)
    rows.detach().zero_()
    assert given.any()


def test_expand_keeps_what_was_learned():
    fused = FusionEmbedding.from_pretrained(nn.Embedding(OLD, DIM), NEW, init="normal")
    before = fused(torch.arange(OLD + NEW))
    assert fused.expand(2) is fused
    assert fused.num_embeddings == OLD + NEW + 2
    after = fused(torch.arange(OLD + NEW + 2))
    assert torch.equal(after[: OLD + NEW], before)
    torch.testing.assert_close(after[-1], fused.weight.mean(0))
    assert fused.fusion_embedding.weight.requires_grad


def test_merge_is_one_plain_table():
    fused = FusionEmbedding.from_pretrained(nn.Embedding(OLD, DIM, padding_idx=2), NEW, init="normal")
    merged = fused.merge()
    assert type(merged) is nn.Embedding
    assert (merged.num_embeddings, merged.padding_idx) == (OLD + NEW, 2)
    ids = torch.randint(0, OLD + NEW, (3, 11))
    assert torch.equal(merged(ids), fused(ids))
    merged.weight.detach().zero_()
    assert fused.weight.any()


@pytest.mark.parametrize("ids", [[OLD + NEW], [-1], [0, 99]])
def test_an_id_outside_both_tables_is_named(ids):
    embedding = FusionEmbedding(OLD, NEW, DIM)
    with pytest.raises(ModelError, match=rf"must lie in \[0, {OLD + NEW}\).*Got ids from"):
        embedding(torch.tensor(ids))


def test_compiles_to_one_graph_and_exports():
    embedding = FusionEmbedding(OLD, NEW, DIM)
    ids = torch.randint(0, OLD + NEW, (2, 11))
    expected = embedding(ids)
    assert torch.equal(torch.compile(embedding, backend="aot_eager", fullgraph=True)(ids), expected)
    program = torch.export.export(embedding, (ids,))
    assert torch.equal(program.module()(ids), expected)


def test_on_the_meta_device():
    with torch.device("meta"):
        fused = FusionEmbedding.from_pretrained(nn.Embedding(OLD, DIM), NEW, init="normal")
        assert fused(torch.zeros(2, 3, dtype=torch.long)).shape == (2, 3, DIM)
    assert all(p.is_meta for p in fused.parameters())
    real = FusionEmbedding(OLD, NEW, DIM)
    fused.load_state_dict(real.state_dict(), assign=True)
    ids = torch.arange(OLD + NEW)
    assert torch.equal(fused(ids), real(ids))


def test_in_bfloat16_and_beside_a_table_of_other_dtype():
    fused = FusionEmbedding.from_pretrained(nn.Embedding(OLD, DIM, dtype=torch.bfloat16), NEW)
    assert {p.dtype for p in fused.parameters()} == {torch.bfloat16}
    fused.fusion_embedding.float()
    assert fused(torch.tensor([0, OLD])).dtype == torch.bfloat16


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copied):
    fused = FusionEmbedding.from_pretrained(nn.Embedding(OLD, DIM), NEW)
    other = copied(fused)
    ids = torch.arange(OLD + NEW)
    assert torch.equal(other(ids), fused(ids))
    assert other.weight is not fused.weight


class Scaled(nn.Embedding):
    def forward(self, input):
        return super().forward(input) * 2


def hooked():
    embedding = nn.Embedding(OLD, DIM)
    embedding.register_forward_hook(lambda *_: None)
    return embedding


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Scaled(OLD, DIM), "Scaled has a forward of its own"),
        (lambda: nn.Embedding(OLD, DIM, max_norm=1.0), "max_norm=1.0"),
        (lambda: nn.Embedding(OLD, DIM, scale_grad_by_freq=True), "scale_grad_by_freq"),
        (lambda: FusionEmbedding(OLD, NEW, DIM), r"add tokens to it with expand\(n\)"),
        (hooked, "forward hooks"),
    ],
)
def test_an_embedding_that_would_not_stay_intact_is_refused(make, complaint):
    with pytest.raises(ModelError, match=complaint):
        FusionEmbedding.from_pretrained(make(), NEW)


@pytest.mark.parametrize(
    ("num_new", "init", "complaint"),
    [
        (0, "mean", "num_new must be at least 1, got 0"),
        (2, "zeros", 'init must be "mean", "normal" or a tensor'),
        (2, torch.zeros(3, DIM), rf"init must have shape \[2, {DIM}\], got \[3, {DIM}\]"),
    ],
)
def test_bad_arguments(num_new, init, complaint):
    with pytest.raises(ValueError, match=complaint):
        FusionEmbedding.from_pretrained(nn.Embedding(OLD, DIM), num_new, init)
    fused = FusionEmbedding(OLD, NEW, DIM)
    with pytest.raises(ValueError, match=complaint):
        fused.expand(num_new, init)
    assert fused.num_embeddings == OLD + NEW


def test_sizes_must_be_positive():
    with pytest.raises(ConfigError, match="fusion_vocab_size=0, embed_dim=-1"):
        FusionEmbedding(OLD, 0, -1)


@pytest.mark.gpu
def test_no_synchronisation_on_cuda():
    embedding = FusionEmbedding(OLD, NEW, DIM).cuda()
    ids = torch.randint(0, OLD + NEW, (3, 11), device="cuda")
    embedding(ids)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = embedding(ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(out, F.embedding(ids, reference(embedding)))
