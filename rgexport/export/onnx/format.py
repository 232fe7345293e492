"""The format of ONNX artifacts: layouts of tensors, interface, model card."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from rgexport.export.artifact import Artifact
from rgexport.export.format import CardText, FolderFormat, installation
from rgexport.export.manifest import ACTIVATIONS, IoRecord, Manifest, StateRecord
from rgexport.export.onnx.artifact import MODEL_FILE, OnnxArtifact, part_shapes, weight_files
from rgexport.export.onnx.interface import graph_interface
from rgexport.export.onnx.model_file import NUM_LOGITS
from rgexport.quantize.plan import PRECISIONS
from rgexport.quantize.scheme import PartShapes, Scheme

if TYPE_CHECKING:
    from rgexport.export.tokenizer import ControlIds

_DESKTOP = """\
{install}, in this folder:

    rgexport {verb}

{runtimes}

`model.onnx` runs in any ONNX Runtime, without custom ops. Its inputs are `input_ids` and
`position_ids` [batch, tokens] and the states of {layers} layers; its outputs are `logits` and the
new states."""
_BROWSER = """\
In a browser, with onnxruntime-web 1.30 or later, without custom ops:

    import * as ort from "onnxruntime-web/{profile}";
    const session = await ort.InferenceSession.create("model.onnx", {{
      executionProviders: ["{profile}"],
      externalData: [{data}],
    }});

Its inputs are `input_ids` and `position_ids` [batch, tokens] and the states of {layers} layers, all
zeros at first; its outputs are `logits` and the new states. On a desktop,
{install}, in this folder:

    rgexport {verb}

{runtimes}"""
_RUNTIMES = """\
Two more runtimes take the folder as it is; `docs/genai.md` and `docs/transformers-js.md` in
rgexport's repository have examples:

| runtime | how |
|---|---|
| onnxruntime-genai 0.14 or later | `onnxruntime_genai.Model(FOLDER)`, by `genai_config.json` |
| transformers.js 4.2 or later, on the device `{device}` | `recurrent_gemma.mjs` |"""


class OnnxFormat(FolderFormat):
    """A graph, with its weights in files beside it."""

    library = "onnx"
    entries = (MODEL_FILE,)
    precisions = PRECISIONS
    planned_precisions = ("int3",)
    alignment = 4096
    graph_bytes = 24_000
    keeps_bfloat16_gates = True

    def artifact(self, folder: Path, manifest: Manifest) -> Artifact:
        return OnnxArtifact(folder, manifest)

    def part_shapes(self, shape: tuple[int, ...], scheme: Scheme) -> PartShapes:
        return part_shapes(shape, scheme)

    def interface(self, manifest: Manifest) -> tuple[tuple[StateRecord, ...], IoRecord]:
        earlier = any(value.name == NUM_LOGITS for value in manifest.io.inputs)
        return graph_interface(manifest.config, ACTIVATIONS[manifest.compute], earlier=earlier)

    def write_program_files(
        self, folder: Path, manifest: Manifest, ids: "ControlIds", files: Collection[str]
    ) -> None:
        """Writes files for onnxruntime-genai and transformers.js."""
        from rgexport.export.onnx.program_files import write_genai_config, write_web_files

        write_genai_config(folder, manifest.config, ids, files)
        write_web_files(folder, manifest, ids)

    def card(self, manifest: Manifest, verb: str) -> CardText:
        engine, run = "ONNX Runtime", _DESKTOP
        if manifest.profile != "cpu":
            engine, run = f"onnxruntime-web ({manifest.profile})", _BROWSER
        files = ", ".join(f'"{name}"' for name in weight_files(manifest))
        facts = {"layers": manifest.config.num_layers, "profile": manifest.profile, "data": files}
        runtimes = _RUNTIMES.format(device=manifest.profile)
        text = run.format(verb=verb, install=installation(), runtimes=runtimes, **facts)
        return CardText(engine, "softmax", text)


FORMAT = OnnxFormat()
