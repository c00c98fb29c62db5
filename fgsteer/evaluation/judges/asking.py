"""Questions to a chat model, each asked until its answer has a score, several at a time.

asker = Asker(ChatClient("gpt-4o-mini"), AnswerCache("answers.jsonl"))
asker.scores(["Rate this text from 1 to 10: …"], ["…"])                                    [7]
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Event

from fgsteer.errors import JudgeError
from fgsteer.errors.checks import describe_value, is_whole_number
from fgsteer.evaluation.judges.answer_cache import AnswerCache
from fgsteer.evaluation.judges.chat_client import BrokenAnswerError, ChatClient, ask_all
from fgsteer.storage.json_files import text_sha256


class Asker:
    """Asks a chat model for scores, and asks no question whose answer is kept.

    Args:
        client: The model.
        cache: The scores that are known, which new ones are added to; its ``parse`` reads an answer.
        concurrency: Questions that are open at a time, at most.
        answers: How often a question is asked, at most, while its answer has no score.
        expected: What an answer is to be, for the error of one that never is.

    Raises:
        JudgeError: A number is out of its range.
    """

    def __init__(
        self,
        client: ChatClient,
        cache: AnswerCache,
        *,
        concurrency: int = 8,
        answers: int = 3,
        expected: str = 'an answer {"score": n} with a whole number n from 1 to 10',
    ) -> None:
        if not (is_whole_number(concurrency) and is_whole_number(answers) and concurrency >= 1 and answers >= 1):
            raise JudgeError(
                f"concurrency = {describe_value(concurrency)} and answers = {describe_value(answers)}",
                "two whole numbers of at least 1",
            )
        self.client, self.cache, self.expected = client, cache, expected
        self._concurrency, self._answers = concurrency, answers

    def is_known(self, prompt: str) -> bool:
        """Whether the answer to a question is kept."""
        return self._key(prompt) in self.cache.scores

    def scores(self, prompts: Sequence[str], texts: Sequence[str]) -> list[int]:
        """The score of every question, from the cache or the model; ``texts`` are what errors call the questions.

        Raises JudgeError naming the text that got no score.
        """
        keys = list(map(self._key, prompts))
        asked = {question[0]: question for question in zip(keys, prompts, texts, strict=True)}
        left = [question for key, question in asked.items() if key not in self.cache.scores]
        ask_all(left, lambda question, stop: self._ask(*question, stop), self._concurrency)
        return [self.cache.scores[key] for key in keys]

    def _key(self, prompt: str) -> str:
        client = self.client
        return text_sha256([client.url, client.model, client.options, prompt])

    def _ask(self, key: str, prompt: str, text: str, stop: Event) -> None:
        """Ask for one score and keep it. Raises JudgeError naming the text."""
        broken = ""
        for _ in range(self._answers):
            if stop.is_set():
                return
            try:
                self.cache.add(key, self.cache.parse(self.client.ask(prompt, stop)))
                return
            except BrokenAnswerError as error:
                broken = self.client.quote(str(error))
            except JudgeError as error:
                raise JudgeError(f"The text {text!r:.80} got no score. {error}") from error
        raise JudgeError(
            f"The text {text!r:.80} got no score in {self._answers} answers; the last answer was {broken!r:.80}.",
            self.expected,
            "use a model that follows instructions better",
        )
