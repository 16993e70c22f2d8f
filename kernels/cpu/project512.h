// The down projection in AVX512: 8 tokens x 2 ranks of sums in registers, `down` widened on the fly. Included like rows.h.

template <Type TYPE>
MM_TARGET inline __m512 load16_as(const void *data, int64_t index, __mmask16 mask) {
    if constexpr (TYPE == Type::f32) return _mm512_maskz_loadu_ps(mask, static_cast<const float *>(data) + index);
    const __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t *>(data) + index);
    if constexpr (TYPE == Type::f16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

MM_TARGET inline __m512 load16(Array from, int64_t index, __mmask16 mask) {
    if (from.type == Type::f32) return load16_as<Type::f32>(from.data, index, mask);
    if (from.type == Type::f16) return load16_as<Type::f16>(from.data, index, mask);
    return load16_as<Type::bf16>(from.data, index, mask);
}

template <int TOKENS, int RANKS, Type TYPE>
MM_TARGET inline void project_step(const QuantizeArgs &a, const float *x, int64_t r, int64_t k, __mmask16 mask,
                                   __m512 (&sums)[TOKENS][RANKS]) {
    __m512 d[RANKS];
#pragma GCC unroll 8
    for (int j = 0; j < RANKS; ++j) d[j] = load16_as<TYPE>(a.down.data, (r + j) * a.K + k, mask);
#pragma GCC unroll 8
    for (int i = 0; i < TOKENS; ++i) {
        const __m512 v = _mm512_maskz_loadu_ps(mask, x + i * a.C + k);
#pragma GCC unroll 8
        for (int j = 0; j < RANKS; ++j) sums[i][j] = _mm512_fmadd_ps(v, d[j], sums[i][j]);
    }
}

// Ranks [from, to) of TOKENS tokens, RANKS at a time, so that enough sums are under way to hide an addition's latency.
template <int TOKENS, int RANKS, Type TYPE>
MM_TARGET inline void project_typed(const QuantizeArgs &a, int64_t first, const float *x, int64_t from, int64_t to) {
    const int64_t whole = a.K / 16 * 16;
    for (int64_t r = from; r < to; r += RANKS) {
        __m512 sums[TOKENS][RANKS];
        for (int i = 0; i < TOKENS; ++i)
            for (int j = 0; j < RANKS; ++j) sums[i][j] = _mm512_setzero_ps();
        for (int64_t k = 0; k < whole; k += 16) project_step<TOKENS, RANKS, TYPE>(a, x, r, k, 0xffff, sums);
        if (whole < a.K) project_step<TOKENS, RANKS, TYPE>(a, x, r, whole, __mmask16((1 << (a.K - whole)) - 1), sums);
        for (int i = 0; i < TOKENS; ++i)
            for (int j = 0; j < RANKS; ++j) a.low[(first + i) * a.R + r + j] = _mm512_reduce_add_ps(sums[i][j]);
    }
}

template <int TOKENS, int RANKS>
MM_TARGET inline void project_rows(const QuantizeArgs &a, int64_t first, const float *x, int64_t from, int64_t to) {
    if (a.down.type == Type::f32) return project_typed<TOKENS, RANKS, Type::f32>(a, first, x, from, to);
    if (a.down.type == Type::f16) return project_typed<TOKENS, RANKS, Type::f16>(a, first, x, from, to);
    project_typed<TOKENS, RANKS, Type::bf16>(a, first, x, from, to);
}

// bf16 tokens and bf16 `down`: products of pairs, without widening either.
#define MM_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")))
MM_BF16 inline __m512bh load_pairs(const uint16_t *at, __mmask32 mask) {
    return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(mask, at));
}

template <int TOKENS, int RANKS>
MM_BF16 inline void project_pairs(const QuantizeArgs &a, int64_t first, int64_t from, int64_t to) {
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
            for (int j = 0; j < RANKS; ++j) d[j] = load_pairs(down + (r + j) * a.K + k, mask);
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

MM_TARGET void project_down_wide(const QuantizeArgs &a, int64_t first, int64_t count, const float *x, float *, int64_t from,
                                 int64_t to) {
    static const bool pairs_here = __builtin_cpu_supports("avx512bf16");
    const bool pairs = pairs_here && a.x.type == Type::bf16 && a.down.type == Type::bf16;
    if (count == QUANTIZE_ROWS)
        return pairs ? project_pairs<QUANTIZE_ROWS, 2>(a, first, from, to) : project_rows<QUANTIZE_ROWS, 2>(a, first, x, from, to);
    for (int64_t i = 0; i < count; ++i) project_rows<1, 8>(a, first + i, x + i * a.C, from, to);
}
