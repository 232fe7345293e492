"""Small GGUF files of other models, as other tools write them."""

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter, TokenType
from sentencepiece import SentencePieceProcessor

from rgexport.griffin.checkpoint import demo_folder
from tests.quantize.ggml_files import write_tensors

WIDTH, LAYERS, HEADS, MLP = 64, 2, 4, 96
TRAINED = 128  # the context that the files state


def write_llama(path: Path, *, vocab_size: int = 0, bytewise: bool = False, **values: Any) -> Path:
    """A Llama of random float32 weights.

    Args:
        path: the file.
        vocab_size: of one that takes ids alone; by default, it has the demo's vocabulary.
        bytewise: whether it has one of another kind, a byte-level one as GPT-2's.
        values: more metadata; those of the model without `llama.` in front.
    """
    writer = _begin(path, "llama", vocab_size)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_head_count_kv(HEADS // 2)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    for key, value in values.items():
        add = writer.add_bool if isinstance(value, bool) else writer.add_uint32
        add(key if key.startswith("tokenizer.") else f"llama.{key}", value)
    if not vocab_size:
        vocab_size = (_add_bytewise if bytewise else _add_sentencepiece)(writer)
    kv_width = WIDTH // 2
    shapes = {
        **{f"attn_{name}": (WIDTH, WIDTH) for name in ("q", "output")},
        **{f"attn_{name}": (kv_width, WIDTH) for name in "kv"},
        **{f"ffn_{name}": (MLP, WIDTH) for name in ("gate", "up")},
        "ffn_down": (WIDTH, MLP),
        **{f"{name}_norm": (WIDTH,) for name in ("attn", "ffn")},
    }
    tensors = {"token_embd": (vocab_size, WIDTH), "output_norm": (WIDTH,)}
    return _finish(writer, path, tensors, shapes)


def write_gpt2(path: Path, vocab_size: int = 100) -> Path:
    """A GPT-2, whose positions have embeddings: as many as its context is long."""
    writer = _begin(path, "gpt2", vocab_size)
    writer.add_layer_norm_eps(1e-5)
    weights = {
        "attn_qkv": (3 * WIDTH, WIDTH),
        "attn_output": (WIDTH, WIDTH),
        "ffn_up": (MLP, WIDTH),
        "ffn_down": (WIDTH, MLP),
    }
    shapes = weights | {f"{name}.bias": shape[:1] for name, shape in weights.items()}
    for name in ("attn_norm", "ffn_norm"):
        shapes |= {name: (WIDTH,), f"{name}.bias": (WIDTH,)}
    tensors = {"token_embd": (vocab_size, WIDTH), "position_embd": (TRAINED, WIDTH)}
    tensors |= {"output_norm": (WIDTH,), "output_norm.bias": (WIDTH,)}
    return _finish(writer, path, tensors, shapes)


def _begin(path: Path, architecture: str, vocab_size: int) -> GGUFWriter:
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(TRAINED)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_file_type(0)
    if vocab_size:
        writer.add_vocab_size(vocab_size)
        writer.add_tokenizer_model("none")
    return writer


def _add_sentencepiece(writer: GGUFWriter) -> int:
    pieces = SentencePieceProcessor(str(demo_folder() / "tokenizer.model"))
    size: int = pieces.GetPieceSize()
    kinds = (
        (pieces.IsControl, TokenType.CONTROL),
        (pieces.IsUnknown, TokenType.UNKNOWN),
        (pieces.IsByte, TokenType.BYTE),
    )
    writer.add_tokenizer_model("llama")
    writer.add_token_list([pieces.IdToPiece(i) for i in range(size)])
    writer.add_token_scores([pieces.GetScore(i) for i in range(size)])
    types = (next((kind for is_so, kind in kinds if is_so(i)), None) for i in range(size))
    writer.add_token_types([kind or TokenType.NORMAL for kind in types])
    writer.add_bos_token_id(pieces.bos_id())
    writer.add_eos_token_id(pieces.eos_id())
    writer.add_unk_token_id(pieces.unk_id())
    return size


def _add_bytewise(writer: GGUFWriter) -> int:
    """The 256 bytes, three merges, and an end of text, with which no text begins."""
    merges = ["Ġ t", "h e", "Ġt he"]
    tokens = [*_letters(), *(merge.replace(" ", "") for merge in merges), "<|endoftext|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.NORMAL] * (len(tokens) - 1) + [TokenType.CONTROL])
    writer.add_token_merges(merges)
    for add in (writer.add_bos_token_id, writer.add_eos_token_id):
        add(len(tokens) - 1)
    writer.add_add_bos_token(False)
    return len(tokens)


def _letters() -> list[str]:
    """The letter that GPT-2's vocabulary has for each byte: itself, or one from 256 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(others)) for byte in range(256)]


def _finish(
    writer: GGUFWriter, path: Path, tensors: dict[str, Any], layer: dict[str, tuple[int, ...]]
) -> Path:
    """Draws the tensors; queries and keys are large enough for attention to be far from even."""
    random = np.random.default_rng(3)
    for i in range(LAYERS):
        tensors = tensors | {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    for name, shape in tensors.items():
        values = random.standard_normal(shape).astype(np.float32)
        if "norm" in name and not name.endswith(".bias"):
            values = 1 + values / 8
        elif "embd" in name:
            values /= 4  # for logits that are no larger than a trained model's
        else:
            values *= (4 if name.endswith(("attn_q", "attn_k")) else 1) / np.sqrt(shape[-1])
        writer.add_tensor(name if name.endswith(".bias") else f"{name}.weight", values)
    write_tensors(writer, {})
    return path
