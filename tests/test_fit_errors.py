"""What `fit` refuses: every bad input by its message."""

import jax
import numpy as np
import optax
import pytest
from regressions import PARAMS, method, regression, squared

import jgd

X, Y = regression()


BAD_INPUT = {
    "batch of none": (
        dict(batch_size=0),
        ValueError,
        "`batch_size` must be at least 1, got 0; None takes all",
    ),
    "negative batch": (dict(batch_size=-2), ValueError, "`batch_size` must be at least 1, got -2"),
    "large batch": (
        dict(batch_size=24),
        ValueError,
        "`batch_size`=24 is larger than `data`, which holds 23 examples",
    ),
    "float batch": (dict(batch_size=4.0), TypeError, "`batch_size` must be an int, got float 4.0"),
    "bool batch": (dict(batch_size=True), TypeError, "`batch_size` must be an int, got bool True"),
    "neither": (dict(epochs=None), ValueError, "exactly one of `epochs` and `steps`.* got neither"),
    "both": (dict(steps=3), ValueError, "exactly one of `epochs` and `steps`.* got epochs=1 and steps=3"),
    "negative epochs": (dict(epochs=-1), ValueError, "`epochs` must be at least 0, got -1"),
    "negative steps": (dict(epochs=None, steps=-1), ValueError, "`steps` must be at least 0, got -1"),
    "float epochs": (dict(epochs=1.5), TypeError, "`epochs` must be an int, got float 1.5"),
    "inner steps": (dict(inner_steps=0), ValueError, "`inner_steps` must be at least 1, got 0"),
    "uneven": (
        dict(epochs=None, steps=5, inner_steps=2),
        ValueError,
        "`steps` counts updates.*multiple of that, got 5",
    ),
    "lengths": (
        dict(data=(X, Y[:5])),
        ValueError,
        r"disagree in length: `data\[0\]` holds 23 examples, `data\[1\]` 5",
    ),
    "lengths in a dict": (
        dict(data={"x": X, "y": Y[:5]}),
        ValueError,
        r"`data\['x'\]` holds 23 examples, `data\['y'\]` 5",
    ),
    "empty data": (
        dict(data=(X[:0], Y[:0])),
        ValueError,
        r"`data` holds no examples: `data\[0\]` has length 0",
    ),
    "no data": (dict(data=()), ValueError, "`data` holds no examples: at least one leaf"),
    "scalar": (
        dict(data=(X, 1.0)),
        ValueError,
        r"`data\[1\]` is float32\[\] and has no axis 0 to hold the examples",
    ),
    "text": (dict(data=(X, "labels")), TypeError, r"`data\[1\]` is str 'labels', not an array of numbers"),
    "no method": (dict(method=squared), TypeError, "`method` must come from `jgd.descent`"),
    "batched iterable": (
        dict(data=[(X, Y)]),
        ValueError,
        r"`batch_size`=4 was given, but `data` is an iterable \(list\)",
    ),
    "iterator walked twice": (
        dict(data=iter([(X, Y)]), batch_size=None, epochs=2),
        ValueError,
        "is an iterator, which can be walked only once",
    ),
    "iterator that runs out": (
        dict(data=iter([(X, Y)]), batch_size=None, epochs=None, steps=3),
        ValueError,
        "gave no batch in epoch 2, after 1",
    ),
    "no batches": (dict(data=[], batch_size=None), ValueError, "gave no batch in epoch 1, after 0 in all"),
    "integer params": (
        dict(params={"w": np.zeros(3, int), "b": 0.0}),
        TypeError,
        r"`params\['w'\]` is int64\[3\]",
    ),
}


@pytest.mark.parametrize("change, error, message", BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input(key, change, error, message):
    given = dict(method=method(), params=PARAMS, data=(X, Y), batch_size=4, epochs=1, key=key) | change
    with pytest.raises(error, match=message):
        jgd.fit(given.pop("method"), given.pop("params"), given.pop("data"), **given)


@pytest.mark.parametrize(
    "in_axes, message", [((None, 0), "one entry for each|one for each"), ((None, 0, (0, 0)), "does not fit")]
)
def test_axes_that_do_not_fit_the_data(key, in_axes, message):
    bad = jgd.descent(squared, optax.sgd(0.1), in_axes=in_axes)
    with pytest.raises(ValueError, match=message):
        jgd.fit(bad, PARAMS, (X, Y), batch_size=4, epochs=1, key=key)


@pytest.mark.parametrize("watch", ["callback", "progress", "check_finite"])
def test_nothing_can_be_watched_inside_vmap(key, watch):
    def run(key):
        return jgd.fit(method(), PARAMS, (X, Y), batch_size=4, epochs=1, key=key, **{watch: lambda *_: None})

    with pytest.raises(ValueError, match=f"`{watch}` needs values to look at, and inside `jax.jit`"):
        jax.vmap(run)(jax.random.split(key, 2))
