/* Causal attention on matrix tiles: the scores of a few queries at a time, which never leave the caches.
 *
 * float32 is computed in three parts, bfloat16 in one, with scores, sums and softmax in float32. Dao 2023,
 * FlashAttention-2, arXiv:2307.08691, algorithms 1 and 2. Differs: queries see all of their keys at once, so that
 * nothing is rescaled; the backward computes sums of exponentials again, and needs no output.
 */
#include "tiles.h"

#ifndef HAS_TILES
#define NONE(name)                                                                                                    \
    int name(void) { return 0; }
NONE(attend_f32)
NONE(attend_bf16)
NONE(attend_gradient_f32)
NONE(attend_gradient_bf16)
#else
#include <math.h>
#include <stdlib.h>

/* Rows of tokens (tokens, heads, size), the numbers of a head side by side. */
typedef struct {
    void *at;
    int64_t token, head;
} Rows;

/* A sequence's own rows, those of the one that it continues, and where the gradients of these are put aside. */
typedef struct {
    int64_t start, length, before, before_length, aside;
} Span;

/* What all sequences have in common: of `heads` every `group` share one of keys and values. Gradients of keys and
 * values that are put aside are float32, (tokens, key heads, size). */
typedef struct {
    Rows q, k, v, out, dout, dq, dk, dv;
    float *dk_aside, *dv_aside;
    int64_t heads, group, size;
    float scaling;
} Task;

INLINE int width_of(int parts) { return parts == 1 ? sizeof(uint16_t) : sizeof(float); }

INLINE void *row_of(int parts, const Rows *rows, int64_t token, int64_t head) {
    return (char *)rows->at + (token * rows->token + head * rows->head) * width_of(parts);
}

/* Numbers in float32 times a factor, to a row. */
ON_TILES INLINE void write_row(int parts, void *to, const float *from, float factor, int64_t size) {
    for (int64_t i = 0; i < size; i += LANES) {
        __mmask16 some = first_of(size - i);
        __m512 numbers = _mm512_mul_ps(_mm512_maskz_loadu_ps(some, from + i), _mm512_set1_ps(factor));
        if (parts == 1) _mm256_mask_storeu_epi16((uint16_t *)to + i, some, (__m256i)_mm512_cvtneps_pbh(numbers));
        else _mm512_mask_storeu_ps((float *)to + i, some, numbers);
    }
}

/* Some rows of a head as one side of a product: a vector for each token or, `across`, for each of its numbers. */
INLINE Matrix
side_of(int parts, const void *at, int64_t stride, int64_t tokens, int64_t size, int across, int is_right) {
    return (Matrix){at, across ? size : tokens, across ? tokens : size, stride, across, is_right, parts == 1};
}

ON_TILES INLINE void pack_all(int parts, Matrix side, uint16_t *to, int64_t steps) {
    pack(parts, &side, 0, parts_of(side.count, BLOCK), 0, steps, to);
}

/* The rows of a head that the queries of a span see, one after another: those before its own, and these. */
ON_TILES INLINE void gather(int parts, const Rows *rows, const Span *span, int64_t head, int64_t size, void *to) {
    const int64_t bytes = size * width_of(parts);
    char *at = to;
    for (int64_t i = 0; i < span->before_length; i++, at += bytes)
        memcpy(at, row_of(parts, rows, span->before + i, head), bytes);
    for (int64_t i = 0; i < span->length; i++, at += bytes)
        memcpy(at, row_of(parts, rows, span->start + i, head), bytes);
}

/* sums (32, 32 for each panel of `right`) = left . right; onto adds them. */
ON_TILES INLINE void multiply_all(
    int parts, const uint16_t *left, const uint16_t *right, int64_t panels, int64_t panel_steps, int64_t steps,
    float *sums, int64_t stride, int onto) {
    static const float zeros[BLOCK] __attribute__((aligned(64)));
    for (int64_t panel = 0; panel < panels; panel++, right += panel_steps * STEP(parts), sums += BLOCK)
        multiply_into(parts, left, right, steps, zeros, sums, stride, BLOCK, BLOCK, onto);
}

