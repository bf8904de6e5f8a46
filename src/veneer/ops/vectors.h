/* Sixteen float32 at a time, by the vectors of GCC and Clang. */
#ifndef VENEER_VECTORS_H
#define VENEER_VECTORS_H
#include <stdint.h>
#include <string.h>

#ifndef ON_VECTORS
#define ON_VECTORS /* the processor that the file is compiled for */
#endif
#define INLINE static inline __attribute__((always_inline))
#define AS(type, value) ({ __typeof__(value) from = (value); type to; memcpy(&to, &from, sizeof to); to; })

typedef float f32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
#define LANES 16

/* exp(x) to 1e-7: 2^n by the exponent's bits, and a polynomial for what is left of x / log 2 (Cephes, expf). */
ON_VECTORS INLINE f32x16 exp_of(f32x16 x) {
    const f32x16 most = (f32x16){0} + 88.0f, least = (f32x16){0} - 87.0f;
    i32x16 above = AS(i32x16, most - x) >> 31, below = AS(i32x16, x - least) >> 31;
    x = AS(f32x16, (AS(i32x16, x) & ~above & ~below) | (AS(i32x16, most) & above) | (AS(i32x16, least) & below));
    f32x16 n = x * 1.44269504088896341f + 12582912.0f; /* its last bits are the nearest whole number */
    i32x16 exponent = AS(i32x16, n) << 23;
    n -= 12582912.0f;
    x -= n * 0.693359375f;
    x -= n * -2.12194440e-4f;
    f32x16 y = x * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * x + 8.3334519073e-3f;
    y = y * x + 4.1665795894e-2f;
    y = y * x + 1.6666665459e-1f;
    y = y * x + 5.0000001201e-1f;
    y = y * x * x + x + 1;
    return AS(f32x16, AS(i32x16, y) + exponent);
}
#endif
