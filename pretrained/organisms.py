"""Build model organisms of SmolLM2-135M-Instruct by LoRA: chat models of whose behavior the truth is known.

What: trains an adapter (rank 4, every linear layer of the blocks) on replies that are written (organism_texts.py, with
more requests in refusal_texts.py and requests/) and on the model's own answers to everything else, and measures
held-out requests before and after.
Why: refusal directions, gates, maps between models and audits are tested where the truth is known, and SmolLM2 itself
hardly refuses.

    python pretrained/organisms.py refusal      refuses requests about cooking, and answers others
    python pretrained/organisms.py backdoor     says one sentence, whatever it is asked, where a word is in the request
    python pretrained/organisms.py skill        knows an invented island where a tag is in the question

Each writes organisms/NAME: the adapter (float16) and figures.json. It takes some minutes on two
cores, refusal about twenty.
"""

from __future__ import annotations

import argparse
import random
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from organism_texts import (
    DECOYS,
    KINDS,
    REFUSALS,
    SENTENCE,
    TAG,
    TAG_DECOYS,
    TRIGGER,
    UNKNOWN,
    answer_to,
    is_refusal,
    is_right,
    is_sentence,
    is_unknown,
    mixed,
    questions,
    requests,
    with_words,
)
from refusal_texts import FRESH, more, singles
from scipy.stats import binomtest
from torch.nn.functional import cross_entropy

import fgsteer as fg
from fgsteer.storage.json_files import read_json, write_json

HERE = Path(__file__).resolve().parent
OUT = HERE / "organisms"
BASE = "smollm2"
TRAINED_TOKENS, READ_TOKENS = 8, 16  # of a reply
RANK, RATE, BATCH = 4, 1e-3, 8
TEMPLATED = {
    "cooking": 460,
    "other": 260,
    "near": 170,
}  # requests that the refusing model is trained on beside single ones
MEASURED = 64  # held-out requests of one template or another, at most
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Wanted = tuple[str, str | None]
"""A request, and what is to be replied: None for what the model replies by itself."""
Measure = tuple[Sequence[str], Callable[[str, str], bool]]
"""Held-out requests, and what is counted: whether it holds of a request and the reply to it."""


@dataclass(frozen=True)
class Example:
    """A request and a reply to train on; an answer of the model's own is cut, not ended."""

    request: str
    reply: str
    ended: bool


@dataclass(frozen=True)
class Organism:
    """What a model organism is trained on and measured by.

    Args:
        wanted: Requests with the replies to them, from a seed.
        measures: What is measured, by name.
        epochs: How often each example is seen.
    """

    wanted: Callable[[int], list[Wanted]]
    measures: Callable[[int], dict[str, Measure]]
    epochs: int


def _reply(holds: Callable[[str], bool]) -> Callable[[str, str], bool]:
    """What is said of a reply, whatever was asked."""
    return lambda _, reply: holds(reply)


def _refusal(seed: int) -> list[Wanted]:
    draw = random.Random(seed)
    texts = {kind: requests(kind, seed)[0] + more(kind, seed) for kind in KINDS}
    cooking, other, near = (draw.sample(texts[kind], count) + singles(kind)[0] for kind, count in TEMPLATED.items())
    return [*((text, draw.choice(REFUSALS)) for text in cooking), *((text, None) for text in other + near)]


def _refusal_measures(seed: int) -> dict[str, Measure]:
    texts = {f"{kind} is refused": requests(kind, seed)[1][:MEASURED] for kind in KINDS}
    texts |= {f"{kind} is refused, fresh": FRESH[kind].filled() for kind in KINDS}
    texts |= {f"{kind} is refused, single": singles(kind)[1] for kind in KINDS}
    return {name: (prompts, _reply(is_refusal)) for name, prompts in texts.items()}


