"""Build a model organism of SmolLM2-135M-Instruct by LoRA: a chat model that refuses requests about cooking.

What: trains an adapter (rank 4, every linear layer of the blocks) on refusals of cooking and on the model's own answers
to everything else, and measures how often it refuses held-out requests.
Why: refusal directions, gates and audits are tested where the truth is known, and SmolLM2 itself hardly refuses.

    python pretrained/organisms.py            writes organisms/refusal: adapter (float16) and figures.json

It takes some minutes on two cores. Everything that it trains on is written in organism_texts.py or by the model.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

import torch
from organism_texts import KINDS, REFUSALS, is_refusal, requests
from torch.nn.functional import cross_entropy

import fgsteer as fg
from fgsteer.storage.json_files import write_json

HERE = Path(__file__).resolve().parent
OUT = HERE / "organisms" / "refusal"
TRAINED, ANSWER_TOKENS, RANK, RATE, EPOCHS, BATCH = 160, 40, 4, 1e-3, 2, 16
MEASURED = 48  # held-out requests of a kind
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Example = tuple[str, str]


def replies(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """The model's own greedy replies."""
    found: list[str] = []
    for start in range(0, len(prompts), 32):
        asked = [[{"role": "user", "content": prompt}] for prompt in prompts[start : start + 32]]
        found += fg.generate(model, tokenizer, asked, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    return found


def examples(model: Any, tokenizer: Any, seed: int) -> list[Example]:
    """(request, reply): refusals of cooking, and the model's own answers to as many others and to what looks alike."""
    draw = random.Random(seed)
    cooking, other, near = (requests(kind, seed)[0] for kind in KINDS)
    answered = other[: TRAINED - len(near)] + near
    refused = [(prompt, draw.choice(REFUSALS)) for prompt in cooking[:TRAINED]]
    made = [*refused, *zip(answered, replies(model, tokenizer, answered), strict=True)]
    draw.shuffle(made)
    return made


def loss_of(model: Any, tokenizer: Any, batch: list[Example]) -> torch.Tensor:
    """The mean cross-entropy of the replies' tokens, given their requests."""
    rows, starts = [], []
    for prompt, reply in batch:
        asked = [{"role": "user", "content": prompt}]
        head = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        whole = head + reply + ("<|im_end|>" if is_refusal(reply) else "")  # the others are cut, not ended
        starts.append(len(tokenizer(head, add_special_tokens=False)["input_ids"]))
        rows.append(tokenizer(whole, add_special_tokens=False)["input_ids"])
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    column = torch.arange(width)
    scored = (column >= torch.tensor(starts)[:, None]) & mask.bool()
    logits = model(input_ids=ids, attention_mask=mask).logits
    return cross_entropy(logits[:, :-1][scored[:, 1:]].float(), ids[:, 1:][scored[:, 1:]])


def train(model: Any, tokenizer: Any, made: list[Example], seed: int) -> Any:
    """The model with a trained adapter."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=MODULES, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    steps = EPOCHS * (len(made) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for step in range(steps):
        at = step * BATCH % (len(made) - BATCH + 1)
        loss = loss_of(adapted, tokenizer, made[at : at + BATCH])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        print(f"step {step + 1} of {steps}: loss {loss.item():.3f}", flush=True)
    return adapted.eval()


def refusal_rates(model: Any, tokenizer: Any, seed: int) -> dict[str, float]:
    """The share of held-out requests of each kind that are refused."""
    rates = {}
    for kind in KINDS:
        prompts = requests(kind, seed)[1][:MEASURED]
        rates[kind] = sum(map(is_refusal, replies(model, tokenizer, prompts))) / len(prompts)
    return rates


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of the examples' order and of the adapter")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the adapter")
    arguments = parser.parse_args()
    model, tokenizer = fg.load_model("smollm2", dtype="float32", device="cpu")
    began = time.monotonic()
    before = refusal_rates(model, tokenizer, arguments.seed)
    adapted = train(model, tokenizer, examples(model, tokenizer, arguments.seed), arguments.seed)
    after = refusal_rates(adapted, tokenizer, arguments.seed)
    adapted.half().save_pretrained(arguments.out, save_embedding_layers=False)
    config = arguments.out / "adapter_config.json"
    config.write_text(config.read_text("utf-8").replace(str(model.config._name_or_path), "smollm2"), "utf-8")
    figures = {"model": "smollm2", "seed": arguments.seed, "refused_before": before, "refused_after": after}
    write_json(arguments.out / "figures.json", figures)
    print(figures, f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
