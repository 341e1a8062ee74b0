"""What a cubin says of its kernels' parameters: read from the ELF file itself, without any tool.

Source: the sections `.nv.info.<kernel>` that ptxas writes; their attribute 0x17, EIATTR_KPARAM_INFO, as `cuobjdump
--dump-elf` decodes it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

_KPARAM_INFO = 0x17
_SIZED = 4
_NO_BITS = 8


def kernel_parameters(cubin: bytes) -> dict[str, list[tuple[int, int]]]:
    """(offset, size) in bytes of every parameter, in order, by kernel."""
    prefix = ".nv.info."
    return {n[len(prefix) :]: _parameters(data) for n, data in _sections(cubin).items() if n.startswith(prefix)}


def _sections(cubin: bytes) -> Mapping[str, bytes]:
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, table + i * size) for i in range(count)]
    start = headers[names][4]
    found = {}
    for name, kind, _, _, offset, length, *_ in headers:
        text = cubin[start + name : cubin.index(b"\0", start + name)].decode()
        found[text] = b"" if kind == _NO_BITS else cubin[offset : offset + length]
    return found


def _parameters(info: bytes) -> list[tuple[int, int]]:
    """Attributes are (format, number) and, in one format, a length and as many bytes."""
    found: dict[int, tuple[int, int]] = {}
    at = 0
    while at < len(info):
        form, attribute = info[at], info[at + 1]
        if form != _SIZED:
            at += 4
            continue
        (length,) = struct.unpack_from("<H", info, at + 2)
        if attribute == _KPARAM_INFO:
            _, ordinal, offset, flags = struct.unpack_from("<IHHI", info, at + 4)
            found[ordinal] = (offset, (flags >> 18) & 0x3FFF)
        at += 4 + length
    return [found[i] for i in sorted(found)]
