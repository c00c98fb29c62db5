"""Judges: how much of a behavior texts show, and how coherent they are, in [0, 1]; and the one table that lists them.

protocols     what a judge is
table         one row for each judge, for the command line and the report
learning      what judges learn from held-out texts, and how they are validated
keywords      a word of the concept, or not
embedding     logistic regression on sentence embeddings
endpoint      a chat model behind an OpenAI-compatible address
asking        puts questions to it, several at a time
chat_client   asks it, again where that can help
answer_cache  the scores in its answers, and the file that keeps them
"""

from fgsteer.evaluation.judges.table import JudgeOptions, JudgeSpec, register, spec, specs

__all__ = ["JudgeOptions", "JudgeSpec", "register", "spec", "specs"]
