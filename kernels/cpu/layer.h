// A whole layer: rounding and product in turn, by one path.
#pragma once

#include "kernels.h"

namespace mm {

// Many tokens are rounded and multiplied a stretch at a time: rounded inputs then stay in the last-level cache, where all
// of FLUX's 4096 tokens of 12288 numbers would be written out to fresh memory and fetched back.
inline void run_layer(const Path &path, const LayerArgs &a) {
    constexpr int64_t STRETCH = 1024, TILES = 12;  // tokens: about as many as many.h takes at once, in whole tiles
    const int64_t stretches = std::max<int64_t>(1, (a.M + STRETCH / 2) / STRETCH);
    const int64_t length = (a.M + stretches * TILES - 1) / (stretches * TILES) * TILES;
    const int64_t C = (a.K + GROUP - 1) / GROUP * GROUP, most = std::min(a.M, length), columns = a.group ? C / a.group : 1;
    const Raw<int8_t> values(most * C);
    const Raw<float> scales(most * columns), low(most * a.R);
    for (int64_t first = 0; first < a.M; first += length) {
        const int64_t count = std::min(length, a.M - first);
        const QuantizeArgs rounded{a.x.at(first * a.K), a.smooth, a.down, count, a.K, C, a.R, a.bits, a.group, a.is_unsigned,
                                   a.shift, values.data(), scales.data(), low.data(), a.threads};
        const LinearArgs product{values.data(), scales.data(), a.weight, a.weight_bits, a.weight_scales, a.bias, a.up, low.data(),
                                 a.branch_scales, a.out.at(first * a.N), count, a.N, C, C / GROUP, a.R, columns, a.threads};
        if (count <= path.few) {
            path.layer_few(rounded, product);
        } else {
            path.quantize(rounded);
            path.linear(product);
        }
    }
}

}  // namespace mm
