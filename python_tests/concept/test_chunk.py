"""Cutting sequences into concepts and putting them back: the published figures, causality, loops by hand."""

import pytest
import torch

from shiva_ext.concept import Chunk, Dechunk, ratio_loss, sharpen

D = 12


def make_chunk(**options) -> Chunk:
    torch.manual_seed(0)
    return Chunk(D, **options)


@pytest.mark.parametrize(("F", "G", "wanted"), [(0.5, 0.5, 1.0), (0.25, 0.25, 1.25), (0.6, 0.55, 1.02)])
def test_the_ratio_loss_has_the_published_values(F, G, wanted):
    boundary = torch.arange(20) < round(20 * F)
    probability = torch.full((20,), G, requires_grad=True)
    loss = ratio_loss(boundary, probability, 2.0)
    assert loss.item() == pytest.approx(wanted)
    (grad,) = torch.autograd.grad(loss, probability)
    assert grad.sum().item() == pytest.approx(2 * F - 2 * (1 - F), abs=1e-6)


@pytest.mark.parametrize(
    ("p", "six", "four"), [(0.1, 0.0174, 0.0260), (0.3, 0.0577, 0.0853), (0.7, 0.9423, 0.9147), (0.5, 0.8909, 0.8409)]
)
def test_boundaries_are_drawn_by_the_published_probabilities(p, six, four):
    value = torch.tensor(p, dtype=torch.float64)
    assert sharpen(value, 6).item() == pytest.approx(six, abs=1e-4)
    assert sharpen(value, 4).item() == pytest.approx(four, abs=1e-4)


def test_a_boundary_compares_the_query_with_the_key_before():
    chunk, x = make_chunk().eval(), torch.randn(2, 9, D)
    p = chunk.probability(x)
    assert (p[:, 0] == 1).all()
    q, k = chunk.query(x), chunk.key(x)
    for b in range(2):
        for n in range(1, 9):
            cosine = torch.dot(q[b, n], k[b, n - 1]) / (q[b, n].norm() * k[b, n - 1].norm())
            assert p[b, n].item() == pytest.approx((1 - cosine.item()) / 2, abs=1e-5)


def by_hand(chunk: Chunk, x: torch.Tensor):
    """Concepts of one sample [N,D], and each token's concept."""
    boundary = chunk.probability(x[None])[0] >= 0.5
    starts = boundary.nonzero()[:, 0].tolist()
    ends = [*starts[1:], len(x)]
    pieces = [x[a:b] for a, b in zip(starts, ends, strict=True)]
    reduce = {"sum": lambda t: t.sum(dim=0), "last": lambda t: t[-1], "first": lambda t: t[0]}[chunk.reduction]
    number = [sum(s <= n for s in starts) - 1 for n in range(len(x))]
    seen = number if chunk.reduction == "first" else [n - 1 for n in number]
    return torch.stack([reduce(piece) for piece in pieces]), seen, starts


@pytest.mark.parametrize("reduction", ["sum", "last", "first"])
def test_a_batch_is_cut_as_each_sample_by_itself(reduction):
    chunk, x = make_chunk(reduction=reduction).eval(), torch.randn(4, 30, D)
    concepts, chunks = chunk(x)
    sizes = set()
    for b in range(4):
        wanted, seen, starts = by_hand(chunk, x[b])
        sizes.add(len(wanted))
        torch.testing.assert_close(concepts[b, : len(wanted)], wanted, rtol=1e-4, atol=1e-5)
        assert chunks.concept[b].tolist() == seen and chunks.position[b, : len(starts)].tolist() == starts
    assert len(sizes) > 1 and concepts.shape[1] == max(sizes)


@pytest.mark.parametrize("reduction", ["sum", "last", "first"])
@pytest.mark.parametrize("fixed", [False, True])
def test_no_token_sees_a_later_one(reduction, fixed):
    chunk, dechunk = make_chunk(reduction=reduction, fixed=fixed).eval(), Dechunk()

    def run(x):
        concepts, chunks = chunk(x)
        concepts = concepts.cumsum(dim=1).tanh()  # a causal model
        return dechunk(x, concepts, chunks)[0]

    x = torch.randn(3, 24, D)
    before = run(x)
    for n in range(24):
        changed = x.clone()
        changed[:, n] = torch.randn(3, D)
        torch.testing.assert_close(run(changed)[:, :n], before[:, :n], rtol=1e-4, atol=1e-5)


