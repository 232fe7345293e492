#include "models.h"
#include "../llama-memory-hybrid-iswa.h"
#include "../llama-memory-recurrent.h"

#include <algorithm>

// RecurrentGemma (Griffin): RG-LRU linear recurrences and local attention
//
// ref: https://arxiv.org/abs/2402.19427
// ref: https://github.com/google-deepmind/recurrentgemma/blob/main/recurrentgemma/torch/layers.py

void llama_model_recurrentgemma::load_arch_hparams(llama_model_loader & ml) {
    // the reference rounds the scale to bf16
    hparams.f_embedding_scale         = ggml_bf16_to_fp32(ggml_fp32_to_bf16(sqrtf(hparams.n_embd)));
    hparams.f_final_logit_softcapping = 30.0f;

    ml.get_key(LLM_KV_ATTENTION_LAYERNORM_RMS_EPS, hparams.f_norm_rms_eps);
    ml.get_key(LLM_KV_ATTENTION_SLIDING_WINDOW,    hparams.n_swa);
    ml.get_key(LLM_KV_EMBEDDING_SCALE,             hparams.f_embedding_scale,         false);
    ml.get_key(LLM_KV_FINAL_LOGIT_SOFTCAPPING,     hparams.f_final_logit_softcapping, false);

    // the RG-LRU keeps one state per channel; its gates are block-diagonal
    hparams.ssm_d_state = 1;
    hparams.ssm_n_group = 0;

    ml.get_key(LLM_KV_SSM_CONV_KERNEL,    hparams.ssm_d_conv);
    ml.get_key(LLM_KV_SSM_INNER_SIZE,     hparams.ssm_d_inner);
    ml.get_key(LLM_KV_SSM_TIME_STEP_RANK, hparams.ssm_dt_rank);

    if (hparams.ssm_dt_rank == 0 || hparams.ssm_d_inner % hparams.ssm_dt_rank != 0) {
        throw std::runtime_error("the gates of the RG-LRU must divide its width into equal blocks");
    }

    // every layer that is not recurrent attends to a sliding window
    hparams.swa_type                  = LLAMA_SWA_TYPE_STANDARD;
    hparams.rope_freq_base_train_swa  = hparams.rope_freq_base_train;
    hparams.rope_freq_scale_train_swa = hparams.rope_freq_scale_train;

    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        hparams.is_recr_impl[il] = hparams.n_head_kv(il) == 0;
        hparams.is_swa_impl [il] = hparams.n_head_kv(il) != 0;
    }

    switch (hparams.n_layer()) {
        case 26: type = LLM_TYPE_2B; break;
        case 38: type = LLM_TYPE_9B; break;
        default: type = LLM_TYPE_UNKNOWN;
    }
}

