"""How long ranks wait for one another in a step, predicted from its plan. No torch."""

from chunkflow.planning.planner import Plan, PlanSettings

PESSIMISTIC_FLOPS = 200e12  # a second, of a GPU that trains in bf16


def longest_wait(plan: Plan, settings: PlanSettings, flops: float = PESSIMISTIC_FLOPS) -> float:
    """Seconds of the longest wait of a rank, on devices that compute `flops` FLOPs a second, in the plan of
    all replicas that `plan_step` made with these settings. Recomputation of layers in backward and messages'
    own time are not counted.

    A rank waits for messages of its pipeline, and at its program's end, where gradients are reduced and
    clipped, for the rank that ends last. In lockstep (ZeRO-3) it waits in every slot, for one action at most.
    """
    stages = settings.stages or (settings.cost,)
    unit = sum(cost.per_token for cost in stages) / len(stages) / flops  # seconds
    timelines = [timeline for replica in plan.simulations.values() for timeline in replica.timeline]
    if settings.lockstep:
        return unit * max(end - start for timeline in timelines for _, start, end in timeline)
    ends = [timeline[-1].end if timeline else 0.0 for timeline in timelines]
    longest = max(ends) - min(ends)
    for timeline in timelines:
        ready = 0.0
        for _, start, end in timeline:
            longest, ready = max(longest, start - ready), end
    return unit * longest
