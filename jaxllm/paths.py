"""Where jaxllm keeps what it downloads and compiles."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """The cache folder: `$JAXLLM_CACHE`, or `~/.cache/jaxllm`. It may not exist yet: who writes there makes it."""
    return Path(os.environ.get("JAXLLM_CACHE") or Path.home() / ".cache" / "jaxllm").expanduser()
