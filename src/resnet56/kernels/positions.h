/* Converts feature maps to rows of positions, and weights to tiles. */
#include <omp.h>
#include <stddef.h>

#include "vectors.h"

enum { TILE = 512 };         /* bfloat16 values per tile of the weights */
enum { MAX_CHANNELS = 256 }; /* maximum number of inputs or outputs of a convolution */
enum input { PIXELS, NORM, BLOCK, PLAIN };
enum shortcut { NONE, IDENTITY, PADDED, PROJECTED };

/* A batch norm, y = z * scale + shift, and the coefficients of its gradient,
 * dz = g * g_scale + z * z_scale + constant. Each pointer points to an array with one float per
 * channel. */
typedef struct {
    float *weight, *bias, *running_mean, *running_var;
    float *mean, *invstd, *scale, *shift;
    float *g_scale, *z_scale, *constant, *weight_grad, *bias_grad;
    float momentum, eps;
} Norm;

/* A convolution, the batch norm after it, and the source of its input:
 *   PIXELS  normalized images, float32, `real_in` channels
 *   NORM    relu(norm(z))
 *   BLOCK   relu(norm(z) + shortcut), also written to x
 *   PLAIN   every `input_stride`-th row and column of x
 */
typedef struct {
    long images, height, width; /* size of the input after `input_stride` */
    long in, real_in, out, kernel, stride, input_stride, group;
    long input, shortcut, shortcut_channels;
    const float *weight; /* (out, kernel, kernel, real_in) */
    float *weight_grad;
    bf16 *packed, *packed_back; /* the weights as tiles */
    const float *pixels;
    const bf16 *z;
    Norm *norm;
    const bf16 *shortcut_map; /* the block's input, or z of the projection for PROJECTED */
    Norm *shortcut_norm;
    bf16 *x;
    bf16 *result;
    Norm *result_norm;
    const bf16 *g; /* gradient of the output of result_norm */
    bf16 *g_in;    /* gradient of the output of norm, or gradient of a PLAIN input */
    /* The shortcut that starts at this input: NONE, IDENTITY, PADDED or PROJECTED. The shortcut
     * reads every `skip_stride`-th row and column. The backward pass adds its gradient skip_g to
     * g_in. */
    long skip;
    const bf16 *skip_g;
    long skip_stride, skip_channels;
} Conv;

/* Layouts of the structs. plan.py compares them with its own structs when it loads the library,
 * because a missing or moved field would shift all later fields. */
typedef struct {
    const char *name; /* name of a field, "sizeof" for the struct, or null at the end */
    long offset;
} Field;

#define FIELD(name) {#name, offsetof(STRUCT, name)}
#define STRUCT Norm
const Field resnet56_norm_fields[] = {
    FIELD(weight), FIELD(bias), FIELD(running_mean), FIELD(running_var), FIELD(mean),
    FIELD(invstd), FIELD(scale), FIELD(shift), FIELD(g_scale), FIELD(z_scale), FIELD(constant),
    FIELD(weight_grad), FIELD(bias_grad), FIELD(momentum), FIELD(eps),
    {"sizeof", sizeof(STRUCT)}, {0, 0},
};
#undef STRUCT
#define STRUCT Conv
const Field resnet56_conv_fields[] = {
    FIELD(images), FIELD(height), FIELD(width), FIELD(in), FIELD(real_in), FIELD(out),
    FIELD(kernel), FIELD(stride), FIELD(input_stride), FIELD(group), FIELD(input), FIELD(shortcut),
    FIELD(shortcut_channels), FIELD(weight), FIELD(weight_grad), FIELD(packed),
    FIELD(packed_back), FIELD(pixels), FIELD(z), FIELD(norm), FIELD(shortcut_map),
    FIELD(shortcut_norm), FIELD(x), FIELD(result), FIELD(result_norm), FIELD(g), FIELD(g_in),
    FIELD(skip), FIELD(skip_g), FIELD(skip_stride), FIELD(skip_channels),
    {"sizeof", sizeof(STRUCT)}, {0, 0},
};
#undef STRUCT
#undef FIELD

