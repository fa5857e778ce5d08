"""What holds for every test: no network, and eight emulated CPU devices.

Both are set before anything imports jax or transformers. The devices cost nothing measurable:
arrays without a sharding live on the first one, and start-up, compile and run times are those
of a single device.
"""

import os

import pytest

_DEVICES = "--xla_force_host_platform_device_count=8"
_flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in _flags:
    os.environ["XLA_FLAGS"] = f"{_flags} {_DEVICES}".strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Most of the suite's time goes into compiling small programs, which is quicker like this.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


@pytest.fixture(scope="session")
def emulated_devices():
    """The devices that sharding tests build their meshes from."""
    import jax

    devices = jax.devices()
    if len(devices) < 8:
        pytest.skip("needs eight devices; on the CPU they are emulated")
    return devices[:8]
