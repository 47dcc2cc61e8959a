"""What the kernels of ptx_kernels.py compute, as torch functions of their arguments of the same names.

The comparison is over the reals, but it does not see every equality: a sum is written in the order and the groups in
which the kernel forms it, exp as nvcc compiles expf, and positions as the slices that they stand for.
"""

import torch
from ptx_kernels import EPS, INDEX, KAPPA, LIMIT, ORDERS, POSITION, SCALE, STARTS, K


def total(x):
    """The sum of the last dimension, term by term."""
    return sum([x[..., i] for i in range(1, x.shape[-1])], start=x[..., 0])


def total_of_packs(x):
    """The same of a row that was read four elements at a time."""
    packs = x.reshape(*x.shape[:-1], -1, 4)
    return total(packs[..., 0] + packs[..., 1:].sum(-1))


def exp(x):
    """2^(x log2(e)), the logarithm as expf's two constants."""
    return torch.exp2(x * 12102203.0 / 8388608.0 + x * 338819.0 / 17592186044416.0)


# ---- rows. INDEX says which are kept, and where they go; of FIRST_INDEX, used where there are sums, they are [:, :K].
# The docstring of a reference is the formula in the table of docs/ptx_proofs.md.


def picked(x):
    """[B, k, ...]: the rows of x [B, N, ...] at INDEX."""
    return torch.stack([torch.stack([x[b, t] for t in row]) for b, row in enumerate(INDEX)])


def placed(row_of):
    """[B, N, ...] of row_of(b, t, place)."""
    return torch.stack(
        [torch.stack([row_of(b, t, place) for t, place in enumerate(row)]) for b, row in enumerate(POSITION)]
    )


def token_gather(x):
    """x[b, index[b, j]]"""
    return picked(x)


def token_gather_backward(grad):
    """grad[b, position[b, t]], or 0"""
    return placed(lambda b, t, place: grad[b, place] if place >= 0 else torch.zeros_like(grad[0, 0]))


def token_gather_table_backward(grad):
    """sum over b of grad[b, position[b, t]]"""
    kept = [[(b, row[t]) for b, row in enumerate(POSITION) if row[t] >= 0] for t in range(len(POSITION[0]))]
    return torch.stack([sum((grad[place] for place in places[1:]), start=grad[places[0]]) for places in kept])


def token_scatter(base, src):
    """src[b, position[b, t]], or base[b, t]"""
    return placed(lambda b, t, place: src[b, place] if place >= 0 else base[b, t])


def token_scatter_in_place(src):
    """base[b, index[b, j]] = src[b, j]"""
    return torch.stack([torch.stack([src[b, row.index(t)] for t in range(len(row))]) for b, row in enumerate(ORDERS)])


def token_scatter_backward(grad):
    """grad, 0 at kept rows; grad[b, index[b, j]]"""
    return placed(lambda b, t, place: torch.zeros_like(grad[b, t]) if place >= 0 else grad[b, t]), picked(grad)


def residual_gate(x):
    """x[b, index[b, j]]; x"""
    return picked(x), x.clone()


def inverse_index(index):
    """the j for which index[b, j] = t, or -1"""
    t = torch.arange(3, dtype=torch.uint8, device=index.device).view(1, 3, 1)  # [0, 1, -1] and [-1, 0, 1] as bytes
    lowest = torch.cat([torch.where(t < 2, t, 255), torch.where(t < 1, 255, t - 1)])
    others = torch.cat([torch.where(t < 2, t * 0, 255), torch.where(t < 1, 255, t * 0)])
    return torch.cat([lowest] + [others] * 7, 2)


def residual_gate_backward(grad_selected, grad_base, x):
    """grad_base + grad_selected; <grad_selected, x> or -<grad_base, x>"""
    grad_x = torch.cat([grad_base[:, :K] + grad_selected, grad_base[:, K:]], 1)
    kept, rejected = (grad_selected * x[:, :K]).sum(-1), -(grad_base[:, K:] * x[:, K:]).sum(-1)
    return grad_x, torch.cat([kept, rejected], 1)


def counterfactual_scatter_backward(grad, base, src, update, position):
    """0 or grad; grad; <grad, src - base> - kappa <update, update> or <grad, update> + kappa <update, update>"""
    square = KAPPA * (update * update).sum(-1)
    kept, rejected = (grad[:, :K] * (src - base[:, :K])).sum(-1), (grad * update)[:, K:].sum(-1)
    slope = torch.cat([kept, rejected], 1) + torch.where(position.view(square.shape) < 0, square, -square)
    return torch.cat([torch.zeros_like(src), grad[:, K:]], 1), grad[:, :K].clone(), slope


def scatter_residual(base, update, gate):
    """base + gate * update at kept rows"""
    return torch.cat([base[:, :K] + gate.unsqueeze(1) * update, base[:, K:]], 1)


