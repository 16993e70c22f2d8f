// The path that runs on any machine: plain loops, left to the compiler.
#include <vector>

#include "kernels.h"

namespace mm {
namespace {

#define MM_TARGET
#define MM_PROJECT_DOWN project_down
#include "rows.h"

template <typename Weight>
inline void dots(const int8_t *x, const Weight *w, int64_t G, int32_t *sums) {
    for (int64_t g = 0; g < G; ++g) {
        int32_t sum = 0;
        for (int64_t k = 0; k < GROUP; ++k) sum += int16_t(x[g * GROUP + k]) * int16_t(w[g * GROUP + k]);
        sums[g] = sum;
    }
}

inline void group_dots(const int8_t *x, const uint8_t *w, int64_t G, int32_t *sums) { dots(x, w, G, sums); }
inline void signed_dots(const int8_t *x, const int8_t *w, int64_t G, int32_t *sums) { dots(x, w, G, sums); }

#include "dots.h"

}  // namespace

const Path portable_path{"portable", [] { return true; }, quantize, linear};

}  // namespace mm
