# SPDX-License-Identifier: Apache-2.0
"""Two schedules side by side: from any two names, what their code does and uses, and what differs."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
from fake_artifacts import INTERFACE, build_fake

from tvmdcn.builder import build
from tvmdcn.cache_key import source_digest
from tvmdcn.errors import ArtifactError, RecordsError, SpecError, TvmdcnError
from tvmdcn.report import schedules
from tvmdcn.report.machine_code import MachineCode, disassemble
from tvmdcn.report.schedule_sources import SchedulePair, ScheduleView, named_pair, view_of
from tvmdcn.report.schedules import section
from tvmdcn.report.side_by_side import compare_texts
from tvmdcn.space import Decisions
from tvmdcn.spec import DeformConv2dSpec
from tvmdcn.target import detect_target
from tvmdcn.tuning.history import TrialLog, TrialRow

LAYER = "1,24,8,9,32"
HOSTILE = '<img src=x onerror="alert(1)">'


@pytest.fixture(autouse=True)
def _own_cache(cache_dir: Path) -> None:
    pass


# --- machine code ------------------------------------------------------------------------------------------

X86 = """
	.globl	kernel_compute_
kernel_compute_:                        # @kernel_compute_
	pushq	%rbp
	vmovss	.LCPI0_0(%rip), %xmm1           # xmm1 = [1.0E+0]
.LBB0_1:                                # the outer loop
	xorl	%eax, %eax
	.p2align	4
.LBB0_2:
	vbroadcastss	-4(%r9,%rax,4), %zmm27
	vmovaps	-64(%rsi), %zmm25
	vfmadd231ps	%zmm25, %zmm27, %zmm14
	vfmadd231ps	8(%rsi){1to16}, %zmm27, %zmm2
	vmovups	%zmm3, 64(%rsp)                 # 64-byte Spill
	addq	$16, %rax
	cmpq	$2048, %rax
	jne	.LBB0_2
	decq	%rcx
	jne	.LBB0_1
.LBB0_4:
	vmulps	%ymm1, %ymm2, %ymm3
	vmovups	%ymm3, (%rdi)
	addq	$32, %rdi
	jmp	.LBB0_4
	retq
pack_weight_compute_:
.LBB1_1:
	vaddss	(%rdi), %xmm1, %xmm1
	jne	.LBB1_1
