// The path that runs on any machine: plain loops, left to the compiler. The product goes row by row: each row of weights is
// expanded once and multiplied with every token, so a token's outputs do not depend on the tokens beside it.

#include "kernels.h"

namespace mm {
namespace {

#define MM_TARGET
#include "rows.h"

float dot(const float *a, const float *b, int64_t count) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) sum += a[i] * b[i];
    return sum;
}

void project_down(const QuantizeArgs &a, int64_t first, int64_t count, const float *x, int64_t from, int64_t to) {
    std::vector<float> down(size_t(a.K));
    for (int64_t r = from; r < to; ++r) {
        load_floats(a.down.at(r * a.K), a.K, down.data());
        for (int64_t i = 0; i < count; ++i) a.low[(first + i) * a.R + r] = dot(x + i * a.C, down.data(), a.K);
    }
}

std::vector<float> scaled_low(const LinearArgs &a) {
    std::vector<float> low(a.low, a.low + (a.R ? a.M * a.R : 0));
    if (a.branch_scales != nullptr)
        for (int64_t i = 0; i < int64_t(low.size()); ++i) low[size_t(i)] *= a.branch_scales[i % a.R];
    return low;
}

void expand_row(const LinearArgs &a, const uint8_t *packed, int8_t *w) {
    if (a.weight_bits == 8) {
        std::memcpy(w, packed, size_t(a.C));
        return;
    }
    for (int64_t g = 0; g < a.G; ++g)
        for (int64_t j = 0; j < GROUP / 2; ++j) {
            w[g * GROUP + j] = int8_t((packed[g * GROUP / 2 + j] & 15) - 8);
            w[g * GROUP + GROUP / 2 + j] = int8_t((packed[g * GROUP / 2 + j] >> 4) - 8);
        }
}

float output(const LinearArgs &a, int64_t m, const int8_t *w, const float *weight_scales, const float *low, const float *up) {
    const int8_t *x = a.values + m * a.C;
    const float *scales = a.scales + m * a.scale_columns;
    float y = 0;
    for (int64_t g = 0; g < a.G; ++g) {
        int32_t sum = 0;
        for (int64_t k = g * GROUP; k < (g + 1) * GROUP; ++k) sum += int16_t(x[k]) * int16_t(w[k]);
        y += weight_scales[g] * (float(sum) * scales[a.grouped() ? g : 0]);
    }
    return a.R ? y + dot(low + m * a.R, up, a.R) : y;
}

void linear(const LinearArgs &a) {
    const std::vector<float> low = scaled_low(a);
#pragma omp parallel num_threads(a.threads)
    {
        std::vector<int8_t> w(size_t(a.C));
        std::vector<float> weight_scales(size_t(a.G)), up(size_t(a.R));
#pragma omp for schedule(dynamic, 16)
        for (int64_t n = 0; n < a.N; ++n) {
            expand_row(a, a.weight + n * a.row_bytes(), w.data());
            load_floats(a.weight_scales.at(n * a.G), a.G, weight_scales.data());
            if (a.R) load_floats(a.up.at(n * a.R), a.R, up.data());
            float bias = 0;
            if (a.bias) load_floats(a.bias.at(n), 1, &bias);
            for (int64_t m = 0; m < a.M; ++m) {
                const float y = output(a, m, w.data(), weight_scales.data(), low.data(), up.data()) + bias;
                store_floats(&y, 1, a.out.at(m * a.N + n));
            }
        }
    }
}

}  // namespace

const Path portable_path{"portable", [] { return true; }, quantize, linear};

}  // namespace mm
