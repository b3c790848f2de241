"""Checkpoints in a folder: every byte that is read is covered, and nothing is touched that this run did not write."""

import gc
import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from internals import Lock, manifest

import jgd

X = np.random.default_rng(0).normal(size=(12, 2)).astype(np.float32)
METHOD = jgd.descent(lambda w, x: 0.5 * jnp.sum((w - x) ** 2), optax.adam(0.1))


def run(folder=None, epochs=2, seed=0, **options):
    return jgd.fit(
        METHOD,
        jnp.zeros(2),
        X,
        batch_size=3,
        epochs=epochs,
        key=jax.random.key(seed),
        checkpoint=folder,
        **options,
    )


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run of two epochs, with checkpoints after each; and what it ends in."""
    folder = tmp_path_factory.mktemp("kept") / "run"
    run(jgd.Checkpoint(folder, every=4))
    return folder


@pytest.fixture(scope="module")
def whole():
    return run(epochs=3)


def checkpoints(folder):
    return sorted(path.name for path in Path(folder).glob("update-*") if path.is_dir())


def files_of(folder):
    """The files of the newest checkpoint."""
    (newest,) = Path(folder).glob("update-8-????????????")
    return sorted(path.relative_to(folder) for path in newest.rglob("*") if path.is_file())


def check(kept, whole, tmp_path, damage, number):
    """Damages a copy of a checkpoint; the run must end right, and say what it passed over if it did."""
    copy = tmp_path / f"copy-{number}"
    shutil.copytree(kept, copy)
    damage(copy)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        got = run(copy, epochs=3)
    shutil.rmtree(copy)
    chex.assert_trees_all_equal(got, whole)
    said = [str(one.message) for one in said if issubclass(one.category, RuntimeWarning)]
    assert all(
        "update-8-" in one and "cannot be read" in one and "goes on from update-4-" in one for one in said
    )
    return bool(said)


def flip(name, byte, bit):
    def damage(folder):
        raw = bytearray((folder / name).read_bytes())
        raw[byte] ^= 1 << bit
        (folder / name).write_bytes(raw)

    return damage


def cut(name, size):
    return lambda folder: os.truncate(folder / name, size)


def cases(kept):
    flips = [(name, k) for name in files_of(kept) for k in range((kept / name).stat().st_size)]
    return flips


class TestDamage:
    def test_flipped_bits_and_cut_files(self, kept, whole, tmp_path):
        draw = np.random.default_rng(0)
        places = cases(kept)
        for number, k in enumerate(draw.choice(len(places), 12, replace=False)):
            check(kept, whole, tmp_path, flip(*places[k], int(draw.integers(8))), f"flip-{number}")
        for number, k in enumerate(draw.choice(len(places), 6, replace=False)):
            check(kept, whole, tmp_path, cut(*places[k]), f"cut-{number}")

    @pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 13])
    def test_every_byte_that_is_read_is_covered(self, kept, every):
        """The manifest finds each flip and cut of each file that a resumed run reads, without a run."""
        (newest,) = kept.glob("update-8-????????????")
        manifest.check_files(newest)
        covered = {*json.loads((newest / "jgd.json").read_text().partition("\n")[2])["files"], "jgd.json"}
        for name in covered:
            path = newest / name
            raw = path.read_bytes()
            try:
                for k in range(0, len(raw), every):
                    for damaged in (raw[:k] + bytes([raw[k] ^ (1 << k % 8)]) + raw[k + 1 :], raw[:k]):
                        path.write_bytes(damaged)
                        with pytest.raises(manifest.DamagedError):
                            manifest.check_files(newest)
            finally:
                path.write_bytes(raw)

    def test_what_is_not_covered_is_not_read(self, kept, whole, tmp_path):
        (newest,) = kept.glob("update-8-????????????")
        covered = json.loads((newest / "jgd.json").read_text().partition("\n")[2])["files"]
        others = [name for name in files_of(kept) if str(name.relative_to(newest.name)) not in covered]

        def spoil(folder):
            for name in others:
                if name.name != "jgd.json":
                    (folder / name).write_bytes(b"\xff")

        assert len(others) > 1
        assert not check(kept, whole, tmp_path, spoil, "spoiled")

    @pytest.mark.slow
    def test_every_byte_flipped_and_every_length(self, kept, whole, tmp_path):
        """Each goes through `fit`: some ten thousand runs. JGD_BYTES takes one of so many, 40 in CI's size."""
        places = cases(kept)[:: int(os.environ.get("JGD_BYTES", 40))]
        for number, (name, k) in enumerate(places):
            check(kept, whole, tmp_path, flip(name, k, k % 8), f"flip-{number}")
            check(kept, whole, tmp_path, cut(name, k), f"cut-{number}")


