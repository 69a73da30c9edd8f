# SPDX-License-Identifier: Apache-2.0
"""Targets: processors are recognised as LLVM does, without LLVM, and never for more than they can."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from fake_cuda import pretend_gpus

from tvmdcn import cuda_driver, host_cpu, target
from tvmdcn.cpus import CPUS, X86_LEVELS, name_x86
from tvmdcn.errors import DeviceError, SpecError, SpecTypeError
from tvmdcn.gpus import GPUS
from tvmdcn.target import TargetInfo, detect_target, host_features, host_identity, resolve_target

V4 = "sse4_2 avx avx2 fma f16c bmi2 avx512f avx512bw avx512cd avx512dq avx512vl"
ICE = f"{V4} avx512_vnni avx512vbmi avx512_vbmi2 avx512ifma avx512_bitalg avx512_vpopcntdq"
V3 = "sse4_2 avx avx2 fma f16c bmi2"
# /proc/cpuinfo: vendor, family, model, flags -> LLVM's name
X86_MACHINES = [
    ("GenuineIntel", 6, 0x3F, V3, "haswell"),
    ("GenuineIntel", 6, 0x9E, V3, "skylake"),
    ("GenuineIntel", 6, 0x55, V4, "skylake-avx512"),
    ("GenuineIntel", 6, 0x55, f"{V4} avx512_vnni", "cascadelake"),
    ("GenuineIntel", 6, 0x55, f"{V4} avx512_vnni avx512_bf16", "cooperlake"),
    ("GenuineIntel", 6, 0x6A, ICE, "icelake-server"),
    ("GenuineIntel", 6, 0x8F, f"{ICE} avx512_bf16 avx512_fp16 avx_vnni", "sapphirerapids"),
    ("GenuineIntel", 6, 0x97, f"{V3} avx_vnni", "alderlake"),
    ("AuthenticAMD", 0x17, 0x01, V3, "znver1"),
    ("AuthenticAMD", 0x17, 0x31, V3, "znver2"),
    ("AuthenticAMD", 0x19, 0x01, V3, "znver3"),
    ("AuthenticAMD", 0x19, 0x11, f"{ICE} avx512_bf16", "znver4"),
    ("AuthenticAMD", 0x1A, 0x02, f"{ICE} avx512_bf16 avx_vnni", "znver5"),
    # what a hypervisor hides must not be used
    ("GenuineIntel", 6, 0x6A, V4, "x86-64-v4"),
    ("GenuineIntel", 6, 0x6A, V3, "x86-64-v3"),
    ("AuthenticAMD", 0x19, 0x11, V3, "x86-64-v3"),
    ("GenuineIntel", 6, 0x3F, "sse4_2", "x86-64-v2"),
    # unknown ones
    ("GenuineIntel", 6, 0xFE, ICE, "x86-64-v4"),
    ("GenuineIntel", 19, 1, V3, "x86-64-v3"),
    ("AuthenticAMD", 0x1B, 1, V4, "x86-64-v4"),
    ("CentaurHauls", 7, 0x3B, V3, "x86-64-v3"),
    ("", -1, -1, "", "x86-64"),
]
ARM_MACHINES = [
    ("0x41", "0xd0c", "fp asimd asimdhp asimddp", "neoverse-n1"),
    ("0x41", "0xd08", "fp asimd", "cortex-a72"),
    ("0x41", "0xd40", "fp asimd asimdhp asimddp bf16 i8mm sve", "neoverse-v1"),
    ("0x41", "0xd40", "fp asimd asimdhp asimddp", "generic"),
    ("0x61", "0x022", "fp asimd asimdhp asimddp", "generic"),
]


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Pretend to be another machine: its /proc/cpuinfo, architecture and caches."""
    detect_target.cache_clear()
    monkeypatch.setattr(sys, "platform", "linux")

    def become(arch: str, cpuinfo: str | None, caches: dict[str, dict[str, str]] | None = None) -> TargetInfo:
        file = tmp_path / "cpuinfo"
        if cpuinfo is not None:
            file.write_text(cpuinfo)
        monkeypatch.setattr(host_cpu, "_CPUINFO", file)
        monkeypatch.setattr(host_cpu, "_SYSTEM", tmp_path / "cpu")
        monkeypatch.setattr(host_cpu.platform, "machine", lambda: arch)
        for module in (host_cpu, target):
            monkeypatch.setattr(module, "available_processors", lambda: [0, 1])
        for index, fields in (caches or {}).items():
            folder = tmp_path / "cpu" / "cpu1" / "cache" / index
            folder.mkdir(parents=True)
            for name, value in fields.items():
                (folder / name).write_text(value + "\n")
        detect_target.cache_clear()
        return detect_target()

    yield become
    detect_target.cache_clear()


