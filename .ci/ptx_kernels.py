"""The kernels that ptx_proofs.py examines: instantiation, launch, arguments, and what the tool must say of each.

Sizes are as small as still reach every part of a kernel: several blocks or warps, a second stage, a ragged edge.
Where an index decides which row is read or written, its contents are fixed.
"""

from dataclasses import dataclass

# B batch rows of N tokens, of which K are kept. For sums, which the tool compares slice by slice, the first K.
B, N, K = 2, 6, 5
INDEX = [[4, 1, 0, 5, 2], [3, 0, 5, 1, 2]]
POSITION = [[row.index(t) if t in row else -1 for t in range(N)] for row in INDEX]
ORDERS = [[*row, *({*range(N)} - {*row})] for row in INDEX]  # of all N
FIRST_INDEX, FIRST_POSITION = [[*range(K)]] * B, [[*range(K), -1]] * B
# Of M groups, which begins where among the tokens sorted by group.
M, STARTS = 4, [0, 2, 5, 5, 6]
GROUPS = [[m for m in range(M) for _ in range(STARTS[m + 1] - STARTS[m])]] * B
EPS, KAPPA, SCALE = 2.0**-10, 0.5, 2.0  # exact in binary, as the comparison is


@dataclass
class Tensor:
    name: str
    shape: tuple
    dtype: str = "float32"
    values: list | None = None  # of an index
    out: bool = False


@dataclass
class Proof:
    """Parameters: a Tensor for a pointer, an int for 64 bits, (type, value) for other scalars, a list for a struct."""

    kernel: str
    header: str
    blocks: int
    threads: int
    shape: str
    parameters: list
    reference: str = ""  # in ptx_references.py; without one, races alone are looked for
    why: str = ""  # there is no reference, or the kernel cannot be examined
    cannot: str = ""  # the tool's code for that


def tensor(name, *shape, dtype="float32"):
    return Tensor(name, shape, dtype)


def out(name, *shape, dtype="float32"):
    return Tensor(name, shape, dtype, out=True)


def data(name, *shape):
    """What is copied: bytes, so that equality is of bits."""
    return Tensor(name, shape, "uint8")


def copied(name, *shape):
    return Tensor(name, shape, "uint8", out=True)


def index(name, rows, dtype="int64"):
    return Tensor(name, (len(rows) * len(rows[0]),), dtype, [value for row in rows for value in row])


def rows(t):
    """struct Rows"""
    element = {"uint8": 1, "float32": 4}[t.dtype]
    return [t, t.shape[1] * t.shape[2] * element, t.shape[2] * element]


def strided(t):
    """A pointer and struct Strides"""
    return t, [t.shape[1] * t.shape[2], t.shape[2]]


# The tables are laid out by hand.
# fmt: off

# 33 accesses of 16 bytes to a row: one lane of the warp has a second one.
BYTES, D, PACKS = 528, 132, 33
ROWS = "B 2, N 6, k 5, "
COPY, SUMS, MANY = ROWS + "528 bytes a row", ROWS + "D 132", [B * N, N]
GATHER, SCATTER, GATE, COUNTERFACTUAL, RESIDUAL, INVERSE = (
    f"{name}.cuh" for name in ("token_gather_kernel", "token_scatter_kernel", "residual_gate_kernel",
                               "counterfactual_scatter_kernel", "scatter_residual_kernel", "inverse_index"))
