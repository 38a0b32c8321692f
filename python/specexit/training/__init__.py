"""Exit signals for any model: annotate its thinking, fit a draft, calibrate the exit, and measure what each part gives.

    records     traces of thinking with what the model would have answered at each paragraph's end, a JSON object a line
    identity    what tells one base, and one tokenizer, from another

Nothing here runs in a decode step.
"""
