"""The sweep over layers, strengths and signs, which generates nothing.

sweep       measures effect and cost
routes      in which order layers are measured
layers      which layers are visited, where they are many
measuring   the cells of one layer after another
kept        what has been measured so far, in a file
answers     the rules by which a sweep answers
results     what was measured, with its answers
plots       pictures of a sweep
page        a sweep as an HTML page
"""
