"""The command line: one thin command per verb, no logic."""

import io
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import click

from rgexport import __version__, progress
from rgexport.cli_options import (
    FOLDER,
    SIZES,
    check_option,
    model_options,
    native_option,
    output_options,
    plan_option,
    sampling_options,
    verbose,
    width_options,
)
from rgexport.errors import RequestError, one_line

INTERRUPTED, PIPE_CLOSED = 130, 141
CONVERTERS = {"torch": "export", "onnx": "export", "onnx_ir": "export", "coremltools": "coreml"}
"""What the core install lacks, and the extra that brings it."""
FORMS = "table", "md", "json", "csv"


def main() -> NoReturn:
    """Runs one command; whatever goes wrong ends in one line and an exit code.

    0: done; 1: the answer is no; 2: the request was wrong; 130 and 141: interrupted, by a key or
    by a reader that left, as shells have it.
    """
    _prepare_streams()
    sys.exit(run(sys.argv[1:]))


def _prepare_streams() -> None:
    """Lets every stream be used: a closed one leads nowhere, what it cannot encode becomes `?`.

    In the order of their numbers, so that no file of ours is taken for one of them.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    if isinstance(sys.stdout, io.TextIOWrapper):  # stderr never fails on what it cannot encode
        sys.stdout.reconfigure(errors="replace")


def run(arguments: list[str]) -> int:
    """Runs one command and returns its exit code."""
    progress.expect_stages(0)
    try:
        code = rgexport.main(arguments, "rgexport", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except SystemExit:  # click's way of telling that whoever read our output has left
        return PIPE_CLOSED
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "rgexport"
        return _fail(f"{error.format_message()} (see {command} --help)")
    except (click.ClickException, RequestError, OSError) as error:
        return _fail(error_line(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in CONVERTERS:
            raise
        extra = CONVERTERS[package]
        return _fail(f"this command needs {package}: pip install 'rgexport[{extra}]'")


def error_line(error: Exception) -> str:
    """What is told of an error that a request or the system led to."""
    if isinstance(error, OSError):
        return one_line(f"{error.filename or 'the system'}: {error.strerror or error}")
    return one_line(str(error))


def _fail(message: str) -> int:
    progress.note(f"Error: {one_line(message)}")
    progress.detail(traceback.format_exc())
    return 2


@click.group(invoke_without_command=True)
@click.version_option(__version__)
@verbose
@click.pass_context
def rgexport(context: click.Context) -> None:
    """Makes RecurrentGemma run on small devices, and proves that it still computes the same."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@rgexport.command()
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
    help="Of weights. [default: fp32; wasm: int8; webgpu: int4]",
)
@click.option(
    "--compute",
    metavar="fp32|fp16",
    help="Of activations. [default: fp32, or fp16 with fp16 weights]",
)
@click.option("--exact", is_flag=True, help="Never round activations to int8; slower.")
@click.option("--block-size", type=int, help="32, 64 or 128. [default: 128]")
@click.option("--symmetric/--asymmetric", default=None, help="[default: asymmetric for int4]")
@click.option(
    "--embedding-precision",
    metavar="WORD",
    help="Of the embedding, which is the head too. [default: as --precision]",
)
@plan_option
@output_options
@check_option
@verbose
def onnx(**request: Any) -> int:
    """Exports a checkpoint to ONNX."""
    from rgexport.export.onnx.exporter import OnnxOptions, export_onnx

    return _export_folder("onnx", OnnxOptions, export_onnx, **request)