void llama_model_recurrentgemma::load_arch_tensors(llama_model_loader &) {
    LLAMA_LOAD_LOCALS;

    const int64_t d_conv  = hparams.ssm_d_conv;
    const int64_t d_inner = hparams.ssm_d_inner;
    const int64_t n_block = hparams.ssm_dt_rank; // of the gates
    const int64_t d_block = d_inner / n_block;

    tok_embd = create_tensor(tn(LLM_TENSOR_TOKEN_EMBD, "weight"), {n_embd, n_vocab}, 0);

    output_norm = create_tensor(tn(LLM_TENSOR_OUTPUT_NORM, "weight"), {n_embd}, 0);
    output      = create_tensor(tn(LLM_TENSOR_TOKEN_EMBD,  "weight"), {n_embd, n_vocab}, TENSOR_DUPLICATED); // same as tok_embd, duplicated to allow offloading

    for (int i = 0; i < n_layer; ++i) {
        auto & layer = layers[i];

        layer.attn_norm = create_tensor(tn(LLM_TENSOR_ATTN_NORM, "weight", i), {n_embd}, 0);

        if (hparams.is_recr(i)) {
            layer.ssm_in       = create_tensor(tn(LLM_TENSOR_SSM_IN,     "weight", i), {n_embd, d_inner}, 0);
            layer.ssm_in_b     = create_tensor(tn(LLM_TENSOR_SSM_IN,     "bias",   i), {d_inner}, 0);
            layer.wg           = create_tensor(tn(LLM_TENSOR_ATTN_GATE,  "weight", i), {n_embd, d_inner}, 0);
            layer.wg_b         = create_tensor(tn(LLM_TENSOR_ATTN_GATE,  "bias",   i), {d_inner}, 0);
            layer.ssm_conv1d   = create_tensor(tn(LLM_TENSOR_SSM_CONV1D, "weight", i), {d_conv, d_inner}, 0);
            layer.ssm_conv1d_b = create_tensor(tn(LLM_TENSOR_SSM_CONV1D, "bias",   i), {d_inner}, 0);

            layer.rg_lru_input_gate   = create_tensor(tn(LLM_TENSOR_RG_LRU_INPUT_GATE, "weight", i), {d_block, d_block, n_block}, 0);
            layer.rg_lru_input_gate_b = create_tensor(tn(LLM_TENSOR_RG_LRU_INPUT_GATE, "bias",   i), {d_inner}, 0);
            layer.rg_lru_a_gate       = create_tensor(tn(LLM_TENSOR_RG_LRU_A_GATE,     "weight", i), {d_block, d_block, n_block}, 0);
            layer.rg_lru_a_gate_b     = create_tensor(tn(LLM_TENSOR_RG_LRU_A_GATE,     "bias",   i), {d_inner}, 0);

            // -8*softplus(a_param), no "weight" suffix
            layer.ssm_a = create_tensor(tn(LLM_TENSOR_SSM_A_NOSCAN, i), {d_inner}, 0);

            layer.ssm_out   = create_tensor(tn(LLM_TENSOR_SSM_OUT, "weight", i), {d_inner, n_embd}, 0);
            layer.ssm_out_b = create_tensor(tn(LLM_TENSOR_SSM_OUT, "bias",   i), {n_embd}, 0);
        } else {
            create_tensor_qkv(layer, i, n_embd, n_embd_head_k * hparams.n_head(i), hparams.n_embd_k_gqa(i), hparams.n_embd_v_gqa(i), 0);

            layer.wo   = create_tensor(tn(LLM_TENSOR_ATTN_OUT, "weight", i), {n_embd_head_v * hparams.n_head(i), n_embd}, 0);
            layer.wo_b = create_tensor(tn(LLM_TENSOR_ATTN_OUT, "bias",   i), {n_embd}, 0);
        }

        layer.ffn_norm   = create_tensor(tn(LLM_TENSOR_FFN_NORM, "weight", i), {n_embd}, 0);
        layer.ffn_gate   = create_tensor(tn(LLM_TENSOR_FFN_GATE, "weight", i), {n_embd, n_ff}, 0);
        layer.ffn_gate_b = create_tensor(tn(LLM_TENSOR_FFN_GATE, "bias",   i), {n_ff}, 0);
        layer.ffn_up     = create_tensor(tn(LLM_TENSOR_FFN_UP,   "weight", i), {n_embd, n_ff}, 0);
        layer.ffn_up_b   = create_tensor(tn(LLM_TENSOR_FFN_UP,   "bias",   i), {n_ff}, 0);
        layer.ffn_down   = create_tensor(tn(LLM_TENSOR_FFN_DOWN, "weight", i), {n_ff, n_embd}, 0);
        layer.ffn_down_b = create_tensor(tn(LLM_TENSOR_FFN_DOWN, "bias",   i), {n_embd}, 0);
    }
}

std::unique_ptr<llm_graph_context> llama_model_recurrentgemma::build_arch_graph(const llm_graph_params & params) const {
    return std::make_unique<graph>(*this, params);
}

