/* Products of float32 matrices on matrix tiles. */
#include "tiles.h"

#ifndef HAS_TILES
int veneer_has_tiles(void) { return 0; }
int multiply_f32(void) { return 0; }
int multiply_each_f32(void) { return 0; }
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

/* A block of sums, from `row` and `column` on. */
ON_TILES static void multiply_block(
    const uint16_t *left, const uint16_t *right, int64_t steps, const Sums *out, int64_t row, int64_t column) {
    float begin[BLOCK] __attribute__((aligned(64))) = {0}, *sums = out->at + row * out->stride + column;
    int64_t rows = at_most(out->rows - row, BLOCK), width = at_most(out->columns - column, BLOCK);
    if (out->bias && !out->onto) memcpy(begin, out->bias + column, width * sizeof *sums);
    multiply_into(PARTS, left, right, steps, begin, sums, out->stride, rows, width, out->onto);
}

/* A product of two sides: of the one with fewer vectors, `held`, panels from `first` on. */
typedef struct {
    Matrix left, right;
    Sums out;
    int64_t first, panels;
} Product;

INLINE const Matrix *held_of(const Product *one) {
    return one->left.count < one->right.count ? &one->left : &one->right;
}
INLINE const Matrix *taken_of(const Product *one) {
    return one->left.count < one->right.count ? &one->right : &one->left;
}

/* The held panels of some products are packed for all threads; of the other sides a thread packs what its cache holds,
 * and goes on to what nobody has taken yet. */
enum { MOST_DEPTH = 1024, MOST_HELD = 2048 / BLOCK, CACHE = 1 << 20 };

ON_TILES static void pack_held(
    const Product *products, int64_t start, int64_t stop, int64_t from, int64_t steps, uint16_t *memory) {
    for (int64_t at = 0; at < stop; at += products++->panels) {
        int64_t first = start > at ? start - at : 0, last = at_most(stop - at, products->panels);
        if (first < last)
            pack(
                PARTS, held_of(products), products->first + first, last - first, from, steps,
                memory + (at + first) * steps * STEP(PARTS));
    }
}

/* Panels from `start` on of the side that is taken, with all that are held. */
ON_TILES static void multiply_taken(
    const Product *it, int64_t start, int64_t count, int64_t from, int64_t steps, const uint16_t *held,
    uint16_t *own) {
    const int64_t size = steps * STEP(PARTS);
    pack(PARTS, taken_of(it), start, count, from, steps, own);
    for (int64_t i = 0; i < it->panels; i++)
        for (int64_t j = 0; j < count; j++) {
            int64_t at_held = (it->first + i) * BLOCK, at_taken = (start + j) * BLOCK;
            if (held_of(it)->is_right)
                multiply_block(own + j * size, held + i * size, steps, &it->out, at_taken, at_held);
            else multiply_block(held + i * size, own + j * size, steps, &it->out, at_held, at_taken);
        }
}

/* Some products, `panels` held in all, in `steps` of their depth. */
ON_TILES static void multiply_slice(
    const Product *products, int64_t panels, int64_t from, int64_t steps, uint16_t *memory, int64_t most_taken) {
    const int64_t size = steps * STEP(PARTS);
    int64_t next = 0;
    _Pragma("omp parallel") {
        const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
        uint16_t *own = memory + (panels + thread * most_taken) * size;
        pack_held(products, thread * panels / threads, (thread + 1) * panels / threads, from, steps, memory);
        _Pragma("omp barrier") _tile_loadconfig(&SHAPES);
        const Product *it = products;
        int64_t at = 0, part = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); /* of all parts of all products */
        for (int64_t before = 0; at < panels;) {
            int64_t whole = parts_of(taken_of(it)->count, BLOCK);
            int64_t parts = threads * parts_of(whole, threads * most_taken);
            if (part >= before + parts) {
                before += parts;
                at += it++->panels;
                continue;
            }
            int64_t start = (part - before) * whole / parts, stop = (part - before + 1) * whole / parts;
            multiply_taken(it, start, stop - start, from, steps, memory + at * size, own);
            part = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
        }
        _tile_release();
    }
}

