/* Causal attention in float32 on matrix tiles: the scores of a few queries at a time, which never leave the caches.
 *
 * Dao 2023, FlashAttention-2, arXiv:2307.08691, algorithms 1 and 2. Differs: queries see all of their keys at once, so
 * that nothing is rescaled; the backward computes sums of exponentials again, and needs no output.
 */
#include "tiles.h"

#ifndef HAS_TILES
int attend_f32(void) { return 0; }
int attend_gradient_f32(void) { return 0; }
#else
#include <math.h>
#include <stdlib.h>

/* Rows of tokens (tokens, heads, size), the numbers of a head side by side. */
typedef struct {
    float *at;
    int64_t token, head;
} Rows;

/* What all sequences have in common: of `heads` every `group` share one of keys and values. */
typedef struct {
    Rows q, k, v, out, dout, dq, dk, dv;
    int64_t heads, group, size;
    float scaling;
} Task;

/* Some tokens of a head as one side of a product: a vector for each token or, `across`, for each of its numbers. */
INLINE Matrix side_of(const Rows *rows, int64_t token, int64_t head, int64_t tokens, int64_t size, int across, int is_right) {
    const float *at = rows->at + token * rows->token + head * rows->head;
    return (Matrix){at, across ? size : tokens, across ? tokens : size, rows->token, across, is_right};
}

ON_TILES static void pack_all(Matrix side, uint16_t *to, int64_t steps) {
    pack(&side, 0, parts_of(side.count, BLOCK), 0, steps, to);
}

/* sums (32, 32 for each panel of `right`) = left . right; onto adds them. */
ON_TILES static void multiply_all(
    const uint16_t *left, const uint16_t *right, int64_t panels, int64_t panel_steps, int64_t steps, float *sums, int64_t stride,
    int onto) {
    static const float zeros[BLOCK] __attribute__((aligned(64)));
    float whole[BLOCK * BLOCK] __attribute__((aligned(64)));
    for (int64_t panel = 0; panel < panels; panel++, right += panel_steps * STEP, sums += BLOCK) {
        multiply_panels(left, right, steps, zeros, onto ? whole : sums, onto ? BLOCK : stride);
        if (!onto) continue;
        for (int64_t i = 0; i < BLOCK; i++)
            for (int64_t j = 0; j < BLOCK; j++) sums[i * stride + j] += whole[i * BLOCK + j];
    }
}

/* Those of 16 places that are among the first `count`, all ones; zeros for the others. */
INLINE i32x16 among(int64_t count) {
    i32x16 place = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return (place - (int32_t)at_most(count, LANES)) >> 31;
}

INLINE f32x16 only(f32x16 numbers, i32x16 those, float others) {
    return AS(f32x16, (AS(i32x16, numbers) & those) | (AS(i32x16, (f32x16){0} + others) & ~those));
}

/* Scores of a query become exp(scaling * (score - most)), zeros behind the first `seen`; returns their sum. */
ON_TILES static float exponentials(float *scores, int64_t seen, int64_t all, float scaling) {
    f32x16 *at = (f32x16 *)scores, most = (f32x16){0} - INFINITY, sum = {0};
    for (int64_t i = 0; i < parts_of(seen, LANES); i++) {
        f32x16 some = only(at[i] * scaling, among(seen - i * LANES), -INFINITY);
        most = (f32x16)_mm512_max_ps((__m512)some, (__m512)most);
    }
    float top = _mm512_reduce_max_ps((__m512)most);
    for (int64_t i = 0; i < all / LANES; i++) {
        f32x16 below = at[i] * scaling - top; /* what is not a number stays none */
        at[i] = seen <= i * LANES ? (f32x16){0} : only(exp_of(below) + 0 * below, among(seen - i * LANES), 0);
        sum += at[i];
    }
    return _mm512_reduce_add_ps((__m512)sum);
}

/* Gives out memory in pieces that begin at a line of the caches. */
typedef struct {
    char *at;
} Room;
INLINE void *take(Room *room, int64_t numbers, int64_t bytes) {
    void *taken = room->at;
    room->at += (numbers * bytes + 63) / 64 * 64;
    return taken;
}
#define TAKE_TILES(panels, steps) take(&room, (panels) * (steps) * STEP, sizeof(uint16_t))
#define TAKE_SUMS(rows, columns) take(&room, (rows) * (columns), sizeof(float))

