"""How time is taken: contenders in turn, in random order, in one process, on an allocator in a known state."""

import ctypes
import platform
import random
import statistics
import time

SLOW = 1.0  # seconds; a contender whose first call takes so long is not called again
SAMPLE = 1e-3  # seconds; quicker calls are timed several at a time
QUICK = 5e-3  # seconds; quicker calls find the caches as a call of their own left them, not as another contender did


def warm_allocator():
    """Let glibc keep what is freed instead of returning it to the kernel; must come before torch is imported.

    Else every large output is mapped anew and its pages fault in, or not, depending on what was allocated before: identical
    code then differs by 1.4x.
    """
    if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def interleave(contenders, seconds, rounds, use_threads):
    """Seconds a call, for each contender a list with one number a round.

    Args:
        contenders: name to (function, number of threads).
        seconds, rounds: stop when both are reached.
        use_threads: called with the number of threads before a contender's turn.
    """

    def seconds_of(function, threads, calls=1):
        # On one thread processor time: the time that other programs take is not counted.
        name = "process_time" if threads == 1 else "perf_counter"
        clock, tick = getattr(time, name), time.get_clock_info(name).resolution
        begin = clock()
        for _ in range(calls):
            function()
        return max(clock() - begin, tick) / calls  # in some virtual machines processor time stands still for a while

    def first_calls(function, threads):
        use_threads(threads)
        estimate = seconds_of(function, threads)
        if estimate > SLOW:
            return estimate, 0
        estimate = seconds_of(function, threads)
        return estimate, max(1, min(1000, round(SAMPLE / max(estimate, 1e-9))))

    times = {}
    turns = []
    for name, (function, threads) in contenders.items():
        estimate, calls = first_calls(function, threads)
        times[name] = [] if calls else [estimate]
        if calls:
            turns.append((times[name], function, threads, calls, estimate < QUICK))
    order = random.Random(0)
    begin, done = time.perf_counter(), 0
    while turns and (done < rounds or time.perf_counter() - begin < seconds):
        order.shuffle(turns)
        for taken, function, threads, calls, quick in turns:
            use_threads(threads)
            if quick:
                function()
            taken.append(seconds_of(function, threads, calls))
        done += 1
    return {name: taken * max(1, done // len(taken)) for name, taken in times.items()}


def ratio(numerator, denominator):
    """The median over the rounds of the ratio of two contenders' times: a slow spell of the machine hits both."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def cpu_name():
    """As Linux calls it; with its numbers, for the name may be that of many years."""
    first = {}  # of each key
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                key, _, value = line.partition(":")
                first.setdefault(key.strip().lower(), value.strip())
    except OSError:
        pass
    name = first.get("model name") or first.get("cpu model") or platform.processor() or platform.machine()
    if "cpu family" in first:
        name += f" (family {first['cpu family']}, model {first.get('model', '?')})"
    return name


def cpu_flags():
    """What the processor can do, in Linux's words; empty elsewhere."""
    try:
        with open("/proc/cpuinfo") as file:
            return set(next((line.split(":")[1].split() for line in file if line.startswith(("flags", "Features"))), []))
    except OSError:
        return set()
