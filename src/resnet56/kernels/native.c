/* The convolutions of a residual network. Each convolution is fused with the operations before and
 * after it.
 *
 * With separate operations, a training step is memory-bound: each convolution, batch norm, ReLU and
 * addition reads and writes entire feature maps. Here, one call computes the forward or
 * backward pass of a convolution. The call also computes the operations before the convolution
 * (batch norm, shortcut, ReLU) and the sums for the batch norm after it, while the values are in
 * the L1 cache. Only three types of feature maps are stored in memory, all in bfloat16: convolution
 * outputs `z`, block outputs `x` and gradients `g`.
 *
 * Feature maps have shape (images, height, width, channels). The number of channels is a multiple
 * of 16. A thread copies a few images at a time into a row of positions (see the picture in
 * positions.h). A zero pixel follows each row of pixels, and a row of zeros follows each image.
 * These zeros provide the padding on both sides. In this layout, a tap of the kernel is a shift
 * within the row of positions. A convolution is therefore a sum of matrix products, one for each
 * tap: positions by inputs, times inputs by outputs. amx.h computes these products on the
 * processor's matrix unit, and avx512.h with vector instructions.
 *
 * tests/kernels/reference.py computes the same convolution with plain loops over this layout.
 */
#include <math.h>

#ifdef __AMX_BF16__
#include "amx.h"
#else
#include "avx512.h"
#endif

/* Returns the number of OpenMP threads. The loader compares this number with PyTorch's. */
int resnet56_threads(void) { return omp_get_max_threads(); }

/* ---- forward ---- */

static void add_sums(double *sums, const float *group_sums, long channels, long rows) {
    for (long r = 0; r < rows; r++)
        for (long k = 0; k < channels; k++)
            sums[r * MAX_CHANNELS + k] += group_sums[r * MAX_CHANNELS + k];
}

/* Stores a product in the output map, and adds its values and their squares to `sums`. */
static void store_results(const Conv *c, const float *tile, long rows, long columns,
                          const int32_t *pixel_of, long first_pixel, long k, float *sums) {
    for (long v = 0; v < columns; v += LANES) {
        __m512 sum = _mm512_setzero_ps(), squares = sum;
        bf16 *to = c->result + first_pixel * c->out + k + v;
        for (long p = 0; p < rows; p++) {
            if (pixel_of[p] < 0) continue;
            __m512 value = load_float(tile + p * columns + v);
            store(to + pixel_of[p] * c->out, value);
            sum += value;
            squares += value * value;
        }
        add_to(sums + k + v, sum);
        add_to(sums + MAX_CHANNELS + k + v, squares);
    }
}

/* Computes the mean, 1 / standard deviation, scale and shift from the sums of all threads, and
 * updates the running statistics. */
static void finish_statistics(Norm *norm, const Scratch *all, long channels, double rows) {
#pragma omp for
    for (long k = 0; k < channels; k++) {
        double sum = 0, squares = 0;
        for (int t = 0; t < omp_get_num_threads(); t++) {
            sum += all[t].sums[k];
            squares += all[t].sums[MAX_CHANNELS + k];
        }
        double mean = sum / rows, var = squares / rows - mean * mean;
        if (var < 0) var = 0; /* a rounding error; NaN stays NaN */
        norm->mean[k] = mean;
        norm->invstd[k] = 1 / sqrt(var + norm->eps);
        norm->scale[k] = norm->weight[k] * norm->invstd[k];
        norm->shift[k] = norm->bias[k] - norm->mean[k] * norm->scale[k];
        norm->running_mean[k] += norm->momentum * (norm->mean[k] - norm->running_mean[k]);
        norm->running_var[k] +=
            norm->momentum * ((float)(var * rows / (rows - 1)) - norm->running_var[k]);
    }
}

static void thread_range(long groups, long *first, long *end) {
    long thread = omp_get_thread_num(), threads = omp_get_num_threads();
    *first = groups * thread / threads;
    *end = groups * (thread + 1) / threads;
}

/* Initializes the scratch memory of this thread and configures its tile registers. Stores the
 * previous configuration in `saved`. */
