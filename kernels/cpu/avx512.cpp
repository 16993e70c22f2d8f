// AVX512-VNNI: vpdpbusd multiplies unsigned weights (value + 8) with signed activations, four columns of K at a time.
//
// Design choices:
// - Many tokens: tiles of 12 tokens x 32 outputs. Weights of 32 outputs are expanded once per thread into a panel laid out
//   as the tile reads it; activations are repacked once per call, 12 tokens side by side. 24 sums of 32 bits live in
//   registers for one group of 64 columns, then join fp32 sums in the first-level cache with the group's scales.
// - The + 8 of the storage costs nothing: a group's sums start at -8 * (sum of its activations) instead of zero.
// - 8-bit weights go the same ways: read with their top bit turned they are value + 128.
// - Few tokens: 4-bit rows are read as they lie, once, and multiplied with up to 4 tokens.
// - The branch is added to the fp32 sums, in fp32.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <vector>

#include "kernels.h"

namespace mm {
namespace {

#define MM_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")))
#define MM_PROJECT_DOWN project_down_wide
MM_TARGET void project_down_wide(const QuantizeArgs &a, int64_t first, int64_t count, const float *x, float *down, int64_t from,
                                 int64_t to);
#include "rows.h"

// ---- down projection: 8 tokens x 2 ranks of sums in registers, `down` widened on the fly

MM_TARGET inline __m512 load16(Array from, int64_t index, __mmask16 mask) {
    if (from.type == Type::f32) return _mm512_maskz_loadu_ps(mask, static_cast<const float *>(from.data) + index);
    const __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t *>(from.data) + index);
    if (from.type == Type::f16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// Ranks [from, to) of TOKENS tokens, RANKS at a time, so that enough sums are under way to hide an addition's latency.
template <int TOKENS, int RANKS>
MM_TARGET inline void project_rows(const QuantizeArgs &a, int64_t first, const float *x, int64_t from, int64_t to) {
    for (int64_t r = from; r < to; r += RANKS) {
        __m512 sums[TOKENS][RANKS];
        for (int i = 0; i < TOKENS; ++i)
            for (int j = 0; j < RANKS; ++j) sums[i][j] = _mm512_setzero_ps();
        for (int64_t k = 0; k < a.K; k += 16) {
            const __mmask16 mask = a.K - k >= 16 ? 0xffff : __mmask16((1 << (a.K - k)) - 1);
            __m512 d[RANKS];
#pragma GCC unroll 8
            for (int j = 0; j < RANKS; ++j) d[j] = load16(a.down, (r + j) * a.K + k, mask);
#pragma GCC unroll 8
            for (int i = 0; i < TOKENS; ++i) {
                const __m512 v = _mm512_maskz_loadu_ps(mask, x + i * a.C + k);
#pragma GCC unroll 8
                for (int j = 0; j < RANKS; ++j) sums[i][j] = _mm512_fmadd_ps(v, d[j], sums[i][j]);
            }
        }
        for (int i = 0; i < TOKENS; ++i)
            for (int j = 0; j < RANKS; ++j) a.low[(first + i) * a.R + r + j] = _mm512_reduce_add_ps(sums[i][j]);
    }
}

MM_TARGET void project_down_wide(const QuantizeArgs &a, int64_t first, int64_t count, const float *x, float *, int64_t from,
                                 int64_t to) {
    if (count == QUANTIZE_ROWS) return project_rows<QUANTIZE_ROWS, 2>(a, first, x, from, to);
    for (int64_t i = 0; i < count; ++i) project_rows<1, 8>(a, first + i, x + i * a.C, from, to);
}

// ---- what both products share

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

// ---- few tokens

// A group of 64 weights in natural order, + 8 from its 32 bytes or + 128 from its 64.
template <int BITS>
MM_TARGET inline __m512i expand_group(const uint8_t *packed) {
    if constexpr (BITS == 8) return _mm512_xor_si512(_mm512_loadu_si512(packed), _mm512_set1_epi8(char(128)));
    const __m512i twice = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(packed)));
    const __m512i shifts = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
    return _mm512_and_si512(_mm512_srlv_epi16(twice, shifts), _mm512_set1_epi8(15));
}

struct FewTokens {
    std::vector<float> scales, offsets;  // (M, G): scale, and scale * -8 * sum of x
    std::vector<float> low;
};

MM_TARGET FewTokens prepare_few(const LinearArgs &a) {
    FewTokens few{std::vector<float>(size_t(a.M * a.G)), std::vector<float>(size_t(a.M * a.G)), scaled_low(a)};
    for (int64_t m = 0; m < a.M; ++m)
        for (int64_t g = 0; g < a.G; ++g) {
            const float scale = a.scales[m * a.scale_columns + (a.grouped() ? g : 0)];
            few.scales[size_t(m * a.G + g)] = scale;
            few.offsets[size_t(m * a.G + g)] = scale * float(offset_of(a, a.values + m * a.C + g * GROUP));
        }
    return few;
}

// One output for TOKENS tokens from `m` on; `weight_scales` are fp32.
template <int TOKENS, int BITS>
MM_TARGET inline void row_dots(const LinearArgs &a, const FewTokens &few, int64_t m, int64_t n, const float *weight_scales,
                               float bias) {
    const uint8_t *w = a.weight + n * a.row_bytes();
    const int8_t *x = a.values + m * a.C;
    const float *scales = few.scales.data() + m * a.G, *offsets = few.offsets.data() + m * a.G;
    __m512 sums[TOKENS];
    for (int t = 0; t < TOKENS; ++t) sums[t] = _mm512_setzero_ps();
    for (int64_t g = 0; g < a.G; ++g) {
        const __m512i group = expand_group<BITS>(w + g * (GROUP * BITS / 8));
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; ++t) {
            const __m512i dots = _mm512_dpbusd_epi32(_mm512_setzero_si512(), group, _mm512_loadu_si512(x + t * a.C + g * GROUP));
            const __m512 scale = _mm512_set1_ps(weight_scales[g] * scales[t * a.G + g]);
            sums[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), scale, sums[t]);
        }
    }
    for (int t = 0; t < TOKENS; ++t) {
        for (int64_t g = 0; g < a.G; g += 16) {
            const __mmask16 mask = a.G - g >= 16 ? 0xffff : __mmask16((1 << (a.G - g)) - 1);
            sums[t] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, weight_scales + g),
                                      _mm512_maskz_loadu_ps(mask, offsets + t * a.G + g), sums[t]);
        }
        for (int64_t r = 0; r < a.R; r += 16)
            sums[t] = _mm512_fmadd_ps(load16(a.up, n * a.R + r, 0xffff),
                                      _mm512_loadu_ps(few.low.data() + (m + t) * a.R + r), sums[t]);
        const float y = _mm512_reduce_add_ps(sums[t]) + bias;
        store_floats(&y, 1, a.out.at((m + t) * a.N + n));
    }
}

