// Runs layers on a path of the C++ kernels without Python: `arm_harness PATH < cases > results` (tests/kernels/test_arm.py).
// A case is 14 numbers of 64 bits (see below) and its arrays; a result is the outputs and the rounded inputs. Every token is also
// computed alone and in pairs, and must come out with the same bits.
#include <cstdio>
#include <cstdlib>
#include <string>

#include "layer.h"

using namespace mm;

namespace {

std::vector<char> read_bytes(int64_t count) {
    std::vector<char> bytes(static_cast<size_t>(count));
    if (count && std::fread(bytes.data(), 1, size_t(count), stdin) != size_t(count)) std::exit(4);
    return bytes;
}

void require(bool ok, const char *what) {
    if (ok) return;
    std::fprintf(stderr, "%s\n", what);
    std::exit(3);
}

void run_case(const Path &path, const int64_t (&n)[14]) {
    const auto [M, N, K, R, bits, group, is_unsigned, shift_bits, weight_bits, type, scale_type, bias, smooth, branch_scales] = n;
    const Type t = Type(type), st = Type(scale_type);
    const int64_t size = Array{nullptr, t}.bytes(), C = (K + GROUP - 1) / GROUP * GROUP, columns = group ? C / group : 1;
    const int32_t low_bits = int32_t(shift_bits);
    float shift;
    std::memcpy(&shift, &low_bits, 4);
    const std::vector<char> x = read_bytes(M * K * size), w = read_bytes(N * C * weight_bits / 8);
    const std::vector<char> ws = read_bytes(N * C / GROUP * Array{nullptr, st}.bytes()), b = read_bytes(bias * N * size);
    const std::vector<char> s = read_bytes(smooth * K * size), d = read_bytes(R * K * size), u = read_bytes(R * N * size);
    const std::vector<char> bs = read_bytes(branch_scales * R * 4);
    const auto maybe = [](const std::vector<char> &v) { return v.empty() ? nullptr : v.data(); };
    const auto run = [&](int64_t first, int64_t count, char *out) {
        run_layer(path, {{x.data() + first * K * size, t}, {maybe(s), t}, {maybe(d), t},
                         reinterpret_cast<const uint8_t *>(w.data()), int(weight_bits), {ws.data(), st}, {maybe(b), t},
                         {maybe(u), t}, reinterpret_cast<const float *>(maybe(bs)), {out, t}, count, N, K, R, int(bits), group,
                         is_unsigned != 0, shift, 1});
    };
    std::vector<char> whole(size_t(M * N * size)), part(size_t(2 * N * size));
    run(0, M, whole.data());
    for (int64_t m = 0; m < M; ++m)
        for (int64_t count = 1; count <= std::min<int64_t>(2, M - m); ++count) {
            run(m, count, part.data());
            require(std::memcmp(part.data(), whole.data() + m * N * size, size_t(count * N * size)) == 0, "depends on its batch");
        }
    std::vector<int8_t> values(size_t(M * C));
    std::vector<float> scales(size_t(M * columns)), low(size_t(M * R));
    path.quantize({{x.data(), t}, {maybe(s), t}, {maybe(d), t}, M, K, C, R, int(bits), group, is_unsigned != 0, shift,
                   values.data(), scales.data(), low.data(), 1});
    std::fwrite(whole.data(), 1, whole.size(), stdout);
    std::fwrite(values.data(), 1, values.size(), stdout);
}

}  // namespace

int main(int, char **argv) {
    const Path *const paths[] = {&portable_path,
#if defined(__aarch64__)
                                 &neon_dotprod_path, &neon_i8mm_path,
#elif defined(__x86_64__)
                                 &avx2_path, &avx_vnni_path,
#endif
    };
    for (const Path *path : paths)
        if (std::string(argv[1]) == path->name) {
            require(path->runs_here(), "this CPU does not run the path");
            int64_t numbers[14];
            while (std::fread(numbers, sizeof(numbers), 1, stdin) == 1) run_case(*path, numbers);
            return 0;
        }
    std::fprintf(stderr, "no path %s\n", argv[1]);
    return 2;
}
