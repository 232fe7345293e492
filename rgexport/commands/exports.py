"""Commands that export a checkpoint, or write a synthetic one."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from rgexport import progress
from rgexport.commands.options import (
    FOLDER,
    check_option,
    model_options,
    output_options,
    plan_option,
    quality_options,
    storing_options,
    verbose,
    width_options,
)
from rgexport.errors import RequestError
from rgexport.printing import print_result


@click.command()
@model_options
@width_options
@click.option(
    "--profile",
    metavar="cpu|wasm|webgpu",
    default="cpu",
    show_default=True,
    help="What runs it: ONNX Runtime, or onnxruntime-web on a processor or a graphics card.",
)
@click.option(
    "--precision",
    metavar="fp32|fp16|int8|int4",
    help="Precision of the weights. [default: int4; wasm: int8]",
)
@click.option(
    "--compute",
    metavar="fp32|fp16",
    help="Type of the activations. [default: fp32, or fp16 with fp16 weights]",
)
@click.option("--exact", is_flag=True, help="Never round activations to int8; slower.")
@click.option(
    "--genai-native",
    is_flag=True,
    help="Copy the native kernels, so that onnxruntime-genai runs them on machines like this one.",
)
@storing_options(
    block="32 for int4, 128 for int8; browsers: 128",
    symmetry="symmetric; int4 in browsers: asymmetric",
    embedding="int8 for int4, or as --precision; webgpu: as --precision",
)
@plan_option
@quality_options
@output_options
@check_option
@verbose
def onnx(**request: Any) -> int:
    """Exports a checkpoint to ONNX."""
    from rgexport.export.onnx.exporter import OnnxOptions, export_onnx

    return _export_folder("onnx", OnnxOptions, export_onnx, **request)


@click.command()
@model_options
@width_options
@click.option(
    "--precision",
    metavar="fp32|fp16|int8|int4|pal4",
    help="Precision of the weights. [default: int4]",
)
@click.option(
    "--compute",
    metavar="fp32|fp16",
    help="Type of linear layers and attention. [default: fp16, or fp32 with fp32 weights]",
)
@storing_options(
    block="32; int8: one scale per row",
    symmetry="symmetric",
    embedding="int8 for 4 bits, or as --precision",
)
@plan_option
@quality_options
@click.option(
    "--prefill-length", type=int, default=128, show_default=True, help="Tokens per call of prefill."
)
@click.option("--all-logits", is_flag=True, help="Prefill returns the logits of every token.")
@click.option(
    "--recurrent-state",
    metavar="io|hilo",
    default="io",
    show_default=True,
    help="io: a float32 input and output; hilo: two float16 states.",
)
@click.option(
    "--split",
    metavar="SIZE",
    help="Several packages, each with at most SIZE of weights, such as 1GB; iPhones need it.",
)
@output_options
@check_option
@verbose
def coreml(**request: Any) -> int:
    """Exports a checkpoint to Core ML, for iOS 18 and macOS 15.

    The package has two functions, decode for one token and prefill for many, that share weights
    and states.
    """
    from rgexport.export.coreml.exporter import CoreMLOptions, export_coreml
    from rgexport.export.request import bytes_of

    split = request.pop("split")
    if split is not None:
        request["split"] = int(bytes_of("--split", split))
    return _export_folder("coreml", CoreMLOptions, export_coreml, **request)


def _export_folder(
    kind: str,
    options_of: Callable[..., Any],
    export: Callable[..., Path],
    int4: bool,
    int8: bool,
    precision: str | None,
    **request: Any,
) -> int:
    from rgexport.export.manifest_reader import is_artifact
    from rgexport.export.request import default_target, precision_word
    from rgexport.files.targets import check_target

    def target(name: str, asked: Any) -> Path:
        profile = getattr(asked, "profile", "cpu")
        return default_target(name, asked.precision_word, kind, profile)

    word = precision_word(precision, int4, int8, kind)
    check = partial(check_target, replaceable=is_artifact)
    return _export(options_of, export, check, target, precision=word, **request)


def _export(
    options_of: Callable[..., Any],
    export: Callable[..., Path],
    check_target: Callable[..., None],
    default_target: Callable[[str, Any], Path],
    model: str | None,
    size: str | None,
    window: int | None,
    soft_cap: float | None,
    adapter: Path | None,
    plan: Path | None,
    quality: str | None,
    calibration: Path | None,
    cluster: str | None,
    output: Path | None,
    force: bool,
    no_check: bool,
    **options: Any,
) -> int:
    """Opens the checkpoint and exports it; `options` are those of the format."""
    from rgexport.export.request import algorithm_word
    from rgexport.griffin.checkpoint import open_checkpoint
    from rgexport.quantize.plan import load_plan
    from rgexport.validate.self_check import self_check

    if output:
        check_target(output, force=force)  # before a model is downloaded
    algorithm = algorithm_word(quality, calibration, plan)
    checkpoint = open_checkpoint(
        model, size=size, window=window, soft_cap=soft_cap, adapter=adapter
    )
    planned = load_plan(plan, checkpoint.config) if plan else None
    asked = options_of(plan=planned, algorithm=algorithm, **options)
    target = output or default_target(checkpoint.name, asked)
    check = None if no_check else partial(self_check, checkpoint)
    if algorithm == "gptq" or calibration:
        from rgexport.compress.calibrate import known_statistics

        check_target(target, force=force)  # before a calibration that takes minutes
        with known_statistics(checkpoint, calibration, cluster) as statistics:
            export = partial(export, statistics=statistics)
            return _close(export(checkpoint, asked, target, force=force, check=check))
    if cluster is not None:
        raise RequestError("--cluster is for --quality best or --calibration; leave it out")
    return _close(export(checkpoint, asked, target, force=force, check=check))


def _close(target: Path) -> int:
    """Prints the artifact and its self-check; exit code 1 if that says `unverified`."""
    from rgexport.export.describe import as_text, describe
    from rgexport.export.opening import open_artifact
    from rgexport.export.request import check_line, closing_line

    artifact = open_artifact(target)
    if progress.verbose:
        progress.detail(as_text(describe(str(target))))
    for line in filter(None, (check_line(artifact), closing_line(artifact))):
        print_result(line)
    return 1 if artifact.manifest.check.status == "unverified" else 0


@click.command()
@model_options
@click.option("--int4", is_flag=True, help="The best mix of 4 bits: --type q4_k_m.")
@click.option("--int8", is_flag=True, help="Same as --type q8_0.")
@click.option(
    "--type",
    "kind",
    metavar="TYPE",
    help="As llama-quantize names them, such as q4_0. [default: q4_k_m]",
)
@click.option("--precision", metavar="fp32|fp16|int8|int4", help="Instead of --type.")
@click.option("--pure", is_flag=True, help="No mix: that type for the embedding too.")
@click.option(
    "--tensor-type",
    "tensor_types",
    metavar="REGEX=TYPE",
    multiple=True,
    help="Another type for tensors that match, such as attn_v=q8_0. Can be repeated.",
)
@click.option(
    "--embedding-precision",
    "embedding",
    metavar="TYPE",
    help="Type of the embedding (also the output head). [default: as the mix has it]",
)
@click.option("--imatrix", type=FOLDER, help="An importance matrix, made by llama-imatrix.")
@plan_option
@quality_options
@click.option("-o", "--output", type=FOLDER, help="The file. [default: ./MODEL-TYPE.gguf]")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@check_option
@verbose
def gguf(int4: bool, int8: bool, kind: str | None, precision: str | None, **request: Any) -> int:
    """Exports a checkpoint to GGUF, for llama.cpp.

    The types: f32, f16, bf16, q8_0, q6_k, q5_1, q5_0, q5_k_m, q5_k_s, q4_1, q4_0, q4_k_m, q4_k_s,
    q3_k_l, q3_k_m, q3_k_s, q2_k, q2_k_s. The file runs in the llama.cpp that `rgexport llama-cpp
    build` makes.
    """
    from rgexport.export.gguf.exporter import default_target, export_gguf
    from rgexport.export.gguf.options import GgufOptions, type_word
    from rgexport.export.request import precision_word
    from rgexport.files.targets import check_file_target
    from rgexport.quantize.gguf_header import is_gguf

    def target(name: str, asked: GgufOptions) -> Path:
        return default_target(name, asked.file_type.name)

    word = type_word(kind, precision_word(precision, int4, int8, "gguf"))
    check = partial(check_file_target, replaceable=is_gguf)
    return _export(GgufOptions, export_gguf, check, target, type=word, **request)


@click.command()
@click.option("--size", required=True, metavar="2b|9b", help="The shape to imitate.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("-o", "--output", type=FOLDER, required=True, help="The folder to make.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@verbose
def random(size: str, seed: int, output: Path, force: bool) -> None:
    """Writes a synthetic checkpoint of a real size, for measuring without the licensed weights."""
    from rgexport.export.request import as_argument
    from rgexport.griffin.synthetic import write_random

    write_random(size, output, seed=seed, force=force)
    print_result(f"{output} is complete. Export it: rgexport onnx -m {as_argument(output)} --int4")
