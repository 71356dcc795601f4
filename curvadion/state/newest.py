"""The newest checkpoint that can be loaded, on all ranks the same."""

import logging
import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from curvadion.sharding.agreement import ANOTHER
from curvadion.sharding.group import gather, is_first_rank

logger = logging.getLogger("curvadion.checkpoint")


def saved_steps(folder: Path) -> list[int]:
    """Return N of the folders step-N of torch.distributed.checkpoint whose save came to its end."""
    finished = [path.parent.name for path in folder.glob("step-*/.metadata")]  # which is written last
    return steps_of(finished)


def steps_of(names: Iterable[str]) -> list[int]:
    """Return N of each name that is step-N, and nothing more."""
    return [int(name[5:]) for name in names if re.fullmatch(r"step-\d+", name, re.ASCII)]


def load_newest(
    steps: Iterable[int],
    load: Callable[[int], object],
    within: Callable[[], AbstractContextManager[None]],
    say: Callable[[str], object] = logger.warning,
) -> int | None:
    """Load the newest checkpoint that every rank can load; every rank calls it.

    One that some rank cannot load, because data or metadata are damaged or missing or hold what the optimizer
    refuses, is passed over by all, with a line on rank 0 that says why.

    Args:
        steps: of the checkpoints there are; rank 0's count.
        load: loads that of a step.
        within: `CurvaDion.loading`.
        say: takes the lines.

    Returns: the step; None if there are no checkpoints.

    Raises:
        RuntimeError: on every rank, if there are some, and none can be loaded: what was loaded in part must
            not be trained on.
    """
    candidates, *_ = gather(sorted(set(steps), reverse=True))
    passed_over = []
    for step in candidates:
        problem = None
        try:
            with within():
                load(step)
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            problem = error
        problems = gather(problem and _in_words(problem))
        if not any(problems):
            return step
        where = [(rank, said) for rank, said in enumerate(problems) if said]
        rank, why = next(((r, said) for r, said in where if ANOTHER not in said), where[0])
        passed_over.append(f"step-{step}, which cannot be loaded (rank {rank}: {why})")
        if is_first_rank():
            say(f"passed over {passed_over[-1]}")
        if step == candidates[-1]:
            raise RuntimeError(
                f"some checkpoint must be one that loads; none of {len(candidates)} is: {passed_over[0]}; "
                "what was loaded in part must not be trained on; load another, or start in an empty folder"
            ) from problem
    return None


def _in_words(error: BaseException) -> str:
    """Return an error's kind and sentence on one line; of several ranks' the first."""
    if isinstance(error, CheckpointException) and error.failures:
        error = error.failures[min(error.failures)][0]
    return " ".join(f"{type(error).__name__}: {error}".split())
