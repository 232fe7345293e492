"""The format of GGUF files: a checked header (see `integrity`), and dequantized weights."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from rgexport.artifacts.artifact import Artifact, differences
from rgexport.artifacts.format import CardText, FileFormat, render
from rgexport.artifacts.gguf import integrity
from rgexport.artifacts.gguf.integrity import MANIFEST_KEY, EmbeddedManifest, read_embedded
from rgexport.artifacts.gguf.naming import ARCHITECTURE, FileTensor, file_tensors
from rgexport.artifacts.gguf.vocabulary import read_vocabulary
from rgexport.artifacts.manifest import IoRecord, Manifest, StoredPart, StoredTensor
from rgexport.artifacts.origin import Origin
from rgexport.errors import RequestError
from rgexport.files.hashing import FileRecord, hash_files, hash_new_files
from rgexport.files.targets import check_file_target
from rgexport.files.typed_json import Mismatch, from_json, parse_json
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.layout import model_tensors
from rgexport.griffin.tokenizer_files import BYTE, CONTROL, USER_DEFINED
from rgexport.quantize.gguf_header import GgufHeader, is_gguf, read_header
from rgexport.quantize.plan import PRECISIONS
from rgexport.quantize.schemes.ggml_types import FILE_TYPES, TYPES
from rgexport.quantize.schemes.registry import Ggml, Parts, PartShapes, Plan, Scheme, Uniform

ALGORITHMS_KEY = "rgexport.algorithms"
_OWN = Ggml("f32").algorithm
_FILE_TYPES = {row.value: row.name for row in FILE_TYPES.values()}
_TENSOR_BYTES = 96  # of a tensor's entry in the header, about
_TOKENS, _TOKEN_TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"


@dataclass(frozen=True, kw_only=True)
class GgufManifest(Manifest):
    """The whole manifest; `precision` is the file's type, `files` has the hash of the data."""

    kind: str = "gguf"
    pieces: int
    imatrix: bool

    @property
    def has_tokenizer(self) -> bool:
        return self.pieces > 0

    @property
    def weighted(self) -> bool:
        return self.imatrix or bool(_used_algorithms(self.plan) - {_OWN})


@dataclass(frozen=True, repr=False)
class GgufArtifact(Artifact):
    header: GgufHeader
    tensors: dict[str, FileTensor]

    def file(self, name: str) -> Path:
        return self.path

    def facts(self) -> dict[str, Any]:
        values, tensors = self.header.values, self.header.tensors.values()
        gguf = {
            "architecture": values["general.architecture"],
            "version": self.header.version,
            "type": self.manifest.precision,
            "tensors": len(tensors),
            "size_label": _value(str, values, "general.size_label"),
            "license": _value(str, values, "general.license"),
            "source": _value(str, values, "general.source.url"),
            "importance_matrix": _value(str, values, "quantize.imatrix.file"),
            "algorithms": ", ".join(sorted(_used_algorithms(self.manifest.plan))) or None,
            "data_hash": integrity.has_original_types(self.header),
            "runs_in": "the llama.cpp of `rgexport llama-cpp build`",
        }
        weights = sum(prod(tensor.shape) for tensor in tensors)
        return {
            "bits_per_weight": 8 * sum(tensor.nbytes for tensor in tensors) / weights,
            "gguf": gguf,
            "tokenizer": _tokenizer_facts(values) if self.manifest.has_tokenizer else None,
        }

    def origin(self) -> Origin:
        keys = "general.source.huggingface.repository", "general.license"
        return Origin(*(_value(str, self.header.values, key) for key in keys))

    def _decode(self, name: str, stored: StoredTensor, arrays: Parts, columns: int) -> np.ndarray:
        rows = super()._decode(name, stored, arrays, columns)
        return self.tensors[name].transform.restore(rows.reshape(-1, *stored.shape[1:]))


