// The product for many tokens in AVX512. Weights of 32 outputs are expanded into a panel laid out as the tile reads it;
// activations are repacked, 6 tokens side by side. A tile's 12 integer sums and their 12 fp32 sums
// live in registers: the former for one group of 64 columns, then they join the latter with the group's scales. (12 tokens
// with fp32 sums in the first-level cache need fewer loads, and were slower by the stores.) Every panel meets as many tokens
// as the last-level cache holds and as rows of the output have pages at hand, then the next so many: from memory they would
// come too slowly, and so few as fit into a core's own cache have weights expanded too often. Included like rows.h.

constexpr int64_t ROWS = 6, COLUMNS = 32, DEEP = GROUP / 4;
constexpr int64_t NEAR = 12 << 20, PAGES = 1024;  // bytes of activations, and tokens, that are treated at once

// Left as it comes: whoever fills it touches its pages first, in parallel.
template <typename T>
struct Raw {
    std::unique_ptr<T[]> memory;
    explicit Raw(int64_t count) : memory(new T[size_t(count)]) {}
    T *data() const { return memory.get(); }
};

struct Blocks {  // activations from block `base` on, ROWS tokens side by side; the last block is filled up with zeros
    Raw<int32_t> x;        // (blocks, C / 4, ROWS): four columns of K each
    Raw<int32_t> offsets;  // (blocks, G, ROWS)
    Raw<float> scales;     // (blocks, scale_columns, ROWS)
    Raw<float> low;        // (blocks, R, ROWS)
    Blocks(const LinearArgs &a, int64_t count)
        : x(count * ROWS * a.C / 4), offsets(count * a.G * ROWS), scales(count * a.scale_columns * ROWS),
          low(count * a.R * ROWS) {}
};

