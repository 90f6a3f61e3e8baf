"""Many steps of one token a sequence at once, for those who have no device to wait for (`jaxllm.simulation`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxllm.serving.scheduler import Scheduler, StepPlan


def can_repeat(scheduler: Scheduler, plan: StepPlan) -> bool:
    """Whether the next plan will be like this one, the last, if nothing comes or ends, ranks are not due and pages suffice."""
    scheduled = plan.scheduled
    return (
        len(scheduled) == plan.num_decode == plan.num_tokens == len(scheduler.running)
        and all(s.samples and not s.admitted for s in scheduled)
        and scheduler.settled
        and scheduler.config.recompute_beyond is None
    )


def most_repeats(scheduler: Scheduler, plan: StepPlan, most: int) -> int:
    """How many more plans like this one there are pages for, up to `most`, give or take."""
    size, room = scheduler.config.page_size, scheduler.num_unpromised
    spare = [len(s.sequence.pages) * size - s.sequence.num_computed for s in plan.scheduled]  # tokens that fit in the last pages
    if len(spare) * (most // size + 1) <= room:
        return most
    pages = lambda n: sum((n - free + size - 1) // size for free in spare if n > free)
    while most and pages(most) > room:
        most = most // 2 if most > 2 * size else most - 1
    return most


def repeat(scheduler: Scheduler, plan: StepPlan, times: int) -> None:
    """What `times` calls of `schedule`, each followed by `complete` of the plan before, would do, `plan` being the last that was
    made and not completed. `times` is no more than `most_repeats` says. Which page is whose may come out different."""
    size = scheduler.config.page_size
    for s in plan.scheduled:
        sequence = s.sequence
        computed = sequence.num_computed + times
        if computed > size * len(sequence.pages) and not scheduler.reserve(sequence, computed):
            raise AssertionError("there are fewer pages than most_repeats has found")
        sequence.num_computed = computed
        sequence.num_tokens += times
        sequence.tenant.service += 2 * times
