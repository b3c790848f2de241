"""What a run walks, and how far: arrays by a schedule of their own, or an iterable of batches."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jgd._fit.batch import Feed
from jgd._fit.data import Examples, examples_of, is_batches
from jgd._fit.feed import LoaderFeed
from jgd._fit.fingerprint import fingerprints
from jgd._fit.identity import list_identity
from jgd._fit.placement import batch_axes, on_mesh
from jgd._fit.run_state import RunState
from jgd._fit.schedule import Length, Schedule, schedule_of
from jgd._fit.stepwise import ArrayFeed
from jgd._fit.stream import is_stream


@dataclass(frozen=True)
class Arrays:
    """All the examples, in an order drawn from a key."""

    examples: Examples
    key: jax.Array
    schedule: Schedule

    @property
    def updates(self) -> int:
        """The updates of the whole run."""
        return self.schedule.updates

    @property
    def identity(self) -> dict[str, Any]:
        """What makes the data of a run what they are, in JSON."""
        leaves = jax.tree.leaves(self.examples.args)
        return {"data": fingerprints(leaves), "batch_size": self.schedule.epoch.batch_size}

    def is_past(self, at: RunState) -> bool:
        """Whether a run stands behind its own end."""
        return at.batches + (at.repeats > 0) > self.schedule.batches

    def feed(self, start: RunState, *, keep_position: bool) -> Feed:
        """The batches that are left; their number says where they stand."""
        del keep_position
        return ArrayFeed(self.examples, self.key, self.schedule, start.batches)


@dataclass(frozen=True)
class Batches:
    """Batches that someone else makes."""

    data: Iterable[Any]
    in_axes: Any
    length: Length
    sharding: NamedSharding | None

    @property
    def updates(self) -> int | None:
        """The updates of the whole run, where the iterable says how many batches it has."""
        if self.length.epochs is None:
            return self.length.steps
        batches: Any = self.data
        per_batch = self.length.epochs * self.length.inner_steps
        return len(batches) * per_batch if hasattr(batches, "__len__") else None

    @property
    def identity(self) -> dict[str, Any]:
        """What makes the data of a run what they are, in JSON."""
        digest = f" {list_identity(self.data)}" if isinstance(self.data, list) else ""
        return {"data": f"batches{digest}", "batch_size": None}

    def is_past(self, at: RunState) -> bool:
        """Whether a run stands behind its own end."""
        if self.length.steps is not None:
            return at.batches * self.length.inner_steps + at.repeats > self.length.steps
        epoch, place = (at.position.epoch, at.position.place) if at.position else (0, 0)
        return epoch + (place > 0 or at.repeats > 0) > (self.length.epochs or 0)

    def feed(self, start: RunState, *, keep_position: bool) -> Feed:
        """The batches that are left, each with where the loader stands after it."""
        return LoaderFeed(
            self.data, self.length, start.position, in_axes=self.in_axes, keep_position=keep_position,
            sharding=self.sharding,
        )  # fmt: skip


Source = Arrays | Batches


def source_of(
    data: Any,
    params: Any,
    in_axes: Any,
    *,
    batch_size: Any,
    length: Length,
    key: jax.Array,
    mesh: Mesh | None,
) -> Source:
    """The data of a run, laid out on the mesh where there is one.

    Raises:
        TypeError: a leaf is not an array; `batch_size` is not an int.
        ValueError: `data` and `batch_size` do not fit each other; the data are empty or disagree in length.
    """
    if is_batches(data):
        _check_batches(data, batch_size, length)
        sharding = mesh and _over(mesh, batch_axes(mesh, params) or mesh.axis_names)
        return Batches(data, in_axes, length, sharding)
    examples = examples_of(data, in_axes)
    if mesh is not None and (axes := batch_axes(mesh, params, data)):
        examples = replace(examples, sharding=_over(mesh, axes))
        if examples.is_typed:  # what is taken from arrays elsewhere has no such type
            examples = replace(examples, args=on_mesh(examples.args, mesh))
    return Arrays(examples, key, schedule_of(length, examples.size, batch_size))


def _over(mesh: Mesh, axes: tuple[str, ...]) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(axes))


def _check_batches(data: Iterable[Any], batch_size: Any, length: Length) -> None:
    if batch_size is not None:
        raise ValueError(
            f"`batch_size`={batch_size!r} was given, but `data` is an iterable ({type(data).__name__}) whose "
            "batches are made: give None; or give the examples as arrays, several arguments as a tuple"
        )
    if length.epochs is not None and length.epochs > 1 and is_stream(data):
        raise ValueError(
            f"`data` is an iterator, which can be walked only once, but `epochs` is {length.epochs}: give "
            "what starts anew each time, such as a list or a data loader, or say `steps`"
        )