llama_model_recurrentgemma::graph::graph(const llama_model & model, const llm_graph_params & params) :
    llm_graph_context(params), model(model) {

    ggml_tensor * inpL = build_inp_embd(model.tok_embd);

    auto * inp = build_inp_mem_hybrid_iswa();

    // set for every batch, so it must be allocated even if no layer is recurrent
    ggml_build_forward_expand(gf, inp->get_recr()->s_copy);

    ggml_tensor * inp_pos     = build_inp_pos();
    ggml_tensor * inp_out_ids = build_inp_out_ids();

    // 0 for the first token of a sequence, 1 for all others
    ggml_tensor * not_first = ggml_step(ctx0, ggml_cast(ctx0, inp_pos, GGML_TYPE_F32));
    not_first = ggml_reshape_3d(ctx0, not_first, 1, ubatch.n_seq_tokens, ubatch.n_seqs);
    cb(not_first, "not_first", -1);

    for (int il = 0; il < n_layer; ++il) {
        res->t_layer_inp[il] = inpL;

        ggml_tensor * cur = build_norm(inpL, model.layers[il].attn_norm, nullptr, LLM_NORM_RMS, il);
        cb(cur, "attn_norm", il);

        cur = hparams.is_recr(il) ? build_recurrent(inp->get_recr(), cur, not_first, il) :
                                    build_attention(inp->get_attn(), cur, inp_pos,   il);

        if (il == n_layer - 1 && inp_out_ids) {
            cur  = ggml_get_rows(ctx0, cur,  inp_out_ids);
            inpL = ggml_get_rows(ctx0, inpL, inp_out_ids);
        }

        ggml_tensor * residual = ggml_add(ctx0, cur, inpL);
        cb(residual, "residual", il);

        cur = build_norm(residual, model.layers[il].ffn_norm, nullptr, LLM_NORM_RMS, il);
        cb(cur, "ffn_norm", il);

        cur = build_mlp(cur, il);
        cb(cur, "ffn_out", il);

        cur = ggml_add(ctx0, cur, residual);

        cur = build_cvec(cur, il);
        cb(cur, "l_out", il);

        // input for next layer
        inpL = cur;
    }

    ggml_tensor * cur = build_norm(inpL, model.output_norm, nullptr, LLM_NORM_RMS, -1);
    cb(cur, "result_norm", -1);
    res->t_embd = cur;

    // lm_head
    cur = build_lora_mm(model.output, cur, model.output_s);

    // final logit soft-capping
    if (hparams.f_final_logit_softcapping > 0.0f) {
        cur = ggml_scale(ctx0, cur, 1.0f / hparams.f_final_logit_softcapping);
        cur = ggml_tanh (ctx0, cur);
        cur = ggml_scale(ctx0, cur, hparams.f_final_logit_softcapping);
    }

    cb(cur, "result_output", -1);
    res->t_logits = cur;

    ggml_build_forward_expand(gf, cur);
}

ggml_tensor * llama_model_recurrentgemma::graph::build_attention(
        llm_graph_input_attn_kv_iswa * inp,
        ggml_tensor                  * cur,
        ggml_tensor                  * inp_pos,
        int                            il) const {
    const int64_t n_embd_head = hparams.n_embd_head_v();

    GGML_ASSERT(n_embd_head == hparams.n_embd_head_k());

    auto [Qcur, Kcur, Vcur] = build_qkv(model.layers[il], cur, n_embd_head, hparams.n_head(il), hparams.n_head_kv(il), il);

    Qcur = ggml_rope_ext(
            ctx0, Qcur, inp_pos, nullptr,
            hparams.n_rot(il), rope_type, n_ctx_orig, freq_base, freq_scale,
            ext_factor, attn_factor, beta_fast, beta_slow);

    Kcur = ggml_rope_ext(
            ctx0, Kcur, inp_pos, nullptr,
            hparams.n_rot(il), rope_type, n_ctx_orig, freq_base, freq_scale,
            ext_factor, attn_factor, beta_fast, beta_slow);

    cb(Qcur, "Qcur", il);
    cb(Kcur, "Kcur", il);
    cb(Vcur, "Vcur", il);

    return build_attn(inp, model.layers[il].wo, model.layers[il].wo_b, model.layers[il].wo_s,
            Qcur, Kcur, Vcur, nullptr, nullptr, nullptr, 1.0f / sqrtf(float(n_embd_head)), il);
}

ggml_tensor * llama_model_recurrentgemma::graph::build_mlp(
        ggml_tensor * cur,
        int           il) const {
    const auto & layer = model.layers[il];

    ggml_tensor * gate = ggml_add(ctx0, build_lora_mm(layer.ffn_gate, cur, layer.ffn_gate_s), layer.ffn_gate_b);
    cb(gate, "ffn_gate", il);

    ggml_tensor * up = ggml_add(ctx0, build_lora_mm(layer.ffn_up, cur, layer.ffn_up_s), layer.ffn_up_b);
    cb(up, "ffn_up", il);

    cur = build_geglu(gate, up);
    cb(cur, "ffn_geglu", il);

    return ggml_add(ctx0, build_lora_mm(layer.ffn_down, cur, layer.ffn_down_s), layer.ffn_down_b);
}