def scatter_residual_backward(grad, update, gate):
    """gate * grad[b, index[b, j]]; sums of grad * update over chunks of rows"""
    product = grad[:, :K] * update
    return gate.unsqueeze(1) * grad[:, :K], torch.stack([product[:, :3].sum(1), product[:, 3:].sum(1)], 1)


# ---- scatter_mean, of tokens sorted by group. Counts come from start: the tool does not see that it holds constants.


def members(start, m):
    """[B, 1]: how many tokens group m has"""
    rows = start.view(-1, len(STARTS))
    return (rows[:, m + 1] - rows[:, m]).float().unsqueeze(1)


def scatter_mean(x, start):
    """the mean of each group's rows of x, or 0"""

    def mean(m, begin, end):
        return x[:, begin:end].sum(1) / members(start, m).clamp_min(1) if end > begin else torch.zeros_like(x[:, 0])

    return torch.stack([mean(m, *group) for m, group in enumerate(zip(STARTS, STARTS[1:], strict=False))], 1)


# ---- gather_modulate, of the first two tokens


def normal_and_inverse_std(rows):
    D = rows.shape[-1]
    centred = rows - (total_of_packs(rows) / D).unsqueeze(-1)
    inverse_std = (1 / torch.sqrt(total(centred * centred) / D + EPS)).unsqueeze(-1)
    return centred * inverse_std, inverse_std


def gather_modulate(x, shift, scale):
    """LayerNorm(x) * (1 + scale) + shift"""
    normal, _ = normal_and_inverse_std(x[:, :2])
    return normal * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def gather_modulate_backward(grad, x, scale):
    """(g - mean(g) - n mean(g n)) / std for g = grad (1 + scale), n = LayerNorm(x); sums of grad and of grad n"""
    normal, inverse_std = normal_and_inverse_std(x[:, :2])
    slope, D = grad * (1 + scale.unsqueeze(1)), x.shape[2]
    mean, mean_dot = (total(slope) / D).unsqueeze(-1), (total(slope * normal) / D).unsqueeze(-1)
    partial = torch.stack([grad.sum(1), (grad * normal).sum(1)], 1)
    return inverse_std * (slope - mean - normal * mean_dot), partial


def sum_chunks(partial):
    """sum of the chunks"""
    D = partial.shape[2] // 2
    return partial[:, :, :D].sum(1), partial[:, :, D:].sum(1)


# ---- router_score


def product(a, b):
    """a b^T"""
    return torch.mm(a.float(), b.float().t())


def product_transposed_b(a, b):
    """a b"""
    return torch.mm(a.float(), b.float())


def product_transposed_splits(a, b):
    """a^T b, of each split"""
    a, b = a.float(), b.float()
    return torch.stack([torch.mm(a[:32].t(), b[:32]), torch.mm(a[32:].t(), b[32:])])


def score(hidden, context, ln_weight, ln_bias, w_out):
    """-> SiLU(hidden + context), its scores"""
    H, v = hidden.shape[1], hidden + context[0]
    a = v * (1 / (1 + exp(-v)))
    centred = a - (total(a) / H).unsqueeze(-1)
    inverse_std = 1 / torch.sqrt(total(centred * centred) / H + EPS)
    return a, (total(centred * (ln_weight * w_out)) * inverse_std + total(ln_bias * w_out)).unsqueeze(0)


def router_score_mma(x, w_in, context, ln_weight, ln_bias, w_out):
    """<LayerNorm(SiLU(x w_in^T + context)), w_out>"""
    a, b = x[0].float(), w_in.float()  # an instruction multiplies 16 deep
    hidden = torch.mm(a[:, :16], b[:, :16].t()) + torch.mm(a[:, 16:], b[:, 16:].t())
    return score(hidden, context, ln_weight, ln_bias, w_out)[1]


def router_score_simt(x, w_in, context, ln_weight, ln_bias, w_out):
    """<LayerNorm(SiLU(x w_in^T + context)), w_out>"""
    return score(torch.mm(x[0], w_in.t()), context, ln_weight, ln_bias, w_out)[1]


def router_score_wide(hidden, context, ln_weight, ln_bias, w_out):
    """<LayerNorm(SiLU(hidden + context)), w_out>"""
    return score(hidden, context, ln_weight, ln_bias, w_out)


def router_add_splits(partial):
    """sum of the splits"""
    return partial.sum(0)


def router_add_chunks(context_sums, normal_sums):
    """sums of the chunks, in double precision"""
    return context_sums.double().sum(1).float(), normal_sums.double().sum(1)


# ---- soft_rank, with inverse_of as the kernel has it


def of_pair(z):
    """-> the gain of the better and of the worse of two tokens that lie z apart"""
    e = torch.exp2(torch.where(z < 0, z, -z))
    x = 1 + e
    y = (x * (32.0 / 99) - 16.0 / 11) * x + 70.0 / 33
    for _ in range(2):
        y = y + y * (1 - x * y)
    return e * y, y


