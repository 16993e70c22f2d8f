// Vectors of 4 outputs in NEON and the shape of their tiles. Included by the paths of 64-bit Arm, which have set MM_TARGET.
// vdot multiplies signed bytes with signed ones, so 8-bit weights are taken as they are; 4-bit ones stay value + 8.

constexpr int LANES = 4, VECTORS = 4, ROWS = 4, FEW = 4;
constexpr int FLIP8 = 0;

using F = float32x4_t;
using I = int32x4_t;

MM_TARGET inline F zero() { return vdupq_n_f32(0); }
MM_TARGET inline F splat(float value) { return vdupq_n_f32(value); }
MM_TARGET inline F load(const float *from) { return vld1q_f32(from); }
MM_TARGET inline void store(float *to, F value) { vst1q_f32(to, value); }
MM_TARGET inline F mul(F a, F b) { return vmulq_f32(a, b); }
MM_TARGET inline F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
MM_TARGET inline F floats(I value) { return vcvtq_f32_s32(value); }
MM_TARGET inline void sums_of_8(const float *from, float *to) {
    for (int i = 0; i < 8; ++i) to[i] = vaddvq_f32(load(from + i * LANES));
}

MM_TARGET inline I splat_int(int32_t value) { return vdupq_n_s32(value); }
MM_TARGET inline I load_int(const uint8_t *from) { return vreinterpretq_s32_u8(vld1q_u8(from)); }
MM_TARGET inline void store_int(uint8_t *to, I value) { vst1q_u8(to, vreinterpretq_u8_s32(value)); }
MM_TARGET inline I low_halves(I value) { return vreinterpretq_s32_u8(vandq_u8(vreinterpretq_u8_s32(value), vdupq_n_u8(15))); }
MM_TARGET inline I high_halves(I value) { return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(value), 4)); }
MM_TARGET inline I flipped(I value) { return value; }

template <int HALF>
MM_TARGET inline F from_bfloats(I value) {
    return vreinterpretq_f32_s32(HALF ? vandq_s32(value, vdupq_n_s32(int32_t(0xffff0000))) : vshlq_n_s32(value, 16));
}
template <int HALF>
MM_TARGET inline F from_halves(I value) {
    return vcvt_f32_f16(vreinterpret_f16_s16(HALF ? vshrn_n_s32(value, 16) : vmovn_s32(value)));
}
MM_TARGET inline F as_floats(I value) { return vreinterpretq_f32_s32(value); }

template <Type TYPE>
MM_TARGET inline F load_as(const void *data, int64_t index) {
    if constexpr (TYPE == Type::f32) return vld1q_f32(static_cast<const float *>(data) + index);
    const uint16x4_t half = vld1_u16(static_cast<const uint16_t *>(data) + index);
    if constexpr (TYPE == Type::f16) return vcvt_f32_f16(vreinterpret_f16_u16(half));
    return vreinterpretq_f32_u32(vshll_n_u16(half, 16));
}

// Pairs of 64-bit halves: the lower (0) or upper (1) ones of two vectors.
template <int HALF>
MM_TARGET inline I halves_of(I a, I b) {
    const int64x2_t x = vreinterpretq_s64_s32(a), y = vreinterpretq_s64_s32(b);
    return vreinterpretq_s32_s64(HALF ? vzip2q_s64(x, y) : vzip1q_s64(x, y));
}

// LANES rows of 32 bytes, `stride` apart, to 8 vectors: word j of every row. Rows from `rows` on are zeros.
MM_TARGET inline void turn(const uint8_t *from, int64_t stride, int64_t rows, I (&to)[8]) {
    for (int h = 0; h < 2; ++h) {
        I r[4];
        for (int i = 0; i < 4; ++i) r[i] = i < rows ? load_int(from + i * stride + 16 * h) : vdupq_n_s32(0);
        const I even[2] = {vtrn1q_s32(r[0], r[1]), vtrn1q_s32(r[2], r[3])};
        const I odd[2] = {vtrn2q_s32(r[0], r[1]), vtrn2q_s32(r[2], r[3])};
        to[4 * h] = halves_of<0>(even[0], even[1]);
        to[4 * h + 1] = halves_of<0>(odd[0], odd[1]);
        to[4 * h + 2] = halves_of<1>(even[0], even[1]);
        to[4 * h + 3] = halves_of<1>(odd[0], odd[1]);
    }
}

using Part = I;
constexpr int CHAIN = 16, PLANES8 = 1;

MM_TARGET inline Part begin(I sums) { return sums; }
MM_TARGET inline Part dot(Part part, I w, I x) {
    return vdotq_s32(part, vreinterpretq_s8_s32(w), vreinterpretq_s8_s32(x));
}
template <int PLANE>
MM_TARGET inline I join(I, Part part) {
    return part;
}
template <int BITS, int PLANE>
MM_TARGET inline I plane(I w) {
    return w;
}
