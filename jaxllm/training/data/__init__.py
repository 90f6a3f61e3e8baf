"""Training data: files to batches, deterministic and resumable at any batch."""

from jaxllm.training.data.config import DataConfig, DataSource
from jaxllm.training.data.dataset import Dataset, make_dataset
from jaxllm.training.data.dry_run import dry_run

__all__ = ["DataConfig", "DataSource", "Dataset", "dry_run", "make_dataset"]