def tokens(count, row, column):
    """[1, 1, count] of the sums of row(i, later tokens) and column(i, earlier tokens)."""
    sums = []
    for i in range(count):
        parts = ([row(i, slice(i + 1, count))] if i + 1 < count else []) + ([column(i, slice(0, i))] if i else [])
        parts = [part.sum() if len(part) > 2 else total(part) for part in parts]
        sums.append(parts[0] + parts[1] if len(parts) == 2 else parts[0])
    return torch.stack(sums).view(1, 1, count)


def soft_rank(scores):
    """sum over j of sigmoid((s_j - s_i) / tau), reciprocals as inverse_of"""
    s = scores[0]

    def row(i, later):
        z = (s[i] - s[later]) * SCALE
        better, worse = of_pair(z)
        return torch.where(z < 0, worse, better)

    def column(i, earlier):
        z = (s[earlier] - s[i]) * SCALE
        better, worse = of_pair(z)
        return torch.where(z < 0, better, worse)

    return tokens(len(s), row, column)


def soft_rank_backward(scores, grad):
    """sum over j of sigmoid'((s_j - s_i) / tau) (grad_j - grad_i), likewise"""
    s, g = scores[0], grad[0]

    def change(z, difference):
        better, worse = of_pair(z)
        return better * worse * difference

    return tokens(
        len(s),
        lambda i, later: change((s[i] - s[later]) * SCALE, g[later] - g[i]),
        lambda i, earlier: -change((s[earlier] - s[i]) * SCALE, g[i] - g[earlier]),
    )


def soft_rank_combine(partial):
    """1 + the sum of the parts"""
    return (1 + partial.double().sum(1)).float()


def soft_rank_combine_backward(partial):
    """the sum of the parts / tau"""
    return (partial.double().sum(1) / 0.5).float()


# ---- topk_select: integers


def topk_all():
    """i % n"""
    return torch.stack([torch.arange(40)] * 5)


# ---- expert_dispatch and expert_combine


def expert_combine(rows, weight):
    """sum over j of weight[t, j] rows[place[t, j]]"""
    first, second = weight[:LIMIT, :1] * rows[:LIMIT], weight[:LIMIT, 1:] * rows[LIMIT:]
    return torch.cat([first + second, torch.zeros_like(rows[:1])])


def expert_source(place):
    """1 + the choice of each row"""
    return torch.arange(1, len(place) + 1, dtype=torch.int32)


def expert_combine_backward(grad, rows, weight):
    """weight grad, or 0; <grad, row>"""
    T = len(grad)
    scaled = torch.cat([weight.unsqueeze(-1) * grad, torch.zeros_like(rows[T:])])
    return scaled, (grad * rows[:T]).sum(-1)


# ---- ema_scan: what a factor of 0 lets through is 0


def let_through(factor, state):
    return torch.where(factor == 0, torch.zeros_like(state), factor * state)


def rest_of(p, m):
    return 1 - p[:, m, None]


def decay_of(p, tokens):
    through = torch.ones_like(p[:, 0])
    for m in tokens:
        through = through * (1 - p[:, m])
    return through.unsqueeze(1)


def ema_carry(x, p):
    """e of the last token; the product of 1 - p"""
    state = torch.zeros_like(x[:, 0])
    for m in range(x.shape[1]):
        state = p[:, m, None] * x[:, m] + let_through(rest_of(p, m), state)
    return state.unsqueeze(1), decay_of(p, range(x.shape[1]))


def ema_carry_backward(x, p):
    """the same from the last token on, of (1 - p) (x + what comes)"""
    state, tokens = torch.zeros_like(x[:, 0]), range(x.shape[1] - 1, -1, -1)
    for m in tokens:
        state = let_through(rest_of(p, m), x[:, m] + state)
    return state.unsqueeze(1), decay_of(p, tokens)


def ema_scan(x, p):
    """e_m = p_m x_m + (1 - p_m) e_{m-1}"""
    state, found = torch.zeros_like(x[:, 0]), []
    for m in range(x.shape[1]):
        state = p[:, m, None] * x[:, m] + let_through(rest_of(p, m), state)
        found.append(state)
    return torch.stack(found, 1)


def ema_scan_backward(grad, x, e, p):
    """p_m g_m for g_m = grad_m + (1 - p_{m+1}) g_{m+1}; sums over 32 channels of g_m (x_m - e_{m-1})"""
    state, scaled, slopes = torch.zeros_like(x[:, 0]), [], []
    for m in range(x.shape[1] - 1, -1, -1):
        g = grad[:, m] + state
        scaled.append(p[:, m, None] * g)
        slopes.append(g * (x[:, m] - e[:, m - 1] if m else x[:, m]))
        state = let_through(rest_of(p, m), g)
    slope = torch.stack(slopes[::-1], 1)
    parts = [slope[:, :, d : d + 32].sum(2) for d in range(0, x.shape[2], 32)]
    parts += [torch.zeros_like(parts[0])] * (-len(parts) % 4)  # of a block's warps beyond the channels
    return torch.stack(scaled[::-1], 1), torch.stack(parts)


def ema_parts(part):
    """sum of the parts"""
    return part.sum(0)
