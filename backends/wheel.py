"""A wheel of a finished package, reproducible byte for byte."""

from __future__ import annotations

import base64
import hashlib
import shutil
import zipfile
from pathlib import Path
from typing import Any

_TIME = (1980, 1, 1, 0, 0, 0)


def write_wheel(package: Path, manifest: dict[str, Any], name: str) -> Path:
    """`NAME-VERSION-py3-none-PLATFORM.whl` beside the package; written aside, then renamed."""
    version = manifest["llmc_version"]
    machine = manifest["target"]["machine"]
    glibc = manifest["requires"]["glibc"].replace(".", "_")
    tag = f"py3-none-manylinux_{glibc}_{machine}"
    info = f"{name}-{version}.dist-info"
    path = package.parent / f"{name}-{version}-{tag}.whl"
    scratch = path.with_suffix(".tmp")
    requires = "".join(f"Requires-Dist: {p}\n" for p in manifest["requires"]["packages"])
    metadata = (
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Python: {manifest['requires']['python']}\n"
        f"{requires}Summary: A language model compiled by llmc\n"
    )
    wheel = f"Wheel-Version: 1.0\nGenerator: llmc {version}\nRoot-Is-Purelib: false\nTag: {tag}\n"
    record = []
    try:
        with zipfile.ZipFile(scratch, "w") as archive:
            for file in sorted(p for p in package.rglob("*") if p.is_file()):
                member = f"{name}/{file.relative_to(package).as_posix()}"
                digest, size = hashlib.sha256(), 0
                with file.open("rb") as source, archive.open(_entry(member), "w", force_zip64=True) as target:
                    while part := source.read(1 << 20):
                        target.write(part)
                        digest.update(part)
                        size += len(part)
                record.append((member, digest.digest(), size))
            for member, text in ((f"{info}/METADATA", metadata), (f"{info}/WHEEL", wheel)):
                archive.writestr(_entry(member), text)
                record.append((member, hashlib.sha256(text.encode()).digest(), len(text.encode())))
            rows = [f"{m},sha256={base64.urlsafe_b64encode(d).rstrip(b'=').decode()},{n}\n" for m, d, n in record]
            archive.writestr(_entry(f"{info}/RECORD"), "".join(rows) + f"{info}/RECORD,,\n")
        shutil.move(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    return path


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _TIME)
    entry.external_attr = 0o644 << 16
    return entry
