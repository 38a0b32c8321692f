"""Exit signals for any model: annotate its thinking, fit a draft, calibrate the exit, and measure what each part gives.

    records     traces of thinking with what the model would have answered at each paragraph's end, a JSON object a line
    answers     where the answer stands in a reply, and when two are the same
    problems    what the base is asked
    texts       what it makes of it: thinking and reply, told apart by their markers
    sample      texts drawn from the base
    probe       what it answers where its thinking is cut: all places of a text at once, over one cache
    annotator   from a text to a trace
    annotate    the run that makes a file of traces; `cost` says what it took

    labels      what the signals should say at each token of a trace
    unroll      the draft's forward as it is trained; `losses`, `objective`: what for
    drafting    new drafts, and ones that exist
    fit         the run that trains; `data`, `schedule`, `checkpoint`, `processes`, `output`: its parts

    signals     what a draft says along traces, recorded
    rules       when exit rules cut them, offline; `grid`: thousands of rules at once
    learn_then_test   which of them keep a promise
    calibrate   the choice of a rule
    ablate      tables of what each part gives

Nothing here runs in a decode step.
"""
