"""Runs that are kept: the same bits after any interruption, and on another mesh."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from internals import Dispatcher
from kept_runs import METHOD, PARAMS, Died, X, Y, at, contents, dies_after, kept, kept_run, run, squared

import jgd

ROOT = Path(__file__).parent.parent


class TestTheSameBits:
    @pytest.mark.parametrize("batch_size, inner_steps", [(5, 1), (4, 3), (None, 2)])
    def test_kept_or_not(self, folder, batch_size, inner_steps):
        options = dict(batch_size=batch_size, inner_steps=inner_steps, epochs=None, steps=18)
        every = jgd.Checkpoint(folder, every=7)
        chex.assert_trees_all_equal(run(every, **options), run(**options))
        made = [-(-update // inner_steps) * inner_steps for update in (7, 14, 18)]
        assert kept(folder) == sorted(set(made))

    @pytest.mark.parametrize("watched", [False, True])
    def test_a_run_that_goes_on(self, folder, watched):
        options = dict(callback=(lambda state, info: None) if watched else None)
        whole = run(**options)
        half = run(folder, epochs=2, **options)
        np.testing.assert_array_equal(half.history.value, whole.history.value[:10])
        chex.assert_trees_all_equal(run(folder, **options), whole)

    @pytest.mark.parametrize("at", [1, 6, 11, 14])
    def test_a_run_that_dies_within_an_epoch(self, folder, at):
        every = jgd.Checkpoint(folder, every=3)
        with pytest.raises(Died):
            run(every, callback=dies_after(at))
        assert max(kept(folder), default=0) == (at - 1) // 3 * 3
        expected = run(callback=lambda state, info: None)
        chex.assert_trees_all_equal(run(every, callback=lambda state, info: None), expected)

    def test_by_time(self, folder):
        often = jgd.Checkpoint(folder, seconds=1e-6, keep=100)
        chex.assert_trees_all_equal(run(often), run())
        assert len(kept(folder)) > 2 and max(kept(folder)) == 20

    def test_only_the_last_are_kept(self, folder):
        run(jgd.Checkpoint(folder, every=3, keep=2))
        assert kept(folder) == [18, 20]

    def test_a_checked_run(self, folder):
        every = jgd.Checkpoint(folder, every=4)
        with pytest.raises(Died):
            run(every, check_finite=True, callback=dies_after(9))
        chex.assert_trees_all_equal(
            run(every, check_finite=True, callback=lambda state, info: None),
            run(check_finite=True, callback=lambda state, info: None),
        )

    def test_states_of_all_kinds(self, folder):
        optimizer = optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(3)), optax.adam(0.1))
        odd = jgd.descent(
            lambda p, x, y: squared({"w": p["w"].astype(jnp.float32), "b": p["b"]}, x, y), optimizer
        )
        params = {"w": jnp.zeros(3, jnp.bfloat16), "b": 0.0, "none": jnp.zeros((0, 4))}
        run(folder, method=odd, params=params, epochs=2)
        chex.assert_trees_all_equal(run(folder, method=odd, params=params), run(method=odd, params=params))

    def test_from_a_state(self, folder):
        began = run(epochs=1).state
        run(folder, params=began, epochs=2)
        chex.assert_trees_all_equal(run(folder, params=began), run(params=began))

    def test_a_run_that_is_done_only_comes_back(self, folder):
        done = run(folder, callback=lambda state, info: None)
        before = contents(folder)
        again = run(folder, callback=dies_after(1))
        chex.assert_trees_all_equal(again, done)
        assert contents(folder) == before

    def test_legacy_keys_and_paths_as_text(self, folder):
        options = dict(batch_size=5, key=jax.random.PRNGKey(1))
        jgd.fit(METHOD, PARAMS, (X, Y), epochs=1, checkpoint=str(folder), **options)
        chex.assert_trees_all_equal(
            jgd.fit(METHOD, PARAMS, (X, Y), epochs=3, checkpoint=str(folder), **options),
            jgd.fit(METHOD, PARAMS, (X, Y), epochs=3, **options),
        )

    def test_progress_goes_on_too(self, folder, capsys):
        run(folder, epochs=2)
        chex.assert_trees_all_equal(run(folder, progress=True), run())
        assert "20/20" in capsys.readouterr().out

    def test_it_says_where_it_goes_on(self, folder, caplog):
        kept_run(folder)
        with caplog.at_level(logging.INFO, "jgd"):
            run(folder)
        assert f"goes on after update 10, from {at(folder, 10)}" in caplog.text


class TestInterrupted:
    def test_ctrl_c_keeps_the_last_batch(self, folder):
        with pytest.raises(KeyboardInterrupt):
            run(folder, inner_steps=2, callback=dies_after(13, KeyboardInterrupt))
        assert kept(folder) == [12]
        watched = dict(inner_steps=2, callback=lambda state, info: None)
        chex.assert_trees_all_equal(run(folder, **watched), run(**watched))

    def test_ctrl_c_between_compiled_calls(self, folder, monkeypatch):
        made = []

        def look(self):
            made.append(self)
            if len(made) == 3:
                raise KeyboardInterrupt

        monkeypatch.setattr(Dispatcher, "_look", look)
        with pytest.raises(KeyboardInterrupt):
            run(folder)
        monkeypatch.undo()
        assert len(kept(folder)) == 1 and 0 < kept(folder)[0] < 20
        chex.assert_trees_all_equal(run(folder), run())

    def test_a_callback_that_ends_it(self, folder):
        ended = run(folder, callback=lambda state, info: int(state.step) == 7)
        assert int(ended.state.step) == 7 and kept(folder) == [7]

    @pytest.mark.slow
    @pytest.mark.sample
    def test_kills(self, tmp_path):
        kills(tmp_path, 2, ["shuffling"])

    @pytest.mark.slow
    def test_many_kills(self, tmp_path):
        """Over every kind of data. JGD_KILLS says how many; CI makes 40."""
        kills(tmp_path, int(os.environ.get("JGD_KILLS", 200)), [])


def kills(tmp_path, count, kinds):
    """Runs killed by SIGKILL at random moments end in the bits of one that was left alone."""
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "benchmarks" / "kills.py",
            "--kills",
            str(count),
            *(["--kinds", *kinds] if kinds else []),
            "--json",
            tmp_path / "kills.json",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "kills.json").read_text())
    assert found["kills"] == count and found["lost runs"] == 0
    assert found["lost updates at worst"] <= 3 * found["updates between checkpoints"]


MESHES = """
import sys, jax, numpy as np, jax.numpy as jnp, optax, jgd
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

