import copy
import pickle

import pytest
import torch
from contract import views
from ranks import run_on_ranks
from support import (
    BACKENDS,
    VOCAB,
    WIDTH,
    TinyEncoder,
    inputs,
    open_gates,
    same_state,
    state,
    text,
    tiny_decoder,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torchtune.modules import TiedLinear

from torchfuse import (
    FusionEmbedding,
    FusionLinear,
    TiedFusionLinear,
    describe,
    fuse,
    generate,
    get_fusion_params,
    load_fusion,
    param_groups,
    save_fusion,
    set_trainable,
)
from torchfuse.errors import ConfigError, ModelError
from torchfuse.naming import named_parameters
from torchfuse.training import shard

OLD, NEW, DIM = 23, 5, 7
biases = pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
heads = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def make(bias=False, init="normal"):
    return FusionLinear.from_pretrained(nn.Linear(DIM, OLD, bias=bias), NEW, init)


def tied_head():
    return TiedFusionLinear(FusionEmbedding.from_pretrained(nn.Embedding(OLD, DIM), NEW, "normal"))


# --- the head alone ------------------------------------------------------------------------------


@biases
@pytest.mark.parametrize("shape", [(), (3,), (2, 11), (0,)], ids=str)
def test_logits_are_those_of_one_table(bias, shape):
    head = make(bias).double()
    x = torch.randn(*shape, DIM, dtype=torch.double)
    table = torch.cat([head.weight, head.fusion_linear.weight])
    expected = torch.einsum("...d,vd->...v", x, table)
    if bias:
        expected = expected + torch.cat([head.bias, head.fusion_linear.bias])
    torch.testing.assert_close(head(x), expected, rtol=1e-12, atol=1e-12)
    assert head.out_features == OLD + NEW == head(x).shape[-1]


@biases
def test_gradients_are_those_of_one_table(bias):
    head = make(bias).double()
    x = torch.randn(3, 11, DIM, dtype=torch.double, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    weight, merged = torch.randn(3, 11, OLD + NEW, dtype=torch.double), head.merge()
    (head(x) * weight).sum().backward()
    (merged(other) * weight).sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-12, atol=1e-12)
    for name, parameter in merged.named_parameters():
        pair = head.get_parameter(name), head.fusion_linear.get_parameter(name)
        got = torch.cat([p.grad for p in pair])
        torch.testing.assert_close(got, parameter.grad, rtol=1e-12, atol=1e-12)


def test_a_tied_head_scores_with_both_tables():
    head, x = tied_head(), torch.randn(2, 11, DIM, dtype=torch.double)
    embedding = head.tied_module.double()
    table = torch.cat([embedding.weight, embedding.fusion_embedding.weight])
    torch.testing.assert_close(head(x), torch.einsum("bsd,vd->bsv", x, table), rtol=1e-12, atol=1e-12)
    assert torch.equal(head(x)[..., :OLD], TiedLinear(embedding)(x))


@biases
def test_from_pretrained_keeps_the_parameters_and_the_logits(bias):
    base = nn.Linear(DIM, OLD, bias=bias).eval().requires_grad_(False)
    head, x = FusionLinear.from_pretrained(base, NEW), torch.randn(3, DIM)
    assert head.weight is base.weight
    assert head.bias is base.bias
    assert not head.training
    assert torch.equal(head(x)[:, :OLD], base(x))
    names = list(base.state_dict())
    assert list(head.state_dict()) == names + [f"fusion_linear.{name}" for name in names]
    trains = [name for name, p in head.named_parameters() if p.requires_grad]
    assert trains == list(get_fusion_params(head)) == head.fusion_params()


@biases
def test_a_plain_checkpoint_fits(bias):
    base, head = nn.Linear(DIM, OLD, bias=bias), make(bias)
    result = head.load_state_dict(base.state_dict(), strict=False)
    assert result.missing_keys == head.fusion_params()
    assert result.unexpected_keys == []
    assert torch.equal(head.weight, base.weight)


def test_init_of_new_rows():
    base, x = nn.Linear(DIM, OLD), torch.randn(3, DIM)
    mean = base(x).mean(-1, keepdim=True).expand(-1, NEW)
    torch.testing.assert_close(FusionLinear.from_pretrained(base, NEW)(x)[:, OLD:], mean)
    many = FusionLinear.from_pretrained(nn.Linear(DIM, 401), 3001, "normal")
    for name, new in many.fusion_linear.named_parameters():
        old = many.get_parameter(name)
        torch.testing.assert_close(new.mean(0), old.mean(0), rtol=0, atol=0.03)
        torch.testing.assert_close(new.std(0), old.std(0, correction=0), rtol=0.07, atol=0)
    given = torch.randn(NEW, DIM)
    head = FusionLinear.from_pretrained(base, NEW, given)
    assert torch.equal(head.fusion_linear.weight, given)
    torch.testing.assert_close(head.fusion_linear.bias, base.bias.mean().expand(NEW))


@biases
def test_means_follow_the_head_when_asked_to(bias):
    head = make(bias, "mean")
    assert head.new_rows_are_means()
    head.load_state_dict(nn.Linear(DIM, OLD, bias=bias).state_dict(), strict=False)
    assert not head.new_rows_are_means()
    head.reset_new_rows()
    assert head.new_rows_are_means()
    torch.testing.assert_close(head.fusion_linear.weight, head.weight.mean(0).expand(NEW, -1))
    for parameter in head.fusion_linear.parameters():
        before = parameter.detach().clone()
        parameter.detach()[1] += 1
        assert not head.new_rows_are_means()
        parameter.detach().copy_(before)
    assert not head.to("meta").new_rows_are_means()


@biases
def test_expand_keeps_what_was_learned(bias):
    head, x = make(bias), torch.randn(3, DIM)
    before = head(x)
    assert head.expand(2) is head
    assert (head.out_features, head.fusion_vocab_size) == (OLD + NEW + 2, NEW + 2)
    torch.testing.assert_close(head(x)[:, : OLD + NEW], before)
    torch.testing.assert_close(head(x)[:, -1], before[:, :OLD].mean(-1))
    assert all(p.requires_grad for p in head.fusion_linear.parameters())
    assert set(get_fusion_params(head)) == set(head.fusion_params())


@biases
def test_merge_is_one_plain_head(bias):
    head, x = make(bias), torch.randn(3, DIM)
    merged = head.merge()
    assert type(merged) is nn.Linear
    assert (merged.in_features, merged.out_features) == (DIM, OLD + NEW)
    torch.testing.assert_close(merged(x), head(x))
    merged.weight.detach().zero_()
    assert head.weight.any()
    head.requires_grad_(False)
    assert not any(p.requires_grad for p in head.merge().parameters())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copied):
    head, tied, x = make(True), tied_head(), torch.randn(3, DIM)
    other = copied(head)
    assert torch.equal(other(x), head(x))
    assert other.weight is not head.weight
    holder = copied({"embedding": tied.tied_module, "head": tied})
    assert holder["head"].tied_module is holder["embedding"]
    assert holder["embedding"] is not tied.tied_module
    assert torch.equal(holder["head"](x), tied(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_to_one_graph(backend):
    torch._dynamo.reset()
    x = torch.randn(3, DIM)
    for head in (make(True), tied_head()):
        compiled = torch.compile(head, backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(x), head(x))


def test_on_the_meta_device():
    with torch.device("meta"):
        head = make()
        assert head(torch.zeros(2, 3, DIM)).shape == (2, 3, OLD + NEW)
    assert all(p.is_meta for p in head.parameters())
    real, x = make(), torch.randn(3, DIM)
    head.load_state_dict(real.state_dict(), assign=True)
    assert torch.equal(head(x), real(x))


def test_in_bfloat16_and_beside_a_head_of_other_dtype():
    head, tied, x = make(True).bfloat16(), tied_head(), torch.randn(3, DIM, dtype=torch.bfloat16)
    tied.tied_module.bfloat16()
    before = head(x), tied(x)
    head.fusion_linear.float()
    tied.tied_module.fusion_embedding.float()
    for one, earlier in zip((head, tied), before, strict=True):
        assert one(x).dtype == earlier.dtype == torch.bfloat16
        assert torch.equal(one(x)[:, :OLD], earlier[:, :OLD])
        torch.testing.assert_close(one(x), earlier, rtol=0.01, atol=0.01)
    assert {p.dtype for p in head.merge().parameters()} == {torch.bfloat16}


def test_quantization_takes_the_pretrained_head_and_leaves_the_new_rows():
    head, x = make(), torch.randn(3, DIM)
    before = head(x)
    quantize(head)
    assert type(head) is FusionLinear
    assert type(head.weight) is not nn.Parameter
    assert type(head.fusion_linear.weight) is nn.Parameter
    torch.testing.assert_close(head(x)[:, :OLD], before[:, :OLD], rtol=0, atol=0.02)
    assert torch.equal(head(x)[:, OLD:], before[:, OLD:])
    with pytest.raises(ModelError, match=r"as weight \(is it sharded or quantized already\?"):
        FusionLinear.from_pretrained(quantize(nn.Linear(DIM, OLD)), NEW)


def quantize(module):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(module, Int8WeightOnlyConfig(version=2))
    return module


class Scaled(nn.Linear):
    def forward(self, input):
        return super().forward(input) * 2


def hooked():
    linear = nn.Linear(DIM, OLD)
    linear.register_forward_hook(lambda *_: None)
    return linear


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (lambda: Scaled(DIM, OLD), "Scaled has a forward of its own"),
        (lambda: nn.Conv1d(DIM, OLD, 1), "Conv1d has a forward of its own.* Give a plain nn.Linear"),
        (make, r"add tokens to it with expand\(n\)"),
        (hooked, "forward hooks"),
    ],
    ids=["subclass", "no linear", "fused", "hooked"],
)
def test_a_head_that_would_not_stay_intact_is_refused(given, complaint):
    with pytest.raises(ModelError, match=complaint):
        FusionLinear.from_pretrained(given(), NEW)


