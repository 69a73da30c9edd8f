# SPDX-License-Identifier: Apache-2.0
"""A pack as a wheel, so that ``pip install`` puts it where :mod:`tvmdcn.packs.active` finds it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from tvmdcn.errors import ArtifactError
from tvmdcn.extras import require
from tvmdcn.linking import machine_of
from tvmdcn.packs.active import NAMESPACE
from tvmdcn.packs.manifest import MANIFEST
from tvmdcn.packs.pack import KernelPack

__all__ = ["write_wheel"]

_PLATFORM = "manylinux_2_28"
"""What the runtime libraries need, by the wheels that they come from; the kernels need less."""


def _metadata(pack: KernelPack) -> str:
    manifest = pack.manifest
    tags = ", ".join(dict.fromkeys(kernel.target.tag for kernel in pack.kernels))
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {manifest.name.replace('_', '-')}",
        f"Version: {manifest.version}",
        f"Summary: {len(pack.kernels)} kernels of deformable convolutions, built by tvmdcn for {tags}",
        # What reads the pack. Its own requirements hold the compiler, which a machine that has a pack does not need:
        # pip install --no-deps leaves it away.
        f"Requires-Dist: tvmdcn>={manifest.tvmdcn}",
        "Requires-Python: >=3.10",
    ]
    return "\n".join(lines) + "\n"


def write_wheel(pack: KernelPack, folder: str | os.PathLike[str]) -> Path:
    """Write the wheel of a pack, and return its path.

    Parameters
    ----------
    pack : KernelPack
        What to write; every file of it is checked first.
    folder : path
        Where the wheel goes; it is made if it is not there. A wheel of the same name is replaced.

    Raises
    ------
    MissingExtra
        If the package ``wheel`` is not installed.
    ArtifactError
        If the pack is damaged, or the wheel cannot be written.
    """
    require("pack", "a wheel")
    from wheel.wheelfile import WheelFile

    pack.verify()
    manifest = pack.manifest
    platform = ".".join(
        f"{_PLATFORM}_{arch}" for arch in sorted({machine_of(kernel.target) for kernel in pack.kernels})
    )
    tag = f"py3-none-{platform}"
    file = f"{manifest.name}-{manifest.version}-{tag}.whl"
    information = f"{manifest.name}-{manifest.version}.dist-info"
    tags = "".join(f"Tag: py3-none-{part}\n" for part in platform.split("."))
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tvmdcn-wheel-", dir=place) as staged:
            with WheelFile(Path(staged, file), "w") as archive:
                for name in sorted({*manifest.files, MANIFEST}):
                    archive.write(str(pack.path / name), f"{NAMESPACE}/{manifest.name}/{name}")
                archive.writestr(f"{information}/METADATA", _metadata(pack))
                archive.writestr(
                    f"{information}/WHEEL",
                    f"Wheel-Version: 1.0\nGenerator: tvmdcn {manifest.tvmdcn}\nRoot-Is-Purelib: false\n{tags}",
                )
            os.replace(Path(staged, file), place / file)
    except OSError as error:
        raise ArtifactError(f"{place / file} cannot be written: {error.strerror}.") from error
    return place / file
