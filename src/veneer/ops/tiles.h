/* Matrix tiles of Intel's processors (AMX), which multiply bfloat16 and sum float32, for matrices in float32.
 *
 * A float32 is the sum of three bfloat16 to the last bit, x = x0 + x1 + x2, each the rounding of what the ones before
 * leave. Of the nine products of two such sums the six with i + j <= 2 are formed; the others are smaller than the
 * last digit of a product. Sums are float32's, as everywhere. What comes out is as near to the exact product as any
 * other float32 product, and each row of it depends on its own inputs alone, whatever the number of rows or threads.
 * It is not the same where a number is infinite or larger than the largest bfloat16 (3.39e38): that gives no number;
 * numbers below the smallest normal one count as zero.
 *
 * Henry, Tang, Heinecke 2019, Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision
 * Computations, arXiv:1904.06376, section II (three bfloat16, six products).
 */
#ifndef VENEER_TILES_H
#define VENEER_TILES_H
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__linux__) && defined(__has_include)
#if __has_include(<amxbf16intrin.h>) || (defined(__clang__) && __has_include(<amxintrin.h>))
#define HAS_TILES
#endif
#endif

#ifdef HAS_TILES
#include <immintrin.h>

#define ON_TILES __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512bf16,prfchw")))
#define ON_VECTORS ON_TILES
#include "vectors.h"

int omp_get_max_threads(void);
int omp_get_num_threads(void);
int omp_get_thread_num(void);

/* A tile has 16 rows of 64 bytes: 32 bfloat16 of a left side, 16 pairs of those of a right side, 16 float32 of a sum.
 * Numbers are worked with in `parts` of bfloat16: three for float32, one for bfloat16 itself. */
enum { TILE = 512, SIDE = 16, DEPTH = 32, BLOCK = 2 * SIDE, MOST_PARTS = 3 };
#define STEP(parts) (2 * (parts) * TILE)
static const struct {
    uint8_t palette, start, unused[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} SHAPES
    __attribute__((aligned(64))) = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

/* 32 numbers as vectors of bfloat16, each the rounding of what the ones before leave. */
ON_TILES INLINE void split(int parts, __m512 low, __m512 high, __m512i out[MOST_PARTS]) {
    for (int i = 0; i < parts; i++) {
        out[i] = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        __m512i low_bits = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(out[i]));
        __m512i high_bits = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(out[i], 1));
        low = _mm512_sub_ps(low, (__m512)_mm512_slli_epi32(low_bits, 16));
        high = _mm512_sub_ps(high, (__m512)_mm512_slli_epi32(high_bits, 16));
    }
}

/* Rows for columns, of 16 by 16 pairs. */
ON_TILES INLINE void transpose(uint16_t *tile) {
    __m512i r[16], t[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_load_si512(tile + i * DEPTH);
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; j++) {
            t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
            t[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xdd);
        }
    for (int j = 0; j < 8; j++) {
        _mm512_store_si512(tile + j * DEPTH, _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88));
        _mm512_store_si512(tile + (j + 8) * DEPTH, _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd));
    }
}

/* One side of a product: `count` vectors of `depth` numbers, float32 or `narrow`, which lie side by side or, `across`,
 * `stride` apart. */
typedef struct {
    const void *at;
    int64_t count, depth, stride;
    int across, is_right, narrow;
} Matrix;

INLINE int64_t at_most(int64_t value, int64_t most) { return value < most ? value : most; }
INLINE __mmask16 first_of(int64_t count) { return count <= 0 ? 0 : count >= 16 ? 0xffff : (1u << count) - 1; }