MM_TARGET void pack_block(const LinearArgs &a, const std::vector<float> &low, Blocks &b, int64_t base, int64_t block) {
    const int64_t quads = a.C / 4, left = a.M - (base + block) * ROWS;
    if (left < ROWS) {
        std::fill_n(b.x.data() + block * quads * ROWS, quads * ROWS, 0);
        std::fill_n(b.offsets.data() + block * a.G * ROWS, a.G * ROWS, 0);
        std::fill_n(b.scales.data() + block * a.scale_columns * ROWS, a.scale_columns * ROWS, 0.0f);
        std::fill_n(b.low.data() + block * a.R * ROWS, a.R * ROWS, 0.0f);
    }
    for (int64_t i = 0; i < std::min(ROWS, left); ++i) {
        const int64_t m = (base + block) * ROWS + i;
        const int8_t *x = a.values + m * a.C;
        int32_t *to = b.x.data() + block * quads * ROWS + i;
        for (int64_t q = 0; q < quads; ++q) std::memcpy(to + q * ROWS, x + 4 * q, 4);
        for (int64_t g = 0; g < a.G; ++g) b.offsets.data()[(block * a.G + g) * ROWS + i] = offset_of(a, x + g * GROUP);
        for (int64_t g = 0; g < a.scale_columns; ++g)
            b.scales.data()[(block * a.scale_columns + g) * ROWS + i] = a.scales[m * a.scale_columns + g];
        for (int64_t r = 0; r < a.R; ++r) b.low.data()[(block * a.R + r) * ROWS + i] = low[size_t(m * a.R + r)];
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

// A whole tile, in assembly: GCC 12 finds no allocation of 30 registers that does not store sums at every step, which costs
// half of the speed. zmm0-5 are the integer sums of the left 16 outputs, zmm6-11 of the right, zmm12-17 and zmm18-23 their
// fp32 sums (kept in registers: storing them at every group cost a sixth), 24 and 25 weights, 26-31 activations.
#define MM_STR(x) #x
#define MM_START(i, l, r, t)                                               \
    "vpbroadcastd 4*" MM_STR(i) "(%[offsets]), %%zmm" MM_STR(l) "\n\t"     \
    "vmovdqa64 %%zmm" MM_STR(l) ", %%zmm" MM_STR(r) "\n\t"
#define MM_STEP(i, l, r, t)                                                \
    "vpbroadcastd 4*" MM_STR(i) "(%[x]), %%zmm" MM_STR(t) "\n\t"           \
    "vpdpbusd %%zmm" MM_STR(t) ", %%zmm24, %%zmm" MM_STR(l) "\n\t"         \
    "vpdpbusd %%zmm" MM_STR(t) ", %%zmm25, %%zmm" MM_STR(r) "\n\t"
#define MM_NEXT(i, l, r, t)                                                \
    "vpbroadcastd 24+4*" MM_STR(i) "(%[x]), %%zmm" MM_STR(t) "\n\t"        \
    "vpdpbusd %%zmm" MM_STR(t) ", %%zmm24, %%zmm" MM_STR(l) "\n\t"         \
    "vpdpbusd %%zmm" MM_STR(t) ", %%zmm25, %%zmm" MM_STR(r) "\n\t"
#define MM_JOIN(i, l, r, fl, fr)                                           \
    "vcvtdq2ps %%zmm" MM_STR(l) ", %%zmm" MM_STR(l) "\n\t"                 \
    "vcvtdq2ps %%zmm" MM_STR(r) ", %%zmm" MM_STR(r) "\n\t"                 \
    "vfmadd231ps %%zmm" MM_STR(l) ", %%zmm24, %%zmm" MM_STR(fl) "\n\t"     \
    "vfmadd231ps %%zmm" MM_STR(r) ", %%zmm25, %%zmm" MM_STR(fr) "\n\t"
#define MM_JOIN_SCALED(i, l, r, fl, fr)                                    \
    "vbroadcastss 4*" MM_STR(i) "(%[scales]), %%zmm26\n\t"                 \
    "vmulps %%zmm26, %%zmm24, %%zmm27\n\t"                                 \
    "vmulps %%zmm26, %%zmm25, %%zmm28\n\t"                                 \
    "vcvtdq2ps %%zmm" MM_STR(l) ", %%zmm" MM_STR(l) "\n\t"                 \
    "vcvtdq2ps %%zmm" MM_STR(r) ", %%zmm" MM_STR(r) "\n\t"                 \
    "vfmadd231ps %%zmm" MM_STR(l) ", %%zmm27, %%zmm" MM_STR(fl) "\n\t"     \
    "vfmadd231ps %%zmm" MM_STR(r) ", %%zmm28, %%zmm" MM_STR(fr) "\n\t"
#define MM_CLEAR(i, l, r, fl, fr)                                          \
    "vpxord %%zmm" MM_STR(fl) ", %%zmm" MM_STR(fl) ", %%zmm" MM_STR(fl) "\n\t" \
    "vpxord %%zmm" MM_STR(fr) ", %%zmm" MM_STR(fr) ", %%zmm" MM_STR(fr) "\n\t"
#define MM_STORE(i, l, r, fl, fr)                                          \
    "vmovaps %%zmm" MM_STR(fl) ", 128*" MM_STR(i) "(%[sums])\n\t"          \
    "vmovaps %%zmm" MM_STR(fr) ", 128*" MM_STR(i) "+64(%[sums])\n\t"
#define MM_TOKENS(DO) DO(0, 0, 6, 26) DO(1, 1, 7, 27) DO(2, 2, 8, 28) DO(3, 3, 9, 29) DO(4, 4, 10, 30) DO(5, 5, 11, 31)
#define MM_SUMS(DO) DO(0, 0, 6, 12, 18) DO(1, 1, 7, 13, 19) DO(2, 2, 8, 14, 20) DO(3, 3, 9, 15, 21) DO(4, 4, 10, 16, 22) \
    DO(5, 5, 11, 17, 23)
#define MM_TILE(JOIN)                                                      \
    MM_SUMS(MM_CLEAR)                                                      \
    ".p2align 4\n"                                                         \
    "1:\n\t"                                                               \
    MM_TOKENS(MM_START)                                                    \
    "movl $8, %[count]\n\t"                                                \
    ".p2align 4\n"                                                         \
    "2:\n\t"                                                               \
    "vmovdqu64 (%[w]), %%zmm24\n\t"                                        \
    "vmovdqu64 64(%[w]), %%zmm25\n\t"                                      \
    MM_TOKENS(MM_STEP)                                                     \
    "vmovdqu64 128(%[w]), %%zmm24\n\t"                                     \
    "vmovdqu64 192(%[w]), %%zmm25\n\t"                                     \
    MM_TOKENS(MM_NEXT)                                                     \
    "addq $256, %[w]\n\t"                                                  \
    "addq $48, %[x]\n\t"                                                   \
    "decl %[count]\n\t"                                                    \
    "jnz 2b\n\t"                                                           \
    "vmovups (%[ws]), %%zmm24\n\t"                                         \
    "vmovups 64(%[ws]), %%zmm25\n\t"                                       \
    MM_SUMS(JOIN)                                                          \
    "addq $128, %[ws]\n\t"                                                 \
    "addq $24, %[offsets]\n\t"                                             \
    "addq $24, %[scales]\n\t"                                              \
    "decq %[groups]\n\t"                                                   \
    "jnz 1b\n\t"                                                           \
    MM_SUMS(MM_STORE)
#define MM_CLOBBERS                                                                                               \
    "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", \
        "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23",   \
        "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31"

template <bool GROUPED>
MM_TARGET inline void whole_tile(const int32_t *x, const int32_t *offsets, const float *scales, const Panel &p, int64_t G,
                                 float *sums) {
    static_assert(ROWS == 6 && COLUMNS == 32 && DEEP == 16, "the assembly is written for these");
    const uint8_t *w = p.w.data();
    const float *ws = p.scales.data();
    int64_t groups = G;
    int count;
    if constexpr (GROUPED)
        asm volatile(MM_TILE(MM_JOIN_SCALED)
                     : [x] "+r"(x), [w] "+r"(w), [offsets] "+r"(offsets), [ws] "+r"(ws), [scales] "+r"(scales),
                       [groups] "+r"(groups), [count] "=&r"(count)
                     : [sums] "r"(sums)
                     : MM_CLOBBERS);
    else
        asm volatile(MM_TILE(MM_JOIN)
                     : [x] "+r"(x), [w] "+r"(w), [offsets] "+r"(offsets), [ws] "+r"(ws), [scales] "+r"(scales),
                       [groups] "+r"(groups), [count] "=&r"(count)
                     : [sums] "r"(sums)
                     : MM_CLOBBERS);
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
#pragma GCC unroll 6
        for (int i = 0; i < TOKENS; ++i) dots[i][0] = dots[i][1] = _mm512_set1_epi32(offsets[i]);
        for (int64_t q = 0; q < DEEP; ++q, x += ROWS, w += COLUMNS * 4) {
            const __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + 64);
#pragma GCC unroll 6
            for (int i = 0; i < TOKENS; ++i) {
                const __m512i four = _mm512_set1_epi32(x[i]);
                dots[i][0] = _mm512_dpbusd_epi32(dots[i][0], w0, four);
                dots[i][1] = _mm512_dpbusd_epi32(dots[i][1], w1, four);
            }
        }
        const __m512 s0 = _mm512_loadu_ps(p.scales.data() + g * COLUMNS);
        const __m512 s1 = _mm512_loadu_ps(p.scales.data() + g * COLUMNS + 16);
#pragma GCC unroll 6
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
MM_TARGET inline void finish_tile(const LinearArgs &a, const Blocks &b, const Panel &p, int64_t base, int64_t block,
                                  int64_t first, float *sums) {
    __m512 y[TOKENS][2];
    const __m512 b0 = _mm512_loadu_ps(p.bias.data()), b1 = _mm512_loadu_ps(p.bias.data() + 16);
    const float *scales = b.scales.data() + block * a.scale_columns * ROWS, *low = b.low.data() + block * a.R * ROWS;
#pragma GCC unroll 6
    for (int i = 0; i < TOKENS; ++i) {
        const __m512 scale = _mm512_set1_ps(a.grouped() ? 1.0f : scales[i]);
        y[i][0] = _mm512_fmadd_ps(_mm512_load_ps(sums + i * COLUMNS), scale, b0);
        y[i][1] = _mm512_fmadd_ps(_mm512_load_ps(sums + i * COLUMNS + 16), scale, b1);
    }
    for (int64_t r = 0; r < a.R; ++r, low += ROWS) {
        const __m512 u0 = _mm512_loadu_ps(p.up.data() + r * COLUMNS), u1 = _mm512_loadu_ps(p.up.data() + r * COLUMNS + 16);
#pragma GCC unroll 6
        for (int i = 0; i < TOKENS; ++i) {
            const __m512 l = _mm512_set1_ps(low[i]);
            y[i][0] = _mm512_fmadd_ps(l, u0, y[i][0]);
            y[i][1] = _mm512_fmadd_ps(l, u1, y[i][1]);
        }
    }
    const int64_t columns = std::min(COLUMNS, a.N - first);
    for (int i = 0; i < TOKENS && (base + block) * ROWS + i < a.M; ++i) {
        _mm512_store_ps(sums, y[i][0]);
        _mm512_store_ps(sums + 16, y[i][1]);
        store_floats(sums, columns, a.out.at(((base + block) * ROWS + i) * a.N + first));
    }
}

template <int TOKENS>
MM_TARGET inline void run_tile(const LinearArgs &a, const Blocks &b, const Panel &p, int64_t base, int64_t block,
                               int64_t first) {
    alignas(64) float sums[ROWS * COLUMNS];
    const int32_t *x = b.x.data() + block * (a.C / 4) * ROWS, *offsets = b.offsets.data() + block * a.G * ROWS;
    if (a.grouped())
        tile<TOKENS, true>(x, offsets, b.scales.data() + block * a.G * ROWS, p, a.G, sums);
    else
        tile<TOKENS, false>(x, offsets, nullptr, p, a.G, sums);
    finish_tile<TOKENS>(a, b, p, base, block, first, sums);
}

MM_TARGET void linear_many(const LinearArgs &a) {
    ask_for_large_pages(a.out.data, a.M * a.N * a.out.bytes());
    const std::vector<float> low = scaled_low(a);
    const int64_t count = (a.M + ROWS - 1) / ROWS, most = std::max<int64_t>(1, std::min(NEAR / a.C, PAGES) / ROWS);
    const int64_t stretches = std::max<int64_t>(1, (count + most / 2) / most), width = (count + stretches - 1) / stretches;
    Blocks b(a, width);
#pragma omp parallel num_threads(a.threads)
    {
        Panel panel(a);
        for (int64_t base = 0; base < count; base += width) {
            const int64_t blocks = std::min(width, count - base);
#pragma omp for schedule(static)
            for (int64_t block = 0; block < blocks; ++block) pack_block(a, low, b, base, block);
#pragma omp for schedule(dynamic, 1)
            for (int64_t first = 0; first < a.N; first += COLUMNS) {
                fill_panel(a, first, panel);
                for (int64_t block = 0; block < blocks; ++block)
                    if (a.M - (base + block) * ROWS > 3)
                        run_tile<6>(a, b, panel, base, block, first);
                    else
                        run_tile<3>(a, b, panel, base, block, first);
            }
        }
    }
}
