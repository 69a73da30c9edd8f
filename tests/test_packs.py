# SPDX-License-Identifier: Apache-2.0
"""Packs: what is read of them, what is refused, which kernel is chosen, and who uses it."""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import handmade
import numpy as np
import pytest
from handmade import EXTENTS, SPEC, call, error, kernel_of
from packing import GRADIENTS, OTHER, edit, forget

import tvmdcn
from tvmdcn import native, runtime
from tvmdcn.cache_key import ABI
from tvmdcn.cache_key import SCHEMA as ARTIFACT_SCHEMA
from tvmdcn.cpus import CPUS
from tvmdcn.errors import ArtifactError, ArtifactMissing, SpecError, SpecTypeError
from tvmdcn.packs import active, choice
from tvmdcn.packs.manifest import (
    CUDA_LIBRARY,
    FORMAT,
    LIBRARIES,
    MANIFEST,
    SCHEMA,
    FileRecord,
    PackManifest,
)
from tvmdcn.packs.pack import KernelPack
from tvmdcn.packs.writer import build_pack, installed_runtime
from tvmdcn.reference_grad import expected_gradients
from tvmdcn.target import CpuTarget, CudaTarget, TargetInfo, detect_target, host_features, resolve_target
from tvmdcn.tensors import make_gradient_tensors, make_tensors

X86 = detect_target().arch == "x86_64"
needs_x86 = pytest.mark.skipif(not X86, reason="the levels of x86-64")


def library_of(pack: KernelPack, index: int = 0) -> Path:
    return pack.path / pack.kernels[index].path / "kernel.so"


def computes(kernel) -> bool:
    tensors = make_tensors(kernel.spec, EXTENTS)
    return error(call(kernel, tensors), kernel.spec, tensors) < 1e-6


# --- what is written is read -----------------------------------------------------------------------------


def test_a_pack_has_what_was_asked_for(packer):
    targets = ("x86-64-v2", "neoverse-n1")
    pack = packer(SPEC, OTHER, GRADIENTS, targets=targets, name="my-pack", version="2.0.post1")
    manifest = pack.manifest
    assert (manifest.name, manifest.version) == ("my_pack", "2.0.post1")
    assert [(kernel.spec, kernel.target.tag) for kernel in pack.kernels] == [
        (spec, f"llvm-{target}") for target in targets for spec in (SPEC, OTHER, GRADIENTS)
    ]
    files = {path.relative_to(pack.path).as_posix() for path in pack.path.rglob("*") if path.is_file()}
    assert files == {*manifest.files, MANIFEST}
    assert KernelPack.read(str(pack.path)).manifest == manifest
    assert PackManifest.from_text(manifest.to_text().encode()) == manifest
    assert repr(pack) == f"KernelPack(my_pack 2.0.post1, '{pack.path}', 6 kernels: llvm-x86-64-v2, llvm-neoverse-n1)"


def test_everybody_may_read_and_only_the_owner_write(packer):
    umask = os.umask(0o002)
    try:
        pack = packer()
    finally:
        os.umask(umask)
    modes = {path.stat().st_mode & 0o777 for path in pack.path.rglob("*") if path.is_file()}
    assert modes == {0o644}
    assert {path.stat().st_mode & 0o777 for path in (pack.path, *pack.path.rglob("*")) if path.is_dir()} == {0o755}


def test_loads_and_computes(packer):
    pack = packer(SPEC, GRADIENTS)
    assert computes(pack.load(SPEC))
    assert pack.load(SPEC, threads=2).threads == 2
    tensors = make_gradient_tensors(GRADIENTS, EXTENTS)
    found = pack.load(GRADIENTS).bind(tensors)()
    for name, expected in expected_gradients(GRADIENTS, tensors).items():
        np.testing.assert_allclose(found[name].reshape(expected.shape), expected, atol=1e-4)
    pack.verify()


# --- the manifest is read as a stranger's -------------------------------------------------------------------

KERNEL = "llvm-x86-64-v2/kernel"
RECORD = {"bytes": 1, "sha256": 64 * "0"}


