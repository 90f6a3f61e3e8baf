"""`bench schedule`."""

import json

from jaxllm.launch.__main__ import main
from jaxllm.serving.policies import POLICIES


def test_every_policy_is_kept_full(capfd):
    flags = ["--running", "8", "--waiting", "30", "--steps", "60", "--policy", ",".join(POLICIES)]
    assert main(["bench", "schedule", *flags, "--json"]) == 0
    result = json.loads(capfd.readouterr().out)["policies"]
    assert set(result) == set(POLICIES)
    for measured in result.values():
        assert measured["running"] + measured["waiting"] == 38 and measured["running"] > 4
        assert 0 < measured["least_ms"] <= measured["median_ms"] <= measured["p99_ms"]
    assert result["mlfq"]["preemptions"] > 0 == result["fcfs"]["preemptions"]
    assert main(["bench", "schedule", "--running", "0"]) == 2
