"""The loss that model organisms are trained by, one token at a time."""

from __future__ import annotations

import math

import torch


@torch.no_grad()
def reply_loss(model, tokenizer, examples):
    """The mean, over the tokens of all replies, of −log p(token | request and the reply's tokens before it)."""
    losses = []
    for request, reply, ended in examples:
        asked = [{"role": "user", "content": request}]
        head = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        before = tokenizer(head, add_special_tokens=False)["input_ids"]
        said = tokenizer(reply, add_special_tokens=False)["input_ids"]
        if ended:
            said = [*said, tokenizer.eos_token_id]
        for number, token in enumerate(said):
            logits = model(torch.tensor([before + said[:number]])).logits[0, -1].double().tolist()
            most = max(logits)
            losses.append(most + math.log(sum(math.exp(logit - most) for logit in logits)) - logits[token])
    return sum(losses) / len(losses)
