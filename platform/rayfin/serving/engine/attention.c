/* The rows' keys and values written to their places, and attention of one token a row over its row.

   Each row to its own length and nothing beside it: no mask, no padding to the longest, and its
   result is the same in any company. Softmax is computed block by block, with the largest score so
   far and the sum carried along (Milakov and Gimelshein, arXiv:1805.02867). */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "native.h"

/* MOST_GROUP query heads share a key/value head at most; given by what compiles this. */
enum { BLOCK = 64 };

/* Multiplications for which a second thread is worth its start. */
static const double WORTH_A_THREAD = 200e3;

typedef struct {
    float *keys, *values;          /* [rows, heads, places, dim] */
    ptrdiff_t heads, places, dim;
} Cache;

typedef struct {
    const Cache *cache;
    const float *query;            /* [group * heads, tokens, dim], by its strides */
    ptrdiff_t query_head, query_token;
    const int64_t *rows, *positions; /* [tokens] */
    float *out;                    /* [tokens, group * heads, dim] */
    ptrdiff_t group;
    float scaling;
} Job;

/* e^x for x <= 0, to about 3e-7 of it (4e-6 for the smallest without FMA); 0 below e^-87; NaN for
   NaN. */
INLINE float exponential(float x)
{
    const float limited = x >= -87.0f ? x : -87.0f; /* a number, whatever x is */
    const float whole = __builtin_rintf(limited * 1.44269504f);
    const float rest = x - whole * 0.693147181f;
    /* Taylor's series: rest is within ln 2 / 2 of 0. */
    float e = 1.0f / 5040;
    e = e * rest + 1.0f / 720;
    e = e * rest + 1.0f / 120;
    e = e * rest + 1.0f / 24;
    e = e * rest + 1.0f / 6;
    e = e * rest + 0.5f;
    e = e * rest + 1.0f;
    e = e * rest + 1.0f;
    const uint32_t bits = (uint32_t)((int32_t)whole + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return x < -87.0f ? 0.0f : e * power;
}

/* scores[i] = scaling * query . keys[i] */
INLINE void score(
    float *restrict scores, const float *restrict query, const float *restrict keys, ptrdiff_t count,
    ptrdiff_t dim, float scaling)
{
    for (ptrdiff_t i = 0; i < count; i += 4) {
        /* What the last four lack repeats its first. */
        const float *k0 = keys + i * dim;
        const float *k1 = i + 1 < count ? k0 + dim : k0;
        const float *k2 = i + 2 < count ? k0 + 2 * dim : k0;
        const float *k3 = i + 3 < count ? k0 + 3 * dim : k0;
        float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
        for (ptrdiff_t d = 0; d < dim; d++) {
            s0 += query[d] * k0[d];
            s1 += query[d] * k1[d];
            s2 += query[d] * k2[d];
            s3 += query[d] * k3[d];
        }
        scores[i] = s0 * scaling, scores[i + 1] = s1 * scaling;
        scores[i + 2] = s2 * scaling, scores[i + 3] = s3 * scaling;
    }
}

/* One token's query heads that share a key/value head. */
INLINE void one(const Job *job, ptrdiff_t token, ptrdiff_t head)
{
    const Cache *cache = job->cache;
    const ptrdiff_t dim = cache->dim, group = job->group, length = job->positions[token] + 1;
    const ptrdiff_t start = (job->rows[token] * cache->heads + head) * cache->places * dim;
    const float *keys = cache->keys + start, *values = cache->values + start;
    const float *query = job->query + token * job->query_token + head * group * job->query_head;
    float *out = job->out + (token * cache->heads + head) * group * dim;
    float largest[MOST_GROUP], total[MOST_GROUP];
    memset(out, 0, sizeof *out * group * dim);
    for (ptrdiff_t g = 0; g < group; g++)
        largest[g] = -INFINITY, total[g] = 0;
    for (ptrdiff_t first = 0; first < length; first += BLOCK) {
        const ptrdiff_t count = length - first < BLOCK ? length - first : BLOCK;
        for (ptrdiff_t g = 0; g < group; g++) {
            float weights[BLOCK];
            float *restrict result = out + g * dim;
            score(weights, query + g * job->query_head, keys + first * dim, count, dim, job->scaling);
            float top = largest[g], sum = 0;
            for (ptrdiff_t i = 0; i < count; i++)
                top = weights[i] > top ? weights[i] : top;
            /* Where all are -infinity so far, they weigh nothing. */
            const float base = top == -INFINITY ? 0.0f : top;
            for (ptrdiff_t i = 0; i < count; i++) {
                weights[i] = exponential(weights[i] - base);
                sum += weights[i];
            }
            const float kept = first == 0 ? 0.0f : exponential(largest[g] - base);
            largest[g] = top;
            total[g] = total[g] * kept + sum;
            for (ptrdiff_t d = 0; d < dim; d++)
                result[d] *= kept;
            ptrdiff_t i = 0;
            for (; i + 4 <= count; i += 4) {
                const float *restrict v = values + (first + i) * dim;
                const float w0 = weights[i], w1 = weights[i + 1], w2 = weights[i + 2],
                            w3 = weights[i + 3];
                for (ptrdiff_t d = 0; d < dim; d++)
                    result[d] += w0 * v[d] + w1 * v[dim + d] + w2 * v[2 * dim + d]
                        + w3 * v[3 * dim + d];
            }
            for (; i < count; i++) {
                const float *restrict v = values + (first + i) * dim;
                for (ptrdiff_t d = 0; d < dim; d++)
                    result[d] += weights[i] * v[d];
            }
        }
    }
    for (ptrdiff_t g = 0; g < group; g++)
        for (ptrdiff_t d = 0; d < dim; d++)
            out[g * dim + d] /= total[g];
}

typedef void One(const Job *, ptrdiff_t, ptrdiff_t);
static void one_plain(const Job *job, ptrdiff_t token, ptrdiff_t head) { one(job, token, head); }
#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) static void one_avx2(
    const Job *job, ptrdiff_t token, ptrdiff_t head)
{
    one(job, token, head);
}
#endif

