"""Training data: files to batches, deterministic and resumable at any batch."""

from jaxllm.lazy import lazy

__all__, __getattr__ = lazy(__name__, config=("DataConfig", "DataSource"), dataset=("Dataset", "make_dataset"), preview=("dry_run",))
