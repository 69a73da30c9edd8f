# SPDX-License-Identifier: Apache-2.0
"""The packages that only some commands need, and which extra of tvmdcn brings them."""

from __future__ import annotations

from importlib.util import find_spec

from tvmdcn.errors import MissingExtra

__all__ = ["EXTRAS", "explain", "require"]

# Modules by extra. tests/test_cli.py compares the table with pyproject.toml.
EXTRAS = {
    "tune": ("xgboost", "psutil", "cloudpickle"),
    "report": ("altair", "jinja2", "jsonschema", "markupsafe", "pygments", "scipy", "vl_convert"),
    "torch": ("torch",),
    "pack": ("wheel",),
    "bench": ("jsonschema", "onnxruntime", "openvino", "onnx"),
    "onnx": ("onnx", "onnxruntime"),
}

# What the package itself requires: only what was installed with --no-deps, to run packs and build nothing, lacks it.
_REQUIRED = ("tvm", "tvm_ffi", "numpy", "click", "filelock", "platformdirs", "rich")


def _message(purpose: str, modules: list[str], extra: str) -> str:
    return f"{purpose} needs {' and '.join(modules)}, not installed here: pip install 'tvmdcn[{extra}]'"


def require(extra: str, purpose: str, without: tuple[str, ...] = ()) -> None:
    """Check that the packages of an extra can be imported, before anything is begun.

    Parameters
    ----------
    extra : str
        A key of :data:`EXTRAS`.
    purpose : str
        What needs them, for the message.
    without : tuple of str
        Modules of the extra that are not needed this time.

    Raises
    ------
    MissingExtra
        If one is missing; the message names all that are, and the command that installs them.
    """
    missing = [name for name in EXTRAS[extra] if name not in without and find_spec(name) is None]
    if missing:
        raise MissingExtra(_message(purpose, missing, extra), name=missing[0])


def explain(error: ImportError, purpose: str) -> str | None:
    """Return what to install after an import has failed; None if the module belongs to no extra."""
    if isinstance(error, MissingExtra):
        return str(error)
    module = (error.name or "").partition(".")[0]
    if module in _REQUIRED:
        return f"{purpose} needs {module}, not installed here: pip install tvmdcn, without --no-deps"
    extra = next((extra for extra, modules in EXTRAS.items() if module in modules), None)
    return None if extra is None else _message(purpose, [module], extra)
