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
 * 16 positions by 32 inputs and 32 inputs by 16 outputs: the size of a tile of the unit.
 */
#include <math.h>

#include "positions.h"

/* How many threads a call will run on; asked before use, to see that they are PyTorch's own. */
int resnet56_threads(void) { return omp_get_max_threads(); }

/* ---- forward ---- */

static void add_sums(double *sums, const float *group, long channels, long rows) {
    for (long r = 0; r < rows; r++)
        for (long k = 0; k < channels; k++)
            sums[r * MAX_CHANNELS + k] += group[r * MAX_CHANNELS + k];
}

/* Results of one product to the map, and their sums and squares. */
static void keep_results(const Conv *c, const float *tile, long rows, long wide,
                         const int32_t *pixel_of, long first_pixel, long k, float *sums) {
    for (long v = 0; v < wide; v += LANES) {
        __m512 sum = _mm512_setzero_ps(), squares = sum;
        bf16 *to = c->result + first_pixel * c->out + k + v;
        for (long p = 0; p < rows; p++) {
            if (pixel_of[p] < 0) continue;
            __m512 value = floats(tile + p * wide + v);
            store(to + pixel_of[p] * c->out, value);
            sum += value;
            squares += value * value;
        }
        add_to(sums + k + v, sum);
        add_to(sums + MAX_CHANNELS + k + v, squares);
    }
}

