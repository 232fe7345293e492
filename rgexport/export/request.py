"""Reads and checks the options that exports of all formats share."""

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from rgexport.artifacts.format import format_of
from rgexport.artifacts.manifest import ACTIVATIONS
from rgexport.choices import Quality, plan_advice
from rgexport.errors import RequestError
from rgexport.quantize.plan import MIXED, precision_of
from rgexport.quantize.schemes.registry import Plan

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kMG]?)B?", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_FLOATS = {"fp32", "fp16", "f32", "f16", "bf16"}
_BLOCKS = {MIXED} | {f"int{bits}" for bits in range(2, 9)}
QUALITIES: dict[Quality, str] = {"fast": "rtn", "default": "search", "best": "gptq"}


def bytes_of(flag: str, size: str | float) -> float:
    match = _SIZE.fullmatch(str(size).strip())
    if not match:
        raise RequestError(f"{flag} is {size!r}; expected a number of bytes, such as 1.5GB")
    return float(match[1]) * _UNITS[match[2].lower()]


def precision_word(precision: str | None, int4: bool, int8: bool, kind: str) -> str | None:
    flags = [name for name, is_set in (("int4", int4), ("int8", int8)) if is_set]
    named = {*flags, *([precision] if precision else [])}
    if len(named) > 1:
        options = [f"--{name}" for name in flags] + [f"--precision {precision}"] * bool(precision)
        raise RequestError(f"{' and '.join(options)} contradict each other; give one of them")
    chosen = named.pop() if named else None
    if chosen:
        require_word("--precision", chosen, format_of(kind).precisions)
    return chosen


def require_word(flag: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        advice = plan_advice(value) if flag == "--precision" else ""
        raise RequestError(f"{flag} is {value!r}; expected one of {', '.join(allowed)}{advice}")


def algorithm_word(
    quality: Quality | None, calibration: object | None, plan: object | None
) -> str | None:
    """Returns the algorithm that the options name; None leaves it to a plan, or to the default."""
    if quality is not None:
        require_word("--quality", quality, QUALITIES)
    if calibration is not None and quality not in (None, "best"):
        raise RequestError(
            f"--quality {quality} takes no calibration; leave it out, or take --quality best"
        )
    if quality is None and (plan is not None or calibration is None):
        return None
    return QUALITIES[quality or "best"]


@dataclass(frozen=True, kw_only=True)
class FolderOptions(ABC):
    """The options that exports to folders share; None stands for a default.

    `block_size` and `symmetric` are for the linears, and an embedding (also the head) of the same
    precision. `compute` is the type of the activations. `plan` replaces the fields above it, except
    `compute`. `algorithm` chooses the levels; None leaves it to the plan, or to clip search.
    """

    precision: str | None = None
    compute: str | None = None
    block_size: int | None = None
    symmetric: bool | None = None
    embedding_precision: str | None = None
    plan: Plan | None = None
    algorithm: str | None = None
    default_compute: ClassVar[str]

    @property
    @abstractmethod
    def defaults(self) -> tuple[str, Mapping[str, str]]:
        """The default precision; precision of the linears → the embedding's, if it differs."""

    @property
    def compute_word(self) -> str:
        """Returns `compute`, or its default: the type of float weights, or the format's."""
        precision = self.precision_word
        return self.compute or (precision if precision in ACTIVATIONS else self.default_compute)

    @property
    def precision_word(self) -> str:
        return precision_of(self.plan) if self.plan else self.precision or self.defaults[0]

    @property
    def precisions(self) -> tuple[str, str]:
        linears = self.precision_word
        return linears, self.embedding_precision or self.defaults[1].get(linears, linears)

    def require_consistent(self, *, exact: bool = False) -> None:
        """Raises RequestError: an unknown word, a plan that does not fit, an idle option."""
        by_plan = "precision", "block_size", "symmetric", "embedding_precision"
        refuse_beside_plan(self, by_plan)
        for name, scheme in (self.plan or {}).items():
            if scheme.is_gguf_only:
                raise RequestError(
                    f"the plan stores {name} as {scheme.label}, which only GGUF files have"
                )
        require_word("--compute", self.compute_word, ACTIVATIONS)
        if _BLOCKS.isdisjoint(self.precisions):
            block, symmetric = self.block_size is not None, self.symmetric is not None
            flag = "--symmetric" if self.symmetric else "--asymmetric"
            refuse_idle(
                {"--block-size": block, "--exact": exact, flag: symmetric},
                f"{' and '.join(dict.fromkeys(self.precisions))} weights; expected it beside "
                "--int8 or --int4: give one of those, or leave it out",
            )
        require_levels(self.precisions, self.algorithm)


def refuse_beside_plan(options: Any, names: Iterable[str]) -> None:
    changed = [name for name in names if getattr(options, name) != getattr(type(options), name)]
    if options.plan is not None and changed:
        fields = ", ".join(name.replace("_", " ") for name in changed)
        raise RequestError(f"--plan says how each tensor is stored; leave out the {fields}")


def refuse_idle(options: Mapping[str, object], where: str) -> None:
    """Raises RequestError if an option, flag → value, is set that changes nothing in `where`."""
    if flags := [flag for flag, value in options.items() if value]:
        change = "changes" if len(flags) == 1 else "change"
        raise RequestError(f"{' and '.join(flags)} {change} nothing in {where}")


def require_levels(precisions: Collection[str], algorithm: str | None) -> None:
    if algorithm is not None and {*precisions} <= _FLOATS:
        refuse_idle(
            {"--quality (or --calibration)": True},
            f"{' and '.join(dict.fromkeys(precisions))} weights; expected it beside weights of "
            "8 or 4 bits: give --int8 or --int4, or leave it out",
        )
