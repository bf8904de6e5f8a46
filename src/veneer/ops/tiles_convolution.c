/* Convolutions in float32 on matrix tiles.
 *
 * A row of a tile is a place of the input with 32 of its channels. The places which one number of a kernel meets are a
 * tile then, as those are which the next one meets, some way further on: each number of the input is split once, and
 * nothing is copied out.
 */
#include "tiles.h"

#ifndef HAS_TILES
int convolve_f32(void) { return 0; }
#else
#include <stddef.h>
#include <stdlib.h>

/* A strip of the input fits a core's cache; sums are as long as in products; so much of a kernel is held at a time. */
enum { PARTS = 3, CACHE = 1 << 20, MOST_STEPS = 1024 / DEPTH, MOST_HELD = 1 << 24, FEWEST_LINES = 4 };
/* So far apart that the taps of a number do not share a line of the cache. */
enum { TAP = BLOCK * BLOCK + SIDE };

/* One number for each axis. */
typedef struct {
    int64_t plane, line, column;
} Axes;

/* x (images, inputs, size), kernel (outputs, inputs, taps) or, `turned`, (inputs, outputs, taps) with the last tap
 * first, bias (outputs) or none, out (images, outputs, places). */
typedef struct {
    const float *x, *kernel, *bias;
    float *out;
    int64_t images, inputs, outputs, turned;
    Axes size, taps, places, stride, padding, dilation;
} Convolution;

/* What a thread does at a time: so many lines and columns of the places in a plane. The lines and columns of the input
 * that it takes for that, how many of its places are kept, the steps to a sum, and where the tiles of each step lie.
 */
typedef struct {
    int64_t lines, columns, lines_in, columns_in, room, steps;
    int64_t *offsets;
} Layout;

typedef struct {
    int64_t image, plane, line, column;
} Strip;

/* Up to 16 places of a line, from a line and a column of a strip on. */
typedef struct {
    int64_t line, column, count;
} Places;

INLINE int64_t volume(Axes axes) { return axes.plane * axes.line * axes.column; }
INLINE int64_t channel_steps(const Convolution *it) { return parts_of(it->inputs, DEPTH); }
INLINE int64_t reach(int64_t places, int64_t stride, int64_t taps, int64_t dilation) {
    return (places - 1) * stride + (taps - 1) * dilation + 1;
}
INLINE int64_t lines_for(const Convolution *it, int64_t lines) {
    return reach(lines, it->stride.line, it->taps.line, it->dilation.line);
}
INLINE int64_t columns_for(const Convolution *it, int64_t columns) {
    return reach(columns, it->stride.column, it->taps.column, it->dilation.column);
}

/* The input of a strip, each of its numbers in parts; zeros where a place lies outside. */
ON_TILES static void pack_strip(const Convolution *it, const Layout *layout, Strip strip, uint16_t *own) {
    const int64_t apart = layout->room * DEPTH, first = strip.column * it->stride.column - it->padding.column;
    const int64_t outside = first < 0 ? -first : 0; /* columns before the first one */
    const int64_t count = at_most(it->size.column - first, layout->columns_in) - outside;
    memset(own, 0, channel_steps(it) * PARTS * apart * sizeof *own);
    for (int64_t row = 0; row < it->taps.plane * layout->lines_in; row++) {
        int64_t tap = row / layout->lines_in, line = row % layout->lines_in;
        int64_t plane = strip.plane * it->stride.plane - it->padding.plane + tap * it->dilation.plane;
        line += strip.line * it->stride.line - it->padding.line;
        if (plane < 0 || plane >= it->size.plane || line < 0 || line >= it->size.line) continue;
        int64_t start = (plane * it->size.line + line) * it->size.column + first + outside;
        const float *x = it->x + strip.image * it->inputs * volume(it->size) + start;
        const Matrix side = {x, count, it->inputs, volume(it->size), 1, 0, 0};
        uint16_t *to = own + (row * layout->columns_in + outside) * DEPTH;
        for (int64_t step = 0; step < channel_steps(it); step++)
            for (int64_t at = 0; at < count; at += SIDE)
                pack_tiles(PARTS, &side, at, step * DEPTH, to + step * PARTS * apart + at * DEPTH, apart);
    }
}

/* 32 outputs of the kernel: for each tap its channels. `some` has room for the taps of 32 by 32 numbers, one tap's
 * after another's. */
