# SPDX-License-Identifier: Apache-2.0
"""One command for a machine with an NVIDIA GPU and no network: test, tune, benchmark, and bring the results back.

    python scripts/gpu_session.py --output out --minutes 9 [--carried bundle] [--earlier out/gpu-session.tar.gz]

It goes through the parts below, the most valuable first, for so many minutes, and can be run again to go on: a part
that was cut short continues where it was. Everything it learns is packed into ``gpu-session.tar.gz`` of the output
folder after each part: tuning records (copy ``tuning_logs/cuda-sm_90`` into the repository), rows of benchmarks, logs,
and the generated sources. ``--dry-run``, without a GPU, compiles candidates instead of measuring them, and lists
what would be run.

What was carried (``--carried``): wheels, and TVM as ``tvm_rest.tar.xz`` with ``compiler.xz``; unpacked into a folder
of this machine that the parts import from.
"""

from __future__ import annotations

import json
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
PACKED = "gpu-session.tar.gz"
STATE = "state.json"
OURS = ("ours-cuda-tuned", "ours-cuda-default")
PEERS = ("torchvision-cuda", "cudnn-conv2d-channels-last", "cudnn-conv2d-nchw")
# dtype of the problems, whether tf32
KINDS = {"float16": ("float16", False), "tf32": ("float32", True), "float32": ("float32", False)}
# Two sizes that detectors see at 800 x 1344: the third and the fourth stage.
DETECTORS = {"det_c4": "1,256,50,84,256", "det_c3": "1,128,100,168,128", "det_c3_batch2": "2,128,100,168,128"}


@dataclass(frozen=True)
class Part:
    """A part of a session.

    Parameters
    ----------
    name : str
    command : sequence of str
        Behind the interpreter; "{work}" is the folder of results, "{seconds}" the time there is.
    share : float
        Of the time that is left, at most.
    needs_gpu : bool
    """

    name: str
    command: Sequence[str]
    share: float = 1.0
    needs_gpu: bool = True


def parts(target: str, trials: int) -> list[Part]:
    """Return the parts, the most valuable first."""

    def tune(kind: str, share: float, operator: str = "deform_conv2d") -> Part:
        words = ["-m", "tvmdcn", "tune", "--file", f"{{work}}/problems-{kind}.json", "--target", target]
        words += ["--operator", operator]
        words += ["--trials", str(trials), "--time-budget", "{seconds}", "--output", "{work}/tuning_logs"]
        return Part(f"tune-{'' if operator == 'deform_conv2d' else 'gradients-'}{kind}", words, share)

    def benchmark(kind: str, file: str, providers: Sequence[str], *more: str, name: str, share: float = 1.0) -> Part:
        words = ["-m", "tvmdcn", "benchmark", "--problem-file", f"{{work}}/{file}-{kind}.json", "--resume", *more]
        words += ["--output", f"{{work}}/rows-{kind}.jsonl", "--time-budget", "{seconds}", "--cache", "both"]
        for provider in providers:
            words += ["--provider", provider]
        return Part(f"{name}-{kind}", words, share)

    everyone = (*OURS, *PEERS)
    backward = ("--direction", "backward", "--batch", "1,8")
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_cuda_gpu.py", "--junitxml={work}/tests.xml"]
    values = "(layers and float16 or stream or graph or memory) and not gradients"
    return [
        Part("machine", ["scripts/gpu_session.py", "--describe", "{work}/machine.json"]),
        Part("tests-values", [*tests, "-k", values], 0.4),
        benchmark("float16", "first", everyone, "--roofs", name="first-look", share=0.3),
        tune("float16", 0.7),
        benchmark("float16", "problems", everyone, "--batch", "1,8", name="benchmark"),
        Part("tests-gradients", [*tests, "-k", "gradients and not tf32 and not float64"], 0.4),
        tune("float16", 0.6, "deform_conv2d_grad"),
        benchmark("float16", "problems", everyone, *backward, name="backward"),
        tune("tf32", 0.7),
        benchmark("tf32", "problems", everyone, "--batch", "1,8", "--roofs", name="benchmark"),
        Part("tests", [*tests, "-k", "not sanitizer"]),
        benchmark("float32", "problems", everyone, "--batch", "8", "--roofs", name="benchmark"),
        tune("float32", 0.6, "deform_conv2d_grad"),
        benchmark("float32", "problems", everyone, *backward, name="backward"),
        Part("tests-sanitizer", [*tests, "-k", "sanitizer"]),
    ]


