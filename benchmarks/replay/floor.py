"""What reading the sockets costs in Python at the least: requests out, bytes in, nothing kept, nothing understood.

    python -m benchmarks.replay.floor [--rate 10000] [--holds 0,1,2,4,8] [--repeats 3]

The traffic and the cores of ``benchmarks.replay.run``. One bare loop: sleep until the next look (``hold`` ms after the
last) or send, epoll, ``recvmsg`` with the kernel's stamp for each socket that is ready. Its CPU time per 100,000 chunks
is what a client on this machine, in this language, cannot go below.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import multiprocessing
import os
import select
import socket
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.replay.clients import PROMPT, TOKENS
from benchmarks.replay.run import FIRST_MS, GAP_MS, HERE

PORT = 18666
CONNECTIONS = 4_000
_SO_TIMESTAMPNS = 35


def request() -> bytes:
    asked = {"model": "stub", "stream": True, "max_tokens": TOKENS, "prompt": list(range(PROMPT))}
    asked["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    body = json.dumps(asked).encode()
    return b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def loop(rate: float, seconds: float, hold_s: float, core: int, told: multiprocessing.SimpleQueue) -> None:
    """Puts (CPU seconds, reads, looks)."""
    os.sched_setaffinity(0, {core})
    count = int(rate / TOKENS * seconds)
    due = np.cumsum(np.random.default_rng(0).exponential(TOKENS / rate, count)).tolist()
    epoll, idle, sockets = select.epoll(), [], {}
    for _ in range(min(CONNECTIONS, int(rate / TOKENS * (FIRST_MS + TOKENS * GAP_MS) / 1e3 * 2) + 8)):
        one = socket.create_connection(("127.0.0.1", PORT))
        one.setblocking(False)
        one.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        epoll.register(one.fileno(), select.EPOLLIN)
        sockets[one.fileno()] = one
        idle.append(one)
    receive = {fd: one.recvmsg for fd, one in sockets.items()}
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    data, ancillary = request(), socket.CMSG_SPACE(16)
    gc.disable()
    cpu_s, start, k, left, reads, looks, looked = time.process_time(), time.monotonic(), 0, count, 0, 0, 0.0
    while left:
        now = time.monotonic()
        next_s = start + due[k] if k < count else now + 10.0
        rest_s = min(looked + hold_s, next_s) - now
        if rest_s > 60e-6:
            time.sleep(rest_s)
        looked = time.monotonic()
        ready = epoll.poll(max(0.0, next_s - looked), 512)
        looks += 1
        while k < count and start + due[k] <= time.monotonic():
            idle.pop().send(data)
            k += 1
        for fd, _ in ready:
            got, _, _, _ = receive[fd](65_536, ancillary)
            reads += 1
            if got.endswith(b"0\r\n\r\n"):
                left -= 1
                idle.append(sockets[fd])
    told.put((time.process_time() - cpu_s, reads, looks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=10_000.0, help="chunks/s")
    parser.add_argument("--holds", default="0,1,2,4,8", help="ms between two looks at the sockets")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--server-core", default="0")
    parser.add_argument("--client-core", type=int, default=1)
    args = parser.parse_args()
    print("| hold ms | CPU s per 100,000 chunks: each run, median | reads per look |")
    print("|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        server = Path(folder) / "server"
        subprocess.run(["gcc", "-O2", "-o", str(server), str(HERE / "server.c")], check=True)
        for hold_ms in map(float, args.holds.split(",")):
            costs, per_look = [], 0.0
            for _ in range(args.repeats):
                command = ["taskset", "-c", args.server_core, str(server), str(PORT), str(FIRST_MS), str(GAP_MS)]
                with subprocess.Popen(command) as running:
                    time.sleep(0.3)
                    told = multiprocessing.SimpleQueue()
                    what = (args.rate, args.seconds, hold_ms / 1e3, args.client_core, told)
                    process = multiprocessing.Process(target=loop, args=what)
                    process.start()
                    cpu_s, reads, looks = told.get()
                    process.join()
                    running.kill()
                costs.append(cpu_s / (int(args.rate / TOKENS * args.seconds) * TOKENS) * 1e5)
                per_look = reads / looks
            each = ", ".join(f"{cost:.2f}" for cost in costs)
            print(f"| {hold_ms:g} | {each}: {statistics.median(costs):.2f} | {per_look:.1f} |", flush=True)


if __name__ == "__main__":
    main()
