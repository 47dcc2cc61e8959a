"""The inclusion against eq. 5 and 30, and each estimator against a surrogate that plain autograd differentiates."""

import math

import pytest
import torch

from shiva_ext.selection import (
    ESTIMATORS,
    CounterfactualEstimator,
    RandomSelector,
    RatioTable,
    ResidualEstimator,
    ShivaRouter,
    anneal,
    get_estimator,
    inclusion,
    perturb,
)

B, N, D, K = 2, 9, 4, 5
# The others train on mixtures of tokens, or on all: see test_relaxed.py.
HARD = [name for name in ESTIMATORS if name not in ("neuralsort_soft", "tnt", "tnt_rescaled")]
NO_NOISE = {"noise_fraction": 0.0}


def double(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def block(tokens):
    """Mixes tokens and channels, as a real block does."""
    return tokens + torch.tanh(tokens.cumsum(dim=1) @ double(D, D, seed=9))


def loss_of(y):
    return (y * double(B, N, D, seed=8)).sum() + (y**2).sum() / 3


# --- inclusion ----------------------------------------------------------------------------------------------------


def test_inclusion_is_equation_30_of_the_soft_rank_of_equation_5():
    scores, tau_rank, tau_sel, k = double(B, N), 0.3, 0.1, 4.3
    pi = inclusion(scores, k, tau_rank, tau_sel, 0.0)
    for b in range(B):
        for i in range(N):
            s = scores[b].tolist()
            rank = 1 + sum(1 / (1 + math.exp(-(s[j] - s[i]) / tau_rank)) for j in range(N) if j != i)
            assert pi[b, i].item() == pytest.approx(1 / (1 + math.exp(-(k - rank) / (tau_sel * N))))


def test_inclusion_is_differentiable_in_the_scores_and_in_k():
    k = torch.tensor(4.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, k: inclusion(s, k, 0.3, 0.1, 0.0), (double(B, N).requires_grad_(), k))


def test_inclusion_tends_to_the_hard_choice_as_the_temperatures_fall():
    scores = double(B, N)
    pi = inclusion(scores, K + 0.5, 1e-4, 1e-4, 0.0)
    chosen = torch.zeros_like(pi).scatter(1, scores.topk(K, dim=1).indices, 1)
    torch.testing.assert_close(pi, chosen, atol=1e-6, rtol=0)


def test_inclusion_is_float32_for_half_precision_scores_and_works_for_one_token():
    assert inclusion(double(B, N).bfloat16(), 3, 0.2, 0.1).dtype == torch.float32
    assert torch.isfinite(inclusion(double(B, 1), 1, 0.2, 0.1)).all()


def test_noise_has_a_fraction_of_the_spread_of_its_row_and_is_reproducible():
    scores = torch.randn(2, 20000) * torch.tensor([[1.0], [50.0]]) + 7
    noise = perturb(scores, 0.1, torch.Generator().manual_seed(0)) - scores
    torch.testing.assert_close(noise.std(dim=1), torch.tensor([0.1, 5.0]), rtol=0.05, atol=0)
    torch.testing.assert_close(perturb(scores, 0.1, torch.Generator().manual_seed(0)) - scores, noise)
    assert perturb(scores, 0.0) is scores


def test_noise_passes_the_gradient_on_unchanged():
    scores = torch.randn(B, N, requires_grad=True)
    perturb(scores, 0.5).sum().backward()
    assert torch.equal(scores.grad, torch.ones(B, N))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"tau_sel": 0.0}, "tau_sel"),
        ({"tau_rank": 0.0}, "tau"),
        ({"tau_rank": -1.0}, "tau"),
        ({"k": torch.ones(2)}, "without axes"),
    ],
)
def test_a_bad_temperature_or_budget_is_an_error(bad, message):
    with pytest.raises(ValueError, match=message):
        inclusion(torch.randn(B, N), **{"k": 3.0, "tau_rank": 0.2, "tau_sel": 0.1, **bad})