def manifest_data(**changes) -> dict:
    target = resolve_target("x86-64-v2")
    return {
        "format": FORMAT,
        "schema": SCHEMA,
        "abi": ABI,
        "artifact_schema": ARTIFACT_SCHEMA,
        "name": "dcn_pack",
        "version": "1.0",
        "created": "2026-11-22T20:00:00+00:00",
        "versions": {"tvmdcn": "0.1.0", "apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.14.post1"},
        "kernels": [{"path": KERNEL, "spec": SPEC.to_json(), "target": target.to_json()}],
        "runtime": [],
        "files": {f"{KERNEL}/kernel.so": RECORD, f"{KERNEL}/manifest.json": RECORD},
        **changes,
    }


def read(data) -> PackManifest:
    return PackManifest.from_text(json.dumps(data).encode())


def kernels(**changes) -> dict:
    data = manifest_data()
    return {"kernels": [{**data["kernels"][0], **changes}]}


def files(**changes) -> dict:
    return {"files": {**manifest_data()["files"], **changes}}


def test_a_manifest_by_hand_is_read():
    manifest = read(manifest_data())
    assert manifest.kernels[0].spec == SPEC
    assert manifest.files[f"{KERNEL}/kernel.so"] == FileRecord(1, 64 * "0")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "tvmdcn"}, "its field format is not 'tvmdcn pack'"),
        (
            {"schema": 99, "more": 1},
            rf"its schema is 99, and this version of tvmdcn reads packs of schema {SCHEMA}\. Make",
        ),
        ({"schema": True}, "its schema is True"),
        ({"abi": 0}, f"its abi is 0, and this version of tvmdcn reads kernels of interface {ABI}"),
        ({"artifact_schema": "1"}, "its artifact_schema is '1'"),
        ({"more": 1}, "the pack has a field 'more', which is unknown"),
        ({"name": "../up"}, r"the name of a pack must be of the form .*, got '../up'"),
        ({"name": "Pack"}, "the name of a pack"),
        ({"name": 3}, "the field name is 3, not of type str"),
        ({"version": "1; rm"}, r"the version of a pack must be .*, got '1; rm'"),
        ({"created": None}, "the field created is None"),
        ({"created": "\x1b[2J"}, r"its field created is '\\x1b\[2J'"),
        ({"versions": {**manifest_data()["versions"], "apache-tvm": ""}}, "its field apache-tvm is ''"),
        ({"versions": {"tvmdcn": "1"}}, "versions misses the field apache-tvm"),
        ({"kernels": {}}, r"the field kernels is \{\}"),
        ({"kernels": [3]}, "a kernel is not an object"),
        (kernels(more=1), "a kernel has a field 'more'"),
        (kernels(path="../../etc"), "it names a file '../../etc', which could lie outside of the pack"),
        (kernels(path="/etc"), "it names a file '/etc'"),
        (kernels(path="a//b"), "it names a file 'a//b'"),
        (kernels(path="a\\..\\b"), "could lie outside"),
        (kernels(path=".hidden"), "could lie outside"),
        (kernels(path="a/" * 9 + "b"), "could lie outside"),
        (kernels(path="runtime/x"), "where none belongs"),
        (kernels(path="other"), "its list of files misses other/kernel.so"),
        (kernels(spec={}), "a specification in JSON has not the keys it should"),
        (kernels(target={}), "not a target as TargetInfo.to_json writes it"),
        ({"kernels": 2 * manifest_data()["kernels"]}, "it names a kernel twice"),
        ({"runtime": ["mips"]}, "its field runtime is"),
        ({"runtime": [["x86_64"]]}, "its field runtime is"),
        ({"runtime": ["x86_64"]}, "misses runtime/x86_64/libtvm_ffi.so"),
        (files(more=RECORD), "names more, which belongs to nothing in it"),
        (files(**{"../up": RECORD}), "could lie outside"),
        (files(**{"a\nb": RECORD}), "could lie outside"),
        (files(**{f"{KERNEL}/kernel.so": {"bytes": 1}}), "the record of .* misses the field sha256"),
        (files(**{f"{KERNEL}/kernel.so": {"bytes": -1, "sha256": 64 * "0"}}), "impossible size or digest"),
        (files(**{f"{KERNEL}/kernel.so": {"bytes": 1, "sha256": "0"}}), "impossible size or digest"),
        (files(**{f"{KERNEL}/kernel.so": {"bytes": 1.0, "sha256": 64 * "0"}}), "the field bytes is 1.0"),
    ],
)
def test_manifests_are_refused(changes, message):
    with pytest.raises(ArtifactError, match=message):
        read(manifest_data(**changes))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "it is not the JSON of a pack"),
        (b"\xff\xfe\x00", "it is not the JSON of a pack"),
        (b"[]", "its field format is not"),
        (b"[" * 100_000, "it is not the JSON of a pack"),
        (b'{"format": "tvmdcn pack", "format": "tvmdcn pack"}', "a field stands in it twice"),
        (b'{"format": NaN}', "NaN is no number of JSON"),
        (b'{"schema": ' + b"9" * 10_000 + b"}", "it is not the JSON of a pack"),
    ],
)
def test_texts_that_are_no_manifest_are_refused(text, message):
    with pytest.raises(ArtifactError, match=message):
        PackManifest.from_text(text)


