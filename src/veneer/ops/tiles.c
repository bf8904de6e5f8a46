/* Products of float32 matrices on matrix tiles. */
#include "tiles.h"

#ifndef HAS_TILES
int veneer_has_tiles(void) { return 0; }
int multiply_f32(void) { return 0; }
#else
#include <cpuid.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Whether the processor has what is used here, and the system lets this process use tiles. */
int veneer_has_tiles(void) {
    unsigned a, b, c, d;
    const unsigned avx512 = 1u << 16 | 1u << 30 | 1u << 31, tiles = 1u << 22 | 1u << 24;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (b & avx512) != avx512 || (d & tiles) != tiles) return 0;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & 1u << 5)) return 0;
    const long ask_for_a_state = 0x1023, of_tiles = 18;
    return syscall(SYS_arch_prctl, ask_for_a_state, of_tiles) == 0;
}

enum { PARTS = 3 };

/* Where sums go: onto what is there, or in place of it with a bias for each column, or none. */
typedef struct {
    float *at;
    int64_t stride, rows, columns;
    const float *bias;
    int onto;
} Sums;

/* Sums that are added to others are formed by themselves, which loses fewer digits. */
ON_TILES static void multiply_block(
    const uint16_t *left, const uint16_t *right, int64_t steps, const Sums *out, int64_t row, int64_t column) {
    float begin[BLOCK] __attribute__((aligned(64))) = {0}, whole[BLOCK * BLOCK] __attribute__((aligned(64)));
    float *sums = out->at + row * out->stride + column;
    int64_t rows = at_most(out->rows - row, BLOCK), width = at_most(out->columns - column, BLOCK);
    if (out->bias && !out->onto) memcpy(begin, out->bias + column, width * sizeof *sums);
    if (rows == BLOCK && width == BLOCK && !out->onto) {
        multiply_panels(PARTS, left, right, steps, begin, sums, out->stride);
        return;
    }
    multiply_panels(PARTS, left, right, steps, begin, whole, BLOCK);
    for (int64_t i = 0; i < rows; i++)
        if (out->onto)
            for (int64_t j = 0; j < width; j++) sums[i * out->stride + j] += whole[i * BLOCK + j];
        else
            memcpy(sums + i * out->stride, whole + i * BLOCK, width * sizeof *sums);
}


/* Panels of one side, `held`, that all threads read; of the other, `taken`, a thread packs what its cache holds, and
 * goes on to the next that nobody has taken. The last step fetches beyond a panel: hence one more. */
enum { MOST_DEPTH = 1024, MOST_HELD = 2048 / BLOCK, CACHE = 1 << 20 };

ON_TILES static void multiply_slice(
    const Matrix *held, const Matrix *taken, int64_t first_held, int64_t panels_held, int64_t from, int64_t steps,
    const Sums *out, uint16_t *memory, int64_t most_taken) {
    int64_t size = steps * STEP(PARTS), panels = parts_of(taken->count, BLOCK), next = 0;
    /* As many panels for each thread, and no more at a time than it has room for. */
    _Pragma("omp parallel") {
        int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
        int64_t own_start = thread * panels_held / threads, own_stop = (thread + 1) * panels_held / threads;
        pack(PARTS, held, first_held + own_start, own_stop - own_start, from, steps, memory + own_start * size);
        int64_t parts = threads * parts_of(panels, threads * most_taken);
        uint16_t *own = memory + (panels_held + thread * most_taken) * size;
        _Pragma("omp barrier")
        _tile_loadconfig(&SHAPES);
        for (int64_t part; (part = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < parts;) {
            int64_t start = part * panels / parts, count = (part + 1) * panels / parts - start;
            pack(PARTS, taken, start, count, from, steps, own);
            for (int64_t i = 0; i < panels_held; i++)
                for (int64_t j = 0; j < count; j++) {
                    const uint16_t *one = memory + i * size, *other = own + j * size;
                    int64_t at_held = (first_held + i) * BLOCK, at_taken = (start + j) * BLOCK;
                    if (held->is_right) multiply_block(other, one, steps, out, at_taken, at_held);
                    else multiply_block(one, other, steps, out, at_held, at_taken);
                }
        }
        _tile_release();
    }
}

/* out = x . W^T, or onto it, or with a bias for each column; x is (rows, depth), W (columns, depth), out (rows, columns).
 * Of each side one of both strides is 1. Tells whether there was memory for it. */
ON_TILES int multiply_f32(
    const float *x, int64_t x_stride, int64_t x_across, const float *W, int64_t W_stride, int64_t W_across,
    const float *bias, float *out, int64_t out_stride, int64_t onto, int64_t rows, int64_t columns, int64_t depth) {
    const int64_t threads = omp_get_max_threads();
    Matrix left = {x, rows, depth, x_stride, x_across, 0, 0}, right = {W, columns, depth, W_stride, W_across, 1, 0};
    Matrix *held = rows < columns ? &left : &right, *taken = rows < columns ? &right : &left;
    int64_t slices = parts_of(depth, MOST_DEPTH), most_steps = parts_of(parts_of(depth, slices), DEPTH);
    int64_t panels = parts_of(held->count, BLOCK), size = most_steps * STEP(PARTS);
    int64_t most_taken = (taken->across ? CACHE * 3 / 2 : CACHE) / (size * (int64_t)sizeof(uint16_t)); /* wider rows */
    most_taken = at_most(most_taken < 1 ? 1 : most_taken, parts_of(parts_of(taken->count, BLOCK), threads));
    void *memory = malloc((at_most(panels, MOST_HELD) + threads * most_taken) * size * 2 + STEP(PARTS) * 2 + 64);
    if (!memory) return 0;
    for (int64_t first = 0; first < panels; first += MOST_HELD)
        for (int64_t from = 0; from < depth; from += most_steps * DEPTH) {
            Sums sums = {out, out_stride, rows, columns, bias, onto || from};
            int64_t steps = at_most(most_steps, parts_of(depth - from, DEPTH));
            multiply_slice(held, taken, first, at_most(panels - first, MOST_HELD), from, steps, &sums,
                           aligned(memory), most_taken);
        }
    free(memory);
    return 1;
}
#endif
