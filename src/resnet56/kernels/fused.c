/* relu(batch_norm(x) + residual), forward and backward, each in two passes over memory.
 *
 * PyTorch runs three memory-bound kernels for this computation in each direction. Tensors are
 * channels_last, with `rows` = N * H * W pixels of `channels` values. `channels` is a multiple of
 * LANES. Compile with -DREAL=float, or with -DREAL=uint16_t -DBF16 for bfloat16. Arithmetic uses
 * float, but sums over more than BLOCK rows use double.
 */
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#define LANES 16 /* floats per AVX-512 register; compilers split vectors for other processors */
#define BLOCK 64 /* rows per block; a block fits in the L1 cache */

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef float unaligned_vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t unaligned_bf16 __attribute__((vector_size(2 * LANES), aligned(2)));

static inline vec load_float(const float *p) { return *(const unaligned_vec *)p; }

#ifdef BF16
static inline vec load(const REAL *p) {
    return (vec)(__builtin_convertvector(*(const unaligned_bf16 *)p, uvec) << 16);
}

/* Rounds to nearest, ties to even, as PyTorch does. NaN stays NaN. */
static inline void store(REAL *p, vec value) {
    uvec bits = (uvec)value, nan = (uvec)(value != value);
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    *(unaligned_bf16 *)p = __builtin_convertvector((nan & 0x7fc0) | (~nan & bits), unaligned_bf16);
}
#else
static inline vec load(const REAL *p) { return *(const unaligned_vec *)p; }
static inline void store(REAL *p, vec value) { *(unaligned_vec *)p = value; }
#endif

/* Computes ReLU or its gradient: returns `value` if `y` is positive or NaN, otherwise zero. */
static inline vec where_positive(vec y, vec value) {
    vec zero = {0};
    return (vec)(~(ivec)(y <= zero) & (ivec)value);
}

static inline long min_long(long a, long b) { return a < b ? a : b; }

/* Computes the range of rows that this thread processes. Each range starts at a block boundary. */
static void thread_rows(long rows, long *first, long *end) {
    long thread = omp_get_thread_num(), threads = omp_get_num_threads();
    long blocks = (rows + BLOCK - 1) / BLOCK;
    *first = blocks * thread / threads * BLOCK;
    *end = min_long(blocks * (thread + 1) / threads * BLOCK, rows);
}

/* Adds the sums of all threads, always in the same order, so that results are reproducible. */
static double sum_over_threads(const double *sums, long stride) {
    double sum = 0;
    for (int thread = 0; thread < omp_get_num_threads(); thread++) sum += sums[thread * stride];
    return sum;
}

static void add_lanes(double *sums, vec values) {
    for (int lane = 0; lane < LANES; lane++) sums[lane] += values[lane];
}

/* Returns the number of OpenMP threads. The loader compares this number with PyTorch's. */
int resnet56_threads(void) { return omp_get_max_threads(); }

/* Computes y = relu((x - mean) * scale + bias + residual). `residual` may be null. Updates
 * `running_mean` and `running_var`. Writes four rows of `channels` floats to `saved`: mean,
 * 1 / standard deviation, scale and bias.
 */
