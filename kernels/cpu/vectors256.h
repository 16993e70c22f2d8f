// Vectors of 8 outputs in AVX2 and the shape of their tiles. Included by the paths of 256 bits, which have set MM_TARGET and
// define Part, begin, dot and join after it (see product.h).

constexpr int LANES = 8, VECTORS = 2, ROWS = 4, DEPTH = 4, FEW = 4;  // DEPTH columns lie together in a panel
constexpr int FLIP8 = 128;  // what turns a signed byte of weight into an unsigned one

using F = __m256;
using I = __m256i;

MM_TARGET inline F zero() { return _mm256_setzero_ps(); }
MM_TARGET inline F splat(float value) { return _mm256_set1_ps(value); }
MM_TARGET inline F load(const float *from) { return _mm256_loadu_ps(from); }
MM_TARGET inline void store(float *to, F value) { _mm256_storeu_ps(to, value); }
MM_TARGET inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
MM_TARGET inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
MM_TARGET inline F floats(I value) { return _mm256_cvtepi32_ps(value); }
// The sums of 8 vectors side by side, each added up in the same order.
MM_TARGET inline void sums_of_8(const float *from, float *to) {
    F v[8];
    for (int i = 0; i < 8; ++i) v[i] = load(from + i * LANES);
    for (int i = 0; i < 4; ++i) v[i] = _mm256_hadd_ps(v[2 * i], v[2 * i + 1]);
    for (int i = 0; i < 2; ++i) v[i] = _mm256_hadd_ps(v[2 * i], v[2 * i + 1]);
    store(to, _mm256_add_ps(_mm256_permute2f128_ps(v[0], v[1], 0x20), _mm256_permute2f128_ps(v[0], v[1], 0x31)));
}

MM_TARGET inline I splat_int(int32_t value) { return _mm256_set1_epi32(value); }
MM_TARGET inline I load_int(const uint8_t *from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)); }
MM_TARGET inline void store_int(uint8_t *to, I value) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), value); }
MM_TARGET inline I low_halves(I value) { return _mm256_and_si256(value, _mm256_set1_epi8(15)); }
MM_TARGET inline I high_halves(I value) { return low_halves(_mm256_srli_epi16(value, 4)); }
MM_TARGET inline I flipped(I value) { return _mm256_xor_si256(value, _mm256_set1_epi8(char(FLIP8))); }

// 16-bit floats: the lower (0) or upper (1) half of every 32-bit word.
template <int HALF>
MM_TARGET inline F from_bfloats(I value) {
    return _mm256_castsi256_ps(HALF ? _mm256_and_si256(value, _mm256_set1_epi32(int(0xffff0000))) : _mm256_slli_epi32(value, 16));
}
template <int HALF>
MM_TARGET inline F from_halves(I value) {
    const I words = HALF ? _mm256_srli_epi32(value, 16) : _mm256_and_si256(value, _mm256_set1_epi32(0xffff));
    const I packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
    return _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
}
MM_TARGET inline F as_floats(I value) { return _mm256_castsi256_ps(value); }

// LANES values of an array of any type.
template <Type TYPE>
MM_TARGET inline F load_as(const void *data, int64_t index) {
    if constexpr (TYPE == Type::f32) return _mm256_loadu_ps(static_cast<const float *>(data) + index);
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i *>(static_cast<const uint16_t *>(data) + index));
    if constexpr (TYPE == Type::f16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

// LANES rows of 32 bytes, `stride` apart. Rows from `rows` on are zeros.
MM_TARGET inline void load_rows(const uint8_t *from, int64_t stride, int64_t rows, I (&to)[8]) {
    if (rows >= LANES)
        for (int i = 0; i < 8; ++i) to[i] = load_int(from + i * stride);
    else
        for (int i = 0; i < 8; ++i) to[i] = i < rows ? load_int(from + i * stride) : _mm256_setzero_si256();
}

// In every 128 bits: the first (0) or last (1) two words of a and b in turn, or pairs of words; then 128 bits of a and of b.
template <int HALF>
MM_TARGET inline I words_of(I a, I b) {
    return HALF ? _mm256_unpackhi_epi32(a, b) : _mm256_unpacklo_epi32(a, b);
}
template <int HALF>
MM_TARGET inline I pairs_of(I a, I b) {
    return HALF ? _mm256_unpackhi_epi64(a, b) : _mm256_unpacklo_epi64(a, b);
}
template <int HALF>
MM_TARGET inline I quads_of(I a, I b) {
    return _mm256_permute2x128_si256(a, b, HALF ? 0x31 : 0x20);
}

#include "turn.h"

#define MM_ROW_SUMS
MM_TARGET inline I add_int(I a, I b) { return _mm256_add_epi32(a, b); }
MM_TARGET inline I repeated(const int8_t *from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)); }