"""

ARM = """
kernel_compute_:
.LBB0_2:                                // %for
	ldr	s11, [x19, #4608]
	ldr	q9, [x8], #16
	fmla	v0.4s, v9.4s, v11.s[0]
	fmla	v7.4s, v10.4s, v11.s[0]
	str	q7, [sp, #32]                   // 16-byte Folded Spill
	subs	x9, x9, #1
	b.ne	.LBB0_2
	ret
"""


def test_the_loop_that_computes_most_is_found_and_counted() -> None:
    code = MachineCode.of_assembly(X86).only("kernel")
    first, second = code.innermost_loops()
    assert first.lines == [
        ".L0:",
        "vbroadcastss -4(%r9,%rax,4), %zmm27",
        "vmovaps -64(%rsi), %zmm25",
        "vfmadd231ps %zmm25, %zmm27, %zmm14",
        "vfmadd231ps 8(%rsi){1to16}, %zmm27, %zmm2",
        "vmovups %zmm3, 64(%rsp)",
        "add $16, %rax",
        "cmp $2048, %rax",
        "jne .L0",
    ]
    assert first.uses == {
        "instructions": 8,
        "fused multiply-adds": 2,
        "loads": 3,
        "broadcasts": 2,
        "stores": 1,
        "loads and stores of spilled values": 1,
        "vector registers": 5,
    }
    assert (first.writes, second.writes) == (False, True), "a spill is no result"
    assert second.uses["stores"] == 1
    assert code.uses == {
        "instructions": 18,
        "512-bit vector instructions": 5,
        "256-bit vector instructions": 2,
        "128-bit vector instructions": 0,
        "fused multiply-adds": 2,
    }


def test_code_for_arm_is_read_too() -> None:
    (loop,) = MachineCode.of_assembly(ARM).innermost_loops()
    assert loop.lines[1:3] == ["ldr s11, [x19, #4608]", "ldr q9, [x8], #16"]
    assert loop.lines[-1] == "b.ne .L0"
    assert loop.uses["fused multiply-adds"] == 2
    assert (loop.uses["loads"], loop.uses["stores"]) == (2, 1)
    assert loop.uses["loads and stores of spilled values"] == 1
    assert loop.uses["vector registers"] == 5


def test_a_loop_that_writes_results_is_not_the_hottest() -> None:
    text = """
f:
.LBB0_1:
	vfmadd231ps	%ymm1, %ymm2, %ymm3
	jne	.LBB0_1
.LBB0_2:
	vfmadd231ps	%ymm1, %ymm2, %ymm3
	vfmadd231ps	%ymm1, %ymm2, %ymm4
	vmovups	%ymm3, (%rdi)
	jne	.LBB0_2
"""
    first, second = MachineCode.of_assembly(text).innermost_loops()
    assert (first.work, second.work) == (512, 1024)


def test_code_without_loops_or_functions() -> None:
    assert MachineCode.of_assembly("").innermost_loops() == []
    assert MachineCode.of_disassembly("").functions == {}
    assert MachineCode.of_assembly("f:\n\tretq\n").innermost_loops() == []
    other = MachineCode.of_assembly("f:\n\tretq\n")
    assert other.only("kernel") == other, "nothing bears the name: all of it"


def test_a_disassembler_and_llvm_agree(tmp_path: Path) -> None:
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    artifact = build(DeformConv2dSpec(24, 32, padding=1), schedule="default")
    found = disassemble(artifact.library).only("deform_conv2d").innermost_loops()[0]
    made = view_of(f"{LAYER}:default")
    loops = [loop.split("\n", 1)[1].strip() for loop in made.texts["inner loops"].split("# innermost loop")[1:]]
    assert "\n".join(found.lines) == loops[0]
    assert made.resources["inner loop: instructions"] == len(found.instructions)


def test_what_cannot_be_disassembled_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernel.so").write_bytes(b"not a library")
    with pytest.raises(ArtifactError, match=r"kernel\.so cannot be disassembled: .*Install binutils or LLVM"):
        disassemble(tmp_path / "kernel.so")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ArtifactError, match="objdump is not installed; llvm-objdump is not installed"):
        disassemble(tmp_path / "kernel.so")


# --- texts -------------------------------------------------------------------------------------------------


def rows_of(table: str) -> list[tuple[str, str, str, str]]:
    """Return the cells of each row, without markup."""
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", table, re.S)
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.S) for row in rows]
    return [tuple(html.unescape(re.sub("<[^>]+>", "", cell)) for cell in row) for row in cells if len(row) == 4]


def test_texts_stand_line_beside_line() -> None:
    found = compare_texts("a = 1\nb = 2\nc = 3\nd = 4", "a = 1\nb = 5\nd = 4\ne = 6", "python")
    assert rows_of(found.html) == [
        ("1", "a = 1", "1", "a = 1"),
        ("2", "b = 2", "2", "b = 5"),
        ("3", "c = 3", "", ""),
        ("4", "d = 4", "3", "d = 4"),
        ("", "", "4", "e = 6"),
    ]
    assert (found.changed, found.lines, found.left_out) == (4, (4, 4), 0)
    marked = [html.unescape(re.sub("<[^>]+>", "", text)) for text in re.findall("<mark>(.*?)</mark>", found.html)]
    assert marked == ["2", "5", "c = 3", "e = 6"], "of lines beside each other only the words that differ"


def test_names_that_mean_nothing_do_not_count() -> None:
    def sense(line: str) -> str:
        return re.sub(r"\d+", "", line)

    found = compare_texts("x1 = f(x2)\ny = 0", "x7 = f(x2)\ny = z", "python", sense)
    assert found.changed == 2
    assert found.html.count('class="differs"') == 1
    assert re.findall("<mark>(.*?)</mark>", rows_html(found.html)[0]), "they are marked all the same"


def rows_html(table: str) -> list[str]:
    return re.findall(r"<tr[^>]*>.*?</tr>", table, re.S)


def test_what_is_alike_is_folded_and_kept() -> None:
    lines = [f"line {number}" for number in range(40)]
    other = [*lines[:20], "another", *lines[21:]]
    found = compare_texts("\n".join(lines), "\n".join(other), "text")
    assert re.findall(r">(\d+) lines alike<", found.html) == ["17", "16"]
    assert len(rows_of(found.html)) == 40
    assert [row[0] for row in rows_of(found.html)] == [str(number) for number in range(1, 41)]
    assert found.html.count("<tbody") == found.html.count("</tbody>")
    same = compare_texts("a\nb", "a\nb", "text")
    assert (same.changed, same.html.count("differs")) == (0, 0)


def test_texts_of_one_side_and_none() -> None:
    one = compare_texts("a\nb", "", "text")
    assert (one.lines, one.changed) == ((2, 0), 2)
    assert compare_texts("", "", "no such language").html == ""
    assert compare_texts("a", "b", "no such language").changed == 2


def test_texts_are_escaped_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    found = compare_texts(HOSTILE, HOSTILE + "\n'" + HOSTILE, "python")
    assert "<img" not in found.html
    monkeypatch.setattr("tvmdcn.report.side_by_side._MOST_LINES", 3)
    long = compare_texts("a\n" * 10, "b\n" * 5, "text")
    assert (long.lines, long.left_out) == ((10, 5), 9)


# --- names -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def layers() -> tuple[ScheduleView, ScheduleView]:
    """The default schedule of a layer, and the plainest."""
    return view_of(f"{LAYER}:default"), view_of(f"{LAYER}:naive")


def test_a_layer_is_scheduled_and_compiled(layers: tuple[ScheduleView, ScheduleView]) -> None:
    default, naive = layers
    assert default.facts["target"] == detect_target().tag
    assert set(default.texts) == {"trace", "TIR", "inner loops"}
    assert "T.prim_func" in default.texts["TIR"]
    assert "sch.compute_at" in default.texts["trace"]
    assert default.decisions["variant"].startswith("full-")
    assert int(default.decisions["register_pixels"]) > 1
    assert naive.decisions == {}
    assert "trace" not in naive.texts
    # Sums of a register tile: as many multiply-adds per turn as pixels times vectors, at least.
    tile = int(default.decisions["register_pixels"]) * int(default.decisions["variant"].split("-")[1])
    assert default.resources["inner loop: fused multiply-adds"] >= tile
    assert default.resources["inner loop: loads and stores of spilled values"] == 0


def test_any_target_that_llvm_knows() -> None:
    view = view_of("depthwise@apple-m4:default")
    assert view.facts["target"] == "llvm-apple-m4"
    assert re.search(r"fmla\.4s|v\d+\.4s", view.texts["inner loops"])


def test_gradients_have_a_name() -> None:
    view = view_of("depthwise backward:naive")
    assert view.facts["layer"] == "depthwise backward"
    assert "deform_conv2d_grad" in view.texts["TIR"]


def test_without_a_record_the_default_is_shown(tmp_path: Path) -> None:
    view = view_of("depthwise", tmp_path)
    assert view.facts["schedule"] == "default, for lack of a record"


def test_a_trial_of_a_log(tmp_path: Path) -> None:
    spec = DeformConv2dSpec(24, 24, groups=24, padding=1)
    header = {"name": "a_layer", "spec": spec.to_json(), "target": detect_target().tag, "threads": 1}
    path = tmp_path / "a.jsonl"
    log = TrialLog(path, {**header, "source": source_digest()})
    log.add(TrialRow(Decisions("depthwise", {"register_blocks": 1, "tile_units": 2}), 2e-3, "", 1.0))
    log.add(TrialRow(Decisions("depthwise", {"register_blocks": 1, "tile_units": 4}), None, "crash: x", 2.0))
    left, right = (view_of(f"{path}#{number}") for number in (0, 1))
    assert left.decisions == {"variant": "depthwise", "register_blocks": "1", "tile_units": "2"}
    assert (left.facts["schedule"], left.notes) == ("trial 0: 2 ms in the tuning", ())
    assert right.facts["schedule"] == "trial 1: failed: crash: x"
    old = TrialLog(tmp_path / "old.jsonl", {**header, "source": "earlier"})
    old.add(TrialRow(Decisions("depthwise", {}), 2e-3, "", 1.0))
    assert "has changed since the tuning" in view_of(f"{tmp_path / 'old.jsonl'}#0").notes[0]
    for name in ("#2", "#-1", "#x", "#"):
        with pytest.raises(RecordsError, match="has the trials 0 to 1"):
            view_of(f"{path}{name}")


def test_an_artifact_of_any_version(tmp_path: Path) -> None:
    artifact = build(DeformConv2dSpec(24, 24, groups=24, padding=1), schedule="default")
    whole = view_of(str(artifact.path))
    assert whole.facts["folder"] == artifact.path.name
    assert whole.facts["target"] == detect_target().tag
    assert whole.decisions["variant"] == "depthwise"
    assert view_of(str(artifact.path / "manifest.json")).title == whole.title
    if shutil.which("objdump"):
        assert whole.resources["inner loop: fused multiply-adds"] > 0
    data = json.loads((artifact.path / "manifest.json").read_text())
    data["schema"], data["a_field_of_later"] = 99, 1
    (artifact.path / "manifest.json").write_text(json.dumps(data))
    later = view_of(str(artifact.path))
    assert (later.decisions, later.texts) == (whole.decisions, whole.texts)


def test_an_artifact_for_a_gpu_shows_what_it_carries(tmp_path: Path) -> None:
    device = {
        "cuda": "__global__ void main_kernel() {}",
        "sass": "FFMA R1, R2, R3, R4;",
        "compiler": "nvcc 13.0",
        "kernels": {"main_kernel": {"registers": 74, "spill_loads": 0, "occupancy": 0.5, "instructions": {"HMMA": 64}}},
        "unknown": ["of", "another", "kind"],
    }

    def make(directory: Path) -> Any:
        (directory / "kernel.so").write_bytes(b"not a library")
        return INTERFACE, {"source": "default", "tir": "@T.prim_func", "device": device}

    artifact = build_fake("default", make=make)
    view = view_of(str(artifact.path))
    assert set(view.texts) == {"TIR", "CUDA source", "SASS"}
    assert view.resources == {
        "compiler": "nvcc 13.0",
        "main_kernel: registers": 74,
        "main_kernel: spill loads": 0,
        "main_kernel: occupancy": 0.5,
        "main_kernel: instructions: HMMA": 64,
    }
    assert view.notes == ()
    (artifact.path / "kernel.ptx").write_text(".visible .entry")
    assert view_of(str(artifact.path)).texts["PTX"] == ".visible .entry"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nonsense", "is no folder with a manifest.json, no FILE.jsonl#N, and no layer"),
        (f"{LAYER}:fastest", "behind the colon must be one of tuned, default, naive"),
        (f"{LAYER}@z80", "target 'z80' is not known"),
        (".", "is a file or folder without manifest.json: name an artifact's folder"),
        ("nowhere.jsonl#0", "cannot be read"),
        ("", "and no layer"),
    ],
)
def test_names_that_are_none_say_what_is_one(name: str, message: str) -> None:
    with pytest.raises(TvmdcnError, match=re.escape(message)):
        view_of(name)


def test_a_manifest_that_is_none(tmp_path: Path) -> None:
    for text in ("", "{", "[]", "7", '{"key": 5, "target": [], "schedule": "x"}'):
        (tmp_path / "manifest.json").write_text(text)
        if text in ("", "{"):
            with pytest.raises(RecordsError, match=r"manifest\.json cannot be read"):
                view_of(str(tmp_path))
        else:
            view = view_of(str(tmp_path))
            assert view.decisions == {}
            assert "Without generated code" in view.notes[0]


def test_a_pair_of_two_names(layers: tuple[ScheduleView, ScheduleView]) -> None:
    pair = named_pair("depthwise:naive", "depthwise@apple-m4:naive")
    assert pair.title == "depthwise"
    assert [view.facts["target"] for view in (pair.left, pair.right)] == [detect_target().tag, "llvm-apple-m4"]
    artifact = build_fake("default")
    same = named_pair(str(artifact.path), str(artifact.path))
    assert same.left.title.endswith(f"({str(artifact.path)[-60:]})")
    with pytest.raises(SpecError):
        named_pair("depthwise:naive", "nonsense")


# --- the section -------------------------------------------------------------------------------------------


def unpacked(text: str) -> dict[str, str]:
    (data,) = re.findall(r'<script type="application/json" id="schedules-texts">(.*?)</script>', text, re.S)
    return {anchor: zlib.decompress(base64.b64decode(packed)).decode() for anchor, packed in json.loads(data).items()}


def test_section_holds_both_and_marks_what_differs(layers: tuple[ScheduleView, ScheduleView]) -> None:
    found = section([SchedulePair("a layer", *layers)])
    assert found is not None
    texts = unpacked(found.html)
    assert set(re.findall(r'data-text="(.*?)"', found.html)) == set(texts)
    assert len(texts) == 3
    headings = re.findall(r"<summary>(.*?):", found.html)
    assert headings == ["Inner loops", "Scheduled TIR", "Trace"]
    assert "only one side has it" in found.html, "the plainest schedule has no trace"
    tir = next(text for text in texts.values() if "prim_func" in text)
    assert 'class="differs"' in tir
    differing = re.findall(r'<tr class="differs"><th class="name" scope="row">(.*?)</th>', found.html)
    assert {"schedule", "variant", "inner loop: fused multiply-adds"} <= set(differing)
    assert not {"layer", "target"} & set(differing)
    rows = {(row["table"], row["name"]): row for row in found.numbers[0].records()}
    uses = rows["Resources", "inner loop: fused multiply-adds"]
    assert uses["left_value"] == layers[0].resources["inner loop: fused multiply-adds"]
    assert "| variant |" in found.markdown
    assert "DecompressionStream" in found.script


def test_names_and_notes_are_escaped() -> None:
    view = ScheduleView(HOSTILE, {HOSTILE: HOSTILE}, {HOSTILE: HOSTILE}, {"TIR": HOSTILE}, {HOSTILE: 1}, (HOSTILE,))
    found = section([SchedulePair(HOSTILE, view, ScheduleView("</script>"))])
    assert found is not None
    assert "<img" not in found.html
    assert "<img" not in found.markdown
    assert all("<img" not in text for text in unpacked(found.html).values())
    assert found.html.count("<script") == 1


def test_too_many_texts_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "_MOST_BYTES", 10)
    left, right = ScheduleView("a", texts={"TIR": "a = 1"}), ScheduleView("b", texts={"TIR": "b = 2"})
    found = section([SchedulePair(f"pair {number}", left, right) for number in range(3)])
    assert found is not None
    assert len(unpacked(found.html)) == 1
    assert found.html.count("would make the page too large") == 2
    assert section([]) is None


def test_a_schedule_for_a_gpu_is_compiled_where_there_is_a_compiler() -> None:
    view = view_of("depthwise@cuda-sm_90:default")
    assert view.facts["target"] == "cuda-sm_90"
    assert {"trace", "TIR"} <= set(view.texts)
    if view.notes:
        assert "Without generated code" in view.notes[0]
        pytest.skip(view.notes[0][:200])
    assert "__global__" in view.texts["CUDA source"]
    assert any(name.endswith(": registers") for name in view.resources)