ON_TILES static void pack_kernel(const Convolution *it, int64_t panel, float *some, uint16_t *to) {
    const int64_t taps = volume(it->taps), turned = it->turned, steps = channel_steps(it);
    const int64_t all[2] = {turned ? it->inputs : it->outputs, turned ? it->outputs : it->inputs};
    for (int64_t step = 0; step < steps; step++) {
        const int64_t first[2] = {(turned ? step : panel) * BLOCK, (turned ? panel : step) * BLOCK};
        const int64_t rows = at_most(all[0] - first[0], BLOCK), columns = at_most(all[1] - first[1], BLOCK);
        for (int64_t i = 0; i < rows; i++) {
            const float *from = it->kernel + ((first[0] + i) * all[1] + first[1]) * taps;
            for (int64_t j = 0; j < columns; j++)
                for (int64_t tap = 0; tap < taps; tap++) some[tap * TAP + i * BLOCK + j] = *from++;
        }
        for (int64_t tap = 0; tap < taps; tap++) {
            const float *at = some + (turned ? taps - 1 - tap : tap) * TAP;
            const Matrix side = {at, turned ? columns : rows, turned ? rows : columns, BLOCK, turned, 1, 0};
            pack(PARTS, &side, 0, 1, 0, 1, to + (tap * steps + step) * STEP(PARTS));
        }
    }
}

INLINE Places places_of(const Convolution *it, const Layout *layout, Strip strip, int64_t number) {
    const int64_t in_line = parts_of(layout->columns, SIDE);
    Places found = {number / in_line, number % in_line * SIDE, 0};
    found.count = at_most(at_most(layout->columns, it->places.column - strip.column) - found.column, SIDE);
    return found;
}

/* The sums of 16 places and 16 outputs, to where they belong. */
ON_TILES INLINE void write_sums(const Convolution *it, Strip strip, Places places, int64_t output, float *sums) {
    const int64_t line = strip.plane * it->places.line + strip.line + places.line;
    const int64_t start = line * it->places.column + strip.column + places.column;
    float *to = it->out + (strip.image * it->outputs + output) * volume(it->places) + start;
    transpose((uint16_t *)sums);
    for (int64_t i = 0; i < at_most(it->outputs - output, SIDE); i++)
        _mm512_mask_storeu_ps(to + i * volume(it->places), first_of(places.count), _mm512_load_ps(sums + i * SIDE));
}

/* sums (two times 16 places, two times 16 outputs) = begin + products of some steps, or onto what is there. */
ON_TILES INLINE void multiply_places(
    const Layout *layout, const uint16_t *const at[2], int64_t row_bytes, const uint16_t *right, int64_t from,
    int64_t steps, const float *begin, float sums[4][SIDE * SIDE], int onto) {
    const int64_t apart = layout->room * DEPTH;
    float found[4][SIDE * SIDE] __attribute__((aligned(64)));
    begin_sums(begin);
    for (int64_t step = from; step < from + steps; step++) {
        const int64_t now = layout->offsets[step], next = layout->offsets[step + 1];
        multiply_step(
            PARTS, (Left){at[0] + now, at[1] + now, apart, row_bytes}, right + step * STEP(PARTS),
            (Left){at[0] + next, at[1] + next, apart, row_bytes});
    }
    float (*to)[SIDE * SIDE] = onto ? found : sums;
    _tile_stored(0, to[0], 64);
    _tile_stored(1, to[1], 64);
    _tile_stored(2, to[2], 64);
    _tile_stored(3, to[3], 64);
    if (onto)
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < SIDE * SIDE; j++) sums[i][j] += found[i][j];
}

/* 32 outputs of a strip. */
ON_TILES static void multiply_strip(
    const Convolution *it, const Layout *layout, Strip strip, int64_t output, const uint16_t *right,
    const uint16_t *own) {
    static const float zeros[BLOCK] __attribute__((aligned(64)));
    const int64_t lines = at_most(layout->lines, it->places.line - strip.line);
    const int64_t tiles = lines * parts_of(layout->columns, SIDE), steps = layout->steps;
    const int64_t some = parts_of(steps, parts_of(steps, MOST_STEPS)), stride = it->stride.column;
    float bias[BLOCK] __attribute__((aligned(64))) = {0}, sums[4][SIDE * SIDE] __attribute__((aligned(64)));
    if (it->bias) memcpy(bias, it->bias + output, at_most(it->outputs - output, BLOCK) * sizeof *bias);
    for (int64_t number = 0; number < tiles; number += 2) {
        const uint16_t *at[2];
        Places places[2];
        for (int i = 0; i < 2; i++) {
            places[i] = places_of(it, layout, strip, at_most(number + i, tiles - 1));
            int64_t row = places[i].line * it->stride.line * layout->columns_in;
            at[i] = own + (row + places[i].column * stride) * DEPTH;
        }
        for (int64_t from = 0; from < steps; from += some)
            multiply_places(
                layout, at, stride * DEPTH * sizeof *own, right, from, at_most(some, steps - from),
                from ? zeros : bias, sums, from > 0);
        for (int i = 0; i < 2; i++)
            for (int j = 0; j < 2 && number + i < tiles && output + j * SIDE < it->outputs; j++)
                write_sums(it, strip, places[i], output + j * SIDE, sums[2 * i + j]);
    }
}

