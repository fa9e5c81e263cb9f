/* out = x W^T with W in 8 bits and x in 16, both scaled, as integers.

   W has a scale for each output and each GROUP inputs, x one for each token: 16 bits hold the
   channels that a language model's layers have far beyond the others, which 8 would leave nothing
   for. Sums within a group are exact, groups are added in their order: a token's result does not
   depend on the tokens beside it, on the number of threads, or on the variant. */

#include <stddef.h>
#include <stdint.h>

#include "native.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* Given by what compiles this: OUTPUTS that lie together, inputs of a GROUP, the LARGEST value that
   x is scaled to. */
_Static_assert(OUTPUTS == 16, "a tile is two registers of eight outputs");
_Static_assert(GROUP % 2 == 0 && LARGEST <= INT16_MAX, "x is read by pairs of 16 bits");
_Static_assert(127LL * LARGEST * GROUP <= INT32_MAX, "a group's sum has 32 bits");

enum {
    TOKENS = 6, /* of a tile: with two registers of outputs as many sums as 16 registers hold */
    CHUNK = 48  /* tokens whose inputs stay in the second cache while all weights go by */
};

/* Multiplications for which a second thread is worth its start. */
static const double WORTH_A_THREAD = 200e3;

typedef struct {
    const int16_t *x;    /* [tokens, in], `in` even */
    const float *x_scale; /* [tokens] */
    const int8_t *w;     /* [out / OUTPUTS, in / 2, OUTPUTS, 2] */
    const float *w_scale; /* [out / OUTPUTS, groups, OUTPUTS] */
    float *out;
    ptrdiff_t out_stride, in, groups;
} Layer;

/* One token to 16 bits; its scale. What holds no number gets no number out. */
INLINE float quantise(const float *x, int16_t *q, ptrdiff_t given, ptrdiff_t in)
{
    float largest = 0, broken = 0;
    for (ptrdiff_t i = 0; i < given; i++) {
        const float size = __builtin_fabsf(x[i]);
        largest = size > largest ? size : largest;
        broken += x[i] * 0.0f; /* infinities and what is no number */
    }
    const float inverse = largest > 0 && broken == 0 ? LARGEST / largest : 0.0f;
    /* So small that its inverse overflows: as good as zero. */
    const float factor = inverse <= 3e38f ? inverse : 0.0f;
    for (ptrdiff_t i = 0; i < given; i++)
        q[i] = (int16_t)(int32_t)__builtin_rintf(factor == 0.0f ? 0.0f : x[i] * factor);
    for (ptrdiff_t i = given; i < in; i++)
        q[i] = 0;
    return largest / LARGEST + broken;
}

/* `count` tokens from `token` times one block of outputs. */
INLINE void tile_plain(const Layer *layer, ptrdiff_t block, ptrdiff_t token, int count)
{
    const ptrdiff_t in = layer->in;
    const int8_t *weights = layer->w + block * in * OUTPUTS;
    for (int t = 0; t < count; t++) {
        const int16_t *x = layer->x + (token + t) * in;
        float result[OUTPUTS] = {0};
        for (ptrdiff_t group = 0; group < layer->groups; group++) {
            const ptrdiff_t stop = (group + 1) * GROUP < in ? (group + 1) * GROUP : in;
            const float *scale = layer->w_scale + (block * layer->groups + group) * OUTPUTS;
            int32_t sums[OUTPUTS] = {0};
            for (ptrdiff_t i = group * GROUP; i < stop; i += 2) {
                const int8_t *w = weights + i * OUTPUTS;
                for (int o = 0; o < OUTPUTS; o++)
                    sums[o] += w[2 * o] * x[i] + w[2 * o + 1] * x[i + 1];
            }
            for (int o = 0; o < OUTPUTS; o++)
                result[o] = __builtin_fmaf((float)sums[o], scale[o], result[o]);
        }
        float *out = layer->out + (token + t) * layer->out_stride + block * OUTPUTS;
        for (int o = 0; o < OUTPUTS; o++)
            out[o] = result[o] * layer->x_scale[token + t];
    }
}

#if defined(__x86_64__)
#define AVX2 __attribute__((target("avx2,fma")))
/* sums += a0 b0 + a1 b1 for each pair. Intrinsics would have gcc 12 compute all of a tile's products
   before it adds one, with no registers left for the sums. */
AVX2 INLINE void add_products(__m256i *sums, __m256i a, __m256i b)
{
    __m256i product;
    __asm__("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0"
            : "+x"(*sums), "=&x"(product)
            : "x"(a), "x"(b));
}

