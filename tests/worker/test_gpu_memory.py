import pytest

from quire.common.errors import ConfigError
from quire.worker.gpu_memory import blocks_that_fit, check_gpu_holds, check_step_fits

GIB = 2**30


def test_what_the_gpu_cannot_hold_is_refused_with_the_arithmetic() -> None:
    gpu = {"block_bytes": 2**21, "weight_bytes": 15 * GIB, "free_bytes": 79 * GIB}
    check_gpu_holds(num_blocks=None, **gpu)
    check_gpu_holds(num_blocks=63 * 512, **gpu)
    with pytest.raises(
        ConfigError, match=r"weights of 15.00 GiB, 32257 KV blocks of 2097152 bytes .63.00 GiB.*room for 32256 blocks; lower"
    ) as caught:
        check_gpu_holds(num_blocks=63 * 512 + 1, **gpu)
    assert caught.value.reason == "NOT_ENOUGH_MEMORY"


def test_a_model_that_the_gpu_cannot_hold_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"weights of 78.00 GiB.* the GPU has 79.00 GiB free, which is too little for this model"):
        check_gpu_holds(num_blocks=None, block_bytes=2**21, weight_bytes=78 * GIB, free_bytes=79 * GIB)


def test_the_pool_takes_what_the_largest_step_and_the_margin_leave() -> None:
    assert blocks_that_fit(free_bytes=64 * GIB, step_bytes=4 * GIB, block_bytes=2**21) == (64 - 1 - 5) * 512
    with pytest.raises(
        ConfigError, match=r"6.00 GiB free; the largest step takes 4.00 GiB, with its margin 6.00 GiB, .*lower max_batched_tokens"
    ):
        blocks_that_fit(free_bytes=6 * GIB, step_bytes=4 * GIB, block_bytes=2**21)


def test_a_pool_of_told_size_leaves_room_for_the_largest_step() -> None:
    check_step_fits(num_blocks=60 * 512, free_bytes=64 * GIB, step_bytes=4 * GIB, block_bytes=2**21)
    with pytest.raises(ConfigError, match=r"64.00 GiB free; beside the 4.00 GiB .* room for 30720 KV blocks .* and 30721 are asked for"):
        check_step_fits(num_blocks=60 * 512 + 1, free_bytes=64 * GIB, step_bytes=4 * GIB, block_bytes=2**21)
    with pytest.raises(ConfigError, match="room for 0 KV blocks"):
        check_step_fits(num_blocks=1, free_bytes=GIB, step_bytes=4 * GIB, block_bytes=2**21)
