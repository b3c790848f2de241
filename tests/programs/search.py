"""Many random programs in processes of their own, and what became of each."""

import collections
import multiprocessing
import multiprocessing.connection
import time
import traceback
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT = 180  # seconds for one program
LIFE = 250  # programs after which a process is made anew: what XLA compiled fills memory


@dataclass(frozen=True)
class Outcome:
    """What became of a program: "right", "not finite", "refused by JAX", or how it failed.

    `kind` tells failures apart: the quantity that is wrong, or what is raised and where.
    """

    number: int
    result: str
    kind: str = ""
    detail: str = ""

    @property
    def is_failure(self) -> bool:
        return not self.result.startswith(("right", "not finite", "refused by JAX"))


def outcome_of(
    seed: int,
    number: int,
    features: Collection[str],
    without: Collection[int] = (),
    plain: Collection[int] = (),
) -> Outcome:
    """Draws the program and puts a quarter of the questions to it, which one its number says, in this process."""
    from programs.check import QUARTERS, Refused, check
    from programs.writer import random_program

    try:
        program = random_program([seed, number], features, without, plain)
    except Exception as error:
        return Outcome(number, "the generator raises", *_described(error))
    try:
        return Outcome(number, "right" if check(program, QUARTERS[number % len(QUARTERS)]) else "not finite")
    except Refused as error:
        return Outcome(number, "refused by JAX", detail=str(error)[:300])
    except AssertionError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        quantity = next((line for line in lines if "tolerance" not in line), "").split("[")[0].split(":")[0]
        when = "after the change: " if lines[0].startswith("after") else ""
        return Outcome(number, "wrong", f"{when}{quantity}", f"{program.mode}: {' '.join(lines)[:300]}")
    except Exception as error:
        return Outcome(number, "raises", *_described(error))


def _described(error: BaseException) -> tuple[str, str]:
    """The type and the innermost place in our own code; and the message."""
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if {"jgd", "programs"} & set(Path(f.filename).parts)
    ]
    place = f" in {Path(frames[-1].filename).name}, {frames[-1].name}" if frames else ""
    return f"{type(error).__name__}{place}", (str(error).strip().splitlines() or [""])[0][:300]


def search(
    seed: int, numbers: Collection[int], features: Collection[str], processes: int
) -> Iterator[Outcome]:
    """The outcomes of these programs as they come. A program that hangs or ends its process is an outcome as well."""
    waiting = collections.deque(numbers)
    workers = [_Worker(seed, features) for _ in range(min(processes, len(waiting)))]
    try:
        for worker in workers:
            worker.give(waiting.popleft())
        while workers:
            multiprocessing.connection.wait([w.ours for w in workers], timeout=1)
            for worker in list(workers):
                found = worker.finished()
                if found is None:
                    continue
                yield found
                if waiting:
                    worker.give(waiting.popleft())
                else:
                    workers.remove(worker)
                    worker.stop()
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """A process that is given one program at a time."""

    def __init__(self, seed: int, features: Collection[str]):
        self.seed, self.features = seed, features
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.ours, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, self.seed, self.features), daemon=True)
        self.process.start()
        theirs.close()
        self.done = 0

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.ours.close()

    def give(self, number: int) -> None:
        if self.done >= LIFE:
            self.stop()
            self.start()
        self.number, self.since = number, time.monotonic()
        self.done += 1
        self.ours.send(number)

    def finished(self) -> Outcome | None:
        """What became of the program that was given; None while it runs."""
        try:
            if self.ours.poll():
                return self.ours.recv()
        except (EOFError, OSError):
            self.process.join()
            lost = Outcome(self.number, "ends the process", f"exit code {self.process.exitcode}")
        else:
            if time.monotonic() - self.since < TIMEOUT:
                return None
            lost = Outcome(self.number, "hangs", f"over {TIMEOUT} s")
        self.stop()
        self.start()
        return lost


def _work(theirs: Any, seed: int, features: Collection[str]) -> None:
    import warnings

    import conftest  # noqa: F401  (sets how XLA compiles)
    import jax

    jax.config.update("jax_enable_x64", True)
    warnings.simplefilter("ignore")
    while True:
        number = theirs.recv()
        theirs.send(outcome_of(seed, number, features))
        if number % 10 == 0:
            jax.clear_caches()


def shrunk(seed: int, failed: Outcome, features: Collection[str]) -> tuple[list[int], list[int]]:
    """The steps and operands that a failing program can do without, and the operands that can be plain leaves."""
    from programs.writer import random_program

    def fails(without: set[int], plain: set[int]) -> bool:
        found = outcome_of(seed, failed.number, features, without, plain)
        return found.result == failed.result and (found.result == "wrong" or found.kind == failed.kind)

    numbers = list(range(random_program([seed, failed.number], features).steps))
    without: set[int] = set()
    length = max(len(numbers) // 2, 1)
    while length:
        for start in range(0, len(numbers), length):
            some = set(numbers[start : start + length]) - without
            if some and fails(without | some, set()):
                without |= some
        length //= 2
    plain: set[int] = set()
    for number in set(numbers) - without:
        if fails(without, plain | {number}):
            plain.add(number)
    return sorted(without), sorted(plain)