def test_annealing_is_a_cosine_from_start_to_end():
    assert [anneal(p, 0.2, 0.02) for p in (-1, 0, 0.5, 1, 2)] == pytest.approx([0.2, 0.2, 0.11, 0.02, 0.02])
    assert anneal(1 / 3, 1.0, 0.0) == pytest.approx(0.75)


# --- estimators ---------------------------------------------------------------------------------------------------


def run(estimator, k_cont=None, update=None, loss=loss_of, k=K, x=None, scores=None):
    """Apply an estimator; returns the output, kept, and the gradients of x, scores and k."""
    x = (double(B, N, D, seed=1) if x is None else x).clone().requires_grad_()
    scores = (double(B, N, seed=2) if scores is None else scores).clone().requires_grad_()
    k_cont = torch.tensor(k + 0.3, dtype=torch.float64, requires_grad=True) if k_cont is None else k_cont
    update = double(*x.shape, seed=3) if update is None else update
    y, kept = estimator.apply(block, x, scores, k_cont, k, update)
    loss(y).backward()
    return y.detach(), kept, x.grad, scores.grad, k_cont.grad


def surrogate(kind, kappa=0.0, sign=1.0):
    """The same by ordinary autograd: `d` has the value 0 and the derivative of the inclusion."""
    x, scores = double(B, N, D, seed=1).requires_grad_(), double(B, N, seed=2).requires_grad_()
    k = torch.tensor(K + 0.3, dtype=torch.float64, requires_grad=True)
    u = double(B, N, D, seed=3)
    pi = inclusion(scores, k, 0.2, 0.1, 0.0)
    d = sign * (pi - pi.detach())[..., None]
    rows = scores.topk(K, dim=1).indices.sort(dim=1).values[..., None].expand(-1, -1, D)
    is_kept = torch.zeros(B, N, 1, dtype=torch.float64).scatter(1, rows[..., :1], 1)
    if kind == "residual":
        out = block((x * 1 + d * x.detach()).gather(1, rows))
        y = (x - d * x.detach()).scatter(1, rows, out)
        loss = loss_of(y)
    else:
        out = block(x.gather(1, rows))
        y = x.scatter(1, rows, out)
        y = y + d * torch.where(is_kept > 0, (y - x).detach(), u)
        loss = loss_of(y) + (d * kappa * (1 - 2 * is_kept) * u.square().sum(-1, keepdim=True)).sum()
    loss.backward()
    return y.detach(), x.grad, scores.grad, k.grad


@pytest.mark.parametrize("flipped", [False, True])
def test_the_residual_estimator_is_the_gradient_of_its_surrogate(flipped):
    y, _, *grads = run(ResidualEstimator(flipped=flipped, **NO_NOISE))
    wanted_y, *wanted = surrogate("residual", sign=-1.0 if flipped else 1.0)
    torch.testing.assert_close(y, wanted_y)
    torch.testing.assert_close(grads, wanted)


@pytest.mark.parametrize("kappa", [0.0, 0.7])
def test_the_counterfactual_estimator_is_the_gradient_of_its_surrogate(kappa):
    y, _, *grads = run(CounterfactualEstimator(kappa=kappa, **NO_NOISE))
    wanted_y, *wanted = surrogate("counterfactual", kappa)
    torch.testing.assert_close(y, wanted_y)
    torch.testing.assert_close(grads, wanted)


def auto_kappa(y, kept, update, loss=loss_of):
    """kappa by a loop over the rejected tokens."""
    y = y.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(y), y)
    rejected = [(b, i) for b in range(y.shape[0]) for i in range(y.shape[1]) if i not in kept[b].tolist()]
    first_order = sum(float(g[b, i] @ update[b, i]) for b, i in rejected)
    return 0.5 * max(0.0, -first_order / sum(float(update[b, i] @ update[b, i]) for b, i in rejected))