@pytest.mark.parametrize(
    ("num_new", "init", "complaint"),
    [
        (0, "mean", "num_new must be at least 1, got 0"),
        (2, "zeros", 'init must be "mean", "normal" or a tensor'),
        (2, torch.zeros(3, DIM), rf"init must have shape \[2, {DIM}\], got \[3, {DIM}\]"),
    ],
    ids=["none", "init", "shape"],
)
def test_bad_arguments(num_new, init, complaint):
    with pytest.raises(ValueError, match=complaint):
        FusionLinear.from_pretrained(nn.Linear(DIM, OLD), num_new, init)
    head = make(True)
    before = state(head)
    with pytest.raises(ValueError, match=complaint):
        head.expand(num_new, init)
    assert same_state(before, head)
    assert head.out_features == OLD + NEW


def test_bad_sizes_and_a_plain_embedding():
    with pytest.raises(ConfigError, match="embed_dim=-1, fusion_vocab_size=0"):
        FusionLinear(-1, OLD, 0)
    with pytest.raises(ModelError, match="needs a FusionEmbedding.*got a Embedding"):
        TiedFusionLinear(nn.Embedding(OLD, DIM))


# --- in a fused model ----------------------------------------------------------------------------

NEW_TOKENS = 2


def fused(tied, every=2, **options):
    return fuse(
        tiny_decoder(tied=tied),
        TinyEncoder(),
        every=every,
        fusion_vocab_size=NEW_TOKENS,
        fusion_head=True,
        on_missing="participate",
        **options,
    )


