"""Shows that the tests would notice: breaks a copy of a kernel in one place, builds it for `check` and runs the operator tests.

    python tests/cuda_emulator/break_kernel.py csrc/cuda/FILE [--list] [--only K ...] [--in CASE]

Numbered places are barriers and waits, which are taken out, and bounds, where < becomes <=. A bound may be broken without harm (a
row of padding that no one reads): then look at it. --list prints the places, --only chooses some of them, --in chooses tests by
name, as pytest -k does. The exit status is 1 if something stayed unnoticed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import build

FOLDER = build.BUILD / "broken"
WAITS = re.compile(
    r"__syncthreads\(\);|__syncwarp\(.*?\);|copy_async_wait<.*?>\(\);|copy_async_commit\(\);|show_tensor_cores\(\);"
    r"|math\.wait\(\);"
)
BOUNDS = re.compile(r"(?<=[\w)\]]) < (?=[\w(])")


def breakages(text):
    """What to write where: (begin, end, replacement), in the order of the file; comments stay."""
    comments = [match.span() for match in re.finditer(r"//.*", text)]
    found = [(*match.span(), ";") for match in WAITS.finditer(text)]
    found += [(*match.span(), " <= ") for match in BOUNDS.finditer(text)]
    return sorted(place for place in found if not any(begin <= place[0] < end for begin, end in comments))


def describe(text, place):
    begin = text.rfind("\n", 0, place[0]) + 1
    line = text[begin : text.find("\n", begin)]
    return f"line {text.count(chr(10), 0, begin) + 1}, column {place[0] - begin + 1}: {line.strip()}"


def copy_sources():
    """A copy of csrc, in which files that are still the same keep their times, so that little is compiled."""
    for source in (build.ROOT / "csrc").rglob("*.*"):
        target = FOLDER / "csrc" / source.relative_to(build.ROOT / "csrc")
        if not target.exists() or target.read_bytes() != source.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def first_failure(tests, case):
    environment = {**os.environ, "PYTHONPATH": str(FOLDER), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", *tests]
    command += ["-k", case] if case else []
    done = subprocess.run(command, cwd=build.ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    errors = re.findall(r"^E +(.*)$", done.stdout, re.MULTILINE)
    return errors[0] if errors else (done.stdout + done.stderr)[-500:]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--only", type=int, nargs="+", metavar="K")
    parser.add_argument("--in", dest="case", metavar="CASE")
    arguments = parser.parse_args()
    if build.obstacle():
        raise SystemExit(f"{build.obstacle()}.")
    text = arguments.file.read_text()
    places = breakages(text)
    names = ["test_pool2d.py"] if arguments.file.name.startswith("pool2d") else ["test_conv2d.py", "test_depthwise.py"]
    tests = [f"tests/{name}" for name in names]
    unnoticed = 0
    for number, place in enumerate(places, start=1):
        if arguments.only and number not in arguments.only:
            continue
        print(f"{number:3} {describe(text, place)}", flush=True)
        if arguments.list:
            continue
        copy_sources()
        broken = text[: place[0]] + place[2] + text[place[1] :]
        (FOLDER / arguments.file.resolve().relative_to(build.ROOT)).write_text(broken)
        build.build_package("check", sorted((FOLDER / "csrc" / "cuda").glob("*.cu")), FOLDER)
        failure = first_failure(tests, arguments.case)
        unnoticed += failure is None
        print("    UNNOTICED" if failure is None else f"    {failure}", flush=True)
    raise SystemExit(unnoticed > 0)


if __name__ == "__main__":
    main()