ROW_KERNELS = [
    Proof("token_gather_kernel<uint4>", GATHER, 2, 256, COPY,
          [rows(data("x", B, N, BYTES)), index("index", INDEX), B * K, K, PACKS, copied("out", B, K, BYTES)],
          "token_gather"),
    Proof("token_gather_backward_kernel<uint4>", GATHER, 2, 256, COPY,
          [rows(data("grad", B, K, BYTES)), index("position", POSITION), *MANY, PACKS, copied("out", B, N, BYTES)],
          "token_gather_backward"),
    Proof("token_gather_table_backward_kernel<Pack<float, 4>>", GATHER, 2, 256, SUMS,
          [rows(tensor("grad", B, K, D)), index("position", POSITION), B, N, PACKS, out("out", N, D)],
          "token_gather_table_backward"),
    Proof("token_scatter_kernel<uint4>", SCATTER, 1, 256, COPY,  # one block: its warps take a second row
          [rows(data("base", B, N, BYTES)), rows(data("src", B, K, BYTES)), index("position", POSITION), *MANY, PACKS,
           copied("out", B, N, BYTES)],
          "token_scatter"),
    # Only where every row is written can the tool compare the result.
    Proof("token_scatter_in_place_kernel<uint4>", SCATTER, 2, 256, "B 2, N 6, k 6, 528 bytes a row",
          [rows(copied("base", B, N, BYTES)), index("index", ORDERS), rows(data("src", B, N, BYTES)), B * N, N, PACKS],
          "token_scatter_in_place"),
    Proof("token_scatter_backward_kernel<uint4>", SCATTER, 2, 256, COPY,
          [rows(data("grad", B, N, BYTES)), index("position", POSITION), *MANY, K, PACKS,
           copied("grad_base", B, N, BYTES), copied("grad_src", B, K, BYTES)],
          "token_scatter_backward"),
    Proof("inverse_index_kernel<512>", INVERSE, 2, 512, "B 2, N 3, k 2",
          [index("index", [[0, 1], [1, 2]]), 2, 2, 3, copied("position", 2, 3, 8)], "inverse_index"),
    Proof("residual_gate_kernel<uint4>", GATE, 2, 256, COPY,
          [rows(data("x", B, N, BYTES)), index("position", POSITION), *MANY, K, PACKS, copied("selected", B, K, BYTES),
           copied("base", B, N, BYTES)],
          "residual_gate"),
    Proof("residual_gate_backward_kernel<Pack<float, 4>>", GATE, 2, 256, SUMS,
          [rows(tensor("grad_selected", B, K, D)), rows(tensor("grad_base", B, N, D)), rows(tensor("x", B, N, D)),
           index("position", FIRST_POSITION), *MANY, PACKS, out("grad_x", B, N, D), out("grad_inclusion", B, N)],
          "residual_gate_backward"),
    Proof("counterfactual_scatter_backward_kernel<Pack<float, 4>>", COUNTERFACTUAL, 2, 256, SUMS,
          [rows(tensor("grad", B, N, D)), rows(tensor("base", B, N, D)), rows(tensor("src", B, K, D)),
           rows(tensor("update", B, N, D)), index("position", FIRST_POSITION), *MANY, K, PACKS, ("f32", KAPPA),
           out("grad_base", B, N, D), out("grad_src", B, K, D), out("grad_inclusion", B, N)],
          "counterfactual_scatter_backward"),
    Proof("scatter_residual_kernel<float, 4>", RESIDUAL, 2, 256, SUMS,
          [*strided(tensor("base", B, N, D)), *strided(tensor("update", B, K, D)), tensor("gate", B, D),
           index("position", FIRST_POSITION), *MANY, D, out("out", B, N, D)],
          "scatter_residual"),
    Proof("scatter_residual_backward_kernel<float, 4>", RESIDUAL, 4, 64, SUMS + ", chunks of 3 and 2 rows",
          [*strided(tensor("grad", B, N, D)), *strided(tensor("update", B, K, D)), tensor("gate", B, D),
           index("index", FIRST_INDEX), K, D, 3, 2, 1, out("grad_update", B, K, D), out("partial", B, 2, D)],
          "scatter_residual_backward"),
]


MEAN, STARTED = "scatter_mean_kernel.cuh", index("start", [STARTS] * B, "int32")
MEAN_KERNELS = [
    Proof("group_tokens_kernel", MEAN, 2, 512, "B 2, N 6, 4 groups",
          [index("position", GROUPS), N, M, 1, out("start", B, M + 1, dtype="int32"),
           out("order", B, N, dtype="int32")],
          why="which lanes have the same group decides which of them counts", cannot="control_predicate_not_static"),
    Proof("scatter_mean_kernel<float, 4>", MEAN, 1, 256, "B 2, N 6, 4 groups, D 132",
          [*strided(tensor("x", B, N, D)), STARTED, index("order", [[*range(N)]] * B, "int32"), B * M, N, M, D,
           out("out", B, M, D)],
          "scatter_mean"),
    Proof("scatter_mean_backward_kernel<float, 4>", MEAN, 2, 256, "B 2, N 6, 4 groups, D 132",
          [*strided(tensor("grad", B, M, D)), index("position", GROUPS), STARTED, B * N, N, M, D, out("out", B, N, D)],
          why="the tool divides the tokens into other slices than a reference does"),
]


