"""Settings of the training data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from jaxllm.errors import ConfigError

Kind = Literal["auto", "chat", "completion", "text", "preference", "kto"]
Format = Literal["auto", "jsonl", "parquet", "array_record", "text", "arrow"]


@dataclass(frozen=True)
class DataSource:
    "One set of records."

    path: str
    "A file, a folder of files of one format, a pattern such as `data/*.jsonl`, or a folder saved by Hugging Face datasets."
    format: Format = "auto"
    "How the files are written; auto: by the ending (.jsonl .parquet .array_record .arrayrecord .txt .arrow)."
    kind: Kind = "auto"
    "What a record is; auto: by the keys of the first. chat: messages (and tools); completion: prompt and completion; text: text; "
    "preference: chosen and rejected (and prompt); kto: prompt, completion and label."
    weight: float | None = None
    "Share of the mixture, relative to the other sources'; null for all sources: every record once an epoch."
    columns: dict[str, str] = field(default_factory=dict)
    "Other names of the keys: {prompt: instruction, completion: output} reads `instruction` as the prompt."
    start: int = 0
    "First record used; negative counts from the end."
    stop: int | None = None
    "First record no longer used; negative counts from the end."
    text_by: Literal["line", "paragraph", "file"] = "line"
    "What is one record of a .txt file; paragraphs are parted by empty lines."

    def __post_init__(self):
        if not self.path:
            raise ConfigError("`path` of a data source is empty: name a file or folder")
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise ConfigError(f"weight {self.weight} of {self.path}: it must be positive; leave the source out to use none of it")


@dataclass(frozen=True)
class DataConfig:
    "Training data: where it is and how it becomes batches."

    path: tuple[str, ...] = ()
    "Files or folders, every record of them once an epoch; for weights and other settings give `sources` instead."
    sources: tuple[DataSource, ...] = ()
    "Data sources with settings of their own."
    loss_on: tuple[str, ...] = ("completions",)
    "Which tokens are learned: completions (what the assistant says, or the completion), last (only the last turn of the assistant), "
    "all, or names of roles (whole messages, with their headers; of the assistant only what it says)."
    packing: bool = True
    "Put several examples into one row (never for preference pairs and kto, whose rows are one example each)."
    packing_window: int = 32
    "Rows held open while packing: an example goes to the first where it fits, and the oldest row leaves when none has room."
    buckets: tuple[int, ...] = ()
    "Row lengths for padding without packing: a batch is padded to the smallest that holds its rows; the longest is always max_length."
    too_long: Literal["truncate", "skip", "error", "split"] = "truncate"
    "An example of more tokens than a row: truncate (cut at the end), skip, error, or split (plain text only: into several examples)."
    on_bad_record: Literal["error", "skip"] = "error"
    "A record that cannot be used stops the run, or is left out, counted and reported."
    shuffle: bool = True
    "Shuffle, anew in each epoch."
    epochs: int | None = None
    "Times through the data; null: without end. Not with weights, whose mixture has no epochs."
    append_eos: bool = True
    "End plain text and completions with the end-of-text token, and learn it (chat templates bring their own)."
    chat_template: str | None = None
    "Jinja source or name of a template of the tokenizer's, in place of the model's own."
    template_options: dict[str, Any] = field(default_factory=dict)
    "Further variables for the chat template, such as {enable_thinking: false}."
    workers: int = 0
    "Processes that read and tokenise ahead; 0: threads of this process."
    read_threads: int = 2
    "Threads that read and tokenise ahead, in each process; 0: none."

    def __post_init__(self):
        if bool(self.path) == bool(self.sources):
            raise ConfigError("give the training data as `path` or as `sources`" + (", not both" if self.path else ""))
        if not self.loss_on or len(set(self.loss_on)) != len(self.loss_on):
            raise ConfigError(f"`loss_on` {list(self.loss_on)}: name at least one, each once")
        if len(self.loss_on) > 1 and {"completions", "last", "all"} & set(self.loss_on):
            raise ConfigError(f"`loss_on` {list(self.loss_on)}: completions, last and all stand alone; otherwise list roles")
        if any(bucket < 2 for bucket in self.buckets) or list(self.buckets) != sorted(set(self.buckets)):
            raise ConfigError(f"`buckets` {list(self.buckets)}: give growing lengths of at least 2")
        if self.packing and self.buckets:
            raise ConfigError("`buckets` pad rows to lengths, and packing fills rows of one length: set packing to false, or drop buckets")
        for name, least in {"packing_window": 1, "workers": 0, "read_threads": 0}.items():
            if getattr(self, name) < least:
                raise ConfigError(f"`{name}` is {getattr(self, name)}; it must be at least {least}")
        if self.epochs is not None and self.epochs < 1:
            raise ConfigError(f"`epochs` is {self.epochs}; give at least 1, or null for no end")
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            bare = next(source.path for source in self.sources if source.weight is None)
            raise ConfigError(f"the source {bare} has no `weight` and others have: give all sources one, or none")
        if any(weighted) and self.epochs is not None:
            raise ConfigError("a mixture with weights has no epochs: set `epochs` to null and bound the run by steps, or drop the weights")

    @property
    def all_sources(self) -> tuple[DataSource, ...]:
        """The sources, `path` spelled out."""
        return self.sources or tuple(DataSource(path=path) for path in self.path)
