/* The products of a convolution, computed by the processor's matrix unit (AMX: Intel Architecture
 * Software Developer's Manual, volume 1, chapter 18).
 *
 * A tile of the second factor has 16 rows of 16 pairs. Pair j of row i contains values 2i and
 * 2i + 1 of column j.
 */
#include <sys/syscall.h>
#include <unistd.h>

#include "positions.h"

enum { RUN = 0 }; /* the rows of a product are always positions */

/* Contents of the tile registers t0 to t7. A register has 16 rows of 64 bytes. The factors are
 * bfloat16, and the products are float32: [positions x inputs] times [pairs of inputs x outputs].
 *
 *   product_64x16                          product_32x32
 *                     t4: 16 outputs                   t5: outputs 0-15  t6: 16-31
 *   t5: positions 0-15    t0               t4: positions 0-15    t0           t1
 *   t6:          16-31    t1               t7:          16-31    t2           t3
 *   t7:          32-47    t2
 *   t5:          48-63    t3
 *
 *   outer_1x5 (weight gradient)            outer_2x2
 *              t6  t7  t6  t7  t6: inputs               t5: inputs 0-15   t6: 16-31
 *   t5: 16     t0  t1  t2  t3  t4          t4: outputs 0-15     t0           t1
 *   outputs                                t7:         16-31    t2           t3
 */

/* Requests access to the matrix unit. Returns 0 if the operating system denies access, and 1
 * otherwise. */
int resnet56_permitted(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

struct config { /* the instruction LDTILECFG requires this layout */
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} __attribute__((aligned(64)));

/* GCC does not know that tile loads read memory. The barrier prevents GCC from moving earlier
 * stores past the loads. */
#define COMPILER_BARRIER __asm__ volatile("" ::: "memory")

static void begin_tiles(struct config *saved) {
    struct config config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
    COMPILER_BARRIER;
    _tile_storeconfig(saved); /* PyTorch's kernels may also use the tile registers */
    _tile_loadconfig(&config);
}

static void end_tiles(const struct config *saved) {
    if (saved->palette) _tile_loadconfig(saved);
    else _tile_release();
}

/* For 64 positions and 16 outputs, computes the product c[64][16], the sum over chunks k of
 * a[offsets[k]..] * b[k]. */
static void product_64x16(const bf16 *a, long stride, const int32_t *offsets, long chunks,
                          const bf16 *b, float *c) {
    const char *rows = (const char *)a;
    long step = 16 * stride;
    COMPILER_BARRIER;
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (long k = 0; k < chunks; k++) {
        const char *at = rows + 2 * offsets[k];
        _tile_loadd(4, b + k * TILE, 64);
        _tile_loadd(5, at, stride);
        _tile_dpbf16ps(0, 5, 4);
        _tile_loadd(6, at + step, stride);
        _tile_dpbf16ps(1, 6, 4);
        _tile_loadd(7, at + 2 * step, stride);
        _tile_dpbf16ps(2, 7, 4);
        _tile_loadd(5, at + 3 * step, stride);
        _tile_dpbf16ps(3, 5, 4);
    }
    _tile_stored(0, c, 64);
    _tile_stored(1, c + 256, 64);
    _tile_stored(2, c + 512, 64);
    _tile_stored(3, c + 768, 64);
}

/* Computes the product c[32][32] for 32 positions and 32 outputs. In `b`, the tiles of outputs
 * 16-31 follow those of outputs 0-15. */
static void product_32x32(const bf16 *a, long stride, const int32_t *offsets, long chunks,
                          const bf16 *b, float *c) {
    const char *rows = (const char *)a;
    long step = 16 * stride;
    COMPILER_BARRIER;
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (long k = 0; k < chunks; k++) {
        const char *at = rows + 2 * offsets[k];
        _tile_loadd(4, at, stride);
        _tile_loadd(5, b + k * TILE, 64);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, b + (chunks + k) * TILE, 64);
        _tile_dpbf16ps(1, 4, 6);
        _tile_loadd(7, at + step, stride);
        _tile_dpbf16ps(2, 7, 5);
        _tile_dpbf16ps(3, 7, 6);
    }
    _tile_stored(0, c, 128);
    _tile_stored(1, c + 16, 128);
    _tile_stored(2, c + 512, 128);
    _tile_stored(3, c + 528, 128);
}

/* Computes up to five tiles of the weight gradient: c[i] += planes (16 outputs by positions) times
 * pairs[i] (positions by 16 inputs). The sum is over `chunks` chunks of 32 positions. */
