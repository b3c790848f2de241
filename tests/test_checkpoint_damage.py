"""Checkpoints that are damaged, half written, or do not fit on the disk."""

import gc
import os
import pickle
import resource
import shutil
import time

import chex
import pytest
from kept_runs import at, contents, kept, kept_run, run

import jgd


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
