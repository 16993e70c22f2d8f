// AVX2: vpmaddubsw multiplies unsigned weights (value + 8, at most 15) with signed activations and adds pairs in 16 bits. Eight
// such sums fit there (8 * 2 * 15 * 128 < 2^15, whatever the activations), and only then are they widened to 32 bits: 2.25
// instructions for 32 products. 8-bit weights, which would saturate at once, are two 4-bit ones: value + 128 = 16 high + low.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"

namespace mm {
namespace {

#define MM_TARGET __attribute__((target("avx2,fma,f16c")))
#include "vectors256.h"

using Part = __m256i;  // 16 sums of 16 bits
constexpr int CHAIN = 8, PLANES8 = 2;

MM_TARGET inline Part begin(I) { return _mm256_setzero_si256(); }
MM_TARGET inline Part dot(Part part, I w, I x) { return _mm256_add_epi16(part, _mm256_maddubs_epi16(w, x)); }
MM_TARGET inline Part plus(Part a, Part b) { return _mm256_add_epi16(a, b); }
template <int PLANE>
MM_TARGET inline I join(I sums, Part part) {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(part, _mm256_set1_epi16(PLANE ? 16 : 1)));
}
template <int BITS, int PLANE>
MM_TARGET inline I plane(I w) {
    return BITS == 4 ? w : PLANE ? high_halves(w) : low_halves(w);
}

#include "rows.h"
#include "product.h"

bool runs_here() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }

}  // namespace

const Path avx2_path{"avx2", runs_here, quantize, linear, FEW, layer_few};

}  // namespace mm
#endif
