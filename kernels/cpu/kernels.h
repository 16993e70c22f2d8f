// What the paths have in common: the arguments of the two kernels, element types, and how work is shared out.
//
// Shapes: M tokens, N outputs, K inputs, C = K rounded up to whole groups of 64, G = C / 64, R = ranks of all branches.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mm {

constexpr int64_t GROUP = 64;

enum class Type : int { f32 = 0, bf16 = 1, f16 = 2 };

// An array with its element type; null where the caller gave none.
struct Array {
    const void *data;
    Type type;
    explicit operator bool() const { return data != nullptr; }
    int64_t bytes() const { return type == Type::f32 ? 4 : 2; }
    Array at(int64_t index) const { return {static_cast<const char *>(data) + index * bytes(), type}; }
};

struct QuantizeArgs {
    Array x, smooth, down;  // (M, K), (K), (R, K)
    int64_t M, K, C, R;
    int bits;
    int64_t group;  // 0: one scale per token
    bool is_unsigned;
    float shift;
    int8_t *values;  // (M, C)
    float *scales;   // (M, 1) or (M, G)
    float *low;      // (M, R)
    int threads;
};

struct LinearArgs {
    const int8_t *values;   // (M, C)
    const float *scales;    // (M, scale_columns)
    const uint8_t *weight;  // (N, C / 2) of 4-bit values + 8, or (N, C) of signed bytes
    int weight_bits;        // 4 or 8
    Array weight_scales, bias, up;  // (N, G), (N), (N, R)
    const float *low, *branch_scales;  // (M, R), (R) or null
    Array out;  // (M, N), written
    int64_t M, N, C, G, R, scale_columns;
    int threads;
    bool grouped() const { return scale_columns > 1; }
    int64_t row_bytes() const { return C * weight_bits / 8; }
};

// Asks for large pages of memory that is about to be touched for the first time: small ones would be given one at a time,
// which took a tenth of a large product.
inline void ask_for_large_pages(const void *data, int64_t bytes) {
#if defined(__linux__)
    constexpr uintptr_t LARGE = 2 << 20;
    const uintptr_t start = reinterpret_cast<uintptr_t>(data);
    const uintptr_t first = (start + LARGE - 1) / LARGE * LARGE, end = (start + uintptr_t(bytes)) / LARGE * LARGE;
    if (end > first) madvise(reinterpret_cast<void *>(first), end - first, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

// Left as it comes: whoever fills it touches its pages first, in parallel.
template <typename T>
struct Raw {
    std::unique_ptr<T[]> memory;
    explicit Raw(int64_t count) : memory(new T[size_t(count)]) {}
    T *data() const { return memory.get(); }
};

// A whole layer that rounds its inputs: what both kernels take, but for what lies between them.
struct LayerArgs {
    Array x, smooth, down;
    const uint8_t *weight;
    int weight_bits;
    Array weight_scales, bias, up;
    const float *branch_scales;
    Array out;
    int64_t M, N, K, R;
    int bits;
    int64_t group;
    bool is_unsigned;
    float shift;
    int threads;
};

struct Path {
    const char *name;
    bool (*runs_here)();
    void (*quantize)(const QuantizeArgs &);
    void (*linear)(const LinearArgs &);
    int64_t few = 0;  // up to so many tokens `layer_few` does both
    void (*layer_few)(const QuantizeArgs &, const LinearArgs &) = nullptr;
};

extern const Path portable_path;
#if defined(__x86_64__)
extern const Path avx2_path, avx_vnni_path, avx_vnni_evex_path, avx512_path;
#elif defined(__aarch64__)
extern const Path neon_i8mm_path, neon_dotprod_path;
#endif

}  // namespace mm
