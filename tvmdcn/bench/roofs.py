# SPDX-License-Identifier: Apache-2.0
"""What this machine can do at most: how fast it copies memory, and multiplies matrices.

Measured as layers are: each library in a process of its own, held to the same processors, in turns.

Copies are NumPy's, each thread copying a share of its own from one array to another, without the interpreter's lock.
The arrays together are four times the last-level cache (``memory``), or half of it (``cache``), which is copied often
enough that starting the threads does not count. Bytes read and bytes written are counted, lines that the processor
reads because it is about to write them are not.

Products are of square matrices, by the libraries of NumPy, torch and ONNX Runtime; and of small matrices that stay in
the first cache, with the sums in registers, compiled by TVM for the processor at hand: the best that its units for
multiply-adds can do. A library may know the processor badly, so the highest is the roof: 1 thread of Zen 5, float32,
2026-11-22, in GFLOP/s: NumPy 109, torch 95, ONNX Runtime 207, compiled 226.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np

from tvmdcn import threads as thread_pool
from tvmdcn.bench.device import last_level_bytes
from tvmdcn.bench.process import Worker, WorkerError
from tvmdcn.bench.protocol import describe_origin, now
from tvmdcn.bench.provider import Provider
from tvmdcn.bench.roof import LEVELS, Asked, Ready, Roof
from tvmdcn.bench.roofs_cuda import asked_of_gpus
from tvmdcn.bench.statistics import summarize
from tvmdcn.bench.turns import Protocol, Table, Turns, take_turns
from tvmdcn.target import detect_target

__all__ = [
    "DTYPES",
    "Ready",
    "measure_roofs",
    "prepare_cache_copy",
    "prepare_compiled_matmul",
    "prepare_memory_copy",
    "prepare_numpy_matmul",
    "prepare_onnxruntime_matmul",
    "prepare_torch_matmul",
]

DTYPES = ("float32", "float64", "bfloat16", "float16")
_SIZE = 1536  # 7 GFLOP: a few tens of milliseconds on one core, and large enough for every library's blocking
_REPEATED = 64 << 20  # bytes that a call copies in the cache
_DEPTH, _PRODUCTS_PER_CALL = 128, 4000  # of the small matrices: 16 KiB of the first cache, about 2 ms


# Who multiplies in what: a library that has no code of its own for a dtype is no roof.
_PRODUCTS = {
    "numpy": ("float32", "float64"),
    "torch": ("float32", "float64", "bfloat16"),
    "onnxruntime": ("float32", "float64", "float16"),
    "compiled": ("float32", "float64"),
}
_PACKAGES = {"compiled": "tvm"}


def _asked(dtypes: Iterable[str], device: str) -> list[Asked]:
    if device == "cuda":
        return asked_of_gpus(dtypes)

    def provider(name: str, function: str) -> Provider:
        return Provider(name, "peer", f"tvmdcn.bench.roofs:{function}", _PACKAGES.get(name, name))

    found = [Asked("copy", level, None, provider("numpy", f"prepare_{level}_copy")) for level in LEVELS]
    return found + [
        Asked("matmul", None, dtype, provider(name, f"prepare_{name}_matmul"))
        for dtype in dtypes
        for name, known in _PRODUCTS.items()
        if dtype in known
    ]


def measure_roofs(
    threads: Sequence[int] = (1,),
    dtypes: Sequence[str] = DTYPES[:1],
    *,
    device: str = "cpu",
    protocol: Protocol | None = None,
    command: str | None = None,
    run: str | None = None,
    known: Sequence[Roof] = (),
    on_known: Callable[[Roof], object] = lambda row: None,
    on_row: Callable[[Roof], object] | None = None,
    on_step: Callable[[str], object] | None = None,
) -> list[Roof]:
    """Measure how fast this machine copies memory and multiplies matrices.

    Parameters
    ----------
    threads : sequence of int
        Numbers of threads; each is a comparison of its own.
    dtypes : sequence of str
        Of the matrices, some of :data:`DTYPES`; on a GPU also "tf32".
    device : str
        "cpu" or "cuda".
    protocol, command, run, known, on_known, on_row, on_step
        As of :func:`tvmdcn.bench.protocol.compare`.

    Returns
    -------
    list of Roof
        Per number of threads two copies, and per dtype and library that has it a product; failed ones with the reason.
    """
    origin, rows = describe_origin(command, run), []
    same = [row for row in known if (row.machine, row.versions) == (origin["machine"], origin["versions"])]
    have = {(row.threads, row.roof, row.level, row.dtype, row.provider): row for row in same}
    asked = _asked(dtypes, device)
    for count in threads:
        keys = [(count, *roof[:3], roof.provider.name) for roof in asked]
        if all(key in have for key in keys):
            for key in keys:
                on_known(have[key])
            continue
        for row in _measure(asked, count, protocol or Protocol(), origin, on_step or (lambda text: None)):
            rows.append(row)
            if on_row is not None:
                on_row(row)
    return rows


def _measure(
    asked: Sequence[Asked],
    threads: int,
    protocol: Protocol,
    origin: Mapping[str, Any],
    on_step: Callable[[str], object],
) -> Iterator[Roof]:
    table: Table[Asked] = Table()
    described: dict[Asked, dict[str, Any]] = {}
    workers = []
    try:
        for roof in asked:
            on_step(f"roofs, {threads} threads: preparing {roof.roof} by {roof.provider.name}")
            try:
                if not roof.provider.installed:
                    raise WorkerError(f"{roof.provider.package} is not installed: pip install {roof.provider.package}")
                workers.append(Worker(roof.provider, threads))
                answer = workers[-1].ask({"do": "prepare_roof", "dtype": roof.dtype}, protocol.prepare_timeout)
            except (WorkerError, OSError) as error:
                table.failed[roof] = str(error)
            else:
                described[roof] = answer["described"]
                table.active[roof] = [Turns(workers[-1], *protocol.plan(answer["call_ms"]))]

        def begin(index: int) -> bool:
            on_step(f"roofs, {threads} threads: round {index + 1} of {protocol.rounds}")
            return True

        whole = take_turns(asked, table, protocol, begin)
    finally:
        for worker in workers:
            worker.close()
    for roof in asked:
        if roof not in table.failed and not (whole or len(table.active[roof][0].times) > 1):
            continue
        if roof in table.failed:
            result: dict[str, Any] = {"status": "failed", "reason": table.failed[roof], "work": None}
        else:
            result = summarize(table.active[roof][0].times)
        fields = {"size": "", "method": "", **described.get(roof, {}), **result}
        fields["affinity"] = tuple(fields["affinity"]) if fields.get("affinity") else None
        named: dict[str, Any] = {
            "roof": roof.roof,
            "level": roof.level,
            "dtype": roof.dtype,
            "provider": roof.provider.name,
        }
        yield Roof(threads=threads, date=now(), device=roof.provider.device, **named, **origin, **fields)
    if not whole:
        raise KeyboardInterrupt


# --- what the workers time --------------------------------------------------------------------------------------


def prepare_memory_copy(dtype: str | None, threads: int) -> Ready:
    """Prepare a copy from one half to the other half of four times the last-level cache."""
    return _copy(4 * last_level_bytes(), threads)


def prepare_cache_copy(dtype: str | None, threads: int) -> Ready:
    """Prepare copies from one half to the other half of half of the last-level cache."""
    return _copy(last_level_bytes() // 2, threads, _REPEATED)


def _copy(total: int, threads: int, least: int = 0) -> Ready:
    share = total // 2 // threads // 4096 * 4096
    pairs = [(np.ones(share, np.uint8), np.zeros(share, np.uint8)) for _ in range(threads)]
    repeats = max(-(-least // (2 * share * threads)), 1)

    def copy(pair: tuple[np.ndarray, np.ndarray]) -> None:
        for _ in range(repeats):
            np.copyto(pair[1], pair[0])

    pool = ThreadPoolExecutor(threads)

    def call() -> list[tuple[np.ndarray, np.ndarray]]:
        if threads == 1:
            copy(pairs[0])
        else:
            wait([pool.submit(copy, pair) for pair in pairs])
        return pairs

    size = f"{2 * share * threads >> 20} MiB read and written {repeats} times per call"
    return Ready(call, 2 * share * threads * repeats, size, "numpy.copyto by each thread of a share of its own")


def prepare_numpy_matmul(dtype: str, threads: int) -> Ready:
    """Prepare NumPy's product of two square matrices."""
    left, right, out = (np.ones((_SIZE, _SIZE), dtype) for _ in range(3))
    return _product(lambda: np.matmul(left, right, out=out), f"numpy.matmul, numpy {np.__version__}")