@pytest.mark.parametrize("curvature", [1 / 3, -1 / 3])
def test_automatic_kappa_is_half_the_mean_curvature_of_the_rejected_tokens_and_never_negative(curvature):
    x = double(B, N, D, seed=1)
    update = 0.3 * double(B, N, D, seed=3) - x  # towards the origin

    def loss(y):
        return curvature * (y**2).sum()

    y, kept, *grads = run(CounterfactualEstimator(**NO_NOISE), update=update, loss=loss)
    kappa = auto_kappa(y, kept, update, loss)
    assert kappa > 0.1 if curvature > 0 else kappa == 0
    _, _, *wanted = run(CounterfactualEstimator(kappa=kappa, **NO_NOISE), update=update, loss=loss)
    torch.testing.assert_close(grads, wanted)


def test_on_a_quadratic_loss_the_counterfactual_gradient_is_the_true_change_of_the_loss():
    """Every token flipped one at a time, its true change of the loss against the gradient on its inclusion."""
    x, update, h = double(B, N, D, seed=1), double(B, N, D, seed=3), 1.7
    scores = double(B, N, seed=2)

    def loss(y):
        return h / 2 * (y - x - update).square().sum()

    seen = []
    estimator = CounterfactualEstimator(**NO_NOISE)
    original = estimator._run

    def spy(block_fn, x, pi, *rest):
        pi.register_hook(seen.append)
        return original(block_fn, x, pi, *rest)

    estimator._run = spy
    kept = scores.topk(K, dim=1).indices.sort(dim=1).values
    rows = kept[..., None].expand(-1, -1, D)
    y, _ = estimator.apply(
        lambda tokens: tokens + update.gather(1, rows), x, scores.clone().requires_grad_(), K + 0.3, K, update
    )
    loss(y).backward()
    for b in range(B):
        for i in range(N):
            on, off = y.detach().clone(), y.detach().clone()
            on[b, i], off[b, i] = x[b, i] + update[b, i], x[b, i]
            assert seen[0][b, i].item() == pytest.approx((loss(on) - loss(off)).item(), rel=1e-9)


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("k", [0, 1, N])
def test_extreme_budgets_give_finite_gradients(name, k):
    y, kept, *grads = run(get_estimator(name, **NO_NOISE), k=k)
    assert kept.shape == (B, k) and all(torch.isfinite(value).all() for value in (y, *grads))
    if k == 0:
        assert torch.equal(y, double(B, N, D, seed=1))


@pytest.mark.parametrize("name", HARD)
def test_the_output_is_the_hard_choice(name):
    x, scores = double(B, N, D, seed=1), double(B, N, seed=2)
    y, kept, *_ = run(get_estimator(name, **NO_NOISE))
    for b in range(B):
        chosen = sorted(range(N), key=lambda i: -scores[b, i])[:K]
        assert kept[b].tolist() == sorted(chosen)
        wanted = x[b : b + 1].clone()
        wanted[0, kept[b]] = block(x[b : b + 1, kept[b]])[0]
        torch.testing.assert_close(y[b : b + 1], wanted)


@pytest.mark.parametrize("name", HARD)
def test_an_empty_batch_and_a_zero_update_do_no_harm(name):
    x, scores = torch.zeros(0, N, D, dtype=torch.float64), torch.zeros(0, N, dtype=torch.float64)
    estimator = get_estimator(name, **NO_NOISE)
    y, kept = estimator.apply(lambda t: t * 1, x.requires_grad_(), scores.requires_grad_(), 3.5, 3, x.detach())
    y.sum().backward()
    assert y.shape == x.shape and kept.shape == (0, 3)
    *_, grad_scores, grad_k = run(estimator, update=torch.zeros(B, N, D, dtype=torch.float64))
    assert torch.isfinite(grad_scores).all() and torch.isfinite(grad_k)


