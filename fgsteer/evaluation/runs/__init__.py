"""A benchmark's run: what is loaded of it, and what is made of it.

records     the schema of a record, and the run in a file
joining     runs of other methods, joined into one
settings    coefficients and layers chosen on the half "tune"
tables      what methods score on the half "report", with intervals
plots       pictures of a run
report      the HTML page, and the table in Markdown
"""
