/* Convolutions with all that surrounds them in a residual network, on a processor's matrix unit.
 *
 * Operation by operation a training step is bound by memory: each convolution, batch norm, ReLU
 * and addition reads and writes whole maps. Here a call makes one convolution forward or
 * backward, and on the way, in the first-level caches, what lies before it (batch norm, shortcut,
 * ReLU) and the sums that the batch norm behind it needs. Only convolutions' raw outputs `z`,
 * blocks' outputs `x` and gradients `g` are ever whole maps in memory, all of them bfloat16.
 *
 * Maps are (images, height, width, channels), channels a multiple of 16. A thread takes a few
 * images at a time and lays them in a row of positions, each row of pixels followed by one zero
 * pixel and each image by one row of zeros, which are the convolution's padding on both sides.
 * In that row a tap of the kernel is a shift, so a convolution is a sum of matrix products of
 * 16 positions by 32 inputs and 32 inputs by 16 outputs: the size of a tile of the unit (Intel
 * Architecture Software Developer's Manual, volume 1, chapter 18: AMX).
 */
#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef uint16_t half; /* a bfloat16 */

enum { TILE = 512, WIDE = 16, MOST = 256 }; /* halves in a tile; floats in a vector; channels */
enum input { PIXELS, NORM, BLOCK, PLAIN };
enum shortcut { NONE, SAME, PADDED, PROJECTED };

/* A batch norm: y = z * scale + shift; and what its gradient needs, dz = g * by_g + z * by_z +
 * constant. All pointers are to `channels` floats. */
typedef struct {
    float *weight, *bias, *running_mean, *running_var;
    float *mean, *invstd, *scale, *shift;
    float *by_g, *by_z, *constant, *weight_grad, *bias_grad;
    float momentum, eps;
} Norm;

/* A convolution, the batch norm behind it, and where its input comes from:
 *   PIXELS  normalised images, float32, `real_in` channels
 *   NORM    relu(norm(z))
 *   BLOCK   relu(norm(z) + shortcut), which is also written to x
 *   PLAIN   x, every `take`-th pixel of it
 */
typedef struct {
    long images, height, width; /* of the input, after `take` */
    long in, real_in, out, kernel, stride, take, group;
    long input, shortcut, shortcut_channels;
    const float *weight; /* (out, kernel, kernel, real_in) */
    float *weight_grad;
    half *packed, *packed_back; /* the weights as tiles */
    const float *pixels;
    const half *z;
    Norm *norm;
    const half *short_map; /* SAME, PADDED: the block's input; PROJECTED: the projection's z */
    Norm *short_norm;
    half *x;
    half *result;
    Norm *result_norm;
    const half *g; /* gradient at the result's norm */
    half *g_in;    /* gradient at the input's norm; PLAIN: at the input */
    long skip;     /* what the block's other way adds to it: NONE, SAME, PADDED, or PROJECTED by */
    const half *skip_g; /* a projection that takes every `skip_take`-th pixel */
    long skip_take, skip_channels;
} Conv;

/* ---- vectors ---- */

static inline __m512 load(const half *p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

static inline void store(half *p, __m512 v) {
    _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(v));
}

static inline __m512 floats(const float *p) { return _mm512_loadu_ps(p); }

static inline void store_two(half *p, __m512 a, __m512 b) {
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(b, a));
}

static inline __m512 relu(__m512 v) { /* a NaN stays one */
    return _mm512_max_ps(_mm512_setzero_ps(), v);
}

static inline void add_to(float *p, __m512 v) { _mm512_storeu_ps(p, floats(p) + v); }

static inline long smaller(long a, long b) { return a < b ? a : b; }

/* 16 values of `a` and of `b`, side by side. */
static inline __m512i pair(const half *a, const half *b) {
    const __m512i order = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
        23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512i both = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)a));
    both = _mm512_inserti64x4(both, _mm256_loadu_si256((const __m256i *)b), 1);
    return _mm512_permutexvar_epi16(order, both);
}