/* Those of 16 places that are among the first `count`, all ones; zeros for the others. */
ON_TILES INLINE i32x16 among(int64_t count) {
    i32x16 place = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return (place - (int32_t)at_most(count, LANES)) >> 31;
}

ON_TILES INLINE f32x16 only(f32x16 numbers, i32x16 those, float others) {
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
    uintptr_t at;
} Room;
INLINE void *take(Room *room, int64_t bytes) {
    void *taken = (void *)room->at;
    room->at += (bytes + 63) / 64 * 64;
    return taken;
}

/* Queries whose scores are worked on together in the backward: their keys' gradients are summed up at once. */
INLINE int64_t together(int parts) { return parts == 1 ? 8 : 2; }

/* What a span needs: of keys, values, a block of queries and of their gradients, and of scores. */
typedef struct {
    int64_t before, keys, deep, wide;
    uint16_t *k, *v, *k_across, *q, *dout, *p, *q_across, *dout_across, *p_across, *ds_across;
    float *scores, *dscores, *out, *dk, *dv;
    void *k_rows, *v_rows;
} Desk;

INLINE Desk desk_of(int parts, const Task *it, const Span *span, int gradient, Room *room) {
    const int64_t all = span->before_length + span->length, keys = parts_of(all, BLOCK);
    const int64_t deep = parts_of(it->size, BLOCK), wide = deep * BLOCK, rows = all * it->size * width_of(parts);
    const int64_t step = STEP(parts) * sizeof(uint16_t), some = together(parts), sums = sizeof(float) * BLOCK;
    Desk desk = {.before = span->before_length, .keys = keys, .deep = deep, .wide = wide};
    desk.k = take(room, keys * deep * step), desk.v = take(room, keys * deep * step);
    desk.q = take(room, deep * step), desk.p = take(room, keys * step);
    desk.scores = take(room, keys * BLOCK * sums), desk.out = take(room, wide * sums);
    desk.k_rows = take(room, rows), desk.v_rows = take(room, rows);
    if (gradient) {
        desk.k_across = take(room, keys * deep * step), desk.dout = take(room, deep * step);
        desk.q_across = take(room, some * deep * step), desk.dout_across = take(room, some * deep * step);
        desk.p_across = take(room, some * keys * step), desk.ds_across = take(room, some * keys * step);
        desk.dscores = take(room, keys * BLOCK * sums);
        desk.dk = take(room, keys * wide * sums), desk.dv = take(room, keys * wide * sums);
    }
    take(room, step); /* the last panel fetches beyond its end */
    return desk;
}

/* One span and the heads of one of keys. */
ON_TILES INLINE void attend_one(int parts, const Task *it, const Span *span, int64_t key_head, Room room) {
    const int64_t size = it->size, all = span->before_length + span->length;
    const Desk at = desk_of(parts, it, span, 0, &room);
    gather(parts, &it->k, span, key_head, size, at.k_rows);
    gather(parts, &it->v, span, key_head, size, at.v_rows);
    pack_all(parts, side_of(parts, at.k_rows, size, all, size, 0, 1), at.k, at.deep);
    pack_all(parts, side_of(parts, at.v_rows, size, all, size, 1, 1), at.v, at.keys);
    for (int64_t head = key_head * it->group; head < (key_head + 1) * it->group; head++)
        for (int64_t first = 0; first < span->length; first += BLOCK) {
            const int64_t rows = at_most(span->length - first, BLOCK), last = at.before + first;
            const int64_t seen = parts_of(last + rows, BLOCK), stride = seen * BLOCK;
            float sum[BLOCK];
            const void *q = row_of(parts, &it->q, span->start + first, head);
            pack_all(parts, side_of(parts, q, it->q.token, rows, size, 0, 0), at.q, at.deep);
            multiply_all(parts, at.q, at.k, seen, at.deep, at.deep, at.scores, stride, 0);
            for (int64_t i = 0; i < BLOCK; i++)
                sum[i] = exponentials(at.scores + i * stride, i < rows ? last + i + 1 : 0, stride, it->scaling);
            pack_all(parts, (Matrix){at.scores, BLOCK, stride, stride, 0, 0, 0}, at.p, seen);
            multiply_all(parts, at.p, at.v, at.deep, at.keys, seen, at.out, at.wide, 0);
            for (int64_t i = 0; i < rows; i++) {
                void *to = row_of(parts, &it->out, span->start + first + i, head);
                write_row(parts, to, at.out + i * at.wide, 1 / sum[i], size);
            }
        }
}

