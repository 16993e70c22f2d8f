// The down projection with vectors: TOKENS x RANKS of sums in registers, `down` widened on the fly. Lane l of a sum has the
// columns l, l + LANES, ... in their order, whatever the tile, and the lanes are added up in one order: a token's projection
// has the same bits whatever is projected beside it. Part of product.h.

constexpr int64_t DEEP = 512;  // columns that all tokens and ranks meet before the next ones: they stay in the nearest cache

// Sums over columns [from, to), a multiple of LANES, are added to `sums` (QUANTIZE_ROWS, R, LANES).
template <int TOKENS, int RANKS, Type TYPE>
MM_TARGET inline void project_tile(const float *x, int64_t stride, const void *down, int64_t columns, int64_t from, int64_t to,
                                   float *sums, int64_t token_step) {
    F s[TOKENS][RANKS];
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 8
        for (int r = 0; r < RANKS; ++r) s[t][r] = load(sums + t * token_step + r * LANES);
    for (int64_t k = from; k < to; k += LANES) {
        F d[RANKS];
#pragma GCC unroll 8
        for (int r = 0; r < RANKS; ++r) {
            if (TOKENS == 1) __builtin_prefetch(static_cast<const char *>(down) + (r * columns + k) * (TYPE == Type::f32 ? 4 : 2) + 1024);
            d[r] = load_as<TYPE>(down, r * columns + k);
        }
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t) {
            const F v = load(x + t * stride + k);
#pragma GCC unroll 8
            for (int r = 0; r < RANKS; ++r) s[t][r] = fma(v, d[r], s[t][r]);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 8
        for (int r = 0; r < RANKS; ++r) store(sums + t * token_step + r * LANES, s[t][r]);
}

constexpr int SIDE = LANES >= 16 ? QUANTIZE_ROWS : 4;  // tokens of a tile, two or three ranks wide

// Ranks [first, last) of `count` tokens over columns [from, to); both counted from the start of `down` and `sums`.
template <Type TYPE>
MM_TARGET void project_columns(const float *x, int64_t stride, int64_t count, const void *down, int64_t columns, int64_t from,
                               int64_t to, int64_t ranks, float *sums, int64_t token_step) {
    constexpr int64_t size = TYPE == Type::f32 ? 4 : 2;
    int64_t t = 0;
    const auto at = [&](int64_t r) { return static_cast<const char *>(down) + r * columns * size; };
    for (; t + SIDE <= count; t += SIDE)
        for (int64_t r = 0; r < ranks; r += 8) {
            const float *from_x = x + t * stride;
            float *to_sums = sums + t * token_step;
            if constexpr (LANES >= 16) {
                for (int64_t i = r; i < r + 8; i += 2)
                    project_tile<SIDE, 2, TYPE>(from_x, stride, at(i), columns, from, to, to_sums + i * LANES, token_step);
            } else {  // 12 sums fill 16 registers, with what they are made of
                project_tile<SIDE, 3, TYPE>(from_x, stride, at(r), columns, from, to, to_sums + r * LANES, token_step);
                project_tile<SIDE, 3, TYPE>(from_x, stride, at(r + 3), columns, from, to, to_sums + (r + 3) * LANES, token_step);
                project_tile<SIDE, 2, TYPE>(from_x, stride, at(r + 6), columns, from, to, to_sums + (r + 6) * LANES, token_step);
            }
        }
    for (; t < count; ++t)
        for (int64_t r = 0; r < ranks; r += 8)
            project_tile<1, 8, TYPE>(x + t * stride, stride, static_cast<const char *>(down) + r * columns * size, columns, from,
                                     to, sums + t * token_step + r * LANES, token_step);
}

template <Type TYPE>
MM_TARGET inline void project_typed(const QuantizeArgs &a, int64_t first, int64_t count, const float *x, int64_t from,
                                    int64_t to) {
    const int64_t ranks = to - from, whole = a.K / LANES * LANES, step = ranks * LANES;
    std::vector<float> sums(size_t(count * step), 0.0f);
    const void *down = a.down.at(from * a.K).data;
    const int64_t deep = count < SIDE ? whole : DEEP;  // few tokens read `down` once, best in long streams
    for (int64_t k = 0; k < whole; k += deep)
        project_columns<TYPE>(x, a.C, count, down, a.K, k, std::min(k + deep, whole), ranks, sums.data(), step);
    if (whole < a.K) {  // the last columns, from a place where a whole vector may be read; x has zeros past its end
        std::vector<float> rest(size_t(ranks * LANES), 0.0f);
        for (int64_t r = 0; r < ranks; ++r) load_floats(a.down.at((from + r) * a.K + whole), a.K - whole, rest.data() + r * LANES);
        project_columns<Type::f32>(x + whole, a.C, count, rest.data(), LANES, 0, LANES, ranks, sums.data(), step);
    }
    for (int64_t t = 0; t < count; ++t)
        for (int64_t r = 0; r < ranks; r += 8) sums_of_8(sums.data() + t * step + r * LANES, a.low + (first + t) * a.R + from + r);
}

MM_TARGET void project_down(const QuantizeArgs &a, int64_t first, int64_t count, const float *x, int64_t from, int64_t to) {
#ifdef MM_PROJECT_PAIRS
    if (MM_PROJECT_PAIRS(a, first, count, from, to)) return;
#endif
    if (a.down.type == Type::f32) return project_typed<Type::f32>(a, first, count, x, from, to);
    if (a.down.type == Type::f16) return project_typed<Type::f16>(a, first, count, x, from, to);
    project_typed<Type::bf16>(a, first, count, x, from, to);
}