class TestOthersThings:
    def test_nothing_else_in_the_folder_is_touched(self, folder):
        for name in ("0", "2024", "1/d", "update-4", "update-4-other", "update-8-0123456789ab.old", "notes"):
            (folder / name).mkdir(parents=True)
            (folder / name / "mine").write_text(name)
        (folder / "4.orbax-checkpoint-tmp").mkdir()
        before = sorted(path.relative_to(folder) for path in folder.rglob("*"))
        run(jgd.Checkpoint(folder, every=1, keep=1), epochs=3)
        run(jgd.Checkpoint(folder, every=1, keep=1), epochs=4)
        assert len(checkpoints(folder)) == 4  # its own one, and three that are not
        for path in before:
            assert (folder / path).exists()

    def test_another_run_in_a_folder_within(self, folder):
        inner = run(folder / "1", seed=1)
        run(jgd.Checkpoint(folder, every=1, keep=1), epochs=4)
        chex.assert_trees_all_equal(run(folder / "1", seed=1), inner)

    def test_another_runs_checkpoints_are_never_removed(self, kept, folder):
        shutil.copytree(kept, folder)
        before = checkpoints(folder)
        with pytest.raises(ValueError, match="holds another run"):
            run(jgd.Checkpoint(folder, every=1, keep=1), seed=1)
        for path in folder.rglob("jgd.json"):
            path.write_text("")
        with pytest.raises(ValueError, match=r"holds another run, of which update-8-.* cannot be read"):
            run(jgd.Checkpoint(folder, every=1, keep=1), seed=1)
        assert checkpoints(folder) == before


class TestOneRunAtATime:
    def test_in_one_process(self, folder):
        said = []

        def second():
            try:
                run(folder)
            except BlockingIOError as error:
                said.append(str(error))

        def callback(state, info):
            if int(state.step) == 2:
                thread = threading.Thread(target=second)
                thread.start()
                thread.join()

        first = run(folder, callback=callback)
        assert len(said) == 1 and "another run is at work in" in said[0] and "folder of its own" in said[0]
        chex.assert_trees_all_equal(run(folder), first)

    def test_in_two_processes_and_after_a_kill(self, folder):
        holder = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "import sys, time; from pathlib import Path; from jgd._fit.lock import Lock\n"
                "lock = Lock(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)",
                folder,
            ],
            stdout=subprocess.PIPE,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        folder.mkdir(parents=True, exist_ok=True)
        try:
            assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
            with pytest.raises(BlockingIOError, match="another run is at work"):
                run(folder)
        finally:
            holder.kill()
            holder.communicate()
        run(folder)

    def test_a_child_that_was_forked_does_not_keep_it(self, folder):
        folder.mkdir()
        lock, (reader, writer) = Lock(folder), os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            child = os.fork()
        if not child:
            os.close(writer)
            os.read(reader, 1)  # until the parent goes on
            os._exit(0)
        lock.release()
        try:
            run(folder)
        finally:
            os.close(writer)
            os.close(reader)
            os.waitpid(child, 0)


# The store's own threads and event loops end in what they met; what matters is what `fit` says.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
class TestStorage:
    @pytest.fixture(autouse=True)
    def nothing_is_left_behind(self):
        yield
        gc.collect()

    @pytest.mark.parametrize("path", ["gs://bucket/run", "s3://bucket/run", "file:///tmp/run"])
    def test_an_address_is_refused_at_once(self, path):
        with pytest.raises(ValueError, match=f"must be the path of a folder, got the address '{path}'"):
            run(path)

    def test_a_full_disk(self, tmp_path):
        mounted = tmp_path / "small"
        mounted.mkdir()
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", mounted], capture_output=True
        )
        if made.returncode:
            pytest.skip("a small file system needs the right to mount one; RLIMIT_FSIZE is tried elsewhere")
        try:
            (mounted / "filler").write_bytes(b"\0" * 56 * 1024)
            with pytest.warns(
                RuntimeWarning, match="could not be written to .* The training goes on without it"
            ):
                got = run(mounted / "run", callback=lambda state, info: None)
            chex.assert_trees_all_equal(got, run(callback=lambda state, info: None))
            (mounted / "filler").unlink()
            subprocess.run(["mount", "-o", "remount,size=8m", mounted], check=True)
            chex.assert_trees_all_equal(run(mounted / "run", epochs=3), run(epochs=3))
        finally:
            subprocess.run(["umount", mounted], check=True)

    @pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="who owns a folder may write to it")
    def test_no_right_to_write(self, tmp_path):
        folder = tmp_path / "closed"
        folder.mkdir(mode=0o555)
        os.chmod(tmp_path, 0o755)
        made = subprocess.run(["mount", "--bind", folder, folder], capture_output=True)
        if made.returncode or subprocess.run(["mount", "-o", "remount,ro,bind", folder]).returncode:
            pytest.skip("needs the right to mount")
        try:
            with pytest.raises(OSError, match="nothing can be written to the folder"):
                run(folder)
        finally:
            subprocess.run(["umount", folder], check=True)

    def test_a_save_that_fails_leaves_the_result(self, folder, monkeypatch):
        def refuse(*args, **options):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(manifest, "write", refuse)
        with pytest.warns(RuntimeWarning, match="there is none before it.*Permission denied"):
            got = run(jgd.Checkpoint(folder, every=4))
        monkeypatch.undo()
        chex.assert_trees_all_equal(got, run())
        chex.assert_trees_all_equal(run(folder), run())
