"""Writes the model card of an artifact: its README.md."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite, prod

from rgexport.artifacts.format import format_of, render
from rgexport.artifacts.manifest import Manifest
from rgexport.artifacts.origin import GEMMA_TERMS, Origin
from rgexport.griffin.layout import QUANTIZABLE, model_tensors
from rgexport.quantize.algorithms.registry import ALGORITHMS
from rgexport.units import amount


@dataclass(frozen=True)
class Share:
    role: str
    scheme: str
    tensors: int
    weights: int
    bytes: int

    @property
    def cells(self) -> tuple[str, ...]:
        """Its fields and the bits per weight, for tables."""
        counts = f"{self.tensors:,}", f"{self.weights:,}", amount(self.bytes)
        return self.role, self.scheme, *counts, f"{8 * self.bytes / self.weights:.2f}"


def shares(manifest: Manifest) -> list[Share]:
    tensors = []
    for name, spec in model_tensors(manifest.config).items():
        size = sum(part.nbytes for part in manifest.tensors[name].parts.values())
        tensors.append(Share(spec.role, manifest.plan[name].label, 1, prod(spec.shape), size))
    return group_shares(tensors)


def group_shares(tensors: Iterable[Share]) -> list[Share]:
    totals: dict[tuple[str, str], Counter[str]] = {}
    for tensor in tensors:
        total = totals.setdefault((tensor.role, tensor.scheme), Counter())
        total.update(tensors=tensor.tensors, weights=tensor.weights, bytes=tensor.bytes)
    counts = "tensors", "weights", "bytes"
    return [Share(*key, *(total[count] for count in counts)) for key, total in totals.items()]


def matrix_bits(manifest: Manifest) -> float:
    """Returns bits per weight of matrices and embedding, with scales, zero points and tables."""
    matrices = [share for share in shares(manifest) if share.role in QUANTIZABLE]
    return 8 * sum(share.bytes for share in matrices) / sum(share.weights for share in matrices)


def algorithms(manifest: Manifest) -> dict[str, int]:
    """Counts quantized tensors and row groups by the algorithm that chose their levels."""
    schemes = (uniform for scheme in manifest.plan.values() for uniform in scheme.uniform)
    return dict(Counter(s.algorithm for s in schemes if s.is_quantized).most_common())


def levels_sentence(counts: Mapping[str, int]) -> str:
    """Returns text such as `Levels were chosen by GPTQ (40 tensors), clip search (1).`"""
    if not counts:
        return "No tensor is quantized."
    # A later version may have named an algorithm that is not known here.
    titles = {ALGORITHMS[w].title if w in ALGORITHMS else w: n for w, n in counts.items()}
    if len(titles) == 1:
        return f"Levels were chosen by {next(iter(titles))}."
    (first, number), *others = titles.items()
    rest = "".join(f", {title} ({count})" for title, count in others)
    return f"Levels were chosen by {first} ({number} tensors){rest}."


def _header(manifest: Manifest, origin: Origin) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    check = manifest.check
    measured = None
    if check.kl is not None and isfinite(check.kl):
        result = EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=f"the self-check's {check.tokens} tokens",
            metric_type="kl_divergence",
            metric_name="KL divergence to the original, nats per token",
            metric_value=check.kl,
        )
        measured = [result]
    data = ModelCardData(
        license=origin.licence,
        base_model=origin.hub_id,
        library_name=manifest.kind,
        pipeline_tag="text-generation",
        tags=["rgexport", "recurrent_gemma", "griffin", manifest.kind, manifest.precision],
        model_name=f"{manifest.name}, {manifest.precision}",
        eval_results=measured,
    )
    if origin.hub_id:
        data["base_model_relation"] = "quantized"
    return f"---\n{data.to_yaml()}\n---\n\n"


def card(manifest: Manifest, origin: Origin) -> str:
    verb = "chat ." if manifest.instruction_tuned else 'generate . -p "The meaning of life is"'
    specs = model_tensors(manifest.config).values()
    text = render(
        "card.md.j2",
        manifest=manifest,
        config=manifest.config,
        check=manifest.check,
        text=format_of(manifest.kind).card(manifest, verb),
        rows=[share.cells for share in shares(manifest)],
        levels=levels_sentence(algorithms(manifest)),
        matrix_bits=matrix_bits(manifest),
        parameters=sum(prod(spec.shape) for spec in specs),
        terms=GEMMA_TERMS,
    )
    return f"{_header(manifest, origin)}{text}\n"
