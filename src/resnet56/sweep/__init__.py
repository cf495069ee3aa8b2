"""Search with Optuna for recipe settings that maximize the validation accuracy.

Several processes on one or more machines can work on the same sweep. These processes share only the
database that contains the trials. Each trial has a run directory for each seed. A sweep never uses
the test images.
"""
