"""Another run than the kept one is refused, and so is every bad input."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from kept_runs import PARAMS, X, Y, contents, kept_run, run, squared

import jgd

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
