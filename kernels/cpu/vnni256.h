// The path of 256-bit vpdpbusd, which multiplies unsigned weights with signed activations, four columns of K at a time, and adds
// them in 32 bits. The includer has set MM_TARGET and MM_DPBUSD, the instruction in VEX or in EVEX encoding.
#include "vectors256.h"

using Part = I;
constexpr int CHAIN = 16, PLANES8 = 1;

MM_TARGET inline Part begin(I sums) { return sums; }
MM_TARGET inline Part dot(Part part, I w, I x) { return MM_DPBUSD(part, w, x); }
MM_TARGET inline Part plus(Part a, Part b) { return add_int(a, b); }
template <int PLANE>
MM_TARGET inline I join(I, Part part) {
    return part;
}
template <int BITS, int PLANE>
MM_TARGET inline I plane(I w) {
    return w;
}

#include "rows.h"
#include "product.h"
