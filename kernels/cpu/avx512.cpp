// AVX512-VNNI: vpdpbusd multiplies unsigned weights (value + 8) with signed activations, four columns of K at a time.
//
// Design choices:
// - Many tokens and few have a product each (many512.h, few512.h): the one multiplies from registers, the other reads weights
//   as fast as memory gives them.
// - The + 8 of the storage costs nothing: a group's sums start at -8 * (sum of its activations) instead of zero.
// - 8-bit weights go the same ways: read with their top bit turned they are value + 128.
// - The branch is added to the fp32 sums, in fp32.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "kernels.h"

namespace mm {
namespace {

#define MM_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")))
#define MM_PROJECT_DOWN project_down_wide
MM_TARGET void project_down_wide(const QuantizeArgs &a, int64_t first, int64_t count, const float *x, float *down, int64_t from,
                                 int64_t to);
#include "rows.h"
#include "project512.h"

// -8 (or -128) * (sum of a group's activations), from one instruction per group.
MM_TARGET inline int32_t offset_of(const LinearArgs &a, const int8_t *x) {
    const __m512i zeros = _mm512_set1_epi8(char(a.weight_bits == 4 ? 8 : 128));
    return -_mm512_reduce_add_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), zeros, _mm512_loadu_si512(x)));
}

inline std::vector<float> scaled_low(const LinearArgs &a) {
    std::vector<float> low(a.low, a.low + (a.R ? a.M * a.R : 0));
    if (a.branch_scales != nullptr)
        for (int64_t i = 0; i < int64_t(low.size()); ++i) low[size_t(i)] *= a.branch_scales[i % a.R];
    return low;
}

#include "few512.h"
#include "many512.h"

constexpr int64_t FEW = 8;  // at so many tokens both products take about as long

MM_TARGET void linear(const LinearArgs &a) {
    if (a.M > FEW) return linear_many(a);
    if (a.weight_bits == 4) return a.grouped() ? linear_few<4, true>(a) : linear_few<4, false>(a);
    return a.grouped() ? linear_few<8, true>(a) : linear_few<8, false>(a);
}

bool runs_here() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}

}  // namespace

const Path avx512_path{"avx512", runs_here, quantize, linear};

}  // namespace mm
#endif
