"""The registry of the algorithms that choose scales, zero points and levels."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Algorithm:
    """An algorithm's name for people, and whether it needs statistics of a matrix's inputs."""

    title: str
    needs_statistics: bool = False


ALGORITHMS: dict[str, Algorithm] = {
    "cast": Algorithm("rounding to the type"),
    "rtn": Algorithm("rounding to nearest"),
    "search": Algorithm("clip search"),
    "importance": Algorithm("clip search weighed by importance", needs_statistics=True),
    "kmeans": Algorithm("k-means"),
    "ggml": Algorithm("the rules of llama-quantize"),
    "gptq": Algorithm("GPTQ", needs_statistics=True),
}
"""`rtn` rounds to nearest on the scale of the extremes."""
