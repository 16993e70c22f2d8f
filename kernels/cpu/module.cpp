// The Python face of the kernels. Addresses, sizes and type codes come in; kernels/cpu/__init__.py has checked them.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "layer.h"

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
    &avx512_path, &avx_vnni_path, &avx_vnni_evex_path, &avx2_path,
#elif defined(__aarch64__)
    &neon_i8mm_path, &neon_dotprod_path,
#endif
    &portable_path};

const Path *chosen = &portable_path;

// The names of all paths that were compiled, the widest first.
std::vector<std::string> names() {
    std::vector<std::string> found;
    for (const Path *path : paths)
        if (found.empty() || found.back() != path->name) found.emplace_back(path->name);
    return found;
}

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
    std::string known;
    for (const std::string &name : names()) known += (known.empty() ? "" : ", ") + name;
    throw std::invalid_argument("MM_KERNELS_ISA takes one of " + known + ", not '" + cap + "'");
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

void layer(const Typed &x, const Typed &smooth, const Typed &down, uintptr_t weight, const Typed &weight_scales,
           const Typed &bias, const Typed &up, uintptr_t branch_scales, const Typed &out,
           std::tuple<int64_t, int64_t, int64_t, int64_t> sizes, int weight_bits,
           std::tuple<int, int64_t, bool, float> rounding, int threads) {
    const auto [M, N, K, R] = sizes;
    const auto [bits, group, is_unsigned, shift] = rounding;
    const LayerArgs args{array(x), array(smooth), array(down), pointer<const uint8_t>(weight), weight_bits,
                         array(weight_scales), array(bias), array(up), pointer<const float>(branch_scales), array(out),
                         M, N, K, R, bits, group, is_unsigned, shift, threads};
    nb::gil_scoped_release release;
    run_layer(*chosen, args);
}

}  // namespace

NB_MODULE(_native, m) {
    m.def("choose", &choose);
    m.def("paths", &names);
    m.def("quantize", &quantize);
    m.def("linear", &linear);
    m.def("layer", &layer);
}
