"""What a controller leaves for the next one."""

from pathlib import Path

import pytest

from quire.cluster.controller.desired_state import FILE_NAME, DesiredState, drop_state, has_state, load_state, save_state
from quire.cluster.controller.groups import GroupTable, RankInfo
from quire.common.errors import InternalError


def test_a_table_comes_back_as_it_was(tmp_path: Path) -> None:
    table = GroupTable()
    table.on_scale_asked("m", 4, tensor_parallel_size=2)
    for index in (0, 1, 2):
        ranks = (RankInfo(0, "cpu", "host", 10 + index), RankInfo(1, "cpu", "host", 20 + index))
        table.on_ready(f"m-{index}", 1, ranks=ranks, max_request_tokens=10, block_bytes=7, now_s=5.5)
    table.on_lost("m-2", 1, "died", now_s=6.0)
    table.on_drain_asked("m-1")
    table.on_restart_asked(["m-0", "m-2"])
    state = DesiredState(table, scheduler_id="abc", num_schedulers=3, discovery_port=1234)
    save_state(tmp_path, state)
    assert load_state(tmp_path) == state
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_there_is_none_before_the_first_and_after_the_last(tmp_path: Path) -> None:
    assert load_state(tmp_path) is None
    save_state(tmp_path, DesiredState())
    assert has_state(tmp_path)
    drop_state(tmp_path)
    assert not has_state(tmp_path)
    drop_state(tmp_path)


def test_a_file_that_is_not_ours_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text('{"table": 3}')
    with pytest.raises(InternalError, match="cannot be read"):
        load_state(tmp_path)
