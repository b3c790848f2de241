"""The suite: losses of ONE example as pure functions, with random weights and a random batch.

`MODELS` maps a name to a function that builds the model, so that nothing is allocated before it is asked for.
Every model also comes `small`, for tests.
"""

import functools
from collections.abc import Callable

from jgd._bench.models import images, sequences, vectors
from jgd._bench.models.images import cnn_loss as cnn_loss
from jgd._bench.models.model import Model as Model
from jgd._bench.models.vectors import mlp_loss as mlp_loss

MODELS: dict[str, Callable[[str, bool], Model]] = {
    "mlp": vectors.mlp,
    "cnn": functools.partial(images.cnn, size=32),
    "cnn-128": functools.partial(images.cnn, size=128),
    "residual": images.residual,
    "convnext": images.convnext,
    "vit": images.vit,
    "transformer": sequences.transformer,
    "gpt": sequences.gpt,
    "gru": sequences.gru,
    "bag": vectors.bag,
    "adapters": sequences.adapters,
}


def build(name: str, *, small: bool = False) -> Model:
    """A model of the suite, by its name.

    Raises:
        ValueError: there is no model of that name.
    """
    if name not in MODELS:
        raise ValueError(f"`name` must be one of {', '.join(MODELS)}, got {name!r}")
    return MODELS[name](name, small)
