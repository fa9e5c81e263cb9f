/* What the kernels beside this file have in common; compiled into each of them. */

#define INLINE static inline __attribute__((always_inline))

/* What this processor is best at, if it is no more than `most`: 0 plain, 1 AVX2, 2 AVX-512. */
int native_variant(int most)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    const int fma = __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx2");
    if (most >= 2 && fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl")
        && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
        return 2;
    if (most >= 1 && fma)
        return 1;
#endif
    (void)most;
    return 0;
}

/* Whether the library can use more than one thread. */
int native_threads(void)
{
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}
