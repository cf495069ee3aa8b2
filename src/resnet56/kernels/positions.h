/* From maps to rows of positions, and weights to tiles: what a convolution's products are made of.
 */
#include <omp.h>
#include <stddef.h>

#include "tiles.h"

enum { MAX_CHANNELS = 256 }; /* channels */
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
    bf16 *packed, *packed_back; /* the weights as tiles */
    const float *pixels;
    const bf16 *z;
    Norm *norm;
    const bf16 *short_map; /* SAME, PADDED: the block's input; PROJECTED: the projection's z */
    Norm *short_norm;
    bf16 *x;
    bf16 *result;
    Norm *result_norm;
    const bf16 *g; /* gradient at the result's norm */
    bf16 *g_in;    /* gradient at the input's norm; PLAIN: at the input */
    /* What the block's other way adds to g_in: NONE, SAME, PADDED, or PROJECTED by a convolution
     * that takes every `skip_take`-th pixel. */
    long skip;
    const bf16 *skip_g;
    long skip_take, skip_channels;
} Conv;

/* The layout of the structs that plan.py mirrors. It compares them when it loads the library: a
 * field that is on one side only, or elsewhere, would shift what every pointer behind it means. */
typedef struct {
    const char *name; /* of a field; "sizeof" for the whole struct; null at the end */
    long offset;
} Field;

#define FIELD(name) {#name, offsetof(STRUCT, name)}
#define STRUCT Norm
const Field resnet56_norm_fields[] = {
    FIELD(weight), FIELD(bias), FIELD(running_mean), FIELD(running_var), FIELD(mean),
    FIELD(invstd), FIELD(scale), FIELD(shift), FIELD(by_g), FIELD(by_z), FIELD(constant),
    FIELD(weight_grad), FIELD(bias_grad), FIELD(momentum), FIELD(eps),
    {"sizeof", sizeof(STRUCT)}, {0, 0},
};
#undef STRUCT
#define STRUCT Conv
const Field resnet56_conv_fields[] = {
    FIELD(images), FIELD(height), FIELD(width), FIELD(in), FIELD(real_in), FIELD(out),
    FIELD(kernel), FIELD(stride), FIELD(take), FIELD(group), FIELD(input), FIELD(shortcut),
    FIELD(shortcut_channels), FIELD(weight), FIELD(weight_grad), FIELD(packed),
    FIELD(packed_back), FIELD(pixels), FIELD(z), FIELD(norm), FIELD(short_map),
    FIELD(short_norm), FIELD(x), FIELD(result), FIELD(result_norm), FIELD(g), FIELD(g_in),
    FIELD(skip), FIELD(skip_g), FIELD(skip_take), FIELD(skip_channels),
    {"sizeof", sizeof(STRUCT)}, {0, 0},
};
#undef STRUCT
#undef FIELD

typedef struct {
    bf16 *input, *gradient; /* positions by channels, with zeros around */
    bf16 *pairs;            /* the input, two positions side by side: from even, from odd ones */
    bf16 *planes;           /* the gradient, channels by positions */
    int32_t *pixel_of;         /* position -> pixel of the map that is written, or -1 */
    float *weight_grad;     /* (out, taps, in) */
    double *sums;           /* three rows of MAX_CHANNELS */
} Memory;

/* The row of positions of two images of 3x2 pixels (height 3, width 2) under a 3x3 kernel, so that
 * `pad` is 1. Digits are the pixels of image 0 and letters those of image 1; a dot is a zero:
 *
 *     . . . .  0 1 .  2 3 .  4 5 .  . . .  a b .  c d .  e f .  . . .  . . . ...
 *     |        |      |             |      |
 *     |        |      pitch = 3     |      span = 12 further than image 0
 *     |        position 0           the row of zeros under image 0, above image 1
 *     lead = pad * (pitch + 1) = 4 zeros
 *
 * The kernel's tap (row r, column c) of the position p is p + (r - pad) * pitch + (c - pad): the
 * dot behind a row is the padding to its right and, read from the next row, to that one's left.
 * Results at positions that are no pixels are computed too, and not kept (`pixel_of` is -1).
 *
 * How a convolution's positions lie: `pitch` a row, `span` an image, `lead` zeros in front. */
typedef struct {
    long pad, pitch, span, lead, count, taps, chunks_in, chunks_out;
} Layout;

/* Products of 32 inputs that a position's result is made of; with 16 channels one product takes
 * two neighbouring taps. */
static long chunks_of(long channels, long kernel) {
    if (channels == LANES) return kernel * ((kernel + 1) / 2);
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
    TAKE(sums, 3 * MAX_CHANNELS * 8);
    TAKE(weight_grad, c->out * l.taps * c->in * 4);
    TAKE(pixel_of, n * 4);
    TAKE(input, n * c->in * 2);
    TAKE(gradient, n * c->out * 2);
    TAKE(pairs, 2 * n * c->in * 2);
    TAKE(planes, (n + 32) * c->out * 2);
#undef TAKE
    return at + 64;
}