def x86_cpuinfo(vendor: str, family: int, model: int, flags: str) -> str:
    return "\n\n".join(
        f"processor\t: {number}\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: {model}\nflags\t\t: {flags}"
        for number in range(2)
    )


@pytest.mark.parametrize(("vendor", "family", "model", "flags", "name"), X86_MACHINES)
def test_x86_machines_are_recognised(machine, vendor, family, model, flags, name):
    info = machine("x86_64", x86_cpuinfo(vendor, family, model, flags))
    assert info.mcpu == name
    assert info.features <= host_features()


@pytest.mark.parametrize(("implementer", "part", "features", "name"), ARM_MACHINES)
def test_arm_machines_are_recognised(machine, implementer, part, features, name):
    cpuinfo = f"processor : 0\nFeatures : {features}\nCPU implementer : {implementer}\nCPU part : {part}\n"
    info = machine("aarch64", cpuinfo)
    assert (info.mcpu, info.arch) == (name, "aarch64")
    assert (info.vector_bits, info.vector_registers) == (128, 32)


def test_arm_with_big_and_little_cores(machine):
    little = "processor : 0\nFeatures : fp asimd asimdhp asimddp\nCPU implementer : 0x41\nCPU part : 0xd05"
    big = "processor : 1\nFeatures : fp asimd asimdhp asimddp\nCPU implementer : 0x41\nCPU part : 0xd0b"
    assert machine("aarch64", f"{little}\n\n{big}").mcpu == "cortex-a76"


def test_machine_that_says_nothing(machine):
    info = machine("x86_64", None)
    assert info.mcpu == "x86-64-v2"
    assert (info.l1d_bytes, info.l2_bytes, info.l3_bytes) == (32 << 10, 256 << 10, 0)


def test_other_architectures_are_refused(machine):
    with pytest.raises(SpecError, match="riscv64; kernels exist for x86_64 and aarch64"):
        machine("riscv64", None)


def test_caches_of_one_core(machine):
    caches = {
        "index0": {"type": "Data", "level": "1", "size": "48K", "shared_cpu_list": "0-1"},
        "index1": {"type": "Instruction", "level": "1", "size": "32K", "shared_cpu_list": "0-1"},
        # four cores of two threads each share the second level
        "index2": {"type": "Unified", "level": "2", "size": "4096K", "shared_cpu_list": "0-3,8-11"},
        "index3": {"type": "Unified", "level": "3", "size": "32M", "shared_cpu_list": "0-15"},
        "index4": {"type": "Unified", "level": "4", "size": "none", "shared_cpu_list": "0"},
    }
    info = machine("x86_64", x86_cpuinfo("GenuineIntel", 6, 0x97, f"{V3} avx_vnni"), caches)
    assert (info.l1d_bytes, info.l2_bytes, info.l3_bytes) == (48 << 10, 1 << 20, 32 << 20)


@pytest.mark.parametrize(
    ("name", "bits", "registers"),
    [
        ("cascadelake", 512, 32),
        ("znver4", 512, 32),
        ("x86-64-v3", 256, 16),
        ("znver3", 256, 16),
        ("x86-64-v2", 128, 16),
        ("neoverse-n1", 128, 32),
    ],
)
def test_vectors(name, bits, registers):
    info = resolve_target(name)
    assert (info.vector_bits, info.vector_registers) == (bits, registers)


def test_levels_are_ordered():
    levels = [CPUS[name].features for name in X86_LEVELS]
    assert all(lower < higher for higher, lower in itertools.pairwise(levels))


