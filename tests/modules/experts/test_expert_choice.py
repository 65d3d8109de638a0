import math
from fractions import Fraction

import pytest
import torch
from torch import nn

from torchfuse.modules.experts.expert_choice import (
    ExpertChoiceRouter,
    ModalityExperts,
    logistic_noise,
    num_taken,
)

DIM = 5
EXPERTS = 3
TOKENS = 23


def tokens(num=TOKENS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, DIM, generator=generator, dtype=torch.float64)


def router(capacity=Fraction(1, EXPERTS), *, noise=False, auxiliary_dim=None, experts=EXPERTS):
    return ExpertChoiceRouter(
        DIM, experts, capacity=capacity, noise=noise, auxiliary_dim=auxiliary_dim
    ).double()


def some_valid(num=TOKENS):
    valid = torch.ones(num, dtype=torch.bool)
    valid[::4] = False
    return valid


def loop(scoring, experts, x, valid, capacity):
    """Expert choice, token by token."""
    scores = [[float(row @ weight) for weight in scoring.weight.detach()] for row in x]
    counted = [t for t in range(len(x)) if valid[t]]
    k = min(len(counted), max(1, math.ceil(capacity * len(counted))))
    out, taken = torch.zeros_like(x), [0] * len(experts)
    for e, expert in enumerate(experts):
        for t in sorted(counted, key=lambda t: -scores[t][e])[:k]:
            out[t] += expert(x[t]) / (1 + math.exp(-scores[t][e]))
            taken[e] += 1
    return out, taken