template <int BITS>
MM_TARGET void linear_few(const LinearArgs &a) {
    const FewTokens few = prepare_few(a);
#pragma omp parallel num_threads(a.threads)
    {
        std::vector<float> weight_scales(size_t(a.G));
#pragma omp for schedule(dynamic, 64)
        for (int64_t n = 0; n < a.N; ++n) {
            load_floats(a.weight_scales.at(n * a.G), a.G, weight_scales.data());
            float bias = 0;
            if (a.bias) load_floats(a.bias.at(n), 1, &bias);
            int64_t m = 0;
            for (; m + 4 <= a.M; m += 4) row_dots<4, BITS>(a, few, m, n, weight_scales.data(), bias);
            for (; m < a.M; ++m) row_dots<1, BITS>(a, few, m, n, weight_scales.data(), bias);
        }
    }
}

// ---- many tokens

constexpr int64_t ROWS = 12, COLUMNS = 32, DEEP = GROUP / 4;

struct Blocks {  // activations, ROWS tokens side by side; the last block is filled up with zeros
    std::vector<int32_t> x;        // (blocks, C / 4, ROWS): four columns of K each
    std::vector<int32_t> offsets;  // (blocks, G, ROWS)
    std::vector<float> scales;     // (blocks, scale_columns, ROWS)
    std::vector<float> low;        // (blocks, R, ROWS)
    int64_t count;
};

