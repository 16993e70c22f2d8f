// The product for many tokens. Weights of COLUMNS outputs are expanded into a panel laid out as the tile reads it; activations
// are repacked, ROWS tokens side by side. A tile's integer sums live in registers for one group of 64 columns, then join its
// fp32 sums with the group's scales. Every panel meets as many tokens as the last-level cache holds and as rows of the
// output have pages at hand, then the next so many: from memory they would come too slowly, and so few as fit into a core's own
// cache have weights expanded too often. Part of product.h.

constexpr int64_t NEAR = 12 << 20, PAGES = 1024;  // bytes of activations, and tokens, that are treated at once

struct Blocks {  // activations from block `base` on, ROWS tokens side by side; the last block is filled up with zeros
    Raw<int8_t> x;         // (blocks, C / DEPTH, ROWS, DEPTH)
    Raw<int32_t> offsets;  // (blocks, G, ROWS)
    Raw<float> scales;     // (blocks, scale_columns, ROWS)
    Raw<float> low;        // (blocks, R, ROWS)
    Blocks(const LinearArgs &a, int64_t count)
        : x(count * ROWS * a.C), offsets(count * a.G * ROWS), scales(count * a.scale_columns * ROWS), low(count * a.R * ROWS) {}
};

MM_TARGET void pack_block(const LinearArgs &a, const std::vector<float> &low, Blocks &b, int64_t base, int64_t block) {
    const int64_t left = a.M - (base + block) * ROWS;
    if (left < ROWS) {
        std::fill_n(b.x.data() + block * a.C * ROWS, a.C * ROWS, int8_t(0));
        std::fill_n(b.offsets.data() + block * a.G * ROWS, a.G * ROWS, 0);
        std::fill_n(b.scales.data() + block * a.scale_columns * ROWS, a.scale_columns * ROWS, 0.0f);
        std::fill_n(b.low.data() + block * a.R * ROWS, a.R * ROWS, 0.0f);
    }
    for (int64_t i = 0; i < std::min<int64_t>(ROWS, left); ++i) {
        const int64_t m = (base + block) * ROWS + i;
        const int8_t *x = a.values + m * a.C;
        int8_t *to = b.x.data() + block * a.C * ROWS + i * DEPTH;
        for (int64_t k = 0; k < a.C; k += DEPTH) std::memcpy(to + k * ROWS, x + k, DEPTH);
        for (int64_t g = 0; g < a.G; ++g) b.offsets.data()[(block * a.G + g) * ROWS + i] = offset_of(a, x + g * GROUP);
        for (int64_t g = 0; g < a.scale_columns; ++g)
            b.scales.data()[(block * a.scale_columns + g) * ROWS + i] = a.scales[m * a.scale_columns + g];
        for (int64_t r = 0; r < a.R; ++r) b.low.data()[(block * a.R + r) * ROWS + i] = low[size_t(m * a.R + r)];
    }
}

struct Panel {  // COLUMNS outputs; those past the end are zero
    std::vector<uint8_t> w;  // (C / DEPTH, COLUMNS, DEPTH): unsigned weights
    std::vector<float> up;   // (R, COLUMNS)
    Ends ends;
    explicit Panel(const LinearArgs &a) : w(size_t(a.C * COLUMNS)), up(size_t(a.R * COLUMNS)), ends(a, VECTORS) {}
};

#ifndef MM_OWN_TILE
// One group of LANES rows into a panel, 4 columns of K together.
template <int BITS>
MM_TARGET inline void expand(const uint8_t *from, int64_t stride, int64_t rows, uint8_t *to) {
#pragma GCC unroll 2
    for (int i = 0; i < BITS / 4; ++i) {
        I words[8];
        turn(from + 32 * i, stride, rows, words);
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
            uint8_t *at = to + (j + 8 * i) * COLUMNS * 4;
            if constexpr (BITS == 8) {
                store_int(at, flipped(words[j]));
            } else {
                store_int(at, low_halves(words[j]));
                store_int(at + 8 * COLUMNS * 4, high_halves(words[j]));
            }
        }
    }
}

// Integer sums of one group: T of ROWS tokens x COLUMNS outputs.
template <int T, int BITS>
MM_TARGET inline void group_sums(const int8_t *x, const uint8_t *w, const int32_t *offsets, I (&sums)[T][VECTORS]) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) sums[t][v] = splat_int(offsets[t]);
    constexpr int PLANES = BITS == 8 ? PLANES8 : 1;
#pragma GCC unroll 2
    for (int p = 0; p < PLANES; ++p)
#pragma GCC unroll 2
        for (int chain = 0; chain < QUADS; chain += CHAIN) {
            Part parts[T][VECTORS];
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; ++v) parts[t][v] = begin(sums[t][v]);
#pragma GCC unroll 2
            for (int q = chain; q < chain + CHAIN; ++q) {
                I words[VECTORS];
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; ++v) {
                    const I word = load_int(w + (q * COLUMNS + v * LANES) * 4);
                    words[v] = p ? plane<BITS, 1>(word) : plane<BITS, 0>(word);
                }
#pragma GCC unroll 8
                for (int t = 0; t < T; ++t) {
                    int32_t four;
                    std::memcpy(&four, x + (q * ROWS + t) * 4, 4);
                    const I token = splat_int(four);
#pragma GCC unroll 4
                    for (int v = 0; v < VECTORS; ++v) parts[t][v] = dot(parts[t][v], words[v], token);
                }
            }
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; ++v)
                    sums[t][v] = p ? join<1>(sums[t][v], parts[t][v]) : join<0>(sums[t][v], parts[t][v]);
        }
}
#endif

