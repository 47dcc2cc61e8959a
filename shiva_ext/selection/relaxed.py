"""Estimators of the field, behind the interface of :class:`Estimator`: other relaxations of a hard top-k.

All execute the hard choice and relax it in the backward pass alone (straight-through), except where their class says
otherwise: a budget that is exact in training, too, is what they are compared under. ``k`` may lie between two integers,
so that a policy learns from them: between k and k + 1 a relaxation is interpolated.
"""

import torch
from torch import Tensor

from .. import ops
from .estimator import CounterfactualEstimator, Estimator, anneal


def gumbel(scores: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Scores plus Gumbel noise: the k largest are k draws without replacement from softmax(scores)."""
    uniform = torch.rand(scores.shape, generator=generator, dtype=scores.dtype, device=scores.device)
    return scores - torch.log(-torch.log(uniform.clamp(torch.finfo(scores.dtype).tiny, 1 - 1e-7)))


def soft_top_k(keys: Tensor, k: Tensor | float, whole: int, tau: float) -> Tensor:
    """sigmoid((key - threshold) / tau), the threshold halfway between the k-th and the next key.

    Args:
        keys: [B,N].
        k: whole <= k <= whole + 1; differentiable.
        whole: 0 <= whole <= N.
        tau: temperature, in units of the keys.

    Returns:
        [B,N] in (0, 1); about k in sum.
    """
    N = keys.shape[-1]
    # As a constant: else the two keys beside it would hear of all others.
    ordered = keys.detach().sort(dim=-1, descending=True).values
    ordered = torch.cat([ordered[..., :1] + tau, ordered, ordered[..., -1:] - tau], dim=-1)
    between = (ordered[..., :-1] + ordered[..., 1:]) / 2  # [B,N+1]: the threshold for 0..N tokens
    threshold = between[..., whole] + (k - whole) * (between[..., min(whole + 1, N)] - between[..., whole])
    return torch.sigmoid((keys - threshold[..., None]) / tau)


def subset_operator(keys: Tensor, k: Tensor | float, whole: int, tau: float) -> Tensor:
    """The relaxed k-hot vector of Xie & Ermon (arXiv 1901.10517): k softmaxes, each without what was taken before.

    O(k N) one after the other: for a k of tens. An entry can exceed 1.

    Args:
        keys: [B,N], perturbed scores.
        k: whole <= k <= whole + 1; the last softmax counts by its fraction.
        whole: 0 <= whole <= N.
        tau: temperature.

    Returns:
        [B,N]; k in sum.
    """
    tiny = torch.finfo(torch.float32).tiny
    taken, total = torch.zeros_like(keys), torch.zeros_like(keys)
    for step in range(whole + 1):
        keys = keys + torch.log((1 - taken).clamp_min(tiny))
        # Behind the last token there is none.
        taken = torch.softmax(keys / tau, dim=-1) if step < keys.shape[-1] else torch.zeros_like(keys)
        total = total + taken * (1 if step < whole else k - whole)
    return total


def neural_sort(scores: Tensor, rows: int, tau: float) -> Tensor:
    """The first rows of NeuralSort's relaxed permutation (arXiv 1903.08850): row i softly chooses the i-th largest.

    ``softmax(((N + 1 - 2 i) s - A 1) / tau)`` with ``A_ij = |s_i - s_j|``, whose row sums come from one sort.

    Args:
        scores: s, [B,N].
        rows: how many of the N.
        tau: temperature; the logits grow with N times the scores' range.

    Returns:
        [B,rows,N]; each row sums to 1 and is largest at the i-th largest score.
    """
    N = scores.shape[-1]
    ordered, index = scores.sort(dim=-1, descending=True)
    below = ordered.flip(-1).cumsum(-1).flip(-1) - ordered  # of all smaller ones
    above = ordered.cumsum(-1) - ordered
    place = torch.arange(N, device=scores.device, dtype=scores.dtype)
    sums = (above - place * ordered) + ((N - 1 - place) * ordered - below)
    sums = torch.zeros_like(scores).scatter(-1, index, sums)
    factor = N - 1 - 2 * place[:rows]
    return torch.softmax((factor[:, None] * scores[..., None, :] - sums[..., None, :]) / tau, dim=-1)


class StraightThroughEstimator(Estimator):
    """Eq. 7 of Shiva-DiT without its residual half: pi multiplies the kept tokens at the block's entry.

    A rejected token gets no gradient.
    """

    def _run(self, block_fn, x, pi, kept, rejected, update):
        chosen = pi.gather(1, kept)[..., None]
        selected = ops.token_gather(x, kept)
        # The value of 1, the derivative of pi.
        selected = selected * (1 + chosen - chosen.detach()).to(x.dtype)
        return ops.token_scatter(x, kept, block_fn(selected).to(x.dtype))


class RelaxedEstimator(Estimator):
    """A relaxation of the choice gates what the block adds: dL/dpi_i = <g_i, y_i - x_i> for a kept token, else 0.

    Args:
        relaxation: "soft_top_k", "subset" or "neuralsort": the functions of this module.
        noise: "gaussian" as in :func:`perturb`, or "gumbel", of scale 1 (none if ``noise_fraction`` is 0).
        tau: (start, end) of its temperature. NeuralSort's counts in shares of N, as its logits grow with N.
        **options: see :class:`Estimator`.
    """

    def __init__(
        self,
        relaxation: str = "soft_top_k",
        noise: str = "gaussian",
        tau: tuple[float, float] = (1.0, 0.1),
        **options,
    ):
        super().__init__(**options)
        if relaxation not in ("soft_top_k", "subset", "neuralsort") or noise not in ("gaussian", "gumbel"):
            raise ValueError(
                f"RelaxedEstimator: relaxation is {relaxation!r} and noise {noise!r}, wanted 'soft_top_k', 'subset' or "
                "'neuralsort', and 'gaussian' or 'gumbel'"
            )
        self.relaxation, self.noise, self.tau = relaxation, noise, tau

    def perturb(self, scores: Tensor) -> Tensor:
        if self.noise == "gumbel" and self.noise_fraction > 0:
            return gumbel(scores, self.generator)
        return super().perturb(scores)

    def inclusion(self, keys: Tensor, k: Tensor | float, k_int: int) -> Tensor:
        tau, N = anneal(self.progress, *self.tau), keys.shape[-1]
        if self.relaxation == "soft_top_k":
            return soft_top_k(keys, k, k_int, tau)
        if self.relaxation == "subset":
            return subset_operator(keys, k, k_int, tau)
        rows = neural_sort(keys, min(k_int + 1, N), tau * N)
        total = rows[..., :k_int, :].sum(dim=-2)
        following = rows[..., k_int, :] if k_int < N else torch.zeros_like(keys)  # there is no further token
        return total + (k - k_int) * following

    def _run(self, block_fn, x, pi, kept, rejected, update):
        src = block_fn(ops.token_gather(x, kept)).to(x.dtype)
        return ops.counterfactual_scatter(x, kept, src, pi, torch.zeros_like(x), 0.0)


class CounterfactualTopKEstimator(CounterfactualEstimator):
    """The counterfactual estimator through a sigmoid around the k-th key instead of soft ranks.

    A token's score then hears of its own worth alone, not of its neighbours' in the ranking.

    Args:
        tau: (start, end) of the sigmoid's temperature, in standard deviations of a row's keys.
        **options: see :class:`CounterfactualEstimator`.
    """

    def __init__(self, tau: tuple[float, float] = (1.0, 0.1), **options):
        super().__init__(**options)
        self.tau = tau

    def inclusion(self, keys: Tensor, k: Tensor | float, k_int: int) -> Tensor:
        spread = keys.detach().std(dim=-1, correction=0, keepdim=True).clamp_min(1e-6)
        return soft_top_k(keys / spread, k, k_int, anneal(self.progress, *self.tau))


class SoftSortEstimator(RelaxedEstimator):
    """NeuralSort without the straight-through step: the block sees k mixtures of tokens, P x, and what it adds to them
    is spread by the transpose of P.

    Not the hard choice that inference makes, and no gradient to k; the mixtures cost 2 k N D operations a block.
    """

    def __init__(self, noise: str = "gaussian", tau: tuple[float, float] = (1.0, 0.1), **options):
        super().__init__("neuralsort", noise, tau, **options)

    def inclusion(self, keys: Tensor, k: Tensor | float, k_int: int) -> Tensor:
        return neural_sort(keys, k_int, anneal(self.progress, *self.tau) * keys.shape[-1])

    def _run(self, block_fn, x, pi, kept, rejected, update):
        pi = pi.to(x.dtype)
        mixed = pi @ x
        return x + pi.transpose(1, 2) @ (block_fn(mixed).to(x.dtype) - mixed)


class NoiseEstimator(Estimator):
    """TNT's noise allocation (arXiv 2411.18092, per its released code): all tokens are processed, with noise.

    A token's noise has the standard deviation ``scale (1 - a)``, with a the softmax of the scores over the tokens; it
    is added at the block's entry, after a LayerNorm only in the released code, whose test run lacks it. There is no
    hard choice in training and no gradient to k.

    Args:
        rescaled: ``1 - a / max a`` instead, which spreads over [0, 1]; as released nearly all tokens get the same.
        scale: as released .02, for tokens after a LayerNorm; here times the standard deviation of x.
        **options: see :class:`Estimator`.
    """

    def __init__(self, rescaled: bool = False, scale: float = 0.02, **options):
        super().__init__(**options)
        self.rescaled, self.scale = rescaled, scale

    def perturb(self, scores: Tensor) -> Tensor:
        return scores

    def inclusion(self, keys: Tensor, k: Tensor | float, k_int: int) -> Tensor:
        share = torch.softmax(keys, dim=-1)
        return share / share.amax(dim=-1, keepdim=True) if self.rescaled else share

    def choose(self, keys: Tensor, k_int: int) -> tuple[Tensor, Tensor]:
        return ops.topk_select(keys.detach(), keys.shape[-1])

    def _run(self, block_fn, x, pi, kept, rejected, update):
        noise = torch.randn(x.shape, generator=self.generator, dtype=torch.float32, device=x.device)
        spread = self.scale * x.detach().float().std() * (1 - pi)[..., None]
        return block_fn(x + (spread * noise).to(x.dtype)).to(x.dtype)
