"""Experts modules without transformers' decorator: one file per model type.

Each file exports ``adapters(model) -> list[ExpertsAdapter]`` and is named after the model type it
serves (a ``_text`` suffix removed). There is no list to edit.
"""