def modulate(D, counts):
    """The first two of three tokens, as in the backward."""
    return [*strided(tensor("x", 2, 3, D)), index("index", [[0, 1]] * 2), tensor("shift", 2, D), tensor("scale", 2, D),
            *counts, ("f32", EPS), out("out", 2, 2, D)]


def modulate_backward(B, tokens, D):
    """struct ModulateBackward"""
    grad, x = tensor("grad", B, 2, D), tensor("x", B, tokens, D)
    return [grad, 2 * D, D, x, tokens * D, D, index("index", [[0, 1]] * B), tensor("scale", B, D), tokens, 2, 8, 1,
            ("f32", EPS), out("grad_x", B, tokens, D), out("partial", B, 2, D)]


MODULATE, TOO_LONG = "gather_modulate_kernel.cuh", "too much for the comparison; see the short row"
MODULATE_KERNELS = [
    Proof("gather_modulate_kernel<float, 4, 8, true>", MODULATE, 1, 256, "B 2, N 3, k 2, D 16",
          modulate(16, [4, 2, ("u32", 16)]), "gather_modulate"),
    Proof("gather_modulate_kernel<float, 4, 4, false>", MODULATE, 4, 64, "B 2, N 3, k 2, D 8",
          modulate(8, [4, 2, ("u32", 8)]), "gather_modulate"),
    Proof("gather_modulate_kernel<float, 4, 4, false>", MODULATE, 4, 64, "B 2, N 3, k 2, D 1000",
          modulate(1000, [4, 2, ("u32", 1000)]), why=TOO_LONG),
    Proof("gather_modulate_wide_kernel<float, 4>", MODULATE, 4, 64, "B 2, N 3, k 2, D 500", modulate(500, [2, 500]),
          why=TOO_LONG),
    Proof("gather_modulate_backward_kernel<float, 4, 4>", MODULATE, 2, 64, "B 2, N 2, k 2, D 8",
          [modulate_backward(2, 2, 8), ("u32", 8)], "gather_modulate_backward"),
    Proof("gather_modulate_backward_kernel<float, 4, 4>", MODULATE, 1, 64, "B 1, N 3, k 2, D 200",
          [modulate_backward(1, 3, 200), ("u32", 200)], why=TOO_LONG),
    Proof("gather_modulate_backward_wide_kernel<float, 4>", MODULATE, 1, 64, "B 1, N 3, k 2, D 300",
          [modulate_backward(1, 3, 300), 300], why=TOO_LONG),
    Proof("sum_chunks_kernel<float>", "modulate_common.cuh", 4, 512, "B 2, 20 chunks, D 24",
          [tensor("partial", 2, 20, 48), 20, 48, 24, out("first", 2, 24), out("second", 2, 24)], "sum_chunks"),
    Proof("zero_absent_rows_kernel<uint4>", MODULATE, 2, 256, COPY,
          [index("position", POSITION), B * N, PACKS, copied("out", B * N, BYTES)],
          why="not every row is written, which the tool cannot compare"),
]


def router(N, D, H, dtype="bfloat16"):
    """struct RouterInput, of one batch row"""
    return [tensor("x", 1, N, D, dtype=dtype), tensor("w_in", H, D, dtype=dtype), tensor("context", 1, H),
            tensor("ln_weight", H), tensor("ln_bias", H), tensor("w_out", H), N, D, ("u32", H), ("f32", EPS)]


def gradients(N, H, chunks, dtype):
    """struct RouterGradients"""
    return [tensor("grad", 1, N), out("grad_hidden", N, H, dtype=dtype), ("u32", H), out("context_sums", chunks, H),
            out("normal_sums", chunks, H), out("grad_sums", 1)]


def matrices(a, b, counts, result):
    """Two MatrixView and what follows them"""
    views = [[tensor(name, *s, dtype="bfloat16"), s[1], s[0], s[1]] for name, s in (("a", a), ("b", b))]
    return [*views, *counts, out("out", *result)]


def multiply(product, transposed="false, false"):
    return f"router_product_kernel<{product}, {transposed}, float>"


