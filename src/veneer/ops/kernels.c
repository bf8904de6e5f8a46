/* Loops that torch would run as several passes over memory, in one each. Every function equals an expression of torch's
 * that stands beside its caller in Python and takes its place where this file was not compiled (docs/decisions/0025).
 *
 * Plain C with the vectors of GCC and Clang: nothing of Python's or torch's is included, and each function is compiled
 * for several processors, of which the loader of the system takes the best. Loops in parallel use the threads that torch
 * has, through the OpenMP that torch has loaded: nothing is linked here. Numbers of 16 bits are computed with in float32.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif
#define INLINE static inline __attribute__((always_inline))

/* What this was compiled from: a library of another source is not used. */
const char *veneer_source(void) { return SOURCE; }

/* Eight numbers of each width. */
typedef double f64x8 __attribute__((vector_size(64)));
typedef uint64_t u64x8 __attribute__((vector_size(64)));
typedef int64_t i64x8 __attribute__((vector_size(64)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));
typedef _Float16 f16x8 __attribute__((vector_size(16)));

#define AS(type, value) ({ __typeof__(value) from = (value); type to; memcpy(&to, &from, sizeof to); to; })

INLINE f64x8 load_f64(const double *from) {
    f64x8 numbers;
    memcpy(&numbers, from, sizeof numbers);
    return numbers;
}

INLINE f64x8 load_bf16(const uint16_t *from) {
    u16x8 bits;
    memcpy(&bits, from, sizeof bits);
    return __builtin_convertvector(AS(f32x8, __builtin_convertvector(bits, u32x8) << 16), f64x8);
}

INLINE f64x8 load_f16(const _Float16 *from) {
    f16x8 numbers;
    memcpy(&numbers, from, sizeof numbers);
    return __builtin_convertvector(__builtin_convertvector(numbers, f32x8), f64x8);
}

INLINE f64x8 load_f32(const float *from) {
    f32x8 numbers;
    memcpy(&numbers, from, sizeof numbers);
    return __builtin_convertvector(numbers, f64x8);
}

/* The bits of numbers without their sign: they are in the order of the sizes, and what is not a number is the largest. */
INLINE i64x8 size_of(f64x8 x) { return AS(i64x8, x) & INT64_MAX; }
INLINE int64_t bits_of(double x) { return AS(int64_t, x); }

/* Rounds to the nearest number, ties to even, that has so many bits less behind its point than a double; below the
 * smallest normal number to a multiple of the smallest one there is, which a sum with a large number does. */
INLINE f64x8 round_once(f64x8 x, int less, double normal, double large) {
    u64x8 bits = AS(u64x8, x), near = bits + ((1ull << (less - 1)) - 1) + ((bits >> less) & 1);
    near &= ~((1ull << less) - 1);
    u64x8 small = AS(u64x8, (x + large) - large) | (bits & ~(uint64_t)INT64_MAX);
    u64x8 is_small = (u64x8)((size_of(x) - bits_of(normal)) >> 63); /* GCC 12 takes vectors apart to compare them */
    return AS(f64x8, (near & ~is_small) | (small & is_small));
}

INLINE void store_bf16(uint16_t *to, f64x8 x) {
    f32x8 exact = __builtin_convertvector(round_once(x, 45, 0x1p-126, 0x1.8p-81), f32x8);
    u16x8 bits = __builtin_convertvector(AS(u32x8, exact) >> 16, u16x8);
    memcpy(to, &bits, sizeof bits);
}

INLINE void store_f16(_Float16 *to, f64x8 x) {
    f32x8 exact = __builtin_convertvector(round_once(x, 42, 0x1p-14, 0x1.8p28), f32x8);
    f16x8 numbers = __builtin_convertvector(exact, f16x8);
    memcpy(to, &numbers, sizeof numbers);
}

/* From these on numbers are rounded to infinity: half a step behind the largest. */
#define END_bf16 0x1.ffp127
#define END_f16 0x1.ffep15