def test_mutations_are_refused_or_read():
    """3,000 manifests with something of them changed: each is a manifest, or an ArtifactError, and nothing else."""
    good = json.dumps(manifest_data(), indent=1).encode()
    rng = random.Random(6)
    values = [None, True, -1, 1 << 70, 1.5, "", "../x", "a" * 300, "\ud800", [], {}, [[]], {"a": {}}]
    refused = 0

    def places(data, found):
        for key in data if isinstance(data, dict) else range(len(data)):
            found.append((data, key))
            if isinstance(data[key], (dict, list)):
                places(data[key], found)
        return found

    for number in range(3000):
        if number % 2:
            text = bytearray(good)
            for _ in range(rng.randint(1, 4)):
                at = rng.randrange(len(text))
                text[at : at + rng.choice((0, 1, 1, 9))] = bytes([rng.randrange(256)]) * rng.choice((0, 1, 1, 40))
        else:
            data = json.loads(good)
            holder, key = rng.choice(places(data, []))
            if rng.random() < 0.2:
                del holder[key]
            else:
                holder[key] = rng.choice(values)
            text = json.dumps(data).encode()
        try:
            PackManifest.from_text(bytes(text))
        except ArtifactError:
            refused += 1
    assert refused > 2000


# --- files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kernel.so", MANIFEST])
@pytest.mark.parametrize("damage", ["changed", "longer", "shorter", "missing", "pipe"])
def test_damaged_files_are_refused_before_they_are_loaded(packer, monkeypatch, name, damage):
    pack = packer()
    file = pack.path / pack.kernels[0].path / name
    content = file.read_bytes()
    file.unlink()
    new = {"changed": content[:-1] + bytes([content[-1] ^ 1]), "longer": content + b" ", "shorter": content[:-1]}
    if damage == "pipe":
        os.mkfifo(file)
    elif damage != "missing":
        file.write_bytes(new[damage])
    monkeypatch.setattr(native, "load_module", lambda path: pytest.fail("loaded"))
    fresh = KernelPack.read(pack.path)
    with pytest.raises(ArtifactError, match=r"cannot be read|is not the file|it is damaged|is neither a file"):
        fresh.load(SPEC)
    with pytest.raises(ArtifactError, match=r"cannot be read|Copy the pack here again|is neither a file"):
        fresh.verify()
    tvmdcn.load_pack(pack.path)
    with pytest.raises(ArtifactError):
        kernel_of()


def test_a_whole_kernel_of_another_layer_is_refused(packer):
    pack = packer(SPEC, OTHER)
    one, other = (kernel.path for kernel in pack.kernels)

    def exchange(data):
        for name in ("kernel.so", MANIFEST):
            records = data["files"]
            records[f"{one}/{name}"], records[f"{other}/{name}"] = records[f"{other}/{name}"], records[f"{one}/{name}"]

    edit(pack, exchange)
    (pack.path / one).rename(pack.path / "aside")
    (pack.path / other).rename(pack.path / one)
    (pack.path / "aside").rename(pack.path / other)
    fresh = KernelPack.read(pack.path)
    with pytest.raises(ArtifactError, match="contradicts the manifest of its pack"):
        fresh.load(SPEC)
    with pytest.raises(ArtifactError, match="contradicts"):
        fresh.verify()


