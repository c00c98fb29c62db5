"""The code of a plan: Python, the command line, and a request to a server, each of which does what the page does.

python_code(session, plan), shell_code(session, plan), server_code(session, plan)
"""

from __future__ import annotations

import json
import shlex
from typing import Any

from fgsteer.errors import FgsteerError
from fgsteer.interventions import Intervention
from fgsteer.interventions.table import intervention_spec
from fgsteer.methods.table import spec
from fgsteer.play.building import build_steering
from fgsteer.play.plan import ContrastItem, EditItem, FeatureItem, GateSetting, Item, Plan, VectorItem
from fgsteer.play.session import PlaySession, SAESource
from fgsteer.serving.converting import rows_of
from fgsteer.serving.request import steering as request_of

STEERING_FILE = "steering.safetensors"
SERVED_NAME = "page"
UNSAVED = "# “Save the vector”, under how it acts, downloads this file."
_WIDTH = 88  # of a line that stands alone


def python_code(session: PlaySession, plan: Plan) -> str:
    """A program that writes the steered texts of the page."""
    lines = ["import torch", "", "import fgsteer as fg", ""]
    dtype = "" if session.dtype is None else f", dtype={session.dtype!r}"
    lines.append(f"model, tokenizer = fg.load_model({session.model_name!r}{dtype})")
    keys = _sae_keys(plan)
    names = dict(zip(keys, _names("sae", len(keys)), strict=True))
    for key, name in names.items():
        lines.append(f"{name} = {_load_sae(session.sources[key])}")
    lines.append("")
    steering = []
    for number, item in enumerate(plan.active, 1):
        made, expression = _python_item(session, item, number, plan.chat, names)
        lines += made
        steering.append(f"    {expression},")
    lines += ["steering = [", *steering, "]"] if steering else ["steering = None"]
    lines += ["", f"prompt = {plan.text!r}", f"options = {plan.options!r}"]
    lines += [
        f"for seed in {list(plan.seeds)!r}:",
        "    torch.manual_seed(seed)",
        f"    entries = {'[steering]' if steering else 'None'}",
        "    texts = fg.generate(model, tokenizer, [prompt], steering=entries, **options)",
        "    print(texts[0])",
    ]
    return "\n".join(lines) + "\n"


def _names(stem: str, number: int) -> list[str]:
    return [stem] if number == 1 else [f"{stem}_{n}" for n in range(1, number + 1)]


def _load_sae(source: SAESource) -> str:
    ids = "" if source.sae_id is None else f", {source.sae_id!r}"
    return f"fg.load_sae({source.source!r}{ids})"


def _sae_keys(plan: Plan) -> list[str]:
    """The SAEs that the code of a plan needs, in their order."""
    keys: list[str] = []
    for item in plan.active:
        if isinstance(item, FeatureItem) or (isinstance(item, ContrastItem) and _reads_sae(item)):
            keys.append(item.sae)
        if item.gate is not None:
            keys.append(item.gate.sae)
    return list(dict.fromkeys(keys))


def _reads_sae(item: ContrastItem) -> bool:
    return item.layer is None  # CAA and ACE without a layer act where the SAE does


def _python_item(
    session: PlaySession, item: Item, number: int, chat: bool, saes: dict[str, str]
) -> tuple[list[str], str]:
    """Lines that make an item's vector, and the expression of its intervention."""
    common = [f"scope={str(item.scope_in(chat))!r}"]
    if item.gate is not None:
        common.append(f"when={_python_gate(item.gate, saes)}")
    if isinstance(item, EditItem):
        what = "'off'" if item.edit == "off" else repr((item.edit, item.amount))
        return [], f"fg.edit({', '.join([saes[item.sae], f'{{{item.feature}: {what}}}', *common])})"
    row = intervention_spec(item.op)
    amount = [f"{row.amount}={item.amount!r}"] if row.amount else []
    name = f"vector_{number}"
    call = f"{name}.{row.method or row.name}({', '.join([*amount, *common])})"
    if isinstance(item, FeatureItem):
        return [f"{name} = fg.from_features({saes[item.sae]}, [{item.feature}], normalize=True)"], call
    if isinstance(item, VectorItem):
        path = session.file_of(item.name)
        first = [] if path else [UNSAVED]
        return [*first, f"{name} = fg.SteeringVector.load({str(path or f'{item.name}.safetensors')!r})"], call
    assert isinstance(item, ContrastItem)
    return _python_contrast(item, name, saes), call


