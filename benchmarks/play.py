"""How soon the first token is on the page of ``fgsteer play``, beside the bare model.

The page's time is that of a whole request over HTTP, steered by one feature: from sending the plan to the event that
holds the first token. The bare model's is that of ``model.generate`` from the prompt to the first token that its
streamer gets. Both alternate, so that whatever else the machine does falls on both alike.

    python benchmarks/play.py             writes results/smollm2/play.json
    python benchmarks/play.py --docs      puts the result into docs/guides/play.md
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
import urllib.request
from collections.abc import Sequence
from typing import Any

import torch
from subject import ROOT, command_of, published, results_folder

import fgsteer as fg
from fgsteer.play.actions import FIRST_PROMPT
from fgsteer.play.session import PlaySession, sae_sources
from fgsteer.play.web import serve_page
from fgsteer.storage.json_files import read_json, write_json

PAGE = ROOT / "docs" / "guides" / "play.md"
TOKEN = "benchmark"
REPEATS, WARM_UP = 11, 2
LONG_PROMPT = " ".join(["The ship left the harbor at dawn, and nobody on the shore knew where it was bound."] * 12)
PROMPTS = {"short": FIRST_PROMPT, "long": LONG_PROMPT}


class FirstToken:
    """A streamer that notes when the first token after the prompt came."""

    def __init__(self) -> None:
        self.puts, self.at = 0, 0.0

    def put(self, _: Any) -> None:
        """Take tokens; the prompt comes first."""
        self.puts += 1
        if self.puts == 2:
            self.at = time.perf_counter()

    def end(self) -> None:
        """Do nothing."""


def bare_seconds(session: PlaySession, prompt: str) -> float:
    """Seconds of the bare model to its first token."""
    ids = session.tokenizer(prompt, return_tensors="pt").to(session.model.device)
    streamer = FirstToken()
    started = time.perf_counter()
    session.model.generate(**ids, max_new_tokens=2, do_sample=False, streamer=streamer)
    return streamer.at - started


def page_seconds(address: str, plan: dict[str, Any], sae: str) -> float:
    """Seconds from a request of the page to the event with its first token."""
    base = address.partition("/?")[0]
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
    request = urllib.request.Request(f"{base}/api/write", json.dumps({"plan": plan, "sae": sae}).encode(), headers)
    started = time.perf_counter()
    with urllib.request.urlopen(request) as answer:
        for line in answer:
            if line.startswith(b"data: ") and json.loads(line[6:])["event"] == "text":
                seconds = time.perf_counter() - started
                break
    while any(thread.name == "fgsteer.play" for thread in threading.enumerate()):  # who leaves ends the rest
        time.sleep(0.01)
    return seconds


def measure(name: str) -> dict[str, Any]:
    """Median seconds of both, and their ratio, for each prompt."""
    sources, key = sae_sources(name, None, [])
    session = PlaySession(*fg.load_model(name, device="cpu"), name, sources, first_sae=key)
    item = {"kind": "feature", "sae": key, "feature": 0, "amount": 10.0}
    told: list[str] = []
    ready = threading.Event()
    threading.Thread(
        target=serve_page, args=(session, TOKEN, 0, lambda url: (told.append(url), ready.set())), daemon=True
    ).start()
    ready.wait()
    rows = {}
    for kind, prompt in PROMPTS.items():
        plan = {"prompt": prompt, "items": [item], "max_new_tokens": 2}
        pairs = [(bare_seconds(session, prompt), page_seconds(told[0], plan, key)) for _ in range(WARM_UP + REPEATS)]
        bare, page = (sorted(values) for values in zip(*pairs[WARM_UP:], strict=True))
        ratios = sorted(p / b for b, p in pairs[WARM_UP:])
        rows[kind] = {
            "tokens": len(session.tokenizer(prompt)["input_ids"]),
            "bare_seconds": statistics.median(bare),
            "page_seconds": statistics.median(page),
            "ratio": statistics.median(page) / statistics.median(bare),
            "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
        }
    return rows


def report(result: dict[str, Any]) -> str:
    """The result in words."""
    parts = []
    for kind, row in result["prompts"].items():
        low, high = row["ratio_quartiles"]
        parts.append(
            f"a {kind} prompt of {row['tokens']} tokens {1000 * row['page_seconds']:.0f} ms after the request, "
            f"{row['ratio']:.2f} times the bare model's {1000 * row['bare_seconds']:.0f} ms (quartiles of pairs "
            f"{low:.2f} to {high:.2f})"
        )
    words = (
        f"On {result['model']}, one thread of a CPU, the first token of a steered text is on the page of "
        f"{'; of '.join(parts)}. Medians of {result['repeats']}: `benchmarks/play.py`."
    )
    lines, line = [], ""
    for word in words.split():
        if len(line) + len(word) > 118:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return "\n".join([*lines, line]) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or write the docs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--docs", action="store_true")
    options = parser.parse_args(arguments)
    path = results_folder(options.model) / "play.json"
    if options.docs:
        PAGE.write_text(published(PAGE, "play", report(read_json(path))), "utf-8")
        return
    torch.set_num_threads(1)
    command = command_of("play", arguments)
    result = {
        "command": command,
        "model": {"smollm2": "SmolLM2-135M-Instruct"}.get(options.model, options.model),
        "repeats": REPEATS,
        "torch": torch.__version__,
        "prompts": measure(options.model),
    }
    write_json(path, result)
    print(report(result))


if __name__ == "__main__":
    main()
