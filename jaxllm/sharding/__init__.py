"""Where arrays live: device meshes, and the rules that place logical axes on mesh axes."""

from jaxllm.sharding.mesh import MESH_AXES, make_mesh
from jaxllm.sharding.rules import ShardingRules, fit_to_model, named_sharding

__all__ = ["MESH_AXES", "ShardingRules", "fit_to_model", "make_mesh", "named_sharding"]
