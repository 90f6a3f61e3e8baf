"""A checkpoint's folder: `step-00000100/` with the arrays, what goes with them, and a manifest of every file's size and checksum.

The manifest is written last and the folder is renamed into place after it, so a folder of that name is whole unless a disk or a person
changed it later, which the checksums tell. Orbax commits its arrays atomically too, but it writes no checksums of its own files, and
knows nothing of the files beside them: that is why this is here.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
import zlib
from pathlib import Path
from typing import IO, Any

from jaxllm.errors import CheckpointError

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def list_steps(folder: Path) -> list[int]:
    """The steps saved in `folder`, in order."""
    found = [match for path in folder.iterdir() if path.is_dir() and (match := _NAME.fullmatch(path.name))]
    return sorted(int(match.group(1)) for match in found)


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Puts the manifest into `folder`: `content`, and size and checksum of every file there."""
    files = {str(file.relative_to(folder)): _sum(file) for file in sorted(folder.rglob("*")) if file.is_file()}
    body = json.dumps({**content, "files": files}, sort_keys=True)
    with open(folder / (MANIFEST + ".part"), "w", encoding="utf-8") as stream:
        json.dump({"checksum": zlib.crc32(body.encode()), "body": body}, stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.rename(folder / (MANIFEST + ".part"), folder / MANIFEST)
    _sync(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest's content. Raises CheckpointError if it is missing or was changed."""
    try:
        outer = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if outer["checksum"] == zlib.crc32(outer["body"].encode()):
            return json.loads(outer["body"])
    except FileNotFoundError:
        raise CheckpointError(f"{folder.name} is incomplete: it has no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise CheckpointError(f"{folder.name} is damaged: its {MANIFEST} cannot be read or was changed")


def verify(folder: Path) -> dict[str, Any]:
    """The manifest's content, after every file was held against it. Raises CheckpointError naming the first that differs."""
    manifest = read_manifest(folder)
    for name, (size, checksum) in manifest["files"].items():
        try:
            found = _sum(folder / name)
        except OSError as error:
            raise CheckpointError(f"{folder.name} is damaged: {name} cannot be read ({error.strerror})") from error
        if found[0] != size:
            raise CheckpointError(f"{folder.name} is damaged: {name} has {found[0]} bytes and was saved with {size}")
        if found[1] != checksum:
            raise CheckpointError(f"{folder.name} is damaged: the bytes of {name} are not those that were saved")
    return manifest


def put_in_place(staging: Path, target: Path) -> None:
    """Renames a finished folder to its name; one that has the name already makes room only then."""
    if target.exists():
        retired = target.with_name(f".retired-{target.name}")
        shutil.rmtree(retired, ignore_errors=True)
        os.rename(target, retired)
        os.rename(staging, target)
        shutil.rmtree(retired, ignore_errors=True)
    else:
        os.rename(staging, target)
    _sync(target.parent)


def remove(folder: Path) -> None:
    """Deletes a checkpoint; its name goes first, so that what is half deleted is never seen."""
    retired = folder.with_name(f".retired-{folder.name}")
    shutil.rmtree(retired, ignore_errors=True)
    os.rename(folder, retired)
    shutil.rmtree(retired, ignore_errors=True)


def lock(folder: Path, wait_s: float = 0) -> IO[bytes] | None:
    """The right to write in `folder`, which lasts until the file is closed or the process ends; None if another process has it."""
    stream = open(folder / ".lock", "ab")
    end = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return stream
        except BlockingIOError:
            if time.monotonic() >= end:
                stream.close()
                return None
            time.sleep(0.05)
        except OSError:  # a file system without locks: then nobody can know
            return stream


def tidy(folder: Path) -> None:
    """Takes away what a killed process left; a checkpoint that was finished and not yet renamed is kept."""
    for path in [*folder.glob(".saving-step-*"), *folder.glob(".retired-step-*")]:
        target = folder / ("step-" + path.name.partition("step-")[2])
        if not target.exists():
            try:
                verify(path)
                os.rename(path, target)
                continue
            except CheckpointError:
                pass
        shutil.rmtree(path, ignore_errors=True)


def _sum(file: Path) -> list[int]:
    checksum = size = 0
    with open(file, "rb") as stream:
        while block := stream.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
            size += len(block)
    return [size, checksum]


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
