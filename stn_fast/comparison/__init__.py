"""Parts of ``python -m stn_fast.compare``, which compares self-tuning with searches; benchmarks use them too.

command    a whole comparison
guesses    where hyperparameters start
runs       a method, a guess and a seed as a configuration, and its result
processes  runs in processes of their own, several at a time
search     studies of Optuna, each of whose trials is a run with fixed hyperparameters
plan       all runs that a comparison needs, and those that are kept already
kept_runs  finished runs in a file of JSON lines
sources    the code that made a row
curves     the best loss so far over compute
ranks      Wilcoxon's exact test
table      medians, ranges and tests
report     the table as text
figure     the curves
"""
