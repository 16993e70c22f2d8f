// AVX-VNNI (Intel since 2021, AMD since Zen 5): VEX encoding, for CPUs without AVX512.
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

#include "kernels.h"

namespace mm {
namespace {

#define MM_TARGET __attribute__((target("avx2,fma,f16c,avxvnni")))
#define MM_DPBUSD _mm256_dpbusd_avx_epi32
#include "vnni256.h"

bool runs_here() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
           __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

}  // namespace

const Path avx_vnni_path{"avx_vnni", runs_here, quantize, linear, FEW, layer_few};

}  // namespace mm
#endif
