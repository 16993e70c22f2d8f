// The down projection of bf16 tokens by a bf16 `down`, in products of pairs, without widening either (AVX512-BF16). The order of
// additions is the same for one token and for a tile of them, as in project.h. Included by avx512.cpp.

#define MM_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,f16c")))
MM_BF16 inline __m512bh load_pairs(const uint16_t *at, __mmask32 mask) {
    return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(mask, at));
}

template <int TOKENS, int RANKS>
MM_BF16 inline void pairs_tile(const QuantizeArgs &a, int64_t first, int64_t from, int64_t to) {
    const uint16_t *x = static_cast<const uint16_t *>(a.x.data) + first * a.K;
    const uint16_t *down = static_cast<const uint16_t *>(a.down.data);
    for (int64_t r = from; r < to; r += RANKS) {
        __m512 sums[TOKENS][RANKS];
        for (int i = 0; i < TOKENS; ++i)
            for (int j = 0; j < RANKS; ++j) sums[i][j] = _mm512_setzero_ps();
        for (int64_t k = 0; k < a.K; k += 32) {
            const __mmask32 mask = a.K - k >= 32 ? ~__mmask32(0) : __mmask32((1u << (a.K - k)) - 1);
            __m512bh d[RANKS];
#pragma GCC unroll 8
            for (int j = 0; j < RANKS; ++j) {
                if (TOKENS == 1) __builtin_prefetch(down + (r + j) * a.K + k + 512);
                d[j] = load_pairs(down + (r + j) * a.K + k, mask);
            }
#pragma GCC unroll 8
            for (int i = 0; i < TOKENS; ++i) {
                const __m512bh v = load_pairs(x + i * a.K + k, mask);
#pragma GCC unroll 8
                for (int j = 0; j < RANKS; ++j) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], v, d[j]);
            }
        }
        for (int i = 0; i < TOKENS; ++i)
            for (int j = 0; j < RANKS; ++j) a.low[(first + i) * a.R + r + j] = _mm512_reduce_add_ps(sums[i][j]);
    }
}

MM_TARGET bool project_pairs(const QuantizeArgs &a, int64_t first, int64_t count, int64_t from, int64_t to) {
    static const bool here = __builtin_cpu_supports("avx512bf16");
    if (!here || a.x.type != Type::bf16 || a.down.type != Type::bf16) return false;
    if (count == QUANTIZE_ROWS)
        pairs_tile<QUANTIZE_ROWS, 2>(a, first, from, to);
    else
        for (int64_t i = 0; i < count; ++i) pairs_tile<1, 8>(a, first + i, from, to);
    return true;
}
#define MM_PROJECT_PAIRS project_pairs
