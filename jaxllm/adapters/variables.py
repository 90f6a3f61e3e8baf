"""The kinds of variable that a model with an adapter has besides `nnx.Param`, the frozen base weights."""

from flax import nnx


class AdapterParam(nnx.Param):
    """A weight of an adapter: what is trained."""


class SavedParam(nnx.Param):
    """A weight of the model that is trained whole, and saved with the adapter (`modules_to_save`)."""


class AdapterConstant(nnx.Variable):
    """What an adapter needs and nobody trains: per-layer scalings, dropout keys, quantised weights."""
