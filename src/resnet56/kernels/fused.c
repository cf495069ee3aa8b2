/* relu(batch_norm(x) + residual), forward and backward, each in two passes over memory.
 *
 * Operation by operation this takes PyTorch three kernels each way, all of them bound by memory.
 * Tensors are channels_last: `rows` = N * H * W positions of `channels` values, a multiple of
 * LANES. Compile with -DREAL=float or, for bfloat16, with -DREAL=uint16_t -DBF16. All arithmetic
 * is in float; sums over more than BLOCK rows are in double.
 */
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#define LANES 16  /* floats in a vector: one AVX-512 register; compilers split it where need be */
#define BLOCK 64 /* rows at a time: they stay in the first-level cache */

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef float any_vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t any_bf16 __attribute__((vector_size(2 * LANES), aligned(2)));

static inline vec floats(const float *p) { return *(const any_vec *)p; }

#ifdef BF16
static inline vec load(const REAL *p) {
    return (vec)(__builtin_convertvector(*(const any_bf16 *)p, uvec) << 16);
}

/* Rounds to the nearest, ties to even, as PyTorch does; a NaN stays one. */
static inline void store(REAL *p, vec value) {
    uvec bits = (uvec)value, nan = (uvec)(value != value);
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    *(any_bf16 *)p = __builtin_convertvector((nan & 0x7fc0) | (~nan & bits), any_bf16);
}
#else
static inline vec load(const REAL *p) { return *(const any_vec *)p; }
static inline void store(REAL *p, vec value) { *(any_vec *)p = value; }
#endif

/* `value` where `y` is above zero or no number, zero elsewhere: ReLU and its gradient. */
static inline vec where_on(vec y, vec value) {
    vec zero = {0};
    return (vec)(~(ivec)(y <= zero) & (ivec)value);
}

static inline long min_long(long a, long b) { return a < b ? a : b; }

/* The rows of this thread: whole blocks, always the same ones for as many threads. */
static void my_rows(long rows, long *first, long *end) {
    long thread = omp_get_thread_num(), threads = omp_get_num_threads();
    long blocks = (rows + BLOCK - 1) / BLOCK;
    *first = blocks * thread / threads * BLOCK;
    *end = min_long(blocks * (thread + 1) / threads * BLOCK, rows);
}

/* The sum over all threads; every one of them adds in the same order. */
static double over_threads(const double *sums, long stride) {
    double sum = 0;
    for (int thread = 0; thread < omp_get_num_threads(); thread++) sum += sums[thread * stride];
    return sum;
}

static void add(double *sums, vec values) {
    for (int lane = 0; lane < LANES; lane++) sums[lane] += values[lane];
}

/* How many threads a call will run on; asked before use, to see that they are PyTorch's own. */
int resnet56_threads(void) { return omp_get_max_threads(); }

/* `residual` may be null. `running_*` are moved by `momentum`. `saved` receives four rows of
 * `channels`: mean, 1 / deviation, and scale and bias of
 * y = relu((x - mean) * scale + bias + residual).
 */
