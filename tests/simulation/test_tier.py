"""Host memory behind the simulated device's pages."""

import numpy as np
import pytest

from jaxllm.simulation import MACHINES, Arrivals, draw_workload, figures, limits_of
from jaxllm.simulation.simulate import _Simulation
from jaxllm.simulation.tier import estimated_turns

MACHINE = MACHINES["opt-13b/a100"]
LIMITS = dict(max_num_seqs=24, max_num_batched_tokens=512, page_size=16)
TRACE = draw_workload("sharegpt", 90, Arrivals(3.0), seed=1, max_model_len=2048)


def run(swap, host_bytes=float("inf"), policy="mlfq"):
    simulation = _Simulation(TRACE, MACHINE, *limits_of(MACHINE, policy=policy, **LIMITS), False, True, None, swap, host_bytes)
    return simulation, figures(simulation.run())


@pytest.mark.parametrize("policy", ["mlfq", "adaptive"])
def test_nothing_is_lost_and_less_is_computed_again(policy):
    (_, recompute), (reactive, waited), (proactive, ahead) = [run(swap, policy=policy) for swap in ("recompute", "reactive", "proactive")]
    for simulation in (reactive, proactive):
        pool = simulation.scheduler.pool
        assert simulation.left == [0] * len(TRACE)
        assert pool.num_free == pool.capacity and not any(pool._users) and not pool.owner and not pool.host
        assert not simulation.scheduler.preempted
    assert recompute["preemptions"] > 40 and recompute["swapped_in_bytes"] == recompute["exposed_swap_s"] == 0
    assert waited["recomputed_tokens"] < recompute["recomputed_tokens"] / 2
    assert 0 <= ahead["exposed_swap_s"] / ahead["swapped_in_bytes"] < 0.5 * waited["exposed_swap_s"] / waited["swapped_in_bytes"]
    # Reactively, each page that moves is waited for.
    moved = waited["swapped_in_bytes"] + waited["swapped_out_bytes"]
    assert waited["exposed_swap_s"] == pytest.approx(moved / MACHINE.host_bandwidth)


def test_a_host_without_room_is_none():
    (_, none), (_, recompute) = run("reactive", host_bytes=1.0), run("recompute")
    assert none["swapped_in_bytes"] == 0 and none["recomputed_tokens"] > 0.3 * recompute["recomputed_tokens"]
    simulation, little = run("proactive", host_bytes=2e9)
    assert 0 < simulation.scheduler.pool.host_pages * simulation.scheduler.page_bytes <= 2e9 and little["swapped_in_bytes"] > 0


def test_the_same_again():
    (a, _), (b, _) = run("proactive"), run("proactive")
    assert np.array_equal(a.finished, b.finished) and a.tier.figures() == b.tier.figures()


def test_estimated_turns_by_hand():
    """Two of quantum 31 and 62 ms run, of which nothing is spent; those who wait are of queues 2 and 3, one at a time after them."""
    from jaxllm.serving.kv_cache import PagePool
    from jaxllm.serving.scheduler import Scheduler, SchedulerConfig

    scheduler = Scheduler(SchedulerConfig(2, 512, 2048, 16, policy="mlfq"), PagePool(500))
    for i, prompt in enumerate((100, 300, 400, 900)):  # 14, 42, 56, 126 ms of prompt
        scheduler.add(i, prompt, 50)
    scheduler.schedule(0.0)
    waits = [(s.id, turn) for s, turn in estimated_turns(scheduler, 0.0).items()]
    q = [0.031, 0.062, 0.124, 0.248]
    assert waits == [(2, pytest.approx((q[0] + q[1]) / 2)), (3, pytest.approx((q[0] + q[1] + q[1]) / 2))]
    waits = dict((s.id, turn) for s, turn in estimated_turns(scheduler, 2.99).items())
    assert waits == {2: pytest.approx(0.01), 3: pytest.approx(0.01)}  # starving after 3 s: promoted
