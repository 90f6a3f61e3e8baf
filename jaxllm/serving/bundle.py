"""Bundles: the programs of one engine in a folder of their own, to be carried elsewhere, with a manifest that says what they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.errors import ConfigError

if TYPE_CHECKING:
    from jaxllm.serving.executables import ExecutableCache

MANIFEST = "manifest.json"
_FORMAT = 1


def write_manifest(folder: Path, cache: ExecutableCache, settings: dict[str, Any]) -> dict[str, Any]:
    """Makes a bundle of the folder that the cache has written its programs to. Returns the manifest."""
    programs = {}
    for file, name in sorted(cache.names.items(), key=lambda item: item[1]):
        data = (folder / file).read_bytes()
        programs[file] = {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest = {"format": _FORMAT, "made_from": cache.made_from, "settings": settings, "programs": programs}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises ConfigError if there is no bundle, or one of another format."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        version, parts = manifest["format"], (manifest["made_from"], manifest["settings"], manifest["programs"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder} is not a bundle as `jaxllm compile` writes it: {error!r}") from error
    if version != _FORMAT:
        raise ConfigError(f"{folder} is a bundle of format {version}, and this version reads {_FORMAT}: compile it anew")
    if not all(isinstance(part, dict) for part in parts):
        raise ConfigError(f"{folder / MANIFEST} is damaged: made_from, settings and programs must be mappings")
    return manifest


def bundle_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """The engine's settings that the bundle among these options, if there is one, was made with."""
    bundle = options.get("bundle")
    return dict(read_manifest(Path(bundle))["settings"]) if isinstance(bundle, str) and bundle else {}