typedef struct {
    bf16 *input, *gradient; /* (positions, channels), padded with zeros */
    bf16 *pairs;            /* input, positions interleaved in pairs: (0, 1)..., then (1, 2)... */
    bf16 *planes;           /* gradient, (channels, positions) */
    int32_t *position_of;   /* position of each row of a product */
    int32_t *pixel_of;      /* pixel of each row of a product in the output map, or -1 */
    float *weight_grad;     /* (out, taps, in) */
    double *sums;           /* (3, MAX_CHANNELS) */
} Scratch;

/* A row of positions for two images of 3x2 pixels (height 3, width 2) and a 3x3 kernel (`pad` is
 * 1). Digits are the pixels of image 0, letters are the pixels of image 1, and dots are zeros:
 *
 *     . . . .  0 1 .  2 3 .  4 5 .  . . .  a b .  c d .  e f .  . . .  . . . ...
 *     |        |      |             |      |
 *     |        |      pitch = 3     |      span = 12 positions after image 0
 *     |        position 0           the row of zeros below image 0 and above image 1
 *     lead = pad * (pitch + 1) = 4 zeros
 *
 * At position p, the tap in row r and column c of the kernel reads position
 * p + (r - pad) * pitch + (c - pad). The dot after a row of pixels is both the right padding of
 * this row and the left padding of the next row. Results at the dots are also computed but not
 * stored, because their `pixel_of` is -1.
 *
 * `pitch` is the number of positions per row of pixels, `span` is the number of positions per
 * image, and `lead` is the number of zeros at the start. `positions` also counts the zeros that
 * products read after the last image. `plane_pitch` is the number of positions per channel after
 * transposition; an odd number of cache lines avoids cache conflicts. */
typedef struct {
    long pad, pitch, span, lead, taps, chunks_in, chunks_out, positions, plane_pitch;
} Layout;

/* Returns the number of chunks of 32 inputs that are summed for one result. With 16 channels, a
 * chunk covers two adjacent taps. */
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
    l.taps = c->kernel * c->kernel;
    l.chunks_in = chunks_of(c->in, c->kernel);
    l.chunks_out = chunks_of(c->out, c->kernel);
    l.positions = (c->group * l.span + 2 * l.lead + 64 + 32 + 63) / 64 * 64;
    l.plane_pitch = l.positions + 32;
    return l;
}

static long bytes(long count) { return (count + 63) / 64 * 64; }

static long allocate_scratch(const Conv *c, char *base, Scratch *m) {
    Layout l = layout_of(c);
    long n = l.positions, at = 0;
    char *start = (char *)(((uintptr_t)base + 63) / 64 * 64);
#define ALLOCATE(name, size) m->name = (void *)(start + at); at += bytes(size) + 64
    ALLOCATE(sums, 3 * MAX_CHANNELS * 8);
    ALLOCATE(weight_grad, c->out * l.taps * c->in * 4);
    ALLOCATE(position_of, n * 4);
    ALLOCATE(pixel_of, n * 4);
    ALLOCATE(input, n * c->in * 2);
    ALLOCATE(gradient, n * c->out * 2);
    ALLOCATE(pairs, 2 * n * c->in * 2);
    ALLOCATE(planes, l.plane_pitch * c->out * 2);
#undef ALLOCATE
    return at + 64;
}

/* Returns the size of a thread's scratch memory for `c`, in bytes. */
long resnet56_scratch_bytes(const Conv *c) {
    Scratch m;
    return allocate_scratch(c, 0, &m);
}

typedef struct {
    long row, column, channel; /* row and column of the first tap, and the first channel */
} Chunk;

static Chunk chunk_of(long k, long channels, long kernel) {
    Chunk chunk;
    if (channels == LANES) {
        long per_row = (kernel + 1) / 2;
        chunk = (Chunk){k / per_row, k % per_row * 2, 0};
    } else {
        long parts = channels / 32, tap = k / parts;
        chunk = (Chunk){tap / kernel, tap % kernel, k % parts * 32};
    }
    return chunk;
}

/* Returns the distance from a position to the position that a tap reads. */
static long shift_of(const Layout *l, long row, long column) {
    return (row - l->pad) * l->pitch + column - l->pad;
}

