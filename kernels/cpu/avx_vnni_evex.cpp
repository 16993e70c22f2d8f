// The path `avx_vnni` in EVEX encoding. It is chosen where a CPU with AVX512-VNNI is capped to `avx_vnni` and has no VEX form
// (Zen 4, Ice Lake), so that the path can be tested and timed there.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"

namespace mm {
namespace {

#define MM_TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512vl,avx512vnni")))
#define MM_DPBUSD _mm256_dpbusd_epi32
#include "vnni256.h"

bool runs_here() {
    return __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
}

}  // namespace

const Path avx_vnni_evex_path{"avx_vnni", runs_here, quantize, linear, FEW, layer_few};

}  // namespace mm
#endif
