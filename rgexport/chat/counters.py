"""Counters of a scheduler's work."""

from dataclasses import dataclass


@dataclass
class Counters:
    """Totals since the start. The scheduler's thread writes them; any thread may read them.

    Attributes:
        cached_tokens: tokens of prompts that had a known state.
        prompt_tokens: tokens of prompts that were read.
        steps: passes of all rows that decode.
        drafted_tokens: tokens that were checked beside the last one of a row.
    """

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    steps: int = 0
    read_seconds: float = 0.0
    step_seconds: float = 0.0