static void transpose(__m512i r[16]) { /* 16 x 16 of 32 bits */
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

/* ---- a thread's memory ---- */

typedef struct {
    half *input, *gradient; /* positions by channels, with zeros around */
    half *pairs;            /* the input, two positions side by side: from even, from odd ones */
    half *planes;           /* the gradient, channels by positions */
    int32_t *place;         /* position -> pixel of the result, or -1 */
    int32_t *place_in;      /* position -> pixel of the input, or -1 */
    float *weight_grad;     /* (out, taps, in) */
    double *sums;           /* four rows of MOST */
} Memory;

/* How a convolution's positions lie: `pitch` a row, `span` an image, `lead` zeros in front. */
typedef struct {
    long pad, pitch, span, lead, count, taps, chunks_in, chunks_out;
} Layout;

/* Products of 32 inputs that a position's result is made of; with 16 channels one product takes
 * two neighbouring taps. */
static long chunks_of(long channels, long kernel) {
    if (channels == WIDE) return kernel * ((kernel + 1) / 2);
    return kernel * kernel * (channels / 32);
}

static Layout layout_of(const Conv *c) {
    Layout l;
    l.pad = c->kernel / 2;
    l.pitch = c->width + l.pad;
    l.span = (c->height + l.pad) * l.pitch;
    l.lead = l.pad * (l.pitch + 1);
    l.count = c->group * l.span;
    l.taps = c->kernel * c->kernel;
    l.chunks_in = chunks_of(c->in, c->kernel);
    l.chunks_out = chunks_of(c->out, c->kernel);
    return l;
}

static long positions(const Layout *l) { /* with what tiles read beyond the last one */
    return (l->count + 2 * l->lead + 64 + 32 + 63) / 64 * 64;
}

static long bytes(long count) { return (count + 63) / 64 * 64; }

static long layout_memory(const Conv *c, char *base, Memory *m) {
    Layout l = layout_of(c);
    long n = positions(&l), at = 0;
    char *start = (char *)(((uintptr_t)base + 63) / 64 * 64);
#define TAKE(name, size) m->name = (void *)(start + at); at += bytes(size) + 64
    TAKE(sums, 4 * MOST * 8);
    TAKE(weight_grad, c->out * l.taps * c->in * 4);
    TAKE(place, n * 4);
    TAKE(place_in, n * 4);
    TAKE(input, n * c->in * 2);
    TAKE(gradient, n * c->out * 2);
    TAKE(pairs, 2 * n * c->in * 2);
    TAKE(planes, (n + 32) * c->out * 2);
#undef TAKE
    return at + 64;
}

/* Bytes that a thread needs for `c`. */
long scratch(const Conv *c) {
    Memory m;
    return layout_memory(c, 0, &m);
}

/* ---- tiles ---- */

struct config { /* Intel's layout */
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} __attribute__((aligned(64)));

static void begin_tiles(struct config *before) {
    struct config mine = {.palette = 1};
    for (int i = 0; i < 8; i++) mine.bytes[i] = 64, mine.rows[i] = 16;
    _tile_storeconfig(before); /* PyTorch's own kernels use the unit too */
    _tile_loadconfig(&mine);
}

static void end_tiles(const struct config *before) {
    if (before->palette) _tile_loadconfig(before);
    else _tile_release();
}

/* 64 positions by 16 outputs: c[64][16] = sum over chunks of a[offsets[k]..] b[k]. */
static void product_64x16(const half *a, long stride, const int32_t *offsets, long chunks,
                          const half *b, float *c) {
    const char *rows = (const char *)a;
    long step = 16 * stride;
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

/* 32 positions by 32 outputs: c[32][32]; the second 16 outputs' tiles follow the first's. */
static void product_32x32(const half *a, long stride, const int32_t *offsets, long chunks,
                          const half *b, float *c) {
    const char *rows = (const char *)a;
    long step = 16 * stride;
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

/* Up to five tiles of the weights' gradient, c[i] += planes (16 outputs by positions) times
 * pairs[i] (positions by 16 inputs), over `chunks` of 32 positions. */
static void outer_1x5(const half *planes, long plane_bytes, const half *const *pairs,
                      long pair_bytes, long tiles, long chunks, float *const *c, long c_bytes) {
    const char *b0 = (const char *)pairs[0], *b1 = (const char *)pairs[1];
    const char *b2 = (const char *)pairs[2], *b3 = (const char *)pairs[3];
    const char *b4 = (const char *)pairs[4];
    long step = 16 * pair_bytes;
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

/* The same for 32 outputs by two times 16 inputs; the second outputs lie `plane_bytes` and
 * `c_bytes` times 16 further. */
static void outer_2x2(const half *planes, long plane_bytes, const half *const *pairs,
                      long pair_bytes, long chunks, float *const *c, long c_bytes) {
    const char *a = (const char *)planes, *a2 = a + 16 * plane_bytes;
    const char *b = (const char *)pairs[0], *b2 = (const char *)pairs[1];
    char *c0 = (char *)c[0], *c1 = (char *)c[1];
    long step = 16 * pair_bytes;
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

/* ---- weights as tiles ---- */

typedef struct {
    long row, column, channel; /* the first tap, and the first of its channels */
} Chunk;

static Chunk chunk_at(long k, long channels, long kernel) {
    Chunk chunk;
    if (channels == WIDE) {
        long a_row = (kernel + 1) / 2;
        chunk = (Chunk){k / a_row, k % a_row * 2, 0};
    } else {
        long parts = channels / 32, tap = k / parts;
        chunk = (Chunk){tap / kernel, tap % kernel, k % parts * 32};
    }
    return chunk;
}

/* Where each chunk's products begin, in halves from a position's own first one. */
static void offsets_of(int32_t *offsets, long channels, long kernel, const Layout *l) {
    for (long k = 0; k < chunks_of(channels, kernel); k++) {
        Chunk at = chunk_at(k, channels, kernel);
        long shift = (at.row - l->pad) * l->pitch + at.column - l->pad;
        offsets[k] = shift * channels + at.channel;
    }
}

/* Weights to bfloat16 tiles, [16 outputs][chunk][input pair][output][2]; `back` for the gradient
 * of the input, where inputs and outputs change places and the kernel is turned around. Shared
 * among the threads of the region that calls it, which wait for each other at its end. */
static void pack(const Conv *c, int back, half *packed) {
    long from = back ? c->out : c->in, to = back ? c->in : c->out, kernel = c->kernel;
    long chunks = chunks_of(from, kernel), taps = kernel * kernel, real = c->real_in;
    __mmask16 inputs = real < WIDE ? (1u << real) - 1 : 0xffff;
#pragma omp for
    for (long tile = 0; tile < to / WIDE * chunks; tile++) {
        Chunk first = chunk_at(tile % chunks, from, kernel);
        long n = tile / chunks * WIDE, tap = first.row * kernel + first.column;
        int both = from > WIDE || first.column + 1 < kernel; /* or the second half is zero */
        __m512i rows[16];
        for (long i = 0; i < 16; i++) {
            __m512 low, high = _mm512_setzero_ps();
            if (!back) { /* an output's 32 inputs, to be transposed */
                const float *w = c->weight + ((n + i) * taps + tap) * real + first.channel;
                low = _mm512_maskz_loadu_ps(inputs, w);
                if (both) high = _mm512_maskz_loadu_ps(inputs, w + (real < WIDE ? real : WIDE));
                rows[i] = (__m512i)_mm512_cvtne2ps_pbh(high, low);
            } else { /* 16 inputs of two outputs, side by side; the kernel is turned around */
                long later = from == WIDE && i >= 8; /* the second tap's */
                long o = from == WIDE ? 2 * i % WIDE : first.channel + 2 * i;
                const float *w = c->weight + (o * taps + taps - 1 - tap - later) * real + n;
                half two[2 * WIDE];
                low = high;
                if (both || !later) low = floats(w), high = floats(w + taps * real);
                store_two(two, low, high);
                rows[i] = pair(two, two + WIDE);
            }
        }
        if (!back) transpose(rows);
        for (long i = 0; i < 16; i++)
            _mm512_storeu_si512(packed + tile * TILE + 32 * i, rows[i]);
    }
}

/* ---- maps to positions ---- */

/* Which pixel of the map each position is, for `count` images whose map is `stride` times less. */
static void make_places(int32_t *place, const Conv *c, const Layout *l, long stride, long count) {
    long n = positions(l), height = c->height / stride, width = c->width / stride;
    for (long p = 0; p < n; p++) place[p] = -1;
    for (long i = 0; i < count; i++)
        for (long y = 0; y < height; y++)
            for (long x = 0; x < width; x++)
                place[i * l->span + y * stride * l->pitch + x * stride] =
                    (i * height + y) * width + x;
}

/* Zeros in front, between rows and images, and behind as far as products may read. */
static void zero_around(half *map, const Conv *c, const Layout *l, long channels, long count) {
    memset(map, 0, l->lead * channels * 2);
    half *at = map + l->lead * channels;
    memset(at + count * l->span * channels, 0, (l->lead + 33) * channels * 2);
    for (long i = 0; i < count && l->pad; i++) {
        for (long y = 0; y < c->height; y++)
            memset(at + (i * l->span + y * l->pitch + c->width) * channels, 0, channels * 2);
        memset(at + (i * l->span + c->height * l->pitch) * channels, 0, l->pitch * channels * 2);
    }
}

/* 16 channels of a pixel of half the size and fewer channels, zeros around them. */
static __m512 padded(const half *pixel, long first, long channels) {
    float v[WIDE];
    for (long k = first; k < first + WIDE; k++) {
        uint32_t bits = k >= 0 && k < channels ? (uint32_t)pixel[k] << 16 : 0;
        memcpy(v + k - first, &bits, 4);
    }
    return floats(v);
}

/* A row of the block's output: relu(norm(z) + shortcut); writes x too. */
static inline __attribute__((always_inline)) void join_row_by(
    const Conv *c, long shortcut, long image, long y, half *to) {
    long channels = c->in, width = c->width, row = (image * c->height + y) * width * channels;
    long less = (channels - c->shortcut_channels) / 2;
    const half *twice = c->short_map; /* PADDED: this row of the larger map */
    if (shortcut == PADDED)
        twice += (image * 2 * c->height + 2 * y) * 2 * width * c->shortcut_channels;
    for (long k = 0; k < channels; k += WIDE) {
        __m512 a = floats(c->norm->scale + k), b = floats(c->norm->shift + k), d = a;
        if (shortcut == PROJECTED) {
            b += floats(c->short_norm->shift + k);
            d = floats(c->short_norm->scale + k);
        }
        for (long p = 0; p < width; p++) {
            long at = p * channels + k;
            __m512 v = load(c->z + row + at) * a + b;
            if (shortcut == SAME) v += load(c->short_map + row + at);
            if (shortcut == PROJECTED) v += load(c->short_map + row + at) * d;
            if (shortcut == PADDED)
                v += padded(twice + 2 * p * c->shortcut_channels, k - less, c->shortcut_channels);
            v = relu(v);
            store(c->x + row + at, v);
            if (to) store(to + at, v);
        }
    }
}

static void join_row(const Conv *c, long image, long y, half *to) {
    if (c->shortcut == SAME) join_row_by(c, SAME, image, y, to);
    else if (c->shortcut == PADDED) join_row_by(c, PADDED, image, y, to);
    else if (c->shortcut == PROJECTED) join_row_by(c, PROJECTED, image, y, to);
    else join_row_by(c, NONE, image, y, to);
}

/* The convolution's input, at its positions. `again`: x has been written already. */
static void lay_input(const Conv *c, const Layout *l, long first, long count, int again, half *map) {
    zero_around(map, c, l, c->in, count);
    for (long i = 0; i < count; i++)
        for (long y = 0; y < c->height; y++) {
            half *to = map + (l->lead + i * l->span + y * l->pitch) * c->in;
            long row = ((first + i) * c->height + y) * c->width;
            if (c->input == PIXELS) {
                const float *from = c->pixels + row * c->real_in;
                __mmask16 real = (1u << c->real_in) - 1;
                for (long p = 0; p < c->width; p++)
                    store(to + p * WIDE, _mm512_maskz_loadu_ps(real, from + p * c->real_in));
            } else if (c->input == NORM) {
                const half *from = c->z + row * c->in;
                long next = c->in > WIDE ? WIDE : 0, step = next ? c->in : 2 * WIDE;
                for (long k = 0; k < c->in; k += 2 * WIDE) { /* 32 channels, or 16 of two pixels */
                    const float *scale = c->norm->scale + k, *shift = c->norm->shift + k;
                    __m512 a = floats(scale), a2 = floats(scale + next);
                    __m512 b = floats(shift), b2 = floats(shift + next);
                    for (long at = k; at < c->width * c->in; at += step)
                        store_two(to + at, relu(load(from + at) * a + b),
                                  relu(load(from + at + WIDE) * a2 + b2));
                }
            } else if (c->input == BLOCK && !again) {
                join_row(c, first + i, y, to);
            } else if (c->take == 1) {
                memcpy(to, c->x + row * c->in, c->width * c->in * 2);
            } else {
                long wide = c->width * c->take, high = c->height * c->take;
                const half *from = c->x + ((first + i) * high + y * c->take) * wide * c->in;
                for (long p = 0; p < c->width; p++)
                    memcpy(to + p * c->in, from + p * c->take * c->in, c->in * 2);
            }
        }
}

/* The gradient at the convolution's raw result, at its positions: dz = g a + z b + c. */
static void lay_gradient(const Conv *c, const Layout *l, long first, long count, half *map) {
    const Norm *norm = c->result_norm;
    long s = c->stride, height = c->height / s, width = c->width / s, out = c->out;
    if (s > 1) memset(map, 0, positions(l) * out * 2);
    else zero_around(map, c, l, out, count);
    for (long i = 0; i < count; i++)
        for (long y = 0; y < height; y++) {
            half *to = map + (l->lead + i * l->span + y * s * l->pitch) * out;
            long row = ((first + i) * height + y) * width * out;
            const half *g = c->g + row, *z = c->result + row;
            for (long k = 0; k < out; k += WIDE) {
                __m512 a = floats(norm->by_g + k), b = floats(norm->by_z + k);
                __m512 constant = floats(norm->constant + k);
                for (long p = 0; p < width; p++) {
                    long at = p * out + k;
                    store(to + p * s * out + k, load(g + at) * a + (load(z + at) * b + constant));
                }
            }
        }
}

/* ---- positions side by side, and channels by positions ---- */

static void make_pairs(const half *map, long channels, long n, int odd, half *pairs) {
    map += odd * channels;
    for (long p = 0; p + odd + 1 < n; p += 2)
        for (long k = 0; k < channels; k += WIDE) {
            const half *at = map + p * channels + k;
            _mm512_storeu_si512(pairs + p * channels + 2 * k, pair(at, at + channels));
        }
}

/* (positions, channels) -> (channels, pitch), the first `count` positions, a multiple of 32. */
static void make_planes(const half *map, long channels, long count, long pitch, half *planes) {
    for (long k = 0; k < channels; k += WIDE)
        for (long p = 0; p < count; p += 32) {
            __m512i r[16];
            for (int i = 0; i < 16; i++) {
                const half *at = map + (p + 2 * i) * channels + k;
                r[i] = pair(at, at + channels);
            }
            transpose(r);
            for (int i = 0; i < 16; i++)
                _mm512_storeu_si512(planes + (k + i) * pitch + p, r[i]);
        }
}

/* ---- forward ---- */

static void gather(double *sums, const float *group, long channels, long rows) {
    for (long r = 0; r < rows; r++)
        for (long k = 0; k < channels; k++) sums[r * MOST + k] += group[r * MOST + k];
}

/* Results of one product to the map, and their sums and squares. */
static void keep_results(const Conv *c, const float *tile, long rows, long wide,
                         const int32_t *place, long first_pixel, long k, float *sums) {
    for (long v = 0; v < wide; v += WIDE) {
        __m512 sum = _mm512_setzero_ps(), squares = sum;
        half *to = c->result + first_pixel * c->out + k + v;
        for (long p = 0; p < rows; p++) {
            if (place[p] < 0) continue;
            __m512 value = floats(tile + p * wide + v);
            store(to + place[p] * c->out, value);
            sum += value;
            squares += value * value;
        }
        add_to(sums + k + v, sum);
        add_to(sums + MOST + k + v, squares);
    }
}

/* Mean, deviation, scale and shift from all threads' sums; the running statistics move. */
static void finish_norm(Norm *norm, const Memory *all, long channels, double rows) {
#pragma omp for
    for (long k = 0; k < channels; k++) {
        double sum = 0, squares = 0;
        for (int t = 0; t < omp_get_num_threads(); t++) {
            sum += all[t].sums[k];
            squares += all[t].sums[MOST + k];
        }
        double mean = sum / rows, var = squares / rows - mean * mean;
        if (var < 0) var = 0; /* by rounding; a NaN passes */
        norm->mean[k] = mean;
        norm->invstd[k] = 1 / sqrt(var + norm->eps);
        norm->scale[k] = norm->weight[k] * norm->invstd[k];
        norm->shift[k] = norm->bias[k] - norm->mean[k] * norm->scale[k];
        norm->running_mean[k] += norm->momentum * (norm->mean[k] - norm->running_mean[k]);
        norm->running_var[k] +=
            norm->momentum * ((float)(var * rows / (rows - 1)) - norm->running_var[k]);
    }
}

static void my_share(long groups, long *first, long *end) {
    long thread = omp_get_thread_num(), threads = omp_get_num_threads();
    *first = groups * thread / threads;
    *end = groups * (thread + 1) / threads;
}

/* z = conv(input), and the statistics of the batch norm behind it. `arena` holds `arena_bytes`
 * for each thread. */
void forward(const Conv *c, char *arena, long arena_bytes) {
    Memory all[omp_get_max_threads()];
    Layout l = layout_of(c);
#pragma omp parallel
    {
        Memory *m = all + omp_get_thread_num();
        layout_memory(c, arena + omp_get_thread_num() * arena_bytes, m);
        struct config before;
        begin_tiles(&before);
        pack(c, 0, c->packed);
        memset(m->sums, 0, 2 * MOST * sizeof *m->sums);
        int32_t offsets[l.chunks_in];
        offsets_of(offsets, c->in, c->kernel, &l);
        long group, end, groups = (c->images + c->group - 1) / c->group, placed = 0;
        long size = c->height * c->width / (c->stride * c->stride);
        long rows = c->out == WIDE ? 64 : 32, wide = c->out == WIDE ? WIDE : 2 * WIDE;
        float tile[64 * WIDE] __attribute__((aligned(64)));
        for (my_share(groups, &group, &end); group < end; group++) {
            long first = group * c->group, count = smaller(c->group, c->images - first);
            float sums[2 * MOST] = {0};
            if (count != placed) make_places(m->place, c, &l, c->stride, placed = count);
            lay_input(c, &l, first, count, 0, m->input);
            for (long k = 0; k < c->out; k += wide)
                for (long p = 0; p < count * l.span - l.pad * l.pitch; p += rows) {
                    const half *a = m->input + (l.lead + p) * c->in;
                    const half *b = c->packed + k / WIDE * l.chunks_in * TILE;
                    if (wide == WIDE) product_64x16(a, 2 * c->in, offsets, l.chunks_in, b, tile);
                    else product_32x32(a, 2 * c->in, offsets, l.chunks_in, b, tile);
                    keep_results(c, tile, rows, wide, m->place + p, first * size, k, sums);
                }
            gather(m->sums, sums, c->out, 2);
        }
        end_tiles(&before);
#pragma omp barrier
        finish_norm(c->result_norm, all, c->out, (double)c->images * size);
    }
}

/* ---- backward ---- */

/* What the block's other way adds to the gradient at a pixel of its input; zero for most pixels
 * where that way takes every other one. */
static inline __m512 skipped(const Conv *c, long pixel, long k) {
    if (c->skip == SAME) return load(c->skip_g + pixel * c->in + k);
    long step = c->skip_take, width = c->width, x = pixel % width, y = pixel / width;
    if (x % step || y % step) return _mm512_setzero_ps(); /* heights are even: y may run on */
    long at = y / step * (width / step) + x / step;
    if (c->skip == PROJECTED) return load(c->skip_g + at * c->in + k);
    long before = (c->skip_channels - c->in) / 2;
    return load(c->skip_g + at * c->skip_channels + before + k);
}

/* Gradients at the input from one product: the other way's is added, ReLU's mask laid on, the
 * sums for the gradient of the batch norm before it taken. */
static inline __attribute__((always_inline)) void keep_gradients_by(
    const Conv *c, long input, long skip, long projected, const float *tile, long rows, long wide,
    const int32_t *place, long first_pixel, long k, float *sums) {
    long channels = c->in;
    for (long v = 0; v < wide; v += WIDE) {
        long from = first_pixel * channels + k + v;
        const half *z = c->z + from, *x = c->x + from, *other = c->short_map + from;
        const half *also = c->skip_g + from;
        half *to = c->g_in + from;
        __m512 zero = _mm512_setzero_ps(), sum = zero, products = zero, others = zero;
        __m512 scale = zero, shift = zero, mean = zero, other_mean = zero;
        if (input != PLAIN) {
            scale = floats(c->norm->scale + k + v);
            shift = floats(c->norm->shift + k + v);
            mean = floats(c->norm->mean + k + v);
        }
        if (projected) other_mean = floats(c->short_norm->mean + k + v);
        for (long p = 0; p < rows; p++) {
            if (place[p] < 0) continue;
            long at = place[p] * channels;
            __m512 g = floats(tile + p * wide + v);
            if (skip == SAME) g += load(also + at);
            else if (skip) g += skipped(c, first_pixel + place[p], k + v);
            if (input != PLAIN) {
                __m512 value = load(z + at), y = value * scale + shift;
                if (input == BLOCK) y = load(x + at);
                g = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y, zero, _CMP_NLE_UQ), g);
                sum += g;
                products += g * (value - mean);
                if (projected) others += g * (load(other + at) - other_mean);
            }
            store(to + at, g);
        }
        add_to(sums + k + v, sum);
        add_to(sums + MOST + k + v, products);
        add_to(sums + 2 * MOST + k + v, others);
    }
}

static void keep_gradients(const Conv *c, const float *tile, long rows, long wide,
                           const int32_t *place, long first_pixel, long k, float *sums) {
#define KEEP(input, skip, projected) \
    keep_gradients_by(c, input, skip, projected, tile, rows, wide, place, first_pixel, k, sums)
    if (c->input == NORM) KEEP(NORM, NONE, 0);
    else if (c->input == PLAIN) KEEP(PLAIN, NONE, 0);
    else if (c->shortcut == PROJECTED) KEEP(BLOCK, c->skip, 1);
    else if (c->skip == SAME) KEEP(BLOCK, SAME, 0);
    else KEEP(BLOCK, c->skip, 0);
#undef KEEP
}

/* The gradients of a batch norm's weights from all threads' sums, and how dz is made of g and z:
 * dz = scale (g - sum / rows - (z - mean) invstd^2 products / rows). */
static void finish_gradient(Norm *norm, const Memory *all, long row, long channels, double rows) {
#pragma omp for
    for (long k = 0; k < channels; k++) {
        double sum = 0, products = 0;
        for (int t = 0; t < omp_get_num_threads(); t++) {
            sum += all[t].sums[k];
            products += all[t].sums[row * MOST + k];
        }
        double invstd = norm->invstd[k], scale = norm->scale[k];
        norm->bias_grad[k] = sum;
        norm->weight_grad[k] = products * invstd;
        double by_z = -scale * invstd * invstd * products / rows;
        norm->by_g[k] = scale;
        norm->by_z[k] = by_z;
        norm->constant[k] = -scale * sum / rows - by_z * norm->mean[k];
    }
}

/* += the weights' gradient of the images that lie at the positions. */
static void weigh(const Conv *c, const Layout *l, Memory *m, long count) {
    long n = positions(l), used = (count * l->span + 31) / 32 * 32;
    long plane_pitch = n + 32; /* an odd number of cache lines */
    make_pairs(m->input, c->in, n, 0, m->pairs);
    if (l->pad) make_pairs(m->input, c->in, n, 1, m->pairs + n * c->in);
    make_planes(m->gradient + l->lead * c->out, c->out, used, plane_pitch, m->planes);
    /* Tiles of 16 inputs of a tap, five for 16 outputs at a time, or two for 32. */
    long tiles = l->taps * c->in / WIDE, together = c->out == WIDE || tiles % 2 ? 5 : 2;
    long row_bytes = 4 * l->taps * c->in, rows = together == 2 ? 2 * WIDE : WIDE;
    for (long o = 0; o < c->out; o += rows)
        for (long t = 0; t < tiles; t += together) {
            const half *b[5];
            float *to[5];
            for (long j = 0; j < together; j++) {
                long tile = smaller(t + j, tiles - 1), tap = tile / (c->in / WIDE);
                long channel = tile % (c->in / WIDE) * WIDE;
                long row = tap / c->kernel - l->pad, column = tap % c->kernel - l->pad;
                long from = l->lead + row * l->pitch + column;
                b[j] = m->pairs + (from % 2 ? n * c->in : 0) + from / 2 * 2 * c->in + 2 * channel;
                to[j] = m->weight_grad + (o * l->taps + tap) * c->in + channel;
            }
            const half *a = m->planes + o * plane_pitch;
            if (together == 2)
                outer_2x2(a, 2 * plane_pitch, b, 4 * c->in, used / 32, to, row_bytes);
            else
                outer_1x5(a, 2 * plane_pitch, b, 4 * c->in, smaller(5, tiles - t), used / 32, to,
                          row_bytes);
        }
}

/* The weights' gradient, and the gradient at the input with what the batch norms before it need;
 * no such gradient for PIXELS. */
void backward(const Conv *c, char *arena, long arena_bytes) {
    Memory all[omp_get_max_threads()];
    Layout l = layout_of(c);
#pragma omp parallel
    {
        Memory *m = all + omp_get_thread_num();
        layout_memory(c, arena + omp_get_thread_num() * arena_bytes, m);
        struct config before;
        begin_tiles(&before);
        if (c->input != PIXELS) pack(c, 1, c->packed_back);
        memset(m->sums, 0, 3 * MOST * sizeof *m->sums);
        memset(m->weight_grad, 0, c->out * l.taps * c->in * 4);
        int32_t offsets[l.chunks_out];
        offsets_of(offsets, c->out, c->kernel, &l);
        long group, end, groups = (c->images + c->group - 1) / c->group, placed = 0;
        long rows = c->in == WIDE ? 64 : 32, wide = c->in == WIDE ? WIDE : 2 * WIDE;
        float tile[64 * WIDE] __attribute__((aligned(64)));
        for (my_share(groups, &group, &end); group < end; group++) {
            long first = group * c->group, count = smaller(c->group, c->images - first);
            lay_input(c, &l, first, count, 1, m->input);
            lay_gradient(c, &l, first, count, m->gradient);
            weigh(c, &l, m, count);
            if (c->input == PIXELS) continue;
            float sums[3 * MOST] = {0};
            if (count != placed) make_places(m->place_in, c, &l, 1, placed = count);
            for (long k = 0; k < c->in; k += wide)
                for (long p = 0; p < count * l.span - l.pad * l.pitch; p += rows) {
                    const half *a = m->gradient + (l.lead + p) * c->out;
                    const half *b = c->packed_back + k / WIDE * l.chunks_out * TILE;
                    if (wide == WIDE) product_64x16(a, 2 * c->out, offsets, l.chunks_out, b, tile);
                    else product_32x32(a, 2 * c->out, offsets, l.chunks_out, b, tile);
                    keep_gradients(c, tile, rows, wide, m->place_in + p,
                                   first * c->height * c->width, k, sums);
                }
            gather(m->sums, sums, c->in, 3);
        }
        end_tiles(&before);
#pragma omp barrier
#pragma omp for
        for (long row = 0; row < c->out * l.taps; row++)
            for (long i = 0; i < c->in; i += WIDE) {
                __m512 sum = floats(all[0].weight_grad + row * c->in + i);
                for (int t = 1; t < omp_get_num_threads(); t++)
                    sum += floats(all[t].weight_grad + row * c->in + i);
                __mmask16 real = c->real_in < WIDE ? (1u << c->real_in) - 1 : 0xffff;
                _mm512_mask_storeu_ps(c->weight_grad + row * c->real_in + i, real, sum);
            }
        double pixels = (double)c->images * c->height * c->width;
        if (c->norm) finish_gradient(c->norm, all, 1, c->in, pixels);
        if (c->shortcut == PROJECTED) finish_gradient(c->short_norm, all, 2, c->in, pixels);
    }
}

/* ---- the end of the network: the last block's output and its mean over the map ---- */

/* `c` is a BLOCK without a convolution; pooled: (images, in). */
void pool_forward(const Conv *c, float *pooled) {
#pragma omp parallel for
    for (long i = 0; i < c->images; i++) {
        long size = c->height * c->width;
        for (long y = 0; y < c->height; y++) join_row(c, i, y, 0);
        for (long k = 0; k < c->in; k += WIDE) {
            __m512 sum = _mm512_setzero_ps();
            for (long p = 0; p < size; p++) sum += load(c->x + (i * size + p) * c->in + k);
            _mm512_storeu_ps(pooled + i * c->in + k, sum * _mm512_set1_ps(1.0f / size));
        }
    }
}

void pool_backward(const Conv *c, const float *pooled_grad) {
    Memory all[omp_get_max_threads()];
    double sums[omp_get_max_threads() * 4 * MOST];
#pragma omp parallel
    {
        Memory *m = all + omp_get_thread_num();
        m->sums = sums + omp_get_thread_num() * 4 * MOST;
        memset(m->sums, 0, 4 * MOST * sizeof *m->sums);
        long image, end, size = c->height * c->width;
        int32_t place[size];
        for (long p = 0; p < size; p++) place[p] = p;
        float spread[size * WIDE];
        for (my_share(c->images, &image, &end); image < end; image++) {
            float group[3 * MOST] = {0};
            for (long k = 0; k < c->in; k += WIDE) {
                __m512 g = floats(pooled_grad + image * c->in + k) * _mm512_set1_ps(1.0f / size);
                for (long p = 0; p < size; p++) _mm512_storeu_ps(spread + p * WIDE, g);
                keep_gradients(c, spread, size, WIDE, place, image * size, k, group);
            }
            gather(m->sums, group, c->in, 3);
        }
#pragma omp barrier
        double pixels = (double)c->images * size;
        finish_gradient(c->norm, all, 1, c->in, pixels);
        if (c->shortcut == PROJECTED) finish_gradient(c->short_norm, all, 2, c->in, pixels);
    }
}

/* ---- before use ---- */

/* How many threads a call will run on; asked before use, to see that they are PyTorch's own. */
int threads(void) { return omp_get_max_threads(); }

/* Whether the processor has the unit and the system lets this process use it. */
int ready(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return __builtin_cpu_supports("avx512bf16") &&
           syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
