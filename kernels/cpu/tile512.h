// A whole tile, in assembly: GCC 12 finds no allocation of 30 registers that does not store sums at every step, which costs
// half of the speed. zmm0-5 are the integer sums of the left 16 outputs, zmm6-11 of the right, zmm12-17 and zmm18-23 their
// fp32 sums (kept in registers: storing them at every group cost a sixth), 24 and 25 weights, 26-31 activations.
#define MM_STR(x) #x
#define MM_START(i, l, r, t)                                               \
    "vpbroadcastd 4*" MM_STR(i) "(%[offsets]), %%zmm" MM_STR(l) "\n\t"     \
    "vmovdqa64 %%zmm" MM_STR(l) ", %%zmm" MM_STR(r) "\n\t"
#define MM_STEP(i, l, r, t)                                                \
    "vpbroadcastd 4*" MM_STR(i) "(%[x]), %%zmm" MM_STR(t) "\n\t"           \
    "vpdpbusd %%zmm" MM_STR(t) ", %%zmm24, %%zmm" MM_STR(l) "\n\t"         \
    "vpdpbusd %%zmm" MM_STR(t) ", %%zmm25, %%zmm" MM_STR(r) "\n\t"
#define MM_NEXT(i, l, r, t)                                                \
    "vpbroadcastd 24+4*" MM_STR(i) "(%[x]), %%zmm" MM_STR(t) "\n\t"        \
    "vpdpbusd %%zmm" MM_STR(t) ", %%zmm24, %%zmm" MM_STR(l) "\n\t"         \
    "vpdpbusd %%zmm" MM_STR(t) ", %%zmm25, %%zmm" MM_STR(r) "\n\t"
#define MM_JOIN(i, l, r, fl, fr)                                           \
    "vcvtdq2ps %%zmm" MM_STR(l) ", %%zmm" MM_STR(l) "\n\t"                 \
    "vcvtdq2ps %%zmm" MM_STR(r) ", %%zmm" MM_STR(r) "\n\t"                 \
    "vfmadd231ps %%zmm" MM_STR(l) ", %%zmm24, %%zmm" MM_STR(fl) "\n\t"     \
    "vfmadd231ps %%zmm" MM_STR(r) ", %%zmm25, %%zmm" MM_STR(fr) "\n\t"
#define MM_JOIN_SCALED(i, l, r, fl, fr)                                    \
    "vbroadcastss 4*" MM_STR(i) "(%[scales]), %%zmm26\n\t"                 \
    "vmulps %%zmm26, %%zmm24, %%zmm27\n\t"                                 \
    "vmulps %%zmm26, %%zmm25, %%zmm28\n\t"                                 \
    "vcvtdq2ps %%zmm" MM_STR(l) ", %%zmm" MM_STR(l) "\n\t"                 \
    "vcvtdq2ps %%zmm" MM_STR(r) ", %%zmm" MM_STR(r) "\n\t"                 \
    "vfmadd231ps %%zmm" MM_STR(l) ", %%zmm27, %%zmm" MM_STR(fl) "\n\t"     \
    "vfmadd231ps %%zmm" MM_STR(r) ", %%zmm28, %%zmm" MM_STR(fr) "\n\t"
#define MM_CLEAR(i, l, r, fl, fr)                                          \
    "vpxord %%zmm" MM_STR(fl) ", %%zmm" MM_STR(fl) ", %%zmm" MM_STR(fl) "\n\t" \
    "vpxord %%zmm" MM_STR(fr) ", %%zmm" MM_STR(fr) ", %%zmm" MM_STR(fr) "\n\t"
#define MM_STORE(i, l, r, fl, fr)                                          \
    "vmovaps %%zmm" MM_STR(fl) ", 128*" MM_STR(i) "(%[sums])\n\t"          \
    "vmovaps %%zmm" MM_STR(fr) ", 128*" MM_STR(i) "+64(%[sums])\n\t"
#define MM_TOKENS(DO) DO(0, 0, 6, 26) DO(1, 1, 7, 27) DO(2, 2, 8, 28) DO(3, 3, 9, 29) DO(4, 4, 10, 30) DO(5, 5, 11, 31)
#define MM_SUMS(DO) DO(0, 0, 6, 12, 18) DO(1, 1, 7, 13, 19) DO(2, 2, 8, 14, 20) DO(3, 3, 9, 15, 21) DO(4, 4, 10, 16, 22) \
    DO(5, 5, 11, 17, 23)
#define MM_TILE(JOIN)                                                      \
    MM_SUMS(MM_CLEAR)                                                      \
    ".p2align 4\n"                                                         \
    "1:\n\t"                                                               \
    MM_TOKENS(MM_START)                                                    \
    "movl $8, %[count]\n\t"                                                \
    ".p2align 4\n"                                                         \
    "2:\n\t"                                                               \
    "vmovdqu64 (%[w]), %%zmm24\n\t"                                        \
    "vmovdqu64 64(%[w]), %%zmm25\n\t"                                      \
    MM_TOKENS(MM_STEP)                                                     \
    "vmovdqu64 128(%[w]), %%zmm24\n\t"                                     \
    "vmovdqu64 192(%[w]), %%zmm25\n\t"                                     \
    MM_TOKENS(MM_NEXT)                                                     \
    "addq $256, %[w]\n\t"                                                  \
    "addq $48, %[x]\n\t"                                                   \
    "decl %[count]\n\t"                                                    \
    "jnz 2b\n\t"                                                           \
    "vmovups (%[ws]), %%zmm24\n\t"                                         \
    "vmovups 64(%[ws]), %%zmm25\n\t"                                       \
    MM_SUMS(JOIN)                                                          \
    "addq $128, %[ws]\n\t"                                                 \
    "addq $24, %[offsets]\n\t"                                             \
    "addq $24, %[scales]\n\t"                                              \
    "decq %[groups]\n\t"                                                   \
    "jnz 1b\n\t"                                                           \
    MM_SUMS(MM_STORE)
#define MM_CLOBBERS                                                                                               \
    "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", \
        "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23",   \
        "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31"

template <int T, int BITS, bool GROUPED>
MM_TARGET void whole_tile(const int8_t *x, const int32_t *offsets, const float *scales, const Panel &p, int64_t G, float *sums) {
    static_assert(ROWS == 6 && COLUMNS == 32 && QUADS == 16 && DEPTH == 4, "the assembly is written for these");
    const uint8_t *w = p.w.data();
    const float *ws = p.ends.scales.data();
    int64_t groups = G;
    int count;
    if constexpr (GROUPED)
        asm volatile(MM_TILE(MM_JOIN_SCALED)
                     : [x] "+r"(x), [w] "+r"(w), [offsets] "+r"(offsets), [ws] "+r"(ws), [scales] "+r"(scales),
                       [groups] "+r"(groups), [count] "=&r"(count)
                     : [sums] "r"(sums)
                     : MM_CLOBBERS);
    else
        asm volatile(MM_TILE(MM_JOIN)
                     : [x] "+r"(x), [w] "+r"(w), [offsets] "+r"(offsets), [ws] "+r"(ws), [scales] "+r"(scales),
                       [groups] "+r"(groups), [count] "=&r"(count)
                     : [sums] "r"(sums)
                     : MM_CLOBBERS);
}