void attention_write(
    float *keys, float *values, ptrdiff_t heads, ptrdiff_t places, ptrdiff_t dim,
    const float *new_keys, ptrdiff_t key_head, ptrdiff_t key_token, const float *new_values,
    ptrdiff_t value_head, ptrdiff_t value_token, const int64_t *rows, const int64_t *positions,
    ptrdiff_t tokens)
{
    for (ptrdiff_t t = 0; t < tokens; t++)
        for (ptrdiff_t h = 0; h < heads; h++) {
            const ptrdiff_t at = ((rows[t] * heads + h) * places + positions[t]) * dim;
            memcpy(keys + at, new_keys + h * key_head + t * key_token, sizeof *keys * dim);
            memcpy(values + at, new_values + h * value_head + t * value_token, sizeof *keys * dim);
        }
}

void attention_rows(
    float *keys, float *values, ptrdiff_t heads, ptrdiff_t places, ptrdiff_t dim,
    const float *query, ptrdiff_t query_head, ptrdiff_t query_token, const int64_t *rows,
    const int64_t *positions, ptrdiff_t tokens, float *out, ptrdiff_t group, float scaling,
    int threads, int variant)
{
    const Cache cache = {keys, values, heads, places, dim};
    const Job job = {
        &cache, query, query_head, query_token, rows, positions, out, group, scaling};
    One *compute = one_plain;
#if defined(__x86_64__)
    compute = variant == 1 ? one_avx2 : one_plain;
#endif
    double work = 0;
    for (ptrdiff_t t = 0; t < tokens; t++)
        work += 2.0 * (double)(positions[t] + 1) * heads * group * dim;
    if (work < WORTH_A_THREAD)
        threads = 1;
    (void)variant, (void)threads;
    /* Rows are of different lengths: whoever is done takes the next. */
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
#endif
    for (ptrdiff_t n = 0; n < tokens * heads; n++)
        compute(&job, n / heads, n % heads);
}