static Scratch *begin_thread(const Conv *c, char *arena, long arena_bytes, Scratch *all,
                            struct config *saved) {
    Scratch *m = all + omp_get_thread_num();
    allocate_scratch(c, arena + omp_get_thread_num() * arena_bytes, m);
    memset(m->sums, 0, 3 * MAX_CHANNELS * sizeof *m->sums);
    begin_tiles(saved);
    return m;
}

/* Computes z = conv(input) and the statistics of the batch norm after the convolution. `arena` is
 * scratch memory, with `arena_bytes` bytes per thread. */
void resnet56_forward(const Conv *c, char *arena, long arena_bytes, long threads) {
    Scratch all[threads];
    Layout l = layout_of(c);
#pragma omp parallel num_threads(threads)
    {
        struct config saved;
        Scratch *m = begin_thread(c, arena, arena_bytes, all, &saved);
        pack(c, 0, c->packed);
        int32_t offsets[l.chunks_in];
        Terms terms = terms_of(offsets, c->in, c->kernel, &l);
        long distance = rows_are_pixels(c, c->stride, RUN) ? c->stride : 1;
        long group, end, groups = (c->images + c->group - 1) / c->group, mapped = 0, total = 0;
        long size = c->height * c->width / (c->stride * c->stride);
        long rows = c->out == LANES ? 64 : 32, columns = c->out == LANES ? LANES : 2 * LANES;
        float tile[64 * LANES] __attribute__((aligned(64)));
        for (thread_range(groups, &group, &end); group < end; group++) {
            long first = group * c->group, count = min_long(c->group, c->images - first);
            float sums[2 * MAX_CHANNELS] = {0};
            if (count != mapped) total = map_rows(m, c, &l, c->stride, mapped = count, RUN);
            fill_input(c, &l, first, count, 0, m->input);
            for (long k = 0; k < c->out; k += columns)
                for (long p = 0; p < total; p += rows) {
                    const bf16 *b = c->packed + k / LANES * l.chunks_in * TILE;
                    product(columns, m->input + l.lead * c->in, c->in, m->position_of + p, distance,
                            &terms, b, tile);
                    store_results(c, tile, rows, columns, m->pixel_of + p, first * size, k, sums);
                }
            add_sums(m->sums, sums, c->out, 2);
        }
        end_tiles(&saved);
#pragma omp barrier
        finish_statistics(c->result_norm, all, c->out, (double)c->images * size);
    }
}

/* ---- backward ---- */

/* Returns the gradient that the shortcut adds at a pixel of the block's input. With a stride above
 * 1, the gradient is zero at pixels that the shortcut skips. */
static inline __m512 shortcut_gradient(const Conv *c, long pixel, long k) {
    long stride = c->skip_stride, width = c->width, x = pixel % width, y = pixel / width;
    /* `y` is the row index across all images. This is valid because image heights are even. */
    if (x % stride || y % stride) return _mm512_setzero_ps();
    long at = y / stride * (width / stride) + x / stride;
    if (c->skip == PROJECTED) return load(c->skip_g + at * c->in + k);
    long channels_before = (c->skip_channels - c->in) / 2;
    return load(c->skip_g + at * c->skip_channels + channels_before + k);
}

/* Stores a product as the gradient of the input. Adds the shortcut's gradient, applies the mask of
 * the ReLU, and computes the sums for the gradient of the batch norm before the ReLU.
 * `input`, `skip` and `projected` are constants, so the compiler specializes the loop. */
