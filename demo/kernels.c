// The loops of training that PyTorch has no fast form of on a CPU. bf16 values are uint16_t.
#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float from_bf16(uint16_t v) {
    uint32_t bits = (uint32_t)v << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline uint16_t to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// Kept below infinity, whose reciprocal -ffast-math would make a NaN.
static inline float sigmoid(float x) { return 1.0f / (1.0f + expf(fminf(-x, 80.0f))); }

// Cross entropy of cap * tanh(logits / cap) for bf16 logits [rows, vocab]. The cap bounds them, so
// exp needs no maximum. Overwrites the logits by scale * d(loss)/d(logits); losses: [rows].
void capped_loss(uint16_t *logits, const int64_t *targets, float *losses, long rows, long vocab,
                 float cap, float scale) {
#pragma omp parallel for
    for (long r = 0; r < rows; r++) {
        uint16_t *row = logits + r * vocab;
        float capped[vocab], power[vocab], sum = 0;
        for (long v = 0; v < vocab; v++) {
            float t = 2.0f * sigmoid(from_bf16(row[v]) * (2.0f / cap)) - 1.0f; // tanh
            capped[v] = t;
            power[v] = expf(cap * t);
            sum += power[v];
        }
        long y = targets[r];
        losses[r] = logf(sum) - cap * capped[y];
        power[y] -= sum; // so that one loop gives p - 1 at the target
        float factor = scale / sum;
        for (long v = 0; v < vocab; v++)
            row[v] = to_bf16(factor * power[v] * (1.0f - capped[v] * capped[v]));
    }
}

// RG-LRU: input u and output h [batch, time, heads * block]; gates before bias and sigmoid, bf16
// [heads, batch, time, 2 * block], input gate first; bias [heads, 2 * block]; rate is
// 8 * softplus(parameter). Position 0 starts from nothing.
void rglru_forward(const float *u, const uint16_t *gates, const float *bias, const float *rate,
                   float *h, long batch, long time, long heads, long block) {
    long width = heads * block;
#pragma omp parallel for
    for (long b = 0; b < batch; b++)
        for (long t = 0; t < time; t++)
            for (long head = 0; head < heads; head++) {
                long at = (b * time + t) * width + head * block;
                const uint16_t *gate = gates + ((head * batch + b) * time + t) * 2 * block;
                const float *bx = bias + head * 2 * block, *ra = rate + head * block;
                const float *before = h + at - width;
#pragma omp simd
                for (long w = 0; w < block; w++) {
                    float x = u[at + w] * sigmoid(from_bf16(gate[w]) + bx[w]);
                    float r = sigmoid(from_bf16(gate[block + w]) + bx[block + w]);
                    float log_a = -ra[w] * r, square = fmaxf(-expm1f(2 * log_a), 1e-12f);
                    if (t == 0)
                        h[at + w] = x;
                    else
                        h[at + w] = expf(log_a) * before[w] + x * sqrtf(square);
                }
            }
}

// Gradients of rglru_forward; dbias [batch, heads, 2 * block] and drate [batch, heads * block] are
// still to be summed over the batch.
void rglru_backward(const float *u, const uint16_t *gates, const float *bias, const float *rate,
                    const float *h, const float *dh, float *du, uint16_t *dgates, float *dbias,
                    float *drate, long batch, long time, long heads, long block) {
    long width = heads * block;
#pragma omp parallel for
    for (long b = 0; b < batch; b++) {
        float carry[width];
        memset(carry, 0, width * sizeof(float));
        memset(drate + b * width, 0, width * sizeof(float));
        memset(dbias + b * width * 2, 0, 2 * width * sizeof(float));
        for (long t = time - 1; t >= 0; t--)
            for (long head = 0; head < heads; head++) {
                long at = (b * time + t) * width + head * block;
                long gate_at = ((head * batch + b) * time + t) * 2 * block;
                const uint16_t *gate = gates + gate_at;
                uint16_t *dgate = dgates + gate_at;
                const float *bx = bias + head * 2 * block, *ra = rate + head * block;
                const float *before = h + at - width;
                float *back = carry + head * block, *sum_rate = drate + b * width + head * block;
                float *sum_bias = dbias + (b * heads + head) * 2 * block;
#pragma omp simd
                for (long w = 0; w < block; w++) {
                    float d = dh[at + w] + back[w];
                    float x = sigmoid(from_bf16(gate[w]) + bx[w]);
                    float r = sigmoid(from_bf16(gate[block + w]) + bx[block + w]);
                    float a = t ? expf(-ra[w] * r) : 0.0f;
                    float scale = sqrtf(fmaxf(1 - a * a, 1e-8f));
                    float dlog_a = t ? d * a * (before[w] - u[at + w] * x * a / scale) : 0.0f;
                    float dx = d * u[at + w] * scale * x * (1 - x);
                    float dr = -dlog_a * ra[w] * r * (1 - r);
                    du[at + w] = d * x * scale;
                    dgate[w] = to_bf16(dx);
                    dgate[block + w] = to_bf16(dr);
                    sum_bias[w] += dx;
                    sum_bias[block + w] += dr;
                    sum_rate[w] -= dlog_a * r;
                    back[w] = a * d;
                }
            }
    }
}

