"""What quantization costs: methods, bits and formats on the demo model; writes `docs/quality.md`.

    python -m bench.quality [--only WORD …] [--model demo/model] [--tokens 1024] [--docs docs]
        [--mlx PYTHON]

Every row is an export in a process of its own, and the artifact's engine over six texts, held
against the original in float32. An hour on two cores, after `make llama-tools`; each row is kept
in `out/quality`, so what is there is not measured again. PYTHON is an interpreter that has mlx-lm
(`pip install 'mlx[cpu]' mlx-lm`); without it mlx-lm's rows are left out.
"""

import argparse
import json
import math
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader

from bench.any_model import AnyModelSession
from bench.quality_picture import write_picture
from bench.run import command, measured, size_of
from rgexport.artifacts.gguf.naming import file_tensors
from rgexport.artifacts.opening import open_artifact
from rgexport.chat.tokenizer import load_tokenizer
from rgexport.files.safetensors import read_header
from rgexport.griffin.checkpoint import Checkpoint, open_checkpoint
from rgexport.griffin.layout import QUANTIZABLE, model_tensors, role_of
from rgexport.griffin.reference import Reference
from rgexport.progress import note
from rgexport.quantize.algorithms.calibration_file import open_calibration
from rgexport.runtimes.engine import open_session
from rgexport.runtimes.machine import environment
from rgexport.runtimes.session import Session
from rgexport.validate.metrics import agreement, compare_logits, kl_summary, likelihood

ROOT = Path(__file__).parents[1]
FOLDER, LLAMA = Path("out/quality"), ROOT / "out/llama/bin"
MLX_LOGITS = """
import sys
import mlx.core as mx
import numpy as np
from mlx_lm import load

model, _ = load(sys.argv[1])
texts = np.load(sys.argv[2])
logits = {kind: model(mx.array(ids))[0].astype(mx.float32) for kind, ids in texts.items()}
np.savez(sys.argv[3], **{kind: np.array(rows) for kind, rows in logits.items()})
"""
"""Arguments: a model, token ids of each text, and where the logits go."""
TEXTS = {
    "prose": "rgexport/chat/sample.txt",
    "mixture": "tests/validate/unseen.txt",
    "manual": "README.md",
    "licence": "LICENSE",
    "program": "rgexport/griffin/ops.py",
    "notes": "CHANGELOG.md",
}
"""Kind of text → its file."""


LLAMA_QUANTIZE, MLX_CONVERT = "llama-quantize", "mlx_lm.convert"


@dataclass(frozen=True)
class Recipe:
    """A row of the table: what to type after `rgexport`, or after another program."""

    name: str
    method: str
    words: str
    calibrated: bool = False
    bits: float | None = None
    """Of a plan by `rgexport quantize`, which is made first."""
    imatrix: bool = False
    """Whether importances are those of llama-imatrix."""
    program: str = "rgexport"

    @property
    def format(self) -> str:
        formats = {LLAMA_QUANTIZE: "gguf", MLX_CONVERT: "mlx"}
        return formats.get(self.program) or self.words.split()[0]

    @property
    def command(self) -> str:
        """What a reader types, after what makes its files."""
        plan = "" if self.bits is None else " --plan PLAN"
        return (
            f"{self.program} {self.words}{plan}"
            f"{' --calibration FILE' * self.calibrated}{' --imatrix FILE' * self.imatrix}"
        )


