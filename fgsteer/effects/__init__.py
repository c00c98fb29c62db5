"""Effects: which features a steering vector moves in generated text, measured and predicted (SAE-TS, arXiv 2411.02193).

In the order in which data flows:

    rollouts.py      sampled continuations under many vectors at once, with the same random numbers for all of them
    measuring.py     the plan of a measurement, and its shards: vectors with the changes of features that they cause
    ridge.py         ridge regression from sums that stream
    fitting.py       the linear map fitted to shards, and the figures that tell how well it predicts
    approximator.py  ``EffectApproximator``, which measures, predicts, projects, and is saved and loaded
"""
