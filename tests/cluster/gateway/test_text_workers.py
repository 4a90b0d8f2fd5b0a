"""The threads for text work: their bounds."""

import asyncio
import json
import threading
from collections.abc import Iterator

import pytest
from fake_scheduler import demo_files
from gateway_parts import until

from quire.cluster.gateway.text_workers import TextWorkers
from quire.cluster.gateway.tokenization import PromptTokenizer
from quire.common.errors import Overloaded, Unavailable


@pytest.fixture
def may_end() -> Iterator[threading.Event]:
    """Set at the end at the latest, so that no thread outlives its test."""
    event = threading.Event()
    yield event
    event.set()


async def test_a_job_too_many_is_refused_and_one_that_ended_makes_room(may_end: threading.Event) -> None:
    workers = TextWorkers(num_threads=1, max_jobs=2)
    jobs = [asyncio.create_task(workers.run(may_end.wait)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="2 prompts wait to be tokenized") as refused:
        await workers.run(len, "x")
    assert (refused.value.reason, refused.value.retry_after_s) == ("TOKENIZER_BUSY", 1.0)
    may_end.set()
    assert await asyncio.gather(*jobs) == [True, True]
    assert await workers.run(len, "x") == 1
    workers.close()


async def test_a_job_that_takes_too_long_is_given_up_but_counts_until_it_ends(may_end: threading.Event) -> None:
    workers = TextWorkers(num_threads=1, max_jobs=1, timeout_s=0.05)
    with pytest.raises(Unavailable, match=r"longer than 0\.05 s") as given_up:
        await workers.run(may_end.wait)
    assert (given_up.value.reason, given_up.value.retry_after_s) == ("TOKENIZER_TIMEOUT", 1.0)
    with pytest.raises(Overloaded):
        await workers.run(len, "x")
    may_end.set()

    async def there_is_room() -> bool:
        try:
            return await workers.run(len, "x") == 1
        except Overloaded:
            return False

    await until(there_is_room)
    workers.close()


async def test_a_long_text_does_not_hold_up_the_loop() -> None:
    """By shares, not by seconds: a tokenizer that kept Python to itself would pause the loop for nearly all of its time."""
    files = demo_files()
    tokenizer = PromptTokenizer(files["tokenizer.json"].decode(), json.loads(files["tokenizer_config.json"]))
    text = "once upon a time there was a small dog " * 25_000
    workers = TextWorkers()
    loop = asyncio.get_running_loop()
    shares = []
    for _ in range(3):  # the machine's other work may take the loop's turns too
        start_s = last_s = loop.time()
        longest_s = 0.0
        job = asyncio.create_task(workers.run(tokenizer.encode, text, add_special_tokens=False, parse_special_tokens=True))
        while not job.done():
            await asyncio.sleep(0.001)
            longest_s, last_s = max(longest_s, loop.time() - last_s), loop.time()
        assert len(await job) > 200_000
        shares.append(longest_s / (last_s - start_s))
    assert min(shares) < 0.5, shares
    workers.close()


async def test_an_error_of_a_job_is_raised_to_who_waits_for_it() -> None:
    workers = TextWorkers()
    with pytest.raises(ZeroDivisionError):
        await workers.run(divmod, 1, 0)
    workers.close()
