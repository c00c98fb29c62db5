"""AxBench (arXiv 2501.17148): its data and protocol, for all methods of this package.

    data = fg.load_axbench("axbench/concept500/prod_2b_l10_v1")
    result = fg.axbench(model, tokenizer, data, "run", sae=sae, rater=fg.EndpointRater("gpt-4o-mini"))
    print(result.table)

In the order in which data flows:

protocol     what is run, the instructions of a concept, and how three ratings and many factors become one score
files        AxBench's files, every column checked
contestants  the methods, how each is made and at which strengths it is tried
detection    how well a reading tells texts with the concept from others
reading      tokens' activations, without the beginning that all chats share
building     the vectors of a concept from its training texts
folders      what a run keeps: vectors, readings and texts, from which it goes on
writing      the texts that steered models write, with their perplexity and coherence
ratings      three ratings of a text: by a chat model, or offline
published    the figures of the papers, and what a run has to be to be compared with them
report       the result, as a table and as JSON
axbench      composes them
"""