def open_gguf(path: Path, *, verify: bool = False) -> GgufArtifact:
    """Opens a file of `rgexport gguf`, or one that another tool quantized from it.

    The data are hashed if the file has changed since the last opening, and with `verify`. Raises
    RequestError for another kind of file or model, a part of a split file, and damage.
    """
    if not path.exists():
        raise RequestError(f"there is no {path}")
    header = read_header(path)
    _require_ours(header)
    if header.values.get(integrity.METADATA) != integrity.metadata_sha256(header):
        raise _damaged(path, "its metadata were altered (their hash differs)")
    try:
        embedded = read_embedded(header.values[MANIFEST_KEY])
    except Mismatch as error:
        raise RequestError(
            f"{path} has a manifest that this rgexport cannot read: {error}; update rgexport, or "
            "export the checkpoint again"
        ) from None
    tensors = {tensor.canonical: tensor for tensor in file_tensors(embedded.config)}
    _require_tensors(header, tensors)
    digest = _check_data(header, verify)
    return GgufArtifact(path, _manifest(header, embedded, tensors, digest), header, tensors)


def _require_ours(header: GgufHeader) -> None:
    path, values = header.path, header.values
    files, architecture = values.get("split.count"), values.get("general.architecture")
    if isinstance(files, int) and files > 1:
        raise RequestError(
            f"{path} is one of {files} parts of a split file; expected a whole one: join them "
            "with `llama-gguf-split --merge`"
        )
    if not isinstance(architecture, str) or architecture != ARCHITECTURE:
        raise RequestError(
            f"{path} holds a model of the architecture {_shorten(architecture)}; expected "
            f"{ARCHITECTURE}, from `rgexport gguf`"
        )
    if not isinstance(values.get(MANIFEST_KEY), str):
        raise RequestError(
            f"{path} was not made by rgexport (it has no {MANIFEST_KEY}); make one from the "
            "checkpoint with `rgexport gguf`"
        )
    file_type = values.get(integrity.FILE_TYPE)
    if not isinstance(file_type, int) or file_type not in _FILE_TYPES:
        raise RequestError(
            f"{path} has the file type {_shorten(file_type)}; expected that "
            f"of one of {', '.join(_FILE_TYPES.values())}"
        )
    tokens: Any = values.get(_TOKENS)
    types: Any = values.get(_TOKEN_TYPES)
    if tokens is not None or types is not None:
        lists = isinstance(tokens, list) and isinstance(types, np.ndarray)
        if not lists or types.dtype.kind not in "iu" or len(tokens) != len(types):
            raise _damaged(path, "its lists of tokens and of their types do not match")


def _require_tensors(header: GgufHeader, tensors: dict[str, FileTensor]) -> None:
    expected = {tensor.name: list(tensor.shape) for tensor in tensors.values()}
    actual = {_shorten(name): list(tensor.shape) for name, tensor in header.tensors.items()}
    for difference in differences("its tensor", actual, expected):
        raise _damaged(header.path, difference)


def _check_data(header: GgufHeader, anew: bool) -> str:
    """Returns the hash of the data, compared with the metadata's unless types differ."""
    path, start = header.path, integrity.data_start(header)
    digest = (hash_files if anew else hash_new_files)([path], start=start)[path]
    same_types = integrity.has_original_types(header)
    same_data = header.values.get(integrity.DATA) == digest
    if same_types and not same_data:
        raise _damaged(path, "its tensors were altered (the hash of the data differs)")
    if same_data and not same_types:
        raise _damaged(path, "it states other types of tensors than the data have")
    return digest


