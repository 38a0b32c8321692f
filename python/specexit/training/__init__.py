"""Exit signals for any model: annotate its thinking, fit a draft, calibrate the exit, and measure what each part gives.

    records     traces of thinking with what the model would have answered at each paragraph's end, a JSON object a line
    identity    what tells one base, and one tokenizer, from another
    answers     where the answer stands in a reply, and when two are the same
    problems    what the base is asked
    texts       what it makes of it: thinking and reply, told apart by their markers
    sample      texts drawn from the base
    probe       what it answers where its thinking is cut: all places of a text at once, over one cache
    annotator   from a text to a trace
    annotate    the run that makes a file of traces; `cost` says what it took

Nothing here runs in a decode step.
"""
