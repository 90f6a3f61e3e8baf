"""The kernels' block sizes on a kind of device: what `jaxllm tune-kernels` measured there, if it did."""

import logging
from pathlib import Path

from jaxllm.errors import ConfigError
from jaxllm.paths import cache_dir
from pallas_kernels.ragged_paged_attention import Table, file_name, read_table

logger = logging.getLogger(__name__)


def table_path(device_kind: str) -> Path:
    """Where the table for a kind of device is written, and looked for: it may not exist."""
    return cache_dir() / "kernels" / file_name(device_kind)


def find_table(device_kind: str) -> Table | None:
    """None: nothing was measured, and sizes are a heuristic's. Raises ConfigError for a table that cannot be used."""
    path = table_path(device_kind)
    try:
        table = read_table(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"the kernels' block sizes cannot be read; delete the file, or run jaxllm tune-kernels again: {error}") from error
    if table.device_kind != device_kind:
        raise ConfigError(f"{path} has block sizes for {table.device_kind!r}, and the device is {device_kind!r}: delete it, or tune anew")
    logger.info("the kernels' block sizes are those of %s", path)
    return table