ROUTER, SIMT, BACKWARD = (f"router_score_{name}kernel.cuh" for name in ("", "simt_", "backward_"))
BUTTERFLY = "a sum that all lanes hold is not seen to be the same in each, where it decides on an address"
RING = "too much for the comparison; half a tile, of which every stage is filled and one a second time"
ROUTER_KERNELS = [
    Proof(multiply("MmaProduct<bf16, 64, 64, 5>"), ROUTER, 1, 128, "48 x 40, 24 deep",
          matrices((48, 24), (40, 24), [48, 40, 24, 24], (48, 40)), "product"),
    Proof(multiply("MmaProduct<bf16, 32, 64, 5>"), ROUTER, 1, 64, "24 x 40, 168 deep",
          matrices((24, 168), (40, 168), [24, 40, 168, 168], (24, 40)), why=RING),
    Proof(multiply("MmaProduct<bf16, 32, 64, 2>"), ROUTER, 4, 64, "40 x 72, 72 deep",
          matrices((40, 72), (72, 72), [40, 72, 72, 72], (40, 72)), why=RING),
    Proof(multiply("MmaProduct<bf16, 64, 64, 3, false, true>", "false, true"), ROUTER, 1, 128, "64 x 64, 32 deep",
          matrices((64, 32), (32, 64), [64, 64, 32, 32], (64, 64)), "product_transposed_b"),
    Proof(multiply("MmaProduct<bf16, 64, 64, 5, true, true>", "true, true"), ROUTER, 2, 128,
          "40 x 40, 2 splits of 32", matrices((64, 40), (64, 40), [40, 40, 64, 32], (2, 40, 40)),
          "product_transposed_splits"),
    Proof("router_score_kernel<MmaProduct<bf16, 64, 64, 5>>", ROUTER, 1, 128, "N 64, D 32, H 8",
          [router(64, 32, 8), out("scores", 1, 64)], "router_score_mma"),
    Proof("router_score_kernel<SimtProduct<float>>", SIMT, 1, 128, "N 16, D 16, H 8",
          [router(16, 16, 8, "float32"), out("scores", 1, 16)], "router_score_simt"),
    Proof("router_score_wide_kernel<float>", ROUTER, 2, 256, "N 70, H 8",
          [router(70, 32, 8, "float32"), out("hidden", 70, 8), out("scores", 1, 70)], "router_score_wide"),
    Proof("router_hidden_backward_kernel<MmaProduct<bf16, 64, 64, 5>>", BACKWARD, 1, 128, "N 64, D 32, H 16",
          [router(64, 32, 16), gradients(64, 16, 2, "bfloat16")], why=BUTTERFLY),
    Proof("router_wide_backward_kernel<float>", BACKWARD, 1, 256, "N 64, H 16",
          [router(64, 32, 16, "float32"), gradients(64, 16, 1, "float32"), tensor("hidden", 64, 16)], why=BUTTERFLY),
    Proof("router_add_splits_kernel<float>", BACKWARD, 2, 256, "3 splits of 300",
          [tensor("partial", 3, 300), 3, 300, out("out", 300)], "router_add_splits"),
    Proof("router_add_chunks_kernel<float>", BACKWARD, 2, 512, "B 2, 20 chunks, H 24",
          [tensor("context_sums", 2, 20, 24), tensor("normal_sums", 2, 20, 24), 20, ("u32", 24),
           out("grad_context", 2, 24), out("batch_normals", 2, 24, dtype="float64")], "router_add_chunks"),
    Proof("router_small_gradients_kernel<float>", BACKWARD, 1, 512, "B 3, H 24, 70 tiles",
          [router(64, 32, 24, "float32"), tensor("batch_normals", 3, 24, dtype="float64"), 3, tensor("grad_sums", 70),
           70, out("grad_ln_weight", 24), out("grad_ln_bias", 24), out("grad_w_out", 24)],
          why="a double is shuffled as two integers, which the tool does not see as a number"),
]


def pairs(n, parts, part_tokens):
    return [tensor("scores", 1, n), tensor("grad", 1, n), tensor("order", n, dtype="int32"), n, ("u32", parts),
            part_tokens, ("f32", SCALE), out("partial", 1, parts, n)]


