"""Runs that are kept: the same bits after any interruption, and never another run's."""

import gc
import json
import logging
import os
import pickle
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jgd

ROOT = Path(__file__).parent.parent


def squared(params, x, y):
    return 0.5 * (x @ params["w"] + params["b"] - y) ** 2


PARAMS = {"w": np.zeros(3, np.float32), "b": np.float32(0)}
X = np.random.default_rng(0).normal(size=(23, 3)).astype(np.float32)
Y = (X @ [1.0, -2.0, 3.0] + 0.5).astype(np.float32)
METHOD = jgd.descent(squared, optax.adam(0.1))


class Died(Exception):
    """The end of a run that nobody planned."""


def run(checkpoint=None, *, method=METHOD, params=PARAMS, data=(X, Y), seed=0, **options):
    options = dict(batch_size=5, epochs=4, callback=None) | options  # 5 updates an epoch, 20 in all
    if options.get("steps"):
        del options["epochs"]
    return jgd.fit(method, params, data, key=jax.random.key(seed), checkpoint=checkpoint, **options)


def dies_after(updates, error=Died):
    made = []

    def callback(state, info):
        made.append(info)
        if len(made) == updates:
            raise error

    return callback


def kept(folder):
    names = (
        path.name.split("-") for path in Path(folder).iterdir() if path.is_dir() and "." not in path.name
    )
    return sorted(int(name[1]) for name in names)


def at(folder, updates):
    """The checkpoint after so many updates; a name that nothing has where there is none."""
    return next(Path(folder).glob(f"update-{updates}-????????????"), Path(folder) / "none")


def contents(folder):
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file() and path.name != "jgd.lock")
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


def kept_run(folder, **options):
    """A run of two epochs, kept after updates 5 and 10."""
    return run(jgd.Checkpoint(folder, every=5), epochs=2, **options)


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

        monkeypatch.setattr("jgd._fit.chunks.Chunks._look", look)
        with pytest.raises(KeyboardInterrupt):
            run(folder)
        monkeypatch.undo()
        assert len(kept(folder)) == 1 and 0 < kept(folder)[0] < 20
        chex.assert_trees_all_equal(run(folder), run())

    def test_a_callback_that_ends_it(self, folder):
        ended = run(folder, callback=lambda state, info: int(state.step) == 7)
        assert int(ended.state.step) == 7 and kept(folder) == [7]

    def test_kills(self, tmp_path):
        kills(tmp_path, 6, ["shuffling"])

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


def newest_files(folder):
    newest = at(folder, max(kept(folder)))
    return [path for path in newest.rglob("*") if path.is_file()]


# The store's own threads and event loops end in what they met; what matters is what `fit` says.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
class TestDamage:
    @pytest.fixture(autouse=True)
    def nothing_is_left_behind(self):
        yield
        gc.collect()

    @pytest.mark.parametrize("damage", ["truncated", "one bit", "no arrays", "empty", "no json"])
    def test_a_damaged_newest_falls_back(self, folder, damage):
        kept_run(folder)
        newest = at(folder, 10)
        if damage == "truncated":
            for path in newest_files(folder):
                os.truncate(path, path.stat().st_size // 2)
        elif damage == "one bit":
            for path in newest.rglob("*"):
                if path.is_file() and path.parent.name == "d":
                    raw = bytearray(path.read_bytes())
                    raw[len(raw) // 2] ^= 1
                    path.write_bytes(raw)
        elif damage == "no arrays":
            shutil.rmtree(newest / "d")
        elif damage == "empty":
            shutil.rmtree(newest)
            newest.mkdir()
        else:
            (newest / "jgd.json").unlink()
        with pytest.warns(RuntimeWarning, match=r"update-10-\w+ cannot be read .* goes on from update-5-"):
            on = run(folder)
        chex.assert_trees_all_equal(on, run())
        assert kept(folder) == [5, 10, 20]

    def test_nothing_that_can_be_read(self, folder):
        kept_run(folder)
        for path in folder.rglob("*"):
            if path.is_file():
                path.write_bytes(b"")
        before = contents(folder)
        with pytest.raises(
            ValueError, match=r"no checkpoint in .* can be read.* update-10-\w+: .*Nothing was changed"
        ):
            run(folder)
        assert contents(folder) == before

    def test_a_half_written_one_is_not_seen(self, folder):
        kept_run(folder)
        begun = folder / at(folder, 10).name.replace("-10-", "-15-") / ".orbax-checkpoint-tmp"
        begun = begun.parent.with_name(begun.parent.name + begun.name)
        shutil.copytree(at(folder, 10), begun)
        (begun / "jgd.json").unlink()
        chex.assert_trees_all_equal(run(folder), run())
        assert not begun.exists()

    def test_a_full_disk(self, folder):
        every = jgd.Checkpoint(folder, every=5)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

        def fills_up(state, info):
            if int(state.step) == 8:
                while not at(folder, 5).exists():
                    time.sleep(0.01)
                resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))

        try:
            with pytest.warns(
                RuntimeWarning,
                match=r"could not be written to .*update-5-\w+ is whole.* Make room.* too large",
            ):
                ended = run(every, callback=fills_up)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert kept(folder) == [5]
        watched = dict(callback=lambda state, info: None)
        chex.assert_trees_all_equal(ended, run(**watched))
        chex.assert_trees_all_equal(run(every, **watched), run(**watched))

    def test_nothing_is_unpickled(self, folder, monkeypatch):
        def refuse(*args, **options):
            raise AssertionError("a pickle was opened")

        run(folder, epochs=2)
        for name in ("load", "loads", "Unpickler"):
            monkeypatch.setattr(pickle, name, refuse)
        chex.assert_trees_all_equal(run(folder), run())