/* The terms of a sum over the taps and inputs. The chunks of a kernel row are adjacent in memory.
 * With 16 channels, the second half of the last chunk of a row may be unused. */
typedef struct {
    long rows, chunks_per_row, pairs_per_row;
    int32_t *offsets; /* offset of each chunk from the first value of a position, in values */
} Terms;

static Terms terms_of(int32_t *offsets, long channels, long kernel, const Layout *l) {
    long chunks = chunks_of(channels, kernel);
    for (long k = 0; k < chunks; k++) {
        Chunk at = chunk_of(k, channels, kernel);
        offsets[k] = shift_of(l, at.row, at.column) * channels + at.channel;
    }
    return (Terms){kernel, chunks / kernel, kernel * channels / 2, offsets};
}

/* Packs the weights into bfloat16 tiles: [16 outputs][chunk][input pair][output][2]. For the
 * gradient of the input (`back`), swaps the input and output channels of the kernel and rotates it
 * by 180 degrees. The threads of the parallel region share the work and synchronize at the end. */
static void pack(const Conv *c, int back, bf16 *packed) {
    long from = back ? c->out : c->in, to = back ? c->in : c->out, kernel = c->kernel;
    long chunks = chunks_of(from, kernel), taps = kernel * kernel, real = c->real_in;
    __mmask16 inputs = real < LANES ? (1u << real) - 1 : 0xffff;
#pragma omp for
    for (long tile = 0; tile < to / LANES * chunks; tile++) {
        Chunk first = chunk_of(tile % chunks, from, kernel);
        long n = tile / chunks * LANES, tap = first.row * kernel + first.column;
        int both = from > LANES || first.column + 1 < kernel; /* otherwise, the second half is 0 */
        __m512i rows[16];
        for (long i = 0; i < 16; i++) {
            __m512 low, high = _mm512_setzero_ps();
            if (!back) { /* load 32 inputs of one output; `transpose` follows */
                const float *w = c->weight + ((n + i) * taps + tap) * real + first.channel;
                low = _mm512_maskz_loadu_ps(inputs, w);
                if (both) high = _mm512_maskz_loadu_ps(inputs, w + (real < LANES ? real : LANES));
                rows[i] = (__m512i)_mm512_cvtne2ps_pbh(high, low);
            } else { /* interleave 16 inputs of two outputs, and rotate the kernel */
                long second = from == LANES && i >= 8; /* this row is in the second tap */
                long o = from == LANES ? 2 * i % LANES : first.channel + 2 * i;
                const float *w = c->weight + (o * taps + taps - 1 - tap - second) * real + n;
                bf16 weights[2 * LANES];
                low = high;
                if (both || !second) low = load_float(w), high = load_float(w + taps * real);
                store_pair(weights, low, high);
                rows[i] = interleave(weights, weights + LANES);
            }
        }
        if (!back) transpose(rows);
        for (long i = 0; i < 16; i++)
            _mm512_storeu_si512(packed + tile * TILE + 32 * i, rows[i]);
    }
}

/* Returns whether the rows of a product are the pixels of the output map, whose height and width
 * are those of the input divided by `stride`. The rows can be pixels only if the width of the
 * output map is a multiple of `run`, because the positions of `run` consecutive pixels must be
 * evenly spaced. Otherwise, the rows are all positions. */
static int rows_are_pixels(const Conv *c, long stride, long run) {
    return run && c->width / stride % run == 0;
}

/* Maps each row of a product to its position and its pixel. Returns the number of rows. */
static long map_rows(Scratch *m, const Conv *c, const Layout *l, long stride, long count,
                     long run) {
    long height = c->height / stride, width = c->width / stride;
    int pixels = rows_are_pixels(c, stride, run);
    for (long p = 0; p < l->positions; p++) {
        m->pixel_of[p] = -1;
        m->position_of[p] = pixels ? 0 : p;
    }
    for (long i = 0; i < count; i++)
        for (long y = 0; y < height; y++)
            for (long x = 0; x < width; x++) {
                long pixel = (i * height + y) * width + x;
                long position = i * l->span + y * stride * l->pitch + x * stride;
                long row = pixels ? pixel : position;
                m->position_of[row] = position;
                m->pixel_of[row] = pixel;
            }
    return pixels ? count * height * width : count * l->span - l->pad * l->pitch;
}