/* Bytes that a thread needs for `c`. */
long resnet56_scratch_bytes(const Conv *c) {
    Memory m;
    return layout_memory(c, 0, &m);
}

typedef struct {
    long row, column, channel; /* the first tap, and the first of its channels */
} Chunk;

static Chunk chunk_at(long k, long channels, long kernel) {
    Chunk chunk;
    if (channels == LANES) {
        long a_row = (kernel + 1) / 2;
        chunk = (Chunk){k / a_row, k % a_row * 2, 0};
    } else {
        long parts = channels / 32, tap = k / parts;
        chunk = (Chunk){tap / kernel, tap % kernel, k % parts * 32};
    }
    return chunk;
}

/* Where each chunk's products begin, in values from a position's own first one. */
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
static void pack(const Conv *c, int back, bf16 *packed) {
    long from = back ? c->out : c->in, to = back ? c->in : c->out, kernel = c->kernel;
    long chunks = chunks_of(from, kernel), taps = kernel * kernel, real = c->real_in;
    __mmask16 inputs = real < LANES ? (1u << real) - 1 : 0xffff;
#pragma omp for
    for (long tile = 0; tile < to / LANES * chunks; tile++) {
        Chunk first = chunk_at(tile % chunks, from, kernel);
        long n = tile / chunks * LANES, tap = first.row * kernel + first.column;
        int both = from > LANES || first.column + 1 < kernel; /* or the second half is zero */
        __m512i rows[16];
        for (long i = 0; i < 16; i++) {
            __m512 low, high = _mm512_setzero_ps();
            if (!back) { /* an output's 32 inputs, to be transposed */
                const float *w = c->weight + ((n + i) * taps + tap) * real + first.channel;
                low = _mm512_maskz_loadu_ps(inputs, w);
                if (both) high = _mm512_maskz_loadu_ps(inputs, w + (real < LANES ? real : LANES));
                rows[i] = (__m512i)_mm512_cvtne2ps_pbh(high, low);
            } else { /* 16 inputs of two outputs, side by side; the kernel is turned around */
                long later = from == LANES && i >= 8; /* the second tap's */
                long o = from == LANES ? 2 * i % LANES : first.channel + 2 * i;
                const float *w = c->weight + (o * taps + taps - 1 - tap - later) * real + n;
                bf16 two[2 * LANES];
                low = high;
                if (both || !later) low = floats(w), high = floats(w + taps * real);
                store_two(two, low, high);
                rows[i] = pair(two, two + LANES);
            }
        }
        if (!back) transpose(rows);
        for (long i = 0; i < 16; i++)
            _mm512_storeu_si512(packed + tile * TILE + 32 * i, rows[i]);
    }
}

/* Which pixel of the map each position is, for `count` images whose map is `stride` times less. */
static void map_pixels(int32_t *pixel_of, const Conv *c, const Layout *l, long stride, long count) {
    long n = positions(l), height = c->height / stride, width = c->width / stride;
    for (long p = 0; p < n; p++) pixel_of[p] = -1;
    for (long i = 0; i < count; i++)
        for (long y = 0; y < height; y++)
            for (long x = 0; x < width; x++)
                pixel_of[i * l->span + y * stride * l->pitch + x * stride] =
                    (i * height + y) * width + x;
}

/* Zeros in front, between rows and images, and behind as far as products may read. */
static void zero_around(bf16 *map, const Conv *c, const Layout *l, long channels, long count) {
    memset(map, 0, l->lead * channels * 2);
    bf16 *at = map + l->lead * channels;
    memset(at + count * l->span * channels, 0, (l->lead + 33) * channels * 2);
    for (long i = 0; i < count && l->pad; i++) {
        for (long y = 0; y < c->height; y++)
            memset(at + (i * l->span + y * l->pitch + c->width) * channels, 0, channels * 2);
        memset(at + (i * l->span + c->height * l->pitch) * channels, 0, l->pitch * channels * 2);
    }
}

/* 16 channels of a pixel of the larger map, which has fewer channels; zeros around them. */
static __m512 padded(const bf16 *pixel, long first, long channels) {
    float v[LANES];
    for (long k = first; k < first + LANES; k++) {
        uint32_t bits = k >= 0 && k < channels ? (uint32_t)pixel[k] << 16 : 0;
        memcpy(v + k - first, &bits, 4);
    }
    return floats(v);
}

