"""A tenant that floods the machine."""

import numpy as np
import pytest

from jaxllm.simulation import MACHINES, Arrivals, Trace, draw_workload, limits_of, simulate

MACHINE = MACHINES["opt-13b/a100"]
LIMITS = dict(max_num_seqs=16, max_num_batched_tokens=512, page_size=16)
QUIET, RATE = 41, 1.0  # well below its share of what the machine serves, 9 requests a second


def p99_ttft(policy: str, times: int) -> float:
    """Of a tenant, while another sends `times` as many requests."""
    quiet = draw_workload("alpaca", QUIET, Arrivals(RATE), seed=0, max_model_len=2048)
    other = draw_workload("alpaca", QUIET * times, Arrivals(RATE * times), seed=1, max_model_len=2048)
    order = np.argsort(np.r_[quiet.arrivals, other.arrivals], kind="stable")
    join = lambda name: np.r_[getattr(quiet, name), getattr(other, name)][order]
    tenants = ["quiet" if i < QUIET else "other" for i in order]
    trace = Trace(join("arrivals"), join("prompts"), join("outputs"), tenants=tenants)
    outcome = simulate(trace, MACHINE, *limits_of(MACHINE, policy=policy, **LIMITS))
    return float(np.percentile((outcome.first_token - trace.arrivals)[order < QUIET], 99))


@pytest.mark.parametrize("policy", ["vtc", "adaptive"])
def test_a_tenant_is_shielded_from_one_that_floods(policy):
    """From as many requests as it sends itself, of which the machine hardly takes notice, to 100 times as many."""
    alone = p99_ttft(policy, 1)
    assert alone < 0.2 and p99_ttft(policy, 100) < 1.5 * alone
    assert p99_ttft("fcfs", 20) > 100 * alone
