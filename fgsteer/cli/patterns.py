"""``fgsteer patterns``: where a contrast's vector holds, how many texts it needs, what it costs, what undoes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any

import typer

from fgsteer.cli.app import app
from fgsteer.cli.loading import ModelOptions, load_model
from fgsteer.cli.options import (
    BatchTokensOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    RevisionOption,
    TokensOption,
    TrustOption,
)
from fgsteer.cli.printing import progress_lines, say, show
from fgsteer.cli.values import finite, token_rule
from fgsteer.errors import DataError
from fgsteer.errors.limits import MAX_COUNT

PARTS = {
    "samples": "vectors of few texts beside that of all, and the cosine that is expected",
    "perplexity": "perplexity of plain text, by the share of the activations' norm that is added",
    "slopes": "nats a unit of strength moves the behavior, by layer and sign",
    "styles": "one vector on what it was built from, in other templates, on A/B questions and in open generation",
    "suffix": "a suffix that turns activations against the vector, beside random ones",
}
SHARES = (0.05, 0.1, 0.2, 0.4)  # of the activations' norm
COST = 0.5  # nats a token, at which a strength is found where none is given


@app.command(short_help="Measure how far a vector holds, and what undoes it.")
def patterns(
    contrast: Annotated[str, typer.Argument(help="A contrast set: the name of a shipped one, or a file.")],
    only: Annotated[
        list[str] | None,
        typer.Option(
            autocompletion=lambda incomplete: [part for part in PARTS if part.startswith(incomplete)],
            help=f"Measure this alone: {', '.join(PARTS)}. Repeat for several.",
        ),
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option(
            min=0, max=MAX_COUNT, help="The layer of the vector; by default the middle one. Slopes are of many layers."
        ),
    ] = None,
    coefficient: Annotated[
        float | None,
        typer.Option(
            "--coefficient",
            "-c",
            callback=finite,
            help="The strength for styles and suffix; by default that which costs 0.5 nats a token.",
        ),
    ] = None,
    relative: Annotated[
        bool, typer.Option("--relative", help="Slopes by a share of the activations' norm, not by the coefficient.")
    ] = False,
    length: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="Number of tokens of the suffix.")] = 8,
    steps: Annotated[int, typer.Option(min=0, max=MAX_COUNT, help="Number of steps of its search.")] = 32,
    model: ModelOption = "default",
    tokens: TokensOption = "all",
    batch_tokens: BatchTokensOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure the patterns of a vector that is built from a contrast set by CAA.

    Everything is measured on the held-out part where there is one. The suffix is searched on every other one of
    the shipped prompts. Styles need pairs, such as those of cheerful, verbose and spanish.
    """
    import fgsteer as fg
    from fgsteer.models.hookpoints import blocks_of

    if unknown := sorted(set(only or []) - set(PARTS)):
        raise DataError(f"--only {unknown[0]}", f"one of {', '.join(PARTS)}")
    texts = fg.load_contrast(contrast).hold_out()
    rule = token_rule(tokens)
    if "styles" in (only or ()) and not texts.pairs:
        raise DataError(f"styles of {texts.name!r}, which has no pairs", "pairs, such as those of cheerful")
    parts = only or [part for part in PARTS if part != "styles" or texts.pairs]
    language_model, tokenizer = load_model(ModelOptions(model, device, dtype, revision, trust_remote_code))
    middle = len(blocks_of(language_model)) // 2 if layer is None else layer
    study = _Study(language_model, tokenizer, texts, middle, rule, batch_tokens, coefficient)
    measures: dict[str, Callable[[], Any]] = {
        "samples": study.samples,
        "perplexity": study.perplexity,
        "slopes": lambda: study.slopes(relative),
        "styles": study.styles,
        "suffix": lambda: study.suffix(length, steps),
    }
    found: dict[str, Any] = {}
    with progress_lines("measuring", as_json) as report:
        for number, part in enumerate(parts):
            found[part] = measures[part]()
            report(number + 1, len(parts))
    output = {
        "contrast": texts.name,
        "layer": middle,
        "coefficient": study.coefficient,
        **{part: [asdict(row) for row in value] if isinstance(value, list) else value for part, value in found.items()},
    }
    show(output, as_json, lambda _: _print_patterns(texts.name, middle, study.coefficient, found))


