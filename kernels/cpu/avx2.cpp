// AVX2: 32 products per instruction in 16 bits (which cannot overflow here: for 4-bit weights see kernels/packing.py), summed
// in 32.
#if defined(__x86_64__)
#include <immintrin.h>

#include <vector>

#include "kernels.h"

namespace mm {
namespace {

#define MM_TARGET __attribute__((target("avx2")))
#define MM_PROJECT_DOWN project_down
#include "rows.h"

MM_TARGET inline __m256i dot32(const int8_t *x, const uint8_t *w) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(w)),
                                               _mm256_loadu_si256(reinterpret_cast<const __m256i *>(x)));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

// Signed weights: in 16 bits, where -128 * -128 fits.
MM_TARGET inline __m256i dot32(const int8_t *x, const int8_t *w) {
    __m256i sum = _mm256_setzero_si256();
    for (int i = 0; i < 32; i += 16)
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(x + i))),
                                                      _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(w + i)))));
    return sum;
}

template <typename Weight>
MM_TARGET inline void dots(const int8_t *x, const Weight *w, int64_t G, int32_t *sums) {
    for (int64_t g = 0; g < G; ++g, x += GROUP, w += GROUP) {
        const __m256i eight = _mm256_add_epi32(dot32(x, w), dot32(x + 32, w + 32));
        __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
        four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
        sums[g] = _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
    }
}

MM_TARGET inline void group_dots(const int8_t *x, const uint8_t *w, int64_t G, int32_t *sums) { dots(x, w, G, sums); }
MM_TARGET inline void signed_dots(const int8_t *x, const int8_t *w, int64_t G, int32_t *sums) { dots(x, w, G, sums); }

#include "dots.h"

}  // namespace

const Path avx2_path{"avx2", [] { return bool(__builtin_cpu_supports("avx2")); }, quantize, linear};

}  // namespace mm
#endif
