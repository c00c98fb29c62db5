"""Contrast sets, corpora and conversations: what texts are read, and how they become prompts and completions.

contrasts.py       ``ContrastSet``: texts with a behavior and texts without it
contrast_files.py  ``load_contrast``: contrast sets from names, files and other forms
shipped.py         the contrast sets and neutral texts that ship with the package
conversations.py   where the prompt of a conversation ends
corpora.py         ``read_documents``: the documents of text files, tables and data sets
file_kinds.py      the suffixes of files that rows and contrast sets are read from
chat.py            texts and chat messages as users pass them, and the chat template
rendering.py       prompts and completions as the strings that a tokenizer reads
"""
