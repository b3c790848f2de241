"""What a resumed run is: the bits of the unbroken one, or a refusal that says what differs; never another run."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from loaders import (
    EXAMPLES,
    KEY,
    LOADERS,
    METHOD,
    SIZE,
    Died,
    Shuffling,
    Stateful,
    batches,
    dies_at,
    fit,
    memory_map,
    rows,
    watch,
)
from meshes import mesh_of

import jgd


@pytest.fixture(params=[1, 4], ids=["one device", "mesh"])
def start(request):
    zeros = jnp.zeros(EXAMPLES)
    return zeros if request.param == 1 else jax.device_put(zeros, NamedSharding(mesh_of(request.param), P()))


KINDS = [*LOADERS, "memory map"]


class TestEveryLoader:
    @pytest.mark.sample(lambda name, at: at == (5, 17, 13, None)[KINDS.index(name) % 4])
    @pytest.mark.parametrize("at, start", [(5, 1), (17, 1), (13, 4)], indirect=["start"])
    @pytest.mark.parametrize("name", KINDS)
    def test_it_goes_on_as_if_nothing_had_happened(self, tmp_path, name, at, start):
        make = LOADERS.get(name) or (lambda: memory_map(tmp_path))
        every, trained = jgd.Checkpoint(tmp_path / "run", every=1), counting_in_order()
        whole = fit(make(), start, method=trained, callback=watch)
        with pytest.raises(Died):
            fit(make(), start, method=trained, checkpoint=every, callback=dies_at(at))
        again = fit(make(), start, method=trained, checkpoint=every, callback=watch)
        chex.assert_trees_all_equal(again, whole)

    def test_a_generator(self, tmp_path, start):
        make = lambda: (x for x in batches())
        whole, every = fit(make(), start, epochs=1, callback=watch), jgd.Checkpoint(tmp_path, every=1)
        with pytest.raises(Died):
            fit(make(), start, epochs=1, checkpoint=every, callback=dies_at(5))
        chex.assert_trees_all_equal(fit(make(), start, epochs=1, checkpoint=every, callback=watch), whole)


def counting_in_order():
    """Its parameters tell in which order the examples came: each batch adds its rows, and what was there doubles."""
    return jgd.descent(lambda c, row: -c @ row - 0.5 * c @ c / SIZE, optax.sgd(0.1), reduce=jgd.sum)


class TestShuffling:
    def test_a_loader_that_was_walked_before_is_refused(self, tmp_path):
        loader, every = Shuffling(), jgd.Checkpoint(tmp_path, every=1)
        with pytest.raises(Died):
            fit(loader, checkpoint=every, callback=dies_at(13))
        with pytest.raises(
            ValueError, match=r"gave other batches than .* made anew, with the same seed.*get_state"
        ):
            fit(loader, checkpoint=every)

    def test_an_order_without_a_seed_is_refused(self, tmp_path):
        fit(Shuffling(1), epochs=1, checkpoint=tmp_path)
        with pytest.raises(ValueError, match="gave other batches"):
            fit(Shuffling(2), epochs=2, checkpoint=tmp_path)

    def test_every_walk_is_drawn_again_in_its_order(self, tmp_path):
        every = jgd.Checkpoint(tmp_path, every=1)
        value = jgd.descent(lambda w, row: 0 * w + row @ jnp.arange(EXAMPLES), optax.sgd(0.0))
        whole = fit(Shuffling(), jnp.zeros(()), method=value).history.value
        for at in (3, 9, 13, 22):
            with pytest.raises(Died):
                fit(Shuffling(), jnp.zeros(()), method=value, checkpoint=every, callback=dies_at(at))
        seen = fit(Shuffling(), jnp.zeros(()), method=value, checkpoint=every).history.value
        np.testing.assert_array_equal(seen, whole)


def other_constant(scale):
    table = jnp.full(3, scale)
    return jgd.ascent(lambda c, row: c @ row * table[0], optax.sgd(1.0), reduce=jgd.sum)


@jax.custom_vjp
def clipped(x):
    return x


clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.5, 0.5),))

DATA = rows(range(EXAMPLES))
BASE = dict(method=METHOD, params=np.zeros(EXAMPLES, np.float32), data=DATA, batch_size=SIZE, key=KEY)
OTHERS = {
    "data": (dict(data=DATA[::-1].copy()), "another is what `data` holds"),
    "rows exchanged": (
        dict(data=np.concatenate([DATA[1:2], DATA[:1], DATA[2:]])),
        "another is what `data` holds",
    ),
    "initial values": (
        dict(params=np.eye(EXAMPLES, dtype=np.float32)[0]),
        r"began with other numbers in `params`.*go on with it.*more `epochs`.*folder each",
    ),
    "learning rate": (
        dict(method=jgd.ascent(lambda c, row: c @ row, optax.sgd(0.5), reduce=jgd.sum)),
        "another is the optimizer",
    ),
    "schedule": (
        dict(method=jgd.ascent(lambda c, row: c @ row, optax.sgd(lambda n: 1.0), reduce=jgd.sum)),
        "another is the optimizer",
    ),
    "descent": (
        dict(method=jgd.descent(lambda c, row: c @ row, optax.sgd(1.0), reduce=jgd.sum)),
        "the method was ascent, is descent",
    ),
    "loss": (
        dict(method=jgd.ascent(lambda c, row: jnp.sin(c @ row), optax.sgd(1.0), reduce=jgd.sum)),
        "another is the loss",
    ),
    "constant": (dict(method=other_constant(2.0)), "another is the loss"),
    "reduce": (
        dict(method=jgd.ascent(lambda c, row: c @ row, optax.sgd(1.0))),
        "another is the (loss|gradient)",
    ),
    "kind of key": (dict(key=jax.random.key(0, impl="rbg")), r"`key` was \['threefry2x32'.*, is \['rbg'"),
    "key": (dict(key=jax.random.key(1)), "`key` was"),
    "batch size": (dict(batch_size=4), "`batch_size` was 3, is 4"),
}


def run(folder, **change):
    given = BASE | dict(epochs=2) | change
    return jgd.fit(given.pop("method"), given.pop("params"), given.pop("data"), checkpoint=folder, **given)


KINDS_OF_STATE = [optax.adam(0.1), optax.lbfgs(), optax.contrib.prodigy()]


class TestAnotherRun:
    @pytest.mark.parametrize("name", OTHERS)
    def test_it_is_refused(self, tmp_path, name):
        change, message = OTHERS[name]
        run(tmp_path)
        with pytest.raises(ValueError, match=f"holds another run.*{message}.*another folder"):
            run(tmp_path, **change)
        with pytest.raises(ValueError, match="holds another run"):
            run(tmp_path, epochs=3, **change)
        run(tmp_path, epochs=3)  # and the run itself goes on

    @pytest.mark.parametrize("loader", ["list", "uneven", "grain", "stateful"])
    @pytest.mark.parametrize("epochs", [1, 2])
    def test_another_loss_of_a_loader(self, tmp_path, loader, epochs):
        fit(LOADERS[loader](), epochs=1, checkpoint=tmp_path)
        other = jgd.ascent(lambda c, row: jnp.sin(c @ row), optax.sgd(1.0), reduce=jgd.sum)
        with pytest.raises(ValueError, match="another is the loss"):
            fit(LOADERS[loader](), method=other, epochs=epochs, checkpoint=tmp_path)

    def test_other_batches_in_a_list(self, tmp_path):
        fit(batches(), epochs=1, checkpoint=tmp_path)
        with pytest.raises(ValueError, match="another is what `data` holds"):
            fit(batches(range(EXAMPLES - 1, -1, -1)), epochs=2, checkpoint=tmp_path)

    def test_a_derivative_rule_of_the_loss(self, tmp_path):
        run(tmp_path, method=jgd.ascent(lambda c, row: clipped(c) @ row, optax.sgd(1.0), reduce=jgd.sum))
        other = jax.custom_vjp(lambda x: x)
        other.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.25, 0.25),))
        with pytest.raises(ValueError, match="another is the gradient"):
            run(tmp_path, method=jgd.ascent(lambda c, row: other(c) @ row, optax.sgd(1.0), reduce=jgd.sum))

    def test_swapped_arguments(self, tmp_path):
        method = jgd.descent(lambda w, x, y: jnp.sum((w * x - y) ** 2), optax.sgd(0.1))
        x, y = np.float32(np.arange(12).reshape(4, 3)), np.ones((4, 3), np.float32)
        run(tmp_path, method=method, params=np.zeros(3), data=(x, y))
        with pytest.raises(ValueError, match="another is what `data` holds"):
            run(tmp_path, method=method, params=np.zeros(3), data=(y, x))

    def test_the_same_run_made_anew_goes_on(self, tmp_path):
        run(tmp_path, method=other_constant(2.0))
        whole = run(None, method=other_constant(2.0), epochs=4)
        chex.assert_trees_all_equal(run(tmp_path, method=other_constant(2.0), epochs=4), whole)

    @pytest.mark.parametrize("derivative", ["forward", "finite_difference", "callable"])
    def test_other_derivatives(self, tmp_path, derivative):
        loss = lambda c, row: c @ row
        how = jax.value_and_grad(lambda c, row: jnp.mean(row @ c)) if derivative == "callable" else derivative
        run(tmp_path, method=jgd.ascent(loss, optax.sgd(1.0), derivative=how))
        run(tmp_path, method=jgd.ascent(loss, optax.sgd(1.0), derivative=how), epochs=3)
        with pytest.raises(ValueError, match="holds another run"):
            run(tmp_path, method=jgd.ascent(loss, optax.sgd(1.0)), epochs=3)

    @pytest.mark.sample(lambda optimizer: optimizer is KINDS_OF_STATE[1])
    @pytest.mark.parametrize("optimizer", KINDS_OF_STATE)
    def test_optimizers_of_many_kinds(self, tmp_path, optimizer):
        method = lambda: jgd.descent(lambda w, x: jnp.sum((w - x) ** 2), optimizer)
        options = dict(params=np.zeros(EXAMPLES, np.float32), batch_size=None)
        run(tmp_path, method=method(), **options)
        whole = run(None, method=method(), epochs=3, **options)
        chex.assert_trees_all_equal(run(tmp_path, method=method(), epochs=3, **options), whole)


class TestOneCallForEachEpoch:
    """`for e in range(3): st = fit(method, st, x, epochs=1, checkpoint=f).state`, and what to write instead."""

    def test_it_is_refused(self, tmp_path):
        state = run(tmp_path, epochs=1).state
        with pytest.raises(ValueError, match="began with other numbers in `params`, `step`"):
            run(tmp_path, params=state, epochs=1)

    def test_more_epochs_of_the_same_run(self, tmp_path):
        for epoch in range(3):
            result = run(tmp_path, epochs=epoch + 1)
            assert int(result.state.step) == 8 * (epoch + 1)
        chex.assert_trees_all_equal(result, run(None, epochs=3))

    def test_a_folder_for_each_call(self, tmp_path):
        def program(calls):
            state = METHOD.init(BASE["params"])
            for call in range(calls):
                key = jax.random.fold_in(KEY, call)
                state = run(tmp_path / str(call), params=state, key=key, epochs=1).state
            return state

        first = program(2)  # as if it had died after two
        assert int(first.step) == 16
        np.testing.assert_array_equal(program(3).params, np.full(EXAMPLES, 3.0))


class TestStates:
    # `test_of_every_type` asks for the others by themselves.
    @pytest.mark.sample(lambda kind: kind in (np.asarray, jnp.asarray))
    @pytest.mark.parametrize(
        "kind",
        [np.int64, np.asarray, lambda x: (x, b"\x00\xff"), lambda x: [x], jnp.asarray, lambda x: {"at": x}],
    )
    def test_they_come_back_as_they_were(self, tmp_path, kind):
        make = lambda: Stateful(kind)
        whole, every = fit(make(), callback=watch), jgd.Checkpoint(tmp_path, every=1)
        with pytest.raises(Died):
            fit(make(), checkpoint=every, callback=dies_at(13))
        chex.assert_trees_all_equal(fit(make(), checkpoint=every, callback=watch), whole)

    def test_of_every_type(self):
        from internals import decoded, encoded

        value = {
            "none": None, 1: True, (2, "x"): [3.5, float("inf"), -0.0], "complex": 1 - 2j, "bytes": b"\x00\xff",
            "array": np.arange(3, dtype=np.int16), "scalar": np.float32(0.1), "half": jnp.ones(2, jnp.bfloat16),
            "set": {1, 2}, "frozen": frozenset("ab"), "big": 2**200, "date": np.datetime64("2020-01-01"),
            "key": jax.random.key(3), "nested": ((), [], {}), "text": "é\n", "bytearray": bytearray(b"x"),
        }  # fmt: skip
        again = decoded(encoded(value, "state"))
        assert list(again) == list(value)
        for name, x in value.items():
            assert type(again[name]) is type(x), name
            if isinstance(x, jax.Array | np.ndarray):
                assert again[name].dtype == x.dtype
            assert np.all(np.asarray(again[name] == x)), name

    def test_what_cannot_be_kept_is_said_before_the_first_update(self, tmp_path):
        made = []

        class Odd:
            def __iter__(self):
                return OddIterator()

        class OddIterator:
            def __iter__(self):
                return self

            def __next__(self):
                made.append(1)
                return rows([0])

            def get_state(self):
                return {"lock": object()}

            def set_state(self, state):
                pass

        with pytest.raises(TypeError, match=re.escape("get_state()['lock'] is object <object")):
            fit(Odd(), steps=3, checkpoint=tmp_path)
        assert not made

    def test_what_cannot_be_kept_later_loses_no_result(self, tmp_path):
        class Later(Stateful):
            def __iter__(self):
                iterator = super().__iter__()
                plain = iterator.get_state
                iterator.get_state = lambda: plain() | ({"x": object()} if iterator.at > 3 else {})
                return iterator

        with pytest.warns(RuntimeWarning, match="the loader's position cannot be kept: .*'x'"):
            result = fit(Later(), checkpoint=tmp_path)
        np.testing.assert_array_equal(result.params, np.full(EXAMPLES, 3.0))


class TestStopped:
    @pytest.mark.sample(
        lambda data, at: at == (5, 6, 7, 8)[("arrays", "list", "stateful", "generator").index(data)]
    )
    @pytest.mark.parametrize("data", ["arrays", "list", "stateful", "generator"])
    @pytest.mark.parametrize("inner_steps, at", [(1, 5), (3, 6), (3, 7), (3, 8)])
    def test_what_was_trained_is_what_is_saved(self, tmp_path, data, inner_steps, at):
        stop = lambda state, info: int(state.step) == at
        make, size = {
            "arrays": (lambda: DATA, SIZE),
            "generator": (lambda: (x for x in batches()), None),
        }.get(data, (LOADERS.get(data), None))
        options = dict(method=counting_in_order(), inner_steps=inner_steps, batch_size=size, epochs=1)
        stopped = fit(make(), checkpoint=tmp_path, callback=stop, **options)
        assert int(stopped.state.step) == at == stopped.history.value.size
        assert list(tmp_path.glob(f"update-{at}-*"))
        whole = fit(make(), callback=watch, **options)
        chex.assert_trees_all_equal(fit(make(), checkpoint=tmp_path, callback=watch, **options), whole)

    def test_and_the_stream_goes_on_amid_a_batch(self, tmp_path):
        stream, options = (x for x in batches()), dict(inner_steps=3, epochs=1, method=counting_in_order())
        fit(stream, checkpoint=tmp_path, callback=lambda state, info: int(state.step) == 7, **options)
        whole = fit(batches(), callback=watch, **options)
        chex.assert_trees_all_equal(fit(stream, checkpoint=tmp_path, callback=watch, **options), whole)

    @pytest.mark.parametrize("out", [1, 0.5, "x", jnp.ones(()), np.float32(2), [1]])
    def test_only_true_stops(self, out):
        with pytest.warns(
            UserWarning, match="`callback` returned .* does not end the training: only True does"
        ):
            result = fit(batches(), epochs=1, callback=lambda state, info: out)
        assert int(result.state.step) == 8

    @pytest.mark.parametrize("out", [True, np.True_, jnp.array(True)])
    def test_true_of_any_kind(self, out):
        assert int(fit(batches(), epochs=1, callback=lambda state, info: out).state.step) == 1

    @pytest.mark.parametrize("out", [None, False, np.False_, jnp.array(False)])
    def test_false_of_any_kind(self, out):
        assert int(fit(batches(), epochs=1, callback=lambda state, info: out).state.step) == 8


class TestOptimizerStates:
    def test_an_int_that_becomes_a_float_is_an_error(self):
        def update(updates, state, params=None):
            return updates, {"n": state["n"] + 0.5}

        optimizer = optax.GradientTransformation(lambda params: {"n": jnp.zeros((), jnp.int32)}, update)
        method = jgd.descent(lambda w, x: jnp.sum(w * x), optimizer)
        with pytest.raises(
            TypeError, match=r"`opt_state\['n'\]` was int32\[\] .* is float32 after its `update`"
        ):
            method.step(method.init(jnp.ones(3)), jnp.ones((2, 3)))

    @pytest.mark.parametrize("new", [1, 0.5, jnp.float32(2), jnp.bfloat16(0.5)])
    def test_a_float_keeps_its_dtype(self, new):
        optimizer = optax.GradientTransformation(
            lambda params: jnp.zeros((), jnp.bfloat16), lambda updates, state, params=None: (updates, new)
        )
        method = jgd.descent(lambda w, x: jnp.sum(w * x), optimizer)
        state, _ = method.step(method.init(jnp.ones(3)), jnp.ones((2, 3)))
        assert state.opt_state.dtype == jnp.bfloat16 and state.opt_state == new