/* Up to 16 numbers from each of two places in memory, in parts; what is read next is asked for. */
ON_TILES INLINE void read_two(
    int parts, int narrow, const void *at, int64_t one, __mmask16 some, int64_t other, __mmask16 more, int64_t next,
    __m512i out[MOST_PARTS]) {
    if (narrow) {
        const uint16_t *numbers = at;
        _mm_prefetch((const char *)(numbers + one + next), _MM_HINT_T0);
        __m256i low = _mm256_maskz_loadu_epi16(some, numbers + one),
                high = _mm256_maskz_loadu_epi16(more, numbers + other);
        out[0] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    } else {
        const float *numbers = at;
        _mm_prefetch((const char *)(numbers + one + next), _MM_HINT_T0);
        _mm_prefetch((const char *)(numbers + other + next), _MM_HINT_T0);
        split(parts, _mm512_maskz_loadu_ps(some, numbers + one), _mm512_maskz_loadu_ps(more, numbers + other), out);
    }
}

/* Up to 16 vectors from `first` on and 32 of their numbers from `from` on, as a tile for each part, so far apart;
 * zeros beyond. */
ON_TILES INLINE void pack_tiles(
    int parts, const Matrix *side, int64_t first, int64_t from, uint16_t *tiles, int64_t apart) {
    static const uint16_t BY_PAIRS[32]
        __attribute__((aligned(64))) = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i by_pairs = _mm512_load_si512(BY_PAIRS);
    const int64_t left = side->depth - from, stride = side->stride;
    for (int64_t row = 0; row < SIDE; row++) {
        __m512i out[MOST_PARTS] = {0};
        if (side->across) {
            int64_t at = (from + 2 * row) * stride + first;
            __mmask16 some = first_of(side->count - first);
            read_two(
                parts, side->narrow, side->at, at, 2 * row < left ? some : 0, at + stride,
                2 * row + 1 < left ? some : 0, DEPTH * stride, out);
        } else {
            int64_t at = (first + row) * stride + from, there = first + row < side->count ? left : 0;
            read_two(
                parts, side->narrow, side->at, at, first_of(there), at + SIDE, first_of(there - SIDE), 2 * DEPTH, out);
        }
        for (int i = 0; i < parts; i++)
            _mm512_store_si512(
                tiles + i * apart + row * DEPTH, side->across ? _mm512_permutexvar_epi16(by_pairs, out[i]) : out[i]);
    }
    if (side->across != side->is_right)
        for (int i = 0; i < parts; i++) transpose(tiles + i * apart);
}

/* Panels: 32 vectors each, and for each step of 32 of their numbers two tiles of each part. What lies together is read
 * together: a vector's numbers, or those of many vectors. */
ON_TILES INLINE void pack(
    int parts, const Matrix *side, int64_t first, int64_t panels, int64_t from, int64_t steps, uint16_t *to) {
    for (int64_t i = 0; i < panels * steps; i++) {
        int64_t panel = side->across ? i % panels : i / steps, step = side->across ? i / panels : i % steps;
        for (int half = 0; half < 2; half++)
            pack_tiles(
                parts, side, (first + panel) * BLOCK + half * SIDE, from + step * DEPTH,
                to + (panel * steps + step) * STEP(parts) + half * parts * TILE, TILE);
    }
}

/* Two tiles of a left side for each part, so far apart, and how far their rows are, in bytes. */
typedef struct {
    const uint16_t *low, *high;
    int64_t apart, row_bytes;
} Left;

/* Tiles 0 to 3 get the products of a step, 32 by 32. What comes next of both sides is asked for in time: the tiles of
 * a step take longer to come than to be multiplied. */
#define LOAD_LEFT(part)                                                                                               \
    _tile_loadd(4, left.low + (part) * left.apart, left.row_bytes);                                                   \
    _tile_loadd(5, left.high + (part) * left.apart, left.row_bytes);
#define LOAD_RIGHT(part)                                                                                              \
    _tile_loadd(6, right + (part) * TILE, 64);                                                                        \
    _tile_loadd(7, right + ((part) + parts) * TILE, 64);
#define FETCH(half)                                                                                                   \
    for (int line = 0; line < 8; line++) {                                                                            \
        const uint16_t *tile =                                                                                        \
            (half) / 2 < parts ? next.low + (half) / 2 * next.apart : next.high + ((half) / 2 - parts) * next.apart;  \
        _mm_prefetch((const char *)tile + ((half) % 2 * 8 + line) * next.row_bytes, _MM_HINT_T0);                     \
        _mm_prefetch((const char *)(right + STEP(parts) + (half) * TILE / 2 + line * DEPTH), _MM_HINT_T0);            \
    }
