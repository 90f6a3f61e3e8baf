"""A model as its graph and two flat dicts of arrays, what training changes and what it leaves, by name."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.errors import ConfigError
from jaxllm.sharding import ShardingRules

Params = dict[str, jax.Array]  # "blocks.0.self_attn.q_proj.weight" -> array


@dataclass(frozen=True)
class ModelParts:
    """All of a model but its arrays: `parts.merge(trainable, frozen)` is the module."""

    graph: nnx.GraphDef
    variables: dict[str, tuple[tuple, nnx.Variable]]  # name -> path, and the variable with a shape for its value

    def merge(self, *arrays: Params) -> Any:
        values = {name: value for some in arrays for name, value in some.items()}
        return nnx.merge(self.graph, nnx.from_flat_state([(path, v.replace(values[name])) for name, (path, v) in self.variables.items()]))

    def axes(self, name: str) -> tuple[str | None, ...]:
        """The logical name of each axis of a parameter; stacked layers have one axis more than their parameters say."""
        variable = self.variables[name][1]
        axes = tuple(variable.get_metadata().get("logical_axes") or ())
        missing = len(variable.get_raw_value().shape) - len(axes)
        return ("layers",) * (missing == 1 and "blocks." in name) + axes if axes and missing in (0, 1) else ()

    def shardings(self, params: Mapping[str, Any], mesh: Mesh, rules: ShardingRules) -> dict[str, NamedSharding]:
        """Where parameters (or their shapes) go: by the rules, and an axis that they do not divide stays whole."""

        def one(name: str, shape: tuple[int, ...]) -> NamedSharding:
            spec = rules.spec(self.axes(name))
            sizes = [math.prod(mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes or ())) for axes in spec]
            return NamedSharding(mesh, PartitionSpec(*(a if n % k == 0 else None for a, n, k in zip(spec, shape, sizes, strict=False))))

        return {name: one(name, x.shape) for name, x in params.items()}


def split_model(model: nnx.Module, is_trainable: Callable[[tuple, nnx.Variable], bool] | None = None) -> tuple[ModelParts, Params, Params]:
    """The parts of a model, its trainable arrays and its frozen ones. None: all parameters are trainable."""
    graph, state = nnx.split(model, graph=False)
    variables, trainable, frozen = {}, {}, {}
    for path, variable in nnx.to_flat_state(state):
        name, value = ".".join(map(str, path)), variable.get_value()
        variables[name] = path, variable.replace(jax.ShapeDtypeStruct(value.shape, value.dtype))
        chosen = isinstance(variable, nnx.Param) if is_trainable is None else is_trainable(path, variable)
        (trainable if chosen else frozen)[name] = value
    if not trainable:
        raise ConfigError("nothing is left to train: no parameter was chosen")
    return ModelParts(graph, variables), trainable, frozen


def matches(patterns: tuple[str, ...]) -> Callable[[tuple, nnx.Variable], bool]:
    """A filter for `split_model`: parameters whose names one of the regular expressions is found in."""
    return lambda path, variable: isinstance(variable, nnx.Param) and any(re.search(p, ".".join(map(str, path))) for p in patterns)
