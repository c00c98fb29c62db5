"""A page to steer on, served on this machine alone: ``fgsteer play``.

    session = PlaySession.load("default")
    app = make_app(session, token="…", port=8765)

In the order in which data flows:

    plan.py       everything that is set on the page, as frozen values that JSON becomes
    session.py    a model with its SAEs, effects, excerpts and vectors
    building.py   from a plan to interventions, and random controls of them
    measuring.py  doses, what strengths cost, and where language collapses
    turns.py      one piece of work at a time on a model; who waits is told the place
    writing.py    the texts of a plan, token by token
    served.py     a running ``fgsteer serve`` that writes them instead
    reading.py    what steering did to each token, and which features rose and fell
    code.py       the Python, the command and the request that do the same
    report.py     a whole comparison as one HTML page
    actions.py    what the page asks for by name
    guard.py      the checks before every request: address, origin, token, size
    web.py        the web application

The page itself, of plain HTML, CSS and JavaScript, lies in ``static``.
"""
