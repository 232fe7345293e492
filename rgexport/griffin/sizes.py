"""The released RecurrentGemma models."""

import itertools
from dataclasses import dataclass

from rgexport.griffin.config import BlockType, GriffinConfig, sqrt_embedding_scale

DEMO = "demo"


def _released(layers: int, width: int, heads: int) -> GriffinConfig:
    pattern: tuple[BlockType, ...] = ("recurrent", "recurrent", "attention")
    return GriffinConfig(
        vocab_size=256_000,
        width=width,
        mlp_width=3 * width,
        lru_width=width,
        lru_heads=heads,
        num_heads=heads,
        head_dim=256,
        block_types=tuple(itertools.islice(itertools.cycle(pattern), layers)),
        embedding_scale=sqrt_embedding_scale(width),
    )


CONFIG_2B = _released(layers=26, width=2560, heads=10)
CONFIG_9B = _released(layers=38, width=4096, heads=16)


@dataclass(frozen=True)
class Size:
    hub_id: str
    config: GriffinConfig
    instruction_tuned: bool


SIZES: dict[str, Size] = {
    "2b": Size("google/recurrentgemma-2b", CONFIG_2B, False),
    "2b-it": Size("google/recurrentgemma-2b-it", CONFIG_2B, True),
    "9b": Size("google/recurrentgemma-9b", CONFIG_9B, False),
    "9b-it": Size("google/recurrentgemma-9b-it", CONFIG_9B, True),
}
SIZE_WORDS: tuple[str, ...] = (DEMO, *SIZES)
