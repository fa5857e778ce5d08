"""What holds for every test: no network, and eight emulated CPU devices.

Both are set before anything imports jax or transformers. The devices cost nothing measurable:
arrays without a sharding live on the first one, and start-up, compile and run times are those
of a single device.
"""

import os
from importlib.metadata import version
from pathlib import Path

import pytest

_FLAGS = ["--xla_force_host_platform_device_count=8"]
# Most of the suite's time goes into compiling small programs, which is quicker like this; later
# versions do not know the flag, and end where they are told it.
if tuple(map(int, version("jax").split(".")[:2])) < (0, 11):
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
for flag in _FLAGS:
    if flag.partition("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


# Linux gives a process 65,530 memory mappings unless it is told otherwise, a compiled program has
# dozens to hundreds of them, and XLA dies without a word where there are no more.
_MAPPINGS = 10_000


@pytest.fixture(autouse=True, scope="module")
def few_mappings():
    """Programs of earlier files are let go before they are too many for one process."""
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > _MAPPINGS:
        import jax

        from dspark_jax.engine.executables import forget_programs

        forget_programs(1.0)
        jax.clear_caches()


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    """A directory in the place of the user's cache. Compiled programs are not kept at all: that
    setting of jax would outlive the test."""
    directory = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("dspark_jax.model.cache_directory", lambda: directory)
    monkeypatch.setattr("dspark_jax.model.use_compilation_cache", lambda: None)
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny target and its drafter on disk, as arguments of a command."""
    from tests.tiny_model import write_drafter, write_target

    folder = tmp_path_factory.mktemp("models")
    target, drafter = write_target(folder / "target"), write_drafter(folder / "drafter")
    return ["--target", str(target), "--drafter", str(drafter)]


@pytest.fixture(scope="session")
def emulated_devices():
    """The devices that sharding tests build their meshes from."""
    import jax

    devices = jax.devices()
    if len(devices) < 8:
        pytest.skip("needs eight devices; on the CPU they are emulated")
    return devices[:8]