def prepare_torch_matmul(dtype: str, threads: int) -> Ready:
    """Prepare torch's product of two square matrices."""
    import torch

    torch.set_num_threads(threads)
    left, right, out = (torch.ones((_SIZE, _SIZE), dtype=getattr(torch, dtype)) for _ in range(3))
    return _product(lambda: torch.mm(left, right, out=out), f"torch.mm, torch {torch.__version__}")


def prepare_onnxruntime_matmul(dtype: str, threads: int) -> Ready:
    """Prepare ONNX Runtime's product of two square matrices, the second constant."""
    import onnxruntime
    from onnx import helper, numpy_helper

    ones = np.ones((_SIZE, _SIZE), dtype)
    kind = helper.np_dtype_to_tensor_dtype(ones.dtype)
    left, product = (helper.make_tensor_value_info(name, kind, ones.shape) for name in ("left", "product"))
    node = helper.make_node("MatMul", ["left", "right"], ["product"])
    graph = helper.make_graph([node], "matmul", [left], [product], [numpy_helper.from_array(ones, "right")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {"left": ones}
    return _product(lambda: session.run(None, feeds), f"MatMul, onnxruntime {onnxruntime.__version__}")


def prepare_compiled_matmul(dtype: str, threads: int) -> Ready:
    """Prepare products of small matrices, many per thread, compiled for this processor."""
    import tvm
    from tvm import te

    target = detect_target()
    lanes = target.vector_bits // 8 // np.dtype(dtype).itemsize
    # Sums, two vectors of the right matrix, and one element of the left one fill the registers.
    rows, columns = (12 if target.vector_registers == 32 else 6), 2 * lanes
    left = te.placeholder((_DEPTH, rows), dtype, "left")
    right = te.placeholder((_DEPTH, columns), dtype, "right")
    depth = te.reduce_axis((0, _DEPTH), "depth")
    shape = (threads, _PRODUCTS_PER_CALL, rows, columns)
    product = te.compute(shape, lambda t, n, i, j: te.sum(left[depth, i] * right[depth, j], depth), "product")
    sch = tvm.s_tir.Schedule(te.create_prim_func([left, right, product]))
    block = sch.get_sblock("product")
    stored = sch.cache_write(block, 0, "local")
    task, index, row, column, deep = sch.get_loops(block)
    outer, inner = sch.split(deep, [None, 4])
    vectors, lane = sch.split(column, [None, lanes])
    sch.reorder(task, index, outer, inner, row, vectors, lane)
    sch.reverse_compute_at(stored, index)
    stored_row, stored_column = sch.get_loops(stored)[-2:]
    stored_vectors, stored_lane = sch.split(stored_column, [None, lanes])
    for loop in (stored_row, stored_vectors, inner, row, vectors):
        sch.unroll(loop)
    for loop in (lane, stored_lane):
        sch.vectorize(loop)
    sch.parallel(task)
    sch.decompose_reduction(block, outer)
    function = tvm.compile(sch.mod, target=target.to_tvm())["main"]
    thread_pool.use_threads(threads)
    arrays = [tvm.runtime.tensor(np.ones(size, dtype)) for size in ((_DEPTH, rows), (_DEPTH, columns), shape)]
    method = f"small matrices in the first cache, compiled by TVM {tvm.__version__} for {target.mcpu}"
    size = f"{rows} x {_DEPTH} x {columns}, {_PRODUCTS_PER_CALL} times per thread"
    work = 2 * threads * _PRODUCTS_PER_CALL * rows * _DEPTH * columns

    def call() -> Any:
        function(*arrays)
        return arrays[-1]

    return Ready(call, work, size, method)


def _product(call: Callable[[], Any], method: str) -> Ready:
    return Ready(call, 2 * _SIZE**3, f"{_SIZE} x {_SIZE} x {_SIZE}", method)
