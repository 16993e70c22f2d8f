// The product for few tokens: packed rows are read as they lie, once, LANES outputs side by side, turned and multiplied in
// registers. Reading memory is the limit, so the next outputs' rows are asked for meanwhile. Part of product.h.

struct FewTokens {
    std::vector<int32_t> offsets;  // (M, G)
    std::vector<float> low;        // (M, R)
    std::atomic<int64_t> taken{0};  // outputs that a thread has taken upon itself
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

#ifdef MM_ROW_SUMS
// The same for one token, where each weight meets one input: words of a row are multiplied where they lie and added up in a
// tree, which takes fewer steps than turning the weights.
template <int BITS>
MM_TARGET inline I row_sums(const int8_t *x, const uint8_t *w, int64_t row_bytes, int64_t rows, I offset) {
    I first[8], second[8];
    load_rows(w, row_bytes, rows, first);
    if constexpr (BITS == 8) load_rows(w + 32, row_bytes, rows, second);
    const I left = repeated(x), right = repeated(x + 32);
    Part parts[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        const I one = BITS == 4 ? low_halves(first[i]) : flipped(first[i]);
        const I two = BITS == 4 ? high_halves(first[i]) : flipped(second[i]);
        parts[i] = dot(dot(begin(splat_int(0)), one, left), two, right);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
        parts[i] = plus(words_of<0>(parts[2 * i], parts[2 * i + 1]), words_of<1>(parts[2 * i], parts[2 * i + 1]));
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
        parts[i] = plus(pairs_of<0>(parts[2 * i], parts[2 * i + 1]), pairs_of<1>(parts[2 * i], parts[2 * i + 1]));
    const I low = join<0>(splat_int(0), parts[0]), high = join<0>(splat_int(0), parts[1]);
    return add_int(offset, add_int(quads_of<0>(low, high), quads_of<1>(low, high)));
}
#endif

template <int T>
MM_TARGET inline void add_rank(const float *low, int64_t stride, F up, F (&sums)[T]) {
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) sums[t] = fma(splat(low[t * stride]), up, sums[t]);
}

// The branch of T tokens onto the bias, in `sums`: `up` is read as it lies and turned in registers.
template <int T, Type TYPE>
MM_TARGET inline void add_branch(const LinearArgs &a, const FewTokens &few, int64_t m, int64_t n, int64_t rows, F (&sums)[T]) {
    const Array start = a.up.at(n * a.R);
    const uint8_t *up = static_cast<const uint8_t *>(start.data);
    const float *low = few.low.data() + m * a.R;
    constexpr int64_t SIZE = TYPE == Type::f32 ? 4 : 2, EACH = 32 / SIZE;  // R is a multiple of 16
    for (int64_t r = 0; r < a.R; r += EACH) {
        I words[8];
        turn(up + r * SIZE, a.R * SIZE, rows, words);
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j)
            if constexpr (TYPE == Type::f32) {
                add_rank<T>(low + r + j, a.R, as_floats(words[j]), sums);
            } else {
                add_rank<T>(low + r + 2 * j, a.R, widened<0>(words[j], TYPE), sums);
                add_rank<T>(low + r + 2 * j + 1, a.R, widened<1>(words[j], TYPE), sums);
            }
    }
}

// Apart from few_outputs, whose registers are all taken.
template <int T>
__attribute__((noinline)) MM_TARGET void bias_and_branch(const LinearArgs &a, const FewTokens &few, int64_t m, int64_t n, int64_t rows,
                                                         const Ends &e, float *ends) {
    F sums[T];
    for (int t = 0; t < T; ++t) sums[t] = load(e.bias.data());
    if (a.R && a.up.type == Type::f32) add_branch<T, Type::f32>(a, few, m, n, rows, sums);
    if (a.R && a.up.type == Type::bf16) add_branch<T, Type::bf16>(a, few, m, n, rows, sums);
    if (a.R && a.up.type == Type::f16) add_branch<T, Type::f16>(a, few, m, n, rows, sums);
    for (int t = 0; t < T; ++t) store(ends + t * LANES, sums[t]);
}

constexpr int64_t AHEAD = 1024;  // bytes of the next outputs, asked for before the ends so that memory has work meanwhile

