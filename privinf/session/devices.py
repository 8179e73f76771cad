"""Where a party may compute, and why not there."""

from __future__ import annotations

from contextlib import AbstractContextManager

from protocols.errors import ConfigError

TYPES = ("cpu", "cuda")


def walking(device: object) -> AbstractContextManager[None]:
    """The mode that a party walks a program in: on the CPU, where small operators' overhead counts, without what autograd needs."""
    import torch

    return torch.inference_mode(str(device) == "cpu")


def falls_back(device: object) -> str:
    """What a party does otherwise on this device than on the CPU, in one line; empty on the CPU."""
    if str(device) == "cpu":
        return ""
    return f"{device}: torch's operators in place of compiled loops, and every pass is walked, none replayed"


def cuda_missing() -> str:
    """Why there is no CUDA device here, in one line; empty if there is one."""
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported: {error}"
    if torch.version.cuda is None and torch.version.hip is None:
        return "the installed torch is built for the CPU alone"
    return "" if torch.cuda.is_available() else "no CUDA device is visible to this process"


def cuda_devices() -> list[str]:
    """Each CUDA device that is here, as `--device cuda` takes the first of them: its name and memory."""
    if cuda_missing():
        return []
    import torch

    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [f"cuda:{index} {each.name}, {each.total_memory / 2**30:.1f} GiB" for index, each in enumerate(found)]


def check_device(name: str) -> None:
    """ConfigError in one line unless this process can compute on the device: `cpu`, `cuda` or `cuda:N`."""
    kind, colon, index = name.partition(":")
    if kind not in TYPES or (colon and not (kind == "cuda" and index.isascii() and index.isdigit())):
        raise ConfigError(f"there is no device {name[:80]!r}", remedy=f"a party computes on {' or '.join(TYPES)}")
    if kind == "cpu":
        return
    why = cuda_missing()
    if not why and index and int(index) >= len(cuda_devices()):
        why = f"there are {len(cuda_devices())} CUDA devices here, counted from 0"
    if why:
        raise ConfigError(f"--device {name}: {why}", remedy="use --device cpu")