/* One sequence and the heads of one of keys. */
ON_TILES static void attend_one(const Task *it, int64_t start, int64_t length, int64_t key_head, Room room) {
    const int64_t keys = parts_of(length, BLOCK), deep = parts_of(it->size, BLOCK), wide = deep * BLOCK;
    uint16_t *k = TAKE_TILES(keys, deep), *v = TAKE_TILES(deep, keys), *q = TAKE_TILES(1, deep), *p = TAKE_TILES(1, keys);
    float *scores = TAKE_SUMS(BLOCK, keys * BLOCK), *out = TAKE_SUMS(BLOCK, wide);
    pack_all(side_of(&it->k, start, key_head, length, it->size, 0, 1), k, deep);
    pack_all(side_of(&it->v, start, key_head, length, it->size, 1, 1), v, keys);
    for (int64_t head = key_head * it->group; head < (key_head + 1) * it->group; head++)
        for (int64_t block = 0; block < keys; block++) {
            const int64_t first = block * BLOCK, rows = at_most(length - first, BLOCK), seen = block + 1;
            float sum[BLOCK];
            pack_all(side_of(&it->q, start + first, head, rows, it->size, 0, 0), q, deep);
            multiply_all(q, k, seen, deep, deep, scores, seen * BLOCK, 0);
            for (int64_t i = 0; i < BLOCK; i++)
                sum[i] = exponentials(scores + i * seen * BLOCK, i < rows ? first + i + 1 : 0, seen * BLOCK, it->scaling);
            pack_all((Matrix){scores, BLOCK, seen * BLOCK, seen * BLOCK, 0, 0}, p, seen);
            multiply_all(p, v, deep, keys, seen, out, wide, 0);
            for (int64_t i = 0; i < rows; i++) {
                float *to = it->out.at + (start + first + i) * it->out.token + head * it->out.head, share = 1 / sum[i];
                for (int64_t j = 0; j < it->size; j++) to[j] = out[i * wide + j] * share;
            }
        }
}

/* Queries whose scores are worked on together in the backward: so many panels' sums over queries are formed at once. */
enum { TOGETHER = 2 };

ON_TILES static void attend_gradient_one(const Task *it, int64_t start, int64_t length, int64_t key_head, Room room) {
    const int64_t keys = parts_of(length, BLOCK), deep = parts_of(it->size, BLOCK), wide = deep * BLOCK;
    const int64_t size = it->size;
    uint16_t *k = TAKE_TILES(keys, deep), *v = TAKE_TILES(keys, deep), *k_across = TAKE_TILES(deep, keys);
    uint16_t *q = TAKE_TILES(1, deep), *dout = TAKE_TILES(1, deep), *ds = TAKE_TILES(1, keys);
    uint16_t *q_across = TAKE_TILES(deep, TOGETHER), *dout_across = TAKE_TILES(deep, TOGETHER);
    uint16_t *p_across = TAKE_TILES(keys, TOGETHER), *ds_across = TAKE_TILES(keys, TOGETHER);
    float *scores = TAKE_SUMS(BLOCK, keys * BLOCK), *dscores = TAKE_SUMS(BLOCK, keys * BLOCK), *dq = TAKE_SUMS(BLOCK, wide);
    float *dk = TAKE_SUMS(keys * BLOCK, wide), *dv = TAKE_SUMS(keys * BLOCK, wide);
    memset(dk, 0, keys * BLOCK * wide * sizeof *dk);
    memset(dv, 0, keys * BLOCK * wide * sizeof *dv);
    pack_all(side_of(&it->k, start, key_head, length, size, 0, 1), k, deep);
    pack_all(side_of(&it->v, start, key_head, length, size, 0, 1), v, deep);
    pack_all(side_of(&it->k, start, key_head, length, size, 1, 1), k_across, keys);
    for (int64_t head = key_head * it->group; head < (key_head + 1) * it->group; head++)
        for (int64_t blocks = 0; blocks < keys; blocks += TOGETHER) {
            const int64_t begin = start + blocks * BLOCK, count = at_most(keys - blocks, TOGETHER), last = blocks + count;
            const int64_t tokens = at_most(length - blocks * BLOCK, count * BLOCK);
            pack_all(side_of(&it->q, begin, head, tokens, size, 1, 1), q_across, count);
            pack_all(side_of(&it->dout, begin, head, tokens, size, 1, 1), dout_across, count);
            for (int64_t n = 0; n < count; n++) {
                const int64_t block = blocks + n, first = block * BLOCK, rows = at_most(length - first, BLOCK), seen = block + 1;
                const int64_t stride = seen * BLOCK;
                pack_all(side_of(&it->q, start + first, head, rows, size, 0, 0), q, deep);
                pack_all(side_of(&it->dout, start + first, head, rows, size, 0, 0), dout, deep);
                multiply_all(q, k, seen, deep, deep, scores, stride, 0);
                multiply_all(dout, v, seen, deep, deep, dscores, stride, 0);
                for (int64_t i = 0; i < BLOCK; i++) {
                    float sum = exponentials(scores + i * stride, i < rows ? first + i + 1 : 0, stride, it->scaling);
                    f32x16 *p = (f32x16 *)(scores + i * stride), *d = (f32x16 *)(dscores + i * stride), dots = {0};
                    float share = i < rows ? 1 / sum : 0;
                    for (int64_t j = 0; j < stride / LANES; j++) {
                        p[j] *= share;
                        dots += p[j] * d[j];
                    }
                    float dot = _mm512_reduce_add_ps((__m512)dots);
                    for (int64_t j = 0; j < stride / LANES; j++) d[j] = p[j] * (d[j] - dot) * it->scaling;
                }
                pack_all((Matrix){dscores, BLOCK, stride, stride, 0, 0}, ds, seen);
                multiply_all(ds, k_across, deep, keys, seen, dq, wide, 0);
                for (int64_t i = 0; i < rows; i++)
                    memcpy(it->dq.at + (start + first + i) * it->dq.token + head * it->dq.head, dq + i * wide, size * sizeof *dq);
                Matrix p_left = {scores, stride, BLOCK, stride, 1, 0}, ds_left = {dscores, stride, BLOCK, stride, 1, 0};
                for (int64_t panel = 0; panel < last; panel++) {
                    uint16_t *to_p = p_across + (panel * count + n) * STEP, *to_ds = ds_across + (panel * count + n) * STEP;
                    pack(&p_left, panel, 1, 0, 1, to_p); /* zeros for keys that these queries do not see */
                    pack(&ds_left, panel, 1, 0, 1, to_ds);
                }
            }
            for (int64_t panel = 0; panel < last; panel++) {
                const int64_t at = panel * BLOCK * wide;
                multiply_all(p_across + panel * count * STEP, dout_across, deep, count, count, dv + at, wide, 1);
                multiply_all(ds_across + panel * count * STEP, q_across, deep, count, count, dk + at, wide, 1);
            }
        }
    for (int64_t i = 0; i < length; i++) {
        memcpy(it->dk.at + (start + i) * it->dk.token + key_head * it->dk.head, dk + i * wide, size * sizeof *dk);
        memcpy(it->dv.at + (start + i) * it->dv.token + key_head * it->dv.head, dv + i * wide, size * sizeof *dv);
    }
}

