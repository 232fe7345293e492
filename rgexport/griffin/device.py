"""The device on which torch computes a reference."""

from rgexport.errors import NotInstalled, RequestError


def torch_device(device: str = "auto") -> str:
    """Returns a device that torch can use; `auto` is CUDA if there is one."""
    try:
        import torch
    except ImportError:
        raise NotInstalled(
            "this needs torch for the reference model: pip install 'rgexport[export]'"
        ) from None
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise RequestError(f"torch cannot use the device {device!r}: {reason}") from None
    return device