def _python_contrast(item: ContrastItem, name: str, saes: dict[str, str]) -> list[str]:
    row = spec(item.method, "build")
    lines = [f"contrast_{name[7:]} = fg.ContrastSet(", "    'typed',"]
    for field in ("positives", "negatives"):
        lines += [f"    {field}=[", *(f"        {text!r}," for text in getattr(item, field)), "    ],"]
    lines.append(")")
    contrast = f"contrast_{name[7:]}"
    if row.needs == "layer":
        at = f"{saes[item.sae]}.hookpoint" if item.layer is None else repr(item.layer)
        lines.append(f"stats = fg.collect(model, tokenizer, {contrast}, hookpoints=[{at}])")
        lines.append(f"{name} = fg.{item.method}(stats, hookpoint={at})")
    else:
        lines.append(f"stats = fg.collect(model, tokenizer, {contrast}, sae={saes[item.sae]})")
        lines.append(f"{name} = fg.{item.method}(stats, {saes[item.sae]})")
    return [*lines, *([f"{name} = {name}.unit()"] if row.unit else [])]


def _python_gate(gate: GateSetting, saes: dict[str, str]) -> str:
    pooled = f".{gate.pooling}()" if gate.pooling else ""
    condition = f"fg.Feature({saes[gate.sae]}, {gate.feature}){pooled} > {gate.above!r}"
    return f"~({condition})" if gate.inverted else condition


def shell_code(session: PlaySession, plan: Plan) -> str:
    """A command that writes the unsteered and the steered texts of the page, one for each seed.

    It reads the steering from the file that the page saves. Where it needs features of several SAEs, it says so
    instead, because the command loads one.
    """
    keys = file_sae_keys(session, plan)
    if len(keys) > 1:
        return "# Features of several SAEs are read: the command line loads one. The Python code does it.\n"
    words = ["fgsteer", "generate", plan.prompt, "-m", session.model_name]
    if plan.active:
        words += ["--steering", STEERING_FILE]
    if keys and plan.active:
        source = session.sources[keys[0]]
        words += ["--sae", source.source, *([] if source.sae_id is None else ["--sae-id", source.sae_id])]
    words += [] if session.dtype is None else ["--dtype", session.dtype]
    words += ["--chat" if plan.chat else "--no-chat"]
    words += ["--system", plan.system] if plan.chat and plan.system else []
    words += ["--max-new-tokens", str(plan.max_new_tokens), "--temperature", f"{plan.temperature!r}"]
    commands = [[*words, "--seed", str(seed)] for seed in plan.seeds]
    # a prompt that begins with a hyphen is no option
    return "\n".join(_wrapped(_with_prompt_last(command)) for command in commands) + "\n"


def _with_prompt_last(words: list[str]) -> list[str]:
    """The command with its prompt after "--" where it would be read as an option."""
    return [*words[:2], *words[3:], "--", words[2]] if words[2].startswith("-") else words


def _wrapped(words: list[str]) -> str:
    """A command over as many lines as it needs; each begins with an option."""
    lines, line = [], ""
    for word in map(shlex.quote, words):
        if line and word.startswith("--") and len(line) + len(word) > _WIDTH // 2:
            lines.append(line)
            line = "  " + word
        else:
            line = f"{line} {word}" if line else word
    return " \\\n".join([*lines, line])


def file_sae_keys(session: PlaySession, plan: Plan) -> list[str]:
    """The keys of the SAEs without which the file of the steering cannot be loaded: of edits and of gates."""
    keys = [item.sae for item in plan.active if isinstance(item, EditItem)]
    keys += [item.gate.sae for item in plan.active if item.gate is not None]
    return list(dict.fromkeys(keys))


def server_request(session: PlaySession, plan: Plan, seed: int, model: str | None = None) -> tuple[str, dict[str, Any]]:
    """The path and the body of a request to ``fgsteer serve`` for one text of the page."""
    body: dict[str, Any] = {"model": session.model_name if model is None else model}
    if plan.chat:
        path, body["messages"] = "/v1/chat/completions", plan.text
    else:
        path, body["prompt"] = "/v1/completions", plan.prompt
    body |= {"max_tokens": plan.max_new_tokens, "temperature": plan.temperature, "seed": seed}
    if plan.active:
        body["vllm_xargs"] = request_of(SERVED_NAME)
    return path, body


def server_code(session: PlaySession, plan: Plan) -> str:
    """Two requests to ``fgsteer serve``: one that loads the steering, one that writes with it.

    Where vLLM cannot steer so, it says why instead.
    """
    if reason := why_not_served(build_steering(session, plan)):
        return f"# vLLM cannot steer so. {reason}\n"
    host = "http://127.0.0.1:8000"
    lines = []
    if plan.active:
        lines += [
            "curl -X PUT -H 'Authorization: Bearer KEY' \\",
            f"  --data-binary @{STEERING_FILE} {host}/v1/steering/{SERVED_NAME}",
        ]
    for seed in plan.seeds:
        path, body = server_request(session, plan, seed)
        lines += [
            f"curl {host}{path} -H 'Content-Type: application/json' \\",
            f"  -d {shlex.quote(json.dumps(body, ensure_ascii=False))}",
        ]
    return "\n".join(lines) + "\n"


def why_not_served(steering: list[Intervention]) -> str:
    """Why vLLM cannot steer so; "" where it can."""
    try:
        for item in steering:
            rows_of(item)
    except FgsteerError as error:
        return str(error)
    return ""
