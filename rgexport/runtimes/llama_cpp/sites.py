"""Where the sites are in the graph that llama.cpp builds for RecurrentGemma."""

from dataclasses import dataclass

from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layer import all_ops
from rgexport.griffin.sites import sites


@dataclass(frozen=True)
class Tap:
    """A tensor of the graph.

    Attributes:
        name: the first tensor of that name; those of a layer have its index behind it.
        then: if given, it is the first result of this operation behind that tensor instead.
    """

    name: str
    then: str = ""


_ONCE = {
    "embed_tokens": Tap("embd"),
    "final_norm": Tap("result_norm"),
    "lm_head": Tap("result_norm", "MUL_MAT"),
    "logits": Tap("result_output"),
}
_IN_LAYER = {site: op.graph for site, op in all_ops().items() if op.graph}


def taps(config: GriffinConfig) -> dict[str, Tap]:
    """Site → tensor, of all sites that the graph of `config` has."""
    found = {}
    for site in sites(config):
        tap = _in_layer(site) if site.startswith("layers.") else _ONCE.get(site)
        if tap is not None:
            found[site] = tap
    return found


def _in_layer(site: str) -> Tap | None:
    _, index, name = site.split(".", 2)
    if name not in _IN_LAYER:
        return None
    tensor, _, then = _IN_LAYER[name].partition("/")
    return Tap(f"{tensor}-{index}", then)
