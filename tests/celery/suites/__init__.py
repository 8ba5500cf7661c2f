"""Suites that others have written, run unmodified: those of Kombu and Celery, from the archives of their sources.

`python -m tests.celery.suites` runs them on real servers and compares with `table`: what fails there is named with its reason.
Whatever else fails is an error, and so is what is named and passes.  Nothing of the archives is part of this project.
"""