/* Scores become probabilities and their gradients those of the scores: ds = p (dp - sum(p dp)) scaling. */
ON_TILES INLINE void softmax_gradient(float *scores, float *dscores, int64_t seen, int64_t all, float scaling) {
    float sum = exponentials(scores, seen, all, scaling), share = seen ? 1 / sum : 0;
    f32x16 *p = (f32x16 *)scores, *d = (f32x16 *)dscores, dots = {0};
    for (int64_t j = 0; j < all / LANES; j++) {
        p[j] *= share;
        dots += p[j] * d[j];
    }
    float dot = _mm512_reduce_add_ps((__m512)dots);
    for (int64_t j = 0; j < all / LANES; j++) d[j] = p[j] * (d[j] - dot) * scaling;
}

/* A block of queries: probabilities and gradients of scores, (32, 32 for each panel of keys seen), and the gradient of
 * the queries. Both are packed across as step `n` of `count` for each of `panels`: zeros where a key is not seen. */
ON_TILES INLINE void block_gradient(
    int parts, const Task *it, const Span *span, int64_t head, int64_t first, const Desk *at, int64_t panels,
    int64_t n, int64_t count) {
    const int64_t size = it->size, rows = at_most(span->length - first, BLOCK), last = at->before + first;
    const int64_t seen = parts_of(last + rows, BLOCK), stride = seen * BLOCK;
    const void *q = row_of(parts, &it->q, span->start + first, head);
    const void *dout = row_of(parts, &it->dout, span->start + first, head);
    pack_all(parts, side_of(parts, q, it->q.token, rows, size, 0, 0), at->q, at->deep);
    pack_all(parts, side_of(parts, dout, it->dout.token, rows, size, 0, 0), at->dout, at->deep);
    multiply_all(parts, at->q, at->k, seen, at->deep, at->deep, at->scores, stride, 0);
    multiply_all(parts, at->dout, at->v, seen, at->deep, at->deep, at->dscores, stride, 0);
    for (int64_t i = 0; i < BLOCK; i++) {
        float *scores = at->scores + i * stride, *dscores = at->dscores + i * stride;
        softmax_gradient(scores, dscores, i < rows ? last + i + 1 : 0, stride, it->scaling);
    }
    pack_all(parts, (Matrix){at->dscores, BLOCK, stride, stride, 0, 0, 0}, at->p, seen);
    multiply_all(parts, at->p, at->k_across, at->deep, at->keys, seen, at->out, at->wide, 0);
    for (int64_t i = 0; i < rows; i++)
        write_row(parts, row_of(parts, &it->dq, span->start + first + i, head), at->out + i * at->wide, 1, size);
    const Matrix p = {at->scores, stride, BLOCK, stride, 1, 0, 0}, ds = {at->dscores, stride, BLOCK, stride, 1, 0, 0};
    for (int64_t panel = 0; panel < panels; panel++) {
        const int64_t to = (panel * count + n) * STEP(parts);
        pack(parts, &p, panel, 1, 0, 1, at->p_across + to);
        pack(parts, &ds, panel, 1, 0, 1, at->ds_across + to);
    }
}