AVX2 INLINE void tile_avx2(const Layer *layer, ptrdiff_t block, ptrdiff_t token, const int count)
{
    const ptrdiff_t in = layer->in;
    const int16_t *x = layer->x + token * in;
    const int8_t *w = layer->w + block * in * OUTPUTS;
    const float *scale = layer->w_scale + block * layer->groups * OUTPUTS;
    __m256 low[TOKENS], high[TOKENS];
    for (int t = 0; t < count; t++)
        low[t] = high[t] = _mm256_setzero_ps();
    for (ptrdiff_t start = 0; start < in; start += GROUP, scale += OUTPUTS) {
        const ptrdiff_t stop = start + GROUP < in ? start + GROUP : in;
        __m256i sum[TOKENS], more[TOKENS];
        for (int t = 0; t < count; t++)
            sum[t] = more[t] = _mm256_setzero_si256();
        for (ptrdiff_t i = start; i < stop; i += 2, w += 2 * OUTPUTS) {
            const __m256i a = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)w));
            const __m256i b = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(w + OUTPUTS)));
            for (int t = 0; t < count; t++) {
                int32_t pair;
                __builtin_memcpy(&pair, x + t * in + i, sizeof pair);
                const __m256i both = _mm256_set1_epi32(pair);
                add_products(&sum[t], a, both);
                add_products(&more[t], b, both);
            }
        }
        const __m256 s = _mm256_loadu_ps(scale), u = _mm256_loadu_ps(scale + OUTPUTS / 2);
        for (int t = 0; t < count; t++) {
            low[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[t]), s, low[t]);
            high[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(more[t]), u, high[t]);
        }
    }
    for (int t = 0; t < count; t++) {
        const __m256 size = _mm256_set1_ps(layer->x_scale[token + t]);
        float *out = layer->out + (token + t) * layer->out_stride + block * OUTPUTS;
        _mm256_storeu_ps(out, _mm256_mul_ps(low[t], size));
        _mm256_storeu_ps(out + OUTPUTS / 2, _mm256_mul_ps(high[t], size));
    }
}

AVX2 static void tiles_avx2(const Layer *layer, ptrdiff_t block, ptrdiff_t start, ptrdiff_t stop)
{
    for (ptrdiff_t token = start; token < stop;) {
        /* As even as can be: 16 tokens are 6, 5 and 5. */
        const ptrdiff_t left = stop - token, tiles = (left + TOKENS - 1) / TOKENS;
        const int count = (int)((left + tiles - 1) / tiles);
        switch (count) {
        case 1: tile_avx2(layer, block, token, 1); break;
        case 2: tile_avx2(layer, block, token, 2); break;
        case 3: tile_avx2(layer, block, token, 3); break;
        case 4: tile_avx2(layer, block, token, 4); break;
        case 5: tile_avx2(layer, block, token, 5); break;
        default: tile_avx2(layer, block, token, 6); break;
        }
        token += count;
    }
}

AVX2 static float quantise_avx2(const float *x, int16_t *q, ptrdiff_t given, ptrdiff_t in)
{
    return quantise(x, q, given, in);
}
#endif

void int8_times(
    const float *x, ptrdiff_t x_stride, ptrdiff_t tokens, ptrdiff_t given, int16_t *scratch,
    float *x_scale, const int8_t *w, const float *w_scale, ptrdiff_t blocks, float *out,
    ptrdiff_t out_stride, int threads, int variant)
{
    const ptrdiff_t in = (given + 1) / 2 * 2;
    const Layer layer = {
        scratch, x_scale, w, w_scale, out, out_stride, in, (in + GROUP - 1) / GROUP};
    if ((double)tokens * in * blocks * OUTPUTS < WORTH_A_THREAD)
        threads = 1;
    (void)variant, (void)threads;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
#endif
    {
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
        for (ptrdiff_t t = 0; t < tokens; t++) {
            int16_t *q = scratch + t * in;
#if defined(__x86_64__)
            if (variant == 1) {
                x_scale[t] = quantise_avx2(x + t * x_stride, q, given, in);
                continue;
            }
#endif
            x_scale[t] = quantise(x + t * x_stride, q, given, in);
        }
        for (ptrdiff_t start = 0; start < tokens; start += CHUNK) {
            const ptrdiff_t stop = start + CHUNK < tokens ? start + CHUNK : tokens;
#ifdef _OPENMP
#pragma omp for schedule(static) nowait
#endif
            for (ptrdiff_t block = 0; block < blocks; block++) {
#if defined(__x86_64__)
                if (variant == 1) {
                    tiles_avx2(&layer, block, start, stop);
                    continue;
                }
#endif
                tile_plain(&layer, block, start, (int)(stop - start));
            }
        }
    }
}
