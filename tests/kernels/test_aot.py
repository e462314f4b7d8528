"""Every Triton kernel must compile for Hopper and Blackwell; no GPU is needed for that.

The compiler runs in a process of its own, because kernels imported under ``TRITON_INTERPRET=1`` cannot compile.
"""

from __future__ import annotations

import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import outrider.kernels

ARCHITECTURES = (90, 100)
MODULES = sorted(module.name for module in pkgutil.iter_modules(outrider.kernels.__path__))

COMPILE = r"""
import importlib, io, json, re, sys
from contextlib import redirect_stdout
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

compiled = []
for name in sys.argv[2:]:
    module = importlib.import_module("outrider.kernels." + name)
    specs = [(json.loads(sys.argv[1]), spec) for spec in getattr(module, "AOT_SPECS", ())]
    specs += [([90], spec) for spec in getattr(module, "HOPPER_AOT_SPECS", ())]
    specs += [([100, 120], spec) for spec in getattr(module, "BLACKWELL_AOT_SPECS", ())]
    for architectures, spec in specs:
        kernel, signature, constants = spec[:3]
        options = spec[3] if len(spec) > 3 else {}
        signature = {argument: signature.get(argument, "constexpr") for argument in kernel.arg_names}
        source_type = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
        aligned = spec[4] if len(spec) > 4 else ()
        attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
        source = source_type(kernel, signature, constants, attributes)
        for arch in architectures:
            with triton.knobs.compilation.scope(), redirect_stdout(io.StringIO()) as log:
                triton.knobs.compilation.always_compile = source_type is GluonASTSource  # for the assembler's log
                binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
            fp4 = re.findall(r"(?:tcgen05\.mma|mma\.sync)\S*mxf4nvf4\S*block_scale", binary.asm["ptx"])
            size, shared = len(binary.asm["cubin"]), binary.metadata.shared
            complaints = len(re.findall(r"\(C75\d\d\)|[1-9]\d* bytes spill", log.getvalue()))
            fixed = [p.name for p in kernel.params if not p.is_constexpr and not p.do_not_specialize]
            compiled.append([name, kernel.__name__, arch, size, shared, len(fp4), fixed, complaints])
print(json.dumps(compiled))
"""


@pytest.fixture(scope="module")
def compiled() -> list[list]:
    """``[module, kernel, architecture, bytes of machine code, shared memory, FP4 products, specialised arguments,
    complaints of the assembler about a Gluon kernel]``."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DUMP_PTXAS_LOG": "1"}
    command = [sys.executable, "-W", "ignore", "-c", COMPILE, json.dumps(ARCHITECTURES), *MODULES]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_every_kernel_compiles_for_each_architecture(compiled):
    """Guards: code that only the interpreter accepts, and kernels that Blackwell's compiler refuses."""
    assert {row[2] for row in compiled} == {*ARCHITECTURES, 120}
    assert all(row[3] > 1000 for row in compiled)


def test_shared_memory_fits_a_multiprocessor(compiled):
    """Guards: tile tables that compile and then fail to launch."""
    kib = {90: 227, 100: 227, 120: 99}
    assert not [row for row in compiled if row[4] > kib[row[2]] * 1024]


def test_four_bit_products_use_fp4_tensor_cores(compiled):
    """Guards: shapes for which the compiler turns e2m1 into bf16 products; data center and workstation Blackwell."""
    products = [row for row in compiled if row[1] == "_w4a4_kernel"]
    assert {row[2] for row in products} == {100, 120} and all(row[5] > 0 for row in products)


def test_no_product_waits_for_the_one_before(compiled):
    """Guards: code after which the assembler runs wgmma one at a time (C7510 and on), and registers in memory."""
    products = [row for row in compiled if row[1] in ("_stream_kernel", "_fp8_stream_kernel")]
    assert len({row[1] for row in products}) == 2 and not [row for row in products if row[7]]


def test_every_jit_kernel_is_listed(compiled):
    """Guards: a new kernel that nobody ever compiles before it meets a GPU."""
    listed = {kernel for _, kernel, *_ in compiled}
    definition = re.compile(r"@(?:triton|gluon)\.jit[^\n]*\ndef (_\w+_kernel)\(")
    folder = Path(outrider.kernels.__path__[0])
    defined = {
        name for module in MODULES for name in definition.findall((folder / f"{module}.py").read_text())
    }
    assert len(defined) > 5 and defined <= listed


def test_no_kernel_is_compiled_anew_for_another_batch(compiled):
    """Guards: a number of the step whose value 1, or a multiple of 16, means a compilation in front of a request."""
    of_a_step = {"num_rows", "num_tokens", "num_decodes", "num_prefills", "num_splits", "table_stride"}
    at_load = {"_repack_kernel", "_unpack_kernel", "_nvfp4_to_fp8_kernel"}  # rows of weights, not of a batch
    found = {(row[1], name) for row in compiled for name in row[6] if name in of_a_step}
    assert not {pair for pair in found if pair[0] not in at_load}
