"""Predictions for files of any number: what is read, what the model says, what is written."""
