"""The benchmark: methods × concepts × layers × strengths, every text a record.

plan            what is asked
conditions      what is generated: each method as a function from a strength to an intervention
generators      who generates: transformers in this process, or another engine
distributors    who spreads the work: one process, torchrun, or Ray; by ``concept_runs``, one run for each concept
own_costs       KL on own texts: what each text cost, and strengths of a given cost
run_files       what is written: records, and the strengths beside them
bench           composes them, and scores the texts with judges
"""
