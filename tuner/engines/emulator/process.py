"""The emulator as a process: reads vLLM's command line, plays the start-up, listens, and goes down as vLLM does."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tuner.engines.emulator.assemble import assemble, gpu_of
from tuner.engines.emulator.boot import Boot, BootFailed
from tuner.engines.emulator.clock import Alarm
from tuner.engines.emulator.console import Console
from tuner.engines.emulator.faults import Faults, parse_faults
from tuner.engines.emulator.flags import BadFlag, parse
from tuner.engines.emulator.hardware import Gpu
from tuner.engines.emulator.http import Connection
from tuner.engines.emulator.quality import Answers
from tuner.engines.emulator.service import Identity, Service
from tuner.engines.emulator.simulator import Simulator
from tuner.errors import UsageError

USAGE = "usage: api_server.py [-h] [--model MODEL] [--served-model-name NAME] [--host HOST] [--port PORT] ..."


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> int:
    """Runs until it is told to stop; returns the exit code."""
    environ = os.environ if environ is None else environ
    words = list(sys.argv[1:] if argv is None else argv)
    console = Console()
    try:
        flags = parse(words)
        faults = parse_faults(",".join(filter(None, (flags.get("fault"), environ.get("TUNER_EMULATOR_FAULTS", "")))))
        if "unknown-flag" in faults:
            raise BadFlag("unrecognized arguments: --no-such-flag 1")
        options: dict[str, Any] = json.loads(flags.get("emulator") or "{}")
        gpu = gpu_of(flags, options)
    except (BadFlag, ValueError) as error:
        print(f"{USAGE}\napi_server.py: error: {error}", file=sys.stderr, flush=True)
        return 2
    if "help" in flags:
        print(USAGE)
        return 0
    try:
        return _serve(flags, faults, options, gpu, console, environ)
    except BootFailed as failed:
        return failed.code
    except UsageError as error:
        print(f"api_server.py: error: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def _serve(
    flags: Mapping[str, str | None],
    faults: Faults,
    options: Mapping[str, Any],
    gpu: Gpu,
    console: Console,
    environ: Mapping[str, str],
) -> int:
    model, scale = str(flags.get("model") or ""), float(flags.get("time-scale") or 1.0)
    boot = Boot(console, faults, float(options.get("boot_scale", 1.0)) / scale)
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    with listener:
        address = (str(flags.get("host") or "0.0.0.0"), int(flags.get("port") or 8000))
        simulator, answers = assemble(boot, flags, options, gpu, environ, lambda: _bind(listener, address, boot))
        key = str(flags.get("api-key") or environ.get("VLLM_API_KEY", ""))
        identity = Identity(str(flags.get("served-model-name") or model), key, model)
        return asyncio.run(_run(simulator, answers, identity, console, faults, scale, listener))


def _bind(listener: socket.socket, address: tuple[str, int], boot: Boot) -> None:
    """Binds before the engine starts and listens only when it is ready, as vLLM does."""
    boot.fail("port-taken")
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind(address)
    except OSError as error:
        boot.refuse("server", f"OSError: {error}")


async def _run(
    simulator: Simulator,
    answers: Answers,
    identity: Identity,
    console: Console,
    faults: Faults,
    scale: float,
    listener: socket.socket,
) -> int:
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[int] = loop.create_future()

    def stop(code: int) -> None:
        if code < 0:
            os._exit(0)  # the silent death: nothing is said, nothing is closed
        if not ended.done():
            loop.call_later(0.05, lambda: ended.done() or ended.set_result(code))

    servers: list[asyncio.Server] = []
    service = Service(simulator, answers, identity, console, faults, scale, stop, lambda: servers[0].close())
    service.alarm = Alarm(loop, service.ring)
    service.vocabulary.piece(0)  # reads the tokenizer now: the first request must not wait for it
    if "ignore-sigterm" in faults:
        loop.add_signal_handler(signal.SIGTERM, lambda: None)
    else:
        loop.add_signal_handler(signal.SIGTERM, lambda: stop(0))
    loop.add_signal_handler(signal.SIGINT, lambda: stop(0))
    listener.listen(2048)
    listener.setblocking(False)
    servers.append(await loop.create_server(lambda: Connection(service.handle), sock=listener))
    host, port = listener.getsockname()[:2]
    console.line("Supported tasks: ['generate']", "entry.py:136")
    console.line(f"Starting vLLM server on http://{host}:{port}", "entry.py:140")
    console.raw(f"INFO:     Started server process [{os.getpid()}]")
    console.raw("INFO:     Waiting for application startup.\nINFO:     Application startup complete.")
    gc.collect()
    gc.freeze()
    statistics = asyncio.create_task(_statistics(service))
    code = await ended
    statistics.cancel()
    console.line("[shutdown] API server: shutdown triggered", "launcher.py:254")
    console.raw("INFO:     Shutting down\nINFO:     Application shutdown complete.")
    with contextlib.suppress(Exception):
        servers[0].close()
    return code


async def _statistics(service: Service, every_s: float = 10.0) -> None:
    """vLLM's line every ten seconds while there is work, and the emulator's own about its lateness."""
    before = (service.simulator.prompt_tokens, service.simulator.generation_tokens)
    while True:
        await asyncio.sleep(every_s)
        now = (service.simulator.prompt_tokens, service.simulator.generation_tokens)
        if now == before:
            continue
        emulated_s = every_s * service.scale
        running = sum(len(r.scheduler.running) for r in service.simulator.replicas)
        waiting = sum(len(r.scheduler.waiting) for r in service.simulator.replicas)
        pools = [r.scheduler.pool for r in service.simulator.replicas]
        queries = sum(r.scheduler.cache_queries for r in service.simulator.replicas)
        hits = sum(r.scheduler.cache_hits for r in service.simulator.replicas)
        service.console.line(
            f"Engine 000: Avg prompt throughput: {(now[0] - before[0]) / emulated_s:.1f} tokens/s, Avg generation "
            f"throughput: {(now[1] - before[1]) / emulated_s:.1f} tokens/s, Running: {running} reqs, Waiting: "
            f"{waiting} reqs, GPU KV cache usage: {100 * sum(p.usage for p in pools) / len(pools):.1f}%, Prefix cache "
            f"hit rate: {100 * hits / max(queries, 1):.1f}%",
            "loggers.py:280",
        )
        late = service.lateness
        service.console.line(
            f"emulator: {late.total} deliveries, late by {late.quantile(0.5) * 1e3:.2f} ms (p50), "
            f"{late.quantile(0.99) * 1e3:.2f} ms (p99), {late.max_s * 1e3:.2f} ms (max) of the wall clock",
            "emulator.py:1",
        )
        before = now