class _Study:
    """Measures the parts on one contrast set and model; the vector and its strength are made when first needed."""

    def __init__(
        self, model: Any, tokenizer: Any, texts: Any, layer: int, rule: Any, batch_tokens: int | None, c: float | None
    ) -> None:
        import fgsteer as fg
        from fgsteer.models.chat import is_chat_model

        self.model, self.tokenizer, self.rule, self.batch_tokens = model, tokenizer, rule, batch_tokens
        self.chat = is_chat_model(model, tokenizer)
        self.replies: Any = texts
        conversations = any(not isinstance(pair.prompt, str) for pair in texts.pairs)
        self.texts: Any = fg.plain_questions(texts) if conversations and not self.chat else texts
        self.stats = fg.collect(
            model, tokenizer, self.texts, hookpoints=layer, tokens=rule, batch_tokens=batch_tokens, keep_pooled=True
        )
        self.vector, self.coefficient = fg.caa(self.stats), c

    @property
    def strength(self) -> float:
        """The coefficient that was given, or found by its cost."""
        from fgsteer.likelihood.strengths import StrengthMeter

        if self.coefficient is None:
            meter = StrengthMeter(self.model, self.tokenizer, self.vector, self.vector.add, chat=self.chat)
            self.coefficient = meter.find(COST).coefficient
        return self.coefficient

    def samples(self) -> Any:
        import fgsteer as fg

        return fg.sample_curve(self.stats)

    def perplexity(self) -> Any:
        import fgsteer as fg

        return fg.perplexity_curve(
            self.model, self.tokenizer, self.vector, SHARES, relative=True, batch_tokens=self.batch_tokens
        )

    def slopes(self, relative: bool) -> Any:
        import fgsteer as fg
        from fgsteer.models.hookpoints import blocks_of

        layers = fg.depth_layers(len(blocks_of(self.model)))
        options: dict[str, Any] = {"tokens": self.rule, "batch_tokens": self.batch_tokens}
        stats = fg.collect(self.model, self.tokenizer, self.texts, hookpoints=layers, **options)
        vectors = [fg.caa(stats, hookpoint=layer) for layer in layers]
        return fg.signed_slopes(
            self.model,
            self.tokenizer,
            vectors,
            self.texts.held_out,
            relative=relative,
            batch_tokens=self.batch_tokens,
        )

    def _prompts(self) -> list[Any]:
        """Questions for a model that chats, openers of texts for another."""
        from fgsteer.data.shipped import load_bench_prompts, load_chat_prompts

        return load_chat_prompts() if self.chat else [*load_bench_prompts()]

    def styles(self) -> Any:
        import fgsteer as fg

        judge = fg.KeywordJudge(contrasts=[self.replies])
        styles = {
            "held-out pairs": self.texts.held_out,
            **({"plain template": fg.plain_questions(self.replies.held_out)} if self.chat else {}),
            "A or B": fg.ab_questions(self.replies.held_out, chat=self.chat),
            "open generation": fg.OpenStyle(self._prompts(), judge, self.replies.name),
        }
        steering = self.vector.add(self.strength)
        return fg.measure_styles(self.model, self.tokenizer, steering, styles, batch_tokens=self.batch_tokens)

    def suffix(self, length: int, steps: int) -> dict[str, Any]:
        import fgsteer as fg

        prompts = self._prompts()
        found = fg.find_suffix(
            self.model,
            self.tokenizer,
            self.vector,
            prompts[::2],
            held_out=prompts[1::2],
            coefficient=self.strength,
            length=length,
            steps=steps,
            batch_tokens=self.batch_tokens,
            progress=False,
        )
        return {
            "suffix": found.suffix,
            "flips": asdict(found.flips),
            "random_flips": asdict(found.random_flips),
            "history": list(found.history),
        }


def _print_patterns(name: str, layer: int, coefficient: float | None, found: dict[str, Any]) -> None:
    """Print each part as a table, or in words."""
    strength = "" if coefficient is None else f", coefficient {coefficient:g}"
    say(f"{name}, CAA at layer {layer}{strength}")
    for part, value in found.items():
        say(f"\n{part}: {PARTS[part]}")
        if part != "suffix":
            say(str(value))
            continue
        say(f"the suffix {value['suffix']!r} brings {_share(value['flips'])} of the other prompts")
        say("back below the unsteered mean,")
        say(f"random suffixes of as many tokens {_share(value['random_flips'])}")


def _share(interval: dict[str, Any]) -> str:
    return f"{interval['mean']:.0%} [{interval['low']:.0%}, {interval['high']:.0%}]"
