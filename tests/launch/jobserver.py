"""A job server that speaks as the dashboard of Ray does, and does nothing: for what a client says and sends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import WSCloseCode, web


@dataclass
class JobServer:
    """What it answers may be changed at any time.

    log: chunks that a job prints. cut: after how many chunks each of the next connections to the log breaks.
    ends: what a job becomes at the end of its log, or after it was stopped for `stopping_s` (then "STOPPED").
    """

    url: str = ""
    token: str = ""
    version: str = "2.60.0"
    log: list[str] = field(default_factory=lambda: ["one\n", "two\n"])
    cut: list[int] = field(default_factory=list)
    unsent: int = 0  # last chunks that the stream of a log lacks, as happens with Ray
    ends: dict[str, Any] = field(default_factory=lambda: {"status": "SUCCEEDED", "driver_exit_code": 0})
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    packages: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, Authorization
    stopping_s: float = 0.0
    on_chunk: Any = None

    def start_job(self, **changes: Any) -> str:
        """A job that somebody else has sent."""
        job = {"type": "SUBMISSION", "status": "RUNNING", "entrypoint": "sleep 1", "start_time": 1.7e12, **changes}
        job.setdefault("submission_id", f"other-{len(self.jobs)}")
        self.jobs[job["submission_id"]] = {**job, "start_time": int(job["start_time"])}
        return str(job["submission_id"])

    @web.middleware
    async def guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        given = request.headers.get("Authorization", "")
        self.requests.append((request.method, request.path, given))
        if self.token and request.path != "/api/authentication_mode":
            if not given:
                return web.Response(status=401, text="Unauthorized: Missing authentication token")
            if given != f"Bearer {self.token}":
                return web.Response(status=403, text="Forbidden: Invalid authentication token")
        answer: web.StreamResponse = await handler(request)
        return answer

    async def mode(self, request: web.Request) -> web.Response:
        return web.json_response({"authentication_mode": "token" if self.token else "disabled"})

    async def version_(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "4", "ray_version": self.version, "ray_commit": "", "session_name": ""})

    async def package(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if request.method == "PUT":
            self.packages[name] = await request.read()
        return web.Response(status=200 if name in self.packages else 404)

    async def jobs_(self, request: web.Request) -> web.Response:
        if request.method == "GET":
            return web.json_response(list(self.jobs.values()))
        body = await request.json()
        now = int(time.time() * 1000)
        self.jobs[body["submission_id"]] = {**body, "type": "SUBMISSION", "status": "RUNNING", "start_time": now}
        return web.json_response({"job_id": body["submission_id"], "submission_id": body["submission_id"]})

    def of(self, request: web.Request) -> dict[str, Any]:
        job = self.jobs.get(request.match_info["id"])
        if job is None:
            raise web.HTTPNotFound(text="Job does not exist")
        if "stopped" in job and time.monotonic() - job["stopped"] >= self.stopping_s:
            job["status"] = "STOPPED"
        return job

    async def job(self, request: web.Request) -> web.Response:
        return web.json_response({k: v for k, v in self.of(request).items() if k != "stopped"})

    async def stop(self, request: web.Request) -> web.Response:
        self.of(request)["stopped"] = time.monotonic()
        return web.json_response({"stopped": True})

    async def logs(self, request: web.Request) -> web.Response:
        self.of(request)
        return web.json_response({"logs": "".join(self.log)})

    async def tail(self, request: web.Request) -> web.StreamResponse:
        job = self.of(request)
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        cut = self.cut.pop(0) if self.cut else None
        for number, chunk in enumerate(self.log[: len(self.log) - self.unsent]):
            if number == cut:
                assert request.transport is not None
                request.transport.abort()
                return socket
            await socket.send_str(chunk)
            if self.on_chunk:
                self.on_chunk()
                await asyncio.sleep(60)
        job.update(self.ends, end_time=int(time.time() * 1000))
        await socket.close(code=WSCloseCode.OK)
        return socket

    async def serve(self, ready: threading.Event, done: asyncio.Event) -> None:
        app = web.Application(middlewares=[self.guard], client_max_size=2**30)
        for path, handler in (
            ("/api/authentication_mode", self.mode),
            ("/api/version", self.version_),
            ("/api/packages/gcs/{name}", self.package),
            ("/api/jobs/", self.jobs_),
            ("/api/jobs/{id}", self.job),
            ("/api/jobs/{id}/stop", self.stop),
            ("/api/jobs/{id}/logs", self.logs),
            ("/api/jobs/{id}/logs/tail", self.tail),
        ):
            app.router.add_route("*", path, handler)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        assert runner.addresses
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        await done.wait()
        await runner.cleanup()


@contextlib.contextmanager
def job_server() -> Iterator[JobServer]:
    server, ready = JobServer(), threading.Event()
    loop, done = asyncio.new_event_loop(), asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(server.serve(ready, done)), daemon=True)
    thread.start()
    assert ready.wait(20)
    yield server
    loop.call_soon_threadsafe(done.set)
    thread.join(20)
    loop.close()


def sent(server: JobServer) -> dict[str, Any]:
    """The newest job as it was sent."""
    return dict(json.loads(json.dumps(list(server.jobs.values())[-1])))
