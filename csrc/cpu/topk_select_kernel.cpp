// The key of the k-th best token is found bit by bit: counting the keys above a pivot is one compare and one add a
// vector, and few tokens stay in question after some bits. Then one pass splits the row by 64-bit masks.
#include "cpu/topk_select_kernel.h"

#include "core/ordered_key.h"
#include "cpu/scalar.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace shiva::cpu::SHIVA_ISA {
namespace {

constexpr int64_t kLeast = 256;  // tokens that are worth narrowing down

// Half precisions sort by 16 bits, in the order of ordered_key of their float32 value.
inline uint16_t half_key(uint16_t bits, uint16_t infinity) {
  const uint16_t magnitude = bits & 0x7fff, flipped = (bits & 0x8000) ? ~bits : (bits | 0x8000);
  const uint16_t number = magnitude == 0 ? uint16_t(0x8000) : flipped;  // -0 == +0
  return magnitude > infinity ? uint16_t(0xffff) : number;              // NaN
}
inline uint16_t key_of(const bf16& score) { return half_key(score.bits, 0x7f80); }
inline uint16_t key_of(const f16& score) { return half_key(__builtin_bit_cast(uint16_t, score.value), 0x7c00); }
inline uint32_t key_of(const float& score) { return ordered_key(__builtin_bit_cast(uint32_t, score)); }
inline uint64_t key_of(const double& score) { return ordered_key(__builtin_bit_cast(uint64_t, score)); }

template <typename Key>
int64_t count_from(const Key* keys, int64_t n, Key pivot) {
  int64_t total = 0;
  for (int64_t first = 0; first < n; first += 16384) {  // a lane of 16 bits cannot overflow
    const int64_t last = first + 16384 < n ? first + 16384 : n;
    Key count = 0;
#pragma omp simd reduction(+ : count)
    for (int64_t i = first; i < last; ++i) count += keys[i] >= pivot;
    total += static_cast<int64_t>(count);
  }
  return total;
}

// Moves the keys from low to low + size to the front of `to`, which is keys itself or has room for n; at most n / 4
// are. In place it is safe, as writes trail reads.
template <typename Key>
int64_t narrow(const Key* keys, int64_t n, Key low, Key size, Key* to) {
  int64_t next = 0, i = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(Key) == 4) {
    const __m512i lows = _mm512_set1_epi32(static_cast<int32_t>(low));
    const __m512i sizes = _mm512_set1_epi32(static_cast<int32_t>(size));
    for (; i + 16 <= n; i += 16) {
      const __m512i part = _mm512_loadu_si512(keys + i);
      const __mmask16 inside = _mm512_cmple_epu32_mask(_mm512_sub_epi32(part, lows), sizes);
      _mm512_storeu_si512(to + next, _mm512_maskz_compress_epi32(inside, part));
      next += __builtin_popcount(inside);
    }
  } else if constexpr (sizeof(Key) == 8) {
    const __m512i lows = _mm512_set1_epi64(static_cast<int64_t>(low));
    const __m512i sizes = _mm512_set1_epi64(static_cast<int64_t>(size));
    for (; i + 8 <= n; i += 8) {
      const __m512i part = _mm512_loadu_si512(keys + i);
      const __mmask8 inside = _mm512_cmple_epu64_mask(_mm512_sub_epi64(part, lows), sizes);
      _mm512_storeu_si512(to + next, _mm512_maskz_compress_epi64(inside, part));
      next += __builtin_popcount(inside);
    }
  }
#endif
  for (; i < n; ++i) {
    const Key key = keys[i];
    to[next] = key;
    next += static_cast<Key>(key - low) <= size;
  }
  return next;
}

// The threshold and how many tokens equal to it are kept.
template <typename Key>
struct Threshold {
  Key key;
  int64_t ties;
};

// The k-th largest of keys[n], 0 < k < n. scratch: n keys.
template <typename Key>
Threshold<Key> kth_largest(const Key* keys, int64_t n, int64_t k, Key* scratch) {
  // The k-th is in [low, low + 2^bit), with from_low keys from low on, and from_high beyond this interval.
  Key low = 0;
  int64_t from_low = n, from_high = 0;
  for (int bit = 8 * static_cast<int>(sizeof(Key)) - 1; bit >= 0; --bit) {
    const Key pivot = static_cast<Key>(low | Key(1) << bit);
    const int64_t from_pivot = count_from(keys, n, pivot);
    if (from_pivot >= k)
      low = pivot, from_low = from_pivot;
    else
      from_high = from_pivot;
    if (from_low == k) return {low, n};
    if (sizeof(Key) > 2 && n > kLeast && 4 * (from_low - from_high) <= n) {
      const int64_t next = narrow(keys, n, low, static_cast<Key>((Key(1) << bit) - 1), scratch);
      keys = scratch, n = next;
      k -= from_high, from_low -= from_high, from_high = 0;
    }
  }
  return {low, k - from_high};
}