MM_TARGET void pack_block(const LinearArgs &a, const std::vector<float> &low, Blocks &b, int64_t block) {
    const int64_t quads = a.C / 4;
    for (int64_t i = 0; i < ROWS && block * ROWS + i < a.M; ++i) {
        const int64_t m = block * ROWS + i;
        const int8_t *x = a.values + m * a.C;
        int32_t *to = b.x.data() + block * quads * ROWS + i;
        for (int64_t q = 0; q < quads; ++q) std::memcpy(to + q * ROWS, x + 4 * q, 4);
        for (int64_t g = 0; g < a.G; ++g) b.offsets[size_t((block * a.G + g) * ROWS + i)] = offset_of(a, x + g * GROUP);
        for (int64_t g = 0; g < a.scale_columns; ++g)
            b.scales[size_t((block * a.scale_columns + g) * ROWS + i)] = a.scales[m * a.scale_columns + g];
        for (int64_t r = 0; r < a.R; ++r) b.low[size_t((block * a.R + r) * ROWS + i)] = low[size_t(m * a.R + r)];
    }
}

struct Panel {  // COLUMNS outputs; those past the end are zero
    std::vector<uint8_t> w;            // (C / 4, COLUMNS, 4): value + 8 or + 128
    std::vector<float> scales;         // (G, COLUMNS)
    std::vector<float> up, bias, row;  // (R, COLUMNS), (COLUMNS), and a place for one row of either
    explicit Panel(const LinearArgs &a)
        : w(size_t(a.C * COLUMNS)), scales(size_t(a.G * COLUMNS)), up(size_t(a.R * COLUMNS)), bias(size_t(COLUMNS)),
          row(size_t(std::max(a.G, a.R))) {}
};

// 16 rows of 32 packed bytes to 16 quads of K x 16 outputs x 4 bytes, COLUMNS * 4 bytes apart.
MM_TARGET inline void expand_tile(const uint8_t *packed, int64_t stride, int64_t rows, uint8_t *to) {
    __m512i r[8], s[8];
    const auto half = [&](int64_t i) __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma"))) {
        return i < rows ? _mm256_loadu_si256(reinterpret_cast<const __m256i *>(packed + i * stride)) : _mm256_setzero_si256();
    };
    for (int i = 0; i < 8; ++i) r[i] = _mm512_inserti64x4(_mm512_castsi256_si512(half(i)), half(i + 8), 1);
    // An 8 x 8 transposition of 32-bit words in either half of the registers
    for (int i = 0; i < 4; ++i) {
        s[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        s[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 2; ++j) {
            r[4 * i + 2 * j] = _mm512_unpacklo_epi64(s[4 * i + j], s[4 * i + 2 + j]);
            r[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(s[4 * i + j], s[4 * i + 2 + j]);
        }
    const __m512i lower = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13), upper = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
    const __m512i mask = _mm512_set1_epi8(15);
    for (int j = 0; j < 4; ++j) {
        const __m512i quads[2] = {_mm512_permutex2var_epi64(r[j], lower, r[j + 4]),
                                  _mm512_permutex2var_epi64(r[j], upper, r[j + 4])};
        for (int h = 0; h < 2; ++h) {
            uint8_t *at = to + (j + 4 * h) * COLUMNS * 4;
            _mm512_storeu_si512(at, _mm512_and_si512(quads[h], mask));
            _mm512_storeu_si512(at + 8 * COLUMNS * 4, _mm512_and_si512(_mm512_srli_epi16(quads[h], 4), mask));
        }
    }
}

// The same from rows of 64 bytes: a gather a quad, whose 16 lines stay in the cache for all of them.
MM_TARGET inline void turn_tile(const uint8_t *bytes, int64_t stride, int64_t rows, uint8_t *to) {
    const __mmask16 mask = rows >= 16 ? 0xffff : rows <= 0 ? 0 : __mmask16((1 << rows) - 1);
    const __m512i places = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                              _mm512_set1_epi32(int(stride)));
    for (int64_t q = 0; q < DEEP; ++q) {
        const __m512i quad = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), mask, places, bytes + 4 * q, 1);
        _mm512_storeu_si512(to + q * COLUMNS * 4, _mm512_xor_si512(quad, _mm512_set1_epi8(char(128))));
    }
}

