"""Training with parameter servers: servers hold the model and update it, workers ask for it and send gradients (Li et al. 2014).

    shoal train TASK --workers 2 --servers 1

What goes over a line, and when, is `shoal.schedule`'s affair: transfers go in the order in which the step needs them, in slices, so that an urgent one
overtakes one that is not.
"""
