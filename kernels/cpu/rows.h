// Row-wise work, written as plain loops and compiled once per path: the includer sets MM_TARGET (its instruction set) and
// includes this inside its own anonymous namespace, so that no two paths share a compiled function.
//
// project_down is the path's: `low` of `count` tokens from `first` on, ranks [from, to), a multiple of 8; x holds the tokens in
// fp32, C apart, zeros from K on.
//
// The order of steps is the reference's; see kernels/reference.py. Contraction to fused multiply-adds is switched off for
// the whole extension, as it would move values across rounding edges.

MM_TARGET void project_down(const QuantizeArgs &a, int64_t first, int64_t count, const float *x, int64_t from, int64_t to);

MM_TARGET inline float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

MM_TARGET inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

MM_TARGET inline float half_to_float(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16, rest = uint32_t(half & 0x7fff) << 13;
    if ((half & 0x7c00) == 0x7c00) return bits_to_float(sign | 0x7f800000 | rest);  // infinite or no number
    // The exponent is moved by a product, which also gets the smallest halves right
    return bits_to_float(sign | float_to_bits(bits_to_float(rest) * 0x1p112f));
}

MM_TARGET inline uint16_t float_to_half(float value) {
    const uint32_t bits = float_to_bits(value), sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (rest >= 0x477ff000) return uint16_t(sign | 0x7c00);
    // Adding 2^(e - 10 + 23) leaves the kept bits of a half at the bottom, rounded to even
    const uint32_t exponent = rest < 0x38800000 ? 0x38800000 : (rest & 0x7f800000);
    const float lift = bits_to_float(exponent + (13u << 23));
    const uint32_t kept = float_to_bits(bits_to_float(rest) + lift) - float_to_bits(lift);
    return uint16_t(sign | (((exponent - 0x38800000) >> 13) + kept));
}

MM_TARGET inline uint16_t float_to_bfloat(float value) {
    const uint32_t bits = float_to_bits(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t((bits >> 16) | 0x40);
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

MM_TARGET inline void load_floats(Array from, int64_t count, float *to) {
    if (from.type == Type::f32) {
        std::memcpy(to, from.data, size_t(count) * 4);
    } else if (from.type == Type::bf16) {
        const uint16_t *p = static_cast<const uint16_t *>(from.data);
        for (int64_t i = 0; i < count; ++i) to[i] = bits_to_float(uint32_t(p[i]) << 16);
    } else {
        const uint16_t *p = static_cast<const uint16_t *>(from.data);
        for (int64_t i = 0; i < count; ++i) to[i] = half_to_float(p[i]);
    }
}

MM_TARGET inline void store_floats(const float *from, int64_t count, Array out) {
    void *to = const_cast<void *>(out.data);
    if (out.type == Type::f32) {
        std::memcpy(to, from, size_t(count) * 4);
    } else if (out.type == Type::bf16) {
        uint16_t *p = static_cast<uint16_t *>(to);
        for (int64_t i = 0; i < count; ++i) p[i] = float_to_bfloat(from[i]);
    } else {
        uint16_t *p = static_cast<uint16_t *>(to);
        for (int64_t i = 0; i < count; ++i) p[i] = float_to_half(from[i]);
    }
}

// One stretch of v that shares a scale. The largest magnitude is found among bit patterns, where anything that is no
// number exceeds every number: it ends up in the scale, hence in the output, instead of vanishing. No loop here has a
// branch: on signs of real data each would be guessed wrong half of the time, which took four fifths of the whole pass.
MM_TARGET inline float round_stretch(const float *v, int64_t count, int top, bool is_unsigned, int8_t *values) {
    uint32_t most = 0;
    const uint32_t drop = is_unsigned ? 0xffffffff : 0;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t bits = float_to_bits(v[i]), magnitude = bits & 0x7fffffff;
        const uint32_t below = (0 - (bits >> 31)) & (0 - uint32_t(magnitude <= 0x7f800000)) & drop;
        const uint32_t counts = magnitude & ~below;
        most = counts > most ? counts : most;
    }
    const float absmax = bits_to_float(most), per_step = most == 0 ? 0.0f : float(top) / absmax;
    if (most >= 0x7f800000) {
        std::memset(values, 0, size_t(count));
        return absmax == absmax ? bits_to_float(0x7fc00000) : absmax;
    }
    const float low = is_unsigned ? 0.0f : float(-top), high = float(top);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
        float q = std::rint(v[i] * per_step);
        q = q < low ? low : q;
        q = q > high ? high : q;
        values[i] = int8_t(int(q));
    }
    return absmax / float(top);
}

