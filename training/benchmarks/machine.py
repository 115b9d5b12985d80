"""What figures were measured on."""

import platform
from pathlib import Path


_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def processor() -> str:
    """The processor's name, family and instructions that matter for products, where the system says them."""
    information = Path("/proc/cpuinfo")
    if not information.exists():
        return platform.processor() or platform.machine()
    lines = information.read_text(encoding="utf-8").splitlines()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    known = [name for name in _INSTRUCTIONS if name in fields.get("flags", "").split()]
    family = f"family {fields['cpu family']}" if "cpu family" in fields else platform.machine()
    return f"{fields.get('model name', 'processor')} ({', '.join([family, *known])})"
