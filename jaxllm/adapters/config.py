"""What an adapter is, in PEFT's names: the content of `adapter_config.json` as frozen dataclasses."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from jaxllm.errors import CheckpointError, ConfigError

Modules = tuple[str, ...] | str | None
_COMMON = dict(auto_mapping=None, peft_version=None, revision=None, inference_mode=False, task_type=None)
# PEFT's fields that are not implemented, with the only value that is accepted: what a config means that leaves them out.
_LORA_ONLY = dict(
    _COMMON, megatron_config=None, trainable_token_indices=None, loftq_config={}, eva_config=None, corda_config=None, lora_ga_config=None,
    velora_config=None, alora_invocation_tokens=None, use_qalora=False, monteclora_config=None, layer_replication=None, lora_bias=False,
    target_parameters=None, use_bdlora=None, arrow_config=None, kasa_config=None, ensure_weight_tying=False,
)  # fmt: skip
_PROMPT_ONLY = dict(_COMMON, modules_to_save=None)
_ANY = {"auto_mapping", "peft_version", "revision", "inference_mode", "task_type", "fan_in_fan_out", "base_model_name_or_path"}
_ANY |= {"megatron_core", "qalora_group_size", "runtime_config", "token_dim", "num_transformer_submodules", "num_attention_heads"}
_ANY |= {"num_layers", "encoder_hidden_size", "tokenizer_name_or_path", "tokenizer_kwargs", "prompt_tuning_init_text"}


class AdapterConfig:
    """Base of every adapter's configuration. Raises ConfigError for a wrong value."""

    peft_type: ClassVar[str]
    unsupported: ClassVar[dict[str, Any]]


@dataclass(frozen=True)
class LoraConfig(AdapterConfig):
    """LoRA (Hu et al., arXiv 2106.09685): y = W x + scaling B A x; rsLoRA and DoRA are settings of it."""

    r: int = 8
    "Rank of A [r, in] and B [out, r]."
    lora_alpha: float = 8
    "The product B A is scaled by lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora."
    target_modules: Modules = None
    "`all-linear`, a regular expression that a module's whole Hugging Face name matches, or names' ends (`q_proj`); null: PEFT's "
    "choice for the family."
    exclude_modules: Modules = None
    "Modules left out, spelled as target_modules."
    lora_dropout: float = 0.0
    "Chance that an input feature of the adapter is dropped in training."
    bias: Literal["none", "all", "lora_only"] = "none"
    "Only `none` is implemented."
    use_rslora: bool = False
    "Scale by lora_alpha / sqrt(r) (arXiv 2312.03732)."
    use_dora: bool = False
    "Learn the norm of each row of the weight apart from its direction (DoRA, arXiv 2402.09353)."
    modules_to_save: tuple[str, ...] | None = None
    "Modules trained and saved whole, by the ends of their names (`lm_head`, norms)."
    init_lora_weights: bool | str = True
    "true: A uniform (Kaiming, a = sqrt 5) and B zero; `gaussian`: A normal of standard deviation 1 / r; false: B random too, for tests."
    layers_to_transform: tuple[int, ...] | int | None = None
    "Numbers of the layers to adapt; null: all."
    layers_pattern: Modules = None
    "What comes before a layer's number in names."
    rank_pattern: dict[str, int] = field(default_factory=dict)
    "Another r for modules whose name ends in (or matches, as a regular expression) the key."
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    "Another lora_alpha, likewise."
    base_model_name_or_path: str | None = None
    "The model that the files name as their base."

    peft_type = "LORA"
    unsupported = _LORA_ONLY

    def __post_init__(self):
        _tuples(self, "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
        for r in (self.r, *self.rank_pattern.values()):
            if not _whole(r):
                raise ConfigError(f"LoRA: r (and every value of rank_pattern) must be a whole number of at least 1, not {r!r}")
        for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
            if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
                raise ConfigError(f"LoRA: lora_alpha (and every value of alpha_pattern) must be a number, not {alpha!r}")
        if isinstance(self.lora_dropout, bool) or not isinstance(self.lora_dropout, (int, float)) or not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"LoRA: lora_dropout must be at least 0 and below 1, not {self.lora_dropout!r}")
        if self.bias != "none":
            raise ConfigError(f"LoRA: bias={self.bias!r} is not implemented; 'none' is")
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise ConfigError(f"LoRA: init_lora_weights={self.init_lora_weights!r} is not implemented; true, false and 'gaussian' are")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ConfigError("LoRA: layers_to_transform goes with a list of target_modules; put the layers in the regular expression")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("LoRA: layers_pattern needs layers_to_transform")

    def scaling(self, r: int, alpha: float) -> float:
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r


@dataclass(frozen=True)
class IA3Config(AdapterConfig):
    """(IA)^3 (Liu et al., arXiv 2205.05638): a learned factor for each output feature, or each input one of feed-forward modules."""

    target_modules: Modules = None
    "As LoRA's."
    feedforward_modules: Modules = None
    "Those of target_modules whose inputs, not outputs, get the factors."
    exclude_modules: Modules = None
    "Modules left out."
    modules_to_save: tuple[str, ...] | None = None
    "Modules trained and saved whole."
    init_ia3_weights: bool = True
    "Only true (factors of 1) is implemented."
    base_model_name_or_path: str | None = None
    "The model that the files name as their base."

    peft_type = "IA3"
    unsupported = _COMMON

    def __post_init__(self):
        _tuples(self, "target_modules", "feedforward_modules", "exclude_modules", "modules_to_save")
        if self.init_ia3_weights is not True:
            raise ConfigError("IA3: init_ia3_weights=false (random factors) is not implemented; leave it true")
        if isinstance(self.target_modules, tuple) and isinstance(self.feedforward_modules, tuple):
            if extra := set(self.feedforward_modules) - set(self.target_modules):
                raise ConfigError(f"IA3: feedforward_modules must be among target_modules, and {', '.join(sorted(extra))} is not")


