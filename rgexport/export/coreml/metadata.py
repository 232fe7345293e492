"""A package's metadata, as Xcode shows them: author, license, inputs, outputs and states."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from rgexport._version import __version__
from rgexport.export.coreml.options import CoreMLOptions
from rgexport.export.coreml.segments import PackagePlan
from rgexport.export.coreml.states import HIDDEN, HIDDEN_OUTPUT, RECURRENT, RECURRENT_OUTPUT, Form
from rgexport.export.mil.checks import CONFIG, DIGESTS, short_digests
from rgexport.export.origin import GEMMA_TERMS, Origin, origin_of
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.config import GriffinConfig

if TYPE_CHECKING:
    from coremltools.proto.Model_pb2 import FeatureDescription, Model

_STATE = re.compile(r"(?:layers_(?P<layer>\d+)_)?(?P<kind>.+?)(?P<half>_hi|_lo)?")


def add_metadata(
    model: "Model",
    checkpoint: Checkpoint,
    options: CoreMLOptions,
    plan: PackagePlan,
    blobs: Mapping[str, str],
) -> None:
    """Adds author, license, description and version, and a line of help for every feature.

    And the hashes of its weights in `blobs` (`TENSOR.PART` → SHA-256), so that a package without
    its manifest can be checked too.
    """
    config, form, origin = checkpoint.config, options.form, origin_of(checkpoint)
    metadata = model.description.metadata
    metadata.author = _author(origin)
    metadata.license = _licence(origin)
    metadata.versionString = __version__
    metadata.shortDescription = (
        f"{checkpoint.name}, a RecurrentGemma (Griffin) language model, {options.precision_word} "
        f"weights. {_contents(plan, form)}"
    )
    metadata.userDefined.update(
        {
            "rgexport.version": __version__,
            "rgexport.precision": options.precision_word,
            "rgexport.compute": options.compute_word,
            CONFIG: json.dumps(config.to_dict()),
            DIGESTS: json.dumps(short_digests(plan.tensors(blobs))),
        }
    )
    for feature in _features(model):
        feature.shortDescription = _help(feature.name, config, form)


def _contents(plan: PackagePlan, form: Form) -> str:
    """The functions of a package, and what it holds of the model."""
    *segments, last = plan.segments
    if segments:
        return (
            "It has both ends of the model: embed_decode and head_decode for 1 token, "
            f"embed_prefill and head_prefill for {form.prefill_length}."
        )
    part = "" if last.begins else f"It has the layers {last.layers[0]} to {last.layers[-1]}. "
    return (
        f"{part}Its functions, decode for 1 token and prefill for {form.prefill_length}, share "
        "weights and states. A new conversation begins with a new state."
    )


def _features(model: "Model") -> "Iterator[FeatureDescription]":
    for function in model.description.functions:
        groups: Iterable[Iterable[FeatureDescription]]
        groups = function.input, function.output, function.state
        for group in groups:
            yield from group


def _author(origin: Origin) -> str:
    owner = origin.hub_id.split("/")[0].capitalize() if origin.hub_id else "Unknown"
    return f"{owner} (exported by rgexport)"


def _licence(origin: Origin) -> str:
    if origin.released:
        return f"Gemma Terms of Use, {GEMMA_TERMS}"
    return origin.licence or "That of the checkpoint it was made from"


def _help(name: str, config: GriffinConfig, form: Form) -> str:
    """What a developer needs to know to fill or read a feature."""
    match = _STATE.fullmatch(name)
    assert match, name
    text = _HELP[match["kind"]].format(
        layer=match["layer"],
        window=config.window,
        before=config.conv_width - 1,
        logits="each token" if form.all_logits else "the last token",
    )
    return text + _HALVES[match["half"]]


_HELP = {
    "input_ids": "Token ids, as the tokenizer beside the package has them.",
    "position_ids": "Positions of these tokens, counted from 0 where the conversation begins.",
    "logits": "Scores of the next token, after the soft cap, for {logits}.",
    HIDDEN: "What the package before has made of these tokens.",
    HIDDEN_OUTPUT: f"What this package has made of these tokens: {HIDDEN} of the next one.",
    RECURRENT: "Hidden states of the RG-LRUs, a row per recurrent layer: zeros at first, "
    f"then {RECURRENT_OUTPUT} of the call before.",
    RECURRENT_OUTPUT: f"Hidden states of the RG-LRUs: {RECURRENT} of the next call.",
    "conv1d": "Layer {layer}: the last {before} inputs of its convolution, oldest first",
    "key": "Layer {layer}: the last {window} keys, rotated, oldest first, zeros in front",
    "value": "Layer {layer}: the last {window} values, oldest first, zeros in front",
}
_HALVES = {None: "", "_hi": " (in float16)", "_lo": " (what float16 left over, times 2048)"}