static inline __attribute__((always_inline)) void store_gradients_as(
    const Conv *c, long input, long skip, long projected, const float *tile, long rows,
    long columns, const int32_t *pixel_of, long first_pixel, long k, float *sums) {
    long channels = c->in;
    for (long v = 0; v < columns; v += LANES) {
        long from = first_pixel * channels + k + v;
        const bf16 *z = c->z + from, *x = c->x + from, *shortcut_z = c->shortcut_map + from;
        const bf16 *skip_g = c->skip_g + from;
        bf16 *to = c->g_in + from;
        __m512 zero = _mm512_setzero_ps(), sum = zero, products = zero, shortcut_products = zero;
        __m512 scale = zero, shift = zero, mean = zero, shortcut_mean = zero;
        if (input != PLAIN) {
            scale = load_float(c->norm->scale + k + v);
            shift = load_float(c->norm->shift + k + v);
            mean = load_float(c->norm->mean + k + v);
        }
        if (projected) shortcut_mean = load_float(c->shortcut_norm->mean + k + v);
        for (long p = 0; p < rows; p++) {
            if (pixel_of[p] < 0) continue;
            long at = pixel_of[p] * channels;
            __m512 g = load_float(tile + p * columns + v);
            if (skip == IDENTITY) g += load(skip_g + at);
            else if (skip) g += shortcut_gradient(c, first_pixel + pixel_of[p], k + v);
            if (input != PLAIN) {
                __m512 value = load(z + at), y = value * scale + shift;
                if (input == BLOCK) y = load(x + at);
                g = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y, zero, _CMP_NLE_UQ), g);
                sum += g;
                products += g * (value - mean);
                if (projected) shortcut_products += g * (load(shortcut_z + at) - shortcut_mean);
            }
            store(to + at, g);
        }
        add_to(sums + k + v, sum);
        add_to(sums + MAX_CHANNELS + k + v, products);
        add_to(sums + 2 * MAX_CHANNELS + k + v, shortcut_products);
    }
}

static void store_gradients(const Conv *c, const float *tile, long rows, long columns,
                            const int32_t *pixel_of, long first_pixel, long k, float *sums) {
#define STORE(input, skip, projected) \
    store_gradients_as(c, input, skip, projected, tile, rows, columns, pixel_of, first_pixel, k, \
                       sums)
    if (c->input == NORM) STORE(NORM, NONE, 0);
    else if (c->input == PLAIN) STORE(PLAIN, NONE, 0);
    else if (c->shortcut == PROJECTED) STORE(BLOCK, c->skip, 1);
    else if (c->skip == IDENTITY) STORE(BLOCK, IDENTITY, 0);
    else STORE(BLOCK, c->skip, 0);
#undef STORE
}

/* Computes the gradients of a batch norm's parameters from the sums of all threads. Also computes
 * the coefficients of dz = scale (g - sum / rows - (z - mean) invstd^2 products / rows). */
static void finish_gradient(Norm *norm, const Scratch *all, long row, long channels, double rows) {
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
        double z_scale = -scale * invstd * invstd * products / rows;
        norm->g_scale[k] = scale;
        norm->z_scale[k] = z_scale;
        norm->constant[k] = -scale * sum / rows - z_scale * norm->mean[k];
    }
}

/* Adds the weight gradient of the images in the row of positions to m->weight_grad. */
static void accumulate_weight_gradient(const Conv *c, const Layout *l, Scratch *m, long count) {
    long end = (count * l->span + 31) / 32 * 32; /* the end of the last image, rounded up */
    bf16 *odd_pairs = m->pairs + l->positions * c->in;
    interleave_positions(m->input, c->in, l->positions, 0, m->pairs);
    if (l->pad) interleave_positions(m->input, c->in, l->positions, 1, odd_pairs);
    transpose_positions(m->gradient + l->lead * c->out, c->out, end, l->plane_pitch, m->planes);
    add_weight_products(c, l, m, count);
}

/* Computes the gradients of the weights, the input, and the batch norms that precede the
 * convolution. An input of PIXELS needs no gradient. */
