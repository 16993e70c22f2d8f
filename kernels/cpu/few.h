// The product for few tokens: packed rows are read as they lie, once, LANES outputs side by side, turned and multiplied in
// registers. Reading memory is the limit, so the next outputs' rows are asked for meanwhile. Part of product.h.

struct FewTokens {
    std::vector<int32_t> offsets;  // (M, G)
    std::vector<float> low;
};

// One group: 16 words of 4 columns of LANES outputs (two to a word of 4-bit weights) times T tokens, `stride` apart.
template <int T, int BITS>
MM_TARGET inline void few_sums(const int8_t *x, int64_t stride, const uint8_t *w, int64_t row_bytes, int64_t rows, I (&sums)[T]) {
    I words[BITS / 4][8];
#pragma GCC unroll 2
    for (int i = 0; i < BITS / 4; ++i) turn(w + 32 * i, row_bytes, rows, words[i]);
    constexpr int PLANES = BITS == 8 ? PLANES8 : 1, EACH = CHAIN / 2;
    const auto four = [&](int t, int q) __attribute__((always_inline)) {
        int32_t value;
        std::memcpy(&value, x + t * stride + 4 * q, 4);
        return value;
    };
#pragma GCC unroll 2
    for (int p = 0; p < PLANES; ++p)
#pragma GCC unroll 2
        for (int j = 0; j < 8; j += EACH) {
            Part parts[T];
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) parts[t] = begin(sums[t]);
#pragma GCC unroll 8
            for (int i = j; i < j + EACH; ++i) {
                const I first = BITS == 4 ? low_halves(words[0][i]) : flipped(words[0][i]);
                const I second = BITS == 4 ? high_halves(words[0][i]) : flipped(words[BITS / 4 - 1][i]);
                const I one = p ? plane<BITS, 1>(first) : plane<BITS, 0>(first);
                const I two = p ? plane<BITS, 1>(second) : plane<BITS, 0>(second);
#pragma GCC unroll 4
                for (int t = 0; t < T; ++t)
                    parts[t] = dot(dot(parts[t], one, splat_int(four(t, i))), two, splat_int(four(t, i + 8)));
            }
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) sums[t] = p ? join<1>(sums[t], parts[t]) : join<0>(sums[t], parts[t]);
        }
}

template <int T, int BITS, bool GROUPED>
MM_TARGET void few_outputs(const LinearArgs &a, const FewTokens &few, int64_t m, int64_t n, const Ends &e) {
    const int64_t rows = std::min<int64_t>(LANES, a.N - n), row_bytes = a.row_bytes();
    const uint8_t *w = a.weight + n * row_bytes, *next = w + LANES * row_bytes, *end = a.weight + a.N * row_bytes;
    const int8_t *x = a.values + m * a.C;
    F y[T];
    for (int t = 0; t < T; ++t) y[t] = zero();
    for (int64_t g = 0; g < a.G; ++g) {
        constexpr int64_t BYTES = GROUP * BITS / 8;
        for (int64_t i = 0; i < BYTES * LANES && next < end; i += 64, next += 64) __builtin_prefetch(next, 0, 2);
        I sums[T];
        for (int t = 0; t < T; ++t) sums[t] = splat_int(few.offsets[size_t((m + t) * a.G + g)]);
        few_sums<T, BITS>(x + g * GROUP, a.C, w + g * BYTES, row_bytes, rows, sums);
        const F scale = load(e.scales.data() + g * LANES);
        for (int t = 0; t < T; ++t)
            y[t] = fma(floats(sums[t]), GROUPED ? mul(scale, splat(a.scales[(m + t) * a.G + g])) : scale, y[t]);
    }
    for (int t = 0; t < T; ++t) y[t] = fma(y[t], splat(GROUPED ? 1.0f : a.scales[m + t]), load(e.bias.data()));
    for (int64_t r = 0; r < a.R; ++r) {
        const F up = load(e.up.data() + r * LANES);
        for (int t = 0; t < T; ++t) y[t] = fma(splat(few.low[size_t((m + t) * a.R + r)]), up, y[t]);
    }
    for (int t = 0; t < T; ++t) {
        float out[LANES];
        store(out, y[t]);
        store_floats(out, rows, a.out.at((m + t) * a.N + n));
    }
}