def write_problems(work: Path) -> None:
    """Write the lists of layers, in each kind of numbers, channels last."""
    from dataclasses import replace

    from tvmdcn.problems import PROBLEMS, parse_problem, problem_text

    chosen = {**PROBLEMS, **{name: parse_problem(text) for name, text in DETECTORS.items()}}
    for kind, (dtype, tf32) in KINDS.items():
        items = [
            {
                "name": f"{name}_{kind}",
                "problem": problem_text(replace(problem.spec, dtype=dtype, tf32=tf32, layout="NHWC"), problem.extents),
            }
            for name, problem in chosen.items()
        ]
        (work / f"problems-{kind}.json").write_text(json.dumps(items, indent=1))
        few = [item for item in items if item["name"].removesuffix(f"_{kind}") in ("r50_c3", "r50_c4", "det_c4")]
        (work / f"first-{kind}.json").write_text(json.dumps(few, indent=1))


def describe(path: Path) -> None:
    """Write what machine this is."""
    from tvmdcn.cuda_libraries import find_tool
    from tvmdcn.target import host_identity, resolve_target

    tools = {name: str(find_tool(name)) for name in ("nvcc", "nvdisasm", "compute-sanitizer")}
    found = {"host": host_identity(), "target": resolve_target("cuda").to_json(), "tools": tools}
    try:
        smi = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=60, check=False).stdout
    except OSError as error:
        smi = str(error)
    path.write_text(json.dumps({**found, "nvidia-smi": smi.splitlines()}, indent=1))
    click.echo(json.dumps(found["target"]))


