# SPDX-License-Identifier: Apache-2.0
"""What lets a compiled kernel run its parallel loops on threads that are there already: those of OpenMP.

Code that TVM compiles for a processor starts a parallel loop by a pointer to a function, ``TVMBackendParallelLaunch``
of TVM's runtime. A kernel carries a function of the same kind, which starts the loop on a team of OpenMP; whether it is
used, the runtime decides when it loads the kernel (`tvmdcn.openmp`). The kernel does not depend on OpenMP.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import tvm
from tvm import te

__all__ = ["write_launcher"]

# tvmdcn_openmp: GOMP_parallel, omp_get_thread_num and omp_get_num_threads, set by the runtime.
# A job: the body of the loop, its arguments, whether one of the threads has failed.
# The environment of a body, TVMParallelGroupEnv: a handle for barriers, which our loops have not; how many threads.
_CODE = """
%job = type { ptr, ptr, i32 }
%environment = type { ptr, i32 }

@tvmdcn_openmp = protected global [3 x ptr] zeroinitializer
@tvmdcn_threads = internal thread_local global i32 1

define protected void @tvmdcn_use_threads(i32 %count) {
  store i32 %count, ptr @tvmdcn_threads
  ret void
}

define internal void @tvmdcn_work(ptr %job) {
  %environment = alloca %environment
  %get_number.at = getelementptr [3 x ptr], ptr @tvmdcn_openmp, i32 0, i32 1
  %get_number = load ptr, ptr %get_number.at
  %get_count.at = getelementptr [3 x ptr], ptr @tvmdcn_openmp, i32 0, i32 2
  %get_count = load ptr, ptr %get_count.at
  %number = call i32 %get_number()
  %count = call i32 %get_count()
  store ptr null, ptr %environment
  %count.at = getelementptr %environment, ptr %environment, i32 0, i32 1
  store i32 %count, ptr %count.at
  %body = load ptr, ptr %job
  %arguments.at = getelementptr %job, ptr %job, i32 0, i32 1
  %arguments = load ptr, ptr %arguments.at
  %status = call i32 %body(i32 %number, ptr %environment, ptr %arguments)
  %failed = icmp ne i32 %status, 0
  br i1 %failed, label %failure, label %end
failure:
  %status.at = getelementptr %job, ptr %job, i32 0, i32 2
  store atomic i32 -1, ptr %status.at monotonic, align 4
  br label %end
end:
  ret void
}

define protected i32 @tvmdcn_launch(ptr %body, ptr %arguments, i32 %tasks) {
  %job = alloca %job
  %environment = alloca %environment
  %threads = load i32, ptr @tvmdcn_threads
  %alone = icmp sle i32 %threads, 1
  br i1 %alone, label %one, label %many
one:
  store ptr null, ptr %environment
  %count.at = getelementptr %environment, ptr %environment, i32 0, i32 1
  store i32 1, ptr %count.at
  %status.one = call i32 %body(i32 0, ptr %environment, ptr %arguments)
  ret i32 %status.one
many:
  store ptr %body, ptr %job
  %arguments.at = getelementptr %job, ptr %job, i32 0, i32 1
  store ptr %arguments, ptr %arguments.at
  %status.at = getelementptr %job, ptr %job, i32 0, i32 2
  store i32 0, ptr %status.at
  %parallel = load ptr, ptr @tvmdcn_openmp
  call void %parallel(ptr @tvmdcn_work, ptr %job, i32 %threads, i32 0)
  %status = load i32, ptr %status.at
  ret i32 %status
}
"""


def write_launcher(target: Any, source: Path, path: Path) -> None:
    """Write the functions, compiled for a target, as an object file.

    Parameters
    ----------
    target : tvm.target.Target
        Of kind "llvm".
    source, path : Path
        Where to put the code for LLVM, and the object file.
    """
    # What LLVM wants to know of the target is at the head of any module for it.
    empty = te.compute((1,), lambda i: tvm.tirx.const(0, "int32"), name="nothing")
    function = te.create_prim_func([empty]).with_attr("global_symbol", "nothing")
    compiled = tvm.compile(tvm.IRModule({"nothing": function}), target=target)
    text = str(compiled.mod.inspect_source("ll"))
    layout = re.findall(r"^target (?:datalayout|triple) = .*$", text, re.MULTILINE)
    flag = re.search(r'!\{i32 \d+, !"tvm_target", .*\}$', text, re.MULTILINE)
    if len(layout) != 2 or flag is None:
        raise ValueError("TVM's LLVM module does not say which target it is for.")
    source.write_text("\n".join([*layout, _CODE, f"!llvm.module.flags = !{{!0}}\n!0 = {flag[0]}\n"]))
    tvm.runtime.load_module(str(source)).write_to_file(str(path))