/* Products of one depth, no more than MOST_HELD panels held in all. Tells whether there was memory for it. */
ON_TILES static int multiply_some(Product *products, int64_t count, int64_t depth) {
    const int64_t threads = omp_get_max_threads(), slices = parts_of(depth, MOST_DEPTH);
    const int64_t most_steps = parts_of(parts_of(depth, slices), DEPTH);
    const int64_t bytes = most_steps * STEP(PARTS) * sizeof(uint16_t);
    int64_t panels = 0, most_taken = 1;
    for (int64_t i = 0; i < count; i++) {
        const Matrix *taken = taken_of(products + i);
        int64_t room = (taken->across ? CACHE * 3 / 2 : CACHE) / bytes; /* wider rows */
        int64_t some = at_most(room, parts_of(parts_of(taken->count, BLOCK), threads));
        most_taken = some > most_taken ? some : most_taken;
        panels += products[i].panels;
    }
    /* The last step fetches beyond its panel. */
    void *memory = malloc((panels + threads * most_taken) * bytes + STEP(PARTS) * sizeof(uint16_t) + 64);
    if (!memory) return 0;
    for (int64_t from = 0; from < depth; from += most_steps * DEPTH) {
        int64_t steps = at_most(most_steps, parts_of(depth - from, DEPTH));
        multiply_slice(products, panels, from, steps, aligned(memory), most_taken);
        for (int64_t i = 0; i < count; i++) products[i].out.onto = 1;
    }
    free(memory);
    return 1;
}

/* Products of one depth that are computed together, as many as are held at a time. */
typedef struct {
    Product some[MOST_HELD];
    int64_t number, panels, depth;
    int there;
} Batch;

ON_TILES static void finish(Batch *batch) {
    batch->there = batch->there && multiply_some(batch->some, batch->number, batch->depth);
    batch->number = batch->panels = 0;
}

ON_TILES static void add(Batch *batch, Product one) {
    const int64_t panels = parts_of(held_of(&one)->count, BLOCK);
    for (; one.first < panels; one.first += MOST_HELD) {
        one.panels = at_most(panels - one.first, MOST_HELD);
        if (batch->panels + one.panels > MOST_HELD) finish(batch);
        batch->some[batch->number++] = one;
        batch->panels += one.panels;
    }
}

/* out = x . W^T, or onto it, or with a bias for each column; x is (rows, depth), W (columns, depth), out (rows,
 * columns). Of each side one of both strides is 1. Tells whether there was memory for it. */
ON_TILES int multiply_f32(
    const float *x, int64_t x_stride, int64_t x_across, const float *W, int64_t W_stride, int64_t W_across,
    const float *bias, float *out, int64_t out_stride, int64_t onto, int64_t rows, int64_t columns, int64_t depth) {
    Batch batch = {.depth = depth, .there = 1};
    add(&batch, (Product){
                    .left = {x, rows, depth, x_stride, x_across, 0, 0},
                    .right = {W, columns, depth, W_stride, W_across, 1, 0},
                    .out = {out, out_stride, rows, columns, bias, onto}});
    finish(&batch);
    return batch.there;
}

/* The same for the rows of each of some matrices: x and out hold one's after another's, W and bias are side by side.
 */
ON_TILES int multiply_each_f32(
    const float *x, int64_t x_stride, const float *W, int64_t W_matrix, int64_t W_stride, int64_t W_across,
    const float *bias, float *out, int64_t out_stride, int64_t onto, const int64_t *counts, int64_t matrices,
    int64_t columns, int64_t depth) {
    Batch batch = {.depth = depth, .there = 1};
    for (int64_t i = 0; i < matrices; x += counts[i] * x_stride, out += counts[i] * out_stride, i++)
        add(&batch, (Product){
                        .left = {x, counts[i], depth, x_stride, 0, 0, 0},
                        .right = {W + i * W_matrix, columns, depth, W_stride, W_across, 1, 0},
                        .out = {out, out_stride, counts[i], columns, bias ? bias + i * columns : 0, onto}});
    finish(&batch);
    return batch.there;
}
#endif
