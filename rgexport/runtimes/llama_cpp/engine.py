"""The engine of GGUF files; to its observers, llama.cpp passes each tensor in a callback."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from rgexport.artifacts.artifact import Artifact
from rgexport.errors import RequestError
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layer_ops import all_ops
from rgexport.griffin.layout import sites
from rgexport.griffin.state import State
from rgexport.kernels.llama_cpp.port import BUILD_COMMAND
from rgexport.quantize.schemes.ggml_library import load_library
from rgexport.runtimes.engine import LENGTHS, Engine, Observation, Observer, SessionOptions
from rgexport.runtimes.llama_cpp.library import bindings
from rgexport.runtimes.llama_cpp.session import UBATCH, LlamaCppSession
from rgexport.runtimes.session import Session

_LEAN_UBATCH = 64  # most tokens of one call, for which llama.cpp reserves scratch memory


class LlamaCppEngine(Engine):
    @property
    def can_narrow(self) -> bool:
        return True

    def require(self) -> None:
        bindings()

    def session(self, artifact: Artifact, options: SessionOptions) -> Session:
        return LlamaCppSession(
            artifact,
            threads=options.threads,
            window=options.window,
            ubatch=_LEAN_UBATCH if options.lean else UBATCH,
            mmap=not options.lean,  # with mmap, memory holds repacked weights twice
        )

    def observer(self, artifact: Artifact, options: SessionOptions) -> Observer:
        return LlamaCppObserver(artifact, options.threads)


FORMAT = LlamaCppEngine()

_GATES = ("rg_lru.input_gate", "rg_lru.recurrent_gate")
_ATTENTION = "temporal_block.attention"

_ONCE = {
    "embed_tokens": ("embd", ""),
    "final_norm": ("result_norm", ""),
    "lm_head": ("result_norm", "MUL_MAT"),
    "logits": ("result_output", ""),
}


def taps(config: GriffinConfig) -> dict[str, tuple[str, str]]:
    """Returns site → its tensor, the first of a name in the graph, or an operation after that."""
    in_layer = {site: op.graph for site, op in all_ops().items() if op.graph}
    tapped: dict[str, tuple[str, str]] = {}
    for site in sites(config):
        name = site.split(".", 2)[-1]
        if site in _ONCE:
            tapped[site] = _ONCE[site]
        elif site.startswith("layers.") and name in in_layer:
            tensor, _, then = in_layer[name].partition("/")
            tapped[site] = f"{tensor}-{site.split('.')[1]}", then
    return tapped


class LlamaCppObserver:
    """A session of llama.cpp with its evaluation callback.

    The GELU is part of a fused operation and cannot be seen. Attention has the precision of the
    cached keys and values, whatever the dtype of its result.
    """

    lengths = LENGTHS

    def __init__(self, artifact: Artifact, threads: int | None):
        self._watch = _Watch(taps(artifact.manifest.config))
        callback = bindings().ggml_backend_sched_eval_callback(self._watch)
        self._session = LlamaCppSession(artifact, threads=threads, watch=callback)

    def observe(self, tokens: np.ndarray, state: State) -> Observation:
        self._session.set_state(state)
        self._session.prefill(tokens[None], len(tokens))
        values = {s: array.reshape(len(tokens), -1) for s, array in self._watch.take().items()}
        gates = {site: values.pop(site) for site in list(values) if site.endswith(_GATES)}
        after = self._session.get_state()
        attention = (site for site in values if site.endswith(_ATTENTION))
        dtypes = {site: after[site.replace(_ATTENTION, "key")].dtype for site in attention}
        rounded = {site: dtype.name for site, dtype in dtypes.items() if dtype != np.float32}
        return Observation(values=values, gates=gates, dtypes=rounded, state=after)


class _Watch:
    """llama.cpp's callback: is asked about every tensor in turn, and then gets those it needs."""

    def __init__(self, tapped: Mapping[str, tuple[str, str]]):
        self._named: dict[str, list[str]] = defaultdict(list)
        self._after: dict[str, dict[str, str]] = defaultdict(dict)
        for site, (name, then) in tapped.items():
            if then:
                self._after[name][then] = site
            else:
                self._named[name].append(site)
        self.begin()

    def begin(self) -> None:
        self._values: dict[str, np.ndarray] = {}
        self._seen: set[str] = set()
        self._awaited: dict[str, str] = {}
        self._sites: list[str] = []
        self._failure: BaseException | None = None

    def take(self) -> dict[str, np.ndarray]:
        values, failure = self._values, self._failure
        self.begin()
        if failure is not None:
            raise failure
        return values

    def __call__(self, tensor: int, ask: bool, _: Any) -> bool:
        """Returns whether a site needs the tensor (`ask`), otherwise whether to continue."""
        try:
            if ask:
                ggml = load_library()
                name = ggml.ggml_get_name(tensor).decode()
                awaited = self._awaited.pop(ggml.ggml_op_desc(tensor).decode(), None)
                self._sites = [] if awaited is None else [awaited]
                if name in self._named and name not in self._seen:
                    self._seen.add(name)
                    self._awaited = dict(self._after[name])
                    self._sites += self._named[name]
                return bool(self._sites)
            self._values |= dict.fromkeys(self._sites, read_floats(tensor))
            return True
        except BaseException as error:  # C cannot pass it on
            self._failure = self._failure or error
            return False


def read_floats(tensor: int) -> np.ndarray:
    """Copies a tensor's elements, float32 [n] with the innermost axis last, from any device."""
    ggml = load_library()
    count, size = ggml.ggml_nelements(tensor), ggml.ggml_nbytes(tensor)
    if not ggml.ggml_is_contiguous(tensor) or size != 4 * count:
        raise RequestError(
            f"llama.cpp's {ggml.ggml_get_name(tensor).decode()} has {count} elements in {size} "
            "bytes; expected float32 without gaps: install the llama.cpp that "
            f"`{BUILD_COMMAND}` makes"
        )
    values = np.empty(count, np.float32)
    ggml.ggml_backend_tensor_get(tensor, values.ctypes.data, 0, size)
    return values
