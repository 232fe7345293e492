"""Loads the model of an ONNX artifact into ONNX Runtime, with our kernels and mapped weights."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import onnxruntime as ort

from rgexport.artifacts.artifact import Artifact
from rgexport.artifacts.manifest import ACTIVATIONS, Manifest
from rgexport.artifacts.onnx import model_file
from rgexport.artifacts.onnx.trust import require_trusted
from rgexport.errors import RequestError
from rgexport.progress import warn
from rgexport.runtimes.huge_pages import BackgroundAdvice, huge_pages
from rgexport.runtimes.onnx.bound_run import engine_errors
from rgexport.runtimes.onnx.mapped_weights import MappedWeights
from rgexport.runtimes.onnx.verification import state_sites

_SILENT = 4
"""Severity of the log: errors are raised, and log lines would show names unescaped."""
_WEBGPU_VERSION = (1, 25)
"""The first ONNX Runtime with all ops of the profile webgpu on a CPU."""
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
"""Option of ONNX Runtime: the folder of the weights of a graph that is loaded from memory."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in ONNX Runtime.

    Attributes:
        native: our kernels in it.
        weights: the weights that these kernels read; they must live as long as the session.
        stop: ends the threads that move weights to huge pages. It must be called before the session
            and the weights are freed.
        exact_tokens: `SessionInfo.exact_tokens`.
        sites: recurrent state → the output with its rows; empty if `exact_tokens` is 1.
    """

    session: ort.InferenceSession
    native: model_file.NativeOps
    weights: MappedWeights | None
    stop: Callable[[], None]
    exact_tokens: int
    sites: dict[str, str]


def load_model(artifact: Artifact, threads: int, graph: bytes | None, native: bool) -> LoadedModel:
    """Loads the artifact's model, or `graph` with its weights; our kernels may run if `native`.

    Raises RequestError if the graph is not trusted, or ONNX Runtime cannot load it.
    """
    _require_version(artifact)
    options = _session_options(artifact, threads)
    path = artifact.file(model_file.MODEL_FILE)
    model = graph or model_file.read_graph(path)
    require_trusted(artifact, model)

    ops = model_file.NativeOps()
    if native:
        ops = _register(options, model_file.native_ops(model))
    exact_tokens = 1
    sites: dict[str, str] = {}
    if not graph:
        exact_tokens = _exact_tokens(ops, artifact.manifest)
    if exact_tokens > 1:
        sites = state_sites(artifact.manifest.config)
    model = model_file.prepare_model(model, sites.values())

    weights = None
    if ops.library:
        weights = _map_weights(artifact, ops, options)
    with engine_errors(f"open {path}"), huge_pages() as advice:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    if weights:
        weights.make_resident()

    outputs = {value.name for value in session.get_outputs()}
    if not outputs.issuperset(sites.values()):
        exact_tokens = 1
        sites = {}
    stop = partial(_stop_threads, advice, weights)
    return LoadedModel(session, ops, weights, stop, exact_tokens, sites)


def _require_version(artifact: Artifact) -> None:
    """Raises RequestError if this ONNX Runtime lacks ops of the artifact's profile."""
    version = ort.__version__
    major_minor = tuple(int(number) for number in version.split(".")[:2])
    if artifact.manifest.profile == "webgpu" and major_minor < _WEBGPU_VERSION:
        expected = ".".join(map(str, _WEBGPU_VERSION))
        raise RequestError(
            f"{artifact.path} is made for webgpu, and on a processor needs ONNX Runtime "
            f"{expected} or later; this is {version}: update onnxruntime"
        )


def _session_options(artifact: Artifact, threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = _SILENT
    # A memory pattern takes a block for all tensors of a run, beside the arena of the first run:
    # 180 MB for prompts of a 2B, without a gain in time.
    options.enable_mem_pattern = False
    options.add_session_config_entry(_WEIGHTS_FOLDER, str(artifact.path))
    return options


def _register(options: ort.SessionOptions, native: model_file.NativeOps) -> model_file.NativeOps:
    """Registers the library of our kernels; returns no ops, with a warning, if that fails."""
    try:
        if native.library:
            options.register_custom_ops_library(str(native.library))
    except Exception as error:  # built for another machine or another ONNX Runtime
        warn(f"it will be slower, for the native kernels cannot be loaded: {error}")
        return model_file.NativeOps()
    return native


def _exact_tokens(native: model_file.NativeOps, manifest: Manifest) -> int:
    """Returns the most tokens of a call that give the bits that each gives alone.

    ONNX Runtime takes cosines and sines four at a time, and the remainder by another formula. More
    tokens than the window has would share slots of a ring, which could not be restored.
    """
    config = manifest.config
    angles = config.rope_dims // 2 if "attention" in config.block_types else 0
    if angles % 4 or ACTIVATIONS[manifest.compute] != "float32":
        return 1
    return min(native.exact_tokens, config.window)


def _map_weights(
    artifact: Artifact, native: model_file.NativeOps, options: ort.SessionOptions
) -> MappedWeights:
    """Maps the weights that our kernels read, and passes them to the session's options."""
    weights = MappedWeights(artifact.path, native.weights)
    weights.read_around(native.small)
    for name, value in weights.values.items():
        options.add_initializer(name, value)
    return weights


def _stop_threads(advice: BackgroundAdvice, weights: MappedWeights | None) -> None:
    if weights:
        weights.close()
    advice.stop()