@dataclass(frozen=True)
class PromptTuningConfig(AdapterConfig):
    """Prompt tuning (Lester et al., arXiv 2104.08691): learned embeddings of `num_virtual_tokens` tokens before the text."""

    num_virtual_tokens: int = 8
    "Tokens before the text."
    prompt_tuning_init: str = "RANDOM"
    "`RANDOM` (standard normal), or `SAMPLE_VOCAB` (embeddings of tokens drawn from the vocabulary)."
    base_model_name_or_path: str | None = None
    "The model that the files name as their base."

    peft_type = "PROMPT_TUNING"
    unsupported = _PROMPT_ONLY

    def __post_init__(self):
        if not _whole(self.num_virtual_tokens):
            raise ConfigError(f"prompt tuning: num_virtual_tokens must be a whole number of at least 1, not {self.num_virtual_tokens!r}")
        if self.prompt_tuning_init not in ("RANDOM", "SAMPLE_VOCAB"):
            raise ConfigError(
                f"prompt tuning: prompt_tuning_init={self.prompt_tuning_init!r} is not implemented; RANDOM and SAMPLE_VOCAB are"
            )


@dataclass(frozen=True)
class PrefixTuningConfig(AdapterConfig):
    """Prefix tuning (Li & Liang, arXiv 2101.00190): learned keys and values of `num_virtual_tokens` tokens in every layer."""

    num_virtual_tokens: int = 8
    "Tokens before the text."
    prefix_projection: bool = False
    "Only false is implemented."
    init_weights: str | None = None
    "null (standard normal) or `zero`."
    base_model_name_or_path: str | None = None
    "The model that the files name as their base."

    peft_type = "PREFIX_TUNING"
    unsupported = _PROMPT_ONLY

    def __post_init__(self):
        if not _whole(self.num_virtual_tokens):
            raise ConfigError(f"prefix tuning: num_virtual_tokens must be a whole number of at least 1, not {self.num_virtual_tokens!r}")
        if self.prefix_projection:
            raise ConfigError("prefix tuning: prefix_projection=true is not implemented; leave it out")
        if self.init_weights not in (None, "zero"):
            raise ConfigError(f"prefix tuning: init_weights={self.init_weights!r} is not implemented; leave it out, or take 'zero'")


CONFIGS: dict[str, type[AdapterConfig]] = {c.peft_type: c for c in (LoraConfig, IA3Config, PromptTuningConfig, PrefixTuningConfig)}


def config_from_peft(values: Mapping[str, Any], where: str = "adapter_config.json") -> AdapterConfig:
    """The adapter that an `adapter_config.json` describes.

    Raises CheckpointError naming what is not implemented: a type of adapter, or a field whose value changes what it means.
    """
    kind = values.get("peft_type")
    if kind not in CONFIGS:
        raise CheckpointError(f"{where}: peft_type {kind!r} is not implemented; {', '.join(CONFIGS)} are")
    cls = CONFIGS[kind]
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if values.get("task_type") not in (None, "CAUSAL_LM"):
        raise CheckpointError(f"{where}: task_type {values['task_type']!r} is not implemented; CAUSAL_LM is")
    refused = []
    for name, value in values.items():
        if name in fields or name == "peft_type" or name in _ANY:
            continue
        default = cls.unsupported.get(name)
        if value != default and not (not value and not default):  # None, false, 0, {} and [] all say "not used"
            refused.append(f"{name}={value!r:.80}")
    if refused:
        raise CheckpointError(f"{where}: not implemented for {kind}: {', '.join(refused)}")
    given = {name: values[name] for name in fields if values.get(name) is not None}
    try:
        return cls(**given)
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from error


def config_to_peft(config: AdapterConfig, **more: Any) -> dict[str, Any]:
    """The content of `adapter_config.json`; `more` adds to it (`base_model_name_or_path`, sizes of a prompt)."""
    out = {**config.unsupported, **{f.name: getattr(config, f.name) for f in dataclasses.fields(config)}}
    out |= {"peft_type": config.peft_type, "task_type": "CAUSAL_LM", "inference_mode": True}
    if config.peft_type in ("LORA", "IA3"):
        out["fan_in_fan_out"] = False
    if config.peft_type == "LORA":
        out |= {"megatron_core": "megatron.core", "qalora_group_size": 16}
    out |= (
        {"prompt_tuning_init_text": None, "tokenizer_name_or_path": None, "tokenizer_kwargs": None} if "PROMPT" in config.peft_type else {}
    )
    out |= more
    return {name: list(value) if isinstance(value, tuple) else value for name, value in sorted(out.items())}


def _tuples(config: AdapterConfig, *names: str) -> None:
    """Lists, as JSON and YAML have them, become tuples; what is neither text nor a list of it is refused."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, (list, set, frozenset, tuple)):
            value = tuple(sorted(value) if isinstance(value, (set, frozenset)) else value)
            kind = int if name == "layers_to_transform" else str
            if any(not isinstance(v, kind) or isinstance(v, bool) for v in value):
                raise ConfigError(f"{config.peft_type}: {name} must be a list of {'numbers' if kind is int else 'names'}, not {value!r}")
            object.__setattr__(config, name, value)
        elif value is not None and not (isinstance(value, int) if name == "layers_to_transform" else isinstance(value, str)):
            raise ConfigError(f"{config.peft_type}: {name} must be a name or a list, not {value!r}")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