def combine():
    return [tensor("partial", 8, 3, 40), tensor("sorted", 8, 40), tensor("order", 320, dtype="int32"), 320, 40,
            ("u32", 3), ("f64", 0.5), out("out", 8, 40)]


RANK, SORTED, STATIC = "soft_rank_kernel.cuh", "soft_rank_sorted_kernel.cuh", "control_predicate_not_static"
REGROUPED = "over several tiles the sums are grouped in another way; see the one tile"
SOFT_RANK_KERNELS = [
    Proof("soft_rank_pairs_kernel<float, 4, false, false>", RANK, 1, 256, "n 16", pairs(16, 1, 64), "soft_rank"),
    Proof("soft_rank_pairs_kernel<float, 4, false, true>", RANK, 1, 256, "n 16", pairs(16, 1, 64),
          "soft_rank_backward"),
    Proof("soft_rank_pairs_kernel<float, 4, false, false>", RANK, 3, 256, "n 200, 2 parts", pairs(200, 2, 128),
          why=REGROUPED),
    Proof("soft_rank_pairs_kernel<float, 4, false, true>", RANK, 3, 256, "n 200, 2 parts", pairs(200, 2, 128),
          why=REGROUPED),
    Proof("soft_rank_combine_kernel<float, false, false>", RANK, 2, 256, "8 rows of 40, 3 parts", combine(),
          "soft_rank_combine"),
    Proof("soft_rank_combine_kernel<float, false, true>", RANK, 2, 256, "8 rows of 40, 3 parts", combine(),
          "soft_rank_combine_backward"),
    Proof("soft_rank_combine_kernel<float, true, false>", RANK, 2, 256, "8 rows of 40, 3 parts", combine(),
          why="the order of the scores decides where a rank is written",
          cannot="dynamic_address_overlap_unresolved"),
    Proof("soft_rank_pairs_kernel<float, 8, true, false>", RANK, 1, 256, "n 100", pairs(100, 1, 128),
          why="the scores decide whether a tile is skipped", cannot=STATIC),
    Proof("soft_rank_sort_kernel<float>", SORTED, 1, 512, "n 64",
          [tensor("scores", 1, 64), 64, 1, out("sorted", 1, 64), out("order", 64, dtype="int32")],
          why="a comparison of scores decides whether they change places", cannot=STATIC),
    Proof("soft_rank_merge_kernel<float>", SORTED, 20, 256, "n 5000",
          [tensor("chunk_sorted", 1, 5000), tensor("chunk_order", 5000, dtype="int32"), 5000, 5000,
           out("sorted", 1, 5000), out("order", 5000, dtype="int32")], why="binary search", cannot=STATIC),
]

TOPK, CHUNKED = "topk_select_kernel.cuh", "2 rows of 8200, k 50, 2 chunks"
SCORES, THRESHOLDS = tensor("scores", 2, 8200), tensor("thresholds", 2, 2, dtype="int64")
TOPK_KERNELS = [
    Proof("topk_all_kernel", TOPK, 2, 64, "5 rows of 40", [out("out", 5, 40, dtype="int64"), 200, 40], "topk_all"),
    Proof("topk_start_kernel<uint64_t>", TOPK, 2, 64, "70 rows", [out("thresholds", 70, 2, dtype="int64"), 70, 9],
          why="left out to save time: two constants"),
    Proof("topk_count_chunks_kernel<float>", TOPK, 4, 256, CHUNKED,
          [SCORES, 8200, 2, THRESHOLDS, out("starts", 4, 2, dtype="int64")],
          why="no reference was written for its comparisons of integer keys"),
    Proof("topk_select_row_kernel<float, 256, 4>", TOPK, 2, 256, "2 rows of 1000, k 100",
          [tensor("scores", 2, 1000), ("u32", 1000), ("u32", 100), out("kept", 2, 100, dtype="int64"),
           out("rejected", 2, 900, dtype="int64")],
          why="the keys decide what is counted and where it is written", cannot=STATIC),
    Proof("topk_count_digits_kernel<float>", TOPK, 4, 256, CHUNKED,
          [SCORES, 8200, 2, THRESHOLDS, ("u32", 24), out("counts", 4, 256, dtype="int32")],
          why="a histogram by atomic additions", cannot="atomic_add_memory_semantics_unsupported"),
    Proof("topk_choose_digit_kernel<uint32_t>", TOPK, 2, 256, CHUNKED,
          [tensor("counts", 4, 256, dtype="int32"), 2, ("u32", 24), THRESHOLDS],
          why="the counts decide which thread writes", cannot=STATIC),
    Proof("topk_place_chunks_kernel<float>", TOPK, 4, 256, CHUNKED,
          [SCORES, 8200, 50, 2, THRESHOLDS, tensor("starts", 4, 2, dtype="int64"), out("kept", 2, 50, dtype="int64"),
           out("rejected", 2, 8150, dtype="int64")],
          why="the keys decide where a token is written", cannot=STATIC),
]

