/* The products of a convolution, computed with vector instructions (AVX-512 BF16). */
#include "positions.h"

/* The positions of 8 consecutive rows of a product must be evenly spaced. */
enum { RUN = 8 };

/* Returns 1: vector instructions require no permission from the operating system. */
int resnet56_permitted(void) { return 1; }

struct config {
    char unused;
};
static void begin_tiles(struct config *saved) { (void)saved; }
static void end_tiles(const struct config *saved) { (void)saved; }

static inline __m512bh broadcast(const bf16 *pair) {
    int32_t bits;
    memcpy(&bits, pair, 4);
    return (__m512bh)_mm512_set1_epi32(bits);
}

static inline __m512bh load_pairs(const bf16 *p) { return (__m512bh)_mm512_loadu_si512(p); }

/* Adds the products of `pairs` pairs of values to 16 vectors of sums. This number of vectors hides
 * the latency of the instruction. The vectors hold 8 rows and 32 columns if `wide`, and 16 rows and
 * 16 columns otherwise:
 *
 *              wide                                 not wide
 *          b         b + next                           b
 *   a    c[0]          c[1]                 a         c[0]
 *                                           a + next  c[1]
 *
 * Strides are in values. `wide` is a constant, so the compiler specializes the loop. */
static inline __attribute__((always_inline)) void multiply(
    int wide, const bf16 *a, long a_stride, const bf16 *b, long b_stride, long next, long pairs,
    __m512 c[2][RUN]) {
    for (long k = 0; k < pairs; k++) {
        __m512bh row = load_pairs(b + k * b_stride), next_row = row;
        if (wide) next_row = load_pairs(b + k * b_stride + next);
#pragma GCC unroll 8
        for (int m = 0; m < RUN; m++) {
            const bf16 *pair = a + m * a_stride + 2 * k;
            c[0][m] = _mm512_dpbf16_ps(c[0][m], broadcast(pair), row);
            c[1][m] = _mm512_dpbf16_ps(c[1][m], broadcast(wide ? pair : pair + next), next_row);
        }
    }
}

/* Loads the sums of `multiply`. Those in c[1] start `next` values after those in c[0]. */
static inline void load_sums(__m512 c[2][RUN], const float *from, long stride, long next) {
    for (long m = 0; m < RUN; m++) {
        c[0][m] = load_float(from + m * stride);
        c[1][m] = load_float(from + m * stride + next);
    }
}

static inline void store_sums(__m512 c[2][RUN], float *to, long stride, long next) {
    for (long m = 0; m < RUN; m++) {
        _mm512_storeu_ps(to + m * stride, c[0][m]);
        _mm512_storeu_ps(to + m * stride + next, c[1][m]);
    }
}

static inline __attribute__((always_inline)) void product_as(
    int wide, const bf16 *map, long channels, const int32_t *position_of, long distance,
    const Terms *terms, const bf16 *b, float *to) {
    long step = wide ? RUN : 2 * RUN, rows = wide ? 32 : 64, columns = wide ? 2 * LANES : LANES;
    for (long i = 0; i < rows; i += step) {
        const bf16 *a = map + position_of[i] * channels;
        long next = terms->rows * terms->chunks_per_row * TILE; /* to the next 16 outputs */
        if (!wide) next = (position_of[i + RUN] - position_of[i]) * channels;
        __m512 c[2][RUN];
        for (long m = 0; m < RUN; m++) c[0][m] = c[1][m] = _mm512_setzero_ps();
        for (long r = 0; r < terms->rows; r++) {
            long chunk = r * terms->chunks_per_row;
            multiply(wide, a + terms->offsets[chunk], distance * channels, b + chunk * TILE,
                     2 * LANES, next, terms->pairs_per_row, c);
        }
        store_sums(c, to + i * columns, columns, wide ? LANES : RUN * columns);
    }
}

/* Computes the product for 64 rows and 16 outputs, or for 32 rows and 32 outputs. */
static void product(long columns, const bf16 *map, long channels, const int32_t *position_of,
                    long distance, const Terms *terms, const bf16 *b, float *tile) {
    if (columns == LANES) product_as(0, map, channels, position_of, distance, terms, b, tile);
    else product_as(1, map, channels, position_of, distance, terms, b, tile);
}

/* The sums run over the rows of pixels and exclude the zeros between the rows. Without padding,
 * there are no zeros, and all pixels form one row. */
static inline __attribute__((always_inline)) void add_weight_products_as(
    int wide, const Conv *c, const Layout *l, Scratch *m, long count) {
    long outputs = wide ? RUN : 2 * RUN, inputs = wide ? 2 * LANES : LANES;
    long height = l->pad ? c->height / c->stride : 1, rows = l->pad ? count * height : 1;
    long pairs = ((l->pad ? c->width : count * l->span) + 1) / 2, stride = l->taps * c->in;
    for (long o = 0; o < c->out; o += outputs)
        for (long tap = 0; tap < l->taps; tap++)
            for (long k = 0; k < c->in; k += inputs) {
                float *to = m->weight_grad + (o * l->taps + tap) * c->in + k;
                __m512 sums[2][RUN];
                load_sums(sums, to, stride, wide ? LANES : RUN * stride);
                for (long row = 0; row < rows; row++) {
                    long start = row / height * l->span + row % height * c->stride * l->pitch;
                    long shifted = start + shift_of(l, tap / c->kernel, tap % c->kernel);
                    multiply(wide, m->planes + o * l->plane_pitch + start, l->plane_pitch,
                             pairs_at(c, l, m, l->lead + shifted, k), 2 * c->in,
                             wide ? 2 * LANES : RUN * l->plane_pitch, pairs, sums);
                }
                store_sums(sums, to, stride, wide ? LANES : RUN * stride);
            }
}

/* Adds the products of m->planes and m->pairs to m->weight_grad. */
static void add_weight_products(const Conv *c, const Layout *l, Scratch *m, long count) {
    if (c->in == LANES) add_weight_products_as(0, c, l, m, count);
    else add_weight_products_as(1, c, l, m, count);
}