def _manifest(
    header: GgufHeader, embedded: EmbeddedManifest, tensors: dict[str, FileTensor], digest: str
) -> GgufManifest:
    try:
        check = integrity.read_check(header)
        schemes = _read_schemes(header)
    except Mismatch as error:
        raise _damaged(header.path, str(error)) from None
    name, stored = header.path.name, {}
    for canonical in model_tensors(embedded.config):
        tensor = tensors[canonical]
        scheme = schemes[tensor.name]
        ((dtype, shape),) = scheme.part_shapes(tensor.canonical_shape).values()
        part = StoredPart(name, header.tensors[tensor.name].offset, dtype, shape)
        stored[canonical] = StoredTensor(tensor.canonical_shape, scheme, {"data": part})
    return GgufManifest(
        **vars(embedded),
        precision=_FILE_TYPES[header.values[integrity.FILE_TYPE]],
        compute="fp32",
        exact=False,
        plan={canonical: tensor.scheme for canonical, tensor in stored.items()},
        tensors=stored,
        states=(),
        io=IoRecord((), ()),
        files={name: FileRecord(digest, header.path.stat().st_size)},
        check=check,
        pieces=len(header.values.get(_TOKENS, ())),
        imatrix="quantize.imatrix.file" in header.values,
    )


def algorithms_value(schemes: Mapping[str, Ggml]) -> dict[str, str]:
    algorithms = {name: scheme.algorithm for name, scheme in schemes.items()}
    named = {name: algorithm for name, algorithm in algorithms.items() if algorithm != _OWN}
    return {ALGORITHMS_KEY: json.dumps(named)} if named else {}


def _used_algorithms(plan: Plan) -> set[str]:
    uniform = (one for scheme in plan.values() for one in scheme.uniform)
    return {scheme.algorithm for scheme in uniform if scheme.is_quantized}


def _read_schemes(header: GgufHeader) -> dict[str, Ggml]:
    text = header.values.get(ALGORITHMS_KEY, "{}")
    is_ours = integrity.has_original_types(header)
    algorithms = from_json(dict[str, str], parse_json(text)) if is_ours else {}
    try:
        return {
            name: Ggml.from_dict({"type": t.type.name, "algorithm": algorithms.get(name, _OWN)})
            for name, t in header.tensors.items()
        }
    except RequestError as error:
        raise Mismatch(f"{ALGORITHMS_KEY}: {error}") from None


def _damaged(path: Path, what: str) -> RequestError:
    return RequestError(f"{path} is damaged: {what}; copy it again, or export it again")


def _shorten(value: Any) -> str:
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _tokenizer_facts(values: dict[str, Any]) -> dict[str, Any]:
    types = Counter(values[_TOKEN_TYPES].tolist())
    ids = ("bos", "eos", "unknown", "padding", "eot")
    return {
        "pieces": len(values[_TOKENS]),
        "control": types[CONTROL],
        "user_defined": types[USER_DEFINED],
        "bytes": types[BYTE],
        **{f"{name}_id": _value(int, values, f"tokenizer.ggml.{name}_token_id") for name in ids},
        "adds_bos": _value(bool, values, "tokenizer.ggml.add_bos_token"),
        "chat_template": "tokenizer.chat_template" in values,
    }


def _value(kind: type, values: dict[str, Any], key: str) -> Any:
    return value if isinstance(value := values.get(key), kind) else None


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
        return open_gguf(path, verify=verify)

    def part_shapes(self, shape: tuple[int, ...], scheme: Scheme) -> PartShapes:
        """Returns the bytes of a ggml type; other schemes become float32."""
        kind = scheme.ggml_type or "f32"
        return {"data": ("uint8", (shape[0], TYPES[kind].row_bytes(prod(shape[1:]))))}

    def candidate(self, scheme: Uniform, shape: tuple[int, ...]) -> Uniform | None:
        kind = scheme.ggml_type
        fits = kind and shape[0] > 1 and TYPES[kind].fits(shape[1])
        return scheme if fits else None

    def overhead_bytes(self, checkpoint: Checkpoint) -> int:
        vocabulary = read_vocabulary(checkpoint.tokenizer_files, checkpoint.config.vocab_size)
        tokens = [] if vocabulary is None else vocabulary.tokens
        tensors = _TENSOR_BYTES * len(model_tensors(checkpoint.config))
        return tensors + sum(len(token.encode()) + 16 for token in tokens)

    def card(self, manifest: Manifest, verb: str) -> CardText:
        return CardText("llama.cpp", "softmax", render("gguf.md.j2", verb=verb))


FORMAT = GgufFormat()