MM_TARGET void transpose_rows(Array from, int64_t first, int64_t rows, int64_t length, float *row, float *to) {
    for (int64_t c = 0; c < rows; ++c) {
        load_floats(from.at((first + c) * length), length, row);
        for (int64_t i = 0; i < length; ++i) to[i * COLUMNS + c] = row[i];
    }
}

MM_TARGET void fill_panel(const LinearArgs &a, int64_t first, Panel &p) {
    const int64_t rows = std::min(COLUMNS, a.N - first), stride = a.row_bytes();
    if (rows < COLUMNS) {
        std::fill(p.scales.begin(), p.scales.end(), 0.0f);
        std::fill(p.up.begin(), p.up.end(), 0.0f);
    }
    for (int64_t g = 0; g < a.G; ++g)
        for (int64_t c = 0; c < COLUMNS; c += 16) {
            const uint8_t *from = a.weight + (first + c) * stride + g * GROUP * a.weight_bits / 8;
            uint8_t *to = p.w.data() + g * GROUP * COLUMNS + c * 4;
            if (a.weight_bits == 4)
                expand_tile(from, stride, rows - c, to);
            else
                turn_tile(from, stride, rows - c, to);
        }
    transpose_rows(a.weight_scales, first, rows, a.G, p.row.data(), p.scales.data());
    if (a.R) transpose_rows(a.up, first, rows, a.R, p.row.data(), p.up.data());
    std::fill(p.bias.begin(), p.bias.end(), 0.0f);
    if (a.bias) load_floats(a.bias.at(first), rows, p.bias.data());
}

// A group of a whole tile, in assembly: GCC 12 finds no allocation of 27 registers that does not store sums at every step,
// which costs half of the speed. zmm0-11 are the sums of the left 16 outputs, zmm12-23 of the right, 24 and 25 the weights.
#define MM_STR(x) #x
#define MM_START(i, l, r)                                                  \
    "vpbroadcastd 4*" MM_STR(i) "(%[offsets]), %%zmm" MM_STR(l) "\n\t"     \
    "vmovdqa64 %%zmm" MM_STR(l) ", %%zmm" MM_STR(r) "\n\t"
#define MM_STEP(i, l, r, t)                                                \
    "vpbroadcastd 4*" MM_STR(i) "(%[x]), %%zmm" MM_STR(t) "\n\t"           \
    "vpdpbusd %%zmm" MM_STR(t) ", %%zmm24, %%zmm" MM_STR(l) "\n\t"         \
    "vpdpbusd %%zmm" MM_STR(t) ", %%zmm25, %%zmm" MM_STR(r) "\n\t"