/* What one thread needs for the longest sequence, with what panels are fetched beyond their end. */
INLINE int64_t room_for(int64_t length, int64_t size) {
    int64_t keys = parts_of(length, BLOCK), deep = parts_of(size, BLOCK);
    int64_t tiles = 3 * keys * deep + keys + 2 * deep + 2 * TOGETHER * (deep + keys) + 1;
    int64_t sums = 2 * BLOCK * keys * BLOCK + (2 * keys + 1) * BLOCK * deep * BLOCK;
    return tiles * STEP * 2 + sums * 4 + 64;
}

/* Sequences, the longest first, and heads of keys are taken by whoever is free. */
ON_TILES static int attend_each(
    const Task *it, const int64_t *starts, const int64_t *lengths, int64_t count, int64_t threads, int gradient) {
    int64_t each = room_for(lengths[0], it->size), key_heads = it->heads / it->group, next = 0;
    char *memory = malloc(threads * each + 64);
    if (!memory) return 0;
    _Pragma("omp parallel") {
        Room room = {(char *)aligned(memory) + omp_get_thread_num() * (each / 64 * 64)};
        _tile_loadconfig(&SHAPES);
        for (int64_t one; (one = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < count * key_heads;)
            (gradient ? attend_gradient_one : attend_one)(it, starts[one / key_heads], lengths[one / key_heads], one % key_heads, room);
        _tile_release();
    }
    free(memory);
    return 1;
}

/* out = softmax(scaling * q k^T + mask) v for each sequence; q and out are (tokens, heads, size), k and v have a head for
 * every `group` of those. Tells whether there was memory for it. */
int attend_f32(
    float *q, int64_t q_token, int64_t q_head, float *k, int64_t k_token, int64_t k_head, float *v, int64_t v_token,
    int64_t v_head, float *out, int64_t out_token, int64_t out_head, const int64_t *starts, const int64_t *lengths, int64_t count,
    int64_t heads, int64_t group, int64_t size, double scaling, int64_t threads) {
    Task it = {.q = {q, q_token, q_head}, .k = {k, k_token, k_head}, .v = {v, v_token, v_head},
               .out = {out, out_token, out_head}, .heads = heads, .group = group, .size = size, .scaling = scaling};
    return attend_each(&it, starts, lengths, count, threads, 0);
}

/* dq, dk and dv of dout. */
int attend_gradient_f32(
    float *q, int64_t q_token, int64_t q_head, float *k, int64_t k_token, int64_t k_head, float *v, int64_t v_token,
    int64_t v_head, float *dout, int64_t dout_token, int64_t dout_head, float *dq, int64_t dq_token, int64_t dq_head, float *dk,
    int64_t dk_token, int64_t dk_head, float *dv, int64_t dv_token, int64_t dv_head, const int64_t *starts,
    const int64_t *lengths, int64_t count, int64_t heads, int64_t group, int64_t size, double scaling, int64_t threads) {
    Task it = {.q = {q, q_token, q_head}, .k = {k, k_token, k_head}, .v = {v, v_token, v_head},
               .dout = {dout, dout_token, dout_head}, .dq = {dq, dq_token, dq_head}, .dk = {dk, dk_token, dk_head},
               .dv = {dv, dv_token, dv_head}, .heads = heads, .group = group, .size = size, .scaling = scaling};
    return attend_each(&it, starts, lengths, count, threads, 1);
}
#endif
