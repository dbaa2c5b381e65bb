"""The thread that owns the engine.

An engine is for one thread. This one takes submissions and cancellations from a queue, runs rounds
while there is work, and hands what a round brought to the event loop in one call. It never waits
for a client. An error in a round ends the requests that were in it; those that wait go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

from dspark.active import ActiveRequest, Phase
from dspark.engine import Engine
from dspark.errors import DsparkError
from dspark.output import OutputText
from dspark.serve.failures import ApiError, bad_request, internal_error, scrub
from dspark.serve.jobs import Delta, Job

__all__ = ["EngineWorker", "Watcher"]

Watcher: TypeAlias = Callable[[Sequence[ActiveRequest], dict[int, Any]], None]
"""Told, in the engine's thread, that the requests of a job may have got on; keeps notes with it."""

_Command: TypeAlias = Callable[[], None]

_log = logging.getLogger("dspark.serve")


class EngineWorker:
    """Runs an engine in a thread of its own.

    Args:
        engine: The engine; nobody else may use it from now on.
        watch: Told what requests did, before their clients are.
        names: Texts of the machine to keep out of messages, with what stands for them.
    """

    def __init__(
        self, engine: Engine, *, watch: Watcher | None = None, names: dict[str, str] | None = None
    ) -> None:
        self._engine = engine
        self._watch = watch
        self._names = names or {}
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._jobs: dict[Job, None] = {}
        self._outbox: list[Callable[[], None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="dspark-engine", daemon=True)
        self.num_running = 0
        self.num_waiting = 0
        self.cache_pages = engine.cache_pages

    @property
    def is_alive(self) -> bool:
        """True while requests can be run."""
        return self._thread.is_alive() and not self._is_stopping

    # -- from the event loop ------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread; must be called from the event loop that its news go to."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job."""
        self._commands.put(partial(self._begin, job))
        if not self.is_alive:  # nobody may come to take it
            job.fail(internal_error())

    def cancel(self, job: Job) -> None:
        """End a job; one that is done stays as it is."""
        self._commands.put(partial(self._drop, job))

    def stop(self, seconds: float) -> None:
        """End the thread after its round, or stop waiting for it after so many seconds."""
        self._commands.put(None)
        if self._thread.is_alive():
            self._thread.join(seconds)

    # -- in the thread ------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._obey():
                self._round()
                self._report()
        except BaseException:  # noqa: BLE001 - the thread ends here, and the server says so from now on
            _log.exception("the engine's thread has died")
        finally:
            self._is_stopping = True
            self._end_all()
            self._flush()

    def _end_all(self) -> None:
        """Fail what is left when the thread ends."""
        with contextlib.suppress(queue.Empty):
            while True:
                command = self._commands.get(block=False)
                if command is not None:
                    command()
        for job in list(self._jobs):
            try:
                self._fail(job, internal_error())
            except Exception:  # noqa: BLE001 - clients must not wait for a broken engine
                _log.exception("a request could not be cancelled")
                self._outbox.append(partial(job.fail, internal_error()))

    def _obey(self) -> bool:
        """Carry out what the event loop asked for; waits if there is nothing to run."""
        while True:
            is_idle = not self._engine.num_unfinished and not self._outbox
            try:
                command = self._commands.get(block=is_idle)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            self._note_load()

    def _begin(self, job: Job) -> None:
        if self._is_stopping:
            self._outbox.append(partial(job.fail, internal_error()))
            return
        self._jobs[job] = None
        try:
            for index, prompt in enumerate(job.prompts):
                job.requests += self._engine.submit(prompt, job.params, prompt_index=index)
        except DsparkError as exc:
            self._fail(job, bad_request(scrub(exc.message, self._names)))
            return
        except Exception:  # noqa: BLE001 - an error of one request is no error of the others
            _log.exception("a request could not be submitted")
            self._fail(job, internal_error())
            return
        if job.codec is not None:
            for request in job.requests:
                request.output = OutputText(job.codec, job.params.stop)
        error = next((r.error for r in job.requests if r.error is not None), None)
        if error is not None:  # of the request's own making, since nothing has run yet
            self._fail(job, bad_request(scrub(error, self._names)))

    def _drop(self, job: Job) -> None:
        if job in self._jobs:
            self._cancel(job)
            self._settle([job])
            del self._jobs[job]

    def _round(self) -> None:
        if not self._engine.num_unfinished:
            return
        try:
            self._engine.step()
        except Exception:
            if not self._jobs:  # nobody to blame, so it would fail for ever
                raise
            _log.exception("a round failed")
            self._end_round()

    def _end_round(self) -> None:
        """Fail the jobs that were in a round which broke; if none was, all of them."""
        ran = (Phase.PREFILL, Phase.DECODE)
        hit = [job for job in self._jobs if any(r.phase in ran for r in job.requests)]
        for job in hit or list(self._jobs):
            self._fail(job, internal_error())

    def _fail(self, job: Job, error: ApiError) -> None:
        self._cancel(job)
        self._settle([job])
        self._jobs.pop(job, None)
        self._outbox.append(partial(job.fail, error))

    def _cancel(self, job: Job) -> None:
        for request in job.requests:
            self._engine.cancel(request)

    def _report(self) -> None:
        """Hand out what the round brought."""
        self._settle(list(self._jobs))
        for job in list(self._jobs):
            failed = next((r for r in job.requests if r.error is not None), None)
            if failed is not None:
                message = scrub(str(failed.error), self._names)
                self._fail(job, ApiError(500, message, kind="server_error"))
                continue
            deltas = _deltas(job)
            if deltas:
                self._outbox.append(partial(job.take_in, deltas))
            if len(job.reported) == len(job.requests):
                del self._jobs[job]
        self._note_load()
        self._flush()

    def _settle(self, jobs: Sequence[Job]) -> None:
        if self._watch is not None:
            for job in jobs:
                self._watch(job.requests, job.notes)

    def _note_load(self) -> None:
        phases = [r.phase for job in self._jobs for r in job.requests]
        self.num_waiting = phases.count(Phase.WAITING)
        self.num_running = phases.count(Phase.PREFILL) + phases.count(Phase.DECODE)
        self.cache_pages = self._engine.cache_pages

    def _flush(self) -> None:
        """Wake the event loop once for everything."""
        news, self._outbox = self._outbox, []
        if not news or self._loop is None:
            return
        try:
            self._loop.call_soon_threadsafe(_call_all, news)
        except RuntimeError:  # the loop has ended before us, so nobody waits any more
            _log.info("news came after the end")


def _call_all(calls: Sequence[Callable[[], None]]) -> None:
    for call in calls:
        call()


def _deltas(job: Job) -> list[Delta]:
    """What every choice of a job gained since the last time."""
    found = []
    for index, request in enumerate(job.requests):
        is_done = request.phase is Phase.DONE
        if index in job.reported or not (is_done or request.fresh):
            continue
        found.append(_delta(index, request, is_done=is_done))
        if is_done:
            job.reported.add(index)
    return found


def _delta(index: int, request: ActiveRequest, *, is_done: bool) -> Delta:
    count = len(request.fresh)
    delta = Delta(
        index=index,
        pieces=tuple(request.pieces),
        token_ids=tuple(request.fresh),
        logprobs=tuple(request.logprobs[-count:]) if count and request.logprobs else (),
        result=request.result() if is_done else None,
    )
    request.pieces.clear()
    request.fresh.clear()
    return delta