template <int BITS>
MM_TARGET void fill_panel(const LinearArgs &a, int64_t first, Panel &p) {
    const int64_t stride = a.row_bytes();
    for (int64_t c = 0; c < COLUMNS; c += LANES) {
        const int64_t rows = a.N - first - c;
        if (a.R) fetch_rows(a, a.up, first + c, a.R);
        for (int64_t g = 0; g < a.G; ++g)
            expand<BITS>(a.weight + (first + c) * stride + g * GROUP * BITS / 8, stride, rows,
                         p.w.data() + g * GROUP * COLUMNS + c * DEPTH);
        if (a.R && rows > 0) turn_floats(a.up, first + c, std::min<int64_t>(LANES, rows), a.R, COLUMNS, p.up.data() + c);
    }
    fill_ends(a, first, p.ends);
}

// T of ROWS tokens x COLUMNS sums over all groups, into `sums` (ROWS, COLUMNS).
template <int T, int BITS, bool GROUPED>
MM_TARGET void part_tile(const int8_t *x, const int32_t *offsets, const float *scales, const Panel &p, int64_t G, float *sums) {
    for (int i = 0; i < T * COLUMNS; i += LANES) store(sums + i, zero());
    for (int64_t g = 0; g < G; ++g, x += GROUP * ROWS, offsets += ROWS, scales += GROUPED ? ROWS : 0) {
        I dots[T][VECTORS];
        group_sums<T, BITS>(x, p.w.data() + g * GROUP * COLUMNS, offsets, dots);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
            const F scale = load(p.ends.scales.data() + g * COLUMNS + v * LANES);
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) {
                float *at = sums + t * COLUMNS + v * LANES;
                store(at, fma(floats(dots[t][v]), GROUPED ? mul(scale, splat(scales[t])) : scale, load(at)));
            }
        }
    }
}

#ifndef MM_WHOLE_TILE
#define MM_WHOLE_TILE part_tile
#endif

// Scales of the tokens, bias and branch onto the sums; then out.
template <int T>
MM_TARGET inline void finish_tile(const LinearArgs &a, const Blocks &b, const Panel &p, int64_t base, int64_t block,
                                  int64_t first, float *sums) {
    const float *scales = b.scales.data() + block * a.scale_columns * ROWS, *low = b.low.data() + block * a.R * ROWS;
    F y[T][VECTORS];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) y[t][v] = load(p.ends.bias.data() + v * LANES);
    for (int64_t r = 0; r < a.R; ++r, low += ROWS) {
        F up[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) up[v] = load(p.up.data() + r * COLUMNS + v * LANES);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) y[t][v] = fma(splat(low[t]), up[v], y[t][v]);
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v)
            y[t][v] = fma(load(sums + t * COLUMNS + v * LANES), splat(a.grouped() ? 1.0f : scales[t]), y[t][v]);
    const int64_t columns = std::min<int64_t>(COLUMNS, a.N - first);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
        if ((base + block) * ROWS + t >= a.M) return;
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) store(sums + v * LANES, y[t][v]);
        store_floats(sums, columns, a.out.at(((base + block) * ROWS + t) * a.N + first));
    }
}

template <int T, int BITS>
MM_TARGET void run_tile(const LinearArgs &a, const Blocks &b, const Panel &p, int64_t base, int64_t block, int64_t first) {
    alignas(64) float sums[ROWS * COLUMNS];
    const int8_t *x = b.x.data() + block * a.C * ROWS;
    const int32_t *offsets = b.offsets.data() + block * a.G * ROWS;
    const float *scales = b.scales.data() + block * a.scale_columns * ROWS;
    if constexpr (T == ROWS)
        a.grouped() ? MM_WHOLE_TILE<T, BITS, true>(x, offsets, scales, p, a.G, sums)
                    : MM_WHOLE_TILE<T, BITS, false>(x, offsets, scales, p, a.G, sums);
    else
        a.grouped() ? part_tile<T, BITS, true>(x, offsets, scales, p, a.G, sums)
                    : part_tile<T, BITS, false>(x, offsets, scales, p, a.G, sums);
    finish_tile<T>(a, b, p, base, block, first, sums);
}

template <int BITS>
MM_TARGET void linear_many(const LinearArgs &a) {
    ask_for_large_pages(a.out.data, a.M * a.N * a.out.bytes());
    const std::vector<float> low = scaled_low(a);
    const int64_t count = (a.M + ROWS - 1) / ROWS, most = std::max<int64_t>(1, std::min(NEAR / a.C, PAGES) / ROWS);
    const int64_t stretches = std::max<int64_t>(1, (count + most / 2) / most), width = (count + stretches - 1) / stretches;
    Blocks b(a, width);
#pragma omp parallel num_threads(threads_for(a))
    {
        Panel panel(a);
        for (int64_t base = 0; base < count; base += width) {
            const int64_t blocks = std::min(width, count - base);
#pragma omp for schedule(static)
            for (int64_t block = 0; block < blocks; ++block) pack_block(a, low, b, base, block);
#pragma omp for schedule(dynamic, 1)
            for (int64_t first = 0; first < a.N; first += COLUMNS) {
                fill_panel<BITS>(a, first, panel);
                for (int64_t block = 0; block < blocks; ++block)
                    if (a.M - (base + block) * ROWS > ROWS / 2)
                        run_tile<ROWS, BITS>(a, b, panel, base, block, first);
                    else
                        run_tile<ROWS / 2, BITS>(a, b, panel, base, block, first);
            }
        }
    }
}
