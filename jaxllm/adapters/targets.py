"""Which modules an adapter goes on: PEFT's rules, over Hugging Face's names of our modules."""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from flax import nnx

from jaxllm.adapters.config import AdapterConfig, Modules
from jaxllm.errors import ConfigError
from jaxllm.models import Decoder, ModelConfig, family_of
from jaxllm.models.families import Weight

_QV = {"q_proj", "v_proj"}
# What target_modules=None means, where PEFT has a choice.
LORA_DEFAULTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "opt"), ("q_proj", "v_proj")),
    "gpt2": ("c_attn",),
}
IA3_DEFAULTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # targets, and which of them are feed-forward
    **dict.fromkeys(("llama", "mistral"), (("k_proj", "v_proj", "down_proj"), ("down_proj",))),
    **dict.fromkeys(("qwen2", "qwen3", "gemma2", "gemma3_text"), (("q_proj", "v_proj", "down_proj"), ("down_proj",))),
    "gpt2": (("c_attn", "mlp.c_proj"), ("mlp.c_proj",)),
    "opt": (("q_proj", "k_proj", "fc2"), ("fc2",)),
}


@dataclass(frozen=True)
class Site:
    """One Hugging Face module in all the layers of a stack, or in one layer, or outside them: where one adapter can sit.

    `owner` leads to the module of ours that holds the Linears `parts`: one, or those that Hugging Face fuses into one matrix,
    `rows` being the part of its outputs that each has. `names`: the module's name in each of `layers` (in the one place, if none).
    """

    owner: tuple[str | int, ...]
    parts: tuple[str, ...]
    rows: tuple[tuple[int, int], ...]
    names: tuple[str, ...]
    stacked: bool
    conv1d: bool

    @property
    def fused(self) -> bool:
        return len(self.parts) > 1


def hf_weights(config: ModelConfig) -> dict[str, Weight]:
    """The family's weight map, with the names that today's transformers gives to modules (which PEFT files have)."""
    family = family_of(config.family)
    weights = family.weights(config)
    for old, new in getattr(family, "ALTERNATIVE_PREFIXES", {}).items():
        weights = {
            k: Weight(new + w.name.removeprefix(old) if w.name.startswith(old) else w.name, w.kind, w.part) for k, w in weights.items()
        }
    return weights


def layers_at(config: ModelConfig, path: tuple, scanned: bool) -> tuple[int, ...]:
    """The numbers of the layers that the module at `path` (`("blocks", j, ...)` or `("layers", i, ...)`) stands for; () elsewhere."""
    period = config.period
    repeats = config.num_layers // period if scanned else 0
    if path[0] == "blocks":
        return tuple(r * period + path[1] for r in range(repeats))
    return (repeats * period + path[1],) if path[0] == "layers" else ()


def sites(model: Decoder) -> Iterator[Site]:
    """Every place of the model that has matrices to adapt, in the order of the layers' parts."""
    config, weights = model.config, hf_weights(model.config)
    scanned = bool(model.blocks)
    owners = [(kind, i, part) for kind in ("blocks", "layers") for i in range(len(getattr(model, kind))) for part in ("self_attn", "mlp")]
    for owner in [*owners, ()]:
        names = (
            ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
            if owner
            else ("project_in", "project_out", "lm_head")
        )
        prefix = f"layers.{{i}}.{owner[2]}." if owner else ""
        grouped: dict[str, list[tuple[str, Weight]]] = defaultdict(list)
        for name in names:
            if (weight := weights.get(f"{prefix}{name}.weight")) is not None:
                grouped[weight.name.removesuffix(".weight")].append((name, weight))
        for template, parts in grouped.items():
            layers = layers_at(config, owner, scanned) if owner else ()
            yield Site(
                owner,
                tuple(name for name, _ in parts),
                tuple(w.part or (0, -1) for _, w in parts),
                tuple(template.format(i=i) for i in layers) or (template,),
                bool(owner) and owner[0] == "blocks",
                parts[0][1].kind == "conv1d",
            )


def at(model: nnx.Module, path: tuple[str | int, ...]):
    for step in path:
        model = model[step] if isinstance(step, int) else getattr(model, step)
    return model


def is_target(config: AdapterConfig, targets: Modules, name: str) -> bool:
    """Whether the module of that name is adapted: PEFT's `check_target_module_exists`."""
    if (exclude := config.exclude_modules) and (re.fullmatch(exclude, name) if isinstance(exclude, str) else _ends_in(name, exclude)):
        return False
    if any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in config.modules_to_save or ()):
        return False
    if targets == "all-linear":
        return not name.endswith("lm_head")
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    if not _ends_in(name, targets):
        return False
    wanted = getattr(config, "layers_to_transform", None)
    if wanted is None or wanted == ():
        return True
    patterns = config.layers_pattern or ()
    tries = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in ((patterns,) if isinstance(patterns, str) else patterns)] or [r".*?\.[^.]*\.(\d+)\."]
    found = next((m for m in (re.match(t, name) for t in tries) if m), None)
    return found is not None and int(found[1]) in ((wanted,) if isinstance(wanted, int) else wanted)


def _ends_in(name: str, ends: tuple[str, ...]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def pattern_value(pattern: dict, name: str, default):
    """The value of the first key that `name` ends in or matches: PEFT's `get_pattern_key`."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def targeted(model: Decoder, config: AdapterConfig) -> list[tuple[Site, tuple[bool, ...]]]:
    """The sites that the adapter goes on, with which of their layers. Raises ConfigError if there is none, or a name fits nothing."""
    targets = resolve_targets(model.config, config)
    found = list(sites(model))
    chosen = [(site, tuple(is_target(config, targets, name) for name in site.names)) for site in found]
    chosen = [(site, which) for site, which in chosen if any(which)]
    known = sorted({".".join(name.split(".")[-1:]) for site in found for name in site.names})
    if isinstance(targets, tuple):
        missed = [t for t in targets if not any(_ends_in(name, (t,)) for site in found for name in site.names)]
        if missed:
            note = " (embeddings cannot be targets here: name them in modules_to_save)" if {"embed_tokens", "wte"} & set(missed) else ""
            tied = " (this model's lm_head is its embedding)" if "lm_head" in missed and model.config.tie_embeddings else ""
            raise ConfigError(
                f"target_modules: {', '.join(missed)} fits no linear module of this model{note}{tied}; it has {', '.join(known)}"
            )
    if not chosen:
        raise ConfigError(f"target_modules={config.target_modules!r} fits no module of this model; it has {', '.join(known)}")
    return chosen


def resolve_targets(model: ModelConfig, config: AdapterConfig) -> Modules:
    """`target_modules`, or PEFT's choice for the family where it is None."""
    if config.target_modules is not None:
        return config.target_modules
    table = LORA_DEFAULTS if config.peft_type == "LORA" else {k: v[0] for k, v in IA3_DEFAULTS.items()}
    if model.family not in table:
        raise ConfigError(f"PEFT has no default target_modules for {model.family!r}: name them ('all-linear', or a list)")
    return table[model.family]


def is_feedforward(model: ModelConfig, config: AdapterConfig, name: str) -> bool:
    """Whether an IA3 target's inputs are scaled, not its outputs: PEFT's rule."""
    modules = config.feedforward_modules
    if modules is None:
        if model.family not in IA3_DEFAULTS:
            raise ConfigError(f"PEFT has no default feedforward_modules for {model.family!r}: name them (or give an empty list)")
        modules = IA3_DEFAULTS[model.family][1]
    return re.fullmatch(modules, name) is not None if isinstance(modules, str) else any(name.endswith(m) for m in modules)
