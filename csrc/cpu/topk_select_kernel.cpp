// Radix select: find the key of the k-th best token by histograms of 11 bits, then split the row in one pass.
#include "cpu/topk_select_kernel.h"

#include "core/ordered_key.h"
#include "cpu/scalar.h"

namespace shiva::cpu::SHIVA_ISA {
namespace {

constexpr int kRadixBits = 11;
constexpr int kBins = 1 << kRadixBits;

inline uint32_t key_of(float score) { return ordered_key(__builtin_bit_cast(uint32_t, score)); }
inline uint64_t key_of(double score) { return ordered_key(__builtin_bit_cast(uint64_t, score)); }

// The k-th largest of keys[n]; *ties gets how many tokens that equal it belong to the k best. candidates: scratch [n].
template <typename Key>
Key kth_largest(const Key* keys, int64_t n, int64_t k, Key* candidates, int64_t* ties) {
  const Key* source = keys;
  int64_t count = n;
  Key threshold = 0;
  for (int top = sizeof(Key) * 8; top > 0;) {
    const int bits = top < kRadixBits ? top : kRadixBits;
    const int shift = top - bits;
    const Key mask = (Key(1) << bits) - 1;
    int64_t histogram[kBins] = {};
    for (int64_t i = 0; i < count; ++i) ++histogram[(source[i] >> shift) & mask];
    int64_t bin = mask;
    while (histogram[bin] < k) k -= histogram[bin--];
    threshold |= Key(bin) << shift;
    // Only tokens of this bin can still be the k-th; narrowing in place is safe, as writes trail reads.
    int64_t next = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Key key = source[i];
      candidates[next] = key;
      next += ((key >> shift) & mask) == Key(bin);
    }
    source = candidates;
    count = next;
    top = shift;
    if (count == k && count == 1) {
      threshold = source[0];
      break;
    }
  }
  *ties = k;
  return threshold;
}

template <typename T, typename Key>
void select(const T* scores, int64_t n, int64_t k, Key* keys, int64_t* kept, int64_t* rejected) {
  for (int64_t i = 0; i < n; ++i) keys[i] = key_of(load(scores[i]));
  int64_t ties = 0;
  const Key threshold = kth_largest(keys, n, k, keys + n, &ties);
  for (int64_t i = 0; i < n; ++i) {
    const bool tie = keys[i] == threshold;
    const bool keep = keys[i] > threshold || (tie && ties > 0);
    ties -= tie;
    int64_t*& out = keep ? kept : rejected;
    *out++ = i;
  }
}

}  // namespace

void topk_select_row(
    Dtype dtype, const void* scores, int64_t n, int64_t k, void* keys, int64_t* kept, int64_t* rejected) {
  if (dtype == Dtype::Float64)
    return select(static_cast<const double*>(scores), n, k, static_cast<uint64_t*>(keys), kept, rejected);
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (sizeof(T) < sizeof(double))
      select(static_cast<const T*>(scores), n, k, static_cast<uint32_t*>(keys), kept, rejected);
  });
}

}  // namespace shiva::cpu::SHIVA_ISA