@pytest.mark.parametrize("what", [".", "llvm", "kernel.so", MANIFEST])
def test_what_others_can_write_is_refused(packer, what):
    pack = packer()
    kernel = pack.path / pack.kernels[0].path
    path = {".": pack.path, "llvm": kernel.parent, "kernel.so": kernel / "kernel.so", MANIFEST: pack.path / MANIFEST}[
        what
    ]
    path.chmod(path.stat().st_mode | 0o020)
    with pytest.raises(ArtifactError, match=r"can be written by others .*chmod -R go-w"):
        KernelPack.read(pack.path).load(SPEC)
    # Whoever can write among the installed packages needs no kernel to run what he likes.
    assert computes(KernelPack.read(pack.path, installed=True).load(SPEC))


def test_links_lead_to_a_pack_but_not_out_of_it(packer, tmp_path):
    pack = packer()
    (tmp_path / "current").symlink_to(pack.path)
    assert computes(KernelPack.read(tmp_path / "current").load(SPEC))
    library = library_of(pack)
    library.rename(tmp_path / "elsewhere.so")
    library.symlink_to(tmp_path / "elsewhere.so")
    with pytest.raises(ArtifactError, match=r"kernel\.so is a symbolic link.*Copy the pack, without links"):
        KernelPack.read(pack.path).load(SPEC)


def test_the_digest_of_a_pack_may_be_demanded(packer):
    pack = packer()
    assert tvmdcn.load_pack(pack.path, sha256=pack.sha256.upper()).sha256 == pack.sha256
    edit(pack, lambda data: data.update(created="earlier"))
    with pytest.raises(ArtifactError, match=rf"has the digest \w+, not {pack.sha256}, which was asked for"):
        tvmdcn.load_pack(pack.path, sha256=pack.sha256)


def test_a_place_without_a_pack_is_told(no_packs, tmp_path):
    with pytest.raises(ArtifactError, match=r"nowhere holds no pack: No such file"):
        tvmdcn.load_pack(tmp_path / "nowhere")
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(ArtifactError, match="circle holds no pack"):
        tvmdcn.load_pack(tmp_path / "circle")
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(ArtifactError, match="is no pack that can be used: its field format"):
        tvmdcn.load_pack(tmp_path)


# --- the target ------------------------------------------------------------------------------------------------


class Built(NamedTuple):
    target: TargetInfo


def pick(monkeypatch, host: str, *names: str) -> str | None:
    """Return which of these targets is chosen on a processor of a name, with what its name implies."""
    machine = CpuTarget("llvm", host, CPUS[host].arch, CPUS[host].features, 1, 1)
    monkeypatch.setattr(choice, "detect_target", lambda: machine)
    monkeypatch.setattr(choice, "host_features", lambda: machine.features)
    found = choice.best_processor(
        [Built(replace(machine, mcpu=n, arch=CPUS[n].arch, features=CPUS[n].features)) for n in names]
    )
    return found and found.target.mcpu


@pytest.mark.parametrize(
    ("host", "names", "expected"),
    [
        ("znver5", ["x86-64-v3", "znver5", "x86-64-v4"], "znver5"),
        ("znver5", ["x86-64-v3", "x86-64-v4", "neoverse-n1"], "x86-64-v4"),
        ("znver5", ["x86-64-v4", "znver4", "cascadelake"], "znver4"),
        ("cascadelake", ["x86-64-v2", "skylake-avx512", "sapphirerapids"], "skylake-avx512"),
        ("haswell", ["x86-64-v2", "x86-64-v3", "x86-64-v4"], "x86-64-v3"),
        ("haswell", ["znver3", "x86-64-v3"], "znver3"),  # equals: the first
        ("alderlake", ["x86-64-v4", "haswell", "alderlake"], "alderlake"),
        ("nehalem", ["x86-64-v3", "x86-64-v4"], None),
        ("neoverse-v1", ["x86-64-v3", "generic", "neoverse-n1", "neoverse-v2"], "neoverse-n1"),
        ("cortex-a72", ["neoverse-n1", "generic"], "generic"),
        ("cortex-a72", ["neoverse-n1", "x86-64"], None),
        ("x86-64", [], None),
    ],
)
def test_the_best_target_that_runs_is_chosen(monkeypatch, host, names, expected):
    assert pick(monkeypatch, host, *names) == expected