// Asks for rows [n, n + LANES) of an array: what comes once an output is too little for the hardware to see a stream in it.
inline void fetch_rows(const LinearArgs &a, Array from, int64_t n, int64_t length) {
    const char *at = static_cast<const char *>(from.at(n * length).data);
    for (int64_t i = 0; n < a.N && i < LANES * length * from.bytes(); i += 64) __builtin_prefetch(at + i, 0, 3);
}

template <int BITS, bool GROUPED>
MM_TARGET inline void few_rows(const LinearArgs &a, const FewTokens &few, int64_t n, const Ends &e) {
    int64_t m = 0;
    for (; m + 4 <= a.M; m += 4) few_outputs<4, BITS, GROUPED>(a, few, m, n, e);
    if (a.M - m == 3) few_outputs<3, BITS, GROUPED>(a, few, m, n, e);
    if (a.M - m == 2) few_outputs<2, BITS, GROUPED>(a, few, m, n, e);
    if (a.M - m == 1) few_outputs<1, BITS, GROUPED>(a, few, m, n, e);
}

// All outputs, shared out among the threads that are here.
template <int BITS>
MM_TARGET void few_panels(const LinearArgs &a, const FewTokens &few) {
    Ends ends(a, 1);
#pragma omp for schedule(dynamic, 64 / LANES)
    for (int64_t n = 0; n < a.N; n += LANES) {
        fill_ends(a, n, ends);
        fetch_rows(a, a.weight_scales, n + LANES, a.G);
        if (a.R) fetch_rows(a, a.up, n + LANES, a.R);
        a.grouped() ? few_rows<BITS, true>(a, few, n, ends) : few_rows<BITS, false>(a, few, n, ends);
    }
}

MM_TARGET inline void few_offsets(const LinearArgs &a, int64_t m, FewTokens &few) {
    for (int64_t i = m * a.G; i < (m + 1) * a.G; ++i) few.offsets[size_t(i)] = offset_of(a, a.values + i * GROUP);
}

MM_TARGET void linear_few(const LinearArgs &a) {
    FewTokens few{std::vector<int32_t>(size_t(a.M * a.G)), scaled_low(a)};
    for (int64_t m = 0; m < a.M; ++m) few_offsets(a, m, few);
#pragma omp parallel num_threads(threads_for(a))
    a.weight_bits == 4 ? few_panels<4>(a, few) : few_panels<8>(a, few);
}

// Rounding, down projection and product of few tokens with one waking of the threads, which share the ranks and the tokens
// first: `down` is read meanwhile, since that is most of the work before the product.
MM_TARGET void layer_few(const QuantizeArgs &q, const LinearArgs &a) {
    constexpr int64_t RANKS = 8;
    const std::vector<float> inverse = inverse_of(q);
    FewTokens few{std::vector<int32_t>(size_t(a.M * a.G)), {}};
    const Raw<float> x(a.M * a.C), v(a.M * a.C);
    load_block(q, 0, x.data());
    const int64_t blocks = a.R / RANKS;
#pragma omp parallel num_threads(threads_for(a))
    {
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < blocks + a.M; ++task)
            if (task < a.M) {
                std::memcpy(v.data() + task * a.C, x.data() + task * a.C, size_t(a.C) * 4);
                quantize_row(q, task, q.smooth ? inverse.data() : nullptr, v.data() + task * a.C);
                few_offsets(a, task, few);
            } else {
                project_down(q, 0, a.M, x.data(), (task - a.M) * RANKS, (task - a.M + 1) * RANKS);
            }
#pragma omp single
        few.low = scaled_low(a);
        a.weight_bits == 4 ? few_panels<4>(a, few) : few_panels<8>(a, few);
    }
}
