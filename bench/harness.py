"""The protocol of every bench: check first, then time what passed, our op and its peers in turn.

A family module (``bench_<family>.py``) yields :class:`Group`; :func:`measure` turns each into plain rows.
"""

from __future__ import annotations

import contextlib
import gc
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch


class NotHere(Exception):
    """Why a peer cannot run, as a sentence; raised when it is made or when it is called."""


@dataclass
class Peer:
    """What a case is compared with.

    Attributes:
        name: as shown in the table.
        call: key into :attr:`Group.calls`; None where the peer cannot run here.
        scale: the ratio is ours / (scale * peer); the kept density, where the peer computes everything.
        check: raises when the peer's result is not what ours must be; None where it computes something else on
            purpose (dense attention).
        reason: why it cannot run here.
    """

    name: str
    call: str | None = None
    scale: float = 1.0
    check: Callable[[Any], None] | None = None
    reason: str = ""


@dataclass
class Case:
    """One call of one op.

    Attributes:
        call: what is timed.
        check: raises AssertionError unless the result is the definition's.
        flops, nbytes, exps: work that the op must do at least: arithmetic actually asked for, every tensor read
            or written once, exponentials.
        target: (peer, ratio that may not be exceeded), or None.
        sizes: whatever identifies the case, for the JSON.
    """

    op: str
    name: str
    dtype: torch.dtype
    call: Callable[[], Any]
    check: Callable[[Any], None]
    flops: float = 0.0
    nbytes: float = 0.0
    exps: float = 0.0
    peers: list[Peer] = field(default_factory=list)
    target: tuple[str, float] | None = None
    sizes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Group:
    """Cases over the same tensors, timed in turn, with the peers that they share."""

    name: str
    device: str
    cases: list[Case]
    calls: dict[str, Callable[[], Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """How long to time.

    Attributes:
        seconds: what the timing of one group aims for; checks, which warm up, are not included.
        min_rounds, max_rounds: bounds on the number of rounds, whatever ``seconds`` says.
    """

    seconds: float = 10.0
    min_rounds: int = 5
    max_rounds: int = 51


def short(error: BaseException | str) -> str:
    """The first line of an error, without the paths of this machine."""
    plain = isinstance(error, (str, NotHere))
    text = str(error) if plain else f"{type(error).__name__}: {error}"
    lines = text.strip().splitlines() or [""]
    return re.sub(r"(/[\w.+-]+){2,}", lambda m: m.group(0).rsplit("/", 1)[-1], lines[0])[:300]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New tensors are filled with NaN, so that an element that no kernel wrote fails the check."""
    fill, strict = (
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.are_deterministic_algorithms_enabled(),
    )
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(strict, warn_only=warn_only)


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


@dataclass
class Samples:
    """Microseconds of one call, an entry a round.

    Attributes:
        wall: what counts.
        cpu: processor time of all threads together, on a CPU only: hardly moved by what else the machine does.
        host: what the host took to queue the call, on a GPU only.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)


def interleave(calls: dict[str, Callable[[], Any]], device: str, settings: Settings) -> dict[str, Samples]:
    """Time each call in each round; every round runs all of them, starting one further on.

    On a GPU the L2 cache is overwritten before each call, and events take the time on the device. The device
    then waits for as long as the host took to queue this call the last time, so that a plan of many short
    kernels is not timed as launch gaps: in a model, the host is ahead by a whole attention. Waiting of the host
    inside a call is timed, though.
    """
    timer = _EventTimer() if device.startswith("cuda") else _ClockTimer()
    names = list(calls)
    samples = {name: Samples() for name in names}
    begun = time.perf_counter()
    for done in range(settings.max_rounds):
        spent = time.perf_counter() - begun
        per_round = spent / done if done else 0.0
        if done >= settings.min_rounds and spent + per_round > settings.seconds:
            break
        shift = done % len(names) if names else 0
        for name in names[shift:] + names[:shift]:
            timer.time(name, calls[name])
        timer.collect(samples)
    return samples


class _ClockTimer:
    def __init__(self) -> None:
        self._taken: list[tuple[str, float, float]] = []

    def time(self, name: str, call: Callable[[], Any]) -> None:
        cpu, start = time.process_time(), time.perf_counter()
        call()
        end = time.perf_counter()
        self._taken.append((name, (end - start) * 1e6, (time.process_time() - cpu) * 1e6))

    def collect(self, samples: dict[str, Samples]) -> None:
        for name, wall, cpu in self._taken:
            samples[name].wall.append(wall)
            samples[name].cpu.append(cpu)
        self._taken.clear()


class _EventTimer:
    CYCLES_PER_SECOND = 2e9  # of a GPU clock, about
    LONGEST_WAIT = 0.02  # seconds; what takes the host longer waits for the device by itself

    def __init__(self) -> None:
        # Five times the L2 cache of an H200.
        self._scrub = torch.empty(2**26, dtype=torch.int32, device="cuda")
        self._taken: list[tuple[str, Any, Any, float]] = []
        self._host: dict[str, float] = {}

    def time(self, name: str, call: Callable[[], Any]) -> None:
        self._scrub.zero_()
        wait = min(self.LONGEST_WAIT, 1.5 * self._host.get(name, 0.002))
        torch.cuda._sleep(int(wait * self.CYCLES_PER_SECOND))
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        begun = time.perf_counter()
        call()
        self._host[name] = time.perf_counter() - begun
        end.record()
        self._taken.append((name, start, end, self._host[name] * 1e6))

    def collect(self, samples: dict[str, Samples]) -> None:
        torch.cuda.synchronize()
        for name, start, end, host in self._taken:
            samples[name].wall.append(start.elapsed_time(end) * 1e3)
            samples[name].host.append(host)
        self._taken.clear()


def check_case(case: Case, device: str) -> str:
    """Run a case and compare it with the definition: "" when it passed, else what was wrong."""
    try:
        with poisoned():
            result = case.call()
            synchronize(device)
        case.check(result)
    except Exception as error:
        return short(error) or type(error).__name__
    return ""


def measure(group: Group, settings: Settings, say: Callable[[str], None] = lambda text: None) -> list[dict]:
    """Check every case, time those that passed, and return one row for each; floors are added by the report."""
    faults = {}
    for case in group.cases:
        faults[id(case)] = check_case(case, group.device)
        if faults[id(case)]:
            say(f"{case.op} {case.name}: CHECK FAILED, not timed: {faults[id(case)]}")
    good = [case for case in group.cases if not faults[id(case)]]
    # The checks were the warm-up of the cases; trying the peers is theirs.
    calls: dict[str, Callable[[], Any]] = {f"case {i}": case.call for i, case in enumerate(good)}
    tried: dict[str, str] = {}
    for peer in (peer for case in good for peer in case.peers if peer.call is not None):
        if peer.call not in tried or peer.check is not None:
            tried[peer.call] = _try_peer(peer, group)
        if tried[peer.call]:
            peer.call, peer.reason = None, tried[peer.call]
        else:
            calls[peer.call] = group.calls[peer.call]
    samples = interleave(calls, group.device, settings) if calls else {}
    rows = []
    for case in group.cases:
        row = {
            "group": group.name,
            "op": case.op,
            "case": case.name,
            "dtype": str(case.dtype).removeprefix("torch."),
            "device": group.device,
            "sizes": case.sizes,
            "flops": case.flops,
            "bytes": case.nbytes,
            "exps": case.exps,
            "check": faults[id(case)] or "passed",
            "status": "check failed" if faults[id(case)] else "timed",
        }
        if not faults[id(case)]:
            own = samples[f"case {good.index(case)}"]
            row |= _statistics(own) | _rates(case, statistics.median(own.wall))
            row["peers"] = {peer.name: _compare(own, peer, samples) for peer in case.peers}
            row["target"] = _judge(case.target, row["peers"])
        elif case.target is not None:
            row["target"] = {"peer": case.target[0], "at_most": case.target[1], "verdict": "check failed"}
        rows.append(row)
    _free(group)
    return rows


def _try_peer(peer: Peer, group: Group) -> str:
    """Run a peer and check what it computes: "" when all is well, else why it is left out."""
    try:
        result = group.calls[peer.call]()
        synchronize(group.device)
    except Exception as error:
        return short(error) or type(error).__name__
    try:
        if peer.check is not None:
            peer.check(result)
    except Exception as error:
        return f"its result is not the definition's: {short(str(error))}"
    return ""


def _statistics(own: Samples) -> dict:
    wall = own.wall
    found = {"us": statistics.median(wall), "us_min": min(wall), "us_max": max(wall), "rounds": len(wall)}
    found |= {
        f"{kind}_us": statistics.median(times)
        for kind, times in (("cpu", own.cpu), ("host", own.host))
        if times
    }
    return found | {"samples_us": wall}


def _rates(case: Case, us: float) -> dict:
    return {"tflops": case.flops / us / 1e6, "gbps": case.nbytes / us / 1e3}


def _compare(own: Samples, peer: Peer, samples: dict[str, Samples]) -> dict:
    if peer.call is None:
        return {"reason": peer.reason}
    theirs = samples[peer.call]
    return {
        "us": statistics.median(theirs.wall),
        "scale": peer.scale,
        "ratio": _ratio(own.wall, theirs.wall, peer.scale),
        "ratio_of_minima": min(own.wall) / (peer.scale * min(theirs.wall)),
        **({"cpu_ratio": _ratio(own.cpu, theirs.cpu, peer.scale)} if own.cpu else {}),
        "samples_us": theirs.wall,
    }


def _ratio(own: list[float], theirs: list[float], scale: float) -> float:
    """Median over the rounds. Of one round, the two are close in time: a disturbance hits both."""
    return statistics.median(a / max(scale * b, 1e-9) for a, b in zip(own, theirs, strict=True))


def _judge(target: tuple[str, float] | None, peers: dict[str, dict]) -> dict | None:
    if target is None:
        return None
    name, at_most = target
    peer = peers.get(name, {})
    ratio = peer.get("ratio")
    verdict = "not measured" if ratio is None else "pass" if ratio <= at_most else "fail"
    judged = {"peer": name, "at_most": at_most, "measured": ratio, "verdict": verdict}
    return judged | ({"cpu_measured": peer["cpu_ratio"]} if "cpu_ratio" in peer else {})


def _free(group: Group) -> None:
    group.cases.clear()
    group.calls.clear()
    gc.collect()
    if group.device.startswith("cuda"):
        torch.cuda.empty_cache()
