// Products of matrices by tensor cores, and the router's score on top of them.
//
// A block multiplies one tile and leaves it in shared memory; SiLU, LayerNorm and the dot product with w_out then run
// on the tile, so that x is read once and hidden never leaves the chip. A Product is what multiplies: MmaProduct here,
// SimtProduct in router_score_simt_kernel.cuh. Its run() computes a [kRows, depth] times b [kColumns, depth]
// transposed.
#pragma once

#include "cuda/mma.h"

namespace shiva::cuda {

// A matrix in row-major order, or what of it begins at some row and column. Beyond rows and columns it is zero.
template <typename T>
struct MatrixView {
  const T* data;
  int64_t stride, rows, columns;

  SHIVA_DEVICE MatrixView from(int64_t row, int64_t column) const {
    return {data + row * stride + column, stride, rows - row, columns - column};
  }
};

// [kRows, kColumns] of 16-bit elements in shared memory, in chunks of 16 bytes that are permuted within each row such
// that eight rows' chunks of one column meet different banks.
template <typename T, int kRows, int kColumns>
struct SwizzledTile {
  static constexpr int kChunks = kColumns / 8;  // to a row
  static constexpr int kSize = kRows * kColumns;
  static_assert(kChunks == 4 || kChunks % 8 == 0);

  static SHIVA_DEVICE int place(int row, int chunk) {
    return (row * kChunks + (chunk ^ (kChunks == 4 ? row / 2 % 4 : row % 8))) * 8;
  }

  // Starts the copy of from[row ..., column ...]; needs 16-byte alignment of its data and stride, whole chunks of
  // columns.
  template <int kThreads>
  static SHIVA_DEVICE void fill(T* tile, const MatrixView<T>& from, int64_t row, int64_t column) {
    constexpr int kCount = kRows * kChunks;
#pragma unroll
    for (int i = 0; i < (kCount + kThreads - 1) / kThreads; ++i) {
      const int index = i * kThreads + static_cast<int>(threadIdx.x), r = index / kChunks, chunk = index % kChunks;
      if (kCount % kThreads != 0 && index >= kCount) break;
      const bool valid = row + r < from.rows && column + 8 * chunk < from.columns;
      const T* source = from.data + (valid ? (row + r) * from.stride + column + 8 * chunk : 0);
      copy_async16(tile + place(r, chunk), source, valid);
    }
  }

  // The fragment of 16 x 16 elements that begin at (outer, k), in mma's order of a's matrices. The tile is
  // [outer, k], or [k, outer] if kTranspose.
  template <bool kTranspose>
  static SHIVA_DEVICE void load_fragment(const T* tile, int outer, int k, uint32_t (&fragment)[4]) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    outer += lane / 8 % 2 * 8, k += lane / 16 * 8;
    const int row = (kTranspose ? k : outer) + lane % 8, chunk = (kTranspose ? outer : k) / 8;
    ldmatrix_x4<kTranspose>(fragment, tile + place(row, chunk));
  }
};

// On tensor cores, 32 x 32 of the tile to a warp. kTransposeA: a is given as [depth, kRows]; b likewise.
template <typename Element, int kRows_, int kColumns_, int kStages, bool kTransposeA = false, bool kTransposeB = false>
struct MmaProduct {
  using T = Element;
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kWarpsAcross = kColumns / 32;
  static constexpr int kThreads = kRows / 32 * kWarpsAcross * kWarp;
  static constexpr int kStride = kColumns + 8;  // of the result; the 8 spread its rows over the banks
  static constexpr int kDepth = 32;             // of a stage
  using TileA = SwizzledTile<T, kTransposeA ? kDepth : kRows, kTransposeA ? kRows : kDepth>;
  using TileB = SwizzledTile<T, kTransposeB ? kDepth : kColumns, kTransposeB ? kColumns : kDepth>;
  static constexpr int kStage = TileA::kSize + TileB::kSize;
  static constexpr int kStagesBytes = kStages * kStage * static_cast<int>(sizeof(T));
  static constexpr int kResultBytes = kRows * kStride * static_cast<int>(sizeof(float));
  static constexpr int kBytes = kStagesBytes > kResultBytes ? kStagesBytes : kResultBytes;  // of shared memory