@pytest.mark.parametrize("name", HARD)
def test_half_precision_tokens_keep_their_dtype_under_autocast(name):
    x, scores = torch.randn(B, N, D).bfloat16().requires_grad_(), torch.randn(B, N, requires_grad=True)
    weight = torch.randn(D, D)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = get_estimator(name).apply(lambda t: (t @ weight).float(), x, scores, 4.5, 4, torch.randn(B, N, D))
        (y.float() ** 2).sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16 and scores.grad.dtype == torch.float32
    assert torch.isfinite(scores.grad).all() and scores.grad.abs().sum() > 0


@pytest.mark.parametrize("name", HARD)
def test_the_same_generator_gives_the_same_bits(name):
    first, second = (run(get_estimator(name, generator=torch.Generator().manual_seed(3))) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["counterfactual", "residual", "residual_flipped", "straight_through"])
def test_noise_perturbs_the_choice_and_the_ranks_alike(name):
    """With enough noise some choice changes, and the inclusion still splits where the choice does."""
    scores, pis = double(1, 64, seed=5), []
    estimator = get_estimator(name, noise_fraction=1.0, tau_rank=(1e-4, 1e-4), tau_sel=(1e-4, 1e-4))
    original = estimator._run

    def spy(block_fn, x, pi, *rest):
        pis.append(pi)
        return original(block_fn, x, pi, *rest)

    estimator._run = spy
    x = double(1, 64, D)
    _, kept = estimator.apply(lambda t: t, x, scores, 20.5, 20, x)
    assert set(kept[0].tolist()) != set(scores.topk(20).indices[0].tolist())
    assert (pis[0][0] > 0.5).nonzero().flatten().tolist() == kept[0].tolist()


def test_progress_anneals_both_temperatures():
    estimator, scores = ResidualEstimator(**NO_NOISE), double(B, N, seed=2)
    soft = run(estimator)[3]
    estimator.progress = 1.0
    hard = run(estimator)[3]
    assert not torch.allclose(soft, hard)
    fixed = ResidualEstimator(tau_rank=(0.02, 0.02), tau_sel=(0.01, 0.01), **NO_NOISE)
    torch.testing.assert_close(run(fixed, scores=scores)[3], hard)


@pytest.mark.parametrize("name", HARD)
def test_a_training_step_compiles_without_a_graph_break(name):
    router, estimator = ShivaRouter(D, 3, 3, num_layers=3), get_estimator(name, **NO_NOISE)
    table, random = RatioTable.fixed(0.5, 3), RandomSelector(0.5)
    t, c, update = torch.randn(B, 3), torch.randn(B, 3), torch.randn(B, N, D)

    def step(x, k_cont):
        scores = router(1, x, t, c) + random.scores(1, x, 0.5)
        y, _ = estimator.apply(torch.tanh, x, scores, k_cont, table.tokens(0.5, N)[1], update)
        return (y**2).sum()

    torch._dynamo.reset()
    results = []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        x = double(B, N, D, seed=1).float().requires_grad_()
        k_cont = torch.tensor(4.5, requires_grad=True)
        router.zero_grad()
        loss = call(x, k_cont)
        loss.backward()
        results.append((loss.detach(), x.grad, k_cont.grad, router.groups[0].proj_x.weight.grad.clone()))
    torch.testing.assert_close(results[0], results[1])


def test_the_counterfactual_estimator_asks_for_the_update():
    x = double(B, N, D)
    for update in (None, x[:, :-1]):
        with pytest.raises(ValueError, match="wanted the dense teacher's block update"):
            CounterfactualEstimator().apply(block, x, double(B, N), 3.5, 3, update)
    ResidualEstimator().apply(block, x, double(B, N), 3.5, 3)


def test_unknown_names_and_kappas_are_errors():
    with pytest.raises(ValueError, match="wanted one of counterfactual, counterfactual_top_k, gumbel"):
        get_estimator("sparsemax")
    with pytest.raises(ValueError, match="wanted 'auto' or a number"):
        get_estimator("counterfactual", kappa="automatic")
    assert isinstance(get_estimator(), CounterfactualEstimator)