FACILITY, TILE = "facility_location_kernel.cuh", "B 2, n 40"
COLUMNS, TAKEN = tensor("columns", 2, 40, 40), tensor("taken", 2, 40, dtype="int32")
FACILITY_KERNELS = [
    Proof("facility_block_kernel<float>", FACILITY, 2, 256, TILE + ", 5 chosen",
          [COLUMNS, ("u32", 40), ("u32", 5), out("chosen", 2, 5, dtype="int64")],
          why="the gains decide which column is taken", cannot=STATIC),
    Proof("facility_start_kernel<float>", FACILITY, 1, 256, TILE,
          [80, out("covered", 2, 40), out("taken", 2, 40, dtype="int32")], why="left out to save time: two constants"),
    Proof("facility_gains_kernel<float>", FACILITY, 10, 256, TILE,
          [COLUMNS, tensor("covered", 2, 40), TAKEN, 80, 40, out("gains", 2, 40, dtype="float64")],
          why="columns that are taken are left out", cannot=STATIC),
    Proof("facility_take_kernel<float>", FACILITY, 2, 256, TILE,
          [COLUMNS, tensor("gains", 2, 40, dtype="float64"), 40, tensor("covered", 2, 40), TAKEN],
          why="the gains decide which column is taken", cannot=STATIC),
    Proof("facility_list_kernel", FACILITY, 2, 256, TILE + ", 5 taken",
          [TAKEN, 40, 5, out("chosen", 2, 5, dtype="int64")],
          why="what is taken decides where it is written", cannot=STATIC),
]

ROUTED, LIMIT = "expert_rows_kernel.cuh", 4
# The experts of each token; two blocks take 6 and 4 of these choices.
EXPERTS, COUNTS = [[2, 0], [0, 2], [2, 0], [1, 0], [0, 2]], [[3, 0, 3], [2, 1, 1]]
# Where there are sums, every token goes to experts 0 and 1, of LIMIT rows each: none for the last token.
LIMITED = [*([t, LIMIT + t] for t in range(LIMIT)), [-1, -1]]
CHOICES = "T 5, K 2, E 3"


def flat_rows(t):
    """struct Rows of a tensor [rows, D]"""
    return [t, 0, t.shape[1] * {"uint8": 1, "float32": 4}[t.dtype]]


def expert_dispatch(capacity):
    R = 3 * capacity if capacity else 10
    return [flat_rows(data("x", 5, BYTES)), index("experts", EXPERTS), index("counts", COUNTS, "int32"), 10, 6,
            ("u32", 3), 2, capacity, PACKS, out("place", 5, 2, dtype="int64"), out("ends", 3, dtype="int32"),
            copied("rows", R, BYTES)]


def expert_combine_backward(T, K, source):
    R = len(source)
    return [flat_rows(tensor("grad", T, D)), flat_rows(tensor("rows", R, D)), index("source", [source], "int32"),
            tensor("weight", T * K), R, K, PACKS, out("grad_rows", R, D), out("grad_weight", T * K)]