def test_a_name_never_promises_more_than_the_machine_has():
    for vendor, family, models in (("GenuineIntel", 6, range(256)), ("AuthenticAMD", 0x19, range(256))):
        for model in models:
            for level in X86_LEVELS:
                features = CPUS[level].features
                assert CPUS[name_x86(vendor, family, model, features)].features <= features


def test_host_is_what_llvm_says():
    """LLVM names this machine as we do, or we name it after a level because features are hidden."""
    pytest.importorskip("tvm")
    code = "import tvm; print(tvm.get_global_func('target.llvm_get_system_cpu')())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    ours, llvm = detect_target().mcpu, done.stdout.split()[-1]
    assert ours == llvm or (ours in X86_LEVELS and not CPUS[llvm].features <= host_features())


def test_features_are_what_llvm_says():
    """Every name exists in the pinned LLVM, and implies the features of the table, and no other of them."""
    pytest.importorskip("tvm")
    code = """
import json, sys, tvm
names = json.load(sys.stdin)
found = {}
for name, arch in names.items():
    config = {"kind": "llvm", "mcpu": name, "mtriple": arch + "-linux-gnu"}
    valid = tvm.get_global_func("target.llvm_is_valid_cpu")(name, arch + "-linux-gnu")
    features = tvm.get_global_func("target.llvm_get_cpu_features")(tvm.target.Target(config))
    found[name] = [bool(valid), [str(feature) for feature in features]]
print(json.dumps(found))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps({name: cpu.arch for name, cpu in CPUS.items()}),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    known = frozenset().union(*(cpu.features for cpu in CPUS.values()))
    for name, (valid, features) in json.loads(done.stdout.splitlines()[-1]).items():
        assert valid, name
        assert frozenset(features) & known == CPUS[name].features, name


def test_resolve():
    host = detect_target()
    assert resolve_target() == resolve_target("llvm") == resolve_target(host.tag) == resolve_target(host.mcpu) == host
    assert resolve_target("llvm-cascadelake") == resolve_target("cascadelake")
    assert resolve_target("llvm-cascadelake").tag == "llvm-cascadelake"
    assert resolve_target("llvm-aarch64").tag == "llvm-aarch64"
    assert resolve_target(host) is host


def test_resolve_follows_the_setting(monkeypatch):
    monkeypatch.setenv("TVMDCN_TARGET", "llvm-x86-64-v3")
    assert resolve_target().tag == "llvm-x86-64-v3"
    assert resolve_target("llvm") == detect_target()


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("znver55", "not known. Did you mean znver5"),
        ("llvm-cascade-lake", "Did you mean cascadelake"),
        ("", "Use 'llvm' for this machine, or one of: x86-64"),
        ("llvm -mcpu=skylake", "not known"),
        ("cuda-sm_91", "'cuda-sm_91' is not known. Use 'cuda' for this machine's GPU .* cuda-sm_90, "),
        ("sm_90a", "not known"),
        ("cuda:", "not known"),
        ("cuda:-1", "not known"),
    ],
)
def test_unknown_targets_are_refused(name, match):
    with pytest.raises(SpecError, match=match):
        resolve_target(name)


def test_target_of_another_type_is_refused():
    with pytest.raises(SpecTypeError, match="target must be a name or a TargetInfo, got 3 of type int"):
        resolve_target(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llvm", *CPUS, *GPUS])
def test_json_round_trip(name):
    info = resolve_target(name)
    assert TargetInfo.from_json(json.loads(json.dumps(info.to_json()))) == info


@pytest.mark.parametrize(
    "change",
    [{"mcpu": 3}, {"features": "avx2"}, {"features": [1]}, {"cores": -1}, {"cores": True}, {"more": 1}],
)
def test_json_is_read_strictly(change):
    with pytest.raises(SpecError, match="not a target"):
        TargetInfo.from_json({**detect_target().to_json(), **change})


@pytest.mark.parametrize(
    "change", [{"kind": "metal"}, {"kind": 3}, {"mcpu": "znver5"}, {"registers": 0.5}, {"multiprocessors": -1}]
)
def test_json_of_a_gpu_is_read_strictly(change):
    with pytest.raises(SpecError, match="not a target"):
        TargetInfo.from_json({**resolve_target("cuda-sm_90").to_json(), **change})


def test_gpus_by_name(monkeypatch):
    monkeypatch.setattr(cuda_driver, "_LIBRARY", "libnone.so.1")
    info = resolve_target("cuda-sm_90")
    assert info == resolve_target("sm_90")
    assert info.tag == "cuda-sm_90"
    assert info.tag == TargetInfo.tag_of(info.identity())
    assert info.identity() == {"kind": "cuda", "arch": "sm_90", "host": detect_target().arch}
    assert (info.multiprocessors, info.shared_block_bytes, info.vector_bits) == (132, 232448, 128)
    assert "cp.async" in info.features
    assert "cp.async" not in resolve_target("sm_75").features
    monkeypatch.setenv("TVMDCN_TARGET", "cuda-sm_80")
    assert resolve_target().tag == "cuda-sm_80"


def test_without_a_driver(monkeypatch):
    monkeypatch.setattr(cuda_driver, "_LIBRARY", "libnone.so.1")
    cuda_driver._driver.cache_clear()
    assert cuda_driver.device_count() == 0
    with pytest.raises(DeviceError, match=r"has no NVIDIA driver .* name the one to build for: 'cuda-sm_90'"):
        resolve_target("cuda")
    refusal = resolve_target("cuda-sm_90").refusal()
    assert refusal.startswith("needs an NVIDIA GPU of compute capability sm_90: this machine has no NVIDIA driver")
    assert "gpus" not in host_identity()


def test_gpus_of_this_machine(monkeypatch, tmp_path):
    with pretend_gpus(tmp_path, monkeypatch, ["NVIDIA H200", "NVIDIA L4", "Tesla K80"]):
        first, second = resolve_target("cuda"), resolve_target("cuda:1")
        assert first == resolve_target("cuda:0") == resolve_target("cuda-sm_90")
        assert first.l2_bytes == 62914560
        assert (second.tag, second.multiprocessors) == ("cuda-sm_89", 58)
        assert resolve_target("sm_89") == second
        assert resolve_target("sm_80").multiprocessors == GPUS["sm_80"].multiprocessors
        assert first.refusal() is None
        assert second.refusal() is None
        assert "sm_80, and this machine has NVIDIA H200 (sm_90), NVIDIA L4 (sm_89)" in resolve_target("sm_80").refusal()
        with pytest.raises(DeviceError, match=r"cuda:2 is a Tesla K80 of compute capability sm_37; kernels exist for"):
            resolve_target("cuda:2")
        with pytest.raises(DeviceError, match=r"cuda:3 does not exist: this process may use 3 GPUs"):
            resolve_target("cuda:3")
        identity = host_identity()
        assert identity["gpus"][1] == {"name": "NVIDIA L4", "arch": "sm_89", "memory_bytes": 2 << 36}
        assert identity["versions"]["cuda driver"] == "13.1"
    with (
        pretend_gpus(tmp_path, monkeypatch, []),
        pytest.raises(DeviceError, match=r"finds no GPU .*CUDA_ERROR_NO_DEVICE, 100.* CUDA_VISIBLE_DEVICES"),
    ):
        resolve_target("cuda")


def test_identity_of_the_host():
    identity = host_identity()
    assert json.loads(json.dumps(identity)) == identity
    assert identity["target"] == detect_target().to_json()
    assert identity["versions"]["python"]


def test_to_tvm():
    pytest.importorskip("tvm")
    code = (
        "from tvmdcn.target import resolve_target as r;"
        "t, a, g = r('llvm').to_tvm(), r('neoverse-n1').to_tvm(), r('cuda-sm_86').to_tvm();"
        "print(t.attrs['mcpu'], a.attrs['mcpu'], a.attrs['mtriple'], g.attrs['arch'], g.host.attrs['mcpu'],"
        "g.attrs['max_shared_memory_per_block'])"
    )
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    generic = {"x86_64": "x86-64", "aarch64": "generic"}[detect_target().arch]
    expected = [detect_target().mcpu, "neoverse-n1", "aarch64-linux-gnu", "sm_86", generic, str(99 << 10)]
    assert done.stdout.split() == expected, done.stderr