def test_every_token_its_own_concept_gives_it_back():
    chunk, dechunk = make_chunk(reduction="first").eval(), Dechunk()
    with torch.no_grad():
        chunk.key.weight.copy_(-chunk.query.weight)
    x = torch.randn(1, 1, D).expand(2, 8, D)  # all alike, so that p is 1 everywhere
    concepts, chunks = chunk(x)
    assert chunks.boundary.all() and concepts.shape == x.shape
    z, mine = dechunk(torch.zeros_like(x), concepts, chunks)
    torch.testing.assert_close(z, x)
    torch.testing.assert_close(mine, x)


def test_the_average_is_the_loop_and_the_factor_is_one():
    chunk, dechunk = make_chunk(reduction="first").eval(), Dechunk()
    x = torch.randn(2, 20, D, requires_grad=True)
    concepts, chunks = chunk(x)
    z, mine = dechunk(x, concepts, chunks)
    for b in range(2):
        state, averages = torch.zeros(D), []
        count = int(chunks.boundary[b].sum())
        for m in range(count):
            p = 1.0 if m == 0 else chunks.probability[b, chunks.position[b, m]].item()
            state = p * concepts[b, m].detach() + (1 - p) * state
            averages.append(state)
        wanted = torch.stack([averages[c] for c in chunks.concept[b].tolist()])
        torch.testing.assert_close(mine[b].detach(), wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(z, x + mine)
    grads = torch.autograd.grad(z.square().sum() + chunks.loss, [x, chunk.query.weight, chunk.key.weight])
    assert all(g.isfinite().all() and g.any() for g in grads)


@pytest.mark.parametrize(("ratio", "wanted"), [(2.0, [0, 2, 4, 6, 8]), (1.5, [0, 2, 3, 5, 6, 8, 9])])
def test_fixed_chunks(ratio, wanted):
    _, chunks = make_chunk(ratio=ratio, fixed=True)(torch.randn(1, 10, D))
    assert chunks.boundary[0].nonzero()[:, 0].tolist() == wanted


def test_noise_is_for_training_alone():
    chunk, x = make_chunk(tau=4.0), torch.randn(8, 200, D)
    flipped = []
    for seed in (0, 1):
        _, chunks = chunk.train()(x, torch.Generator().manual_seed(seed))
        flipped.append(chunks.boundary)
        assert chunks.boundary[:, 0].all()
    _, still = chunk.eval()(x)
    share = (flipped[0] != still.boundary).float().mean().item()
    assert 0.01 < share < 0.2 and not torch.equal(*flipped)


@pytest.mark.parametrize("reduction", ["sum", "last", "first"])
def test_one_token_is_one_concept(reduction):
    chunk, x = make_chunk(reduction=reduction).eval(), torch.randn(3, 1, D)
    concepts, chunks = chunk(x)
    torch.testing.assert_close(concepts, x)
    z, _ = Dechunk()(x, concepts, chunks)
    torch.testing.assert_close(z, 2 * x if reduction == "first" else x)


def test_a_sum_keeps_its_precision_in_a_long_sequence():
    chunk, x = make_chunk(reduction="sum", ratio=4.0, fixed=True).eval(), 1e4 + torch.randn(1, 20_000, D)
    concepts, _ = chunk(x)
    wanted = x.double().view(1, 5_000, 4, D).sum(dim=2)
    torch.testing.assert_close(concepts.double(), wanted, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("reduction", ["sum", "last", "first"])
def test_nan_stays_in_its_sample(reduction):
    chunk, dechunk = make_chunk(reduction=reduction).eval(), Dechunk()

    def run(x):
        concepts, chunks = chunk(x)
        return dechunk(x, concepts, chunks)[0]

    for seed in range(40):
        x = torch.randn(3, 20, D, generator=torch.Generator().manual_seed(seed))
        clean = run(x)
        x[1, 5] = torch.nan
        found = run(x)
        torch.testing.assert_close(found[[0, 2]], clean[[0, 2]], rtol=1e-5, atol=1e-6)
        assert found[1, 5].isnan().all() and found[1, :5].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_straight_through_factor_is_exactly_one(dtype):
    chunk, dechunk = make_chunk(reduction="first").to(dtype).eval(), Dechunk()
    x = torch.randn(4, 200, D, dtype=dtype)
    concepts, chunks = chunk(x)
    z, mine = dechunk(torch.zeros_like(x), concepts, chunks)
    assert torch.equal(z, mine) and z.dtype == dtype and chunks.probability.dtype == torch.float32


@pytest.mark.parametrize("reduction", ["sum", "last", "first"])
def test_padding_that_is_marked_changes_nothing(reduction):
    chunk, dechunk = make_chunk(reduction=reduction).eval(), Dechunk()
    x, lengths = torch.randn(3, 30, D), [30, 12, 1]
    padded = torch.zeros(3, 50, D)
    padded[:, :30] = x
    valid = torch.arange(50) < torch.tensor(lengths)[:, None]
    concepts, chunks = chunk(padded, valid=valid)
    z, _ = dechunk(padded, concepts, chunks)
    found, seen = [], []
    for b, length in enumerate(lengths):
        alone, own = chunk(x[b : b + 1, :length])
        torch.testing.assert_close(z[b, :length], dechunk(x[b : b + 1, :length], alone, own)[0][0])
        found.append(own.boundary[0])
        seen.append(own.probability[0])
    assert chunks.loss.item() == pytest.approx(ratio_loss(torch.cat(found), torch.cat(seen), 2.0).item(), rel=1e-5)
    with pytest.raises(ValueError, match="True at each sample's first token"):
        chunk(padded, valid=~valid)


def test_fixed_chunks_whatever_the_default_dtype_is():
    x = torch.randn(1, 5000, D)
    wanted = [n for n in range(5000) if n == 0 or (n * 2) // 3 != ((n - 1) * 2) // 3]
    try:
        torch.set_default_dtype(torch.bfloat16)
        chunk = make_chunk(ratio=1.5, fixed=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert chunk(x)[1].boundary[0].nonzero()[:, 0].tolist() == wanted and not list(chunk.parameters())


def test_noise_looks_at_no_later_token():
    chunk, x = make_chunk(reduction="first").train(), torch.randn(2, 24, D)
    before = chunk(x, torch.Generator().manual_seed(3))[1].boundary
    for n in range(24):
        changed = x.clone()
        changed[:, n:] = torch.randn(2, 24 - n, D)
        after = chunk(changed, torch.Generator().manual_seed(3))[1].boundary
        assert torch.equal(after[:, :n], before[:, :n])


@pytest.mark.parametrize("shape", [(2, 0, D), (0, 4, D), (4, D)])
def test_no_tokens_are_refused(shape):
    with pytest.raises(ValueError, match="with a token at least"):
        make_chunk()(torch.zeros(shape))


@pytest.mark.parametrize("reduction", ["sum", "last", "first"])
def test_gradients_to_tokens_are_those_of_finite_differences(reduction):
    """Where no boundary moves; what the factor adds for the choice is not a derivative, so it is left out."""
    chunk, dechunk = make_chunk(reduction=reduction).double().eval(), Dechunk()
    x = torch.randn(3, 9, D, dtype=torch.float64, requires_grad=True)
    _, chunks = chunk(x)
    counts = chunks.boundary.sum(dim=1)
    assert counts.min() < counts.max() < 8  # so that there is padding, and tokens share concepts

    def run(x):
        concepts, chunks = chunk(x)
        return x + dechunk(x, concepts.tanh(), chunks)[1]

    assert torch.autograd.gradcheck(run, (x,), eps=1e-6)
    assert torch.autograd.gradcheck(lambda x: (run(x) * torch.linspace(-1, 2, D)).sum(), (x,), eps=1e-6)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"ratio": 1.0}, "above 1, got 1.0"), ({"reduction": "mean"}, "sum, last, first"), ({"tau": 0.5}, "at least 1")],
)
def test_wrong_settings_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        make_chunk(**wrong)