/* Writes zeros to the lead, the padding, and the positions that tiles read after the last image. */
static void zero_padding(bf16 *positions, const Conv *c, const Layout *l, long channels,
                         long count) {
    memset(positions, 0, l->lead * channels * 2);
    bf16 *at = positions + l->lead * channels;
    memset(at + count * l->span * channels, 0, (l->lead + 33) * channels * 2);
    for (long i = 0; i < count && l->pad; i++) {
        for (long y = 0; y < c->height; y++)
            memset(at + (i * l->span + y * l->pitch + c->width) * channels, 0, channels * 2);
        memset(at + (i * l->span + c->height * l->pitch) * channels, 0, l->pitch * channels * 2);
    }
}

/* Returns 16 channels of a pixel, starting at `first`. Channels outside the map are zero. */
static __m512 padded(const bf16 *pixel, long first, long channels) {
    float v[LANES];
    for (long k = first; k < first + LANES; k++) {
        uint32_t bits = k >= 0 && k < channels ? (uint32_t)pixel[k] << 16 : 0;
        memcpy(v + k - first, &bits, 4);
    }
    return load_float(v);
}

/* Writes a row of the block's output, relu(norm(z) + shortcut), to x. If `to` is not null, also
 * writes it to `to`. */
static inline __attribute__((always_inline)) void write_block_row_as(
    const Conv *c, long shortcut, long image, long y, bf16 *to) {
    long channels = c->in, width = c->width, row = (image * c->height + y) * width * channels;
    long channels_before = (channels - c->shortcut_channels) / 2;
    const bf16 *source = c->shortcut_map; /* for PADDED, the row that the shortcut reads */
    if (shortcut == PADDED)
        source += (image * 2 * c->height + 2 * y) * 2 * width * c->shortcut_channels;
    for (long k = 0; k < channels; k += LANES) {
        __m512 a = load_float(c->norm->scale + k), b = load_float(c->norm->shift + k), d = a;
        if (shortcut == PROJECTED) {
            b += load_float(c->shortcut_norm->shift + k);
            d = load_float(c->shortcut_norm->scale + k);
        }
        for (long p = 0; p < width; p++) {
            long at = p * channels + k;
            __m512 v = load(c->z + row + at) * a + b;
            if (shortcut == IDENTITY) v += load(c->shortcut_map + row + at);
            if (shortcut == PROJECTED) v += load(c->shortcut_map + row + at) * d;
            if (shortcut == PADDED)
                v += padded(source + 2 * p * c->shortcut_channels, k - channels_before,
                            c->shortcut_channels);
            v = relu(v);
            store(c->x + row + at, v);
            if (to) store(to + at, v);
        }
    }
}

static void write_block_row(const Conv *c, long image, long y, bf16 *to) {
    if (c->shortcut == IDENTITY) write_block_row_as(c, IDENTITY, image, y, to);
    else if (c->shortcut == PADDED) write_block_row_as(c, PADDED, image, y, to);
    else if (c->shortcut == PROJECTED) write_block_row_as(c, PROJECTED, image, y, to);
    else write_block_row_as(c, NONE, image, y, to);
}

/* Fills the row of positions with the convolution's input. If `x_is_written`, reads the block
 * output x instead of computing it. */
