// The product row by row, for the paths without a tile of their own: each 4-bit row is expanded once and multiplied with
// every token. Included like rows.h; the includer has set MM_TARGET and defined
//   void group_dots(const int8_t *x, const uint8_t *w, int64_t G, int32_t *sums)
// which writes sum over k of x * (w + 8) for each group: the + 8 of the storage comes off through sums of x; and
//   void signed_dots(const int8_t *x, const int8_t *w, int64_t G, int32_t *sums)
// for 8-bit weights, which are read as they lie.

struct Prepared {  // what depends on the activations alone
    std::vector<float> scales, offsets, low;  // (M, G): scale, and -8 * scale * sum of x; (M, R) with branch scales
};

MM_TARGET inline Prepared prepare(const LinearArgs &a) {
    Prepared p{std::vector<float>(size_t(a.M * a.G)), std::vector<float>(size_t(a.M * a.G)),
               std::vector<float>(size_t(a.M * a.R))};
    for (int64_t m = 0; m < a.M; ++m)
        for (int64_t g = 0; g < a.G; ++g) {
            int sum = 0;
            for (int64_t k = 0; k < GROUP; ++k) sum += a.values[m * a.C + g * GROUP + k];
            const float scale = a.scales[m * a.scale_columns + (a.grouped() ? g : 0)];
            p.scales[size_t(m * a.G + g)] = scale;
            p.offsets[size_t(m * a.G + g)] = a.weight_bits == 4 ? scale * float(-8 * sum) : 0.0f;
        }
    for (int64_t m = 0; m < a.M; ++m)
        for (int64_t r = 0; r < a.R; ++r)
            p.low[size_t(m * a.R + r)] = a.low[m * a.R + r] * (a.branch_scales ? a.branch_scales[r] : 1.0f);
    return p;
}

MM_TARGET inline void expand_row(const uint8_t *packed, int64_t G, uint8_t *w) {
    for (int64_t g = 0; g < G; ++g)
        for (int64_t j = 0; j < GROUP / 2; ++j) {
            w[g * GROUP + j] = packed[g * GROUP / 2 + j] & 15;
            w[g * GROUP + GROUP / 2 + j] = packed[g * GROUP / 2 + j] >> 4;
        }
}

MM_TARGET inline float finish_dot(const LinearArgs &a, const Prepared &p, int64_t m, const int32_t *sums,
                                  const float *weight_scales, const float *up) {
    const float *scales = p.scales.data() + m * a.G, *offsets = p.offsets.data() + m * a.G;
    float y = 0;
#pragma omp simd reduction(+ : y)
    for (int64_t g = 0; g < a.G; ++g) y += weight_scales[g] * (float(sums[g]) * scales[g] + offsets[g]);
    return a.R ? y + dot(p.low.data() + m * a.R, up, a.R) : y;
}

MM_TARGET void linear(const LinearArgs &a) {
    const Prepared p = prepare(a);
#pragma omp parallel num_threads(a.threads)
    {
        std::vector<uint8_t> w(size_t(a.C));
        std::vector<float> weight_scales(size_t(a.G)), up(size_t(a.R));
        std::vector<int32_t> sums(size_t(a.G));
#pragma omp for schedule(dynamic, 16)
        for (int64_t n = 0; n < a.N; ++n) {
            const uint8_t *row = a.weight + n * a.row_bytes();
            if (a.weight_bits == 4) expand_row(row, a.G, w.data());
            load_floats(a.weight_scales.at(n * a.G), a.G, weight_scales.data());
            if (a.R) load_floats(a.up.at(n * a.R), a.R, up.data());
            float bias = 0;
            if (a.bias) load_floats(a.bias.at(n), 1, &bias);
            for (int64_t m = 0; m < a.M; ++m) {
                if (a.weight_bits == 4)
                    group_dots(a.values + m * a.C, w.data(), a.G, sums.data());
                else
                    signed_dots(a.values + m * a.C, reinterpret_cast<const int8_t *>(row), a.G, sums.data());
                const float y = finish_dot(a, p, m, sums.data(), weight_scales.data(), up.data()) + bias;
                store_floats(&y, 1, a.out.at(m * a.N + n));
            }
        }
    }
}
