/* out += (x A^T) B for the tokens of many adapters in one call.

   One library call for each adapter, or one padded call for all, costs several times what its few
   thousand multiplications do. Each token's sums have the same order whatever else is in the batch. */

#include <stddef.h>
#include <stdint.h>

#include "native.h"

/* MOST_RANK is given by what compiles this. */
enum { TOKENS = 4 };

/* Multiplications for which a second thread is worth its start. */
static const double WORTH_A_THREAD = 500e3;

typedef struct {
    int32_t slot, start, count; /* at most TOKENS of them */
} Block;

typedef struct {
    const float *x, *a, *b;
    float *out;
    const int32_t *ranks;
    ptrdiff_t x_stride, out_stride, in, features, room;
} Layer;

/* low[token][r] = x[token] . a[r]; tokens that the block lacks repeat its first. */
INLINE void down(
    const Layer *layer, Block block, ptrdiff_t rank, float low[TOKENS][MOST_RANK])
{
    const ptrdiff_t in = layer->in, step = layer->x_stride;
    const float *a = layer->a + (block.slot - 1) * layer->room * in;
    const float *x0 = layer->x + block.start * step;
    const float *x1 = block.count > 1 ? x0 + step : x0;
    const float *x2 = block.count > 2 ? x0 + 2 * step : x0;
    const float *x3 = block.count > 3 ? x0 + 3 * step : x0;
    for (ptrdiff_t r = 0; r < rank; r += 2) {
        /* An odd rank's last row twice: both have the same sum. */
        const ptrdiff_t s = r + 1 < rank ? r + 1 : r;
        const float *p = a + r * in, *q = a + s * in;
        float p0 = 0, p1 = 0, p2 = 0, p3 = 0, q0 = 0, q1 = 0, q2 = 0, q3 = 0;
        for (ptrdiff_t i = 0; i < in; i++) {
            p0 += x0[i] * p[i];
            p1 += x1[i] * p[i];
            p2 += x2[i] * p[i];
            p3 += x3[i] * p[i];
            q0 += x0[i] * q[i];
            q1 += x1[i] * q[i];
            q2 += x2[i] * q[i];
            q3 += x3[i] * q[i];
        }
        low[0][r] = p0, low[1][r] = p1, low[2][r] = p2, low[3][r] = p3;
        low[0][s] = q0, low[1][s] = q1, low[2][s] = q2, low[3][s] = q3;
    }
}

/* out[o] += sum over r of low[r] * b[r][o] */
INLINE void up(
    float *restrict out, const float *restrict b, ptrdiff_t features, ptrdiff_t rank, const float *low)
{
    ptrdiff_t r = 0;
    for (; r + 8 <= rank; r += 8) {
        const float *restrict c = b + r * features, *l = low + r;
        const float l0 = l[0], l1 = l[1], l2 = l[2], l3 = l[3];
        const float l4 = l[4], l5 = l[5], l6 = l[6], l7 = l[7];
        for (ptrdiff_t o = 0; o < features; o++) {
            const float *d = c + o;
            out[o] += l0 * d[0] + l1 * d[features] + l2 * d[2 * features] + l3 * d[3 * features]
                + l4 * d[4 * features] + l5 * d[5 * features] + l6 * d[6 * features]
                + l7 * d[7 * features];
        }
    }
    for (; r < rank; r++) {
        const float *restrict c = b + r * features;
        for (ptrdiff_t o = 0; o < features; o++)
            out[o] += low[r] * c[o];
    }
}

INLINE void one(const Layer *layer, Block block)
{
    float low[TOKENS][MOST_RANK];
    const ptrdiff_t rank = layer->ranks[block.slot], features = layer->features;
    if (rank == 0)
        return;
    down(layer, block, rank, low);
    const float *b = layer->b + (block.slot - 1) * layer->room * features;
    for (ptrdiff_t token = 0; token < block.count; token++)
        up(layer->out + (block.start + token) * layer->out_stride, b, features, rank, low[token]);
}

/* The same for processors that have wider registers; target_clones would go by their names. */
typedef void One(const Layer *, Block);
static void one_plain(const Layer *layer, Block block) { one(layer, block); }
#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) static void one_avx2(const Layer *layer, Block block)
{
    one(layer, block);
}
__attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,fma"))) static void one_avx512(
    const Layer *layer, Block block)
{
    one(layer, block);
}
#endif

void add_low_rank(
    const float *x, ptrdiff_t x_stride, float *out, ptrdiff_t out_stride, const float *a,
    const float *b, ptrdiff_t in, ptrdiff_t features, ptrdiff_t room, const int32_t *ranks,
    const Block *blocks, ptrdiff_t count, int threads, int variant)
{
    const Layer layer = {x, a, b, out, ranks, x_stride, out_stride, in, features, room};
    One *compute = one_plain;
#if defined(__x86_64__)
    compute = variant == 2 ? one_avx512 : variant == 1 ? one_avx2 : one_plain;
#endif
    (void)variant;
    double work = 0;
    for (ptrdiff_t n = 0; n < count; n++)
        work += (double)ranks[blocks[n].slot] * blocks[n].count * (in + features);
    if (work < WORTH_A_THREAD)
        threads = 1;
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
#endif
    for (ptrdiff_t n = 0; n < count; n++)
        compute(&layer, blocks[n]);
}
