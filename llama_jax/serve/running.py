"""From a call to its answer: jobs of the engine, watched by an event loop."""

import asyncio
import contextlib
import functools
import json
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from llama_jax.errors import LlamaJaxError
from llama_jax.serve.api.call import Call, Event
from llama_jax.serve.api.errors import api_error
from llama_jax.serve.jobs import Delta, Engine, Job

_log = logging.getLogger("llama_jax.serve")


async def answer(
    request: HttpRequest, engine: Engine, call: Call, time_limit: float
) -> Response:
    """Run a call; the client's going away cancels it."""
    scores = []
    if call.scored:
        scores = await asyncio.to_thread(engine.score, call.scored)
    jobs = await asyncio.to_thread(_submit, engine, call)
    begin = call.begin(scores)
    if call.stream:
        return EventStream(call, begin, jobs, time_limit)
    gone = asyncio.ensure_future(_wait_for_disconnect(request.receive))
    work = asyncio.ensure_future(_collect(call, jobs, time_limit))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            return Response(status_code=499)  # nobody reads it
        await work
    finally:
        await _cancel(jobs, gone, work)
    return JSONResponse(call.whole([job.usage for job in jobs]))


def _submit(engine: Engine, call: Call) -> list[Job]:
    """Submit all requests of a call, or none."""
    jobs: list[Job] = []
    try:
        for request in call.requests:
            jobs.append(engine.submit(request, client=call.client))
    except Exception:
        for job in jobs:
            job.cancel()
        raise
    return jobs


async def _collect(call: Call, jobs: Sequence[Job], time_limit: float) -> None:
    async with asyncio.timeout(time_limit):
        async for number, delta in _deltas(jobs, call):
            call.push(number, delta)


async def _deltas(jobs: Sequence[Job], call: Call) -> AsyncIterator[tuple[int, Delta]]:
    """Yield the deltas of jobs as they are made."""
    loop, changed = asyncio.get_running_loop(), asyncio.Event()

    def notify() -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed
            loop.call_soon_threadsafe(changed.set)

    left = {number: request.num_samples for number, request in enumerate(call.requests)}
    for job in jobs:
        job.add_listener(notify)
    while left:
        changed.clear()
        quiet = True
        for number in list(left):
            for delta in jobs[number].poll():
                quiet = False
                left[number] -= delta.finish_reason is not None
                yield number, delta
            if not left[number]:
                del left[number]
        if quiet:
            await changed.wait()


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(jobs: Sequence[Job], *tasks: "asyncio.Future[Any]") -> None:
    for job in jobs:
        job.cancel()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Server-sent events of a call; the client's going away cancels it.

    Args:
      call: whose answer it is.
      begin: its first events.
      jobs: its jobs.
      time_limit: seconds.
    """

    def __init__(
        self, call: Call, begin: list[Event], jobs: Sequence[Job], time_limit: float
    ) -> None:
        self._call, self._begin, self._jobs = call, begin, jobs
        self._time_limit = time_limit
        self.status_code, self.background, self.body = 200, None, b""
        self.init_headers(
            {
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-store",
                "X-Accel-Buffering": "no",
            }
        )
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until the end, or until nobody listens."""
        gone = asyncio.ensure_future(_wait_for_disconnect(receive))
        work = asyncio.ensure_future(self._send(send))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work
        finally:
            await _cancel(self._jobs, gone, work)

    async def _send(self, send: Send) -> None:
        head = {"status": 200, "headers": self.raw_headers}
        await send({"type": "http.response.start", **head})
        write = functools.partial(_write, send)
        try:
            await write(self._begin)
            async with asyncio.timeout(self._time_limit):
                async for number, delta in _deltas(self._jobs, self._call):
                    await write(self._call.push(number, delta))
            await write(self._call.end([job.usage for job in self._jobs]))
        except Exception as error:
            if isinstance(error, OSError) and not isinstance(error, TimeoutError):
                return  # nobody listens
            if not isinstance(error, LlamaJaxError | TimeoutError):
                _log.exception("a stream failed")
            await write([Event(api_error(error).body(), "error")])
        await send({"type": "http.response.body", "body": self._call.last_line})


async def _write(send: Send, events: Sequence[Event]) -> None:
    if events:
        body = "".join(map(_event_text, events)).encode()
        await send({"type": "http.response.body", "body": body, "more_body": True})


def _event_text(event: Event) -> str:
    name = "" if event.name is None else f"event: {event.name}\n"
    return f"{name}data: {json.dumps(event.data, ensure_ascii=False)}\n\n"