void resnet56_forward(const REAL *x, const REAL *residual, REAL *y, long rows, long channels,
                      const float *weight, const float *bias, float *running_mean,
                      float *running_var, float momentum, float eps, float *saved) {
    double sums[omp_get_max_threads() * 2 * channels];
    float *mean = saved, *invstd = saved + channels, *scale = saved + 2 * channels;
    float pivot[channels]; /* the first row: squares of distances to it do not cancel */
    for (long c = 0; c < channels; c += LANES) *(any_vec *)(pivot + c) = load(x + c);
    memcpy(saved + 3 * channels, bias, channels * sizeof *bias);
#pragma omp parallel
    {
        long first, end, stride = 2 * channels;
        my_rows(rows, &first, &end);
        double *mine = sums + omp_get_thread_num() * stride;
        memset(mine, 0, stride * sizeof *mine);
        for (long block = first; block < end; block += BLOCK) {
            long stop = min_long(block + BLOCK, end);
            for (long c = 0; c < channels; c += LANES) {
                vec origin = floats(pivot + c), sum = {0}, squares = {0};
                for (long row = block; row < stop; row++) {
                    vec distance = load(x + row * channels + c) - origin;
                    sum += distance;
                    squares += distance * distance;
                }
                add(mine + c, sum);
                add(mine + channels + c, squares);
            }
        }
#pragma omp barrier
#pragma omp for
        for (long c = 0; c < channels; c++) {
            double off = over_threads(sums + c, stride) / rows;
            double var = over_threads(sums + channels + c, stride) / rows - off * off;
            if (var < 0) var = 0; /* by rounding; a NaN passes */
            mean[c] = pivot[c] + off;
            invstd[c] = 1 / sqrt(var + eps);
            scale[c] = weight[c] * invstd[c];
            running_mean[c] += momentum * (mean[c] - running_mean[c]);
            running_var[c] += momentum * (var * rows / (rows - 1) - running_var[c]);
        } /* all threads wait here */
        for (long block = first; block < end; block += BLOCK) {
            long stop = min_long(block + BLOCK, end);
            for (long c = 0; c < channels; c += LANES) {
                vec centre = floats(mean + c), a = floats(scale + c), b = floats(bias + c);
                for (long row = block; row < stop; row++) {
                    long at = row * channels + c;
                    vec value = (load(x + at) - centre) * a + b;
                    if (residual) value += load(residual + at);
                    store(y + at, where_on(value, value));
                }
            }
        }
    }
}

/* `y` and `residual_grad` are null where there was no residual: the sign is then computed anew,
 * which is cheaper than to read it.
 */
void resnet56_backward(const REAL *y_grad, const REAL *x, const REAL *y, REAL *x_grad,
                       REAL *residual_grad, long rows, long channels, const float *saved,
                       float *weight_grad, float *bias_grad) {
    double sums[omp_get_max_threads() * 2 * channels];
    float by_x[channels], constant[channels];
    const float *mean = saved, *invstd = saved + channels;
    const float *scale = saved + 2 * channels, *bias = saved + 3 * channels;
#pragma omp parallel
    {
        long first, end, stride = 2 * channels;
        my_rows(rows, &first, &end);
        double *mine = sums + omp_get_thread_num() * stride;
        memset(mine, 0, stride * sizeof *mine);
        for (long block = first; block < end; block += BLOCK) {
            long stop = min_long(block + BLOCK, end);
            for (long c = 0; c < channels; c += LANES) {
                vec centre = floats(mean + c), a = floats(scale + c), b = floats(bias + c);
                vec sum = {0}, products = {0};
                for (long row = block; row < stop; row++) {
                    long at = row * channels + c;
                    vec value = load(x + at) - centre;
                    vec grad = where_on(y ? load(y + at) : value * a + b, load(y_grad + at));
                    sum += grad;
                    products += grad * value;
                }
                add(mine + c, sum);
                add(mine + channels + c, products);
            }
        }
#pragma omp barrier
#pragma omp for
        for (long c = 0; c < channels; c++) {
            double sum = over_threads(sums + c, stride);
            double product = over_threads(sums + channels + c, stride) * invstd[c];
            bias_grad[c] = sum;
            weight_grad[c] = product;
            /* scale * (grad - sum / rows - (x - mean) * invstd * product / rows) */
            by_x[c] = -scale[c] * invstd[c] * product / rows;
            constant[c] = -scale[c] * sum / rows;
        }
        for (long block = first; block < end; block += BLOCK) {
            long stop = min_long(block + BLOCK, end);
            for (long c = 0; c < channels; c += LANES) {
                vec centre = floats(mean + c), a = floats(scale + c), b = floats(bias + c);
                vec g = floats(by_x + c), h = floats(constant + c);
                for (long row = block; row < stop; row++) {
                    long at = row * channels + c;
                    vec value = load(x + at) - centre;
                    vec grad = where_on(y ? load(y + at) : value * a + b, load(y_grad + at));
                    if (residual_grad) store(residual_grad + at, grad);
                    store(x_grad + at, grad * a + value * g + h);
                }
            }
        }
    }
}
