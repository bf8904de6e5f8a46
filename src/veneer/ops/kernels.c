/* Loops that torch would run as several passes over memory, in one each. Every function equals an expression of torch's
 * that stands beside its caller in Python and takes its place where this file was not compiled (docs/decisions/0025).
 *
 * Plain C with the vectors of GCC and Clang: nothing of Python's or torch's is included, and each function is compiled
 * for several processors, of which the loader of the system takes the best. Loops in parallel use the threads that torch
 * has, through the OpenMP that torch has loaded: nothing is linked here.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "vectors.h"

#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

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
    u64x8 bits = AS(u64x8, x), near = bits + (((uint64_t)1 << (less - 1)) - 1) + ((bits >> less) & 1);
    near &= ~(((uint64_t)1 << less) - 1);
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

/* Training: sixteen numbers at a time, computed with in float32. Rows are divided among the threads that torch has; what
 * a thread does with its rows stands in a function of its own, as only such are compiled for several processors. */
typedef uint16_t u16x16 __attribute__((vector_size(32)));

INLINE f32x16 read_f32(const float *from, int64_t count) {
    f32x16 numbers = {0};
    memcpy(&numbers, from, count * sizeof *from);
    return numbers;
}

INLINE void write_f32(float *to, f32x16 numbers, int64_t count) { memcpy(to, &numbers, count * sizeof *to); }

INLINE f32x16 read_bf16(const uint16_t *from, int64_t count) {
    u16x16 bits = {0};
    memcpy(&bits, from, count * sizeof *from);
    return AS(f32x16, __builtin_convertvector(bits, u32x16) << 16);
}

/* To the nearest, ties to even; what is not a number stays none. */
INLINE void write_bf16(uint16_t *to, f32x16 numbers, int64_t count) {
    u32x16 bits = AS(u32x16, numbers);
    u32x16 is_nan = (u32x16)((0x7f800000 - AS(i32x16, bits & INT32_MAX)) >> 31);
    bits = (((bits + 0x7fff + ((bits >> 16) & 1)) & ~is_nan) | ((bits | 0x400000) & is_nan)) >> 16;
    u16x16 narrow = __builtin_convertvector(bits, u16x16);
    memcpy(to, &narrow, count * sizeof *to);
}

INLINE float sum_of(f32x16 numbers) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) numbers[i] += numbers[i + half];
    return numbers[0];
}

/* Runs a statement for whole vectors of a row, `count` a constant, and once for what is left of it. */
#define ALONG(length, at, count, statement)                                                                          \
    do {                                                                                                             \
        int64_t at = 0;                                                                                              \
        for (; at + LANES <= (length); at += LANES) { enum { count = LANES }; statement; }                           \
        if (at < (length)) { int64_t count = (length) - at; statement; }                                             \
    } while (0)

/* Gives each of torch's threads some of the rows. */
#define SHARE_ROWS(rows, first, last, call)                                                                          \
    _Pragma("omp parallel") {                                                                                        \
        int64_t each = ((rows) + omp_get_num_threads() - 1) / omp_get_num_threads();                                 \
        int64_t first = each * omp_get_thread_num(), last = first + each < (rows) ? first + each : (rows);           \
        if (first < last) call;                                                                                      \
    }
int omp_get_num_threads(void);
int omp_get_thread_num(void);

