"""The implementations that can compute a reference: rgexport's own, and DeepMind's."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

from rgexport.errors import RequestError
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.device import torch_device
from rgexport.griffin.layout import float32_bytes
from rgexport.griffin.numpy_reference import NumpyReference
from rgexport.griffin.tensor import WeightSource
from rgexport.progress import note
from rgexport.runtimes.machine import available_bytes
from rgexport.units import amount
from rgexport.validate.reference_pass import ReferenceModel

OWN = "rgexport"
DEEPMIND = "deepmind"
ROOM = 1.25
"""Free memory that a whole model takes, as a multiple of its float32 weights, …"""
WORKING_BYTES = 2 << 30
"""… and for activations."""

MakeReference = Callable[[GriffinConfig, WeightSource], ReferenceModel]


def choose_implementation(name: str, device: str, low_memory: bool) -> MakeReference:
    """Returns the constructor of an implementation, `OWN` or `DEEPMIND`.

    rgexport's own computes in NumPy on the CPU, and in torch on a GPU, which `auto` prefers.
    It keeps its weights in memory where they fit, unless `low_memory` forbids it.

    Raises:
        RequestError: a package is missing, there is no such device, or DeepMind's is asked for
            `low_memory`.
    """
    if name == OWN:
        numpy_only = device == "cpu" or (device == "auto" and find_spec("torch") is None)
        return partial(_open_own, "cpu" if numpy_only else torch_device(device), low_memory)
    if low_memory:
        raise RequestError(
            f"--impl {name} holds the whole model in memory; leave out --low-memory, or --impl"
        )
    device = torch_device(device)
    try:
        import rgexport.validate.reference.deepmind_model  # noqa: F401
    except ImportError as error:
        raise RequestError(
            f"--impl deepmind needs a package that is missing ({error.name}): "
            "pip install 'recurrentgemma[torch]' flax jax"
        ) from None
    return partial(_open_deepmind, device)


def _open_own(
    device: str, low_memory: bool, config: GriffinConfig, weights: WeightSource
) -> ReferenceModel:
    needed = float32_bytes(config)
    free = None if low_memory else _free_bytes(device)
    keep = free is not None and ROOM * needed + WORKING_BYTES <= free
    if not low_memory and not keep:
        note(f"{amount(needed)} of weights do not fit into memory: one layer at a time")
    if device == "cpu":
        return NumpyReference(config, weights, keep=keep)
    from rgexport.griffin.reference import Reference

    return Reference(config, weights, device=device, keep=keep)


def _open_deepmind(device: str, config: GriffinConfig, weights: WeightSource) -> ReferenceModel:
    from rgexport.validate.reference.deepmind_model import DeepMindModel

    needed, free = float32_bytes(config), _free_bytes(device)
    if free is not None and needed > free:
        raise RequestError(
            f"--impl deepmind takes {amount(needed)} of memory for the weights alone, and "
            f"{amount(free)} are free; leave it out: rgexport's own reads layer by layer"
        )
    return DeepMindModel(config, weights, device=device)


def _free_bytes(device: str) -> int | None:
    if not device.startswith("cuda"):
        return available_bytes()
    import torch

    free: int = torch.cuda.mem_get_info(torch.device(device))[0]
    return free
