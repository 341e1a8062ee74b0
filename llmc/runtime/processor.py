"""What this machine is and what a package asks of it: processor features and C library; nothing is run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from .errors import ModelError
from .manifest import Manifest, Variant


def processor_features(cpuinfo: str) -> frozenset[str]:
    """The features of a /proc/cpuinfo text, spelled without underscores (`avx512vnni`)."""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(_plain(name) for name in value.split())
    return frozenset()


def this_processor() -> frozenset[str]:
    """This machine's features."""
    try:
        return processor_features(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        raise ModelError(f"cannot read /proc/cpuinfo ({error}); packages run on Linux") from error


def choose_variant(variants: Sequence[Variant], features: frozenset[str], wanted: str | None = None) -> Variant:
    """The variant that asks most of what the machine has (of equals, the later), or the one named `wanted`.

    Raises `ModelError` naming the missing features when none can run, `ValueError` for an unknown name.
    """
    candidates = [v for v in variants if wanted in (None, v.name)]
    if not candidates:
        raise ValueError(
            f"device: given 'cpu:{wanted}', expected one of {['cpu:' + v.name for v in variants]} or 'cpu'"
        )
    able = [v for v in candidates if not _missing(v, features)]
    if not able:
        lacks = "; ".join(f"{v.name} needs {', '.join(_missing(v, features))}" for v in candidates)
        raise ModelError(f"this processor lacks features that the package was compiled for: {lacks}")
    return max(enumerate(able), key=lambda pair: (len(pair[1].requires), pair[0]))[1]


def check_machine(manifest: Manifest, machine: str, libc: str | None) -> None:
    """Refuse a package for another processor family or for a newer C library. `libc`: `glibc 2.36`, or None."""
    if manifest.machine not in (None, machine):
        raise ModelError(
            f"the package {manifest.name!r} was compiled for {manifest.machine}, this machine is {machine}"
        )
    if manifest.glibc is None:
        return
    needed = ".".join(map(str, manifest.glibc))
    family, _, version = (libc or "").partition(" ")
    if family != "glibc":
        found = libc or "another C library"
        raise ModelError(f"the package {manifest.name!r} needs glibc {needed} or newer, this system has {found}")
    parts = tuple(int(p) for p in version.split(".") if p.isdigit())
    if parts < manifest.glibc:
        raise ModelError(f"the package {manifest.name!r} needs glibc {needed} or newer, this system has {version}")


def this_libc() -> str | None:
    """The C library as `glibc 2.36`; None for another one."""
    try:
        return os.confstr("CS_GNU_LIBC_VERSION")
    except (AttributeError, ValueError, OSError):
        return None


def _missing(variant: Variant, features: frozenset[str]) -> list[str]:
    return [name for name in variant.requires if _plain(name) not in features]


def _plain(name: str) -> str:
    # /proc/cpuinfo writes avx512_vnni where compilers write avx512vnni
    return name.replace("_", "").replace(".", "").lower()
