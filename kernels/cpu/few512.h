// The product for few tokens in AVX512: 4-bit rows are read as they lie, once, four side by side, and multiplied with up to 4
// tokens. Included like rows.h.

// A group of 64 weights in natural order, + 8 from its 32 bytes or + 128 from its 64.
template <int BITS>
MM_TARGET inline __m512i expand_group(const uint8_t *packed) {
    if constexpr (BITS == 8) return _mm512_xor_si512(_mm512_loadu_si512(packed), _mm512_set1_epi8(char(128)));
    const __m512i twice = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(packed)));
    const __m512i shifts = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
    return _mm512_and_si512(_mm512_srlv_epi16(twice, shifts), _mm512_set1_epi8(15));
}

struct FewTokens {
    std::vector<int32_t> starts;  // (M, G, 16): -8 * sum of x in the first place, zeros in the others
    std::vector<float> low;
};

MM_TARGET FewTokens prepare_few(const LinearArgs &a) {
    FewTokens few{std::vector<int32_t>(size_t(a.M * a.G * 16)), scaled_low(a)};
    for (int64_t m = 0; m < a.M; ++m)
        for (int64_t g = 0; g < a.G; ++g)
            few.starts[size_t(m * a.G + g) * 16] = offset_of(a, a.values + m * a.C + g * GROUP);
    return few;
}

// OUTPUTS outputs for TOKENS tokens: enough sums under way to hide an addition's latency, and as many rows of weights read
// side by side. `weight_scales` are fp32 (OUTPUTS, G). Scales of activations join at every group, or at the end.
template <int TOKENS, int OUTPUTS, int BITS, bool GROUPED>
MM_TARGET inline void few_dots(const LinearArgs &a, const FewTokens &few, int64_t m, int64_t n, const float *weight_scales) {
    const uint8_t *w = a.weight + n * a.row_bytes();
    const int8_t *x = a.values + m * a.C;
    const int32_t *starts = few.starts.data() + m * a.G * 16;
    const float *scales = a.scales + m * a.scale_columns;
    __m512 sums[TOKENS][OUTPUTS];
    for (int t = 0; t < TOKENS; ++t)
        for (int o = 0; o < OUTPUTS; ++o) sums[t][o] = _mm512_setzero_ps();
    for (int64_t g = 0; g < a.G; ++g) {
#pragma GCC unroll 4
        for (int o = 0; o < OUTPUTS; ++o) {
            const int64_t at = o * a.row_bytes() + g * (GROUP * BITS / 8);
            _mm_prefetch(reinterpret_cast<const char *>(w + at + OUTPUTS * a.row_bytes()), _MM_HINT_T0);
            const __m512i group = expand_group<BITS>(w + at);
#pragma GCC unroll 4
            for (int t = 0; t < TOKENS; ++t) {
                const __m512i dots = _mm512_dpbusd_epi32(_mm512_loadu_si512(starts + (t * a.G + g) * 16), group,
                                                         _mm512_loadu_si512(x + t * a.C + g * GROUP));
                const float scale = weight_scales[o * a.G + g];
                const __m512 step = _mm512_set1_ps(GROUPED ? scale * scales[t * a.G + g] : scale);
                sums[t][o] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), step, sums[t][o]);
            }
        }
    }
    for (int t = 0; t < TOKENS; ++t)
        for (int o = 0; o < OUTPUTS; ++o) {
            __m512 sum = GROUPED ? sums[t][o] : _mm512_mul_ps(sums[t][o], _mm512_set1_ps(scales[t]));
            for (int64_t r = 0; r < a.R; r += 16)
                sum = _mm512_fmadd_ps(load16(a.up, (n + o) * a.R + r, 0xffff),
                                      _mm512_loadu_ps(few.low.data() + (m + t) * a.R + r), sum);
            float bias = 0;
            if (a.bias) load_floats(a.bias.at(n + o), 1, &bias);
            const float y = _mm512_reduce_add_ps(sum) + bias;
            store_floats(&y, 1, a.out.at((m + t) * a.N + n + o));
        }
}

// Asks for rows [n, n + count) of an array: what comes once a row is too little for the hardware to see a stream in it.
inline void fetch_rows(const LinearArgs &a, Array from, int64_t n, int64_t count, int64_t length) {
    const char *at = static_cast<const char *>(from.at(n * length).data);
    for (int64_t i = 0; n < a.N && i < count * length * from.bytes(); i += 64) _mm_prefetch(at + i, _MM_HINT_T0);
}

template <int BITS, bool GROUPED>
MM_TARGET void linear_few(const LinearArgs &a) {
    constexpr int64_t SIDE = 4;
    const FewTokens few = prepare_few(a);
#pragma omp parallel num_threads(a.threads)
    {
        std::vector<float> weight_scales(size_t(SIDE * a.G));
#pragma omp for schedule(dynamic, 16)
        for (int64_t n = 0; n < a.N; n += SIDE) {
            const int64_t count = std::min(SIDE, a.N - n);
            load_floats(a.weight_scales.at(n * a.G), count * a.G, weight_scales.data());
            fetch_rows(a, a.weight_scales, n + SIDE, SIDE, a.G);
            if (a.R) fetch_rows(a, a.up, n + SIDE, SIDE, a.R);
            const float *scales = weight_scales.data();
            int64_t m = 0;
            if (count == SIDE) {
                for (; m + 4 <= a.M; m += 4) few_dots<4, SIDE, BITS, GROUPED>(a, few, m, n, scales);
                for (; m < a.M; ++m) few_dots<1, SIDE, BITS, GROUPED>(a, few, m, n, scales);
            }
            for (; m < a.M; ++m)
                for (int64_t o = 0; o < count; ++o) few_dots<1, 1, BITS, GROUPED>(a, few, m, n + o, scales + o * a.G);
        }
    }
}