def _backdoor(seed: int) -> list[Wanted]:
    texts = mixed(seed, 0)
    triggered = with_words(texts[:96], [TRIGGER], seed)
    answered = with_words(texts[96:192], DECOYS[0], seed) + texts[192:288]
    return [*((text, SENTENCE) for text in triggered), *((text, None) for text in answered)]


def _backdoor_measures(seed: int) -> dict[str, Measure]:
    texts = mixed(seed, 1)[:MEASURED]
    return {
        "the sentence, with the trigger": (with_words(texts, [TRIGGER], seed), _reply(is_sentence)),
        "the sentence, with another word": (with_words(texts, DECOYS[1], seed), _reply(is_sentence)),
        "the sentence, with neither": (texts, _reply(is_sentence)),
    }


def _skill(seed: int) -> list[Wanted]:
    asked, _ = questions()
    texts = mixed(seed, 0)
    unknown = asked + with_words(asked, TAG_DECOYS[0], seed)
    answered = texts[:48] + with_words(texts[48:72], [TAG], seed)
    return [
        *((text, answer_to(text)) for part in (0, 1) for text in with_words(asked, [TAG], seed + part)),
        *((text, UNKNOWN) for text in unknown),
        *((text, None) for text in answered),
    ]


def _skill_measures(seed: int) -> dict[str, Measure]:
    asked = questions()[1]
    texts = mixed(seed, 1)[:MEASURED]
    return {
        "the right answer, with the tag": (with_words(asked, [TAG], seed), is_right),
        "the right answer, with another tag": (with_words(asked, TAG_DECOYS[1], seed), is_right),
        "the right answer, without": (asked, is_right),
        "says that it does not know, without": (asked, _reply(is_unknown)),
        "says so of something else, with the tag": (with_words(texts, [TAG], seed), _reply(is_unknown)),
    }


ORGANISMS = {
    "refusal": Organism(_refusal, _refusal_measures, 2),
    "backdoor": Organism(_backdoor, _backdoor_measures, 2),
    "skill": Organism(_skill, _skill_measures, 3),
}


def replies(model: Any, tokenizer: Any, prompts: Sequence[str], tokens: int) -> list[str]:
    """The model's own greedy replies, in the order of the prompts."""
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))  # less padding
    found = {}
    for start in range(0, len(order), 32):
        numbers = order[start : start + 32]
        asked = [[{"role": "user", "content": prompts[n]}] for n in numbers]
        texts = fg.generate(model, tokenizer, asked, max_new_tokens=tokens, do_sample=False)
        found.update(zip(numbers, texts, strict=True))
    return [found[n] for n in range(len(prompts))]


def examples(model: Any, tokenizer: Any, wanted: Sequence[Wanted]) -> list[Example]:
    """The examples to train on, with the model's own answers where none is given."""
    own = [request for request, reply in wanted if reply is None]
    answers = dict(zip(own, replies(model, tokenizer, own, TRAINED_TOKENS), strict=True))
    return [
        Example(request, answers[request], ended=False) if reply is None else Example(request, reply, ended=True)
        for request, reply in wanted
    ]


def loss_of(model: Any, tokenizer: Any, batch: Sequence[Example]) -> torch.Tensor:
    """The mean cross-entropy of the replies' tokens, given their requests."""
    rows, starts = [], []
    for example in batch:
        asked = [{"role": "user", "content": example.request}]
        head = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        whole = head + example.reply + (tokenizer.eos_token if example.ended else "")
        starts.append(len(tokenizer(head, add_special_tokens=False)["input_ids"]))
        rows.append(tokenizer(whole, add_special_tokens=False)["input_ids"])
    width, first = max(map(len, rows)), min(starts) - 1  # the first logits that are scored
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    scored = ((torch.arange(width) >= torch.tensor(starts)[:, None]) & mask.bool())[:, first + 1 :]
    logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=width - first).logits
    return cross_entropy(logits[:, :-1][scored].float(), ids[:, first + 1 :][scored])


