"""What is logged, and where to."""

import logging
import sys


def log_to_stderr(level: int | str) -> None:
    logging.basicConfig(stream=sys.stderr, level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