_BLOCKS = "--block-size 32 --symmetric --embedding-precision int4"
RECIPES = (
    Recipe(
        "onnx-rtn-128a",
        "rounding to nearest",
        "onnx --int4 --quality fast --block-size 128 --asymmetric --embedding-precision int4",
    ),
    Recipe("onnx-rtn-32s", "rounding to nearest", f"onnx --int4 --quality fast {_BLOCKS}"),
    Recipe("onnx-search-32s", "clip search", f"onnx --int4 {_BLOCKS}"),
    Recipe("onnx-gptq-32s", "GPTQ", f"onnx --int4 {_BLOCKS}", calibrated=True),
    Recipe("onnx-default", "clip search (default)", "onnx --int4"),
    Recipe("onnx-best", "GPTQ (best)", "onnx --int4", calibrated=True),
    *(
        Recipe(f"onnx-plan-{bits}", f"a plan of {bits} bits", "onnx", calibrated=True, bits=bits)
        for bits in (3.0, 3.5, 4.0, 4.25, 4.5, 5.0)
    ),
    Recipe("onnx-int8", "clip search (default of int8)", "onnx --int8"),
    Recipe("onnx-int8-gptq-32", "GPTQ", "onnx --int8 --block-size 32", calibrated=True),
    Recipe(
        "coreml-rtn-32s",
        "rounding to nearest",
        "coreml --int4 --quality fast --embedding-precision int4",
    ),
    Recipe("coreml-search-32s", "clip search", "coreml --int4 --embedding-precision int4"),
    Recipe("coreml-gptq-32s", "GPTQ", "coreml --int4 --embedding-precision int4", calibrated=True),
    Recipe("coreml-default", "clip search, 8-bit head (default)", "coreml --int4"),
    Recipe("coreml-plan-4.5", "a plan of 4.5 bits", "coreml", calibrated=True, bits=4.5),
    Recipe("coreml-pal4", "k-means", "coreml --precision pal4"),
    Recipe("coreml-pal4-gptq", "GPTQ on palettes", "coreml --precision pal4", calibrated=True),
    Recipe("gguf-q4_0", "q4_0, as llama-quantize", "gguf --type q4_0 --pure --quality fast"),
    Recipe("gguf-q4_k", "Q4_K, as llama-quantize", "gguf --type q4_k_s --pure --quality fast"),
    Recipe(
        "gguf-q4_k-imatrix",
        "Q4_K, as llama-quantize, with importances",
        "gguf --type q4_k_s --pure",
        imatrix=True,
    ),
    Recipe(
        "gguf-q4_k-gptq", "Q4_K, GPTQ on ggml's grid", "gguf --type q4_k_s --pure", calibrated=True
    ),
    Recipe(
        "gguf-q4_k_m", "q4_k_m, as llama-quantize (default)", "gguf --type q4_k_m --quality fast"
    ),
    Recipe(
        "gguf-q4_k_m-imatrix",
        "q4_k_m, as llama-quantize, with importances",
        "gguf --type q4_k_m",
        imatrix=True,
    ),
    Recipe(
        "gguf-q4_k_m-gptq",
        "q4_k_m, GPTQ on ggml's grid (best)",
        "gguf --type q4_k_m",
        calibrated=True,
    ),
    *(
        Recipe(f"gguf-plan-{bits}", f"a plan of {bits} bits", "gguf", calibrated=True, bits=bits)
        for bits in (3.0, 3.5, 4.0, 4.5, 5.0)
    ),
    Recipe("gguf-q8_0", "q8_0, as llama-quantize", "gguf --type q8_0"),
    *(
        Recipe(
            f"llama-{kind}",
            f"{kind} of llama-quantize, with importances",
            kind,
            imatrix=True,
            program=LLAMA_QUANTIZE,
        )
        for kind in ("q2_k", "iq2_m", "iq3_xxs", "iq3_s", "q3_k_m", "iq4_xs", "q4_k_m", "q5_k_m")
    ),
    Recipe("mlx-4", "4 bits of mlx-lm (its default)", "-q", program=MLX_CONVERT),
)


