"""The sweep over layers, strengths and signs, which generates nothing.

sweep       measures effect and cost
answers     the rules by which a sweep answers
results     what was measured, with its answers
plots       pictures of a sweep
"""