MM_TARGET inline void quantize_row(const QuantizeArgs &a, int64_t m, const float *inverse, float *v) {
    if (inverse != nullptr)
        for (int64_t k = 0; k < a.K; ++k) v[k] = (v[k] + a.shift) * inverse[k];
    else if (a.shift != 0)
        for (int64_t k = 0; k < a.K; ++k) v[k] = v[k] + a.shift;
    const int top = a.bits == 8 ? 127 : a.is_unsigned ? 15 : 7;
    const int64_t stretch = a.group ? a.group : a.C, count = a.C / stretch;
    for (int64_t g = 0; g < count; ++g)
        a.scales[m * count + g] =
            round_stretch(v + g * stretch, stretch, top, a.is_unsigned, a.values + m * a.C + g * stretch);
}

constexpr int64_t QUANTIZE_ROWS = 8;  // rows that share one reading of `down`

MM_TARGET inline int64_t load_block(const QuantizeArgs &a, int64_t first, float *x) {
    const int64_t count = a.M - first < QUANTIZE_ROWS ? a.M - first : QUANTIZE_ROWS;
    for (int64_t i = 0; i < count; ++i) {
        load_floats(a.x.at((first + i) * a.K), a.K, x + i * a.C);
        std::memset(x + i * a.C + a.K, 0, size_t(a.C - a.K) * 4);
    }
    return count;
}

// A single block: threads share its ranks, since reading `down` is most of the work.
MM_TARGET inline void quantize_one_block(const QuantizeArgs &a, const float *inverse) {
    constexpr int64_t RANKS = 8;
    std::vector<float> x(size_t(QUANTIZE_ROWS * a.C));
    const int64_t count = load_block(a, 0, x.data());
#pragma omp parallel for schedule(static) num_threads(a.threads) if (a.R * a.K >= 32768)
    for (int64_t r = 0; r < a.R; r += RANKS) project_down(a, 0, count, x.data(), r, r + RANKS);
    for (int64_t i = 0; i < count; ++i) quantize_row(a, i, inverse, x.data() + i * a.C);
}

// 1 / smooth; empty where nothing is smoothed.
MM_TARGET inline std::vector<float> inverse_of(const QuantizeArgs &a) {
    std::vector<float> inverse(size_t(a.smooth ? a.K : 0));
    if (a.smooth) load_floats(a.smooth, a.K, inverse.data());
    for (float &value : inverse) value = 1.0f / value;
    return inverse;
}

MM_TARGET void quantize(const QuantizeArgs &a) {
    const std::vector<float> inverse = inverse_of(a);
    const float *by = a.smooth ? inverse.data() : nullptr;
    const int64_t blocks = (a.M + QUANTIZE_ROWS - 1) / QUANTIZE_ROWS;
    if (blocks <= 1) return quantize_one_block(a, by);
    ask_for_large_pages(a.values, a.M * a.C);
#pragma omp parallel num_threads(a.M * a.C * (a.R + 8) < (1 << 19) ? 1 : a.threads)
    {
        std::vector<float> x(size_t(QUANTIZE_ROWS * a.C));
#pragma omp for schedule(dynamic, 4)
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t first = block * QUANTIZE_ROWS, count = load_block(a, first, x.data());
            if (a.R) project_down(a, first, count, x.data(), 0, a.R);
            for (int64_t i = 0; i < count; ++i) quantize_row(a, first + i, by, x.data() + i * a.C);
        }
    }
}
