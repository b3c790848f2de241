"""Per-example gradients for JAX: everything you may ask of them, at about the price of their sum."""

from jgd._batches import shard_batch as shard_batch
from jgd._explain import ExplainRow as ExplainRow
from jgd._explain import Explanation as Explanation
from jgd._explain import explain as explain
from jgd._fit.checkpoint import Checkpoint as Checkpoint
from jgd._fit.fit import FitResult as FitResult
from jgd._fit.fit import fit as fit
from jgd._fit.history import History as History
from jgd._gradients import PerExampleGrads as PerExampleGrads
from jgd._gradients import per_example_grad as per_example_grad
from jgd._methods.descent import ascent as ascent
from jgd._methods.descent import descent as descent
from jgd._methods.descent import descent_ascent as descent_ascent
from jgd._methods.method import Method as Method
from jgd._methods.method import MethodState as MethodState
from jgd._methods.method import StepInfo as StepInfo
from jgd._reductions.linear import dot as dot
from jgd._reductions.linear import materialize as materialize
from jgd._reductions.linear import mean as mean
from jgd._reductions.linear import sum as sum
from jgd._reductions.moments import second_moment as second_moment
from jgd._reductions.moments import variance as variance
from jgd._reductions.natural import natural_gradient as natural_gradient
from jgd._reductions.norms import NoiseScale as NoiseScale
from jgd._reductions.norms import clipped_sum as clipped_sum
from jgd._reductions.norms import noise_scale as noise_scale
from jgd._reductions.norms import norms as norms
from jgd._reductions.pairs import gram as gram
from jgd._reductions.pairs import project as project
from jgd._reductions.statistics import BatchStatistics as BatchStatistics
from jgd._reductions.statistics import batch_statistics as batch_statistics
from jgd._reductions.statistics import smoothed as smoothed

__version__ = "0.1.0"

# Not `sum`, which would hide the builtin from whoever writes `from jgd import *`.
__all__ = [
    "BatchStatistics",
    "Checkpoint",
    "ExplainRow",
    "Explanation",
    "FitResult",
    "History",
    "Method",
    "MethodState",
    "NoiseScale",
    "PerExampleGrads",
    "StepInfo",
    "ascent",
    "batch_statistics",
    "clipped_sum",
    "descent",
    "descent_ascent",
    "dot",
    "explain",
    "fit",
    "gram",
    "materialize",
    "mean",
    "natural_gradient",
    "noise_scale",
    "norms",
    "per_example_grad",
    "project",
    "second_moment",
    "shard_batch",
    "smoothed",
    "variance",
]