/* y = x / rms(x) * gain with rms = sqrt(mean(x * x) + epsilon), and 1 / rms; x and y are (rows, size). */
#define NORM(name, number)                                                                                           \
    FOR_EACH_PROCESSOR void some_norms_##name(                                                                       \
        const number *x, const float *gain, float epsilon, number *y, float *inverse, int64_t first, int64_t last,   \
        int64_t size) {                                                                                              \
        for (int64_t row = first; row < last; row++) {                                                               \
            const number *from = x + row * size;                                                                     \
            number *to = y + row * size;                                                                             \
            f32x16 squares = {0};                                                                                    \
            ALONG(size, at, count, f32x16 one = read_##name(from + at, count); squares += one * one);                \
            float scale = 1 / sqrtf(sum_of(squares) / size + epsilon);                                               \
            inverse[row] = scale;                                                                                    \
            ALONG(size, at, count, write_##name(                                                                     \
                to + at, read_##name(from + at, count) * scale * read_f32(gain + at, count), count));                \
        }                                                                                                            \
    }                                                                                                                \
    void norm_##name(const number *x, const float *gain, double epsilon, number *y, float *inverse, int64_t rows,    \
                     int64_t size) {                                                                                 \
        SHARE_ROWS(rows, first, last, some_norms_##name(x, gain, epsilon, y, inverse, first, last, size))            \
    }

/* y again, from x and 1 / rms. */
#define NORM_AGAIN(name, number)                                                                                     \
    FOR_EACH_PROCESSOR void some_norms_again_##name(                                                                 \
        const number *x, const float *gain, const float *inverse, number *y, int64_t first, int64_t last,            \
        int64_t size) {                                                                                              \
        for (int64_t row = first; row < last; row++) {                                                               \
            const number *from = x + row * size;                                                                     \
            number *to = y + row * size;                                                                             \
            ALONG(size, at, count, write_##name(                                                                     \
                to + at, read_##name(from + at, count) * inverse[row] * read_f32(gain + at, count), count));         \
        }                                                                                                            \
    }                                                                                                                \
    void norm_again_##name(const number *x, const float *gain, const float *inverse, number *y, int64_t rows,        \
                           int64_t size) {                                                                           \
        SHARE_ROWS(rows, first, last, some_norms_again_##name(x, gain, inverse, y, first, last, size))               \
    }

/* dx = g / rms - x * sum(g * x) / (size * rms^3) with g = gain * dy. */
#define NORM_GRADIENT(name, number)                                                                                  \
    FOR_EACH_PROCESSOR void some_norm_gradients_##name(                                                              \
        const number *dy, const number *x, const float *gain, const float *inverse, number *dx, int64_t first,       \
        int64_t last, int64_t size) {                                                                                \
        for (int64_t row = first; row < last; row++) {                                                               \
            const number *d = dy + row * size, *from = x + row * size;                                               \
            number *to = dx + row * size;                                                                            \
            f32x16 dots = {0};                                                                                       \
            ALONG(size, at, count, dots += read_##name(d + at, count) * read_f32(gain + at, count) *                 \
                                           read_##name(from + at, count));                                           \
            float scale = inverse[row], slope = -sum_of(dots) * scale * scale * scale / size;                        \
            ALONG(size, at, count, write_##name(                                                                     \
                to + at, read_##name(d + at, count) * read_f32(gain + at, count) * scale +                           \
                             read_##name(from + at, count) * slope, count));                                         \
        }                                                                                                            \
    }                                                                                                                \
    void norm_gradient_##name(const number *dy, const number *x, const float *gain, const float *inverse,            \
                              number *dx, int64_t rows, int64_t size) {                                              \
        SHARE_ROWS(rows, first, last, some_norm_gradients_##name(dy, x, gain, inverse, dx, first, last, size))       \
    }

/* Turns the first `turned` numbers of each head by its token's angles; back is the other way. x is (tokens, heads, size),
 * with strides for tokens and heads, out the same without, cos and sin (tokens, turned). */
#define ROTATE(name, number)                                                                                         \
    FOR_EACH_PROCESSOR void some_rotations_##name(                                                                   \
        const number *x, const number *cos, const number *sin, number *out, int64_t first, int64_t last,             \
        int64_t heads, int64_t size, int64_t turned, int64_t token_stride, int64_t head_stride, int back) {          \
        int64_t half = turned / 2;                                                                                   \
        for (int64_t token = first; token < last; token++) {                                                         \
            const number *low_cos = cos + token * turned, *high_cos = low_cos + half;                                \
            const number *low_sin = sin + token * turned, *high_sin = low_sin + half;                                \
            for (int64_t head = 0; head < heads; head++) {                                                           \
                const number *from = x + token * token_stride + head * head_stride;                                  \
                number *to = out + (token * heads + head) * size;                                                    \
                ALONG(half, at, count,                                                                               \
                    f32x16 low = read_##name(from + at, count); f32x16 high = read_##name(from + half + at, count);  \
                    f32x16 low_turn = read_##name((back ? high_sin : low_sin) + at, count);                          \
                    f32x16 high_turn = read_##name((back ? low_sin : high_sin) + at, count);                         \
                    float way = back ? -1.0f : 1.0f;                                                                 \
                    write_##name(to + at, low * read_##name(low_cos + at, count) - way * high * low_turn, count);    \
                    write_##name(to + half + at, high * read_##name(high_cos + at, count) + way * low * high_turn,   \
                                 count));                                                                            \
                memcpy(to + turned, from + turned, (size - turned) * sizeof *to);                                    \
            }                                                                                                        \
        }                                                                                                            \
    }                                                                                                                \
    void rotate_##name(const number *x, const number *cos, const number *sin, number *out, int64_t tokens,           \
                       int64_t heads, int64_t size, int64_t turned, int64_t token_stride, int64_t head_stride,       \
                       int64_t back) {                                                                               \
        SHARE_ROWS(tokens, first, last, some_rotations_##name(                                                       \
            x, cos, sin, out, first, last, heads, size, turned, token_stride, head_stride, back))                    \
    }

/* A gate's function f(x) and its slope. */
INLINE f32x16 silu(f32x16 x, f32x16 *slope) {
    f32x16 share = 1 / (1 + exp_of(-x)), y = x * share;
    *slope = share + y * (1 - share);
    return y;
}

/* 0.5 * (1 + tanh(a)) is 1 / (1 + exp(-2 a)), which loses no digits where tanh is near -1. */
INLINE f32x16 gelu_tanh(f32x16 x, f32x16 *slope) {
    const float scale = 2 * 0.7978845608028654f, cubed = 0.044715f;
    f32x16 share = 1 / (1 + exp_of(-scale * (x + cubed * x * x * x)));
    *slope = share + x * share * (1 - share) * scale * (1 + 3 * cubed * x * x);
    return x * share;
}

