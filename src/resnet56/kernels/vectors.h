/* Vectors of 16 values, stored as bfloat16 in memory and as float in registers. */
#ifndef __AVX512BF16__
#error this processor or compiler does not support AVX-512 BF16
#endif

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

enum { LANES = 16 }; /* floats per vector */

static inline __m512 load(const bf16 *p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

static inline void store(bf16 *p, __m512 v) {
    _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(v));
}

static inline __m512 load_float(const float *p) { return _mm512_loadu_ps(p); }

static inline void store_pair(bf16 *p, __m512 a, __m512 b) {
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(b, a));
}

/* Computes ReLU. NaN stays NaN. */
static inline __m512 relu(__m512 v) {
    return _mm512_max_ps(_mm512_setzero_ps(), v);
}

static inline void add_to(float *p, __m512 v) { _mm512_storeu_ps(p, load_float(p) + v); }

static inline long min_long(long a, long b) { return a < b ? a : b; }

/* Interleaves 16 values of `a` with 16 values of `b`. */
static inline __m512i interleave(const bf16 *a, const bf16 *b) {
    const __m512i order = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
        23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512i both = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)a));
    both = _mm512_inserti64x4(both, _mm256_loadu_si256((const __m256i *)b), 1);
    return _mm512_permutexvar_epi16(order, both);
}

/* Transposes a 16 x 16 matrix of 32-bit values. */
static void transpose(__m512i r[16]) {
    __m512i t[16];
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
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}