template <int T, int BITS, bool GROUPED>
MM_TARGET void few_outputs(const LinearArgs &a, const FewTokens &few, int64_t m, int64_t n, int64_t after, const Ends &e) {
    const int64_t rows = std::min<int64_t>(LANES, a.N - n), row_bytes = a.row_bytes();
    const uint8_t *w = a.weight + n * row_bytes, *next = a.weight + std::min(after, a.N) * row_bytes;
    const uint8_t *end = a.weight + std::min(after + LANES, a.N) * row_bytes, *stop = end - AHEAD;
    const int8_t *x = a.values + m * a.C;
    float ends[T * LANES];
    bias_and_branch<T>(a, few, m, n, rows, e, ends);
    F y[T];
    for (int t = 0; t < T; ++t) y[t] = zero();
    for (int64_t g = 0; g < a.G; ++g) {
        constexpr int64_t BYTES = GROUP * BITS / 8;
        for (int64_t i = 0; i < BYTES * LANES && next < stop; i += 64, next += 64) __builtin_prefetch(next, 0, 2);
        I sums[T];
        for (int t = 0; t < T; ++t) sums[t] = splat_int(few.offsets[size_t((m + t) * a.G + g)]);
#ifdef MM_ROW_SUMS
        if constexpr (T == 1 && (BITS == 4 || PLANES8 == 1))
            sums[0] = row_sums<BITS>(x + g * GROUP, w + g * BYTES, row_bytes, rows, sums[0]);
        else
#endif
            few_sums<T, BITS>(x + g * GROUP, a.C, w + g * BYTES, row_bytes, rows, sums);
        const F scale = load(e.scales.data() + g * LANES);
        for (int t = 0; t < T; ++t)
            y[t] = fma(floats(sums[t]), GROUPED ? mul(scale, splat(a.scales[(m + t) * a.G + g])) : scale, y[t]);
    }
    for (; next < end; next += 64) __builtin_prefetch(next, 0, 2);
    for (int t = 0; t < T; ++t) {
        float out[LANES];
        store(out, fma(y[t], splat(GROUPED ? 1.0f : a.scales[m + t]), load(ends + t * LANES)));
        store_floats(out, rows, a.out.at((m + t) * a.N + n));
    }
}

// Asks for rows [n, n + LANES) of an array: what comes once an output is too little for the hardware to see a stream in it.
inline void fetch_rows(const LinearArgs &a, Array from, int64_t n, int64_t length) {
    const char *at = static_cast<const char *>(from.at(n * length).data);
    for (int64_t i = 0; n < a.N && i < LANES * length * from.bytes(); i += 64) __builtin_prefetch(at + i, 0, 3);
}

// All tokens of LANES outputs from n on; those from `after` on come next.
template <int BITS, bool GROUPED>
MM_TARGET inline void few_rows(const LinearArgs &a, const FewTokens &few, int64_t n, int64_t after, const Ends &e) {
    int64_t m = 0;
    for (; m + 4 <= a.M; m += 4) few_outputs<4, BITS, GROUPED>(a, few, m, n, after, e);
    if (a.M - m == 3) few_outputs<3, BITS, GROUPED>(a, few, m, n, after, e);
    if (a.M - m == 2) few_outputs<2, BITS, GROUPED>(a, few, m, n, after, e);
    if (a.M - m == 1) few_outputs<1, BITS, GROUPED>(a, few, m, n, after, e);
}

// All outputs, shared out among the threads that are here, SPAN at a time. A thread takes its next ones before it has done with
// those it has, so that it can ask for what they read.
template <int BITS>
MM_TARGET void few_panels(const LinearArgs &a, FewTokens &few) {
    constexpr int64_t SPAN = 64;
    Ends ends(a, 1);
    for (int64_t first = few.taken.fetch_add(SPAN), then; first < a.N; first = then)
        for (int64_t n = first; n < first + SPAN; n += LANES) {
            const bool last = n + LANES == first + SPAN;
            if (last) then = few.taken.fetch_add(SPAN);
            if (n >= a.N) continue;
            const int64_t after = last ? then : n + LANES;
            fill_ends(a, n, ends);
            fetch_rows(a, a.weight_scales, after, a.G);
            if (a.R) fetch_rows(a, a.up, after, a.R);
            a.grouped() ? few_rows<BITS, true>(a, few, n, after, ends) : few_rows<BITS, false>(a, few, n, after, ends);
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
    FewTokens few{std::vector<int32_t>(size_t(a.M * a.G)), std::vector<float>(size_t(a.M * a.R))};
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
                const int64_t first = (task - a.M) * RANKS;
                project_down(q, 0, a.M, x.data(), first, first + RANKS);
                scale_low(a, first, first + RANKS, few.low.data());
            }
        a.weight_bits == 4 ? few_panels<4>(a, few) : few_panels<8>(a, few);
    }
}