@pytest.mark.parametrize("capacity", [Fraction(1, 100), Fraction(1, 3), Fraction(7, 10), Fraction(1)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("num", [1, 2, TOKENS])
def test_equals_a_loop_over_tokens(capacity, masked, num):
    x, scoring = tokens(num + masked), router(capacity)
    valid = some_valid(len(x)) if masked else torch.ones(num, dtype=torch.bool)
    experts = nn.ModuleList([nn.Linear(DIM, DIM).double() for _ in range(EXPERTS)])
    expected, taken = loop(scoring, experts, x, valid, capacity)
    out = scoring(x, valid if masked else None).combine(x, experts)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert expected.any()
    assert scoring.taken.tolist() == taken
    assert scoring.num_tokens.item() == valid.sum()


def test_the_count_is_the_ceiling_and_tensors_agree_with_numbers():
    for capacity in (Fraction(1, 7), Fraction(7, 100), Fraction(1)):
        for num in range(31):
            expected = min(num, max(1, math.ceil(capacity * num)))
            assert num_taken(num, capacity) == expected
            assert num_taken(torch.tensor(num), capacity).item() == expected
        counts = [num_taken(num, capacity) for num in range(31)]
        assert counts == sorted(counts)  # so that the static number is never too small


def test_the_noise_is_a_gumbel_minus_a_gumbel():
    noise = logistic_noise(torch.zeros(400_003))
    assert noise.isfinite().all()
    assert noise.mean().abs() < 0.02
    assert abs(noise.var() / (math.pi**2 / 3) - 1) < 0.02
    gumbel = -(-torch.rand(2, 400_003).clamp(min=1e-12).log()).log()
    quantiles = torch.tensor([0.01, 0.2, 0.5, 0.9])
    assert torch.allclose(
        (gumbel[0] - gumbel[1]).quantile(quantiles), noise.quantile(quantiles), atol=0.06
    )
    # It repeats with the seed, and no two entries share a draw.
    torch.manual_seed(5)
    first = logistic_noise(torch.zeros(4, 3))
    torch.manual_seed(5)
    assert torch.equal(first, logistic_noise(torch.zeros(4, 3)))
    assert first.unique().numel() == 12


def test_noise_is_in_training_only_and_can_be_off():
    x = tokens()
    noisy, silent = router(noise=True), router(noise=False)
    silent.load_state_dict(noisy.state_dict())
    assert not torch.equal(noisy(x).weights, silent(x).weights)
    assert not torch.equal(noisy(x).weights, noisy(x).weights)
    assert torch.equal(noisy.eval()(x).weights, silent(x).weights)


def test_the_score_with_noise_is_the_weight():
    x, scoring = tokens(), router(noise=True)
    torch.manual_seed(3)
    dispatch = scoring(x)
    torch.manual_seed(3)
    scores = x @ scoring.weight.t()
    scores = (scores + logistic_noise(scores)).sigmoid()
    assert torch.equal(dispatch.weights, scores.t().gather(1, dispatch.tokens))
    assert torch.equal(scores.topk(8, dim=0).values, dispatch.weights.t())


def test_scores_are_float32_where_weights_and_autocast_are_not():
    x, scoring = tokens().bfloat16(), router().bfloat16()
    expected = x.float() @ scoring.weight.float().t()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dispatch = scoring(x)
    assert dispatch.weights.dtype == torch.float32
    torch.testing.assert_close(dispatch.weights.t(), expected.topk(8, dim=0).values.sigmoid())


@pytest.mark.parametrize("training", [True, False])
def test_in_evaluation_the_auxiliary_router_decides(training):
    x, valid = tokens(), some_valid()
    scoring = router(auxiliary_dim=7).train(training)
    experts = nn.ModuleList([nn.Linear(DIM, DIM).double() for _ in range(EXPERTS)])
    out = scoring(x, valid).combine(x, experts)
    if training:
        expected, _ = loop(scoring, experts, x, valid, Fraction(1, EXPERTS))
    else:
        first, last = scoring.auxiliary.w1, scoring.auxiliary.w2
        expected, taken = torch.zeros_like(x), [0] * EXPERTS
        for t, row in enumerate(x):
            hidden = first.weight @ row + first.bias
            answers = (last.weight @ (hidden * hidden.sigmoid()) + last.bias).sigmoid()
            for e, expert in enumerate(experts):
                if valid[t] and answers[e] > 0.5:
                    expected[t] += (scoring.weight[e] @ row).sigmoid() * expert(row)
                    taken[e] += 1
        assert scoring.taken.tolist() == taken
        assert 0 < sum(taken) < EXPERTS * int(valid.sum())
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_capacity_one_needs_no_auxiliary_router():
    x, scoring = tokens(), router(Fraction(1), auxiliary_dim=7).eval()
    assert scoring.auxiliary is None
    assert not scoring.depends_on_batch
    assert router(auxiliary_dim=None).depends_on_batch
    assert not router(auxiliary_dim=7).depends_on_batch
    expert = nn.ModuleList([nn.Linear(DIM, DIM).double() for _ in range(EXPERTS)])
    whole = scoring(x).combine(x, expert)
    alone = torch.cat([scoring(row[None]).combine(row[None], expert) for row in x])
    torch.testing.assert_close(whole, alone, rtol=1e-12, atol=1e-12)


def group(**options):
    experts = {"image": [nn.Linear(DIM, DIM).double() for _ in range(EXPERTS)]}
    return ModalityExperts(experts, {"image": router(auxiliary_dim=7)}, **options)


@pytest.mark.parametrize("num", [0, 4])
def test_without_a_token_all_is_finite_and_gradients_are_zero(num):
    x = tokens(2 * num).view(2, num, DIM).requires_grad_()
    experts = group()
    out = experts("image", x, torch.zeros(2, num, dtype=torch.bool))
    assert out.shape == x.shape
    assert not out.any()
    (out.sum() + 1).backward()
    assert not x.grad.any()
    for name, p in experts.named_parameters():
        assert p.grad is not None and not p.grad.any(), name
    assert experts.router("image").taken.tolist() == [0] * EXPERTS
    assert experts.router("image").num_tokens.item() == 0


def test_a_token_that_does_not_count_is_never_read():
    x, valid = tokens(14).view(2, 7, DIM), torch.ones(2, 7, dtype=torch.bool)
    valid[0, 2:5] = False
    experts = group()
    junk = torch.where(valid[..., None], x, torch.nan).requires_grad_()
    for mode in (True, False):
        experts.train(mode)
        out = experts("image", junk, valid)
        assert torch.equal(out, experts("image", x, valid))
        assert not out[~valid].any()
    experts.train()("image", junk, valid).square().sum().backward()
    assert not junk.grad[~valid].any()
    assert junk.grad[valid].any()
    assert all(p.grad.isfinite().all() for p in experts.parameters())


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
def test_the_auxiliary_loss_joins_backward_and_stays_to_itself(weight):
    x, valid = tokens(14).view(2, 7, DIM), torch.ones(2, 7, dtype=torch.bool)
    valid[1, 4:] = False
    experts, plain = group(auxiliary_loss_weight=weight), group()
    plain.load_state_dict(experts.state_dict())
    scoring = plain.router("image")
    flat = torch.where(valid[..., None], x, 0).flatten(0, 1)
    taken = scoring(flat, valid.flatten())
    target = torch.zeros(14, EXPERTS, dtype=torch.float64)
    for e in range(EXPERTS):
        for t, w in zip(taken.tokens[e], taken.weights[e], strict=True):
            target[t, e] = float(w > 0)
    assert target.sum() == EXPERTS * 4  # a third of 11, rounded up
    predicted = scoring.auxiliary(flat[valid.flatten()])
    expected = nn.functional.binary_cross_entropy_with_logits(predicted, target[valid.flatten()])
    torch.testing.assert_close(taken.loss, expected)

    (weight * expected + 3 * taken.combine(flat, plain.experts["image"]).sum()).backward()
    inputs = x.clone().requires_grad_()
    (3 * experts("image", inputs, valid).sum()).backward()
    for (name, p), other in zip(experts.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, other.grad, msg=name)
        assert p.grad.any() or (weight == 0 and "auxiliary" in name), name
    without = group(auxiliary_loss_weight=0.0)
    without.load_state_dict(experts.state_dict())
    same = x.clone().requires_grad_()
    (3 * without("image", same, valid).sum()).backward()
    assert torch.equal(same.grad, inputs.grad)


@pytest.mark.parametrize("num", [1, 3])
def test_scaled_by_the_number_of_batches_the_auxiliary_loss_is_their_mean(num):
    batches = [torch.randn(2, 7, DIM, dtype=torch.float64) for _ in range(num)]
    experts, alone = group(auxiliary_loss_weight=0.7), []
    for x in batches:
        experts.zero_grad()
        experts("image", x).sum().backward()
        alone.append({name: p.grad.clone() for name, p in experts.named_parameters()})
    experts.zero_grad()
    experts.auxiliary_loss_scale = 1 / num
    for x in batches:
        experts("image", x).sum().backward()
    for name, p in experts.named_parameters():
        added = sum(gradients[name] for gradients in alone)
        assert added.any(), name
        torch.testing.assert_close(p.grad, added / num if "auxiliary" in name else added, msg=name)


def test_stand_ins_leave_the_rest_alone():
    experts, y = group(), torch.randn(2, 3, DIM, dtype=torch.float64, requires_grad=True)
    experts("image", tokens(7).view(1, 7, DIM))
    router = experts.router("image")
    router.noise = True
    state = torch.get_rng_state()
    out = experts.keep_in_graph("image", tokens(2).view(1, 2, DIM), y)
    assert torch.equal(out, y)
    assert torch.equal(state, torch.get_rng_state())
    assert router.num_tokens.item() == 7
    out.sum().backward()
    assert torch.equal(y.grad, torch.ones_like(y))
    for name, p in experts.named_parameters():
        assert p.grad is not None and not p.grad.any(), name


def test_auxiliary_routers_learn_the_choice():
    torch.manual_seed(3)
    experts = ModalityExperts(
        {"image": [nn.Linear(DIM, DIM) for _ in range(EXPERTS)]},
        {
            "image": ExpertChoiceRouter(
                DIM, EXPERTS, capacity=Fraction(1, EXPERTS), noise=False, auxiliary_dim=16
            )
        },
    )
    optimizer = torch.optim.Adam(experts.router("image").auxiliary.parameters(), lr=2e-2)

    def accuracy():
        x = torch.randn(1, 501, DIM)
        scoring = experts.router("image")
        chosen = torch.zeros(501, EXPERTS, dtype=torch.bool)
        chosen.scatter_(0, scoring.train()(x[0]).tokens.t(), True)
        foretold = scoring.eval()(x[0]).weights.t() > 0
        return (chosen == foretold).double().mean().item()

    majority = 2 / 3
    assert accuracy() < majority + 0.02
    experts.train()
    for _ in range(200):
        optimizer.zero_grad()
        experts.train()("image", torch.randn(4, 64, DIM)).sum().backward()
        optimizer.step()
    assert accuracy() > 0.93
