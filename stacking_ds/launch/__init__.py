"""`stacking-ds launch`: a command on many hosts through DeepSpeed's launcher, watched to its end.

Each attempt: ask which hosts answer, start DeepSpeed's runner on those, wait, see that nothing of
it is left anywhere, and start again where the run's records say that it is worth it.
"""