def test_what_a_hypervisor_hides_is_not_relied_on(monkeypatch):
    monkeypatch.setattr(choice, "host_features", lambda: CPUS["x86-64-v3"].features)
    monkeypatch.setattr(choice, "detect_target", lambda: resolve_target("x86-64-v3"))
    built = [Built(resolve_target(name)) for name in ("x86-64-v4", "x86-64-v3", "x86-64-v2")]
    found = choice.best_processor(built)
    assert found is not None
    assert found.target.mcpu == "x86-64-v3"


def test_a_gpu_is_never_taken_for_a_processor(monkeypatch):
    gpu = resolve_target("cuda-sm_90")
    monkeypatch.setattr(CudaTarget, "refusal", lambda self: None)
    assert choice.runs_here(gpu)
    assert choice.best_processor([Built(gpu)]) is None
    assert choice.best_processor([Built(gpu), Built(detect_target())]) == Built(detect_target())
    assert choice.built_for([Built(detect_target()), Built(gpu)], gpu) == Built(gpu)
    assert choice.built_for([Built(gpu)], resolve_target("cuda-sm_80")) is None
    monkeypatch.setattr(CudaTarget, "refusal", lambda self: "needs a GPU")
    assert not choice.runs_here(gpu)


@needs_x86
def test_the_kernel_of_the_widest_vectors_is_loaded(packer):
    pack = packer(targets=("x86-64", "x86-64-v3", "x86-64-v2", "x86-64-v4", "neoverse-n1"))
    levels = ["x86-64-v4", "x86-64-v3", "x86-64-v2", "x86-64"]
    best = next(name for name in levels if CPUS[name].features <= host_features())
    kernel = pack.load(SPEC)
    assert kernel.target.mcpu == best
    assert computes(kernel)
    # A target that is named is that one, not a better one.
    assert pack.load(SPEC, "x86-64").target.mcpu == "x86-64"
    with pytest.raises(ArtifactMissing, match=r"none is for llvm-znver1\. Add the target or the layer"):
        pack.load(SPEC, "znver1")


def test_nothing_that_runs_here_is_a_clear_error(packer, monkeypatch):
    foreign = "neoverse-v2" if X86 else "x86-64-v4"
    pack = packer(targets=(foreign,))
    here = detect_target().tag
    with pytest.raises(
        ArtifactMissing, match=rf"has deform_conv2d c6x2\S* for llvm-{foreign}; this machine, {here}, can run"
    ):
        pack.load(SPEC)
    with pytest.raises(
        ArtifactMissing, match=r"has no deform_conv2d c6x2\S*f64\S*; it has deform_conv2d c6x2\S*\. Add"
    ):
        pack.load(OTHER)
    monkeypatch.setenv("TVMDCN_BUILD", "never")
    monkeypatch.setenv("TVMDCN_PACK", str(pack.path))
    with pytest.raises(
        ArtifactMissing, match=rf"no artifact for .*The pack dcn_pack 1.0 .* for llvm-{foreign}; this machine"
    ):
        kernel_of()


# --- who uses it -------------------------------------------------------------------------------------------------


def packed(kernel) -> str | None:
    """Return the pack that a kernel is from."""
    pack = getattr(kernel.artifact, "pack", None)
    return pack and pack.manifest.name


