"""What drives steering: the heads, MLPs and entries of the stream that carry a vector's effect (arXiv 2604.08524).

found = fg.attribute_steering(model, tokenizer, prompts, vec.add(8.0))
print(found.table(), fg.circuit_faithfulness(model, found), fg.freeze_steering(model, found))

parts.py          a block taken apart: heads, queries, keys and values, the MLP, and where each reads the stream
texts.py          prompts with a continuation, and what steering changes at its site
graph.py          what writes to the stream, what reads it, and which edges lie on a path
gradients.py      one pass over the steps of the integral: gradients at nodes and readers, and what nodes changed
attribution.py    the effect of each node and edge, and of each entry at the steered site
agreement.py      how near another run comes to the steered one
circuits.py       what is left of steering when all but the strongest edges, nodes or heads are cut
freezing.py       steering with attention weights, values or MLP outputs of the unsteered run
value_vectors.py  what each head writes where it attends to steered tokens
sparse.py         vectors of few entries
explanation.py    all of it for one vector
page.py           an explanation as an HTML page
"""