#define MM_JOIN(i, l, r)                                                   \
    "vcvtdq2ps %%zmm" MM_STR(l) ", %%zmm" MM_STR(l) "\n\t"                 \
    "vcvtdq2ps %%zmm" MM_STR(r) ", %%zmm" MM_STR(r) "\n\t"                 \
    "vfmadd213ps 128*" MM_STR(i) "(%[sums]), %%zmm24, %%zmm" MM_STR(l) "\n\t"    \
    "vfmadd213ps 128*" MM_STR(i) "+64(%[sums]), %%zmm25, %%zmm" MM_STR(r) "\n\t" \
    "vmovaps %%zmm" MM_STR(l) ", 128*" MM_STR(i) "(%[sums])\n\t"           \
    "vmovaps %%zmm" MM_STR(r) ", 128*" MM_STR(i) "+64(%[sums])\n\t"
#define MM_JOIN_SCALED(i, l, r)                                            \
    "vbroadcastss 4*" MM_STR(i) "(%[scales]), %%zmm26\n\t"                 \
    "vmulps %%zmm26, %%zmm24, %%zmm27\n\t"                                 \
    "vmulps %%zmm26, %%zmm25, %%zmm28\n\t"                                 \
    "vcvtdq2ps %%zmm" MM_STR(l) ", %%zmm" MM_STR(l) "\n\t"                 \
    "vcvtdq2ps %%zmm" MM_STR(r) ", %%zmm" MM_STR(r) "\n\t"                 \
    "vfmadd213ps 128*" MM_STR(i) "(%[sums]), %%zmm27, %%zmm" MM_STR(l) "\n\t"    \
    "vfmadd213ps 128*" MM_STR(i) "+64(%[sums]), %%zmm28, %%zmm" MM_STR(r) "\n\t" \
    "vmovaps %%zmm" MM_STR(l) ", 128*" MM_STR(i) "(%[sums])\n\t"           \
    "vmovaps %%zmm" MM_STR(r) ", 128*" MM_STR(i) "+64(%[sums])\n\t"
#define MM_TOKENS(DO) DO(0, 0, 12) DO(1, 1, 13) DO(2, 2, 14) DO(3, 3, 15) DO(4, 4, 16) DO(5, 5, 17) DO(6, 6, 18) DO(7, 7, 19) \
    DO(8, 8, 20) DO(9, 9, 21) DO(10, 10, 22) DO(11, 11, 23)
#define MM_STEPS MM_STEP(0, 0, 12, 26) MM_STEP(1, 1, 13, 27) MM_STEP(2, 2, 14, 28) MM_STEP(3, 3, 15, 29) MM_STEP(4, 4, 16, 30) \
    MM_STEP(5, 5, 17, 31) MM_STEP(6, 6, 18, 26) MM_STEP(7, 7, 19, 27) MM_STEP(8, 8, 20, 28) MM_STEP(9, 9, 21, 29)             \
    MM_STEP(10, 10, 22, 30) MM_STEP(11, 11, 23, 31)
#define MM_GROUP(JOIN)                                                     \
    MM_TOKENS(MM_START)                                                    \
    "movl $16, %[count]\n\t"                                               \
    ".p2align 4\n"                                                         \
    "1:\n\t"                                                               \
    "vmovdqu64 (%[w]), %%zmm24\n\t"                                        \
    "vmovdqu64 64(%[w]), %%zmm25\n\t"                                      \
    MM_STEPS                                                               \
    "addq $128, %[w]\n\t"                                                  \
    "addq $48, %[x]\n\t"                                                   \
    "decl %[count]\n\t"                                                    \
    "jnz 1b\n\t"                                                           \
    "vmovups (%[ws]), %%zmm24\n\t"                                         \
    "vmovups 64(%[ws]), %%zmm25\n\t"                                       \
    MM_TOKENS(JOIN)
#define MM_CLOBBERS                                                                                               \
    "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", \
        "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23",   \
        "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31"