  // -> [kRows][kStride] in memory, which all threads may read. All threads of the block call it.
  static SHIVA_DEVICE float* run(void* memory, const MatrixView<T>& a, const MatrixView<T>& b, int64_t depth) {
    T* const stages = static_cast<T*>(memory);
    const int steps = static_cast<int>(ceil_div(depth, kDepth));
    const auto fill = [&](int step, int stage) {
      if (step < steps) {
        T* const tile = stages + stage * kStage;
        const int64_t k = static_cast<int64_t>(step) * kDepth;
        TileA::template fill<kThreads>(tile, a, kTransposeA ? k : 0, kTransposeA ? 0 : k);
        TileB::template fill<kThreads>(tile + TileA::kSize, b, kTransposeB ? k : 0, kTransposeB ? 0 : k);
      }
      commit_copies();
    };

    const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
    const int row = warp / kWarpsAcross * 32, column = warp % kWarpsAcross * 32;
    float sum[2][4][4] = {};  // 16 x 8 each
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) fill(stage, stage);
    int stage = 0;
    for (int step = 0; step < steps; ++step) {
      wait_copies<kStages - 2>();
      __syncthreads();  // this stage is there, and all have left the one before, which is filled anew
      fill(step + kStages - 1, stage == 0 ? kStages - 1 : stage - 1);
      const T *tile_a = stages + stage * kStage, *tile_b = tile_a + TileA::kSize;
#pragma unroll
      for (int k = 0; k < kDepth; k += 16) {
        uint32_t from_a[2][4], from_b[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          TileA::template load_fragment<kTransposeA>(tile_a, row + 16 * i, k, from_a[i]);
          TileB::template load_fragment<kTransposeB>(tile_b, column + 16 * i, k, from_b[i]);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const uint32_t columns[2] = {from_b[j / 2][j % 2], from_b[j / 2][j % 2 + 2]};
            mma_m16n8k16<T>(sum[i][j], from_a[i], columns);
          }
      }
      stage = stage == kStages - 1 ? 0 : stage + 1;
    }
    wait_copies<0>();
    __syncthreads();

    float* const result = static_cast<float*>(memory);
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int r = row + 16 * i + e / 2 * 8 + lane / 4, c = column + 8 * j + lane % 4 * 2 + e % 2;
          result[r * kStride + c] = sum[i][j][e];
        }
    __syncthreads();
    return result;
  }
};

// out[split] [rows, columns] = a b transposed over the split's part of the depth; a block computes one tile of it.
// More than one split: split_depth is a multiple of 32. The column tile varies fastest, then the row tile.
template <typename Product, bool kTransposeA, bool kTransposeB, typename Out>
__global__ void __launch_bounds__(Product::kThreads, 1) router_product_kernel(
    MatrixView<typename Product::T> a, MatrixView<typename Product::T> b, int64_t rows, int64_t columns, int64_t depth,
    int64_t split_depth, Out* out) {
  SHIVA_SHARED(uint4, memory, [Product::kBytes / 16]);
  const unsigned row_tiles = static_cast<unsigned>(ceil_div(rows, Product::kRows));
  const unsigned column_tiles = static_cast<unsigned>(ceil_div(columns, Product::kColumns));
  const unsigned row_tile = blockIdx.x / column_tiles % row_tiles, split = blockIdx.x / column_tiles / row_tiles;
  const int64_t row = static_cast<int64_t>(row_tile) * Product::kRows, k = split * split_depth;
  const int64_t column = static_cast<int64_t>(blockIdx.x % column_tiles) * Product::kColumns;
  const auto* result = Product::run(
      memory, a.from(kTransposeA ? k : row, kTransposeA ? row : k),
      b.from(kTransposeB ? k : column, kTransposeB ? column : k), depth - k < split_depth ? depth - k : split_depth);

  Out* const corner = out + (split * rows + row) * columns + column;
  constexpr int kGroup = Vec<Out>::size, kGroups = Product::kColumns / kGroup;
  const bool whole = columns % kGroup == 0;  // groups are whole, and 16-byte aligned
  for (int i = static_cast<int>(threadIdx.x); i < Product::kRows * kGroups; i += Product::kThreads) {
    const int r = i / kGroups, c = i % kGroups * kGroup;
    if (row + r >= rows || column + c >= columns) continue;
    const auto* from = result + r * Product::kStride + c;
    Out* const to = corner + r * columns + c;
    if (whole) {
      Vec<Out> values;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) values.at[j] = store<Out>(from[j]);
      store_vec(to, values);
    } else {
      for (int j = 0; j < kGroup && column + c + j < columns; ++j) to[j] = store<Out>(from[j]);
    }
  }
}

template <typename T>
struct RouterInput {
  const T *x, *w_in;                           // [B, N, D], [H, D]
  const acc_t<T>* context;                     // [B, H]
  const acc_t<T>*ln_weight, *ln_bias, *w_out;  // [H]
  int64_t N, D;
  int H;
  acc_t<T> eps;
};

SHIVA_DEVICE float router_sigmoid(float v) { return 1.0f / (1.0f + expf(-v)); }
SHIVA_DEVICE double router_sigmoid(double v) { return 1.0 / (1.0 + exp(-v)); }
// The same bits in the mean and in what the mean is taken from: equal channels cancel.
template <typename A>
SHIVA_DEVICE A router_silu(A v, A sigmoid) {
  return rounded_product(v, sigmoid);
}