/* A row of the block's output: relu(norm(z) + shortcut); writes x too. */
static inline __attribute__((always_inline)) void join_row_by(
    const Conv *c, long shortcut, long image, long y, bf16 *to) {
    long channels = c->in, width = c->width, row = (image * c->height + y) * width * channels;
    long less = (channels - c->shortcut_channels) / 2;
    const bf16 *twice = c->short_map; /* PADDED: this row of the larger map */
    if (shortcut == PADDED)
        twice += (image * 2 * c->height + 2 * y) * 2 * width * c->shortcut_channels;
    for (long k = 0; k < channels; k += LANES) {
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

static void join_row(const Conv *c, long image, long y, bf16 *to) {
    if (c->shortcut == SAME) join_row_by(c, SAME, image, y, to);
    else if (c->shortcut == PADDED) join_row_by(c, PADDED, image, y, to);
    else if (c->shortcut == PROJECTED) join_row_by(c, PROJECTED, image, y, to);
    else join_row_by(c, NONE, image, y, to);
}

/* The convolution's input, at its positions. `again`: x has been written already. */
static void lay_input(const Conv *c, const Layout *l, long first, long count, int again,
                      bf16 *map) {
    zero_around(map, c, l, c->in, count);
    for (long i = 0; i < count; i++)
        for (long y = 0; y < c->height; y++) {
            bf16 *to = map + (l->lead + i * l->span + y * l->pitch) * c->in;
            long row = ((first + i) * c->height + y) * c->width;
            if (c->input == PIXELS) {
                const float *from = c->pixels + row * c->real_in;
                __mmask16 real = (1u << c->real_in) - 1;
                for (long p = 0; p < c->width; p++)
                    store(to + p * LANES, _mm512_maskz_loadu_ps(real, from + p * c->real_in));
            } else if (c->input == NORM) {
                const bf16 *from = c->z + row * c->in;
                long next = c->in > LANES ? LANES : 0, step = next ? c->in : 2 * LANES;
                for (long k = 0; k < c->in; k += 2 * LANES) { /* 32 channels, or 16 of two pixels */
                    const float *scale = c->norm->scale + k, *shift = c->norm->shift + k;
                    __m512 a = floats(scale), a2 = floats(scale + next);
                    __m512 b = floats(shift), b2 = floats(shift + next);
                    for (long at = k; at < c->width * c->in; at += step)
                        store_two(to + at, relu(load(from + at) * a + b),
                                  relu(load(from + at + LANES) * a2 + b2));
                }
            } else if (c->input == BLOCK && !again) {
                join_row(c, first + i, y, to);
            } else if (c->take == 1) {
                memcpy(to, c->x + row * c->in, c->width * c->in * 2);
            } else {
                long wide = c->width * c->take, high = c->height * c->take;
                const bf16 *from = c->x + ((first + i) * high + y * c->take) * wide * c->in;
                for (long p = 0; p < c->width; p++)
                    memcpy(to + p * c->in, from + p * c->take * c->in, c->in * 2);
            }
        }
}

/* The gradient at the convolution's raw result, at its positions: dz = g a + z b + c. */
static void lay_gradient(const Conv *c, const Layout *l, long first, long count, bf16 *map) {
    const Norm *norm = c->result_norm;
    long s = c->stride, height = c->height / s, width = c->width / s, out = c->out;
    if (s > 1) memset(map, 0, positions(l) * out * 2);
    else zero_around(map, c, l, out, count);
    for (long i = 0; i < count; i++)
        for (long y = 0; y < height; y++) {
            bf16 *to = map + (l->lead + i * l->span + y * s * l->pitch) * out;
            long row = ((first + i) * height + y) * width * out;
            const bf16 *g = c->g + row, *z = c->result + row;
            for (long k = 0; k < out; k += LANES) {
                __m512 a = floats(norm->by_g + k), b = floats(norm->by_z + k);
                __m512 constant = floats(norm->constant + k);
                for (long p = 0; p < width; p++) {
                    long at = p * out + k;
                    store(to + p * s * out + k, load(g + at) * a + (load(z + at) * b + constant));
                }
            }
        }
}

static void make_pairs(const bf16 *map, long channels, long n, int odd, bf16 *pairs) {
    map += odd * channels;
    for (long p = 0; p + odd + 1 < n; p += 2)
        for (long k = 0; k < channels; k += LANES) {
            const bf16 *at = map + p * channels + k;
            _mm512_storeu_si512(pairs + p * channels + 2 * k, pair(at, at + channels));
        }
}

/* (positions, channels) -> (channels, pitch), the first `count` positions, a multiple of 32. */
static void make_planes(const bf16 *map, long channels, long count, long pitch, bf16 *planes) {
    for (long k = 0; k < channels; k += LANES)
        for (long p = 0; p < count; p += 32) {
            __m512i r[16];
            for (int i = 0; i < 16; i++) {
                const bf16 *at = map + (p + 2 * i) * channels + k;
                r[i] = pair(at, at + channels);
            }
            transpose(r);
            for (int i = 0; i < 16; i++)
                _mm512_storeu_si512(planes + (k + i) * pitch + p, r[i]);
        }
}