def main() -> None:
    """Measures what is missing, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="*", default=[], help="rows whose name has one of these")
    parser.add_argument("--model", type=Path, default=ROOT / "demo/model")
    parser.add_argument("--tokens", type=int, default=1024, help="of each text")
    parser.add_argument("--docs", type=Path, help="where quality.md goes; printed without")
    parser.add_argument("--mlx", type=Path, help="a Python interpreter that has mlx-lm")
    asked = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    checkpoint = open_checkpoint(str(asked.model))
    texts = read_texts(asked.model, asked.tokens)
    calibration = FOLDER / "calibration"
    calibrated = {"seconds": 0.0, "peak_bytes": 0.0}
    if not calibration.exists():
        calibrated = command("calibrate", "-m", asked.model, "-o", calibration)
        _keep("calibration", calibrated)
    bench = Bench(asked.model, checkpoint, texts, calibration, asked.mlx)
    rows = [
        bench.row(recipe)
        for recipe in RECIPES
        if not asked.only or any(word in recipe.name for word in asked.only)
        if asked.mlx or recipe.program != MLX_CONVERT
    ]
    text = page(rows, sum(ids.size for ids in texts.values()))
    if asked.docs:
        (asked.docs / "quality.md").write_text(text)
        write_picture(rows, asked.docs / "pictures" / "quality.svg")
    else:
        print(text)


def read_texts(model: Path, limit: int) -> dict[str, np.ndarray]:
    """Token ids [1, T] of each text, at most `limit`, with bos."""
    tokenizer = load_tokenizer(model)
    found = {}
    for kind, file in TEXTS.items():
        ids = tokenizer.encode_text((ROOT / file).read_text()[: 8 * limit])
        found[kind] = np.array([[tokenizer.bos_id or 0, *ids][:limit]])
    return found


@dataclass(frozen=True)
class Bench:
    """What the rows share: a checkpoint, texts (token ids [1, T] by kind), and a calibration."""

    model: Path
    checkpoint: Checkpoint
    texts: dict[str, np.ndarray]
    calibration: Path
    mlx: Path | None

    def row(self, recipe: Recipe) -> dict[str, Any]:
        """Measures a row, unless it was measured before."""
        kept = FOLDER / f"{recipe.name}.json"
        if kept.exists():
            return json.loads(kept.read_text())
        target = FOLDER / recipe.name
        make, read = {
            LLAMA_QUANTIZE: (self._quantize_by_llama, self._read_gguf),
            MLX_CONVERT: (self._convert_by_mlx, self._read_mlx),
        }.get(recipe.program, (self._export, self._read_artifact))
        row: dict[str, Any] = {"method": recipe.method, "command": recipe.command}
        row |= {"format": recipe.format} | make(recipe, target)
        logits, row["bits"] = read(target)
        row |= self._quality(logits)
        row |= {"bytes": size_of(target), "cpu": environment()["cpu"]}
        _keep(recipe.name, row)
        note(f"{recipe.name}: {row['bits']:.3f} bits, KL {row['kl']:.3e}")
        return row

    def _export(self, recipe: Recipe, target: Path) -> dict[str, float]:
        """Exports; the seconds and the peak memory of that, of its plan included."""
        words: list[str | Path] = [*recipe.words.split(), "-m", self.model, "-o", target]
        runs = []
        if recipe.bits is not None:
            plan = FOLDER / f"{recipe.name}.plan"
            asked = "--bits", str(recipe.bits), "--format", recipe.format
            files = "--calibration", self.calibration, "-o", plan
            runs.append(command("quantize", "-m", self.model, *asked, *files, "--force"))
            words += ["--plan", plan]
        if recipe.calibrated:
            words += ["--calibration", self.calibration]
        if recipe.imatrix:
            words += ["--imatrix", self._imatrix()]
        runs.append(command(*words, "--force", "--no-check"))
        return {
            "seconds": sum(run["seconds"] for run in runs),
            "peak_bytes": max(run["peak_bytes"] for run in runs),
        }

    def _quantize_by_llama(self, recipe: Recipe, target: Path) -> dict[str, float]:
        weighted = ["--imatrix", str(self._imatrix())] if recipe.imatrix else []
        program = [str(LLAMA / LLAMA_QUANTIZE), *weighted]
        return measured([*program, str(self._float32()), str(target), recipe.words])

    def _convert_by_mlx(self, recipe: Recipe, target: Path) -> dict[str, float]:
        shutil.rmtree(target, ignore_errors=True)
        program = [str(self.mlx), "-m", "mlx_lm", "convert", *recipe.words.split()]
        paths = ["--hf-path", str(self.model), "--mlx-path", str(target)]
        return measured([*program, *paths])

    def _float32(self) -> Path:
        target = FOLDER / "f32.gguf"
        if not target.exists():
            command("gguf", "-m", self.model, "--type", "f32", "-o", target, "--no-check")
        return target

    def _imatrix(self) -> Path:
        """What llama-imatrix says of the calibration's text."""
        target = FOLDER / "imatrix.gguf"
        if not target.exists():
            text = FOLDER / "calibration.txt"
            tokenizer = load_tokenizer(self.model)
            sequences = open_calibration(self.calibration).sequences
            text.write_text("\n".join(tokenizer.decode(ids[1:].tolist()) for ids in sequences))
            program = [str(LLAMA / "llama-imatrix"), "-m", str(self._float32())]
            asked = [*program, "-f", str(text), "-o", str(target)]
            subprocess.run(asked, check=True, capture_output=True)
        return target

    def _read_artifact(self, target: Path) -> tuple[dict[str, np.ndarray], float]:
        """Logits [T, vocabulary] of each text, and bits of a weight."""
        artifact = open_artifact(target)
        logits = self._run(open_session(artifact))
        return logits, bits_of(artifact.manifest.tensors.items())

    def _read_gguf(self, target: Path) -> tuple[dict[str, np.ndarray], float]:
        logits = self._run(AnyModelSession(target))
        matrices = {t.name for t in file_tensors(self.checkpoint.config) if t.quantizable}
        stored = [t for t in GGUFReader(target).tensors if t.name in matrices]
        return logits, 8 * sum(t.n_bytes for t in stored) / sum(t.n_elements for t in stored)

    def _read_mlx(self, target: Path) -> tuple[dict[str, np.ndarray], float]:
        tokens, logits = FOLDER / "tokens.npz", FOLDER / "logits.npz"
        np.savez(tokens, **self.texts)  # type: ignore[arg-type]
        paths = [str(target), str(tokens), str(logits)]
        subprocess.run([str(self.mlx), "-c", MLX_LOGITS, *paths], check=True, capture_output=True)
        stored = read_header(target / "model.safetensors")
        scaled = [name.removesuffix(".scales") for name in stored if name.endswith(".scales")]
        parts = [f"{name}.{part}" for name in scaled for part in ("weight", "scales", "biases")]
        shapes = [
            spec.shape
            for name, spec in model_tensors(self.checkpoint.config).items()
            if role_of(name) in QUANTIZABLE
        ]
        bits = 8 * sum(stored[name].nbytes for name in parts) / sum(map(math.prod, shapes))
        return dict(np.load(logits)), bits

    def _run(self, session: Session) -> dict[str, np.ndarray]:
        logits = {}
        for kind, tokens in self.texts.items():
            session.reset()
            logits[kind] = session.prefill(tokens, tokens.shape[1])[0]
        session.close()
        return logits

    def _quality(self, logits: dict[str, np.ndarray]) -> dict[str, Any]:
        """Mean KL of each text, top-1 and perplexity over all."""
        reference = Reference(self.checkpoint.config, self.checkpoint.weights, keep=True)
        rows = {}
        for kind, tokens in self.texts.items():
            ours = reference.logits(reference.run(tokens)[0])[0]
            rows[kind] = compare_logits(ours, logits[kind], np.append(tokens[0, 1:], -1))
        everything = np.concatenate(list(rows.values()))
        said = likelihood(everything, None)
        assert said is not None
        kls = {kind: kl_summary(row).mean for kind, row in rows.items()}
        return {
            "kls": kls,
            "kl": float(np.mean(list(kls.values()))),
            "top1": agreement(everything).top1,
            "perplexity": said.perplexity,
            "perplexity_quantized": said.perplexity_candidate,
        }