// Bit i: whether keys[i] is greater than, or equal to, the threshold.
struct Masks {
  uint64_t greater, equal;
};

template <typename Key>
Masks compare(const Key* keys, int64_t n, Key threshold) {
  Masks masks = {0, 0};
#if defined(__AVX512F__)
  if (n == 64) {
    constexpr int kLanes = 64 / static_cast<int>(sizeof(Key));
    for (int i = 0; i < 64; i += kLanes) {
      const __m512i part = _mm512_loadu_si512(keys + i);
      if constexpr (sizeof(Key) == 2) {
        const __m512i wanted = _mm512_set1_epi16(static_cast<int16_t>(threshold));
        masks.greater |= static_cast<uint64_t>(_mm512_cmpgt_epu16_mask(part, wanted)) << i;
        masks.equal |= static_cast<uint64_t>(_mm512_cmpeq_epu16_mask(part, wanted)) << i;
      } else if constexpr (sizeof(Key) == 4) {
        const __m512i wanted = _mm512_set1_epi32(static_cast<int32_t>(threshold));
        masks.greater |= static_cast<uint64_t>(_mm512_cmpgt_epu32_mask(part, wanted)) << i;
        masks.equal |= static_cast<uint64_t>(_mm512_cmpeq_epu32_mask(part, wanted)) << i;
      } else {
        const __m512i wanted = _mm512_set1_epi64(static_cast<int64_t>(threshold));
        masks.greater |= static_cast<uint64_t>(_mm512_cmpgt_epu64_mask(part, wanted)) << i;
        masks.equal |= static_cast<uint64_t>(_mm512_cmpeq_epu64_mask(part, wanted)) << i;
      }
    }
    return masks;
  }
#endif
  for (int64_t i = 0; i < n; ++i) {
    masks.greater |= static_cast<uint64_t>(keys[i] > threshold) << i;
    masks.equal |= static_cast<uint64_t>(keys[i] == threshold) << i;
  }
  return masks;
}

// Where the lists have got to, and where they stop.
struct Lists {
  int64_t *kept, *rejected, *kept_stop, *rejected_stop;
};

// Appends first + i to kept for the bits i < n of keep that are set, to rejected for the others.
inline void split(uint64_t keep, int64_t first, int64_t n, Lists& to) {
  int64_t i = 0;
#if defined(__AVX512F__)
  // Each group of 8 stores 8 in both lists and the next overwrites what was too much. A compressed store would not,
  // but it is slow on some processors.
  if (n == 64 && to.kept_stop - to.kept >= 64 && to.rejected_stop - to.rejected >= 64) {
    const __m512i step = _mm512_set1_epi64(8);
    __m512i tokens = _mm512_add_epi64(_mm512_set1_epi64(first), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
#pragma GCC unroll 8
    for (; i < 64; i += 8, tokens = _mm512_add_epi64(tokens, step)) {
      const __mmask8 in = static_cast<__mmask8>(keep >> i);
      const int kept = __builtin_popcount(in);
      _mm512_storeu_si512(to.kept, _mm512_maskz_compress_epi64(in, tokens));
      _mm512_storeu_si512(to.rejected, _mm512_maskz_compress_epi64(static_cast<__mmask8>(~in), tokens));
      to.kept += kept, to.rejected += 8 - kept;
    }
  }
#endif
  for (; i < n; ++i) {
    int64_t*& end = keep >> i & 1 ? to.kept : to.rejected;
    *end++ = first + i;
  }
}

template <typename T, typename Key>
void select(const T* scores, int64_t n, int64_t k, Key* keys, int64_t* kept, int64_t* rejected) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) keys[i] = key_of(scores[i]);
  auto [threshold, ties] = kth_largest(keys, n, k, keys + n);
  Lists lists = {kept, rejected, kept + k, rejected + n - k};
  for (int64_t first = 0; first < n; first += 64) {
    const int64_t count = n - first < 64 ? n - first : 64;
    const Masks masks = compare(keys + first, count, threshold);
    uint64_t equal = masks.equal;
    if (ties <= 0) equal = 0;
    for (int64_t extra = __builtin_popcountll(equal) - ties; extra > 0; --extra)
      equal &= ~(uint64_t(1) << (63 - __builtin_clzll(equal)));  // the last ones go
    ties -= __builtin_popcountll(equal);
    split(masks.greater | equal, first, count, lists);
  }
}

}  // namespace

void topk_select_row(
    Dtype dtype, const void* scores, int64_t n, int64_t k, void* keys, int64_t* kept, int64_t* rejected) {
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Key = decltype(key_of(T{}));
    select(static_cast<const T*>(scores), n, k, static_cast<Key*>(keys), kept, rejected);
  });
}

}  // namespace shiva::cpu::SHIVA_ISA
