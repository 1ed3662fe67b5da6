"""Requests under way, as the parent process sees them: events of the client become records."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, chain, repeat
from typing import TYPE_CHECKING

from tuner.load.client import BEHIND, ENDED, LEFT, OWN_FAULT, READ, SENT, TICK, Event
from tuner.load.connection import Wake, stamps
from tuner.load.records import Record
from tuner.load.sse import Response

if TYPE_CHECKING:
    import numpy as np


_TOGETHER = 4_096


class Lags:
    """Counts of delays, in buckets 3 % wide, so that a quantile over any number of reads is at hand."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._waiting: list[int] = []
        self._n = 0

    def extend(self, lags_ns: Iterable[int]) -> None:
        """Adds each, once."""
        self._waiting.extend(lags_ns)
        if len(self._waiting) >= _TOGETHER:
            self._count()

    def add(self, lag_ns: int, count: int = 1) -> None:
        """Adds one, so many times."""
        us = lag_ns // 1_000
        bits = us.bit_length() - 6
        key = us if bits <= 0 else (us >> bits) << bits
        self._counts[key] = self._counts.get(key, 0) + count
        self._n += count

    def _count(self) -> None:
        """What waits, at once: the same buckets by numpy."""
        import numpy as np

        us = np.array(self._waiting, dtype=np.int64) // 1_000
        self._waiting.clear()
        bits = np.maximum(np.frexp(us)[1] - 6, 0)
        for key, count in zip(*(a.tolist() for a in np.unique((us >> bits) << bits, return_counts=True)), strict=True):
            self._counts[key] = self._counts.get(key, 0) + count
            self._n += count

    def quantile_s(self, q: float) -> float:
        """Nearest rank, rounded down to the bucket's edge; 0 where nothing was counted."""
        self._count()
        left = q * self._n
        for key in sorted(self._counts):
            left -= self._counts[key]
            if left <= 0:
                return key / 1e6
        return 0.0


class Flight:
    """One request between its send and its end; times in nanoseconds after the replay's start."""

    __slots__ = (
        "at_ns",
        "first_byte_ns",
        "first_read_ns",
        "intended_ns",
        "number",
        "read_lag_ns",
        "response",
        "sent_ns",
    )

    def __init__(self, number: int, intended_ns: int, sent_ns: int, counting: str) -> None:
        self.number, self.intended_ns, self.sent_ns = number, intended_ns, sent_ns
        self.at_ns = sent_ns  # of the last bytes: none that follow are older
        self.response = Response(counting)
        self.first_byte_ns: int | None = None
        self.first_read_ns: int | None = None
        self.read_lag_ns = 0

    @property
    def first_token_ns(self) -> int | None:
        times = self.response.times
        return times[0] if times else None

    @property
    def last_token_ns(self) -> int | None:
        times = self.response.times
        return times[-1] if times else None

    @property
    def produced(self) -> int:
        """Output tokens until now."""
        return self.response.seen


