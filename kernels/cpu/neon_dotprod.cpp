// Arm's dot product (ARMv8.2 with `dotprod`: Cortex-A55/A76 and later, Apple since A11/M1).
#if defined(__aarch64__)
#include <arm_neon.h>

#include "arm.h"
#include "kernels.h"

namespace mm {
namespace {

#if defined(__clang__)
#define MM_TARGET __attribute__((target("dotprod")))
#else
#define MM_TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#endif
constexpr int DEPTH = 4;
#include "neon.h"
#include "rows.h"
#include "product.h"

}  // namespace

const Path neon_dotprod_path{"neon_dotprod", has_dotprod, quantize, linear, FEW, layer_few};

}  // namespace mm
#endif