def _keep(name: str, found: dict[str, Any]) -> None:
    (FOLDER / f"{name}.json").write_text(json.dumps(found, indent=1))


def bits_of(tensors: Iterable[tuple[str, Any]]) -> float:
    """Bits of a weight over matrices and embedding, with scales, zero points and tables."""
    matrices = [stored for name, stored in tensors if role_of(name) in QUANTIZABLE]
    stored = sum(part.nbytes for tensor in matrices for part in tensor.parts.values())
    return 8 * stored / sum(math.prod(tensor.shape) for tensor in matrices)


TEXT = """# What quantization costs

<!-- Written by `python -m bench.quality --docs docs`; to change it, change bench/quality.py. -->

![Bits per weight against KL, by program](pictures/quality.svg)

The demo model (11 M parameters, trained), each row in its own engine, over six texts of {tokens}
tokens in all. KL is the mean Kullback–Leibler divergence from the
original in float32, in nats per token, averaged over the texts; *KL by text* gives the lowest and
the highest of the texts. *Bits* are those of a weight of the matrices and the embedding, scales and
zero points included. Time and memory are those of the
export on {cpu}, two cores. GPTQ needs a calibration first, which took {calibration:.0f} s.

| format | method | bits | KL | KL by text | top-1 | perplexity | size | seconds | memory |
|---|---|---|---|---|---|---|---|---|---|
{rows}

The original's perplexity is {perplexity:.1f}.

`FILE` is of `rgexport calibrate`, or of llama-imatrix on the calibration's text. `PLAN` is of
`rgexport quantize --calibration FILE --format FORMAT --bits BITS`; its seconds are counted.
Rounding to nearest takes the scale of each block's extremes. Files as llama-quantize makes them are
its own, byte by byte. llama-quantize reads the file of `rgexport gguf --type f32`, and mlx-lm the
checkpoint; mlx-lm computes in bfloat16.
"""


def page(rows: list[dict[str, Any]], tokens: int) -> str:
    """Returns the page in Markdown, with a line for each row.

    `tokens` is the number of tokens of all texts together.
    """
    calibration_seconds = 0.0
    calibration = FOLDER / "calibration.json"
    if calibration.exists():
        calibration_seconds = json.loads(calibration.read_text())["seconds"]

    lines = [_line(row) for row in rows]
    return TEXT.format(
        tokens=f"{tokens:,}",
        cpu=rows[0]["cpu"],
        calibration=calibration_seconds,
        rows="\n".join(lines),
        perplexity=rows[0]["perplexity"],
    )


def _line(row: dict[str, Any]) -> str:
    """Returns the line of a measured row in the page's table."""
    lowest = min(row["kls"].values())
    highest = max(row["kls"].values())
    cells = [
        row["format"],
        f"{row['method']}<br>`{row['command']}`",
        f"{row['bits']:.2f}",
        f"{row['kl']:.2e}",
        f"{lowest:.2e} … {highest:.2e}",
        f"{row['top1']:.1%}",
        f"{row['perplexity_quantized']:.1f}",
        f"{row['bytes'] / 1e6:.1f} MB",
        f"{row['seconds']:.1f}",
        f"{row['peak_bytes'] / 1e9:.2f} GB",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
