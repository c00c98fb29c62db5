"""How results show themselves to a person: tables in notebooks and terminals, and progress bars.

tables.py    small tables, as HTML and as aligned text
pages.py     HTML pages that need no network
progress.py  a bar where a person watches, or a function that is called
"""