template <bool GROUPED>
MM_TARGET inline void whole_tile(const int32_t *x, const int32_t *offsets, const float *scales, const Panel &p, int64_t G,
                                 float *sums) {
    static_assert(ROWS == 12 && COLUMNS == 32 && DEEP == 16, "the assembly is written for these");
    const uint8_t *w = p.w.data();
    const float *ws = p.scales.data();
    for (int i = 0; i < ROWS * COLUMNS; i += 16) _mm512_store_ps(sums + i, _mm512_setzero_ps());
    for (int64_t g = 0; g < G; ++g, offsets += ROWS, ws += COLUMNS, scales += GROUPED ? ROWS : 0) {
        int count;
        if constexpr (GROUPED)
            asm volatile(MM_GROUP(MM_JOIN_SCALED)
                         : [x] "+r"(x), [w] "+r"(w), [count] "=&r"(count)
                         : [offsets] "r"(offsets), [ws] "r"(ws), [sums] "r"(sums), [scales] "r"(scales)
                         : MM_CLOBBERS);
        else
            asm volatile(MM_GROUP(MM_JOIN)
                         : [x] "+r"(x), [w] "+r"(w), [count] "=&r"(count)
                         : [offsets] "r"(offsets), [ws] "r"(ws), [sums] "r"(sums)
                         : MM_CLOBBERS);
    }
}

// A tile of fewer tokens (a part of ROWS): TOKENS x COLUMNS sums over all groups, into `sums` (ROWS, COLUMNS).
template <int TOKENS, bool GROUPED>
MM_TARGET inline void tile(const int32_t *x, const int32_t *offsets, const float *scales, const Panel &p, int64_t G,
                           float *sums) {
    if constexpr (TOKENS == ROWS) return whole_tile<GROUPED>(x, offsets, scales, p, G, sums);
    const uint8_t *w = p.w.data();
    for (int i = 0; i < TOKENS * COLUMNS; i += 16) _mm512_store_ps(sums + i, _mm512_setzero_ps());
    for (int64_t g = 0; g < G; ++g, offsets += ROWS, scales += GROUPED ? ROWS : 0) {
        __m512i dots[TOKENS][2];
#pragma GCC unroll 12
        for (int i = 0; i < TOKENS; ++i) dots[i][0] = dots[i][1] = _mm512_set1_epi32(offsets[i]);
        for (int64_t q = 0; q < DEEP; ++q, x += ROWS, w += COLUMNS * 4) {
            const __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + 64);
#pragma GCC unroll 12
            for (int i = 0; i < TOKENS; ++i) {
                const __m512i four = _mm512_set1_epi32(x[i]);
                dots[i][0] = _mm512_dpbusd_epi32(dots[i][0], w0, four);
                dots[i][1] = _mm512_dpbusd_epi32(dots[i][1], w1, four);
            }
        }
        const __m512 s0 = _mm512_loadu_ps(p.scales.data() + g * COLUMNS);
        const __m512 s1 = _mm512_loadu_ps(p.scales.data() + g * COLUMNS + 16);
#pragma GCC unroll 12
        for (int i = 0; i < TOKENS; ++i) {
            float *at = sums + i * COLUMNS;
            const __m512 scale = _mm512_set1_ps(GROUPED ? scales[i] : 1.0f);
            const __m512 t0 = GROUPED ? _mm512_mul_ps(s0, scale) : s0, t1 = GROUPED ? _mm512_mul_ps(s1, scale) : s1;
            _mm512_store_ps(at, _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[i][0]), t0, _mm512_load_ps(at)));
            _mm512_store_ps(at + 16, _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[i][1]), t1, _mm512_load_ps(at + 16)));
        }
    }
}