static void outer_1x5(const bf16 *planes, long plane_bytes, const bf16 *const *pairs,
                      long pair_bytes, long tiles, long chunks, float *const *c, long c_bytes) {
    const char *b0 = (const char *)pairs[0], *b1 = (const char *)pairs[1];
    const char *b2 = (const char *)pairs[2], *b3 = (const char *)pairs[3];
    const char *b4 = (const char *)pairs[4];
    long step = 16 * pair_bytes;
    COMPILER_BARRIER;
    _tile_loadd(0, c[0], c_bytes);
    if (tiles > 1) _tile_loadd(1, c[1], c_bytes);
    if (tiles > 2) _tile_loadd(2, c[2], c_bytes);
    if (tiles > 3) _tile_loadd(3, c[3], c_bytes);
    if (tiles > 4) _tile_loadd(4, c[4], c_bytes);
    for (long k = 0; k < chunks; k++) {
        _tile_loadd(5, planes + 32 * k, plane_bytes);
        _tile_loadd(6, b0 + k * step, pair_bytes);
        _tile_dpbf16ps(0, 5, 6);
        if (tiles > 1) { _tile_loadd(7, b1 + k * step, pair_bytes); _tile_dpbf16ps(1, 5, 7); }
        if (tiles > 2) { _tile_loadd(6, b2 + k * step, pair_bytes); _tile_dpbf16ps(2, 5, 6); }
        if (tiles > 3) { _tile_loadd(7, b3 + k * step, pair_bytes); _tile_dpbf16ps(3, 5, 7); }
        if (tiles > 4) { _tile_loadd(6, b4 + k * step, pair_bytes); _tile_dpbf16ps(4, 5, 6); }
    }
    _tile_stored(0, c[0], c_bytes);
    if (tiles > 1) _tile_stored(1, c[1], c_bytes);
    if (tiles > 2) _tile_stored(2, c[2], c_bytes);
    if (tiles > 3) _tile_stored(3, c[3], c_bytes);
    if (tiles > 4) _tile_stored(4, c[4], c_bytes);
}

/* Like outer_1x5, but for 32 outputs and two tiles of 16 inputs. In `planes` and `c`, outputs 16-31
 * start 16 rows after outputs 0-15. */
static void outer_2x2(const bf16 *planes, long plane_bytes, const bf16 *const *pairs,
                      long pair_bytes, long chunks, float *const *c, long c_bytes) {
    const char *a = (const char *)planes, *a2 = a + 16 * plane_bytes;
    const char *b = (const char *)pairs[0], *b2 = (const char *)pairs[1];
    char *c0 = (char *)c[0], *c1 = (char *)c[1];
    long step = 16 * pair_bytes;
    COMPILER_BARRIER;
    _tile_loadd(0, c0, c_bytes);
    _tile_loadd(1, c1, c_bytes);
    _tile_loadd(2, c0 + 16 * c_bytes, c_bytes);
    _tile_loadd(3, c1 + 16 * c_bytes, c_bytes);
    for (long k = 0; k < chunks; k++) {
        _tile_loadd(4, a + 64 * k, plane_bytes);
        _tile_loadd(5, b + k * step, pair_bytes);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, b2 + k * step, pair_bytes);
        _tile_dpbf16ps(1, 4, 6);
        _tile_loadd(7, a2 + 64 * k, plane_bytes);
        _tile_dpbf16ps(2, 7, 5);
        _tile_dpbf16ps(3, 7, 6);
    }
    _tile_stored(0, c0, c_bytes);
    _tile_stored(1, c1, c_bytes);
    _tile_stored(2, c0 + 16 * c_bytes, c_bytes);
    _tile_stored(3, c1 + 16 * c_bytes, c_bytes);
}

/* Computes the product for 64 positions and 16 outputs, or for 32 positions and 32 outputs. */
static inline void product(long columns, const bf16 *map, long channels, const int32_t *position_of,
                           long distance, const Terms *terms, const bf16 *b, float *tile) {
    const bf16 *a = map + position_of[0] * channels;
    long chunks = terms->rows * terms->chunks_per_row;
    (void)distance; /* 1, because the rows are positions */
    if (columns == LANES) product_64x16(a, 2 * channels, terms->offsets, chunks, b, tile);
    else product_32x32(a, 2 * channels, terms->offsets, chunks, b, tile);
}

/* Adds the products of m->planes and m->pairs to m->weight_grad, summed over all positions. */
static void add_weight_products(const Conv *c, const Layout *l, Scratch *m, long count) {
    long chunks = (count * l->span + 31) / 32, plane_bytes = 2 * l->plane_pitch;
    /* A tile contains 16 inputs of one tap. A call computes five tiles for 16 outputs, or two tiles
     * for 32 outputs. */
    long tiles = l->taps * c->in / LANES, tiles_per_call = c->out == LANES || tiles % 2 ? 5 : 2;
    long row_bytes = 4 * l->taps * c->in, rows = tiles_per_call == 2 ? 2 * LANES : LANES;
    for (long o = 0; o < c->out; o += rows)
        for (long t = 0; t < tiles; t += tiles_per_call) {
            const bf16 *b[5];
            float *to[5];
            for (long j = 0; j < tiles_per_call; j++) {
                long tile = min_long(t + j, tiles - 1), tap = tile / (c->in / LANES);
                long channel = tile % (c->in / LANES) * LANES;
                long shift = shift_of(l, tap / c->kernel, tap % c->kernel);
                b[j] = pairs_at(c, l, m, l->lead + shift, channel);
                to[j] = m->weight_grad + (o * l->taps + tap) * c->in + channel;
            }
            const bf16 *a = m->planes + o * l->plane_pitch;
            if (tiles_per_call == 2)
                outer_2x2(a, plane_bytes, b, 4 * c->in, chunks, to, row_bytes);
            else
                outer_1x5(a, plane_bytes, b, 4 * c->in, min_long(5, tiles - t), chunks, to,
                          row_bytes);
        }
}
