"""What a run walks, and how far: arrays by a schedule of their own, or an iterable of batches."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jgd._errors import describe
from jgd._fit.data import Examples, examples_of, is_batches
from jgd._fit.feed import batches_of_iterable
from jgd._fit.placement import batch_axes
from jgd._fit.schedule import Length, Schedule, schedule_of
from jgd._fit.standing import Standing
from jgd._fit.stepwise import Batch, batches_of_examples


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
        data = [describe(x) for x in jax.tree.leaves(self.examples.args)]
        return {"data": data, "batch_size": self.schedule.epoch.batch_size}

    def is_past(self, at: Standing) -> bool:
        """Whether a run stands behind its own end."""
        return at.batches > self.schedule.batches

    def batches(self, start: Standing, *, keep_position: bool) -> Iterator[Batch]:
        """The batches that are left; their number says where they stand."""
        del keep_position
        return batches_of_examples(self.examples, self.key, self.schedule, start.batches)


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
        return {"data": "batches", "batch_size": None}

    def is_past(self, at: Standing) -> bool:
        """Whether a run stands behind its own end."""
        if self.length.steps is not None:
            return at.batches * self.length.inner_steps > self.length.steps
        epoch, place = at.position[:2] if at.position else (0, 0)
        return epoch + (place > 0) > (self.length.epochs or 0)

    def batches(self, start: Standing, *, keep_position: bool) -> Iterator[Batch]:
        """The batches that are left, each with where the iterable stands after it if that is to be kept."""
        return batches_of_iterable(
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
    return Arrays(examples, key, schedule_of(length, examples.size, batch_size))


def _over(mesh: Mesh, axes: tuple[str, ...]) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(axes))


def _check_batches(data: Iterable[Any], batch_size: Any, length: Length) -> None:
    if batch_size is not None:
        raise ValueError(
            f"`batch_size`={batch_size!r} was given, but `data` is an iterable ({type(data).__name__}) whose "
            "batches are made: give None; or give the examples as arrays, several arguments as a tuple"
        )
    if iter(data) is data and length.epochs is not None and length.epochs > 1:
        raise ValueError(
            f"`data` is an iterator, which can be walked only once, but `epochs` is {length.epochs}: give "
            "what starts anew each time, such as a list or a data loader, or say `steps`"
        )
