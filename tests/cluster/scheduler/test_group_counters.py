"""What the scheduler counts: in plain integers, over the terms of a group, without a metric library."""

import subprocess
import sys

from prometheus_client.parser import text_string_to_metric_families
from story import Story

from quire.cluster.metric_page import Families, page_of
from quire.cluster.scheduler.group_counters import Tally
from quire.common.messages import GroupStatus, Sample, Status
from quire.common.metric_names import METRICS, PREEMPTIONS, STEP_TIME, SWAP_TIME


def _status(story: Story) -> Status:
    story.scheduler.take_outbox()
    story.scheduler.status(1, story.now_s)
    (status,) = story.scheduler.take_outbox().to_controller
    assert isinstance(status, Status)
    return status


def _value(group: GroupStatus, metric: str, *labels: str) -> float:
    (value,) = [sample.value for sample in group.samples if sample.metric == metric and sample.labels == labels]
    return value


def test_the_scheduler_process_loads_no_metric_library() -> None:
    code = "import quire.cluster.scheduler.process, sys; sys.exit('prometheus_client' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


def test_an_observation_on_an_edge_belongs_to_the_bucket_below() -> None:
    tally = Tally(STEP_TIME)
    for value in (STEP_TIME.edges[0], STEP_TIME.edges[0] + 1e-9, 1e9):
        tally.observe(value)
    assert tally.counts[:2] == [1, 1]
    assert tally.counts[-1] == 1
    assert sum(tally.counts) == 3


def test_swaps_are_counted_with_their_bytes_and_each_once() -> None:
    story = Story(num_blocks=8, num_cpu_blocks=16, preemption="swap")
    for name in ("a", "b", "c"):
        story.submit(name, [ord(name), *range(7)], max_tokens=16)
    story.run()
    (group,) = _status(story).groups
    num_swaps = _value(group, PREEMPTIONS.name, "swap")
    assert num_swaps > 0
    assert _value(group, PREEMPTIONS.name, "recompute") == 0
    block_bytes = story.scheduler.groups["g0"].hellos[0].block_bytes
    assert _value(group, "quire_swap_bytes_total", "out") % block_bytes == 0
    durations = {entry.labels: sum(entry.counts) for entry in group.distributions if entry.metric == SWAP_TIME.name}
    assert durations["out",] == num_swaps
    assert 0 < durations["in",] <= num_swaps
    assert group.waste_ratio == 0.0, "nothing is held"


def test_waste_is_the_share_of_held_slots_without_a_token() -> None:
    story = Story(num_blocks=16)
    story.submit("a", range(5), max_tokens=40)
    while not story.completions.get(("a", 0)):
        story.step()
    group = story.scheduler.groups["g0"]
    (request,) = group.running.values()
    (sequence,) = request.sequences
    held = len(sequence.block_table) * 4
    assert group.status().waste_ratio == (held - sequence.num_planned) / held


def test_counters_go_on_over_a_groups_terms() -> None:
    story = Story()
    story.submit("a", range(5), max_tokens=3)
    story.run()
    before = _value(_status(story).groups[0], "quire_steps_total")
    story.detach("g0")
    story.attach("g0", term=2)
    story.submit("b", range(5), max_tokens=3)
    story.run()
    assert _value(_status(story).groups[0], "quire_steps_total") > before > 0


def test_every_sample_of_a_status_is_in_the_list_of_names_with_its_labels() -> None:
    story = Story()
    story.submit("a", range(5), max_tokens=3)
    story.run()
    families = Families()
    (group,) = _status(story).groups
    families.add_samples(("m", "g"), group.samples)
    families.add_distributions(("m", "g"), group.distributions)
    page = page_of([families], {}).body.decode()
    parsed = {family.name for family in text_string_to_metric_families(page)}
    sent = {sample.metric for sample in group.samples} | {entry.metric for entry in group.distributions}
    assert sent <= METRICS.keys()
    assert parsed == {name.removesuffix("_total") for name in sent}


def test_samples_of_a_newer_version_are_left_out() -> None:
    families = Families()
    families.add_samples(("m", "g"), [Sample("quire_of_tomorrow", (), 1.0)])
    assert page_of([families], {}).body == b""
