// The Python face of the kernels. Addresses, sizes and type codes come in; kernels/cpu/__init__.py has checked them.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <stdexcept>

#include "kernels.h"

namespace nb = nanobind;
using namespace mm;

namespace {

using Typed = std::pair<uintptr_t, int>;

Array array(const Typed &typed) { return {reinterpret_cast<const void *>(typed.first), static_cast<Type>(typed.second)}; }

template <typename T>
T *pointer(uintptr_t address) {
    return reinterpret_cast<T *>(address);
}

const Path *const paths[] = {
#if defined(__x86_64__)
    &avx512_path, &avx2_path,
#endif
    &portable_path};

const Path *chosen = &portable_path;

// The widest path that this CPU runs, or the widest from `cap` downward.
std::string choose(const std::string &cap) {
    bool open = cap.empty();
    for (const Path *path : paths) {
        open = open || cap == path->name;
        if (open && path->runs_here()) {
            chosen = path;
            return path->name;
        }
    }
    throw std::invalid_argument("MM_KERNELS_ISA takes avx512, avx2 or portable, not '" + cap + "'");
}

void quantize(const Typed &x, const Typed &smooth, const Typed &down, std::tuple<int64_t, int64_t, int64_t> sizes, int bits,
              int64_t group, bool is_unsigned, float shift, std::tuple<uintptr_t, uintptr_t, uintptr_t> out, int threads) {
    const auto [M, K, R] = sizes;
    const auto [values, scales, low] = out;
    const QuantizeArgs args{array(x), array(smooth), array(down), M, K, (K + GROUP - 1) / GROUP * GROUP, R, bits, group,
                            is_unsigned, shift, pointer<int8_t>(values), pointer<float>(scales), pointer<float>(low), threads};
    nb::gil_scoped_release release;
    chosen->quantize(args);
}

void linear(std::tuple<uintptr_t, uintptr_t, uintptr_t> in, const Typed &weight_scales, const Typed &bias, const Typed &low,
            const Typed &up, const Typed &branch_scales, const Typed &out,
            std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t> sizes, int weight_bits, int threads) {
    const auto [values, scales, weight] = in;
    const auto [M, N, C, scale_columns, R] = sizes;
    const LinearArgs args{pointer<const int8_t>(values), pointer<const float>(scales), pointer<const uint8_t>(weight),
                          weight_bits, array(weight_scales), array(bias), array(up), pointer<const float>(low.first),
                          pointer<const float>(branch_scales.first), array(out), M, N, C, C / GROUP, R, scale_columns, threads};
    nb::gil_scoped_release release;
    chosen->linear(args);
}

}  // namespace

NB_MODULE(_native, m) {
    m.def("choose", &choose);
    m.def("quantize", &quantize);
    m.def("linear", &linear);
}