void resnet56_backward(const Conv *c, char *arena, long arena_bytes, long threads) {
    Scratch all[threads];
    Layout l = layout_of(c);
#pragma omp parallel num_threads(threads)
    {
        struct config saved;
        Scratch *m = begin_thread(c, arena, arena_bytes, all, &saved);
        if (c->input != PIXELS) pack(c, 1, c->packed_back);
        memset(m->weight_grad, 0, c->out * l.taps * c->in * 4);
        int32_t offsets[l.chunks_out];
        Terms terms = terms_of(offsets, c->out, c->kernel, &l);
        long group, end, groups = (c->images + c->group - 1) / c->group, mapped = 0, total = 0;
        long rows = c->in == LANES ? 64 : 32, columns = c->in == LANES ? LANES : 2 * LANES;
        float tile[64 * LANES] __attribute__((aligned(64)));
        for (thread_range(groups, &group, &end); group < end; group++) {
            long first = group * c->group, count = min_long(c->group, c->images - first);
            fill_input(c, &l, first, count, 1, m->input);
            fill_gradient(c, &l, first, count, m->gradient);
            accumulate_weight_gradient(c, &l, m, count);
            if (c->input == PIXELS) continue;
            float sums[3 * MAX_CHANNELS] = {0};
            if (count != mapped) total = map_rows(m, c, &l, 1, mapped = count, RUN);
            for (long k = 0; k < c->in; k += columns)
                for (long p = 0; p < total; p += rows) {
                    const bf16 *b = c->packed_back + k / LANES * l.chunks_out * TILE;
                    product(columns, m->gradient + l.lead * c->out, c->out, m->position_of + p, 1,
                            &terms, b, tile);
                    store_gradients(c, tile, rows, columns, m->pixel_of + p,
                                    first * c->height * c->width, k, sums);
                }
            add_sums(m->sums, sums, c->in, 3);
        }
        end_tiles(&saved);
#pragma omp barrier
#pragma omp for
        for (long row = 0; row < c->out * l.taps; row++)
            for (long i = 0; i < c->in; i += LANES) {
                __m512 sum = load_float(all[0].weight_grad + row * c->in + i);
                for (int t = 1; t < omp_get_num_threads(); t++)
                    sum += load_float(all[t].weight_grad + row * c->in + i);
                __mmask16 real = c->real_in < LANES ? (1u << c->real_in) - 1 : 0xffff;
                _mm512_mask_storeu_ps(c->weight_grad + row * c->real_in + i, real, sum);
            }
        double pixels = (double)c->images * c->height * c->width;
        if (c->norm) finish_gradient(c->norm, all, 1, c->in, pixels);
        if (c->shortcut == PROJECTED) finish_gradient(c->shortcut_norm, all, 2, c->in, pixels);
    }
}

/* ---- output of the last block and global average pooling ---- */

/* Computes the output of the last block and its average over all pixels. `c` describes a BLOCK
 * input without a convolution. `pooled` has shape (images, in). */
void resnet56_pool_forward(const Conv *c, float *pooled, long threads) {
#pragma omp parallel for num_threads(threads)
    for (long i = 0; i < c->images; i++) {
        long size = c->height * c->width;
        for (long y = 0; y < c->height; y++) write_block_row(c, i, y, 0);
        for (long k = 0; k < c->in; k += LANES) {
            __m512 sum = _mm512_setzero_ps();
            for (long p = 0; p < size; p++) sum += load(c->x + (i * size + p) * c->in + k);
            _mm512_storeu_ps(pooled + i * c->in + k, sum * _mm512_set1_ps(1.0f / size));
        }
    }
}

void resnet56_pool_backward(const Conv *c, const float *pooled_grad, char *arena,
                            long arena_bytes, long threads) {
    enum { ROWS = 64 };
    Scratch all[threads];
    long size = c->height * c->width;
    int32_t pixel_of[ROWS];
    for (long p = 0; p < ROWS; p++) pixel_of[p] = p;
#pragma omp parallel num_threads(threads)
    {
        Scratch *m = all + omp_get_thread_num();
        m->sums = (double *)(arena + omp_get_thread_num() * arena_bytes);
        memset(m->sums, 0, 3 * MAX_CHANNELS * sizeof *m->sums);
        long image, end;
        float tile[ROWS * LANES];
        for (thread_range(c->images, &image, &end); image < end; image++) {
            float sums[3 * MAX_CHANNELS] = {0};
            for (long k = 0; k < c->in; k += LANES) {
                __m512 g = load_float(pooled_grad + image * c->in + k);
                g *= _mm512_set1_ps(1.0f / size);
                for (long p = 0; p < ROWS; p++) _mm512_storeu_ps(tile + p * LANES, g);
                for (long p = 0; p < size; p += ROWS)
                    store_gradients(c, tile, min_long(ROWS, size - p), LANES, pixel_of,
                                    image * size + p, k, sums);
            }
            add_sums(m->sums, sums, c->in, 3);
        }
#pragma omp barrier
        double pixels = (double)c->images * size;
        finish_gradient(c->norm, all, 1, c->in, pixels);
        if (c->shortcut == PROJECTED) finish_gradient(c->shortcut_norm, all, 2, c->in, pixels);
    }
}