def unpack_carried(carried: Path, site: Path) -> None:
    """Unpack wheels and TVM, once."""
    if (site / ".done").is_file():
        return
    site.mkdir(parents=True, exist_ok=True)
    for wheel in sorted(carried.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    rest, compiler = carried / "tvm_rest.tar.xz", carried / "compiler.xz"
    if rest.is_file():
        with tarfile.open(rest) as archive:
            archive.extractall(site, filter="data")
    if compiler.is_file():
        with lzma.open(compiler) as packed, (site / "tvm" / "lib" / "libtvm_compiler.so").open("wb") as file:
            shutil.copyfileobj(packed, file, 1 << 22)
    (site / ".done").touch()


def keep_sources(work: Path, cache: Path) -> None:
    """Write the generated sources of the cache's kernels, with what the compiler said of them."""
    folder = work / "sources"
    for manifest in sorted(cache.glob("v*/cuda-*/*/manifest.json")):
        device = json.loads(manifest.read_text())["schedule"].get("device")
        if device:
            folder.mkdir(exist_ok=True)
            (folder / f"{manifest.parent.name}.cu").write_text(device["cuda"])
            text = json.dumps(device["kernels"], indent=1, sort_keys=True)
            (folder / f"{manifest.parent.name}.json").write_text(text)


def pack(work: Path, cache: Path, output: Path) -> None:
    """Pack the results, at no time leaving half a file."""
    keep_sources(work, cache)
    part = output / f"{PACKED}.part"
    with tarfile.open(part, "w:gz") as archive:
        archive.add(work, ".")
    part.replace(output / PACKED)


class Session:
    """The state of a session: what is done, and the folder of results."""

    def __init__(self, output: Path, scratch: Path, earlier: Path | None) -> None:
        self.output, self.work = output, scratch / "work"
        self.cache = scratch / "cache"
        output.mkdir(parents=True, exist_ok=True)
        self.work.mkdir(parents=True, exist_ok=True)
        self.cache.mkdir(mode=0o700, exist_ok=True)
        if earlier is not None and not (self.work / STATE).is_file():
            with tarfile.open(earlier) as archive:
                archive.extractall(self.work, filter="data")
        (self.work / "tuning_logs").mkdir(exist_ok=True)
        state = self.work / STATE
        self.done: dict[str, str] = json.loads(state.read_text()) if state.is_file() else {}

    def note(self, name: str, status: str) -> None:
        """Remember how a part ended."""
        self.done[name] = status
        (self.work / STATE).write_text(json.dumps(self.done, indent=1))

    def run(self, part: Part, seconds: float, environment: dict[str, str]) -> str:
        """Run a part; return "done", "cut short", or "failed" with the exit status."""
        budget = max(seconds * part.share, 20.0)
        # A command that ends by itself needs some time for that.
        words = [word.format(work=self.work, seconds=f"{max(budget - 30, 10):.0f}") for word in part.command]
        log, begin = self.work / f"{part.name}.log", time.monotonic()
        click.echo(f"== {part.name}: {budget:.0f} s: {' '.join(words)}")
        with log.open("ab") as file:
            file.write(f"\n== {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(words)}\n".encode())
            file.flush()
            process = subprocess.Popen(
                [sys.executable, *words], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
            )
            try:
                status = process.wait(budget)
            except subprocess.TimeoutExpired:
                process.terminate()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                return "cut short"
        click.echo("\n".join(log.read_text(errors="replace").splitlines()[-12:]))
        # A tuning or benchmark that has used its time may have more to do.
        bounded, used = "--time-budget" in part.command, time.monotonic() - begin
        if status == 0 and bounded and used > 0.7 * (budget - 30):
            return "cut short"
        return "done" if status == 0 else f"failed ({status})"


def dry_run(session: Session, target: str, trials: int, limit: int) -> None:
    """Compile candidates of the first layers, and list what would be run."""
    listed = parts(target, trials)
    for part in listed:
        click.echo(f"{part.name}: {' '.join(part.command)}")
    items = json.loads((session.work / "first-float16.json").read_text())[:limit]
    words = ["-m", "tvmdcn", "tune", "--dry-run", "--operator", "all", "--target", target, "--trials", "2"]
    for item in items:
        words += ["--problem", item["problem"]]
    words += ["--rows", str(session.work / "dry-run.jsonl")]
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), default=Path("gpu-session"))
@click.option("--minutes", type=click.FloatRange(0.2), default=9.0, show_default=True, help="After which it ends.")
@click.option("--carried", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Wheels, and TVM.")
@click.option("--earlier", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Results to go on from.")
@click.option("--scratch", type=click.Path(path_type=Path, file_okay=False), default=Path("/tmp/tvmdcn-gpu-session"))
@click.option("--target", default="cuda", show_default=True, help="The GPU; with --dry-run a name such as cuda-sm_90.")
@click.option("--trials", type=click.IntRange(1), default=1500, show_default=True, help="Of a tuning, of all layers.")
@click.option("--only", multiple=True, help="Run these parts, by name, whatever is done.")
@click.option("--dry-run", "dry", is_flag=True, help="Without a GPU: compile candidates, list the parts.")
@click.option("--describe", "machine", type=click.Path(path_type=Path), hidden=True)
def main(
    output: Path,
    minutes: float,
    carried: Path | None,
    earlier: Path | None,
    scratch: Path,
    target: str,
    trials: int,
    only: tuple[str, ...],
    dry: bool,
    machine: Path | None,
) -> None:
    """Test, tune and benchmark on a machine with an NVIDIA GPU and no network."""
    end = time.monotonic() + 60 * minutes
    if machine is not None:
        describe(machine)
        return
    environment = dict(os.environ)
    if carried is not None:
        site = scratch / "site"
        unpack_carried(carried, site)
        path = [str(site), str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(path)
        sys.path[:0] = [str(site)]
    sys.path.insert(0, str(ROOT))
    session = Session(output, scratch, earlier)
    environment["TVMDCN_CACHE_DIR"] = str(session.cache)
    environment["TVMDCN_RECORDS"] = str(session.work / "tuning_logs")
    write_problems(session.work)
    try:
        if dry:
            dry_run(session, "cuda-sm_90" if target == "cuda" else target, trials, 1)
            return
        for part in parts(target, trials):
            left = end - time.monotonic() - 10
            if (only and part.name not in only) or (not only and session.done.get(part.name) == "done"):
                continue
            if left < 30:
                break
            status = session.run(part, left, environment)
            click.echo(f"== {part.name}: {status}")
            session.note(part.name, status)
            pack(session.work, session.cache, output)
    finally:
        pack(session.work, session.cache, output)
        click.echo(f"results: {output / PACKED}; {json.dumps(session.done)}")


if __name__ == "__main__":
    main()
