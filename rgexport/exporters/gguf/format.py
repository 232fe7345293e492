"""The format of GGUF files."""

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from rgexport.exporters.artifact import Artifact
from rgexport.exporters.format import CardText, FileFormat, render
from rgexport.exporters.manifest import Manifest
from rgexport.files.targets import check_file_target
from rgexport.griffin.layout import model_tensors
from rgexport.quantization.ggml_types import TYPES
from rgexport.quantization.gguf_header import is_gguf
from rgexport.quantization.plan import PRECISIONS
from rgexport.quantization.scheme import PartShapes, Scheme, Uniform

if TYPE_CHECKING:
    from rgexport.griffin.checkpoint import Checkpoint

_TENSOR_BYTES = 96


class GgufFormat(FileFormat):
    precisions = PRECISIONS
    runs_on = (
        "in the llama.cpp that `rgexport llama-cpp build` makes (stock llama.cpp, ollama and LM "
        "Studio do not know RecurrentGemma yet)"
    )
    alignment = 32
    has_row_groups = False
    hash_name = "data_sha256"  # no file can hold its own hash

    def owns(self, path: Path) -> bool:
        """Accepts files that begin like GGUF, and names in `.gguf` that are no folders."""
        return is_gguf(path) or (path.suffix == ".gguf" and not path.is_dir())

    def check_target(self, target: Path, *, force: bool) -> None:
        check_file_target(target, force=force, replaceable=is_gguf)

    def open(self, path: Path, *, verify: bool) -> Artifact:
        from rgexport.exporters.gguf.artifact import open_gguf

        return open_gguf(path, verify=verify)

    def part_shapes(self, shape: tuple[int, ...], scheme: Scheme) -> PartShapes:
        """Returns the bytes of a ggml type; other schemes become float32."""
        kind = scheme.ggml_type or "f32"
        return {"data": ("uint8", (shape[0], TYPES[kind].row_bytes(prod(shape[1:]))))}

    def candidate(self, scheme: Uniform, shape: tuple[int, ...]) -> Uniform | None:
        kind = scheme.ggml_type
        fits = kind and shape[0] > 1 and TYPES[kind].fits(shape[1])
        return scheme if fits else None

    def overhead_bytes(self, checkpoint: "Checkpoint") -> int:
        from rgexport.exporters.gguf.vocabulary import read_vocabulary

        vocabulary = read_vocabulary(checkpoint.tokenizer_files, checkpoint.config.vocab_size)
        tokens = [] if vocabulary is None else vocabulary.tokens
        tensors = _TENSOR_BYTES * len(model_tensors(checkpoint.config))
        return tensors + sum(len(token.encode()) + 16 for token in tokens)

    def card(self, manifest: Manifest, verb: str) -> CardText:
        return CardText("llama.cpp", "softmax", render("gguf.md.j2", verb=verb))


FORMAT = GgufFormat()