class Tower:
    """Follows every request in flight; ``done`` is given the record of each that ends.

    ``input_tokens`` and ``wanted_tokens`` are the trace's columns. Records' times count from ``epoch_ns``. What is
    kept per finished request is left to ``done``.
    """

    def __init__(
        self,
        epoch_ns: int,
        counting: str,
        input_tokens: np.ndarray,
        wanted_tokens: np.ndarray,
        warmup_ns: int,
        done: Callable[[Record], None],
        shards: int = 1,
    ) -> None:
        self._epoch_ns, self._counting, self._done = epoch_ns, counting, done
        self._input, self._wanted, self._warmup_ns = input_tokens, wanted_tokens, warmup_ns
        self.flights: dict[int, Flight] = {}
        self.sent = 0
        self.ended = 0
        self.output_tokens = 0
        self.behind = False  # whether a process gave up because this one took its events too slowly
        self._cut_off = 0
        self._never_sent = 0
        self._ttft_ns, self._with_token = 0, 0
        self._unstamped = 0
        self._exact = 0  # tokens' events whose arrival time is exact
        self._reads = 0
        self._cpu: dict[int, tuple[int, int, int, int]] = {}  # process -> first tick, its CPU time, last tick, its CPU
        self._clocks: dict[int, int] = {}  # process -> until when all that happened in it is known here
        self._shards, self._left = shards, 0
        self._read_lags, self._stamp_errors, self._loop_lags = Lags(), Lags(), Lags()

    def take(self, events: Sequence[Event]) -> None:
        flights = self.flights
        for event in events:
            kind = event[0]
            if kind == READ:
                self._read(*event[1:])
            elif kind == SENT:
                _, number, intended_ns, sent_ns = event
                self.sent += 1
                flights[number] = Flight(number, intended_ns - self._epoch_ns, sent_ns - self._epoch_ns, self._counting)
            elif kind == ENDED:
                self._ended(*event[1:])
            elif kind == TICK:
                _, now_ns, known_ns, late_ns, cpu_ns, process = event
                self._loop_lags.add(late_ns)
                if known_ns:
                    self._clocks[process] = known_ns
                first = self._cpu.get(process, (now_ns, cpu_ns))
                self._cpu[process] = (first[0], first[1], now_ns, cpu_ns)
            elif kind == LEFT:
                self._clocks.pop(event[1], None)
                self._left += 1
            elif kind == BEHIND:
                self.behind = True

    def _read(self, number: int, packed: bytes, wakes: list[Wake], sizes: list[int], data: bytes) -> None:
        """Reads of one response, in their order, as :meth:`Connection.gather` gave them."""
        flight = self.flights.get(number)
        if flight is None:
            return
        epoch_ns, n = self._epoch_ns, len(sizes)
        kernel_ns = stamps(packed)
        stamped = all(kernel_ns)
        # where there is no stamp, the time of the read stands in for it
        times_ns = (
            [kernel - wake[1] - epoch_ns for kernel, wake in zip(kernel_ns, wakes, strict=True)]
            if stamped
            else [
                (kernel - wake[1] if kernel else wake[2]) - epoch_ns
                for kernel, wake in zip(kernel_ns, wakes, strict=True)
            ]
        )
        lags_ns = [wake[2] - epoch_ns - time for wake, time in zip(wakes, times_ns, strict=True)]
        if times_ns[0] < flight.at_ns or min(lags_ns) < 0 or times_ns != sorted(times_ns):
            # the clock of the stamps was set meanwhile, or its distance measured a little otherwise: bytes came no
            # earlier than those before them, and no later than they were read
            reads_ns = [wake[2] - epoch_ns for wake in wakes]
            times_ns = list(accumulate(map(min, times_ns, reads_ns), max, initial=flight.at_ns))[1:]
            lags_ns = [read - time for read, time in zip(reads_ns, times_ns, strict=True)]
        flight.at_ns = times_ns[-1]
        if flight.first_byte_ns is None:
            flight.first_byte_ns, flight.first_read_ns = times_ns[0], wakes[0][2] - epoch_ns
        events = flight.response.feed_all(times_ns, sizes, data)
        self._reads += n
        if stamped and events.count(1) == n:  # nearly always
            self._read_lags.extend(lags_ns)
            self._exact += n
            flight.read_lag_ns = max(flight.read_lag_ns, *lags_ns)
            return
        for kernel, (since, _, read), time, lag_ns, found in zip(
            kernel_ns, wakes, times_ns, lags_ns, events, strict=True
        ):
            # the kernel's stamp is that of the last bytes; others, and bytes without, may have lain since the last look
            self._unstamped += not kernel
            longest_ns = read - since
            flight.read_lag_ns = max(flight.read_lag_ns, lag_ns if kernel and found < 2 else longest_ns)
            if not found:
                continue
            if kernel:
                self._exact += 1
                self._read_lags.add(lag_ns)
                found -= 1
            if found:
                self._read_lags.add(longest_ns, found)
                self._stamp_errors.add(max(0, time + epoch_ns - since), found)

    def _ended(self, number: int, end_ns: int, error: str, retried: bool) -> None:
        flight = self.flights.pop(number, None)
        if flight is None:  # it never left
            return
        self.ended += 1
        response = flight.response
        if not error:
            response.close()
            error = response.error
        elif response.error and error not in ("timeout", "stopped", "cancelled"):
            error = response.error
        if response.counts.count(1) == len(response.counts):
            token_ns = array("q", response.times)
        else:
            token_ns = array("q", chain.from_iterable(map(repeat, response.times, response.counts)))
        self.output_tokens += len(token_ns)
        self._cut_off += bool(error) and response.status == 200
        self._never_sent += error.startswith(OWN_FAULT)
        if token_ns:
            self._ttft_ns += token_ns[0] - flight.sent_ns
            self._with_token += 1
        self._done(
            Record(
                request=number,
                intended_ns=flight.intended_ns,
                sent_ns=flight.sent_ns,
                first_byte_ns=flight.first_byte_ns,
                first_byte_read_ns=flight.first_read_ns,
                first_token_ns=token_ns[0] if token_ns else None,
                last_token_ns=token_ns[-1] if token_ns else None,
                end_ns=end_ns - self._epoch_ns,
                token_ns=token_ns,
                input_tokens=int(self._input[number]),
                prompt_tokens=response.prompt_tokens,
                wanted_tokens=int(self._wanted[number]),
                output_tokens=len(token_ns),
                error=error,
                warmup=flight.intended_ns < self._warmup_ns,
                retried=retried,
                read_lag_ns=flight.read_lag_ns,
            )
        )

    @property
    def lost(self) -> int:
        """Processes that have not said that they are through: once all have ended, those that died."""
        return self._shards - self._left

    @property
    def known_until_ns(self) -> int | None:
        """The time after the start until which everything is known here: what came later may be on its way still, for
        this process can be behind its shards. None before the first word of each, and once all have ended."""
        if not self._clocks or len(self._clocks) + self._left < self._shards:
            return None
        return min(self._clocks.values()) - self._epoch_ns

    def facts(self) -> Mapping[str, float]:
        """What the client knows of itself and of everything it received, warm-up included: its own delays, and what the
        server's own counters can be compared with (the mean TTFT here counts from the actual send)."""
        self._stamp_errors.add(0, self._exact)
        self._exact = 0
        return {
            "client_output_tokens": self.output_tokens,
            "client_ttft_mean_s": self._ttft_ns / 1e9 / max(1, self._with_token),
            "cut_off_requests": self._cut_off,
            "client_failures": self._never_sent,
            "client_processes_lost": self.lost,
            "client_fell_behind": float(self.behind),
            "read_lag_p99_s": self._read_lags.quantile_s(0.99),
            "stamp_error_p99_s": self._stamp_errors.quantile_s(0.99),
            "loop_lag_p99_s": self._loop_lags.quantile_s(0.99),
            "client_cpu_share": max(
                ((cpu - cpu0) / (now - start) for start, cpu0, now, cpu in self._cpu.values() if now > start),
                default=0.0,
            ),
            "kernel_stamped_share": 1.0 - self._unstamped / self._reads if self._reads else 1.0,
        }