@rgexport.command()
@model_options
@width_options
@click.option("--precision", metavar="fp32|fp16|int8|int4|pal4", help="[default: fp16]")
@click.option(
    "--compute",
    metavar="fp32|fp16",
    help="Of linears and attention. [default: fp16, or fp32 with fp32 weights]",
)
@click.option("--block-size", type=int, help="32, 64 or 128. [default: 32; int8: a row]")
@click.option("--symmetric/--asymmetric", default=None, help="[default: symmetric]")
@click.option(
    "--embedding-precision",
    metavar="WORD",
    help="Of the embedding, which is the head too. [default: int8 for 4 bits, or as --precision]",
)
@plan_option
@click.option("--prefill-length", type=int, default=128, show_default=True, help="Tokens a call.")
@click.option("--all-logits", is_flag=True, help="Prefill gives those of every token.")
@click.option(
    "--recurrent-state",
    metavar="io|hilo",
    default="io",
    show_default=True,
    help="Goes in and out as float32, or is kept as two float16 states.",
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

    return _export_folder("coreml", CoreMLOptions, export_coreml, **request)


def _export_folder(
    kind: str,
    options_of: Callable[..., Any],
    export: Callable[..., Path],
    model: str | None,
    size: str | None,
    window: int | None,
    soft_cap: float | None,
    int4: bool,
    int8: bool,
    precision: str | None,
    plan: Path | None,
    output: Path | None,
    force: bool,
    no_check: bool,
    **options: Any,
) -> int:
    """What the commands that make a folder have in common; `options` are the format's own."""
    from rgexport.export.manifest_reader import is_artifact
    from rgexport.export.request import default_target, precision_word
    from rgexport.files.atomic import check_target
    from rgexport.griffin.checkpoint import open_checkpoint
    from rgexport.quantize.plan import load_plan

    options["precision"] = precision_word(precision, int4, int8, kind)
    if output:
        check_target(output, force=force, replaceable=is_artifact)
    checkpoint = open_checkpoint(model, size=size, window=window, soft_cap=soft_cap)
    options["plan"] = load_plan(plan, checkpoint.config) if plan else None
    asked = options_of(**options)
    profile = options.get("profile", "cpu")
    target = output or default_target(checkpoint.name, asked.precision_word, kind, profile)
    check = _self_check(checkpoint, no_check)
    return _close(export(checkpoint, asked, target, force=force, check=check))


def _self_check(checkpoint: Any, no_check: bool) -> Callable[[Path], Any] | None:
    """What an export ends with, unless it was declined."""
    from rgexport.validate.self_check import self_check

    return None if no_check else partial(self_check, checkpoint)


def _close(target: Path) -> int:
    """Tells what was made, and how its self-check ended: the exit code is 1 where badly."""
    from rgexport.export.describe import as_text, describe
    from rgexport.export.opening import open_artifact
    from rgexport.export.request import check_line, closing_line

    artifact = open_artifact(target)
    progress.detail(as_text(describe(str(target))))
    for line in filter(None, (check_line(artifact), closing_line(artifact))):
        click.echo(line)
    return 1 if artifact.manifest.check.status == "unverified" else 0


@rgexport.command()
@model_options
@click.option("--int4", is_flag=True, help="The best mix of 4 bits: --type q4_k_m.")
@click.option("--int8", is_flag=True, help="Same as --type q8_0.")
@click.option(
    "--type",
    "kind",
    metavar="TYPE",
    help="As llama-quantize names them, such as q4_0. [default: f16]",
)
@click.option(
    "--precision", metavar="fp32|fp16|int8|int4", help="Instead, a word of the other formats."
)
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
    help="Of the embedding, which is the head too. [default: as the mix has it]",
)
@click.option("--imatrix", type=FOLDER, help="Importances, made by llama-imatrix.")
@plan_option
@click.option("-o", "--output", type=FOLDER, help="The file. [default: ./MODEL-TYPE.gguf]")
@click.option("--force", is_flag=True, help="Replace an earlier one.")
@check_option
@verbose
def gguf(
    model: str | None,
    size: str | None,
    window: int | None,
    soft_cap: float | None,
    int4: bool,
    int8: bool,
    kind: str | None,
    precision: str | None,
    plan: Path | None,
    output: Path | None,
    force: bool,
    no_check: bool,
    **options: Any,
) -> int:
    """Exports a checkpoint to GGUF, for llama.cpp.

    The types: f32, f16, bf16, q8_0, q6_k, q5_1, q5_0, q5_k_m, q5_k_s, q4_1, q4_0, q4_k_m, q4_k_s,
    q3_k_l, q3_k_m, q3_k_s, q2_k, q2_k_s. The file runs in the llama.cpp that `rgexport llama-cpp
    build` makes.
    """
    from rgexport.export.gguf.exporter import default_target, export_gguf, replaceable
    from rgexport.export.gguf.options import GgufOptions, type_word
    from rgexport.export.request import precision_word
    from rgexport.files.atomic import check_file_target
    from rgexport.griffin.checkpoint import open_checkpoint
    from rgexport.quantize.plan import load_plan

    options["type"] = type_word(kind, precision_word(precision, int4, int8, "gguf"))
    if output:
        check_file_target(output, force=force, replaceable=replaceable)
    checkpoint = open_checkpoint(model, size=size, window=window, soft_cap=soft_cap)
    options["plan"] = load_plan(plan, checkpoint.config) if plan else None
    asked = GgufOptions(**options)
    target = output or default_target(checkpoint.name, asked.file_type.name)
    check = _self_check(checkpoint, no_check)
    return _close(export_gguf(checkpoint, asked, target, force=force, check=check))


