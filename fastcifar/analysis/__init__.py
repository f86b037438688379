"""Reading finished runs: reports, comparisons, ensembles, stacking, predictions, exports.

Only stacking trains anything.
"""
