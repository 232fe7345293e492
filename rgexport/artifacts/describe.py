"""Describes a checkpoint or an artifact for `rgexport inspect`, as data and as text."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

from rgexport.artifacts.artifact import Artifact
from rgexport.artifacts.card import Share, algorithms, group_shares, levels_sentence, shares
from rgexport.artifacts.format import all_formats, format_of
from rgexport.artifacts.manifest import CheckRecord, arithmetic
from rgexport.artifacts.manifest_reader import is_artifact
from rgexport.artifacts.opening import open_model
from rgexport.choices import MODEL_FORMS
from rgexport.errors import RequestError
from rgexport.formats import FORMATS
from rgexport.griffin.checkpoint import Checkpoint, open_checkpoint
from rgexport.griffin.checks import check_checkpoint
from rgexport.griffin.layout import model_tensors
from rgexport.griffin.tokenizer_files import TOKENIZERS
from rgexport.reporting.tables import Row, Table, render
from rgexport.units import amount

Description = dict[str, Any]
_NUMBERS = ("tensors", "weights", "size", "bits/weight")
_TUNED = {True: "instruction-tuned", False: "base model", None: "base or tuned: unknown"}


def describe(path: str | None, *, size: str | None = None, verify: bool = False) -> Description:
    """Describes an artifact, Core ML package or checkpoint, or the checkpoint of a `size`.

    `verify` reads every byte. Raises RequestError where nothing usable is there, or an artifact is
    damaged; faults of a checkpoint's tensors, or of a package, are listed under `problems`.
    """
    if path is None and size is None:
        raise RequestError(f"nothing to inspect; expected {MODEL_FORMS}")
    if path is None or size is not None:
        return _describe_checkpoint(open_checkpoint(path, size=size), verify)
    for form in () if is_artifact(Path(path)) else all_formats():
        if description := form.describe_foreign(Path(path)):
            return description
    opened = open_model(path, verify=verify)
    if isinstance(opened, Artifact):
        return _describe_artifact(opened, verify)
    return _describe_checkpoint(opened, verify)


def _describe_artifact(artifact: Artifact, verified: bool) -> Description:
    manifest = artifact.manifest
    fields = manifest.to_dict()
    return {
        "kind": manifest.kind,
        "name": manifest.name,
        "path": str(artifact.path),
        "precision": manifest.precision,
        "compute": manifest.compute,
        "exact": manifest.exact,
        "rounds_activations": manifest.rounds_activations,
        "profile": None,
        "parameters": sum(prod(tensor.shape) for tensor in artifact.weights.values()),
        "size": artifact.nbytes,
        "instruction_tuned": manifest.instruction_tuned,
        "has_tokenizer": manifest.has_tokenizer,
        "all_hashes_verified": verified,
        "check": asdict(manifest.check),
        **artifact.facts(),
        "stored": [asdict(share) for share in shares(manifest)],
        "algorithms": algorithms(manifest),
        **{key: fields[key] for key in ("config", "source", "created_with", "states", "io")},
        "files": {
            name: {"size": record.size, format_of(manifest.kind).hash_name: record.sha256}
            for name, record in manifest.files.items()
        },
        "plan": fields["plan"],
    }


def _describe_checkpoint(checkpoint: Checkpoint, verify: bool) -> Description:
    problems = check_checkpoint(checkpoint).problems if verify else checkpoint.problems
    specs, weights = model_tensors(checkpoint.config), checkpoint.weights
    stored = group_shares(
        Share(specs[name].role, tensor.dtype.name, 1, prod(tensor.shape), tensor.nbytes)
        for name, tensor in weights.items()
    )
    sizes = {name: path.stat().st_size for name, path in checkpoint.weight_files.items()}
    return {
        "kind": "checkpoint",
        "name": checkpoint.name,
        "path": str(checkpoint.path),
        "layout": checkpoint.layout,
        "parameters": sum(prod(tensor.shape) for tensor in weights.values()),
        "size": sum(sizes.values()),
        "instruction_tuned": checkpoint.instruction_tuned,
        "has_tokenizer": any(path.name in TOKENIZERS for path in checkpoint.tokenizer_files),
        "all_values_checked": verify,
        "problems": list(problems),
        "config": checkpoint.config.to_dict(),
        "stored": [asdict(share) for share in stored],
        "files": {name: {"size": size} for name, size in sizes.items()},
        "tensors": {
            name: {"shape": list(tensor.shape), "dtype": tensor.dtype.name}
            for name, tensor in weights.items()
        },
    }


def as_json(description: Description | list[Description]) -> str:
    return json.dumps(description, indent=1).replace("\x7f", "\\u007f") + "\n"


def as_text(description: Description) -> str:
    for form in all_formats():
        if description["kind"] == form.foreign_kind:
            return render(form.foreign_text(description))
    return render(_text(description))


def _text(d: Description) -> Iterator[str | Table]:
    yield _headline(d)
    stored = (Share(**share).cells for share in d["stored"])
    yield Table("Stored", ("role", "as", *_NUMBERS), stored, _NUMBERS)
    if "algorithms" in d:
        yield levels_sentence(d["algorithms"]) + "\n"
    config = (
        (name, " ".join(kind[0] for kind in value) if name == "block_types" else f"{value:,}")
        for name, value in d["config"].items()
    )
    yield Table("Configuration", ("", ""), config)
    for title in ("Tokenizer", "GGUF", "Core ML"):
        if facts := d.get(title.replace(" ", "").lower()):
            rows = (
                (
                    key.replace("_", " "),
                    ("no", "yes")[fact] if isinstance(fact, bool) else str(fact),
                )
                for key, fact in facts.items()
                if fact is not None
            )
            yield Table(title, ("", ""), rows)
    if d.get("states"):
        header = ("layers", "state", "shape", "dtype", "layout")
        yield Table("States of one sequence", header, _state_rows(d))
    hash_name = format_of(d["kind"]).hash_name if d["kind"] in FORMATS else "sha256"
    files = (
        (name, amount(record["size"]), record.get(hash_name, "")[:16])
        for name, record in d["files"].items()
    )
    yield Table("Files", ("name", "size", hash_name.replace("_", " ")), files, _NUMBERS)
    if "kernels" in d:
        yield _kernels_sentence(**d["kernels"])
    if "check" in d:
        yield CheckRecord(**d["check"]).sentence
    yield _closing(d)


def _headline(d: Description) -> str:
    if d["kind"] == "checkpoint":
        kind = f"checkpoint ({d['layout']})"
    else:
        profile = "" if d["profile"] in (None, "cpu") else f" ({d['profile']})"
        numbers = arithmetic(d["precision"], d["compute"], d["rounds_activations"])
        kind = f"{d['kind']}{profile} artifact, {numbers}"
    facts = (
        f"{d['name']}: {kind}",
        f"{d['parameters']:,} parameters",
        amount(d["size"]),
        *([f"{d['bits_per_weight']:.2f} bits per weight"] if "bits_per_weight" in d else []),
        _TUNED[d["instruction_tuned"]],
        "with tokenizer" if d["has_tokenizer"] else "no tokenizer",
    )
    return ", ".join(facts) + f"\n{d['path']}\n"


def _kernels_sentence(runs: str, reason: str, native: list[str], ops: dict[str, int]) -> str:
    if reason:
        return f"Native kernels: none ({reason}); it runs on {runs} kernels."
    counts = ", ".join(f"{ops[name]} {name}" for name in native)
    rest = ", ".join(f"{ops[name]} {name}" for name in ops if name not in native)
    standard = f"; as standard ops: {rest}" if rest else ""
    return f"It runs on {runs} kernels: {counts}{standard}."


def _closing(d: Description) -> str:
    if d.get("problems"):
        return "\n".join(f"Problem: {problem}" for problem in d["problems"])
    if d["kind"] == "checkpoint":
        if d["all_values_checked"]:
            return "No problems: every value was checked."
        return "No problems in the headers (--verify checks every value)."
    if "gguf" in d and not d["gguf"]["data_hash"]:
        return "Another tool stored its tensors: there is no hash to check them with."
    if d["all_hashes_verified"]:
        return "All hashes were verified."
    seen = "hashes were verified when each file was first seen (--verify does it again)."
    return f"File sizes match; {seen}"


def _state_rows(d: Description) -> Iterator[Row]:
    layers: dict[Row, list[str]] = {}
    for state in d["states"]:
        _, index, kind = state["name"].split(".")
        shape = " x ".join(map(str, state["shape"]))
        layers.setdefault((kind, shape, state["dtype"], state["layout"]), []).append(index)
    for row, indices in layers.items():
        yield (", ".join(indices), *row)