@rgexport.command()
@click.argument("artifact", type=FOLDER)
@click.option("-p", "--prompt", help="The text to continue.")
@click.option("--ids", help="Instead of a text: token ids, such as 2,651,603; prints ids.")
@sampling_options
@verbose
def generate(artifact: Path, **request: Any) -> None:
    """Continues a prompt."""
    from rgexport.chat.from_artifact import continue_prompt, summary

    pieces, stats = continue_prompt(artifact, sampler=_sampler(request), **request)
    for piece in pieces:
        click.echo(piece, nl=False)
    click.echo()
    progress.note(summary(stats))


@rgexport.command()
@click.argument("artifact", type=FOLDER)
@sampling_options
@verbose
def chat(artifact: Path, **request: Any) -> None:
    """Talks with an instruction-tuned model."""
    from rgexport.chat.from_artifact import open_conversation
    from rgexport.chat.terminal import chat_loop

    conversation = open_conversation(artifact, sampler=_sampler(request), **request)
    chat_loop(conversation, sys.stdin, sys.stdout)


def _sampler(request: dict[str, Any]) -> Any:
    """Takes the options of sampling out of `request`."""
    from rgexport.chat.sampling import Sampler

    names = "temperature", "top_k", "top_p", "seed"
    return Sampler(**{name: request.pop(name) for name in names})


@rgexport.command()
@click.argument("artifact", type=FOLDER)
@click.option("-p", "--n-prompt", default="512", show_default=True, help="Lengths of prompts.")
@click.option("-n", "--n-gen", default="128", show_default=True, help="Tokens to generate.")
@click.option("-d", "--n-depth", default="0", show_default=True, help="Tokens in the state before.")
@click.option("-r", "--repetitions", type=click.IntRange(1), default=5, show_default=True)
@click.option("--synthetic", is_flag=True, help="Make up the state at a depth: quick, same cost.")
@click.option("-t", "--threads", type=click.IntRange(1), help="[default: one per core]")
@click.option(
    "-o", "--output", "form", type=click.Choice(FORMS), default="table", show_default=True
)
@native_option
@verbose
def bench(
    artifact: Path,
    n_prompt: str,
    n_gen: str,
    n_depth: str,
    threads: int | None,
    form: str,
    **options: Any,
) -> None:
    """Measures tokens per second, beside how fast the machine reads memory.

    -p, -n and -d take lists such as 128,512; a length of 0 is left out.
    """
    from rgexport.runtimes.bench.measure import BenchRequest, bench_artifact
    from rgexport.runtimes.bench.rows import WRITERS

    request = BenchRequest.parse(n_prompt, n_gen, n_depth, **options)
    click.echo(WRITERS[form](bench_artifact(artifact, request, threads=threads)), nl=False)


@rgexport.command()
@click.argument("thing", metavar="MODEL-or-ARTIFACT", required=False)
@click.option(
    "--size", metavar=SIZES, help="Instead: a released model (may download it), or the demo."
)
@click.option("--json", "to_json", is_flag=True, help="Stable, for programs.")
@click.option("--verify", is_flag=True, help="Read every byte: values, or hashes.")
@verbose
def inspect(thing: str | None, size: str | None, to_json: bool, verify: bool) -> int:
    """Shows what a checkpoint, an artifact or a .mlpackage holds, and all that is wrong with it.

    The exit code is 1 where a checkpoint or a package has problems.
    """
    from rgexport.export.describe import as_json, as_text, describe

    description = describe(thing, size=size, verify=verify)
    click.echo((as_json if to_json else as_text)(description), nl=False)
    return 1 if description.get("problems") else 0