void resnet56_forward(const REAL *x, const REAL *residual, REAL *y, long rows, long channels,
                      const float *weight, const float *bias, float *running_mean,
                      float *running_var, float momentum, float eps, float *saved) {
    double sums[omp_get_max_threads() * 2 * channels];
    float *mean = saved, *invstd = saved + channels, *scale = saved + 2 * channels;
    float pivot[channels]; /* subtracting the first row avoids cancellation in the variance */
    for (long c = 0; c < channels; c += LANES) *(unaligned_vec *)(pivot + c) = load(x + c);
    memcpy(saved + 3 * channels, bias, channels * sizeof *bias);
#pragma omp parallel
    {
        long first, end, stride = 2 * channels;
        thread_rows(rows, &first, &end);
        double *thread_sums = sums + omp_get_thread_num() * stride;
        memset(thread_sums, 0, stride * sizeof *thread_sums);
        for (long block = first; block < end; block += BLOCK) {
            long block_end = min_long(block + BLOCK, end);
            for (long c = 0; c < channels; c += LANES) {
                vec origin = load_float(pivot + c), sum = {0}, squares = {0};
                for (long row = block; row < block_end; row++) {
                    vec difference = load(x + row * channels + c) - origin;
                    sum += difference;
                    squares += difference * difference;
                }
                add_lanes(thread_sums + c, sum);
                add_lanes(thread_sums + channels + c, squares);
            }
        }
#pragma omp barrier
#pragma omp for
        for (long c = 0; c < channels; c++) {
            double offset = sum_over_threads(sums + c, stride) / rows;
            double var = sum_over_threads(sums + channels + c, stride) / rows - offset * offset;
            if (var < 0) var = 0; /* rounding can make the variance negative; NaN stays NaN */
            mean[c] = pivot[c] + offset;
            invstd[c] = 1 / sqrt(var + eps);
            scale[c] = weight[c] * invstd[c];
            running_mean[c] += momentum * (mean[c] - running_mean[c]);
            running_var[c] += momentum * (var * rows / (rows - 1) - running_var[c]);
        } /* implicit barrier */
        for (long block = first; block < end; block += BLOCK) {
            long block_end = min_long(block + BLOCK, end);
            for (long c = 0; c < channels; c += LANES) {
                vec center = load_float(mean + c);
                vec a = load_float(scale + c), b = load_float(bias + c);
                for (long row = block; row < block_end; row++) {
                    long index = row * channels + c;
                    vec value = (load(x + index) - center) * a + b;
                    if (residual) value += load(residual + index);
                    store(y + index, where_positive(value, value));
                }
            }
        }
    }
}

/* Computes the gradients with respect to x, the residual, the weight and the bias. `y` and
 * `residual_grad` are null if the forward pass had no residual. The function then recomputes the
 * sign of the output, which is faster than reading the output.
 */
void resnet56_backward(const REAL *y_grad, const REAL *x, const REAL *y, REAL *x_grad,
                       REAL *residual_grad, long rows, long channels, const float *saved,
                       float *weight_grad, float *bias_grad) {
    double sums[omp_get_max_threads() * 2 * channels];
    float x_scale[channels], constant[channels];
    const float *mean = saved, *invstd = saved + channels;
    const float *scale = saved + 2 * channels, *bias = saved + 3 * channels;
#pragma omp parallel
    {
        long first, end, stride = 2 * channels;
        thread_rows(rows, &first, &end);
        double *thread_sums = sums + omp_get_thread_num() * stride;
        memset(thread_sums, 0, stride * sizeof *thread_sums);
        for (long block = first; block < end; block += BLOCK) {
            long block_end = min_long(block + BLOCK, end);
            for (long c = 0; c < channels; c += LANES) {
                vec center = load_float(mean + c);
                vec a = load_float(scale + c), b = load_float(bias + c);
                vec sum = {0}, products = {0};
                for (long row = block; row < block_end; row++) {
                    long index = row * channels + c;
                    vec value = load(x + index) - center;
                    vec grad = where_positive(y ? load(y + index) : value * a + b,
                                              load(y_grad + index));
                    sum += grad;
                    products += grad * value;
                }
                add_lanes(thread_sums + c, sum);
                add_lanes(thread_sums + channels + c, products);
            }
        }
#pragma omp barrier
#pragma omp for
        for (long c = 0; c < channels; c++) {
            double sum = sum_over_threads(sums + c, stride);
            double product = sum_over_threads(sums + channels + c, stride) * invstd[c];
            bias_grad[c] = sum;
            weight_grad[c] = product;
            /* x_grad = scale * (grad - sum / rows - (x - mean) * invstd * product / rows) */
            x_scale[c] = -scale[c] * invstd[c] * product / rows;
            constant[c] = -scale[c] * sum / rows;
        }
        for (long block = first; block < end; block += BLOCK) {
            long block_end = min_long(block + BLOCK, end);
            for (long c = 0; c < channels; c += LANES) {
                vec center = load_float(mean + c);
                vec a = load_float(scale + c), b = load_float(bias + c);
                vec g = load_float(x_scale + c), h = load_float(constant + c);
                for (long row = block; row < block_end; row++) {
                    long index = row * channels + c;
                    vec value = load(x + index) - center;
                    vec grad = where_positive(y ? load(y + index) : value * a + b,
                                              load(y_grad + index));
                    if (residual_grad) store(residual_grad + index, grad);
                    store(x_grad + index, grad * a + value * g + h);
                }
            }
        }
    }
}