/* sums = scaling * (B @ A) for a strip of rows of B and up to eight columns of A, summed in registers. */
#define STRIP 8
#define TILE 128
INLINE void sum_block(
    const double *A, const double *const B[STRIP], double scaling, double *sums, int64_t columns, int64_t rank,
    int64_t count) {
    f64x8 sum[STRIP] = {{0}};
    for (int64_t k = 0; k < rank; k++) {
        f64x8 a = {0};
        memcpy(&a, A + k * columns, count * sizeof *A);
        _Pragma("GCC unroll 8") for (int i = 0; i < STRIP; i++) sum[i] += a * B[i][k];
    }
    _Pragma("GCC unroll 8") for (int i = 0; i < STRIP; i++) {
        sum[i] *= scaling;
        memcpy(sums + i * TILE, &sum[i], sizeof sum[i]);
    }
}

/* out = round_once(W + sums) for up to eight numbers; negative where they fit. */
#define ADD_BLOCK(stored, W_type, result, out_type)                                                                  \
    INLINE i64x8 add_block_##stored##_##result(                                                                      \
        const W_type *W, const double *sums, out_type *out, int64_t count) {                                         \
        W_type from[8] = {0};                                                                                        \
        out_type to[8];                                                                                              \
        memcpy(from, W, count * sizeof *from);                                                                       \
        f64x8 x = load_##stored(from) + load_f64(sums);                                                              \
        store_##result(to, x);                                                                                       \
        memcpy(out, to, count * sizeof *to);                                                                         \
        return size_of(x) - bits_of(END_##result);                                                                   \
    }

/* out = round_once(W + scaling * (B @ A)), in float64; tells whether all of it is finite there.
 * W and out are (rows, columns), A (rank, columns), B (rows, rank). Of A as many columns as the first-level cache holds
 * are used for all rows before the next. Sums go through memory, so that none is rounded together with what is added. */
#define ADD_LOW_RANK(stored, W_type, result, out_type)                                                               \
    ADD_BLOCK(stored, W_type, result, out_type)                                                                      \
    FOR_EACH_PROCESSOR int add_low_rank_##stored##_##result(                                                         \
        const W_type *W, const double *A, const double *B, double scaling, out_type *out, int64_t rows,              \
        int64_t columns, int64_t rank) {                                                                             \
        double sums[STRIP * TILE];                                                                                   \
        const double *B_at[STRIP];                                                                                   \
        i64x8 fits = ~(i64x8){0};                                                                                    \
        for (int64_t tile = 0; tile < columns; tile += TILE)                                                         \
            for (int64_t row = 0; row < rows; row += STRIP) {                                                        \
                int64_t width = columns - tile < TILE ? columns - tile : TILE, column = 0, rest = width % 8;         \
                for (int i = 0; i < STRIP; i++) /* the last row stands in for those that are missing */              \
                    B_at[i] = B + (row + i < rows ? row + i : rows - 1) * rank;                                      \
                for (; column < width - rest; column += 8)                                                           \
                    sum_block(A + tile + column, B_at, scaling, sums + column, columns, rank, 8);                    \
                if (rest) sum_block(A + tile + column, B_at, scaling, sums + column, columns, rank, rest);           \
                for (int64_t i = 0; i < STRIP && row + i < rows; i++) {                                              \
                    const W_type *from = W + (row + i) * columns + tile;                                             \
                    const double *sum = sums + i * TILE;                                                             \
                    out_type *to = out + (row + i) * columns + tile;                                                 \
                    for (column = 0; column < width - rest; column += 8)                                             \
                        fits &= add_block_##stored##_##result(from + column, sum + column, to + column, 8);          \
                    if (rest) fits &= add_block_##stored##_##result(from + column, sum + column, to + column, rest); \
                }                                                                                                    \
            }                                                                                                        \
        int64_t all = -1;                                                                                            \
        for (int i = 0; i < 8; i++) all &= fits[i];                                                                  \
        return all < 0;                                                                                              \
    }

ADD_LOW_RANK(bf16, uint16_t, bf16, uint16_t)
ADD_LOW_RANK(bf16, uint16_t, f16, _Float16)
ADD_LOW_RANK(f16, _Float16, bf16, uint16_t)
ADD_LOW_RANK(f16, _Float16, f16, _Float16)
ADD_LOW_RANK(f32, float, bf16, uint16_t)
ADD_LOW_RANK(f32, float, f16, _Float16)
