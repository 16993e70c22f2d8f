// Arm's 8-bit matrix product (ARMv8.6 or `i8mm`: Neoverse V1, Apple since M2): smmla multiplies two tokens with two outputs, 8
// columns of K at a time, twice the products of a dot. Few tokens take the dot product, as in neon_dotprod.cpp.
#if defined(__aarch64__)
#include <arm_neon.h>

#include "arm.h"
#include "kernels.h"

namespace mm {
namespace {

#if defined(__clang__)
#define MM_TARGET __attribute__((target("dotprod,i8mm")))
#else
#define MM_TARGET __attribute__((target("arch=armv8.2-a+dotprod+i8mm")))
#endif
constexpr int DEPTH = 8;
#include "neon.h"
#include "rows.h"

#define MM_OWN_TILE
constexpr int COLUMNS = LANES * VECTORS;

// One group of LANES rows into a panel: 8 columns of K of each row together, so that two rows make a vector.
template <int BITS>
MM_TARGET inline void expand(const uint8_t *from, int64_t stride, int64_t rows, uint8_t *to) {
    for (int pair = 0; pair < LANES / 2; ++pair)
        for (int i = 0; i < BITS / 2; ++i) {  // 16 bytes of both rows: two steps of 8
            I row[2];
            for (int r = 0; r < 2; ++r)
                row[r] = 2 * pair + r < rows ? load_int(from + (2 * pair + r) * stride + 16 * i) : vdupq_n_s32(0);
            const I steps[2] = {halves_of<0>(row[0], row[1]), halves_of<1>(row[0], row[1])};
            for (int s = 0; s < 2; ++s) {
                uint8_t *at = to + (2 * i + s) * COLUMNS * DEPTH + 16 * pair;
                store_int(at, BITS == 8 ? steps[s] : low_halves(steps[s]));
                if (BITS == 4) store_int(at + 4 * COLUMNS * DEPTH, high_halves(steps[s]));
            }
        }
}

template <int T, int BITS>
MM_TARGET inline void group_sums(const int8_t *x, const uint8_t *w, const int32_t *offsets, I (&sums)[T][VECTORS]) {
    I squares[T / 2][2 * VECTORS];  // two tokens x two outputs each
    for (int t = 0; t < T / 2; ++t)
        for (int v = 0; v < 2 * VECTORS; ++v) squares[t][v] = vdupq_n_s32(0);
    for (int step = 0; step < GROUP / DEPTH; ++step) {
        int8x16_t tokens[T / 2];
#pragma GCC unroll 4
        for (int t = 0; t < T / 2; ++t) tokens[t] = vld1q_s8(x + (step * ROWS + 2 * t) * DEPTH);
#pragma GCC unroll 8
        for (int v = 0; v < 2 * VECTORS; ++v) {
            const int8x16_t outputs = vreinterpretq_s8_s32(load_int(w + (step * COLUMNS + 2 * v) * DEPTH));
#pragma GCC unroll 4
            for (int t = 0; t < T / 2; ++t) squares[t][v] = vmmlaq_s32(squares[t][v], tokens[t], outputs);
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < T / 2; ++t)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
            sums[2 * t][v] = vaddq_s32(halves_of<0>(squares[t][2 * v], squares[t][2 * v + 1]), vdupq_n_s32(offsets[2 * t]));
            sums[2 * t + 1][v] =
                vaddq_s32(halves_of<1>(squares[t][2 * v], squares[t][2 * v + 1]), vdupq_n_s32(offsets[2 * t + 1]));
        }
}

#include "product.h"

}  // namespace

const Path neon_i8mm_path{"neon_i8mm", [] { return has_dotprod() && has_i8mm(); }, quantize, linear, FEW, layer_few};

}  // namespace mm
#endif