@pytest.fixture
def two_packs(packer, monkeypatch, tmp_path) -> tuple[KernelPack, KernelPack]:
    """Two packs with the same layer, and a cache without it: a build fails the test."""
    packs = packer(name="one"), packer(SPEC, GRADIENTS, name="two")
    monkeypatch.setenv("TVMDCN_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setattr(handmade, "build", lambda *a, **k: pytest.fail("built"))
    return packs


def test_packs_come_before_the_cache(two_packs, monkeypatch, tmp_path):
    monkeypatch.setenv("TVMDCN_PACK", str(two_packs[0].path))
    kernel = kernel_of()
    assert packed(kernel) == "one"
    assert kernel_of() is kernel
    assert computes(kernel)
    assert not (tmp_path / "empty").exists()


def test_loaded_before_named_and_the_last_first(two_packs, monkeypatch):
    one, two = two_packs
    monkeypatch.setenv("TVMDCN_PACK", os.pathsep.join([str(one.path), str(two.path)]))
    assert packed(kernel_of()) == "one"
    tvmdcn.load_pack(two.path)
    assert packed(kernel_of()) == "two"
    tvmdcn.load_pack(one.path)
    assert [pack.manifest.name for pack in active.active_packs()] == ["one", "two", "one", "two"]
    tvmdcn.load_pack(two.path)
    assert [pack.manifest.name for pack in active._loaded] == ["two", "one"]


def test_functions_and_gradients_use_packs(two_packs, monkeypatch):
    monkeypatch.setenv("TVMDCN_BUILD", "never")
    tvmdcn.load_pack(two_packs[1].path)
    torch = pytest.importorskip("torch")
    tensors = make_tensors(SPEC, EXTENTS)
    names = ("input", "offset", "weight", "bias")
    given = [torch.from_numpy(getattr(tensors, name)).requires_grad_() for name in names]
    mask = torch.from_numpy(tensors.mask).requires_grad_()
    geometry = {"stride": (2, 1), "padding": (1, 0), "dilation": (2, 1)}
    result = tvmdcn.deform_conv2d(*given, **geometry, mask=mask)
    assert error(result.detach().numpy(), SPEC, tensors) < 1e-6
    result.sum().backward()
    ones = {**make_gradient_tensors(SPEC, EXTENTS), "grad_output": np.ones(SPEC.output_shape(EXTENTS), "f")}
    expected = expected_gradients(GRADIENTS, ones)
    for tensor, name in zip([*given, mask], [*names, "mask"], strict=True):
        np.testing.assert_allclose(tensor.grad.numpy(), expected[f"grad_{name}"], atol=1e-4)


def test_what_a_pack_has_not_is_found_elsewhere(packer, monkeypatch):
    pack = packer(OTHER)
    tvmdcn.load_pack(pack.path)
    assert packed(kernel_of()) is None
    assert packed(kernel_of(OTHER)) == "dcn_pack"


def test_what_asks_for_something_else_passes_packs_by(packer, monkeypatch, cache_dir):
    tvmdcn.load_pack(packer().path)
    assert packed(kernel_of(schedule="default")) is None
    assert packed(kernel_of(cache_dir=cache_dir)) is None
    assert packed(kernel_of(target="x86-64-v2")) is None
    assert packed(kernel_of(target=detect_target())) == "dcn_pack"
    monkeypatch.setenv("TVMDCN_BUILD", "rebuild")
    monkeypatch.setattr(runtime, "_loaded", {})
    assert packed(kernel_of()) is None


def test_a_pack_that_is_named_is_never_passed_over(packer, monkeypatch):
    pack = packer()
    monkeypatch.setenv("TVMDCN_PACK", str(pack.path))
    edit(pack, lambda data: data.update(abi=0))
    with pytest.raises(ArtifactError, match="its abi is 0"):
        kernel_of()
    monkeypatch.setenv("TVMDCN_PACK", str(pack.path / "nowhere"))
    with pytest.raises(tvmdcn.SettingError, match="is not a directory"):
        kernel_of()


# --- installed packs ------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(packer, monkeypatch, tmp_path) -> Callable[..., KernelPack]:
    """What packs into a directory of the import path, as a wheel does."""
    root = tmp_path / "site"
    (root / active.NAMESPACE).mkdir(parents=True)
    monkeypatch.syspath_prepend(str(root))

    def install(*specs, name: str = "dcn_pack", **options) -> KernelPack:
        pack = packer(*specs, name=name, **options)
        pack.path.rename(root / active.NAMESPACE / name)
        return KernelPack.read(root / active.NAMESPACE / name, installed=True)

    return install


def test_installed_packs_are_found(installed):
    installed(SPEC, name="one")
    installed(OTHER, name="two")
    assert packed(kernel_of()) == "one"
    assert packed(kernel_of(OTHER)) == "two"


@pytest.mark.parametrize("damage", ["abi", "manifest", "library", "version"])
def test_an_installed_pack_that_cannot_be_used_is_passed_over(installed, monkeypatch, caplog, damage):
    pack = installed()
    path = pack.path / pack.kernels[0].path
    if damage == "abi":
        edit(pack, lambda data: data.update(abi=0))
    elif damage == "version":
        edit(pack, lambda data: data["versions"].update({"apache-tvm": "0.26"}))
    else:
        (path / {"manifest": MANIFEST, "library": "kernel.so"}[damage]).write_bytes(b"{}")
    with caplog.at_level(logging.WARNING):
        kernel = kernel_of()
    assert packed(kernel) is None
    assert computes(kernel)
    assert caplog.text.count("It is passed over.") == 1
    assert kernel_of() is kernel
    assert caplog.text.count("It is passed over.") == 1
    monkeypatch.setenv("TVMDCN_BUILD", "never")
    with pytest.raises(ArtifactMissing, match=r"An installed pack was passed over: \S*(site|kernel)"):
        kernel_of(OTHER)


# --- versions, and what runs kernels ----------------------------------------------------------------------------------


def relabel(pack: KernelPack, monkeypatch, **versions: str) -> None:
    """Make a process look as if it had other versions installed; None is not installed."""
    real = native.installed_version
    monkeypatch.setattr(native, "installed_version", lambda package: versions.get(package, real(package)))


def test_another_version_of_tvm_is_refused(packer, monkeypatch):
    pack = packer()
    relabel(pack, monkeypatch, tvm_ffi="0.1.15")
    message = (
        r"built with apache-tvm-ffi 0\.1\.14\.post1, and apache-tvm-ffi 0\.1\.15 is installed. Install apache-tvm-ffi=="
    )
    with pytest.raises(ArtifactError, match=message):
        pack.load(SPEC)


def test_a_pack_without_a_runtime_needs_it_installed(packer, monkeypatch):
    pack = packer()
    relabel(pack, monkeypatch, tvm=None)
    with pytest.raises(
        ArtifactError, match=r"libtvm_runtime\.so is needed .* carries no runtime for .*tvmdcn pack --runtime"
    ):
        pack.load(SPEC)


def test_packs_of_two_versions_do_not_mix(no_packs):
    checked = []
    first = native.Provided(Path("/one.so"), "1", lambda: checked.append(1))
    native.provide({"tvm_runtime": first})
    native.provide({"tvm_runtime": first._replace(path=Path("/same.so"))})
    with pytest.raises(ArtifactError, match=r"with /\w+\.so of version 1, and /two\.so is of version 2\. Use packs"):
        native.provide({"tvm_runtime": native.Provided(Path("/two.so"), "2", lambda: None)})


def test_a_provided_library_is_checked_before_it_is_used(no_packs, monkeypatch):
    checked = []
    native.provide({"tvm_runtime": native.Provided(Path("/one.so"), "1", lambda: checked.append(1))})
    installed_one = native.library("tvm", "tvm_runtime")
    assert installed_one.is_file()
    assert not checked
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: None)
    assert native.library("tvm", "tvm_runtime") in (Path("/one.so"), Path("/same.so"))
    assert checked == [1]


