"""Kernels for NVIDIA GPUs on a machine without one: lowered for CUDA, compiled to SASS.

Lowering needs jaxlib alone. Compiling also needs jax's CUDA plugin, ptxas and libdevice, which the
extra ``kernels`` of pyproject.toml and .ci/run install, but no GPU and no driver: XLA compiles for
a description of an H100. Each compilation runs in a process of its own, because a bad choice of
instructions aborts it.

``python -m tests.cuda_compile`` says whether this machine can compile, and fails where it cannot.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax import export
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from pallas_kernels import dispatch

ROOT = Path(__file__).parent.parent
DEVICE_KIND = "NVIDIA H100 80GB HBM3"
NUM_CORES = 132
# What XLA asks of a device that is not there: a GpuTargetConfigProto, figures of NVIDIA's H100 SXM.
TARGET_CONFIG = f"""
platform_name: "CUDA"
device_description_str: "{DEVICE_KIND}"
dnn_version_info {{ major: 9 minor: 10 }}
gpu_device_info {{
  name: "{DEVICE_KIND}"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  core_count: {NUM_CORES}
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  device_memory_size: 84942979072
  device_address_bits: 64
  memory_bandwidth: 3352320000000
  ecc_enabled: true
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
"""
MOSAIC_CALLS = ("mosaic_gpu", "mosaic_gpu_v2")


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of one kernel: registers a thread, and bytes that it spills to memory."""

    registers: int
    spill_bytes: int
    stack_bytes: int


def mesh_of_gpus(**sizes: int) -> AbstractMesh:
    """H100s that are not there, in a mesh with axes of the given sizes; one GPU without any."""
    device = jax.sharding.AbstractDevice(
        device_kind=DEVICE_KIND, platform="gpu", num_cores=NUM_CORES
    )
    axes = (jax.sharding.AxisType.Auto,) * len(sizes)
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axes, abstract_device=device)


def lower(function: Callable[..., Any], *arguments: Any) -> export.Exported:
    """A function of abstract arrays lowered for an H100, on any machine.

    Args:
        function: jitted or to be jitted; its kernels are in it.
        arguments: trees of ``jax.ShapeDtypeStruct``.
    """
    checks = [export.DisabledSafetyCheck.custom_call(name) for name in MOSAIC_CALLS]
    with jax.sharding.use_abstract_mesh(mesh_of_gpus()):
        jitted = jax.jit(function)
        return export.export(jitted, platforms=["cuda"], disabled_checks=checks)(*arguments)


def compile_to_sass(function: Callable[..., Any], *arguments: Any) -> dict[str, Kernel]:
    """Compiles a function of abstract arrays to machine code for sm_90a.

    Args:
        function, arguments: as for :func:`lower`.

    Returns:
        Registers and spills of its Mosaic kernels, by name.

    Raises:
        RuntimeError: this machine cannot compile (see :func:`problem`), or the kernel does not;
            the end of what the compiler said is in the message.
    """
    reason = problem()
    if reason:
        raise RuntimeError(reason)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "exported"
        file.write_bytes(lower(function, *arguments).serialize())
        done = run_child("tests.cuda_compile", str(file))
    said = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"compilation ended with {done.returncode}:\n{said[-4000:]}")
    kernels = dict(_kernels(said))
    if not kernels:
        raise RuntimeError(f"no kernel was compiled:\n{said[-4000:]}")
    return kernels


@functools.cache
def problem() -> str | None:
    """Why this machine cannot compile for a GPU; None where it can."""
    old = dispatch.version_problem()
    if old:
        return old
    for module in ("jax_plugins.xla_cuda13", "jax_cuda13_plugin"):
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return f"compiling for CUDA needs {module}: install the extra `kernels`"
    if _toolkit() is None:
        return "compiling for CUDA needs ptxas and libdevice: install the extra `kernels`"
    return None


@functools.cache
def _toolkit() -> Path | None:
    """The folder with bin/ptxas and nvvm/libdevice: of the wheels, or of a CUDA toolkit."""
    folders = [Path(entry) / "nvidia" / "cu13" for entry in sys.path]
    ptxas = shutil.which("ptxas")
    if ptxas:
        folders.append(Path(ptxas).resolve().parent.parent)
    folders.append(Path("/usr/local/cuda"))
    for folder in folders:
        libdevice = folder / "nvvm" / "libdevice" / "libdevice.10.bc"
        if (folder / "bin" / "ptxas").exists() and libdevice.exists():
            return folder
    return None


def ptxas_version() -> str:
    """Of the assembler that :func:`compile_to_sass` uses."""
    command = [f"{_toolkit()}/bin/ptxas", "--version"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    found = re.search(r"V(\d+(\.\d+)+)", said)
    return found[1] if found else said


def run_child(
    module: str, *arguments: str, flags: str = "", timeout_s: float = 120
) -> subprocess.CompletedProcess[str]:
    """``python -m module arguments`` where XLA finds the toolkit, with more flags of XLA."""
    toolkit = _toolkit()
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",  # no look for a driver
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "XLA_FLAGS": f"--xla_gpu_cuda_data_dir={toolkit} {flags}",
        "CUDA_ROOT": str(toolkit),
        "PATH": f"{toolkit}/bin{os.pathsep}{os.environ.get('PATH', '')}",
    }
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def said_by_child(module: str, *arguments: str, flags: str = "", timeout_s: float = 1800) -> str:
    """The last line that :func:`run_child` printed.

    Raises:
        RuntimeError: this machine cannot compile, or the program does not.
    """
    reason = problem()
    if reason:
        raise RuntimeError(reason)
    done = run_child(module, *arguments, flags=flags, timeout_s=timeout_s)
    if done.returncode:
        raise RuntimeError(f"compilation ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return done.stdout.splitlines()[-1]


def topology(count: int) -> list[jax.Device]:
    """H100s that are not there, to compile for."""
    from jax.experimental import topologies

    found = topologies.get_topology_desc(
        platform="cuda", target_config=TARGET_CONFIG, topology=f"1x1x{count}"
    )
    return list(found.devices)


def _compile(file: Path) -> None:
    """The child's work."""
    mesh = jax.sharding.Mesh(topology(1), ("x",))
    exported = export.deserialize(bytearray(file.read_bytes()))
    sharding = NamedSharding(mesh, PartitionSpec())
    arguments = [
        jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding)
        for aval in exported.in_avals
    ]
    args, kwargs = jax.tree.unflatten(exported.in_tree, arguments)
    jax.jit(exported.call).lower(*args, **kwargs).compile()


def _kernels(said: str) -> Iterator[tuple[str, Kernel]]:
    """Kernels in what ``ptxas -v`` says."""
    pattern = re.compile(
        r"Function properties for (?P<name>\S+)\s*\n?.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
        r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
        re.DOTALL,
    )
    for found in pattern.finditer(said):
        spills = int(found["stores"]) + int(found["loads"])
        yield found["name"], Kernel(int(found["registers"]), spills, int(found["stack"]))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        _compile(Path(sys.argv[1]))
    else:
        sys.exit(problem())