// out = gelu_tanh(gate) * up; both: [rows, 2 * width] bf16 with the gate first.
void gated_gelu_forward(const uint16_t *both, uint16_t *out, long rows, long width) {
#pragma omp parallel for
    for (long r = 0; r < rows; r++) {
        const uint16_t *gate = both + r * 2 * width, *up = gate + width;
#pragma omp simd
        for (long w = 0; w < width; w++) {
            float x = from_bf16(gate[w]);
            // 0.5 * (1 + tanh(z)) is sigmoid(2 z).
            float s = sigmoid(1.5957691216f * (x + 0.044715f * x * x * x));
            out[r * width + w] = to_bf16(x * s * from_bf16(up[w]));
        }
    }
}

void gated_gelu_backward(const uint16_t *both, const uint16_t *dout, uint16_t *dboth, long rows,
                         long width) {
#pragma omp parallel for
    for (long r = 0; r < rows; r++) {
        const uint16_t *gate = both + r * 2 * width, *up = gate + width, *g = dout + r * width;
        uint16_t *dgate = dboth + r * 2 * width, *dup = dgate + width;
#pragma omp simd
        for (long w = 0; w < width; w++) {
            float x = from_bf16(gate[w]), d = from_bf16(g[w]);
            float s = sigmoid(1.5957691216f * (x + 0.044715f * x * x * x));
            float slope = s + x * s * (1 - s) * 1.5957691216f * (1 + 3 * 0.044715f * x * x);
            dgate[w] = to_bf16(d * from_bf16(up[w]) * slope);
            dup[w] = to_bf16(d * x * s);
        }
    }
}

// Which keys a query at `q` of block `index` sees of [the block before, its own block].
static inline void visible(long q, long index, long block, long *from, long *to) {
    *from = index ? q : block;
    *to = block + q + 1;
}

// Softmax over the visible keys, in place: scores [sequences, blocks, block, heads, 2 * block].
void window_softmax_forward(uint16_t *scores, long sequences, long blocks, long block, long heads,
                            float scale) {
#pragma omp parallel for
    for (long r = 0; r < sequences * blocks * block; r++) {
        long from, to;
        visible(r % block, r / block % blocks, block, &from, &to);
        for (long h = 0; h < heads; h++) {
            uint16_t *row = scores + (r * heads + h) * 2 * block;
            float power[2 * block], most = -1e30f, sum = 0;
            for (long k = from; k < to; k++) most = fmaxf(most, from_bf16(row[k]));
            for (long k = from; k < to; k++)
                sum += power[k] = expf(scale * (from_bf16(row[k]) - most));
            memset(row, 0, 2 * block * sizeof(uint16_t));
            for (long k = from; k < to; k++) row[k] = to_bf16(power[k] / sum);
        }
    }
}

// Overwrites the gradient of the weights by that of the scores.
void window_softmax_backward(const uint16_t *weights, uint16_t *grad, long sequences, long blocks,
                             long block, long heads, float scale) {
#pragma omp parallel for
    for (long r = 0; r < sequences * blocks * block; r++) {
        long from, to;
        visible(r % block, r / block % blocks, block, &from, &to);
        for (long h = 0; h < heads; h++) {
            const uint16_t *row = weights + (r * heads + h) * 2 * block;
            uint16_t *g = grad + (r * heads + h) * 2 * block;
            float dot = 0;
            for (long k = from; k < to; k++) dot += from_bf16(row[k]) * from_bf16(g[k]);
            memset(g, 0, from * sizeof(uint16_t));
            for (long k = from; k < to; k++)
                g[k] = to_bf16(scale * from_bf16(row[k]) * (from_bf16(g[k]) - dot));
            memset(g + to, 0, (2 * block - to) * sizeof(uint16_t));
        }
    }
}