// Scales of the tokens, branch and bias onto the sums; then out.
template <int TOKENS>
MM_TARGET inline void finish_tile(const LinearArgs &a, const Blocks &b, const Panel &p, int64_t block, int64_t first,
                                  float *sums) {
    __m512 y[TOKENS][2];
    const __m512 b0 = _mm512_loadu_ps(p.bias.data()), b1 = _mm512_loadu_ps(p.bias.data() + 16);
    const float *scales = b.scales.data() + block * a.scale_columns * ROWS, *low = b.low.data() + block * a.R * ROWS;
#pragma GCC unroll 12
    for (int i = 0; i < TOKENS; ++i) {
        const __m512 scale = _mm512_set1_ps(a.grouped() ? 1.0f : scales[i]);
        y[i][0] = _mm512_fmadd_ps(_mm512_load_ps(sums + i * COLUMNS), scale, b0);
        y[i][1] = _mm512_fmadd_ps(_mm512_load_ps(sums + i * COLUMNS + 16), scale, b1);
    }
    for (int64_t r = 0; r < a.R; ++r, low += ROWS) {
        const __m512 u0 = _mm512_loadu_ps(p.up.data() + r * COLUMNS), u1 = _mm512_loadu_ps(p.up.data() + r * COLUMNS + 16);
#pragma GCC unroll 12
        for (int i = 0; i < TOKENS; ++i) {
            const __m512 l = _mm512_set1_ps(low[i]);
            y[i][0] = _mm512_fmadd_ps(l, u0, y[i][0]);
            y[i][1] = _mm512_fmadd_ps(l, u1, y[i][1]);
        }
    }
    const int64_t columns = std::min(COLUMNS, a.N - first);
    for (int i = 0; i < TOKENS && block * ROWS + i < a.M; ++i) {
        _mm512_store_ps(sums, y[i][0]);
        _mm512_store_ps(sums + 16, y[i][1]);
        store_floats(sums, columns, a.out.at((block * ROWS + i) * a.N + first));
    }
}

template <int TOKENS>
MM_TARGET inline void run_tile(const LinearArgs &a, const Blocks &b, const Panel &p, int64_t block, int64_t first) {
    alignas(64) float sums[ROWS * COLUMNS];
    const int32_t *x = b.x.data() + block * (a.C / 4) * ROWS, *offsets = b.offsets.data() + block * a.G * ROWS;
    if (a.grouped())
        tile<TOKENS, true>(x, offsets, b.scales.data() + block * a.G * ROWS, p, a.G, sums);
    else
        tile<TOKENS, false>(x, offsets, nullptr, p, a.G, sums);
    finish_tile<TOKENS>(a, b, p, block, first, sums);
}

MM_TARGET void linear_many(const LinearArgs &a) {
    const std::vector<float> low = scaled_low(a);
    const int64_t count = (a.M + ROWS - 1) / ROWS, rows = count * ROWS;
    Blocks b{std::vector<int32_t>(size_t(rows * a.C / 4)), std::vector<int32_t>(size_t(rows * a.G)),
             std::vector<float>(size_t(rows * a.scale_columns)), std::vector<float>(size_t(rows * a.R)), count};
#pragma omp parallel num_threads(a.threads)
    {
#pragma omp for schedule(static)
        for (int64_t block = 0; block < count; ++block) pack_block(a, low, b, block);
        Panel panel(a);
#pragma omp for schedule(dynamic, 1)
        for (int64_t first = 0; first < a.N; first += COLUMNS) {
            fill_panel(a, first, panel);
            for (int64_t block = 0; block < count; ++block) {
                const int64_t left = a.M - block * ROWS;
                if (left > 8)
                    run_tile<12>(a, b, panel, block, first);
                else if (left > 4)
                    run_tile<8>(a, b, panel, block, first);
                else
                    run_tile<4>(a, b, panel, block, first);
            }
        }
    }
}

constexpr int64_t FEW = 8;  // at so many tokens both products take about as long

MM_TARGET void linear(const LinearArgs &a) {
    if (a.M > FEW)
        linear_many(a);
    else if (a.weight_bits == 4)
        linear_few<4>(a);
    else
        linear_few<8>(a);
}

bool runs_here() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}

}  // namespace

const Path avx512_path{"avx512", runs_here, quantize, linear};

}  // namespace mm
#endif
