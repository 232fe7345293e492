"""Writes a trained model as a Hugging Face folder in the layout of recurrentgemma-2b-it."""

import json
import shutil
from pathlib import Path

import torch
from model import Griffin
from safetensors.torch import load_file, save_file
from tokenizer import BOS, END_OF_TURN, EOS, PAD

from rgexport.griffin.control_tokens import GEMMA_TEMPLATE


def write(model: Griffin, tokenizer: Path, folder: Path) -> None:
    """Weights in bf16, configuration and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        f"model.{name}": tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
    ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    write_json(folder / "config.json", configuration(model) | ids)
    generation = {"bos_token_id": BOS, "eos_token_id": [EOS, END_OF_TURN], "pad_token_id": PAD}
    write_json(folder / "generation_config.json", {"_from_model_config": True, **generation})
    tokens = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    tokens["unk_token"] = "<unk>"
    write_json(
        folder / "special_tokens_map.json",
        {"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"], **tokens},
    )
    write_json(folder / "tokenizer_config.json", tokenizer_configuration() | tokens)


def read(model: Griffin, folder: Path) -> None:
    """Takes the weights of a folder that `write` made."""
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): w for name, w in weights.items()})


def configuration(model: Griffin) -> dict[str, object]:
    """config.json as the 2B checkpoints have it."""
    shape = model.shape
    return {
        "architectures": ["RecurrentGemmaForCausalLM"],
        "model_type": "recurrent_gemma",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_window_size": shape.window,
        "_block_types": list(shape.pattern),
        "block_types": list(shape.pattern),
        "conv1d_width": shape.conv,
        "embeddings_scale_by_sqrt_dim": True,
        "final_w_init_variance_scale": 2.0 / shape.layers,
        "head_dim": shape.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": shape.width,
        "intermediate_size": 2 * shape.branch,  # both branches together
        "logits_soft_cap": shape.cap,
        "lru_width": shape.width,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": 1,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": shape.eps,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": shape.vocab,
        "w_init_variance_scale": 0.01,
    }


def tokenizer_configuration() -> dict[str, object]:
    """tokenizer_config.json with Gemma's chat template."""
    special = {"<pad>": PAD, "<eos>": EOS, "<bos>": BOS, "<unk>": 3}
    special |= {"<start_of_turn>": END_OF_TURN - 1, "<end_of_turn>": END_OF_TURN}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(i): {"content": piece, **flags, "special": True} for piece, i in special.items()
        },
        "additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"],
        "chat_template": GEMMA_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "sp_model_kwargs": {},
        "spaces_between_special_tokens": False,
        "tokenizer_class": "GemmaTokenizer",
        "use_default_system_prompt": False,
    }


def write_json(path: Path, value: object) -> None:
    """Readable JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