/* Mean, deviation, scale and shift from all threads' sums; the running statistics move. */
static void finish_norm(Norm *norm, const Memory *all, long channels, double rows) {
#pragma omp for
    for (long k = 0; k < channels; k++) {
        double sum = 0, squares = 0;
        for (int t = 0; t < omp_get_num_threads(); t++) {
            sum += all[t].sums[k];
            squares += all[t].sums[MAX_CHANNELS + k];
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

/* This thread's memory, its sums at zero, and its tiles configured; `before` as they were. */
static Memory *begin(const Conv *c, char *arena, long arena_bytes, Memory *all,
                     struct config *before) {
    Memory *m = all + omp_get_thread_num();
    layout_memory(c, arena + omp_get_thread_num() * arena_bytes, m);
    memset(m->sums, 0, 3 * MAX_CHANNELS * sizeof *m->sums);
    begin_tiles(before);
    return m;
}

/* 16 outputs of 64 positions, or 32 of 32. */
static inline void product(long wide, const bf16 *a, long stride, const int32_t *offsets,
                           long chunks, const bf16 *b, float *tile) {
    if (wide == LANES) product_64x16(a, stride, offsets, chunks, b, tile);
    else product_32x32(a, stride, offsets, chunks, b, tile);
}

/* z = conv(input), and the statistics of the batch norm behind it. `arena` holds `arena_bytes`
 * for each thread. */
void resnet56_forward(const Conv *c, char *arena, long arena_bytes, long threads) {
    Memory all[threads];
    Layout l = layout_of(c);
#pragma omp parallel num_threads(threads)
    {
        struct config before;
        Memory *m = begin(c, arena, arena_bytes, all, &before);
        pack(c, 0, c->packed);
        int32_t offsets[l.chunks_in];
        offsets_of(offsets, c->in, c->kernel, &l);
        long group, end, groups = (c->images + c->group - 1) / c->group, placed = 0;
        long size = c->height * c->width / (c->stride * c->stride);
        long rows = c->out == LANES ? 64 : 32, wide = c->out == LANES ? LANES : 2 * LANES;
        float tile[64 * LANES] __attribute__((aligned(64)));
        for (my_share(groups, &group, &end); group < end; group++) {
            long first = group * c->group, count = min_long(c->group, c->images - first);
            float sums[2 * MAX_CHANNELS] = {0};
            if (count != placed) map_pixels(m->pixel_of, c, &l, c->stride, placed = count);
            lay_input(c, &l, first, count, 0, m->input);
            for (long k = 0; k < c->out; k += wide)
                for (long p = 0; p < count * l.span - l.pad * l.pitch; p += rows) {
                    const bf16 *a = m->input + (l.lead + p) * c->in;
                    const bf16 *b = c->packed + k / LANES * l.chunks_in * TILE;
                    product(wide, a, 2 * c->in, offsets, l.chunks_in, b, tile);
                    keep_results(c, tile, rows, wide, m->pixel_of + p, first * size, k, sums);
                }
            add_sums(m->sums, sums, c->out, 2);
        }
        end_tiles(&before);
#pragma omp barrier
        finish_norm(c->result_norm, all, c->out, (double)c->images * size);
    }
}

/* ---- backward ---- */

/* What the block's other way adds to the gradient at a pixel of its input; zero for most pixels
 * where that way takes every other one. */
static inline __m512 shortcut_gradient(const Conv *c, long pixel, long k) {
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
    const int32_t *pixel_of, long first_pixel, long k, float *sums) {
    long channels = c->in;
    for (long v = 0; v < wide; v += LANES) {
        long from = first_pixel * channels + k + v;
        const bf16 *z = c->z + from, *x = c->x + from, *other = c->short_map + from;
        const bf16 *also = c->skip_g + from;
        bf16 *to = c->g_in + from;
        __m512 zero = _mm512_setzero_ps(), sum = zero, products = zero, others = zero;
        __m512 scale = zero, shift = zero, mean = zero, other_mean = zero;
        if (input != PLAIN) {
            scale = floats(c->norm->scale + k + v);
            shift = floats(c->norm->shift + k + v);
            mean = floats(c->norm->mean + k + v);
        }
        if (projected) other_mean = floats(c->short_norm->mean + k + v);
        for (long p = 0; p < rows; p++) {
            if (pixel_of[p] < 0) continue;
            long at = pixel_of[p] * channels;
            __m512 g = floats(tile + p * wide + v);
            if (skip == SAME) g += load(also + at);
            else if (skip) g += shortcut_gradient(c, first_pixel + pixel_of[p], k + v);
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
        add_to(sums + MAX_CHANNELS + k + v, products);
        add_to(sums + 2 * MAX_CHANNELS + k + v, others);
    }
}

static void keep_gradients(const Conv *c, const float *tile, long rows, long wide,
                           const int32_t *pixel_of, long first_pixel, long k, float *sums) {
#define KEEP(input, skip, projected) \
    keep_gradients_by(c, input, skip, projected, tile, rows, wide, pixel_of, first_pixel, k, sums)
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
            products += all[t].sums[row * MAX_CHANNELS + k];
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
static void accumulate_weight_gradient(const Conv *c, const Layout *l, Memory *m, long count) {
    long n = positions(l), used = (count * l->span + 31) / 32 * 32;
    long plane_pitch = n + 32; /* an odd number of cache lines */
    make_pairs(m->input, c->in, n, 0, m->pairs);
    if (l->pad) make_pairs(m->input, c->in, n, 1, m->pairs + n * c->in);
    make_planes(m->gradient + l->lead * c->out, c->out, used, plane_pitch, m->planes);
    /* Tiles of 16 inputs of a tap, five for 16 outputs at a time, or two for 32. */
    long tiles = l->taps * c->in / LANES, together = c->out == LANES || tiles % 2 ? 5 : 2;
    long row_bytes = 4 * l->taps * c->in, rows = together == 2 ? 2 * LANES : LANES;
    for (long o = 0; o < c->out; o += rows)
        for (long t = 0; t < tiles; t += together) {
            const bf16 *b[5];
            float *to[5];
            for (long j = 0; j < together; j++) {
                long tile = min_long(t + j, tiles - 1), tap = tile / (c->in / LANES);
                long channel = tile % (c->in / LANES) * LANES;
                long row = tap / c->kernel - l->pad, column = tap % c->kernel - l->pad;
                long from = l->lead + row * l->pitch + column;
                b[j] = m->pairs + (from % 2 ? n * c->in : 0) + from / 2 * 2 * c->in + 2 * channel;
                to[j] = m->weight_grad + (o * l->taps + tap) * c->in + channel;
            }
            const bf16 *a = m->planes + o * plane_pitch;
            if (together == 2)
                outer_2x2(a, 2 * plane_pitch, b, 4 * c->in, used / 32, to, row_bytes);
            else
                outer_1x5(a, 2 * plane_pitch, b, 4 * c->in, min_long(5, tiles - t), used / 32, to,
                          row_bytes);
        }
}

/* The weights' gradient, and the gradient at the input with what the batch norms before it need;
 * no such gradient for PIXELS. */
void resnet56_backward(const Conv *c, char *arena, long arena_bytes, long threads) {
    Memory all[threads];
    Layout l = layout_of(c);
#pragma omp parallel num_threads(threads)
    {
        struct config before;
        Memory *m = begin(c, arena, arena_bytes, all, &before);
        if (c->input != PIXELS) pack(c, 1, c->packed_back);
        memset(m->weight_grad, 0, c->out * l.taps * c->in * 4);
        int32_t offsets[l.chunks_out];
        offsets_of(offsets, c->out, c->kernel, &l);
        long group, end, groups = (c->images + c->group - 1) / c->group, placed = 0;
        long rows = c->in == LANES ? 64 : 32, wide = c->in == LANES ? LANES : 2 * LANES;
        float tile[64 * LANES] __attribute__((aligned(64)));
        for (my_share(groups, &group, &end); group < end; group++) {
            long first = group * c->group, count = min_long(c->group, c->images - first);
            lay_input(c, &l, first, count, 1, m->input);
            lay_gradient(c, &l, first, count, m->gradient);
            accumulate_weight_gradient(c, &l, m, count);
            if (c->input == PIXELS) continue;
            float sums[3 * MAX_CHANNELS] = {0};
            if (count != placed) map_pixels(m->pixel_of, c, &l, 1, placed = count);
            for (long k = 0; k < c->in; k += wide)
                for (long p = 0; p < count * l.span - l.pad * l.pitch; p += rows) {
                    const bf16 *a = m->gradient + (l.lead + p) * c->out;
                    const bf16 *b = c->packed_back + k / LANES * l.chunks_out * TILE;
                    product(wide, a, 2 * c->out, offsets, l.chunks_out, b, tile);
                    keep_gradients(c, tile, rows, wide, m->pixel_of + p,
                                   first * c->height * c->width, k, sums);
                }
            add_sums(m->sums, sums, c->in, 3);
        }
        end_tiles(&before);
#pragma omp barrier
#pragma omp for
        for (long row = 0; row < c->out * l.taps; row++)
            for (long i = 0; i < c->in; i += LANES) {
                __m512 sum = floats(all[0].weight_grad + row * c->in + i);
                for (int t = 1; t < omp_get_num_threads(); t++)
                    sum += floats(all[t].weight_grad + row * c->in + i);
                __mmask16 real = c->real_in < LANES ? (1u << c->real_in) - 1 : 0xffff;
                _mm512_mask_storeu_ps(c->weight_grad + row * c->real_in + i, real, sum);
            }
        double pixels = (double)c->images * c->height * c->width;
        if (c->norm) finish_gradient(c->norm, all, 1, c->in, pixels);
        if (c->shortcut == PROJECTED) finish_gradient(c->short_norm, all, 2, c->in, pixels);
    }
}

/* ---- the end of the network: the last block's output and its mean over the map ---- */

/* `c` is a BLOCK without a convolution; pooled: (images, in). */
void resnet56_pool_forward(const Conv *c, float *pooled, long threads) {
#pragma omp parallel for num_threads(threads)
    for (long i = 0; i < c->images; i++) {
        long size = c->height * c->width;
        for (long y = 0; y < c->height; y++) join_row(c, i, y, 0);
        for (long k = 0; k < c->in; k += LANES) {
            __m512 sum = _mm512_setzero_ps();
            for (long p = 0; p < size; p++) sum += load(c->x + (i * size + p) * c->in + k);
            _mm512_storeu_ps(pooled + i * c->in + k, sum * _mm512_set1_ps(1.0f / size));
        }
    }
}

void resnet56_pool_backward(const Conv *c, const float *pooled_grad, char *arena,
                            long arena_bytes, long threads) {
    enum { PIECE = 64 };
    Memory all[threads];
    long size = c->height * c->width;
    int32_t pixel_of[PIECE];
    for (long p = 0; p < PIECE; p++) pixel_of[p] = p;
#pragma omp parallel num_threads(threads)
    {
        Memory *m = all + omp_get_thread_num();
        m->sums = (double *)(arena + omp_get_thread_num() * arena_bytes);
        memset(m->sums, 0, 3 * MAX_CHANNELS * sizeof *m->sums);
        long image, end;
        float spread[PIECE * LANES];
        for (my_share(c->images, &image, &end); image < end; image++) {
            float group[3 * MAX_CHANNELS] = {0};
            for (long k = 0; k < c->in; k += LANES) {
                __m512 g = floats(pooled_grad + image * c->in + k) * _mm512_set1_ps(1.0f / size);
                for (long p = 0; p < PIECE; p++) _mm512_storeu_ps(spread + p * LANES, g);
                for (long p = 0; p < size; p += PIECE)
                    keep_gradients(c, spread, min_long(PIECE, size - p), LANES, pixel_of,
                                   image * size + p, k, group);
            }
            add_sums(m->sums, group, c->in, 3);
        }
#pragma omp barrier
        double pixels = (double)c->images * size;
        finish_gradient(c->norm, all, 1, c->in, pixels);
        if (c->shortcut == PROJECTED) finish_gradient(c->short_norm, all, 2, c->in, pixels);
    }
}