/* Gradients of keys and values, one row after another: those of the prefix are put aside, the others are the span's.
 */
ON_TILES INLINE void write_keys(
    int parts, const Task *it, const Span *span, int64_t key_head, const float *from, int64_t wide, const Rows *own,
    float *aside) {
    const int64_t key_heads = it->heads / it->group, size = it->size;
    for (int64_t i = 0; i < span->before_length; i++, from += wide)
        write_row(MOST_PARTS, aside + ((span->aside + i) * key_heads + key_head) * size, from, 1, size);
    for (int64_t i = 0; i < span->length; i++, from += wide)
        write_row(parts, row_of(parts, own, span->start + i, key_head), from, 1, size);
}

ON_TILES INLINE void attend_gradient_one(int parts, const Task *it, const Span *span, int64_t key_head, Room room) {
    const int64_t size = it->size, all = span->before_length + span->length, step = STEP(parts);
    const Desk at = desk_of(parts, it, span, 1, &room);
    memset(at.dk, 0, at.keys * BLOCK * at.wide * sizeof *at.dk);
    memset(at.dv, 0, at.keys * BLOCK * at.wide * sizeof *at.dv);
    gather(parts, &it->k, span, key_head, size, at.k_rows);
    gather(parts, &it->v, span, key_head, size, at.v_rows);
    pack_all(parts, side_of(parts, at.k_rows, size, all, size, 0, 1), at.k, at.deep);
    pack_all(parts, side_of(parts, at.v_rows, size, all, size, 0, 1), at.v, at.deep);
    pack_all(parts, side_of(parts, at.k_rows, size, all, size, 1, 1), at.k_across, at.keys);
    for (int64_t head = key_head * it->group; head < (key_head + 1) * it->group; head++)
        for (int64_t begin = 0; begin < span->length; begin += together(parts) * BLOCK) {
            const int64_t tokens = at_most(span->length - begin, together(parts) * BLOCK);
            const int64_t count = parts_of(tokens, BLOCK), panels = parts_of(at.before + begin + tokens, BLOCK);
            const void *q = row_of(parts, &it->q, span->start + begin, head);
            const void *dout = row_of(parts, &it->dout, span->start + begin, head);
            pack_all(parts, side_of(parts, q, it->q.token, tokens, size, 1, 1), at.q_across, count);
            pack_all(parts, side_of(parts, dout, it->dout.token, tokens, size, 1, 1), at.dout_across, count);
            for (int64_t n = 0; n < count; n++)
                block_gradient(parts, it, span, head, begin + n * BLOCK, &at, panels, n, count);
            for (int64_t panel = 0; panel < panels; panel++) {
                const int64_t to = panel * BLOCK * at.wide, from = panel * count * step;
                multiply_all(parts, at.p_across + from, at.dout_across, at.deep, count, count, at.dv + to, at.wide, 1);
                multiply_all(parts, at.ds_across + from, at.q_across, at.deep, count, count, at.dk + to, at.wide, 1);
            }
        }
    write_keys(parts, it, span, key_head, at.dk, at.wide, &it->dk, it->dk_aside);
    write_keys(parts, it, span, key_head, at.dv, at.wide, &it->dv, it->dv_aside);
}

typedef void One(const Task *it, const Span *span, int64_t key_head, Room room);
#define ONE(name, function, parts)                                                                                    \
    ON_TILES static void name(const Task *it, const Span *span, int64_t key_head, Room room) {                        \
        function(parts, it, span, key_head, room);                                                                    \
    }
ONE(attend_one_f32, attend_one, 3)
ONE(attend_one_bf16, attend_one, 1)
ONE(gradient_one_f32, attend_gradient_one, 3)
ONE(gradient_one_bf16, attend_gradient_one, 1)

/* Sequences, those with most to do first, and heads of keys are taken by whoever is free. Tells whether there was
 * memory. */
