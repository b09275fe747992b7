"""Where a model runs and in which floating-point type: what is asked for, or the best this machine has."""

import torch

from knnstore.errors import InvalidArgumentError

__all__ = ["DTYPES", "choose_device", "choose_dtype"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str | None) -> torch.device:
    """The device a model runs on: the one named, or, for None, CUDA, then MPS, then the CPU, whichever is there first.

    name: `cpu`, `cuda`, `cuda:1` or `mps`. Raises InvalidArgumentError for another name or a device this machine lacks.
    """
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InvalidArgumentError(f"device {name!r}: not a device. Use cpu, cuda, cuda:<number> or mps.") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise InvalidArgumentError(f"device {name!r}: not supported. Use cpu, cuda, cuda:<number> or mps.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = f"{torch.cuda.device_count()} CUDA device(s)" if torch.cuda.is_available() else "no CUDA device"
        raise InvalidArgumentError(f"device {name!r}: torch finds {found} here. Leave the device out to have one chosen.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InvalidArgumentError("device 'mps': torch finds no MPS device here. Leave the device out to have one chosen.")
    return device


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The type a model computes in: the one named, or, for None and `auto`, bfloat16 where `device` computes in it natively.

    name: `float32`, `bfloat16`, `float16` or `auto`. Everywhere else the automatic choice is float32: float16 can overflow
    (its largest number is 65,504, and hidden states of real models pass it). The measurements behind the choice are in
    docs/design.md. Raises InvalidArgumentError for another name.
    """
    if name is None or name == "auto":
        return torch.bfloat16 if _has_native_bfloat16(device) else torch.float32
    if name not in DTYPES:
        raise InvalidArgumentError(f"dtype {name!r}: not known. Use {', '.join(DTYPES)} or auto.")
    return DTYPES[name]


def _has_native_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        # Without these instructions torch converts to float32 and back around every product: slower than float32 itself.
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False
