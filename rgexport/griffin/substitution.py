"""Looks at every op of the reference while it runs, and puts other values in place of its own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

Argument = Callable[[int], np.ndarray]
"""Gives the tensor that is the op's argument of a number."""
Look = Callable[[str, str, Argument, tuple[np.ndarray, ...]], np.ndarray | None]
"""Is shown a site, its op (`linear`, see `griffin.ops`), what the op takes and its results
[B, T, n] …; gives what takes the place of the first one, in its shape, or None."""


@contextmanager
def substituted(look: Look) -> Iterator[None]:
    """While the block runs, `look` sees each op of the Griffin op set in the order of computation.

    What it gives is what the following ops take. The head goes through its table in slabs, so its
    sites are seen once for each.
    """
    with _Substitution(look):
        yield


class _Substitution(TorchDispatchMode):
    """Sees custom ops whole, below autograd, so also in inference mode."""

    def __init__(self, look: Look):
        super().__init__()
        self._look = look

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        namespace, _, op = func.name().partition("::")
        if namespace != "griffin":
            return found
        first, *rest = found if isinstance(found, tuple) else (found,)
        shown = tuple(result.cpu().numpy() for result in (first, *rest))
        other = self._look(args[-1], op, lambda index: args[index].cpu().numpy(), shown)
        if other is not None:
            first = torch.from_numpy(np.ascontiguousarray(other)).to(first)
        return (first, *rest) if isinstance(found, tuple) else first
