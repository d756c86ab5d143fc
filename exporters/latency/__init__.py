"""Is the candidate slower than the baseline? Measured in pairs of fresh processes, decided by a sequential test.

Two processes of the same program differ: where memory came to lie, how the allocator grew, which pages are huge. One
that is lucky stays so for life, and no number of runs within it shows that. So each *process pair* starts one process
for the baseline and one for the candidate, on the same core, warms both, and times them in turn in short blocks
(ABBA): what slows the machine down for a while slows both. A pair gives one number, the median over its blocks of
log(candidate / baseline), and the interval is over pairs.

`worker.py` is the process, `pair.py` starts and times two of them, `decision.py` says when what is enough, and
`measure.py` goes on until it is.
"""
