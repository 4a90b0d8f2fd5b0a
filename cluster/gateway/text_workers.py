"""Threads for text work, so that a long prompt or a slow template never holds up the streams of others."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, ParamSpec, TypeVar

from quire.cluster.gateway.template_processes import TemplateProcesses
from quire.common.errors import Overloaded, Unavailable

P = ParamSpec("P")
T = TypeVar("T")

NUM_THREADS: Final = 2
# Jobs that may wait or run: as many as requests may wait in the scheduler's queue.
MAX_JOBS: Final = 4096
# Longest wait for a job. A megabyte of text takes 0.3 s to tokenize, 0.4 s of the worst kind tried (2-core x86 machine,
# 2026-11-25); the rest is for jobs that came before.
JOB_TIMEOUT_S: Final = 10.0
RETRY_AFTER_S: Final = 1.0


class TextWorkers:
    """A bounded pool of threads, and the processes in which their chat templates run.

    A thread cannot be ended, so what a job may take is bounded by the size of its text (8 characters per token of the model's
    length). Processes, which could be, do not pay: a tokenizer lets other threads run (tokenization._encode), its time grows with
    the text and not faster, and three texts of a megabyte took two processes 1.4 s and two threads 0.9 s (2 cores, 2026-11-25).
    """

    def __init__(self, *, num_threads: int = NUM_THREADS, max_jobs: int = MAX_JOBS, timeout_s: float = JOB_TIMEOUT_S) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="text")
        self.templates = TemplateProcesses(num_processes=num_threads)
        self._max_jobs = max_jobs
        self._timeout_s = timeout_s
        self._num_jobs = 0  # touched on the event loop alone

    async def run(self, job: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The job's result.

        Raises:
            Overloaded: too many jobs wait.
            Unavailable: it took too long. The thread goes on until the job ends, and counts as busy until then.
        """
        if self._num_jobs >= self._max_jobs:
            text = f"{self._num_jobs} prompts wait to be tokenized; try again"
            raise Overloaded(text, reason="TOKENIZER_BUSY", retry_after_s=RETRY_AFTER_S)
        loop = asyncio.get_running_loop()
        future = self._pool.submit(job, *args, **kwargs)
        self._num_jobs += 1
        future.add_done_callback(lambda done: self._on_done(loop, done))
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            text = f"preparing the prompt took longer than {self._timeout_s:g} s; try again or shorten it"
            raise Unavailable(text, reason="TOKENIZER_TIMEOUT", retry_after_s=RETRY_AFTER_S) from None

    def close(self) -> None:
        """Forget waiting jobs and do not wait for running ones."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.templates.close()

    def _on_done(self, loop: asyncio.AbstractEventLoop, _: Future[Any]) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(self._count_down)

    def _count_down(self) -> None:
        self._num_jobs -= 1