def loss(p, x, y):
    return 0.5 * (jnp.tanh(x @ p["w"]) @ p["v"] - y) ** 2

rng = np.random.default_rng(0)
x, y = (rng.normal(size=s).astype(np.float32) for s in ((24, 8), 24))
start = {"w": rng.normal(size=(8, 16)).astype(np.float32), "v": np.ones(16, np.float32)}
method = jgd.descent(loss, optax.adam(0.01))

def run(devices, epochs, checkpoint=None):
    mesh = Mesh(np.array(jax.devices()[:devices]), ("model",))
    specs = {"w": P(None, "model"), "v": P("model")}
    params = {k: jax.device_put(v, NamedSharding(mesh, specs[k])) for k, v in start.items()}
    fit = jgd.fit(method, params, (x, y), batch_size=8, epochs=epochs, key=jax.random.key(0), checkpoint=checkpoint)
    assert len(fit.params["w"].sharding.device_set) == devices, fit.params["w"].sharding
    assert len(fit.state.opt_state[0].mu["w"].sharding.device_set) == devices
    return jax.device_get(fit)

whole = run(1, 5)
for epochs, devices in enumerate((8, 4, 1, 8), 2):
    kept = run(devices, epochs, sys.argv[1])
    assert kept.history.value.shape == (3 * epochs,)
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), kept, whole)
same = run(8, 2, sys.argv[2])
jax.tree.map(np.testing.assert_array_equal, run(8, 2), same)
"""


@pytest.mark.slow
@pytest.mark.sample
def test_onto_another_mesh(tmp_path):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", MESHES, tmp_path / "changing", tmp_path / "same"],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