BITS = "the comparison stops at a count of bits, by which nvcc divides"
EXPERT_KERNELS = [
    Proof("expert_count_kernel", ROUTED, 2, 256, CHOICES,
          [index("experts", EXPERTS), 10, 6, ("u32", 3), out("counts", 2, 3, dtype="int32")],
          why="the tool does not see that sums of comparisons are constants"),
    Proof("expert_dispatch_kernel<uint4>", ROUTED, 2, 256, CHOICES + ", 528 bytes a row", expert_dispatch(0), why=BITS),
    Proof("expert_dispatch_kernel<uint4>", ROUTED, 2, 256, CHOICES + ", 4 rows of 528 bytes an expert",
          expert_dispatch(LIMIT), why=BITS),
    Proof("expert_combine_kernel<Pack<float, 4>>", ROUTED, 1, 256, "T 5, K 2, 8 rows, D 132",
          [flat_rows(tensor("rows", 2 * LIMIT, D)), index("place", LIMITED), tensor("weight", 5, 2), 5, 2, PACKS,
           out("out", 5, D)],
          "expert_combine"),
    Proof("expert_source_kernel<float>", ROUTED, 1, 256, "T 5, K 2, 10 rows",
          [index("place", [[*range(10)]]), 10, out("source", 10, dtype="int32"), tensor("grad_weight", 5, 2)],
          "expert_source"),
    Proof("expert_combine_backward_kernel<Pack<float, 4>>", ROUTED, 1, 256, "T 4, K 1, 6 rows, D 132",
          expert_combine_backward(4, 1, [1, 2, 3, 4, 0, 0]), "expert_combine_backward"),
    Proof("expert_combine_backward_kernel<Pack<float, 4>>", ROUTED, 2, 256, "T 4, K 2, 10 rows, D 132",
          expert_combine_backward(4, 2, [1, 3, 5, 7, 0, 2, 4, 6, 8, 0]),
          why="the tool divides the rows into other slices than a reference does"),
]

SCAN, SHORT = "ema_scan_kernel.cuh", "B 2, M 2, D 130"
# Compared are rows of one chunk; free of races are two of them, of 64 tokens and 2.
LONG, CHUNKS = "B 1, M 66, D 130, 2 chunks", (1, 66, 130, 2)


def carry(B, M, D, chunks):
    return [rows(tensor("x", B, M, D)), tensor("p", B, M), M, D, out("carry", B, chunks, D), out("decay", B, chunks)]


def scan(B, M, D, chunks):
    return [rows(tensor("x", B, M, D)), tensor("p", B, M), tensor("carry", B, chunks, D), tensor("decay", B, chunks),
            M, D, out("out", B, M, D)]


def scan_backward(B, M, D, chunks):
    return [*(rows(tensor(name, B, M, D)) for name in ("grad", "x", "e")), tensor("p", B, M),
            tensor("carry", B, chunks, D), tensor("decay", B, chunks), B, M, D, out("grad_x", B, M, D),
            out("part", -(-D // 128) * 4, B, M)]


EMA_KERNELS = [
    Proof("ema_carry_kernel<float, false>", SCAN, 4, 128, SHORT, carry(2, 2, 130, 1), "ema_carry"),
    Proof("ema_carry_kernel<float, true>", SCAN, 4, 128, SHORT, carry(2, 2, 130, 1), "ema_carry_backward"),
    Proof("ema_scan_kernel<float>", SCAN, 4, 128, "B 2, M 5, D 130", scan(2, 5, 130, 1), "ema_scan"),
    Proof("ema_scan_backward_kernel<float>", SCAN, 4, 128, SHORT, scan_backward(2, 2, 130, 1), "ema_scan_backward"),
    Proof("ema_carry_kernel<float, false>", SCAN, 4, 128, LONG, carry(*CHUNKS), why=TOO_LONG),
    Proof("ema_carry_kernel<float, true>", SCAN, 4, 128, LONG, carry(*CHUNKS), why=TOO_LONG),
    Proof("ema_scan_kernel<float>", SCAN, 4, 128, LONG, scan(*CHUNKS), why=TOO_LONG),
    Proof("ema_scan_backward_kernel<float>", SCAN, 4, 128, LONG, scan_backward(*CHUNKS), why=TOO_LONG),
    Proof("ema_parts_kernel<float>", SCAN, 2, 256, "8 parts of 300", [tensor("part", 8, 300), 8, 300, out("out", 300)],
          "ema_parts"),
]

KERNELS = [
    *ROW_KERNELS,
    *MEAN_KERNELS,
    *MODULATE_KERNELS,
    *ROUTER_KERNELS,
    *SOFT_RANK_KERNELS,
    *TOPK_KERNELS,
    *FACILITY_KERNELS,
    *EXPERT_KERNELS,
    *EMA_KERNELS,
]