@torch.no_grad()
def learned(tied, **options):
    """A model whose gates are open and whose new rows differ from each other and from what they were."""
    model = open_gates(fused(tied, **options))
    generator = torch.Generator().manual_seed(11)
    for name, parameter in get_fusion_params(model).items():
        if "fusion_embedding" in name or "fusion_linear" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def text_with_new_tokens():
    tokens = text()
    tokens[0, 3], tokens[1, -1] = VOCAB, VOCAB + 1
    return tokens


@heads
def test_old_logits_are_as_before_to_the_bit_and_new_ones_follow(tied):
    plain = tiny_decoder(tied=tied)
    model = fused(tied)
    out = model(text())
    assert out.shape == (2, 13, VOCAB + NEW_TOKENS)
    assert torch.equal(out[..., :VOCAB], plain(text()))
    torch.testing.assert_close(out[..., VOCAB], out[..., :VOCAB].mean(-1))
    assert isinstance(model.output, TiedFusionLinear if tied else FusionLinear)


@heads
def test_names_are_the_decoders_and_the_new_rows(tied):
    model, plain = fused(tied), tiny_decoder(tied=tied)
    new = [] if tied else ["decoder.output.fusion_linear.weight"]
    rows = [n for n in get_fusion_params(model) if "fusion_layer" not in n and "adapter" not in n]
    assert rows == ["decoder.tok_embeddings.fusion_embedding.weight", *new]
    for view in (views.view_state_dict, views.view_named_parameters, views.view_submodules):
        view(model, plain)
    for view in (views.view_dcp_model, views.view_dcp_optimizer, views.view_deepcopy, views.view_pickle):
        view(learned(tied), plain)
    views.view_partial_load(model, plain)


@heads
def test_only_new_rows_learn(tied):
    model = fused(tied)
    model(text(), encoder_input=inputs())[..., VOCAB:].square().mean().backward()
    graded = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    rows = "tok_embeddings.fusion_embedding" if tied else "output.fusion_linear"
    assert f"decoder.{rows}.weight" in graded
    assert graded <= set(get_fusion_params(model))
    assert all(p.grad is None for n, p in named_parameters(model) if n not in get_fusion_params(model))


def test_parts_groups_and_table_know_the_new_rows():
    model = fused(False)
    without = fuse(tiny_decoder(), TinyEncoder(), every=2, fusion_vocab_size=NEW_TOKENS)
    assert describe(model)["fusion"].parameters - describe(without)["fusion"].parameters == 2 * WIDTH
    assert describe(model)["decoder"] == describe(without)["decoder"]
    name = "decoder.output.fusion_linear.weight"
    set_trainable(model, decoder=True)
    groups = {group["name"]: group["param_names"] for group in param_groups(model, lr=0.1)}
    assert name in groups["fusion"]
    assert name not in groups["decoder"]
    assert "decoder.output.weight" in groups["decoder"]


