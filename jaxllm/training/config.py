"""What a training run is made of, as one tree of settings."""

from dataclasses import dataclass, field
from typing import Literal

from jaxllm.adapters import AdapterConfig, IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig
from jaxllm.errors import ConfigError
from jaxllm.training.data import DataConfig
from jaxllm.training.objectives import ObjectiveConfig
from jaxllm.training.optim import OptimizerConfig

ADAPTERS = ("lora", "ia3", "prompt_tuning", "prefix_tuning")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis; their product is the devices used."""

    data: int = 1
    "Copies of the model, each with its part of the batch."
    fsdp: int = 1
    "Parts that parameters and optimiser are cut into; each device has its part of the batch too."
    tensor: int = 1
    "Devices that split each layer."

    def __post_init__(self) -> None:
        for name in ("data", "fsdp", "tensor"):
            if getattr(self, name) < 1:
                raise ConfigError(f"mesh.{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Fine-tune a model."""

    model: str
    "A folder, a .gguf file, a hub name (owner/name), or `demo`."
    output_dir: str
    "Where checkpoints, metrics and the result go. A run that finds its own checkpoints here goes on from the last one."
    data: DataConfig
    "What to learn from."
    eval_data: DataConfig | None = None
    "What to measure the loss on, whole, at each evaluation."
    objective: ObjectiveConfig = ObjectiveConfig()
    lora: LoraConfig | None = None
    "Train a LoRA adapter (or rsLoRA, DoRA), and leave the model as it is."
    ia3: IA3Config | None = None
    "Train an IA3 adapter."
    prompt_tuning: PromptTuningConfig | None = None
    "Train the embeddings of tokens before the text."
    prefix_tuning: PrefixTuningConfig | None = None
    "Train keys and values before the text."
    quantize_base: Literal["nf4", "int8"] | None = None
    "Keep the frozen model in 4 or 8 bits under the adapter (QLoRA)."
    optimizer: OptimizerConfig = OptimizerConfig()
    batch_size: int = 8
    "Rows in an optimiser step, all devices and micro-batches together."
    gradient_accumulation_steps: int = 1
    "Micro-batches that a step is cut into."
    max_length: int = 1024
    "Tokens in a row."
    max_steps: int | None = None
    "Optimiser steps; by default as many as data.epochs (1 if that says nothing either) takes."
    precision: Literal["float32", "bfloat16_mixed", "bfloat16"] = "float32"
    "bfloat16_mixed computes in bfloat16 and keeps float32 what it trains; bfloat16 keeps that in bfloat16, rounded stochastically."
    remat: Literal["none", "full", "dots", "dots_with_no_batch_dims"] = "none"
    "What the backward pass computes anew to save memory: nothing, each layer, or what is not a product of matrices."
    mesh: MeshConfig = MeshConfig()
    seed: int = 0
    logging_steps: int = 10
    "Steps between lines of metrics.jsonl."
    eval_steps: int | None = None
    "Steps between evaluations; by default one at the end."
    eval_on_start: bool = False
    "Evaluate before the first step too, as step 0."
    save_steps: int = 500
    "Steps between checkpoints; there is one at the end as well."
    keep_last: int = 2
    "Newest checkpoints to keep."
    keep_best: bool = True
    "Keep the checkpoint with the least eval_loss too."
    early_stopping_patience: int | None = None
    "Stop after so many evaluations in a row without a lower eval_loss."
    export: bool = True
    "Write the result at the end: a Hugging Face folder, or the adapter in PEFT's format."
    export_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    "Of an exported model; an adapter keeps the type that it was trained in."
    peak_flops: float | None = None
    "Operations a second of all devices together, for mfu; by default what is published of TPUs, and elsewhere mfu is null."
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    "Tell what goes to metrics.jsonl to these as well: event files in output_dir, or Weights & Biases ($WANDB_MODE=offline: without a net)."
    profile_steps: tuple[int, ...] = field(default=())
    "Write XLA profiler traces of these steps."

    def __post_init__(self) -> None:
        at_least_one = ("batch_size", "gradient_accumulation_steps", "max_length", "logging_steps", "save_steps", "keep_last")
        optional = ("max_steps", "eval_steps", "early_stopping_patience")
        for name in (*at_least_one, *(n for n in optional if getattr(self, n) is not None)):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        rows = self.mesh.data * self.mesh.fsdp * self.gradient_accumulation_steps
        if self.batch_size % rows:
            raise ConfigError(
                f"batch_size={self.batch_size} is no multiple of gradient_accumulation_steps x mesh.data x mesh.fsdp = {rows}; "
                "choose one that is"
            )
        if self.eval_data is None and (self.eval_steps is not None or self.eval_on_start or self.early_stopping_patience is not None):
            raise ConfigError("eval_steps, eval_on_start and early_stopping_patience need eval_data")
        if len(adapters := [name for name in ADAPTERS if getattr(self, name) is not None]) > 1:
            raise ConfigError(f"{' and '.join(adapters)} are two adapters, and a run trains one")
        if self.quantize_base is not None and not adapters:
            raise ConfigError("quantize_base freezes the model: give an adapter to train (lora, say)")
        if adapters and self.precision == "bfloat16":
            raise ConfigError("an adapter is kept in float32: use precision=bfloat16_mixed with it")
        if self.prompt_tuning is not None or self.prefix_tuning is not None:
            for name in ("data", "eval_data"):
                if (data := getattr(self, name)) is not None and data.packing:
                    raise ConfigError(f"prompt and prefix tuning take one example a row: set {name}.packing to false")

    @property
    def virtual_tokens(self) -> int:
        """Learned tokens before each text."""
        return getattr(self.adapter, "num_virtual_tokens", 0)

    @property
    def text_length(self) -> int:
        """Tokens of text in a row."""
        return self.max_length - self.virtual_tokens

    @property
    def adapter(self) -> AdapterConfig | None:
        """Whichever is trained."""
        return next((getattr(self, name) for name in ADAPTERS if getattr(self, name) is not None), None)
