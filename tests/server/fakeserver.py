"""A stand-in for a server: answers as one, and misbehaves as told. A bare interpreter starts it in 0.1 s."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

parser = argparse.ArgumentParser()
parser.add_argument("--port", type=int, default=0)
parser.add_argument("--name", default="fake")
parser.add_argument("--say", action="append", default=[], help="log lines before serving")
parser.add_argument("--say-after", default="", help="a log line after the first request")
parser.add_argument("--chatter", type=int, default=0, help="bytes of log before serving")
parser.add_argument("--delay", type=float, default=0.0)
parser.add_argument("--exit", type=int, default=None, help="end before serving, with this code")
parser.add_argument("--die-of", type=int, default=0, help="signal to end itself with before serving")
parser.add_argument("--hang", action="store_true", help="never serve")
parser.add_argument("--deaf", action="store_true", help="ignore SIGTERM")
parser.add_argument("--stray", choices=["session", "orphan", "anonymous"], help="start a child that leaves")
parser.add_argument("--child", action="store_true", help="be that child: sleep")
parser.add_argument("--sick", action="store_true", help="/health answers 503 after the first /sicken")
args = parser.parse_args()

if args.child:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
    sys.exit()
if args.deaf:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if args.stray:
    words = [sys.executable, "-I", "-S", __file__, "--child"]
    if args.stray == "orphan":  # its parent ends at once, so that init (or the guard) inherits it
        words = [sys.executable, "-c", f"import subprocess; subprocess.Popen({words!r}, start_new_session=True)"]
    env = {"PATH": "/usr/bin"} if args.stray == "anonymous" else None
    subprocess.Popen(words, start_new_session=True, env=env)
print("x" * args.chatter, flush=True)
for line in args.say:
    print(line, flush=True)
time.sleep(args.delay)
if args.die_of:
    os.kill(os.getpid(), args.die_of)
if args.exit is not None:
    sys.exit(args.exit)
while args.hang:
    time.sleep(1)


class Handler(BaseHTTPRequestHandler):
    sick = False

    def do_GET(self):
        key = os.environ.get("VLLM_API_KEY", "")
        if self.path == "/health":
            return self.answer(503 if Handler.sick else 200, b"")
        if key and self.headers.get("Authorization") != f"Bearer {key}":
            return self.answer(401, b"")
        if self.path == "/sicken":
            Handler.sick = True
        if self.path == "/crash":
            print(args.say_after, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return self.answer(200, json.dumps({"object": "list", "data": [{"id": args.name}]}).encode())

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args):
        pass


ThreadingHTTPServer(("127.0.0.1", args.port), Handler).serve_forever()