ON_TILES static int attend_each(int parts, const Task *it, const Span *spans, int64_t count, int gradient) {
    const int64_t threads = omp_get_max_threads();
    int64_t each = 0, key_heads = it->heads / it->group, next = 0;
    for (int64_t i = 0; i < count; i++) {
        Room room = {0};
        desk_of(parts, it, spans + i, gradient, &room);
        if ((int64_t)room.at > each) each = room.at;
    }
    One *const ways[2][2] = {{attend_one_f32, attend_one_bf16}, {gradient_one_f32, gradient_one_bf16}};
    One *one = ways[gradient][parts == 1];
    char *memory = malloc(threads * each + 64);
    if (!memory) return 0;
    _Pragma("omp parallel") {
        Room room = {(uintptr_t)aligned(memory) + omp_get_thread_num() * each};
        _tile_loadconfig(&SHAPES);
        for (int64_t i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < count * key_heads;)
            one(it, spans + i / key_heads, i % key_heads, room);
        _tile_release();
    }
    free(memory);
    return 1;
}

/* out = softmax(scaling * q k^T + mask) v for each span; q and out are (tokens, heads, size), k and v have a head for
 * every `group` of those. */
#define ATTEND(name, parts)                                                                                           \
    int attend_##name(                                                                                                \
        void *q, int64_t q_token, int64_t q_head, void *k, int64_t k_token, int64_t k_head, void *v, int64_t v_token, \
        int64_t v_head, void *out, int64_t out_token, int64_t out_head, const Span *spans, int64_t count,             \
        int64_t heads, int64_t group, int64_t size, double scaling) {                                                 \
        Task it = {                                                                                                   \
            .q = {q, q_token, q_head},                                                                                \
            .k = {k, k_token, k_head},                                                                                \
            .v = {v, v_token, v_head},                                                                                \
            .out = {out, out_token, out_head},                                                                        \
            .heads = heads,                                                                                           \
            .group = group,                                                                                           \
            .size = size,                                                                                             \
            .scaling = scaling};                                                                                      \
        return attend_each(parts, &it, spans, count, 0);                                                              \
    }

/* dq, dk and dv of dout. */
#define ATTEND_GRADIENT(name, parts)                                                                                  \
    int attend_gradient_##name(                                                                                       \
        void *q, int64_t q_token, int64_t q_head, void *k, int64_t k_token, int64_t k_head, void *v, int64_t v_token, \
        int64_t v_head, void *dout, int64_t dout_token, int64_t dout_head, void *dq, int64_t dq_token,                \
        int64_t dq_head, void *dk, int64_t dk_token, int64_t dk_head, void *dv, int64_t dv_token, int64_t dv_head,    \
        float *dk_aside, float *dv_aside, const Span *spans, int64_t count, int64_t heads, int64_t group,             \
        int64_t size, double scaling) {                                                                               \
        Task it = {                                                                                                   \
            .q = {q, q_token, q_head},                                                                                \
            .k = {k, k_token, k_head},                                                                                \
            .v = {v, v_token, v_head},                                                                                \
            .dout = {dout, dout_token, dout_head},                                                                    \
            .dq = {dq, dq_token, dq_head},                                                                            \
            .dk = {dk, dk_token, dk_head},                                                                            \
            .dv = {dv, dv_token, dv_head},                                                                            \
            .dk_aside = dk_aside,                                                                                     \
            .dv_aside = dv_aside,                                                                                     \
            .heads = heads,                                                                                           \
            .group = group,                                                                                           \
            .size = size,                                                                                             \
            .scaling = scaling};                                                                                      \
        return attend_each(parts, &it, spans, count, 1);                                                              \
    }

ATTEND(f32, 3)
ATTEND(bf16, 1)
ATTEND_GRADIENT(f32, 3)
ATTEND_GRADIENT(bf16, 1)
#endif
