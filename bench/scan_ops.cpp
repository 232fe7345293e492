// Ways to compute h_t = a_t*h_{t-1} + x_t for 2560 channels with ggml, on the CPU backend.
//
// One line per way and number of tokens: name, tokens, median microseconds, largest error against float64.
// `python -m bench.llama_scan` builds and runs it against the patched tree.
#include "ggml.h"
#include "ggml-cpu.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

static const int64_t WIDTH = 2560;

using build_fn = std::function<ggml_tensor * (ggml_context *, ggml_tensor * x, ggml_tensor * a, ggml_tensor * h0)>;

// what the port does for one token
static ggml_tensor * mul_add(ggml_context * ctx, ggml_tensor * x, ggml_tensor * a, ggml_tensor * h0) {
    return ggml_add(ctx, ggml_mul(ctx, a, h0), x);
}

// gated linear attention with heads of a single channel
static ggml_tensor * gated_linear_attn(ggml_context * ctx, ggml_tensor * x, ggml_tensor * a, ggml_tensor * h0) {
    ggml_tensor * v   = ggml_reshape_3d(ctx, x, 1, WIDTH, x->ne[1]);
    ggml_tensor * g   = ggml_reshape_3d(ctx, a, 1, WIDTH, x->ne[1]);
    ggml_tensor * one = ggml_fill(ctx, v, 1.0f);

    return ggml_gated_linear_attn(ctx, one, v, one, g, h0, 1.0f);
}

// a custom operator: no backend but the CPU can run it
static void scan_custom(ggml_tensor * dst, const ggml_tensor * x, const ggml_tensor * a, const ggml_tensor * h0, int ith, int nth, void *) {
    const int64_t begin = WIDTH*ith/nth, end = WIDTH*(ith + 1)/nth;
    const float * prev  = (const float *) h0->data;

    for (int64_t t = 0; t < x->ne[1]; ++t) {
        const float * xt = (const float *) x->data + t*WIDTH;
        const float * at = (const float *) a->data + t*WIDTH;
        float * ht = (float *) dst->data + t*WIDTH;
        for (int64_t i = begin; i < end; ++i) {
            ht[i] = at[i]*prev[i] + xt[i];
        }
        prev = ht;
    }
}

static ggml_tensor * custom(ggml_context * ctx, ggml_tensor * x, ggml_tensor * a, ggml_tensor * h0) {
    return ggml_map_custom3(ctx, x, a, h0, scan_custom, GGML_N_TASKS_MAX, nullptr);
}

// standard operators, log2(T) passes: (a, x) of 2^k tokens at once
static ggml_tensor * log_depth(ggml_context * ctx, ggml_tensor * x, ggml_tensor * a, ggml_tensor * h0) {
    const int64_t n = x->ne[1];

    for (int64_t d = 1; d < n; d *= 2) {
        auto head = [&](ggml_tensor * t) { return ggml_view_2d(ctx, t, WIDTH, d,     t->nb[1], 0); };
        auto body = [&](ggml_tensor * t) { return ggml_view_2d(ctx, t, WIDTH, n - d, t->nb[1], 0); };
        auto tail = [&](ggml_tensor * t) { return ggml_view_2d(ctx, t, WIDTH, n - d, t->nb[1], d*t->nb[1]); };

        x = ggml_concat(ctx, head(x), ggml_add(ctx, ggml_mul(ctx, tail(a), body(x)), tail(x)), 1);
        a = ggml_concat(ctx, head(a), ggml_mul(ctx, tail(a), body(a)), 1);
    }
    return ggml_add(ctx, ggml_mul(ctx, a, h0), x);
}

static void measure(const char * name, const build_fn & build, int64_t n_tokens, int n_threads) {
    ggml_init_params params = { /*.mem_size =*/ size_t(2) << 30, /*.mem_buffer =*/ nullptr, /*.no_alloc =*/ false };
    ggml_context * ctx = ggml_init(params);

    ggml_tensor * x  = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, WIDTH, n_tokens);
    ggml_tensor * a  = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, WIDTH, n_tokens);
    ggml_tensor * h0 = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, WIDTH);

    std::mt19937 rng(1);
    std::normal_distribution<float> normal;
    std::uniform_real_distribution<float> decay(0.9f, 0.9999f);
    for (int64_t i = 0; i < WIDTH*n_tokens; ++i) {
        ((float *) x->data)[i] = normal(rng);
        ((float *) a->data)[i] = decay(rng);
    }
    for (int64_t i = 0; i < WIDTH; ++i) {
        ((float *) h0->data)[i] = normal(rng);
    }

    ggml_tensor * h  = build(ctx, x, a, h0);
    ggml_cgraph * gf = ggml_new_graph(ctx);
    ggml_build_forward_expand(gf, h);

    std::vector<double> times;
    for (int i = 0; i < 41; ++i) {
        const auto start = std::chrono::steady_clock::now();
        ggml_graph_compute_with_ctx(ctx, gf, n_threads);
        times.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count());
    }
    std::nth_element(times.begin(), times.begin() + times.size()/2, times.end());

    double error = 0.0;
    for (int64_t i = 0; i < WIDTH; ++i) {
        double state = ((float *) h0->data)[i];
        for (int64_t t = 0; t < n_tokens; ++t) {
            state = ((float *) a->data)[t*WIDTH + i]*state + ((float *) x->data)[t*WIDTH + i];
            error = std::max(error, std::fabs(state - ((float *) h->data)[t*WIDTH + i]));
        }
    }
    printf("%s,%d,%.1f,%.2g\n", name, (int) n_tokens, times[times.size()/2], error);
    ggml_free(ctx);
}

int main(int argc, char ** argv) {
    const int n_threads = argc > 1 ? atoi(argv[1]) : 2;

    measure("mul_add", mul_add, 1, n_threads);
    for (int64_t n_tokens : {1, 32, 512}) {
        measure("gated_linear_attn", gated_linear_attn, n_tokens, n_threads);
        measure("custom",            custom,            n_tokens, n_threads);
        measure("log_depth",         log_depth,         n_tokens, n_threads);
    }
}
