"""The one place where tests look into `PerExampleGrads`: what is behind its two public attributes."""

import dataclasses
from typing import Any

import jgd


def form_of(grads: jgd.PerExampleGrads) -> Any:
    """How the gradients are held: the engine's factors, blocks, or what makes them a microbatch at a time."""
    return grads._form


def sums_of(grads: jgd.PerExampleGrads) -> Any:
    """What the pass has made of all examples together."""
    return grads._sums


def with_form(grads: jgd.PerExampleGrads, form: Any) -> jgd.PerExampleGrads:
    """The same gradients, held in a form whose leaves have the shapes of this one's."""
    return dataclasses.replace(grads, _form=form)