# --- arguments ------------------------------------------------------------------------------------------------------


def test_arguments_are_checked_before_anything_is_built(packer, monkeypatch, tmp_path):
    monkeypatch.setattr(handmade, "build", lambda *a, **k: pytest.fail("built"))
    with pytest.raises(SpecError, match="the name of a pack must be"):
        packer(name="My Pack")
    with pytest.raises(SpecError, match="the version of a pack must be"):
        packer(version="one")
    with pytest.raises(SpecError, match="target 'z80' is not known"):
        packer(targets=("z80",))
    with pytest.raises(SpecError, match="at least one layer"):
        build_pack((), ("llvm",), tmp_path / "empty")
    with pytest.raises(SpecTypeError, match="target must be a name"):
        packer(targets=(3,))


def test_what_is_no_pack_is_not_replaced(packer, monkeypatch, tmp_path):
    (tmp_path / "dcn_pack").mkdir()
    (tmp_path / "dcn_pack" / "thesis.tex").touch()
    with monkeypatch.context() as patch:
        patch.setattr(handmade, "build", lambda *a, **k: pytest.fail("built"))
        with pytest.raises(ArtifactError, match=r"dcn_pack is there, and is no pack: it is left\. Name another"):
            packer()
    assert (tmp_path / "dcn_pack" / "thesis.tex").exists()
    (tmp_path / "dcn_pack" / "thesis.tex").unlink()
    first = packer()  # an empty directory may be filled
    edit(first, lambda data: data.update(schema=0))
    second = packer(version="2.0")  # and a pack of another version be replaced
    assert second.manifest.version == "2.0"
    (tmp_path / "link").symlink_to(second.path)
    with pytest.raises(ArtifactError, match="link is a symbolic link: it is left"):
        packer(name="link")


