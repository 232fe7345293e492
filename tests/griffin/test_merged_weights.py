"""A LoRA adapter is added to the weights below it. PEFT's own adapters are in test_adapter.py."""

import json

import numpy as np
from safetensors.numpy import save_file

from rgexport.griffin.adapter import CONFIG, WEIGHTS
from rgexport.griffin.checkpoint import open_checkpoint
from tests.models import make_config, random_weights, write_hugging_face

MODULE, SHAPE = "layers.1.mlp_block.up_proj", make_config("ra", width=32, heads=2, mlp_width=48)


def test_the_scaled_product_is_added_to_a_linear(tmp_path):
    weights, rng = random_weights(SHAPE), np.random.default_rng(0)
    base = write_hugging_face(SHAPE, weights, tmp_path / "base")
    a, b = rng.standard_normal((4, 32), np.float32), rng.standard_normal((48, 4), np.float32)
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 12, "target_modules": ["up_proj"]}
    (base / CONFIG).write_text(json.dumps(fields))
    name = f"base_model.model.model.{MODULE}.lora"
    save_file({f"{name}_A.weight": a, f"{name}_B.weight": b}, base / WEIGHTS)
    merged = open_checkpoint(base, adapter=base).weights[f"{MODULE}.weight"].whole()
    assert np.abs(merged - weights[f"{MODULE}.weight"] - 3 * b @ a).max() < 1e-5
