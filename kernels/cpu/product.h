// The product of rounded inputs and packed weights, and the down projection, for every path with vectors. One source: a path
// defines its vectors and the shape of its tiles, and includes this inside its own anonymous namespace.
//
// What a path defines (vectors256.h has the whole list in one place):
//   LANES, VECTORS, ROWS   a tile is ROWS tokens x VECTORS vectors of LANES outputs
//   FEW                    up to so many tokens weights are not written to a panel (see few.h)
//   F, I                   vectors of LANES floats and 32-bit integers, with load, store, splat, fma, ...
//   sums_of_8              the sums of the lanes of 8 vectors side by side
//   turn                   LANES rows of 32 bytes to 8 vectors, one 32-bit word of every row each
//   load_rows, ...         where MM_ROW_SUMS is defined: the same rows as they lie, and what adds up words of a row (see few.h)
//   Part, begin, dot, join sums of products of 4 columns each: `dot` adds up to CHAIN of them, `join` widens to 32 bits
//   PLANES8                8-bit weights are multiplied whole (1), or as two 4-bit ones (2)
//
// One order of summation: an output's products are added exactly, in integers, over a group of 64 columns; groups join in
// their order, each by one fused multiply-add in fp32; the ranks of the branch join the bias in their order, each by one; the
// sum of groups, times the scale of the token, joins that by one. Few tokens and many, whole tiles and rests all do the same, so
// a token's outputs have the same bits whatever is computed beside it. Groups and ranks are two chains, so that neither waits.


#ifndef MM_OWN_TILE
constexpr int COLUMNS = LANES * VECTORS;
#endif
constexpr int QUADS = GROUP / 4;
constexpr int64_t SERIAL = 1 << 18;  // so few products are not worth waking other threads

MM_TARGET inline int threads_for(const LinearArgs &a) { return a.M * a.N * a.C < SERIAL ? 1 : a.threads; }

// What an unsigned weight is too large by, times the sum of a group of activations, negated.
MM_TARGET inline int32_t offset_of(const LinearArgs &a, const int8_t *x) {
    int32_t sum = 0;
    for (int k = 0; k < GROUP; ++k) sum += x[k];
    return -sum * (a.weight_bits == 4 ? 8 : FLIP8);
}

template <int HALF>
MM_TARGET inline F widened(I words, Type type) {
    if (type == Type::bf16) return from_bfloats<HALF>(words);
    return from_halves<HALF>(words);
}

// Rows [first, first + rows) of a (.., length) array, at most LANES of them, turned: to[i * step] holds LANES floats of column i.
__attribute__((noinline)) MM_TARGET void turn_floats(Array from, int64_t first, int64_t rows, int64_t length, int64_t step, float *to) {
    const Array start = from.at(first * length);
    const uint8_t *bytes = static_cast<const uint8_t *>(start.data);
    const int64_t stride = length * from.bytes(), each = 32 / from.bytes();
    int64_t i = 0;
    for (; i + each <= length; i += each) {
        I words[8];
        turn(bytes + i * from.bytes(), stride, rows, words);
        for (int j = 0; j < 8; ++j)
            if (from.type == Type::f32) {
                store(to + (i + j) * step, as_floats(words[j]));
            } else {
                store(to + (i + 2 * j) * step, widened<0>(words[j], from.type));
                store(to + (i + 2 * j + 1) * step, widened<1>(words[j], from.type));
            }
    }
    if (i == length) return;
    alignas(64) uint8_t rest[LANES * 32] = {};  // what is left of every row, where 32 bytes may be read
    for (int64_t l = 0; l < rows; ++l) std::memcpy(rest + 32 * l, bytes + l * stride + i * from.bytes(), size_t((length - i) * from.bytes()));
    I words[8];
    turn(rest, 32, LANES, words);
    for (int j = 0; i < length; ++j, ++i)
        if (from.type == Type::f32) {
            store(to + i * step, as_floats(words[j]));
        } else {
            store(to + i * step, widened<0>(words[j], from.type));
            if (++i < length) store(to + i * step, widened<1>(words[j], from.type));
        }
}

// What belongs to COUNT vectors of outputs and is no integer; outputs past the end are zero.
struct Ends {
    std::vector<float> scales, bias;  // (G, COUNT * LANES), (COUNT * LANES)
    int64_t width;
    Ends(const LinearArgs &a, int count)
        : scales(size_t(a.G * count * LANES)), bias(size_t(count * LANES)), width(count * LANES) {}
};

MM_TARGET inline void fill_ends(const LinearArgs &a, int64_t first, Ends &e) {
    for (int64_t c = 0; c < e.width; c += LANES) {
        const int64_t rows = std::min<int64_t>(LANES, a.N - first - c);
        if (rows <= 0) break;
        turn_floats(a.weight_scales, first + c, rows, a.G, e.width, e.scales.data() + c);
    }
    if (a.bias) load_floats(a.bias.at(first), std::min(e.width, a.N - first), e.bias.data());
}

// Ranks [first, last) of all tokens, times the scales of the branches.
inline void scale_low(const LinearArgs &a, int64_t first, int64_t last, float *to) {
    for (int64_t m = 0; m < a.M; ++m)
        for (int64_t r = first; r < last; ++r)
            to[m * a.R + r] = a.low[m * a.R + r] * (a.branch_scales != nullptr ? a.branch_scales[r] : 1.0f);
}

inline std::vector<float> scaled_low(const LinearArgs &a) {
    std::vector<float> low(size_t(a.M * a.R));
    scale_low(a, 0, a.R, low.data());
    return low;
}

#include "project.h"
#include "few.h"
#include "many.h"

MM_TARGET void linear(const LinearArgs &a) {
    if (a.M <= 0 || a.N <= 0) return;
    if (a.M <= FEW) return linear_few(a);
    a.weight_bits == 4 ? linear_many<4>(a) : linear_many<8>(a);
}