@pytest.mark.parametrize("step", ["write", "rename"])
def test_a_full_disk_leaves_the_pack_that_was_there(packer, monkeypatch, tmp_path, step):
    first = packer()

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if step == "write":
            real = Path.write_bytes
            patch.setattr(
                Path, "write_bytes", lambda self, data: full() if ".staging-" in str(self) else real(self, data)
            )
        else:
            patch.setattr(os, "rename", full)
        with pytest.raises(ArtifactError, match="cannot be written: No space left on device"):
            packer(OTHER)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["dcn_pack"]
    assert KernelPack.read(first.path).sha256 == first.sha256
    forget()
    assert [kernel.spec for kernel in packer(OTHER).kernels] == [OTHER]


def test_a_damaged_artifact_is_not_packed(packer, cache_dir):
    artifact = handmade.build(SPEC)
    artifact.library.write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match=r"kernel\.so is damaged\. Delete .*, and pack again"):
        packer()


# --- GPUs: the same pack, other targets -----------------------------------------------------------------------


def test_a_pack_for_gpus_carries_their_runtime_and_leaves_processors_alone(packer, monkeypatch):
    pack = packer(targets=("cuda-sm_80", "cuda-sm_90", "llvm"), runtimes=[installed_runtime()])
    assert [kernel.target.tag for kernel in pack.kernels] == ["cuda-sm_80", "cuda-sm_90", detect_target().tag]
    folder = pack.path / "runtime" / detect_target().arch
    assert {path.name for path in folder.iterdir()} == {*LIBRARIES, CUDA_LIBRARY}
    tvmdcn.load_pack(pack.path)
    assert kernel_of().target == detect_target()
    for gpu in ("cuda-sm_80", "cuda-sm_90"):
        found = active.find(SPEC, gpu)
        assert found is not None
        assert found.target.tag == gpu
    # A GPU runs code of its own compute capability only: there is no next best.
    assert active.find(SPEC, "cuda-sm_86") is None
    monkeypatch.setattr(CudaTarget, "refusal", lambda self: f"needs a GPU of {self.arch}")
    with pytest.raises(ArtifactError, match=r"was built for cuda-sm_90 and needs a GPU of sm_90"):
        pack.load(SPEC, "cuda-sm_90")
    with pytest.raises(ArtifactMissing, match=r"for cuda-sm_80, cuda-sm_90, \S+; none is for cuda-sm_86"):
        pack.load(SPEC, "cuda-sm_86")


def test_a_pack_for_processors_carries_no_runtime_for_gpus(packer):
    pack = packer(runtimes=[installed_runtime()])
    assert pack.manifest.runtime == (detect_target().arch,)
    folder = pack.path / "runtime" / detect_target().arch
    assert {path.name for path in folder.iterdir()} == set(LIBRARIES)