/* Strips that fit a core's cache, and enough of them for all threads. */
static Layout layout_of(const Convolution *it, int64_t threads) {
    const int64_t bytes = channel_steps(it) * PARTS * DEPTH * sizeof(uint16_t); /* of a place */
    const int64_t most = CACHE / (bytes * it->taps.plane), lines = it->images * it->places.plane * it->places.line;
    Layout out = {.columns = it->places.column};
    while (out.columns > 4 * SIDE && (columns_for(it, out.columns) * lines_for(it, 1) > most ||
                                      lines * parts_of(it->places.column, out.columns) < 4 * threads))
        out.columns = parts_of(out.columns, 2 * SIDE) * SIDE;
    out.columns_in = columns_for(it, out.columns);
    out.lines = parts_of(lines, 4 * threads);
    out.lines = at_most(it->places.line, out.lines < FEWEST_LINES ? FEWEST_LINES : out.lines);
    while (out.lines > 1 && lines_for(it, out.lines) * out.columns_in > most) out.lines--;
    out.lines_in = lines_for(it, out.lines);
    out.room = it->taps.plane * out.lines_in * out.columns_in + SIDE * it->stride.column; /* a tile reads beyond */
    out.steps = volume(it->taps) * channel_steps(it);
    return out;
}

static void fill_offsets(const Convolution *it, const Layout *layout) {
    int64_t *to = layout->offsets;
    for (int64_t plane = 0; plane < it->taps.plane; plane++)
        for (int64_t line = 0; line < it->taps.line; line++)
            for (int64_t column = 0; column < it->taps.column; column++)
                for (int64_t step = 0; step < channel_steps(it); step++) {
                    int64_t row = plane * layout->lines_in + line * it->dilation.line;
                    int64_t place = row * layout->columns_in + column * it->dilation.column;
                    *to++ = (step * PARTS * layout->room + place) * DEPTH;
                }
    *to = 0; /* asked for behind the last step, and not used */
}

/* What a thread keeps for itself: a strip, before that what `pack_kernel` reads. */
INLINE int64_t own_numbers(const Convolution *it, const Layout *layout) {
    const int64_t strip = channel_steps(it) * PARTS * layout->room * DEPTH, kernel = volume(it->taps) * TAP * 2;
    return strip > kernel ? strip : kernel;
}

/* Some panels of outputs, for all strips; each thread takes the next. */
ON_TILES static void convolve_panels(
    const Convolution *it, const Layout *layout, int64_t first, int64_t panels, uint16_t *memory) {
    const int64_t size = layout->steps * STEP(PARTS), own_size = own_numbers(it, layout);
    const int64_t across = parts_of(it->places.column, layout->columns);
    const int64_t down = parts_of(it->places.line, layout->lines), planes = it->places.plane;
    int64_t next = 0;
    _Pragma("omp parallel") {
        const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
        uint16_t *own = memory + panels * size + thread * own_size;
        for (int64_t i = thread; i < panels; i += threads) pack_kernel(it, first + i, (float *)own, memory + i * size);
        _Pragma("omp barrier") _tile_loadconfig(&SHAPES);
        for (;;) {
            const int64_t number = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED), row = number / across;
            if (number >= it->images * planes * down * across) break;
            const Strip strip = {
                row / down / planes, row / down % planes, row % down * layout->lines,
                number % across * layout->columns};
            pack_strip(it, layout, strip, own);
            for (int64_t i = 0; i < panels; i++)
                multiply_strip(it, layout, strip, (first + i) * BLOCK, memory + i * size, own);
        }
        _tile_release();
    }
}

/* out = conv(x, kernel) + bias; `sizes` are the numbers of a `Convolution` in their order. Tells whether there was
 * memory for it. */
ON_TILES int convolve_f32(const float *x, const float *kernel, const float *bias, float *out, const int64_t *sizes) {
    Convolution it = {.x = x, .kernel = kernel, .bias = bias, .out = out};
    memcpy(&it.images, sizes, sizeof it - offsetof(Convolution, images));
    const int64_t threads = omp_get_max_threads(), panels = parts_of(it.outputs, BLOCK);
    Layout layout = layout_of(&it, threads);
    const int64_t bytes = layout.steps * STEP(PARTS) * sizeof(uint16_t); /* of a panel */
    const int64_t most = MOST_HELD / bytes > threads ? MOST_HELD / bytes : threads;
    const int64_t some = parts_of(panels, parts_of(panels, most));
    const int64_t own = own_numbers(&it, &layout) * sizeof(uint16_t);
    layout.offsets = malloc((layout.steps + 1) * sizeof *layout.offsets);
    /* The last step fetches beyond its panel. */
    void *memory = malloc(some * bytes + threads * own + STEP(PARTS) * sizeof(uint16_t) + 64);
    const int there = layout.offsets && memory;
    if (there) fill_offsets(&it, &layout);
    for (int64_t first = 0; there && first < panels; first += some)
        convolve_panels(&it, &layout, first, at_most(some, panels - first), aligned(memory));
    free(memory);
    free(layout.offsets);
    return there;
}
#endif