OTHER_RUNS = {
    "key": (
        dict(seed=1),
        r"another run.*`key` was \['threefry2x32', \[0, 0\]\], is \['threefry2x32', \[0, 1\]\]",
    ),
    "batch size": (dict(batch_size=4), "`batch_size` was 5, is 4"),
    "inner steps": (dict(inner_steps=2), "`inner_steps` was 1, is 2"),
    "data": (dict(data=(X[:20], Y[:20])), r"`data` was \['float32\[23,3\]', .* is \['float32\[20,3\]'"),
    "batches": (dict(data=[(X, Y)], batch_size=None), "`data` was .* is batches"),
    "optimizer": (
        dict(method=jgd.descent(squared, optax.sgd(0.1, momentum=0.9))),
        r"another model or optimizer: .*`opt_state\[0\]\.count` was int32\[\], is not there",
    ),
    "leaf": (
        dict(
            method=jgd.descent(lambda p, x, y: squared({"w": p["v"], "b": p["b"]}, x, y), optax.adam(0.1)),
            params={"v": PARAMS["w"], "b": PARAMS["b"]},
        ),
        r"`params\['v'\]` was not there, is float32\[3\]",
    ),
    "shape": (
        dict(
            method=jgd.descent(
                lambda p, x, y: squared({"w": p["w"][:3], "b": p["b"]}, x, y), optax.adam(0.1)
            ),
            params={"w": np.zeros(4, np.float32), "b": PARAMS["b"]},
        ),
        r"`params\['w'\]` was float32\[3\], is float32\[4\]",
    ),
    "shorter": (dict(epochs=1), "has made 10 updates already, more than `epochs`=1 asks for"),
    "fewer steps": (dict(steps=9), "has made 10 updates already, more than `steps`=9 asks for"),
}


@pytest.fixture(scope="module")
def a_kept_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept") / "run"
    kept_run(folder)
    return folder


@pytest.mark.parametrize("change, message", OTHER_RUNS.values(), ids=OTHER_RUNS.keys())
def test_another_run_is_refused_and_nothing_changed(a_kept_run, change, message):
    before = contents(a_kept_run)
    with pytest.raises(ValueError, match=message):
        run(a_kept_run, **change)
    assert contents(a_kept_run) == before


class TestBadInput:
    def test_a_file(self, tmp_path):
        (tmp_path / "file").write_text("mine")
        for path in (tmp_path / "file", tmp_path / "file" / "run"):
            with pytest.raises(NotADirectoryError, match=r"`checkpoint` must be a folder.* a part is a file"):
                run(path)
        assert (tmp_path / "file").read_text() == "mine"

    def test_not_writable(self, tmp_path, monkeypatch):
        def refuse(*args, **options):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("tempfile.TemporaryFile", refuse)
        with pytest.raises(PermissionError, match=f"nothing can be written to the folder.*{tmp_path}"):
            run(tmp_path)

    @pytest.mark.parametrize("checkpoint", [3, True, [1]])
    def test_no_path(self, checkpoint):
        with pytest.raises(
            TypeError, match=r"`checkpoint` must be the path of a folder or a `jgd\.Checkpoint`"
        ):
            run(checkpoint)

    @pytest.mark.parametrize(
        "options, error, message",
        [
            (dict(every=0), ValueError, "`every` must be at least 1, got 0 updates"),
            (dict(every=1.5), TypeError, "`every` must be an int, got float 1.5"),
            (dict(keep=0), ValueError, "`keep` must be at least 1, got 0"),
            (dict(seconds=0), ValueError, "`seconds` must be a number above 0, got 0"),
            (dict(seconds="1"), ValueError, "`seconds` must be a number above 0, got '1'"),
            (dict(directory=3), TypeError, "`directory` must be the path of a folder, got int 3"),
        ],
    )
    def test_a_plan_that_makes_no_sense(self, options, error, message):
        with pytest.raises(error, match=message):
            jgd.Checkpoint(**dict(directory="run") | options)

    def test_inside_vmap(self, folder):
        with pytest.raises(ValueError, match="`checkpoint` needs values"):
            jax.vmap(lambda b: run(folder, params=PARAMS | {"b": b}))(jnp.zeros(2))

    def test_without_orbax(self, folder, monkeypatch):
        monkeypatch.setitem(sys.modules, "orbax", None)
        monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
        with pytest.raises(ImportError, match=r"pip install 'jgd\[checkpoint\]'"):
            run(folder)


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


def test_onto_another_mesh(tmp_path):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", MESHES, tmp_path / "changing", tmp_path / "same"],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
