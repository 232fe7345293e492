"""The step model: T ≥ 1 tokens and the states in, logits and the states out.

Traced with fake weights it is the program that emitters lower.
"""

import torch
from torch import Tensor, nn

from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layer import Layer, LayerState
from rgexport.griffin.layout import EMBEDDING, QUANTIZABLE, is_linear_bias, model_tensors
from rgexport.griffin.ops import compute


class StepModel(nn.Module):
    """A whole Griffin model as a step; its parameters have canonical names.

    `dtype` is the activation dtype, float32 or float16.
    """

    def __init__(self, config: GriffinConfig, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config = config
        tensors = model_tensors(config)
        for name, spec in tensors.items():
            *path, last = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            in_activation_dtype = spec.role in QUANTIZABLE or is_linear_bias(name, tensors)
            weight = torch.empty(spec.shape, dtype=dtype if in_activation_dtype else torch.float32)
            module.register_parameter(last, nn.Parameter(weight, requires_grad=False))

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, num_logits: Tensor, states: list[LayerState]
    ) -> tuple[Tensor, list[LayerState]]:
        """One step.

        input_ids, position_ids [B, T] int64, `num_logits` last tokens that want logits, a scalar
        int64, and the states of each layer → logits [B, num_logits, V] float32 and the next states.
        """
        config, weights = self.config, dict(self.named_parameters())
        table = weights[EMBEDDING]
        x = compute("embed_tokens", "embedding", input_ids, table, config.embedding_scale)
        updated: list[LayerState] = []
        for index, state in enumerate(states):
            x, state = Layer(config, index, weights, compute)(x, position_ids, state)
            updated.append(state)
        x = compute("last_tokens", "last_tokens", x, num_logits)
        x = compute("final_norm", "rms_norm", x, weights["final_norm.weight"], config.rms_eps)
        logits = compute("lm_head", "linear", x, table, None)
        return compute("logits", "soft_cap", logits, config.soft_cap), updated