// gelu(x)*y, with the tanh approximation of the reference: gelu(x) = x*sigmoid(u), u = x*p, p = 2*sqrt(2/pi)*(1 + 0.044715*x^2)
// ggml_geglu_split looks gelu up in an F16 table on the CPU, which alone moves the logits by 1e-3; silu(u)/p is exact in F32
ggml_tensor * llama_model_recurrentgemma::graph::build_geglu(
        ggml_tensor * x,
        ggml_tensor * y) const {
    const float c = 2.0f*0.79788456080286535588f;

    ggml_tensor * p = ggml_scale_bias(ctx0, ggml_sqr(ctx0, x), c*0.044715f, c);

    return ggml_swiglu_split(ctx0, ggml_mul(ctx0, x, p), ggml_div(ctx0, y, p));
}

ggml_tensor * llama_model_recurrentgemma::graph::build_recurrent(
        llm_graph_input_rs * inp,
        ggml_tensor        * cur,
        ggml_tensor        * not_first,
        int                  il) const {
    const auto & layer = model.layers[il];

    ggml_tensor * y = ggml_add(ctx0, build_lora_mm(layer.wg, cur), layer.wg_b);
    cb(y, "linear_y", il);

    ggml_tensor * x = ggml_add(ctx0, build_lora_mm(layer.ssm_in, cur, layer.ssm_in_s), layer.ssm_in_b);
    cb(x, "linear_x", il);

    x = build_conv1d(inp, x, il);
    x = build_rg_lru(inp, x, not_first, il);

    cur = build_geglu(y, ggml_reshape_2d(ctx0, x, x->ne[0], n_tokens));
    cb(cur, "recurrent_gated", il);

    cur = ggml_add(ctx0, build_lora_mm(layer.ssm_out, cur, layer.ssm_out_s), layer.ssm_out_b);
    cb(cur, "linear_out", il);

    return cur;
}

// {d_inner, n_tokens} => {d_inner, n_seq_tokens, n_seqs}
ggml_tensor * llama_model_recurrentgemma::graph::build_conv1d(
        llm_graph_input_rs * inp,
        ggml_tensor        * x,
        int                  il) const {
    const int64_t d_conv       = hparams.ssm_d_conv - 1;
    const int64_t d_inner      = hparams.ssm_d_inner;
    const int64_t n_seqs       = ubatch.n_seqs;
    const int64_t n_seq_tokens = ubatch.n_seq_tokens;

    GGML_ASSERT(n_seqs != 0);
    GGML_ASSERT(ubatch.equal_seqs());
    GGML_ASSERT(ubatch.n_tokens == n_seq_tokens * n_seqs);

    ggml_tensor * states = inp->mctx->get_r_l(il);

    ggml_tensor * state = build_rs(inp, states, hparams.n_embd_r(), n_seqs);
    state = ggml_reshape_3d(ctx0, state, d_conv, d_inner, n_seqs);

    x = ggml_reshape_3d(ctx0, x, d_inner, n_seq_tokens, n_seqs);
    x = ggml_concat(ctx0, state, ggml_transpose(ctx0, x), 0);
    cb(x, "conv_input", il);

    // the state s tokens back are the d_conv columns that end s columns before the last one
    store_state(inp, states, [&](int64_t s) {
        return ggml_view_3d(ctx0, x, d_conv, d_inner, n_seqs, x->nb[1], x->nb[2],
                            (x->ne[0] - d_conv - s) * x->nb[0]);
    });

    x = ggml_ssm_conv(ctx0, x, model.layers[il].ssm_conv1d);
    x = ggml_add(ctx0, x, model.layers[il].ssm_conv1d_b);
    cb(x, "conv_output", il);

    return x;
}

