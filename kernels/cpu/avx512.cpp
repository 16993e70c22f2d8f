// AVX512-VNNI: vpdpbusd multiplies unsigned weights (value + 8, or + 128) with signed activations, four columns of K at a time.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"

namespace mm {
namespace {

#define MM_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")))

constexpr int LANES = 16, VECTORS = 2, ROWS = 6, DEPTH = 4, FEW = 8;
constexpr int FLIP8 = 128;

using F = __m512;
using I = __m512i;

MM_TARGET inline F zero() { return _mm512_setzero_ps(); }
MM_TARGET inline F splat(float value) { return _mm512_set1_ps(value); }
MM_TARGET inline F load(const float *from) { return _mm512_loadu_ps(from); }
MM_TARGET inline void store(float *to, F value) { _mm512_storeu_ps(to, value); }
MM_TARGET inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
MM_TARGET inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
MM_TARGET inline F floats(I value) { return _mm512_cvtepi32_ps(value); }

// As in vectors256.h, after the two halves of each vector
MM_TARGET inline void sums_of_8(const float *from, float *to) {
    __m256 v[8];
    for (int i = 0; i < 8; ++i) v[i] = _mm256_add_ps(_mm256_loadu_ps(from + i * LANES), _mm256_loadu_ps(from + i * LANES + 8));
    for (int i = 0; i < 4; ++i) v[i] = _mm256_hadd_ps(v[2 * i], v[2 * i + 1]);
    for (int i = 0; i < 2; ++i) v[i] = _mm256_hadd_ps(v[2 * i], v[2 * i + 1]);
    _mm256_storeu_ps(to, _mm256_add_ps(_mm256_permute2f128_ps(v[0], v[1], 0x20), _mm256_permute2f128_ps(v[0], v[1], 0x31)));
}

MM_TARGET inline I splat_int(int32_t value) { return _mm512_set1_epi32(value); }
MM_TARGET inline I load_int(const uint8_t *from) { return _mm512_loadu_si512(from); }
MM_TARGET inline void store_int(uint8_t *to, I value) { _mm512_storeu_si512(to, value); }
MM_TARGET inline I low_halves(I value) { return _mm512_and_si512(value, _mm512_set1_epi8(15)); }
MM_TARGET inline I high_halves(I value) { return low_halves(_mm512_srli_epi16(value, 4)); }
MM_TARGET inline I flipped(I value) { return _mm512_xor_si512(value, _mm512_set1_epi8(char(FLIP8))); }

template <int HALF>
MM_TARGET inline F from_bfloats(I value) {
    return _mm512_castsi512_ps(HALF ? _mm512_and_si512(value, _mm512_set1_epi32(int(0xffff0000))) : _mm512_slli_epi32(value, 16));
}
template <int HALF>
MM_TARGET inline F from_halves(I value) {
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(HALF ? _mm512_srli_epi32(value, 16) : value));
}
MM_TARGET inline F as_floats(I value) { return _mm512_castsi512_ps(value); }

template <Type TYPE>
MM_TARGET inline F load_as(const void *data, int64_t index) {
    if constexpr (TYPE == Type::f32) return _mm512_loadu_ps(static_cast<const float *>(data) + index);
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(static_cast<const uint16_t *>(data) + index));
    if constexpr (TYPE == Type::f16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// 16 rows of 32 bytes, `stride` apart, row i and row i + 8 side by side. Rows from `rows` on are zeros.
MM_TARGET inline void load_rows(const uint8_t *from, int64_t stride, int64_t rows, I (&to)[8]) {
    if (rows >= LANES)
        for (int i = 0; i < 8; ++i)
            to[i] = _mm512_inserti64x4(
                _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from + i * stride))),
                _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from + (i + 8) * stride)), 1);
    else
        for (int i = 0; i < 8; ++i) {
            const __m256i none = _mm256_setzero_si256();
            const __m256i low = i < rows ? _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from + i * stride)) : none;
            const __m256i high =
                i + 8 < rows ? _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from + (i + 8) * stride)) : none;
            to[i] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
        }
}

// As in vectors256.h, in either half of the registers
template <int HALF>
MM_TARGET inline I words_of(I a, I b) {
    return HALF ? _mm512_unpackhi_epi32(a, b) : _mm512_unpacklo_epi32(a, b);
}
template <int HALF>
MM_TARGET inline I pairs_of(I a, I b) {
    return HALF ? _mm512_unpackhi_epi64(a, b) : _mm512_unpacklo_epi64(a, b);
}
template <int HALF>
MM_TARGET inline I quads_of(I a, I b) {
    constexpr int64_t D = HALF ? 2 : 0;
    return _mm512_permutex2var_epi64(a, _mm512_setr_epi64(D, D + 1, D + 8, D + 9, D + 4, D + 5, D + 12, D + 13), b);
}

#include "turn.h"

#define MM_ROW_SUMS
MM_TARGET inline I add_int(I a, I b) { return _mm512_add_epi32(a, b); }
MM_TARGET inline I repeated(const int8_t *from) {
    return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
}

using Part = I;
constexpr int CHAIN = 16, PLANES8 = 1;

MM_TARGET inline Part begin(I sums) { return sums; }
MM_TARGET inline Part dot(Part part, I w, I x) { return _mm512_dpbusd_epi32(part, w, x); }
MM_TARGET inline Part plus(Part a, Part b) { return add_int(a, b); }
template <int PLANE>
MM_TARGET inline I join(I, Part part) {
    return part;
}
template <int BITS, int PLANE>
MM_TARGET inline I plane(I w) {
    return w;
}

#include "rows.h"
#include "pairs512.h"
struct Panel;
template <int T, int BITS, bool GROUPED>
MM_TARGET void whole_tile(const int8_t *x, const int32_t *offsets, const float *scales, const Panel &p, int64_t G, float *sums);
#define MM_WHOLE_TILE whole_tile
#include "product.h"
#include "tile512.h"

bool runs_here() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("f16c");
}

}  // namespace

const Path avx512_path{"avx512", runs_here, quantize, linear, FEW, layer_few};

}  // namespace mm
#endif