/* out = f(gate) * up; gate and up are (rows, size) with a stride for rows, out has none. */
#define GATE(f, name, number)                                                                                        \
    FOR_EACH_PROCESSOR void some_gates_##f##_##name(                                                                 \
        const number *gate, const number *up, number *out, int64_t first, int64_t last, int64_t size,                \
        int64_t stride) {                                                                                            \
        for (int64_t row = first; row < last; row++)                                                                 \
            ALONG(size, at, count,                                                                                   \
                f32x16 slope; f32x16 y = f(read_##name(gate + row * stride + at, count), &slope);                    \
                write_##name(out + row * size + at, y * read_##name(up + row * stride + at, count), count));         \
    }                                                                                                                \
    void gate_##f##_##name(const number *gate, const number *up, number *out, int64_t rows, int64_t size,            \
                           int64_t stride) {                                                                         \
        SHARE_ROWS(rows, first, last, some_gates_##f##_##name(gate, up, out, first, last, size, stride))             \
    }

/* dgate = dout * up * f'(gate) and dup = dout * f(gate); dout is (rows, size), all others have a stride for rows. */
#define GATE_GRADIENT(f, name, number)                                                                               \
    FOR_EACH_PROCESSOR void some_gate_gradients_##f##_##name(                                                        \
        const number *dout, const number *gate, const number *up, number *dgate, number *dup, int64_t first,         \
        int64_t last, int64_t size, int64_t stride, int64_t gradient_stride) {                                       \
        for (int64_t row = first; row < last; row++)                                                                 \
            ALONG(size, at, count,                                                                                   \
                f32x16 slope; f32x16 y = f(read_##name(gate + row * stride + at, count), &slope);                    \
                f32x16 d = read_##name(dout + row * size + at, count);                                               \
                f32x16 times = read_##name(up + row * stride + at, count);                                           \
                write_##name(dgate + row * gradient_stride + at, d * times * slope, count);                          \
                write_##name(dup + row * gradient_stride + at, d * y, count));                                       \
    }                                                                                                                \
    void gate_gradient_##f##_##name(                                                                                 \
        const number *dout, const number *gate, const number *up, number *dgate, number *dup, int64_t rows,          \
        int64_t size, int64_t stride, int64_t gradient_stride) {                                                     \
        SHARE_ROWS(rows, first, last, some_gate_gradients_##f##_##name(                                              \
            dout, gate, up, dgate, dup, first, last, size, stride, gradient_stride))                                 \
    }

/* out = ratio * W + scaling * (B @ A), row by row; without a ratio it is one. W and out, which may be W, are (rows,
 * columns), A (rank, columns), B (rows, rank). Four rows of A's products are summed in registers. */
INLINE void merge_block(
    const float *W, const float *A, const float *const B[4], const float ratio[4], float scaling, float *out,
    int64_t rows, int64_t columns, int64_t rank, int64_t count) {
    f32x16 sum[4] = {{0}};
    for (int64_t k = 0; k < rank; k++) {
        f32x16 a = read_f32(A + k * columns, count);
        _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) sum[i] += a * B[i][k];
    }
    _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++)
        if (i < rows)
            write_f32(out + i * columns, read_f32(W + i * columns, count) * ratio[i] + sum[i] * scaling, count);
}

FOR_EACH_PROCESSOR void some_merged_f32(
    const float *W, const float *A, const float *B, const float *ratio, float scaling, float *out, int64_t first,
    int64_t last, int64_t columns, int64_t rank) {
    for (int64_t row = first; row < last; row += 4) {
        const float *B_at[4];
        float ratio_at[4];
        for (int i = 0; i < 4; i++) { /* the last row stands in for those that are missing */
            int64_t at = row + i < last ? row + i : last - 1;
            B_at[i] = B + at * rank;
            ratio_at[i] = ratio ? ratio[at] : 1.0f;
        }
        const float *from = W + row * columns;
        float *to = out + row * columns;
        ALONG(columns, at, count,
              merge_block(from + at, A + at, B_at, ratio_at, scaling, to + at, last - row, columns, rank, count));
    }
}

void merged_f32(const float *W, const float *A, const float *B, const float *ratio, double scaling, float *out,
                int64_t rows, int64_t columns, int64_t rank) {
    SHARE_ROWS(rows, first, last, some_merged_f32(W, A, B, ratio, scaling, out, first, last, columns, rank))
}

#define TRAINING(name, number)                                                                                       \
    NORM(name, number)                                                                                               \
    NORM_AGAIN(name, number)                                                                                         \
    NORM_GRADIENT(name, number)                                                                                      \
    ROTATE(name, number)                                                                                             \
    GATE(silu, name, number)                                                                                         \
    GATE(gelu_tanh, name, number)                                                                                    \
    GATE_GRADIENT(silu, name, number)                                                                                \
    GATE_GRADIENT(gelu_tanh, name, number)

TRAINING(f32, float)
TRAINING(bf16, uint16_t)
