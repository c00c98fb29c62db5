"""Patterns of steering by contrasts: where it holds, how many texts it needs, what it costs, what undoes it.

for row in fg.signed_slopes(model, tokenizer, vectors, fg.load_contrast("love").held_out): print(row)

They are the questions of arXiv 2505.03189 and 2507.11771, each with a measure that a small model can answer.

samples.py     vectors of few texts beside that of all, measured by resampling and expected by a closed form
styles.py      one vector on what it was built from, on other templates, on A/B questions and in open generation
perplexity.py  the perplexity of plain text by strength, of both signs
slopes.py      how much a unit of strength moves answers, by layer and sign
suffix.py      a search for a suffix that undoes a vector, beside random ones
"""