#define MULTIPLY(number)                                                                                              \
    _tile_dpbf16ps(0, 4, 6);                                                                                          \
    FETCH(2 * (number))                                                                                               \
    _tile_dpbf16ps(1, 4, 7);                                                                                          \
    _tile_dpbf16ps(2, 5, 6);                                                                                          \
    FETCH(2 * (number) + 1)                                                                                           \
    _tile_dpbf16ps(3, 5, 7);
ON_TILES INLINE void multiply_step(int parts, Left left, const uint16_t *right, Left next) {
    if (parts == 1) {
        LOAD_LEFT(0)
        LOAD_RIGHT(0)
        MULTIPLY(0)
        FETCH(2)
        FETCH(3)
    } else {
        LOAD_LEFT(0)
        LOAD_RIGHT(2)
        MULTIPLY(0)
        LOAD_RIGHT(1)
        MULTIPLY(1)
        LOAD_LEFT(1)
        MULTIPLY(2)
        LOAD_RIGHT(0)
        MULTIPLY(3)
        LOAD_LEFT(0)
        MULTIPLY(4)
        LOAD_LEFT(2)
        MULTIPLY(5)
    }
}

/* Sums start with a number for each column. */
ON_TILES INLINE void begin_sums(const float *begin) {
    _tile_loadd(0, begin, 0);
    _tile_loadd(1, begin + SIDE, 0);
    _tile_loadd(2, begin, 0);
    _tile_loadd(3, begin + SIDE, 0);
}

/* sums (32, 32) = begin + left . right, of two panels. Where sums go is asked for in time. */
ON_TILES INLINE void multiply_panels(
    int parts, const uint16_t *left, const uint16_t *right, int64_t steps, const float *begin, float *sums,
    int64_t stride) {
    for (int i = 0; i < BLOCK; i++) {
        __builtin_prefetch(sums + i * stride, 1, 3);
        __builtin_prefetch(sums + i * stride + SIDE, 1, 3);
    }
    begin_sums(begin);
    for (; steps; steps--, left += STEP(parts), right += STEP(parts)) {
        Left now = {left, left + parts * TILE, TILE, 64}, next = now;
        next.low += STEP(parts), next.high += STEP(parts);
        multiply_step(parts, now, right, next);
    }
    _tile_stored(0, sums, stride * 4);
    _tile_stored(1, sums + SIDE, stride * 4);
    _tile_stored(2, sums + SIDE * stride, stride * 4);
    _tile_stored(3, sums + SIDE * stride + SIDE, stride * 4);
}

/* The first `rows` and `width` of these sums, in place of what is there or onto it. What is added to others is summed
 * by itself before, which loses fewer digits. */
ON_TILES INLINE void multiply_into(
    int parts, const uint16_t *left, const uint16_t *right, int64_t steps, const float *begin, float *sums,
    int64_t stride, int64_t rows, int64_t width, int onto) {
    float whole[BLOCK * BLOCK] __attribute__((aligned(64)));
    if (rows == BLOCK && width == BLOCK && !onto) {
        multiply_panels(parts, left, right, steps, begin, sums, stride);
        return;
    }
    multiply_panels(parts, left, right, steps, begin, whole, BLOCK);
    for (int64_t i = 0; i < rows; i++)
        if (onto)
            for (int64_t j = 0; j < width; j++) sums[i * stride + j] += whole[i * BLOCK + j];
        else memcpy(sums + i * stride, whole + i * BLOCK, width * sizeof *sums);
}

INLINE int64_t parts_of(int64_t count, int64_t size) { return (count + size - 1) / size; }
INLINE uint16_t *aligned(void *memory) { return (uint16_t *)(((uintptr_t)memory + 63) & ~(uintptr_t)63); }
#endif
#endif