// {d_inner, n_seq_tokens, n_seqs} => same
ggml_tensor * llama_model_recurrentgemma::graph::build_rg_lru(
        llm_graph_input_rs * inp,
        ggml_tensor        * x,
        ggml_tensor        * not_first,
        int                  il) const {
    const auto & layer = model.layers[il];

    const int64_t d_inner      = hparams.ssm_d_inner;
    const int64_t n_seqs       = ubatch.n_seqs;
    const int64_t n_seq_tokens = ubatch.n_seq_tokens;

    // the gates are block-diagonal and read the same blocks of x
    ggml_tensor * blocks = ggml_reshape_3d(ctx0, x, d_inner / hparams.ssm_dt_rank, hparams.ssm_dt_rank, n_tokens);
    blocks = ggml_cont(ctx0, ggml_permute(ctx0, blocks, 0, 2, 1, 3));

    auto gate = [&](ggml_tensor * w, ggml_tensor * b) {
        ggml_tensor * cur = ggml_permute(ctx0, ggml_mul_mat(ctx0, w, blocks), 0, 2, 1, 3);
        cur = ggml_cont_3d(ctx0, cur, d_inner, n_seq_tokens, n_seqs);
        return ggml_sigmoid(ctx0, ggml_add(ctx0, cur, b));
    };

    ggml_tensor * gate_x = gate(layer.rg_lru_input_gate, layer.rg_lru_input_gate_b);
    cb(gate_x, "rg_lru_input_gate", il);

    ggml_tensor * gate_a = gate(layer.rg_lru_a_gate, layer.rg_lru_a_gate_b);
    cb(gate_a, "rg_lru_a_gate", il);

    ggml_tensor * log_a = ggml_mul(ctx0, gate_a, layer.ssm_a);
    cb(log_a, "rg_lru_log_a", il);

    // a = 0 resets the recurrence where a sequence begins, and leaves its first input unscaled
    ggml_tensor * a  = ggml_mul(ctx0, ggml_exp(ctx0, log_a), not_first);
    ggml_tensor * a2 = ggml_mul(ctx0, ggml_exp(ctx0, ggml_scale(ctx0, log_a, 2.0f)), not_first);
    cb(a, "rg_lru_a", il);

    ggml_tensor * multiplier = ggml_sqrt(ctx0, ggml_scale_bias(ctx0, a2, -1.0f, 1.0f));
    cb(multiplier, "rg_lru_multiplier", il);

    x = ggml_mul(ctx0, ggml_mul(ctx0, x, gate_x), multiplier);
    cb(x, "rg_lru_input", il);

    ggml_tensor * states = inp->mctx->get_s_l(il);
    ggml_tensor * state  = build_rs(inp, states, hparams.n_embd_s(), n_seqs);

    ggml_tensor * h = build_scan(x, a, state);
    cb(h, "rg_lru", il);

    store_state(inp, states, [&](int64_t s) {
        return ggml_view_2d(ctx0, h, d_inner, n_seqs, h->nb[2], (n_seq_tokens - 1 - s) * h->nb[1]);
    });

    return h;
}

// h_t = a_t*h_{t-1} + x_t for every channel
ggml_tensor * llama_model_recurrentgemma::graph::build_scan(
        ggml_tensor * x,
        ggml_tensor * a,
        ggml_tensor * state) const {
    const int64_t d_inner      = x->ne[0];
    const int64_t n_seq_tokens = x->ne[1];
    const int64_t n_seqs       = x->ne[2];

    if (n_seq_tokens == 1) {
        return ggml_add(ctx0, ggml_mul(ctx0, a, ggml_reshape_3d(ctx0, state, d_inner, 1, n_seqs)), x);
    }

    // gated linear attention with heads of a single channel
    ggml_tensor * v = ggml_reshape_3d(ctx0, x, 1, d_inner, n_tokens);
    ggml_tensor * g = ggml_reshape_3d(ctx0, a, 1, d_inner, n_tokens);
    ggml_tensor * one = ggml_fill(ctx0, v, 1.0f);

    ggml_tensor * h = ggml_gated_linear_attn(ctx0, one, v, one, g, state, 1.0f);

    // the states that follow the outputs equal those of the last tokens
    return ggml_view_3d(ctx0, h, d_inner, n_seq_tokens, n_seqs, h->nb[1], n_seq_tokens * h->nb[1], 0);
}

// slot 0 = the final state, slot s = the state s tokens back (partial rollback)
void llama_model_recurrentgemma::graph::store_state(
        llm_graph_input_rs                                * inp,
        ggml_tensor                                       * states,
        const std::function<ggml_tensor * (int64_t slot)> & state_at) const {
    const int64_t n_slots = std::min<int64_t>(ubatch.n_seq_tokens, cparams.n_rs_seq + 1);

    for (int64_t s = 0; s < n_slots; ++s) {
        const size_t row = s * inp->mctx->get_size() + inp->mctx->get_head();

        ggml_build_forward_expand(gf, ggml_cpy(ctx0, state_at(s),
            ggml_view_2d(ctx0, states, states->ne[0], ubatch.n_seqs, states->nb[1], row * states->nb[1])));
    }
}
