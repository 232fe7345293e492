"""The shape of a Griffin model, independent of its checkpoint's source, and the released models."""

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes

from rgexport.files.typed_json import NotNegative, Positive
from rgexport.files.typed_json import Size as Count

BlockType = Literal["recurrent", "attention"]

RG_LRU_C = -8.0
"""The constant of the RG-LRU's `log a = c · r · softplus(Λ)` (arXiv 2402.19427, eq. 3)."""


@dataclass(frozen=True, kw_only=True)
class GriffinConfig:
    """All sizes and constants of the step model.

    Names follow the paper (arXiv 2402.19427): `mlp_width` is the width of *one* branch of the gated
    MLP, `window` the number of keys *before* the query that it sees (window + 1 with itself),
    `lru_heads` the number of diagonal blocks of the RG-LRU gates.
    """

    vocab_size: Count
    width: Count
    mlp_width: Count
    lru_width: Count
    lru_heads: Count
    num_heads: Count
    head_dim: Count
    block_types: tuple[BlockType, ...]
    window: Count = 2048
    conv_width: Count = 4
    rope_dims: Count = 128
    rope_theta: Positive = 10_000.0
    rms_eps: NotNegative = 1e-6
    soft_cap: NotNegative = 30.0
    """Logits are `soft_cap * tanh(logits / soft_cap)`; 0 means no cap."""
    embedding_scale: Positive = 1.0

    @property
    def num_layers(self) -> int:
        """The number of layers, recurrent and attention ones together."""
        return len(self.block_types)

    @property
    def query_width(self) -> int:
        """The width of the queries of all heads together."""
        return self.num_heads * self.head_dim

    @property
    def gate_block_width(self) -> int:
        """The rows, and the columns, of one diagonal block of the RG-LRU gates."""
        return self.lru_width // self.lru_heads

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields, in the types of JSON."""
        fields = dataclasses.asdict(self)
        fields["block_types"] = list(self.block_types)
        return fields


@dataclass(frozen=True, kw_only=True)
class AskedFor:
    """Changes of a checkpoint that a user asked for when it was opened; None where none was."""

    window: int | None = None
    soft_cap: float | None = None
    adapter: str | None = None

    @property
    def flags(self) -> str:
        """The changes as options of the command line, for a message; empty if there are none."""
        options = []
        for field, value in vars(self).items():
            if value is not None:
                option = field.replace("_", "-")
                options.append(f"`--{option} {value}`")
        return " and ".join(options)


NOTHING_ASKED_FOR = AskedFor()


def sqrt_embedding_scale(width: int) -> float:
    """Returns sqrt(width) rounded to bfloat16, as the released models multiply (50.5 for 2560)."""
    return float(ml_dtypes.bfloat16(math.sqrt(width)))


DEMO = "demo"
"""The word for the bundled demo model."""


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
class ReleasedModel:
    """A model that Google released on the Hugging Face hub."""

    hub_id: str
    config: GriffinConfig
    instruction_tuned: bool


SIZES: dict[str, ReleasedModel] = {
    "2b": ReleasedModel("google/recurrentgemma-2b", CONFIG_2B, False),
    "2b-it": ReleasedModel("google/recurrentgemma-2b-it", CONFIG_2B, True),
    "9b": ReleasedModel("google/recurrentgemma-9b", CONFIG_9B, False),
    "9b-it": ReleasedModel("google/recurrentgemma-9b-it", CONFIG_9B, True),
}
"""Value of `--size` → the released model."""

SIZE_WORDS: tuple[str, ...] = (DEMO, *SIZES)
"""All values of `--size`."""
