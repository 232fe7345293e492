"""Commands that export a checkpoint or make a synthetic one, and that prepare a quantization.

Modules that a command needs are imported when it runs, so that `rgexport --help` is fast.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rgexport import choices, progress
from rgexport.choices import FormatName
from rgexport.commands.options import (
    CheckpointArguments,
    ClusterArguments,
    ExportArguments,
    command,
    group,
    option,
    shared,
)
from rgexport.printing import print_outcome, print_result, print_sentences

if TYPE_CHECKING:
    from rgexport.artifacts.artifact import Artifact


@dataclass(frozen=True)
class OnnxArguments:
    checkpoint: CheckpointArguments = group()
    int4: bool = option("Same as --precision int4.")
    int8: bool = option("Same as --precision int8.")
    profile: choices.Profile = option(
        "Runtime: ONNX Runtime, or onnxruntime-web on a processor or a graphics card.",
        default="cpu",
    )
    precision: choices.OnnxPrecision | None = option(
        "Precision of the weights. [default: int4; wasm: int8]"
    )
    compute: choices.FloatPrecision | None = option(
        "Type of the activations. [default: fp32, or fp16 with fp16 weights]"
    )
    exact: bool = option("Never round activations to int8; slower.")
    genai_native: bool = option(
        "Copy the native kernels, so that onnxruntime-genai runs them on machines like this one."
    )
    block_size: int | None = option(
        "Weights that share a scale: 16, 32, 64 or 128. [default: 16 to 128; browsers: 128]"
    )
    symmetric: bool | None = option(
        "Levels around zero, or with a zero point. [default: symmetric; int4 in browsers: "
        "asymmetric]",
        "--symmetric/--asymmetric",
    )
    embedding_precision: str | None = option(
        "Precision of the embedding (also the output head). [default: as --precision, but with "
        "int4 int8 for frequent tokens; wasm: int8 with int4]",
        metavar="PRECISION",
    )
    export: ExportArguments = group()


@command(OnnxArguments)
def onnx(arguments: OnnxArguments) -> int:
    """Exports a checkpoint to ONNX."""
    return _export(arguments, "onnx")


@dataclass(frozen=True)
class CoreMLArguments:
    checkpoint: CheckpointArguments = group()
    int4: bool = option("Same as --precision int4.")
    int8: bool = option("Same as --precision int8.")
    precision: choices.CoreMLPrecision | None = option("Precision of the weights. [default: int4]")
    compute: choices.FloatPrecision | None = option(
        "Type of linear layers and attention. [default: fp16, or fp32 with fp32 weights]"
    )
    block_size: int | None = option(
        "Weights that share a scale: 16, 32, 64 or 128. [default: 32; int8: one scale per row]"
    )
    symmetric: bool | None = option(
        "Levels around zero, or with a zero point. [default: symmetric]", "--symmetric/--asymmetric"
    )
    embedding_precision: str | None = option(
        "Precision of the embedding (also the output head). [default: int8 for 4 bits, or as "
        "--precision]",
        metavar="PRECISION",
    )
    prefill_length: int = option("Tokens per call of prefill.", default=128)
    all_logits: bool = option("Prefill returns the logits of every token.")
    recurrent_state: choices.RecurrentState = option(
        "Form of the recurrent state: a float32 input and output, or two float16 states.",
        default="io",
    )
    split: str | None = option(
        "Write several packages, each with at most SIZE of weights, such as 1GB; iPhones need it.",
        metavar="SIZE",
    )
    export: ExportArguments = group()


@command(CoreMLArguments)
def coreml(arguments: CoreMLArguments) -> int:
    """Exports a checkpoint to Core ML, for iOS 18 and macOS 15.

    The package has two functions, decode for one token and prefill for many, that share weights
    and states.
    """
    return _export(arguments, "coreml")


@dataclass(frozen=True)
class GgufExportArguments(ExportArguments):
    output: Path | None = option("The file to write. [default: ./MODEL-TYPE.gguf]", "-o")


@dataclass(frozen=True)
class GgufArguments:
    checkpoint: CheckpointArguments = group()
    int4: bool = option("The best mix of 4 bits: --type q4_k_m.")
    int8: bool = option("Same as --type q8_0.")
    type: str | None = option(
        "A type, named as llama-quantize names it, such as q4_0. [default: q4_k_m]", metavar="TYPE"
    )
    precision: choices.OnnxPrecision | None = option("Precision of the weights, instead of --type.")
    pure: bool = option("Use that type for all tensors, the embedding too, not a mix.")
    tensor_types: tuple[str, ...] = option(
        "Another type for tensors that match, such as attn_v=q8_0. Can be repeated.",
        "--tensor-type",
        metavar="REGEX=TYPE",
    )
    embedding_precision: str | None = option(
        "Type of the embedding (also the output head). [default: the mix's type for it]",
        metavar="TYPE",
    )
    imatrix: Path | None = option("An importance matrix, made by llama-imatrix.")
    export: GgufExportArguments = group()


@command(GgufArguments)
def gguf(arguments: GgufArguments) -> int:
    """Exports a checkpoint to GGUF, for llama.cpp.

    The types: f32, f16, bf16, q8_0, q6_k, q5_1, q5_0, q5_k_m, q5_k_s, q4_1, q4_0, q4_k_m, q4_k_s,
    q3_k_l, q3_k_m, q3_k_s, q2_k. The file runs in the llama.cpp that `rgexport llama-cpp build`
    makes.
    """
    return _export(arguments, "gguf")


def _export(arguments: OnnxArguments | CoreMLArguments | GgufArguments, kind: FormatName) -> int:
    from rgexport.api import export_checkpoint
    from rgexport.export.request import precision_word

    flags = "checkpoint", "export", "int4", "int8"
    options = {name: value for name, value in vars(arguments).items() if name not in flags}
    precision = precision_word(arguments.precision, arguments.int4, arguments.int8, kind)
    settings = {**vars(arguments.export)}
    has_check, as_json = not settings.pop("no_check"), settings.pop("json")
    artifact = export_checkpoint(
        arguments.checkpoint.open,
        kind,
        options | {"precision": precision},
        check=has_check,
        **settings,
    )
    grade = _grade(artifact, arguments.export)
    (_print_json if as_json else _print_artifact)(artifact, grade)
    return 1 if artifact.manifest.check.status == "unverified" else 0


def _grade(artifact: "Artifact", export: ExportArguments) -> str | None:
    from rgexport.validate.checks import grade_of_kl

    check = artifact.manifest.check
    is_graded = check.status == "verified" and check.kl is not None
    grade = grade_of_kl(check.kl or 0.0) if is_graded else None
    if grade == "poor":
        is_best = export.quality == "best" or export.calibration is not None
        remedy = "more bits lose less" if is_best else "more bits, or --quality best, lose less"
        progress.warn(f"expect weaker answers: {remedy}; `rgexport validate` measures on more text")
    return grade


def _print_artifact(artifact: "Artifact", grade: str | None) -> None:
    from rgexport.artifacts.describe import as_text, describe
    from rgexport.artifacts.opening import check_line, closing_line

    if progress.verbose:
        progress.detail(as_text(describe(str(artifact.path))))
    if line := check_line(artifact):
        print_sentences(f"{line} Quality by that KL: {grade}." if grade else line)
    print_sentences(closing_line(artifact))


def _print_json(artifact: "Artifact", grade: str | None) -> None:
    manifest = artifact.manifest
    facts = {
        "path": str(artifact.path),
        "format": manifest.kind,
        "precision": manifest.precision,
        "bytes": artifact.nbytes,
        "check": vars(manifest.check),
        "quality": grade,
    }
    print_result(json.dumps(facts))


@dataclass(frozen=True)
class RandomArguments:
    size: choices.SyntheticSize = option("The shape to imitate.", required=True, metavar="2b|9b")
    seed: int = option("Seed of the random weights.", default=0)
    output: Path = option("The folder to make.", "-o", required=True)
    force: bool = option("Replace an existing output.")
    json: bool = option("Print the path and size as JSON.")


@command(RandomArguments)
def random(arguments: RandomArguments) -> None:
    """Writes a synthetic checkpoint of a real size, for measuring without the licensed weights."""
    from rgexport.artifacts.opening import as_argument
    from rgexport.griffin.synthetic import write_random

    output = arguments.output
    write_random(arguments.size, output, seed=arguments.seed, force=arguments.force)
    model = as_argument(output)
    sentence = f"{output} is complete. Export it: rgexport onnx {model} --int4"
    print_outcome(sentence, output, as_json=arguments.json)


@dataclass(frozen=True)
class CalibrateArguments:
    checkpoint: CheckpointArguments = group()
    text: Path | None = option("A file with text. [default: a built-in one]")
    tokens: int | None = option(
        "Tokens of the statistics. [default: 8192; 16384 for a width of at most 1024]"
    )
    held_out: int | None = option(
        "Further tokens, on which plans are measured. [default: a quarter of --tokens; as many "
        "for a width of at most 1024]"
    )
    sampled: int | None = option(
        "Number of --tokens that the model writes itself. [default: five sixths; none with --text]"
    )
    gradient_tokens: int = option("Number of --tokens that also have gradients.", default=1024)
    seed: int = option("Seed of the text that the model writes.", default=0)
    device: str = option("Device that computes.", default="auto", metavar="auto|cuda|cpu")
    cluster: ClusterArguments = group()
    output: Path | None = option("The file to write. [default: ./MODEL.calibration]", "-o")
    force: bool = option("Replace an existing file.")
    json: bool = option("Print the path, size and number of tokens as JSON.")


@command(CalibrateArguments)
def calibrate(arguments: CalibrateArguments) -> None:
    """Collects statistics of a model on a text, so that it loses less when it is quantized.

    One layer's weights are in memory at a time. After an interruption, the same command goes on.
    """
    from rgexport.planning.calibrate import SUFFIX, CalibrationOptions, closing_line
    from rgexport.planning.calibrate import calibrate as run
    from rgexport.quantize.algorithms.calibration_file import open_calibration
    from rgexport.runtimes.cluster import connected

    options = CalibrationOptions(**shared(arguments, CalibrationOptions))
    checkpoint = arguments.checkpoint.open()
    target = arguments.output or Path(f"{checkpoint.name}{SUFFIX}")
    with connected(arguments.cluster.cluster) as workers:
        calibration = run(checkpoint, options, target, force=arguments.force, workers=workers)
    sentence, tokens = closing_line(checkpoint, calibration), open_calibration(calibration).tokens
    print_outcome(sentence, calibration, as_json=arguments.json, tokens=tokens)


@dataclass(frozen=True)
class QuantizeArguments:
    checkpoint: CheckpointArguments = group()
    calibration: Path | None = option(
        "The file of `rgexport calibrate`. [default: ./MODEL.calibration, made if missing]"
    )
    target_kl: tuple[float, ...] = option(
        "The smallest size with at most this KL per token. Each target can be repeated."
    )
    target_size: tuple[str, ...] = option(
        "The lowest KL in an artifact of at most this size, such as 1.5GB.", metavar="SIZE"
    )
    bits: tuple[float, ...] = option("The lowest KL at so many bits per weight; can be repeated.")
    format: choices.FormatName = option("The format of the export.", default="onnx")
    text: Path | None = option("Measure on this text. [default: what the calibration held out]")
    tokens: int = option("At most this many tokens of the text.", default=16384)
    cluster: ClusterArguments = group()
    output: Path | None = option(
        "The file to write; names of several end in their target. [default: "
        "./MODEL-FORMAT-TARGET.plan.json]",
        "-o",
    )
    force: bool = option("Replace an existing file.")
    json: bool = option("Print the plan and its figures as JSON.")


@command(QuantizeArguments)
def quantize(arguments: QuantizeArguments) -> None:
    """Finds the best layout of every tensor for a KL, a size, or a number of bits.

    The cost of each layout is predicted from a calibration; the plan is measured. Exports take it
    with --plan.
    """
    from rgexport.planning.plan_request import PlanOptions, closing_line, make_plans
    from rgexport.runtimes.cluster import connected

    kinds = "target_kl", "target_size", "bits"
    targets = [{kind: value} for kind in kinds for value in getattr(arguments, kind)] or [{}]
    common = shared(arguments, PlanOptions) | dict.fromkeys(kinds)
    options = [PlanOptions(**common | target) for target in targets]
    checkpoint = arguments.checkpoint.open()
    with connected(arguments.cluster.cluster) as workers:
        target, force = arguments.output, arguments.force
        reports = make_plans(checkpoint, options, target, force=force, workers=workers)
    if arguments.json:
        texts = [report.as_json().strip() for report in reports]
        print_result(texts[0] if len(texts) == 1 else f"[{','.join(texts)}]")
        return
    for report in reports:
        print_result(report.as_text(), end="")
        print_sentences(closing_line(checkpoint, report))
