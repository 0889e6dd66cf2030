"""What the learnt response of a run predicts: the validation loss at other hyperparameters, without training.

response.py   the losses, from a trainer in the state of a checkpoint
restoring.py  that trainer, from a run directory
figure.py     the picture
report.py     the table and the page
command.py    all of it, from a run directory to the files
model.py      all of it, from a converted model and a loader to the files
"""
