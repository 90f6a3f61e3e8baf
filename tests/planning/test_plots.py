"""Plans as pictures: what is drawn is what the plan says."""

import pytest

from jaxllm.errors import ConfigError
from jaxllm.launch.plan import Config
from jaxllm.planning.plots import plot_plan
from jaxllm.planning.serving import ServingPlan, StepReport


@pytest.mark.parametrize("fits,estimate", [(True, 0.004), (False, None)])
def test_points_and_memory_are_the_plans(tmp_path, fits, estimate):
    pytest.importorskip("matplotlib")
    step = StepReport(16, 8 * 10**9, 7 * 10**9, 16e9, 0.002, estimate, 8e3, [], 0, 1.0)
    held = {"parameters": 8 * 2**30, "kv_cache": 4 * 2**30, "temporaries": 2**30, "other": 0}
    held |= {"total": 13 * 2**30, "capacity": (16 if fits else 10) * 2**30}
    figure = plot_plan(ServingPlan(fits, held, step, None, 1, 1.0, None, {"chip": "v5e", "bandwidth": 819e9, "peak_flops": 197e12}))
    roof, bar = figure.axes
    points = {line.get_label().partition(",")[0]: line.get_xydata()[0].tolist() for line in roof.lines[1:]}
    assert points["decode"] == pytest.approx([2.0, 8.0])
    assert points.get("the compiler's estimate") == (None if estimate is None else pytest.approx([2.0, 4.0]))
    assert roof.lines[0].get_xydata()[1].tolist() == pytest.approx([197e12 / 819e9, 197.0])
    assert [patch.get_height() for patch in bar.patches] == [8, 4, 1, 0, 3 if fits else 0]
    figure.savefig(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["plan.txt", "missing/plan.png"])
def test_where_it_cannot_be_drawn_is_refused_before_compiling(tmp_path, name):
    with pytest.raises(ConfigError, match=r"ends in \.png, \.svg or \.pdf, in a folder that exists"):
        Config(model="demo", topology="v5e:1x1", plot=str(tmp_path / name))