// Eight lanes work on a row of hidden.
constexpr int kRowLanes = 8;
template <typename A>
SHIVA_DEVICE A router_row_sum(A value) {
  for (int step = kRowLanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// Of a = SiLU(hidden + context): what the LayerNorm needs, and <(a - mean) / std, ln_weight * w_out>.
template <typename A>
struct RouterStatistics {
  A mean, inverse_std, dot;
};

// Called by whole warps; no row: an invalid one, which is not read. kKeep: hidden becomes a.
template <bool kKeep, typename T, typename A = acc_t<T>>
SHIVA_DEVICE RouterStatistics<A> router_statistics(const RouterInput<T>& in, A* hidden, const A* context, bool valid) {
  const int first = static_cast<int>(threadIdx.x) % kRowLanes, H = valid ? in.H : 0;
  A sum = 0, square = 0, dot = 0;
  for (int h = first; h < H; h += kRowLanes) {
    const A v = hidden[h] + context[h], a = router_silu(v, router_sigmoid(v));
    if (kKeep) hidden[h] = a;
    sum += a;
  }
  const A mean = router_row_sum(sum) / static_cast<A>(in.H);
  for (int h = first; h < H; h += kRowLanes) {
    const A v = kKeep ? hidden[h] : hidden[h] + context[h];
    const A centred = (kKeep ? v : router_silu(v, router_sigmoid(v))) - mean;
    square += centred * centred;
    dot += centred * (in.ln_weight[h] * in.w_out[h]);
  }
  const A inverse_std = A(1) / static_cast<A>(sqrt(router_row_sum(square) / static_cast<A>(in.H) + in.eps));
  return {mean, inverse_std, router_row_sum(dot) * inverse_std};
}

// sum of factor * w_out, in each of a row's lanes.
template <typename T, typename A = acc_t<T>>
SHIVA_DEVICE A router_dot(const RouterInput<T>& in, const A* factor) {
  A sum = 0;
  for (int h = static_cast<int>(threadIdx.x) % kRowLanes; h < in.H; h += kRowLanes) sum += factor[h] * in.w_out[h];
  return router_row_sum(sum);
}

// scores[r] of `rows` <= kRows rows of hidden, which becomes garbage.
template <int kRows, int kThreads, typename T, typename A = acc_t<T>>
SHIVA_DEVICE void score_rows(
    const RouterInput<T>& in, A* hidden, int64_t stride, const A* context, int rows, A* scores) {
  const A offset = router_dot(in, in.ln_bias);
  for (int i = 0; i < kRows; i += kThreads / kRowLanes) {
    const int r = i + static_cast<int>(threadIdx.x) / kRowLanes;
    const A dot = router_statistics<true>(in, hidden + r * stride, context, r < rows).dot;
    if (r < rows && threadIdx.x % kRowLanes == 0) scores[r] = dot + offset;
  }
}

// Which tokens a block works on: up to kRows of one batch row.
template <int kRows>
struct RouterTokens {
  int64_t b, first;  // first: row of the flattened [B N]
  int rows;

  SHIVA_DEVICE explicit RouterTokens(int64_t N) {
    const unsigned tiles = static_cast<unsigned>(ceil_div(N, kRows));
    const int64_t token = static_cast<int64_t>(blockIdx.x % tiles) * kRows;
    b = blockIdx.x / tiles;
    first = b * N + token;
    rows = static_cast<int>(N - token < kRows ? N - token : kRows);
  }
};

// H <= Product::kColumns. Grid: B * ceil(N / Product::kRows).
template <typename Product, typename T = typename Product::T>
__global__ void __launch_bounds__(Product::kThreads) router_score_kernel(RouterInput<T> in, acc_t<T>* scores) {
  SHIVA_SHARED(uint4, memory, [Product::kBytes / 16]);
  const RouterTokens<Product::kRows> tile(in.N);
  auto* hidden =
      Product::run(memory, {in.x + tile.first * in.D, in.D, tile.rows, in.D}, {in.w_in, in.D, in.H, in.D}, in.D);
  score_rows<Product::kRows, Product::kThreads>(
      in, hidden, Product::kStride, in.context + tile.b * in.H, tile.rows, scores + tile.first);
}

// Any H, from hidden [B N, H], which becomes garbage. Grid: B * ceil(N / kWideRows).
constexpr int kWideRows = 64, kWideThreads = 256;
template <typename T>
__global__ void __launch_bounds__(kWideThreads, 2)
    router_score_wide_kernel(RouterInput<T> in, acc_t<T>* hidden, acc_t<T>* scores) {
  const RouterTokens<kWideRows> tile(in.N);
  score_rows<kWideRows, kWideThreads>(
      in, hidden + tile.first * in.H, in.H, in.context + tile.b * in.H, tile.rows, scores + tile.first);
}

}  // namespace shiva::cuda