@rgexport.command()
@click.option("--size", required=True, metavar="2b|9b", help="The shape to imitate.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("-o", "--output", type=FOLDER, required=True, help="The folder to make.")
@click.option("--force", is_flag=True, help="Replace an earlier one.")
@verbose
def random(size: str, seed: int, output: Path, force: bool) -> None:
    """Writes a synthetic checkpoint of a real size, for measuring without the weights."""
    from rgexport.export.request import as_argument
    from rgexport.griffin.synthetic import write_random

    write_random(size, output, seed=seed, force=force)
    click.echo(f"{output} is complete. Export it: rgexport onnx -m {as_argument(output)} --int4")


@rgexport.command()
@model_options
@click.option("--device", default="auto", show_default=True, metavar="auto|cuda|cpu")
@click.option(
    "--impl",
    type=click.Choice(["rgexport", "deepmind", "hf"]),
    default="rgexport",
    show_default=True,
    help="Who computes: DeepMind's package, or Hugging Face's class, which has its own window.",
)
@click.option("--low-memory", is_flag=True, help="One layer's weights at a time, even if all fit.")
@click.option("--prompts", type=FOLDER, help="Lines of text, or a JSON list. [default: built in]")
@click.option("-o", "--output", type=FOLDER, help="The file. [default: ./MODEL.reference]")
@click.option("--force", is_flag=True, help="Replace an earlier one.")
@verbose
def reference(
    model: str | None,
    size: str | None,
    window: int | None,
    soft_cap: float | None,
    output: Path | None,
    **request: Any,
) -> None:
    """Captures what the full-precision model says, to validate artifacts without it.

    The file travels: `rgexport validate --reference` needs neither the model nor torch.
    """
    from rgexport.griffin.checkpoint import open_checkpoint
    from rgexport.validate.reference.capture import capture, closing_line

    checkpoint = open_checkpoint(model, size=size, window=window, soft_cap=soft_cap)
    target = output or Path(f"{checkpoint.name}.reference")
    click.echo(closing_line(capture(checkpoint, target, **request)))


@rgexport.command()
@click.argument("artifacts", metavar="ARTIFACT...", nargs=-1, required=True, type=FOLDER)
@click.option("--reference", type=FOLDER, help="Made by `rgexport reference`: needs no torch.")
@click.option(
    "-m",
    "--model",
    help="The original, to measure the cost. [default: the demo, or the hub cache's copy]",
)
@click.option("--text", type=FOLDER, help="Compare on this text. [default: built in]")
@click.option(
    "--tokens", "max_tokens", type=click.IntRange(2), help="So many of it, such as 32768."
)
@click.option(
    "--limit",
    "limits",
    metavar="NAME=VALUE",
    multiple=True,
    help="Instead of a check's own limit, such as original.kl=0.05. Can be repeated.",
)
@click.option("--bisect", is_flag=True, help="Also rank the layers by cost, and name suspects.")
@click.option("--bench", is_flag=True, help="Also measure tokens per second.")
@click.option("--allow-ambiguous", is_flag=True, help="Exit code 0 also where it cannot be told.")
@click.option("--json", "json_file", type=FOLDER, help="Also write the result to this file.")
@click.option("--html", "html_file", type=FOLDER, help="Also write a page to look at.")
@click.option("--device", default="auto", show_default=True, metavar="auto|cuda|cpu")
@native_option
@verbose
def validate(
    artifacts: tuple[Path, ...],
    model: str | None,
    text: Path | None,
    max_tokens: int | None,
    device: str,
    bisect: bool,
    bench: bool,
    **files: Any,
) -> int:
    """Compares artifacts with the reference: exit code 0 if all pass, 1 if one does not.

    Several artifacts, of any formats, are shown in one table. The verdict is AMBIGUOUS where a
    limit lies within the error bar of what it is for.
    """
    from rgexport.validate.opening import Request
    from rgexport.validate.run import validate_artifacts

    asked = Request(
        model=model, text=text, max_tokens=max_tokens, device=device, bisect=bisect, bench=bench
    )
    return validate_artifacts(artifacts, asked, **files)


@rgexport.group("llama-cpp")
def llama_cpp() -> None:
    """Makes a llama.cpp that runs RecurrentGemma."""


@llama_cpp.command()
@click.argument("checkout", metavar="DIR", type=FOLDER)
@verbose
def patch(checkout: Path) -> None:
    """Adds RecurrentGemma to a llama.cpp checkout."""
    from rgexport.kernels.llama_cpp.patch import patch_checkout

    changed = patch_checkout(checkout)
    for path in changed:
        click.echo(f"{checkout / path}")
    done = "is patched" if changed else "is patched already"
    click.echo(f"{checkout} {done}. Build it as usual: it runs RecurrentGemma.")


@llama_cpp.command()
@click.option(
    "-o", "--output", type=FOLDER, default=Path("llama-cpp"), show_default=True, help="The folder."
)
@click.option("--no-install", is_flag=True, help="Only build the wheel.")
@click.option("--tools", is_flag=True, help="Build llama-quantize, llama-server and others too.")
@verbose
def build(output: Path, no_install: bool, tools: bool) -> None:
    """Builds llama-cpp-python with RecurrentGemma, and installs it.

    The environment variable CMAKE_ARGS chooses what llama.cpp runs on, such as -DGGML_CUDA=on.
    """
    from rgexport.kernels.llama_cpp.build import build as build_wheel

    click.echo(build_wheel(output, tools=tools, install=not no_install))