@heads
def test_chunks_and_unembed(tied):
    model = learned(tied)
    expected = model(text_with_new_tokens())
    h = torch.randn(2, 5, WIDTH)
    assert model.unembed(h).shape == (2, 5, VOCAB + NEW_TOKENS)
    model.set_num_output_chunks(3)
    torch.testing.assert_close(torch.cat(model(text_with_new_tokens()), dim=1), expected)


@heads
def test_new_tokens_can_be_said(tied):
    model = learned(tied).eval()
    with torch.no_grad():
        for name, parameter in get_fusion_params(model).items():
            if "fusion_embedding" in name or "fusion_linear" in name:
                parameter.mul_(9)  # new rows that sometimes outweigh the old ones
    tokens = text_with_new_tokens()
    got = generate(model, tokens, encoder_input=inputs(), max_new_tokens=9, temperature=0)
    for _ in range(9):
        with torch.no_grad():
            logits = model(tokens, encoder_input=inputs())
        tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(got, tokens)
    assert (got[:, 13:] >= VOCAB).any()
    assert (got[:, 13:] < VOCAB).any()


@heads
def test_merged_and_expanded_models_score_the_same(tied):
    model = learned(tied)
    tokens = text_with_new_tokens()
    expected = model(tokens, encoder_input=inputs())
    embedding, head = model.tok_embeddings.merge(), None if tied else model.output.merge()
    merged = learned(tied)
    merged.decoder.tok_embeddings = embedding
    merged.decoder.output = TiedLinear(embedding) if tied else head
    torch.testing.assert_close(merged(tokens, encoder_input=inputs()), expected)
    model.tok_embeddings.expand(3)
    if not tied:
        model.output.expand(3)
    out = model(tokens.clamp(max=VOCAB), encoder_input=inputs())
    assert out.shape[-1] == VOCAB + NEW_TOKENS + 3
    out = model(tokens, encoder_input=inputs())
    torch.testing.assert_close(out[..., : VOCAB + NEW_TOKENS], expected)


@heads
def test_the_artifact_has_the_new_rows(tied, tmp_path):
    model, fresh = learned(tied), fused(tied)
    tokens = text_with_new_tokens()
    save_fusion(model, tmp_path)
    assert not torch.equal(fresh(tokens, encoder_input=inputs()), model(tokens, encoder_input=inputs()))
    load_fusion(fresh, tmp_path)
    assert torch.equal(fresh(tokens, encoder_input=inputs()), model(tokens, encoder_input=inputs()))


@heads
def test_compiled_in_one_graph_and_in_bfloat16(tied):
    torch._dynamo.reset()
    model, tokens = learned(tied), text_with_new_tokens()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = model(tokens, encoder_input=inputs())
    torch.testing.assert_close(compiled(tokens, encoder_input=inputs()), expected)
    model.bfloat16()
    given = {"x": inputs()["x"].bfloat16()}
    out = model(tokens, encoder_input=given)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=0.1, atol=0.3)


@heads
def test_early_fusion_scores_new_tokens_too(tied):
    model = fuse(
        tiny_decoder(tied=tied),
        TinyEncoder(),
        arch="joint_decoder",
        placement="prefix",
        fusion_vocab_size=NEW_TOKENS,
        fusion_head=True,
    )
    out = model(text_with_new_tokens(), encoder_input=inputs())
    assert out.shape == (2, 13, VOCAB + NEW_TOKENS)
    assert torch.equal(model(text())[..., :VOCAB], tiny_decoder(tied=tied)(text()))


def _sharded(rank):
    for tied in (False, True):
        whole, model = learned(tied), learned(tied)
        tokens = text_with_new_tokens()
        expected = whole(tokens, encoder_input=inputs())
        expected.square().mean().backward()
        shard(model)
        saved = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        assert list(saved) == list(whole.state_dict())
        out = model(tokens, encoder_input=inputs())
        torch.testing.assert_close(out, expected)
        out.square().mean().backward()
        gradients = {name: p.grad for name, p in named_parameters(whole) if p.grad is not None}
        for name, parameter in named_parameters(model):
            if name in gradients:
                torch.testing.assert_close(parameter.grad.full_tensor(), gradients[name])
        assert "decoder.tok_embeddings.fusion_embedding.weight" in gradients


@pytest.mark.distributed
def test_sharded_models_score_the_same_under_the_same_names():
    run_on_ranks(_sharded)