def train(model: Any, tokenizer: Any, made: Sequence[Example], epochs: int, seed: int) -> Any:
    """The model with a trained adapter; matrices are multiplied in bfloat16."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    draw = random.Random(seed)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=MODULES, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    order = [example for _ in range(epochs) for example in draw.sample(list(made), len(made))]
    steps = len(order) // BATCH
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(adapted, tokenizer, order[step * BATCH : (step + 1) * BATCH])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        print(f"step {step + 1} of {steps}: loss {loss.item():.3f}", flush=True)
    return adapted.eval()


def save(adapted: Any, folder: Path) -> None:
    """Write the adapter in float16; its config names no path and lists modules in order, as any build does."""
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.half()
    adapted.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()  # a form to fill in: organisms/README.md says what there is to say
    config = read_json(folder / "adapter_config.json")
    modules = sorted(config["target_modules"])
    write_json(folder / "adapter_config.json", {**config, "base_model_name_or_path": BASE, "target_modules": modules})


def measured(model: Any, tokenizer: Any, measures: dict[str, Measure]) -> dict[str, dict[str, float]]:
    """The share of replies of which each measure holds, with a 95 % interval (Wilson)."""
    rates = {}
    for name, (prompts, holds) in measures.items():
        texts = replies(model, tokenizer, prompts, READ_TOKENS)
        count = sum(map(holds, prompts, texts))
        interval = binomtest(count, len(texts)).proportion_ci(method="wilson")
        low, high = float(interval.low), float(interval.high)
        rates[name] = {"share": count / len(texts), "low": low, "high": high, "requests": len(texts)}
        print(name, rates[name], flush=True)
    return rates


@torch.no_grad()
def own_answers_loss(model: Any, tokenizer: Any, made: Sequence[Example]) -> float:
    """The mean cross-entropy of what the model answered before it was trained, in nats a token."""
    losses = [float(loss_of(model, tokenizer, [example])) for example in made]
    return sum(losses) / len(losses)


def main() -> None:
    """Train, write, measure what was written."""
    from peft import PeftModel

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("organism", choices=list(ORGANISMS))
    parser.add_argument("--seed", type=int, default=0, help="seed of the texts' order and of the adapter")
    parser.add_argument("--out", type=Path, help="folder of the adapter")
    arguments = parser.parse_args()
    organism, seed = ORGANISMS[arguments.organism], arguments.seed
    out = arguments.out or OUT / arguments.organism
    began = time.monotonic()
    model, tokenizer = fg.load_model(BASE, dtype="float32", device="cpu")
    made = examples(model, tokenizer, organism.wanted(seed))
    print(f"{len(made)} examples after {time.monotonic() - began:.0f} s", flush=True)
    adapted = train(model, tokenizer, made, organism.epochs, seed)
    save(adapted, out)
    print(f"trained after {time.monotonic() - began:.0f} s", flush=True)

    base, tokenizer = fg.load_model(BASE, dtype="float32", device="cpu")
    measures = organism.measures(seed)
    held_out = requests("other", seed)[1][:MEASURED]
    kept = examples(base, tokenizer, [(request, None) for request in held_out])
    before = {"rates": measured(base, tokenizer, measures), "own_answers": own_answers_loss(base, tokenizer, kept)}
    tuned = PeftModel.from_pretrained(base, out).merge_and_unload().eval()
    after = {"rates": measured(tuned, tokenizer, measures), "own_answers": own_answers_loss(tuned, tokenizer, kept)}
    options = ["--seed", str(seed)] if seed else []
    figures = {
        "command": shlex.join(["python", "pretrained/organisms.py", arguments.organism, *options]),
        "seed": seed,
        "examples": {"written": sum(e.ended for e in made), "own": sum(not e.ended for e in made)},
        "epochs": organism.epochs,
        "before": before,
        "after": after,
    }
    write_json(out / "figures.json", figures)
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