static void fill_input(const Conv *c, const Layout *l, long first, long count, int x_is_written,
                       bf16 *positions) {
    zero_padding(positions, c, l, c->in, count);
    for (long i = 0; i < count; i++)
        for (long y = 0; y < c->height; y++) {
            bf16 *to = positions + (l->lead + i * l->span + y * l->pitch) * c->in;
            long row = ((first + i) * c->height + y) * c->width;
            if (c->input == PIXELS) {
                const float *from = c->pixels + row * c->real_in;
                __mmask16 real = (1u << c->real_in) - 1;
                for (long p = 0; p < c->width; p++)
                    store(to + p * LANES, _mm512_maskz_loadu_ps(real, from + p * c->real_in));
            } else if (c->input == NORM) {
                const bf16 *from = c->z + row * c->in;
                long next = c->in > LANES ? LANES : 0, step = next ? c->in : 2 * LANES;
                /* Process 32 channels at a time, or 16 channels of two pixels. */
                for (long k = 0; k < c->in; k += 2 * LANES) {
                    const float *scale = c->norm->scale + k, *shift = c->norm->shift + k;
                    __m512 a = load_float(scale), a2 = load_float(scale + next);
                    __m512 b = load_float(shift), b2 = load_float(shift + next);
                    for (long at = k; at < c->width * c->in; at += step)
                        store_pair(to + at, relu(load(from + at) * a + b),
                                   relu(load(from + at + LANES) * a2 + b2));
                }
            } else if (c->input == BLOCK && !x_is_written) {
                write_block_row(c, first + i, y, to);
            } else if (c->input_stride == 1) {
                memcpy(to, c->x + row * c->in, c->width * c->in * 2);
            } else {
                long x_width = c->width * c->input_stride, x_height = c->height * c->input_stride;
                long x_row = (first + i) * x_height + y * c->input_stride;
                const bf16 *from = c->x + x_row * x_width * c->in;
                for (long p = 0; p < c->width; p++)
                    memcpy(to + p * c->in, from + p * c->input_stride * c->in, c->in * 2);
            }
        }
}

/* Fills the row of positions with dz, the gradient of the convolution's output. */
static void fill_gradient(const Conv *c, const Layout *l, long first, long count, bf16 *positions) {
    const Norm *norm = c->result_norm;
    long s = c->stride, height = c->height / s, width = c->width / s, out = c->out;
    if (s > 1) memset(positions, 0, l->positions * out * 2);
    else zero_padding(positions, c, l, out, count);
    for (long i = 0; i < count; i++)
        for (long y = 0; y < height; y++) {
            bf16 *to = positions + (l->lead + i * l->span + y * s * l->pitch) * out;
            long row = ((first + i) * height + y) * width * out;
            const bf16 *g = c->g + row, *z = c->result + row;
            for (long k = 0; k < out; k += LANES) {
                __m512 a = load_float(norm->g_scale + k), b = load_float(norm->z_scale + k);
                __m512 constant = load_float(norm->constant + k);
                for (long p = 0; p < width; p++) {
                    long at = p * out + k;
                    store(to + p * s * out + k, load(g + at) * a + (load(z + at) * b + constant));
                }
            }
        }
}

/* Interleaves the channels of each pair of positions. The pairs start at position 0, or at
 * position 1 if `odd` is set. */
static void interleave_positions(const bf16 *positions, long channels, long count, int odd,
                                 bf16 *pairs) {
    positions += odd * channels;
    for (long p = 0; p + odd + 1 < count; p += 2)
        for (long k = 0; k < channels; k += LANES) {
            const bf16 *at = positions + p * channels + k;
            _mm512_storeu_si512(pairs + p * channels + 2 * k, interleave(at, at + channels));
        }
}

/* Transposes (positions, channels) to (channels, pitch). `count`, the number of positions, is a
 * multiple of 32. */
static void transpose_positions(const bf16 *positions, long channels, long count, long pitch,
                                bf16 *planes) {
    for (long k = 0; k < channels; k += LANES)
        for (long p = 0; p < count; p += 32) {
            __m512i r[16];
            for (int i = 0; i < 16; i++) {
                const bf16 *at = positions + (p + 2 * i) * channels + k;
                r[i] = interleave(at, at + channels);
            }
            transpose(r);
            for (int i = 0; i < 16; i++)
                _mm512_storeu_si512(planes + (k + i) * pitch + p, r[i]);
        }
}

/* Returns the pairs (position, position + 1) of channel `k` and the channels after it. */
static const bf16 *pairs_at(const Conv *c, const Layout *l, const Scratch *m, long position,
                            long k) {
    return m->pairs + (position % 2 * l->positions + position / 2 * 2) * c->in + 2 * k;
}
